import pytest
import torch
import torch.nn.functional as F

import attention
import model as model_lib
from attention import Cache, Layer, LayerCache
from model import Model, ModelConfig
from tokenizer import UsageError

KINDS = {"mha": dict(), "gqa": dict(attn="gqa", n_kv_head=2), "mla": dict(attn="mla"), "moe": dict(moe=True, n_expert=4, n_dense_layer=1),
         "mla moe": dict(attn="mla", moe=True, n_expert=4, n_dense_layer=1), "swa": dict(attn="swa", window=5),
         "mixed": dict(layers="swa,mha", window=3)}


def tiny(mtp=1, dtype=torch.float32, **fields):
    """A model whose weights are large enough to prefer something."""
    cfg = ModelConfig(**dict(vocab_size=17, n_layer=2, n_embd=16, n_head=4, seq_len=64, mtp=mtp, init_std=0.3) | fields)
    return Model(cfg).to(dtype)


def batch_of(B=3, T=14, V=17, seed=0):
    """Packed rows: documents of unequal length, some weights 0, some fractions."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (B, T + 1), generator=g)
    docs = torch.stack([torch.tensor([0] * (3 + b) + [1] * 2 + [2] * (T - 5 - b)) for b in range(B)])
    weights = torch.rand(B, T, generator=g) * (torch.rand(B, T, generator=g) > 0.2)
    weights[:, :-1] *= docs[:, :-1] == docs[:, 1:]
    return dict(tokens=ids[:, :-1], targets=ids[:, 1:], weights=weights, doc_ids=docs)


# ---- The equations, slowly ----

def slow_rms(x, gain, eps):
    return x * gain / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def slow_block(block, cfg, x, positions):
    """A Llama block on one row [T, D], token by token."""
    H, K = cfg.n_head, cfg.n_embd // cfg.n_head

    def turn(v, position):
        out = v.clone()
        for j in range(K // 2):
            angle = torch.tensor(position / cfg.rope_theta ** (2 * j / K), dtype=v.dtype)
            a, b = v[j], v[j + K // 2]
            out[j], out[j + K // 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return out

    h, w, rows = slow_rms(x, block.res1.pre.weight, cfg.norm_eps), block.attn, []
    for t in range(len(x)):
        heads = []
        for i in range(H):
            part = slice(i * K, (i + 1) * K)
            q = turn((w.w_q.weight @ h[t])[part], positions[t])
            score = torch.stack([q @ turn((w.w_k.weight @ h[s])[part], positions[s]) / K**0.5 for s in range(t + 1)]).softmax(0)
            heads.append(sum(p * (w.w_v.weight @ h[s])[part] for s, p in enumerate(score)))
        rows.append(x[t] + w.w_o.weight @ torch.cat(heads))
    y = torch.stack(rows)
    h, m = slow_rms(y, block.res2.pre.weight, cfg.norm_eps), block.mlp
    return y + (F.silu(h @ m.w_gate.weight.T) * (h @ m.w_up.weight.T)) @ m.w_down.weight.T


@pytest.mark.parametrize("normed", [True, False])
def test_mtp_equals_the_paper(normed):
    m = tiny(2, torch.float64, mtp_normed=normed, tie_embeddings=False).eval()
    with torch.no_grad():
        for name, p in m.named_parameters():                     # gains that matter
            if p.ndim == 1:
                p.copy_(1 + 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(len(name))))
    ids, T = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]), 8
    x = m.embed.weight[ids]
    for block in m.blocks:
        x = slow_block(block, m.cfg, x, range(T))
    head = lambda x, gain: slow_rms(x, gain, m.cfg.norm_eps) @ m.head.weight.T
    torch.testing.assert_close(m(ids[None])[0], head(x, m.norm.weight), rtol=1e-6, atol=1e-6)
    state, got = slow_rms(x, m.norm.weight, m.cfg.norm_eps) if normed else x, m.mtp_logits(ids[None])
    assert [tuple(t.shape) for t in got] == [(1, 7, 17), (1, 6, 17)]
    for k, (logits, module) in enumerate(zip(got, m.mtp), 1):
        joined = [module.proj.weight @ torch.cat([slow_rms(m.embed.weight[ids[i + k]], module.norm_embed.weight, m.cfg.norm_eps),
                                                  slow_rms(state[i], module.norm_hidden.weight, m.cfg.norm_eps)])
                  for i in range(T - k)]                                                                         # [DSV3 eq 21]
        x = slow_block(module.block, m.cfg, torch.stack(joined), range(k, T))                                    # [DSV3 eq 22]
        torch.testing.assert_close(logits[0], head(x, module.norm.weight), rtol=1e-6, atol=1e-6)                 # [DSV3 eq 23]
        state = slow_rms(x, module.norm.weight, m.cfg.norm_eps) if normed else x


@pytest.mark.parametrize("fields", [*KINDS.values(), dict(attn="lightning"), dict(attn="gdn"), dict(pos="learned", norm="layer"), dict(norm_at="post"),
                                    dict(pos="t5"), dict(norm_at="deepnorm", head_bias=True), dict(logit_softcap=5.0, norm_at="sandwich")])
def test_slots_see_only_what_came_before_and_stay_in_their_document(fields, shapes_checked):
    m, batch = tiny(2, **fields).eval(), batch_of()
    tokens, docs = batch["tokens"], batch["doc_ids"]
    whole = m.mtp_logits(tokens, doc_ids=docs)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 17                     # of document 2
    for k, (a, b) in enumerate(zip(whole, m.mtp_logits(changed, doc_ids=docs)), 1):
        assert a.shape == (3, 14 - k, 17)
        assert torch.equal(a[:, :9 - k], b[:, :9 - k]) and (a[:, 9 - k:] - b[:, 9 - k:]).abs().amax(-1).gt(0).any()
    for row in range(3):                                         # a document alone gives what it gave in its row
        for doc in range(3):
            here = (docs[row] == doc).nonzero()[:, 0]
            start, n = int(here[0]), len(here)
            if n > 2:
                for k, logits in enumerate(m.mtp_logits(tokens[row:row + 1, here]), 1):
                    torch.testing.assert_close(logits[0], whole[k - 1][row, start:start + n - k], rtol=1e-4, atol=1e-4)


# ---- The loss ----

@pytest.mark.parametrize("fields", [dict(), dict(moe=True, n_expert=4), dict(head_bias=True)])
@pytest.mark.parametrize("with_docs", [True, False])
def test_loss_equals_the_sum_by_hand(fields, with_docs):
    m, batch = tiny(2, mtp_weight=0.7, **fields), batch_of()
    docs = batch["doc_ids"] if with_docs else torch.zeros_like(batch["doc_ids"])
    if not with_docs:
        del batch["doc_ids"]
    where = dict(doc_ids=docs) if with_docs else {}
    B, T = docs.shape
    main, want, weight = m(batch["tokens"], **where).log_softmax(-1), 0.0, 0.0
    nll, seen = [0.0] * 3, [0.0] * 3
    depths = [main, *(logits.log_softmax(-1) for logits in m.mtp_logits(batch["tokens"], **where))]
    for k, logp in enumerate(depths):
        for b in range(B):
            for i in range(T - k):
                if docs[b, i] == docs[b, i + k]:                 # [DSV3 eq 24] slot i predicts what comes after token i + k
                    nll[k] = nll[k] - batch["weights"][b, i + k] * logp[b, i, batch["targets"][b, i + k]]
                    seen[k] += batch["weights"][b, i + k]
    loss_sum, weight_sum, metrics = m.loss(batch)
    torch.testing.assert_close(loss_sum, nll[0] + 0.7 / 2 * (nll[1] + nll[2]))                                   # [DSV3 eq 25]
    torch.testing.assert_close(weight_sum, batch["weights"].sum())
    for k, name in enumerate(("nll", "mtp1_nll", "mtp2_nll")):
        torch.testing.assert_close(metrics[name], torch.stack([nll[k].detach(), torch.as_tensor(seen[k])]))
    m.eval()
    torch.testing.assert_close(m.loss(batch)[0], nll[0])         # evaluation is of the next token alone


def test_micro_batches_are_one_batch():
    m, batch = tiny(2, moe=True, n_expert=4), batch_of(B=4)

    def gradient(parts):
        m.zero_grad()
        weight = batch["weights"].sum()
        total = 0
        for part in parts:
            loss_sum, _, _ = m.loss({key: t[part] for key, t in batch.items()})
            (loss_sum / weight).backward()
            total += loss_sum.detach()
        return total, [p.grad.clone() for p in m.parameters()]

    whole, parts = gradient([slice(0, 4)]), gradient([slice(0, 1), slice(1, 2), slice(2, 4)])
    torch.testing.assert_close(whole, parts)
    assert all(g.abs().sum() > 0 for g, (name, p) in zip(whole[1], m.named_parameters()) if "mtp" in name and "experts" not in name)


def test_depth_zero_changes_nothing_and_modules_leave_the_main_model_alone():
    plain, deep, batch = tiny(0), tiny(2), batch_of()
    assert not any(name.startswith("mtp") for name in plain.state_dict()) and plain.mtp_logits(batch["tokens"]) == []
    same = {name: t for name, t in deep.state_dict().items() if not name.startswith("mtp")}
    assert same.keys() == plain.state_dict().keys() and all(torch.equal(t, same[name]) for name, t in plain.state_dict().items())
    assert torch.equal(plain(batch["tokens"]), deep(batch["tokens"]))
    assert torch.equal(plain.loss(batch)[0], deep.eval().loss(batch)[0]) and plain.loss(batch)[2] == {}
    assert deep.train().loss(batch)[0] > plain.loss(batch)[0]
    assert torch.equal(plain.generate(batch["tokens"], 9), deep.generate(batch["tokens"], 9))
    names = {name for name in deep.state_dict() if name.startswith("mtp.1.") and "block" not in name}
    assert names == {f"mtp.1.{part}.weight" for part in ("norm_embed", "norm_hidden", "proj", "norm")}
    moe = tiny(1, moe=True, n_expert=4, n_dense_layer=1)
    assert "mtp.0.block.mlp.router.weight" in moe.state_dict() and "blocks.0.mlp.w_up.weight" in moe.state_dict()
    table = model_lib.parameter_table(deep)
    assert table["mtp"] == sum(p.numel() for p in deep.mtp.parameters())
    assert {**table, "mtp": 0} == {**model_lib.parameter_table(plain), "mtp": 0}


# ---- Self-speculation ----

def count_calls(m):
    """[tokens read by each call of the main model]"""
    calls = []
    m.register_forward_pre_hook(lambda module, args: calls.append(args[-1].shape[1]))
    return calls


def learn(m, row, steps=60):
    """Teach the row by heart, modules too."""
    batch = dict(tokens=row[:, :-1], targets=row[:, 1:], weights=torch.ones(row[:, 1:].shape))
    optimizer = torch.optim.Adam(m.parameters(), 0.01)
    for _ in range(steps):
        loss_sum, weight_sum, metrics = m.loss(batch)
        optimizer.zero_grad()
        (loss_sum / weight_sum).backward()
        optimizer.step()
    return {name: (nll / weight).item() for name, (nll, weight) in metrics.items()}


PERIOD = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3] * 4])


@pytest.mark.parametrize("D", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_speculation_equals_plain_decoding(kind, D):
    m = tiny(D, **KINDS[kind], init_std=0.2)
    learn(m, PERIOD[:, :24], 12)                                 # half learnt: some drafts right, some wrong
    tokens = torch.cat([PERIOD[:, 2:9], torch.randint(17, (2, 7), generator=torch.Generator().manual_seed(1))])
    ragged = [tokens[0].tolist(), tokens[1, :2].tolist()]
    for prompt, how in ((tokens[:1], {}), (tokens[:, :1], {}), (ragged, {}), (tokens[:1], dict(stop=[5])), (ragged, dict(stop=[5])),
                        (tokens, dict(repetition_penalty=1.3)), (ragged, dict(temperature=0.5, top_k=6))):
        seeded = lambda: dict(generator=torch.Generator().manual_seed(7))
        plain, calls = m.generate(prompt, 16, **how, **seeded()), count_calls(m)
        drafted = m.generate(prompt, 16, draft=True, **how, **seeded())
        assert len(plain) == len(drafted) and all(torch.equal(a, b) for a, b in zip(plain, drafted))
        assert len(calls) == m.drafted["calls"] and sum(calls[1:]) == len(calls) - 1 + m.drafted["drafted"]
        if not how:
            assert len(calls) == m.drafted["calls"] and 16 == m.drafted["calls"] + m.drafted["accepted"]
            assert max(calls[1:]) <= 1 + D
        m._forward_pre_hooks.clear()


@pytest.mark.parametrize("D", [1, 2])
def test_what_is_known_by_heart_takes_fewer_calls(D):
    m = tiny(D, init_std=0.1)
    metrics = learn(m, PERIOD, 120)
    assert max(metrics.values()) < 0.3
    calls = count_calls(m)
    out = m.generate(PERIOD[:, :12], 24, draft=True)
    assert torch.equal(out[:, :36], PERIOD[:, :36])
    assert calls == [12] + {1: [2] * 11 + [1], 2: [3] * 7 + [2]}[D]            # one id from the prompt, then 1 + D a call
    assert m.drafted == dict(calls=len(calls), drafted=24 - len(calls), accepted=24 - len(calls))


@pytest.mark.parametrize("fields", [dict(attn="mla"), dict(pos="learned"), dict(attn="swa", window=4), dict(mtp_normed=False)])
def test_drafts_are_what_mtp_logits_say(fields):
    """The modules' caches hold what a pass over the whole row computes, after rejections, too."""
    m, seen, lengths = tiny(3, **fields), [], []
    ahead, draft = Model.ahead, model_lib.Drafter.__call__

    def spying(self, k, *args):
        out = ahead(self, k, *args)
        seen[-1].append(self.logits(out[1][:, -1]))
        return out

    def noting(self, cache, read, new, rejected, n):
        lengths.append(cache.length - rejected + 1)              # ids known by now
        seen.append([])
        return draft(self, cache, read, new, rejected, n)

    learn(m, PERIOD[:, :24], 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "ahead", spying)
        patch.setattr(model_lib.Drafter, "__call__", noting)
        rows = m.generate([[3, 1, 4, 1, 5, 9, 2], [7, 8]], 25, draft=True)
    m.eval()
    assert len(seen) > 5 and m.drafted["accepted"] < m.drafted["drafted"]
    for length, drafts in zip(lengths, seen):
        for b, row in enumerate(rows):
            known = row[:length - (7 - (7, 2)[b])][None]         # less the padding
            for k, logits_BV in enumerate(drafts, 1):
                torch.testing.assert_close(logits_BV[b], m.mtp_logits(F.pad(known, (0, 3 - k)))[k - 1][0, known.shape[1] - k - 1],
                                           rtol=1e-3, atol=1e-3)
                known = torch.cat([known, logits_BV[b].argmax().view(1, 1)], 1)


