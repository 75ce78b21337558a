import math

import pytest
import torch

import attention as A
from attention import ATTENTION, AttentionConfig, Cache, Mask
from tokenizer import UsageError


def slow_attention(q_BTHK, k_BSGK, v_BSGU, visible, scale):
    """[AIAYN eq 1] one query and one head at a time; query head h reads key head h // (H / G)."""
    B, T, H, _ = q_BTHK.shape
    G, out = k_BSGK.shape[2], q_BTHK.new_zeros(B, T, H, v_BSGU.shape[-1])
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                seen = [s for s in range(k_BSGK.shape[1]) if visible(b, t, s)]
                score = torch.stack([q_BTHK[b, t, h] @ k_BSGK[b, s, g] * scale for s in seen])
                out[b, t, h] = (score.softmax(0)[:, None] * v_BSGU[b, seen, g]).sum(0)
    return out


@pytest.mark.parametrize("T, H, G, K, U", [(1, 1, 1, 2, 2), (7, 4, 2, 6, 6), (9, 3, 1, 4, 5)])
@pytest.mark.parametrize("documents", [False, True])
def test_attend_equals_the_paper(T, H, G, K, U, documents, shapes_checked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, n, w, dtype=torch.float64, requires_grad=True) for n, w in ((H, K), (G, K), (G, U)))
    doc = (torch.arange(T) // 3).expand(2, T)
    mask = A.document_mask(doc) if documents else Mask()
    visible = lambda b, t, s: s <= t and (not documents or doc[b, s] == doc[b, t])
    want, got = slow_attention(q, k, v, visible, 0.3), A.attend(q, k, v, mask, 0.3)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), (q, k, v)), torch.autograd.grad((want * weight).sum(), (q, k, v))):
        torch.testing.assert_close(a, b)