def test_a_module_places_tokens_where_they_stand():
    """Learned positions: the embedding of token i + k is that of place i + k in its document."""
    m, batch = tiny(2, pos="learned").eval(), batch_of()
    here = attention.places_in_documents(batch["doc_ids"], 14, torch.device("cpu"))
    got, places = [], []
    embedded = Model.embedded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "embedded", lambda self, tokens, positions, *rest: (got.append(tokens), places.append(positions),
                                                                                 embedded(self, tokens, positions, *rest))[2])
        m.mtp_logits(batch["tokens"], doc_ids=batch["doc_ids"])
    for k in range(3):
        assert torch.equal(got[k][:, :14 - k], batch["tokens"][:, k:]) and torch.equal(places[k][:, :14 - k], here[:, k:])


def test_a_row_that_has_ended_does_not_hold_up_the_others():
    m = tiny(1, init_std=0.1)
    other = torch.cat([torch.tensor([[10, 11, 12, 13, 14, 10, 11, 12, 13, 14, 10, 11, 12, 16]]), torch.randint(7, 16, (1, 26))], 1)
    rows = torch.cat([PERIOD, other])
    learn(m, rows, 150)
    out = m.generate(rows[:, :12], 24, draft=True, stop=[16])
    assert torch.equal(out[:1, :36], PERIOD[:, :36]) and (out[1, 13:] == 16).all()
    assert m.drafted["calls"] == 13 and m.drafted["accepted"] == 11


def test_generation_ends_in_time_and_leaves_the_mode_alone(shapes_checked):
    m, tokens = tiny(2), torch.tensor([[3, 1, 4]])
    for n in (0, 1, 2, 3):
        assert torch.equal(m.generate(tokens, n, draft=True), m.generate(tokens, n)) and m.training
    learned = tiny(2, pos="learned", seq_len=9)                  # never reads beyond the last position
    assert torch.equal(learned.generate(tokens, 7, draft=True), learned.generate(tokens, 7))


# ---- Cropping ----

@pytest.mark.parametrize("fields", [dict(), dict(attn="mla"), dict(attn="swa", window=4), dict(attn="gqa", n_kv_head=1, pos="alibi"),
                                    dict(layers="swa,mha", window=6)])
def test_a_cropped_cache_is_one_that_never_read_more(fields):
    m = tiny(0, n_layer=2, **fields).eval()
    tokens = torch.randint(17, (2, 30), generator=torch.Generator().manual_seed(0))
    docs = (torch.arange(30) > 3).long().expand(2, -1)
    cache, at = m.new_cache(spare=3), 0
    want = m(tokens, doc_ids=docs)
    for keep, wrong in ((7, 3), (1, 1), (2, 3), (1, 0), (5, 2), (1, 3)):
        read = torch.cat([tokens[:, at:at + keep], (tokens[:, at + keep:at + keep + wrong] + 1) % 17], 1)
        where = dict(doc_ids=docs[:, at:at + keep + wrong])
        torch.testing.assert_close(m(read, cache=cache, **where)[:, :keep], want[:, at:at + keep], rtol=1e-4, atol=1e-4)
        at += keep
        cache.crop(at)
        assert cache.length == at == cache.layers[0].length and cache.doc_BS.shape == (2, at)
    cache.crop(99)
    assert cache.length == at                                    # nothing to forget