def test_both_cpu_paths_agree():
    """bfloat16 takes the three products, float32 the fused kernel; they differ by rounding alone."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, n, 8) for n in (4, 2, 2))
    mask = A.document_mask((torch.arange(40) // 13).expand(2, 40))
    half = A.attend(*(t.bfloat16() for t in (q, k, v)), mask, 0.35).float()
    assert (half - A.attend(q, k, v, mask, 0.35)).norm() < 0.01 * half.norm()


def test_rope_turns_pairs_and_keeps_only_distance():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 1, 6, dtype=torch.float64)
    at = lambda x, p: A.Rope(torch.tensor([[p]]), 6, 100.0, torch.float64)(x)[0, 0, 0]
    for p in (0, 1, 5):
        for j in range(3):                                       # the pair (x_j, x_{j+3}) as a complex number times e^{i p theta_j}
            want = complex(x[0, 0, 0, j], x[0, 0, 0, j + 3]) * complex(math.cos(p * 100 ** (-2 * j / 6)), math.sin(p * 100 ** (-2 * j / 6)))
            assert abs(complex(at(x, p)[j], at(x, p)[j + 3]) - want) < 1e-6
    y = torch.randn_like(x)
    assert abs(at(x, 9) @ at(y, 4) - at(x, 105) @ at(y, 100)) < 1e-5        # [RoPE eq 16]
    assert abs(at(x, 9) @ at(y, 4) - at(x, 9) @ at(y, 5)) > 1e-3


def slow_mla(layer, x, cfg, theta):
    """[DSV2 eq 9-19] token by token, head by head, in float64."""
    B, T, D = x.shape
    H, N, P, U, R = layer.n_head, layer.nope, layer.rope_dim, layer.v_dim, layer.kv_rank
    rms = lambda z, g: z * g / (z.square().mean() + 1e-6).sqrt()

    def turn(z, p):
        a, b, out = z[:P // 2], z[P // 2:], torch.empty_like(z)
        angle = p * theta ** (-torch.arange(0, P, 2, dtype=torch.float64) / P)
        out[:P // 2], out[P // 2:] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return out

    y = x.new_zeros(B, T, D)
    w_uk_uv, w_q = layer.w_ukv.weight.view(H, N + U, R), layer.w_q.weight.view(H, N + P, -1)
    for b in range(B):
        latent = [rms(layer.w_dkv.weight[:R] @ x[b, s], layer.kv_gain) for s in range(T)]
        k_rope = [turn(layer.w_dkv.weight[R:] @ x[b, s], s) for s in range(T)]
        for t in range(T):
            q_in = rms(layer.w_dq.weight @ x[b, t], layer.q_gain) if cfg.q_lora_rank else x[b, t]
            heads = []
            for h in range(H):
                q = w_q[h] @ q_in
                q = torch.cat([q[:N], turn(q[N:], t)])
                score = torch.stack([q @ torch.cat([w_uk_uv[h, :N] @ latent[s], k_rope[s]]) for s in range(t + 1)]) / (N + P) ** 0.5
                heads.append(sum(p * (w_uk_uv[h, N:] @ latent[s]) for s, p in enumerate(score.softmax(0))))
            y[b, t] = layer.w_o.weight @ torch.cat(heads)
    return y


@pytest.mark.parametrize("q_lora_rank", [0, 6])
def test_mla_equals_the_paper(q_lora_rank, shapes_checked):
    torch.manual_seed(0)
    cfg = AttentionConfig(n_embd=12, n_head=2, q_lora_rank=q_lora_rank, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=7)
    layer = A.MLA(cfg).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    x_BTD = torch.randn(2, 7, 12, dtype=torch.float64)
    rope = A.Rope(torch.arange(7)[None], 4, 10.0, torch.float64)
    torch.testing.assert_close(layer(x_BTD, rope, Mask()), slow_mla(layer, x_BTD, cfg, 10.0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", list(ATTENTION))
def test_cached_steps_equal_the_full_pass_and_nothing_leaks_back(name, shapes_checked):
    torch.manual_seed(0)
    cfg = AttentionConfig(attn=name, n_embd=24, n_head=4, qk_rope_head_dim=4)
    layer, cache = ATTENTION[name](cfg).double(), Cache()
    x_BTD = torch.randn(2, 70, 24, dtype=torch.float64)
    table = lambda a, b: A.Rope(torch.arange(a, b)[None], layer.rope_dim, 100.0)
    full = layer(x_BTD, table(0, 70), Mask())
    with torch.no_grad():
        parts, at = [], 0
        for size in (5, 1, 1, 58, 1, 4):                         # a prompt, single tokens, pieces; the buffers grow on the way
            parts.append(layer(x_BTD[:, at:at + size], table(at, at + size), Mask(), cache))
            at += size
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-9, atol=1e-9)
    assert cache.length == 70 and sum(b[0, 0].numel() for b in cache.buffers) == layer.cache_width
    changed = x_BTD.clone()
    changed[:, 40] += 1
    after = layer(changed, table(0, 70), Mask())
    assert torch.equal(after[:, :40], full[:, :40]) and (after[:, 40:] != full[:, 40:]).all()


@pytest.mark.parametrize("fields, says", [
    (dict(n_head=3), "one of"), (dict(attn="gqa", n_head=4, n_kv_head=3), r"\[1, 2, 4\]"), (dict(attn="mqa", n_head=4, n_kv_head=2), "--attn=gqa"),
    (dict(attn="mla", n_head=4, qk_rope_head_dim=3), "use 4"), (dict(n_head=0), "n_head=0"),
])
def test_impossible_shapes_are_refused(fields, says):
    cfg = AttentionConfig(**dict(n_embd=32) | fields)
    with pytest.raises(UsageError, match=says):
        ATTENTION[cfg.attn](cfg)


def test_odd_rotary_width_is_refused():
    with pytest.raises(UsageError, match="even"):
        A.Rope(torch.zeros(1, 1), 5, 100.0)