def test_what_cannot_be_cropped_is_refused():
    m = tiny(0, attn="lightning").eval()
    cache = m.new_cache()
    m(torch.tensor([[1, 2, 3]]), cache=cache)
    with pytest.raises(UsageError, match="one state"):
        cache.crop(2)
    m = tiny(0, attn="swa", window=3).eval()
    for spare, back in ((0, 1), (2, 3)):
        cache = m.new_cache(spare)
        m(torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), cache=cache)
        with pytest.raises(UsageError, match=r"new_cache\(spare="):
            cache.crop(7 - back)


def test_impossible_wishes_are_refused():
    tokens = torch.tensor([[1, 2, 3]])
    for fields in (dict(arch="encoder"), dict(arch="encdec"), dict(arch="prefix"), dict(headless=True), dict(seq_len=2, mtp=2), dict(mtp=-1),
                   dict(mtp_weight=-1.0)):
        with pytest.raises(UsageError, match="mtp"):
            tiny(**dict(mtp=1) | fields)
    for m in (tiny(0), tiny(1, moe=True, n_dense_layer=0, capacity=1.0), tiny(1, attn="gdn"), tiny(1, layers="mha,lightning"), tiny(1, rope_scaling="dynamic", rope_factor=2.0)):
        with pytest.raises(UsageError, match="draft=True"):
            m.generate(tokens, 4, draft=True)
    with pytest.raises(UsageError, match="give rows of 4"):
        tiny(3).mtp_logits(tokens)


# ---- Peer ----

@pytest.mark.peer
@pytest.mark.parametrize("interleaved", [True, False])
def test_mtp_equals_transformers(interleaved):
    hf = pytest.importorskip("transformers")
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers has no MTP")
    from transformers.cache_utils import MtpCache
    torch.manual_seed(0)
    c = hf.DeepseekV3Config(
        vocab_size=17, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=2, kv_lora_rank=8, q_lora_rank=6, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8, rope_interleave=interleaved,
        num_nextn_predict_layers=2, max_position_embeddings=64, attn_implementation="eager")
    main = hf.DeepseekV3ForCausalLM(c).eval()
    theirs = layers.MtpModel(main, 2).eval()
    with torch.no_grad():
        for p in (*main.parameters(), *theirs.layers.parameters()):
            p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
    m = tiny(2, n_head=2, attn="mla", q_lora_rank=6, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, d_ff=24, moe=True,
             n_expert=4, n_active=2, d_expert=8, n_dense_layer=1, routed_scale=c.routed_scaling_factor, tie_embeddings=False,
             rope_layout="interleaved" if interleaved else "half", norm_eps=c.rms_norm_eps).eval()

    def fill(block, layer):
        a, mlp = layer.self_attn, layer.mlp
        pairs = {block.res1.pre.weight: layer.input_layernorm.weight, block.res2.pre.weight: layer.post_attention_layernorm.weight,
                 block.attn.w_dq.weight: a.q_a_proj.weight, block.attn.q_gain: a.q_a_layernorm.weight, block.attn.w_q.weight: a.q_b_proj.weight,
                 block.attn.w_dkv.weight: a.kv_a_proj_with_mqa.weight, block.attn.kv_gain: a.kv_a_layernorm.weight,
                 block.attn.w_ukv.weight: a.kv_b_proj.weight, block.attn.w_o.weight: a.o_proj.weight}
        if hasattr(mlp, "experts"):
            gate, up = mlp.experts.gate_up_proj.chunk(2, 1)
            ours, shared = block.mlp, mlp.shared_experts
            pairs |= {ours.router.weight: mlp.gate.weight, ours.experts.w_gate: gate, ours.experts.w_up: up, ours.experts.w_down: mlp.experts.down_proj,
                      ours.shared.w_gate: shared.gate_proj.weight[None], ours.shared.w_up: shared.up_proj.weight[None],
                      ours.shared.w_down: shared.down_proj.weight[None]}
        else:
            pairs |= {block.mlp.w_gate.weight: mlp.gate_proj.weight, block.mlp.w_up.weight: mlp.up_proj.weight,
                      block.mlp.w_down.weight: mlp.down_proj.weight}
        return pairs

    assert hasattr(theirs.layers[0].mtp_block.mlp, "experts")    # experts even where all first blocks are dense
    m.blocks[1] = model_lib.Block(m.cfg, Layer(1, "mla", 0, False))
    pairs = {m.embed.weight: main.model.embed_tokens.weight, m.head.weight: main.lm_head.weight, m.norm.weight: main.model.norm.weight}
    for block, layer in zip([*m.blocks, *(module.block for module in m.mtp)], [*main.model.layers, *(t.mtp_block for t in theirs.layers)]):
        pairs |= fill(block, layer)
    for module, t in zip(m.mtp, theirs.layers):
        pairs |= {module.norm_embed.weight: t.enorm.weight, module.norm_hidden.weight: t.hnorm.weight, module.proj.weight: t.eh_proj.weight,
                  module.norm.weight: t.post_norm.weight}
    with torch.no_grad():
        for ours, their in pairs.items():
            assert ours.shape == their.shape
            ours.copy_(their)
    assert len(pairs) == len(list(m.parameters()))
    ids, T = torch.randint(17, (1, 12)), 12
    with torch.no_grad():
        torch.testing.assert_close(m(ids), main(ids).logits, rtol=1e-5, atol=1e-5)
        state, cache = main.model(ids, output_hidden_states=True).hidden_states[-1], MtpCache(config=theirs.config)
        for k, logits in enumerate(m.mtp_logits(ids), 1):
            state = theirs.forward_layer(k - 1, state[:, :T - k], torch.arange(k, T)[None], cache, input_ids=ids[:, k:])
            torch.testing.assert_close(logits, theirs._project_to_logits(state), rtol=1e-5, atol=1e-5)
        # their drafts of a whole round: after the prompt, the id that the main model picks, then one from each module
        new = main(ids).logits[:, -1:].argmax(-1)
        guess, _, _ = theirs(torch.cat([ids[:, 1:], new], 1), main.model(ids).last_hidden_state, None, torch.arange(1, T + 1)[None],
                             MtpCache(config=theirs.config))
        drafter, ours = model_lib.Drafter(m, None, T + 4), m.new_cache(spare=2)
        m(ids, cache=ours)
        assert torch.equal(drafter(ours, ids, new, 0, 2), guess)
