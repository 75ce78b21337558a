"""Attention: how a token reads the tokens before it.

Every variant here answers one question: what must be remembered about the past to serve a new query?
MHA keeps all keys and values, MQA and GQA share them between heads, MLA keeps one small latent per token from which
the keys and values of all heads can be made again.

    y_t = sum_{s <= t} softmax_s( q_t . k_s / sqrt(K) ) v_s                                              [AIAYN eq 1]
    RoPE: q_t -> R(t) q_t, k_s -> R(s) k_s, so that q_t . k_s depends on t - s alone                     [RoPE eq 16]
    MLA:  c_s = RMSNorm(W_dkv x_s);  k_s = [W_uk c_s ; RoPE(W_kr x_s)],  v_s = W_uv c_s;  only c_s and the RoPE part are cached

Contents:    config | positions | which keys | cache | softmax attention | MHA, MQA, GQA | MLA | ATTENTION | demo
Shapes:      B batch, T queries, S keys, D n_embd, H heads, G kv heads, K query/key head dim, U value head dim,
             N no-position dim, P rotary dim, R latent rank
References:
    [AIAYN]  Attention Is All You Need, arXiv:1706.03762
    [RoPE]   RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864
    [GQA]    Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints, arXiv:2305.13245
    [DSV2]   DeepSeek-V2, arXiv:2405.04434
Run me:      python attention.py      (parameters and cache bytes per token of every variant)
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import rmsnorm
from tokenizer import UsageError, run_cli


@dataclass
class AttentionConfig:
    attn: str = "mha"              # token mixer of every block, a key of ATTENTION
    n_embd: int = 192              # width of the residual stream
    n_head: int = 3                # query heads
    n_kv_head: int = 0             # key/value heads; 0 means n_head for mha, a quarter of them for gqa, 1 for mqa
    head_dim: int = 0              # width of a head; 0 means n_embd / n_head
    pos: str = "rope"              # how positions enter, a key of POSITIONS
    rope_theta: float = 10000.0    # RoPE: base of the wavelengths
    q_lora_rank: int = 0           # MLA: width of the query latent; 0 means queries come straight from x
    kv_lora_rank: int = 0          # MLA: width of the cached latent; 0 means 4 head_dim
    qk_nope_head_dim: int = 0      # MLA: width of a head's position-free part; 0 means head_dim
    qk_rope_head_dim: int = 0      # MLA: width of the shared rotary key; 0 means half of head_dim
    v_head_dim: int = 0            # MLA: width of a head's value; 0 means head_dim
    qkv_bias: bool = False         # biases in the query, key and value projections
    out_bias: bool = False         # bias in the output projection
    attn_dropout: float = 0.0      # share of attention probabilities dropped in training


def head_dim(cfg):
    """Width of a head; refuses shapes that do not divide."""
    if cfg.head_dim:
        return cfg.head_dim
    if cfg.n_head < 1 or cfg.n_embd % cfg.n_head:
        fits = [h for h in range(1, cfg.n_embd + 1) if cfg.n_embd % h == 0 and cfg.n_embd // h >= 8]
        raise UsageError(f"--n_head={cfg.n_head} does not divide --n_embd={cfg.n_embd}: heads share the width equally; "
                         f"use one of {fits} or give --head_dim")
    return cfg.n_embd // cfg.n_head


# ---- Positions (how does a query know how far away a key is?) ----

POSITIONS = {                      # flag --pos
    "rope": "rotate queries and keys by an angle that grows with the position",
    "learned": "a trained vector for each of seq_len positions, added to the embedding (model.py)",
    "none": "nothing but the causal mask",
}


class Rope:
    """Turns the pairs (x_j, x_{j+P/2}) of every head by the angle position * theta^(-2j/P), the half layout of Llama. The
    paper pairs neighbours (2j, 2j+1); the two differ by a fixed permutation of channels, which q . k does not see."""

    def __init__(self, positions_BT, dim, theta, dtype=torch.float32):
        if dim % 2:
            raise UsageError(f"RoPE turns pairs of channels, so it needs an even width, not {dim}; change --head_dim or --n_head")
        inv_freq = theta ** (-torch.arange(0, dim, 2, device=positions_BT.device, dtype=dtype) / dim)          # [RoPE eq 15]
        angle_BT1J = (positions_BT[..., None].to(dtype) * inv_freq)[:, :, None]
        cos, sin = angle_BT1J.cos(), angle_BT1J.sin()
        self.table = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        self.made = {}

    def __call__(self, x_BTHP):
        if x_BTHP.dtype not in self.made:
            self.made[x_BTHP.dtype] = tuple(t.to(x_BTHP.dtype) for t in self.table)
        cos, sin = self.made[x_BTHP.dtype]                       # [B or 1, T, 1, P], the sign of the turn in sin
        return x_BTHP * cos + x_BTHP.roll(x_BTHP.shape[-1] // 2, -1) * sin                                      # [RoPE eq 34]


def unturned(x_BTHP):
    """What stands in for a Rope where positions enter elsewhere or not at all."""
    return x_BTHP


# ---- Which keys (made once per batch, read by every layer) ----

class Mask:
    """Which keys each query may read. visible_B1TS is None when that is 'all keys up to my own place' (plain causal)."""

    def __init__(self, visible_B1TS=None):
        self.visible_B1TS, self.made = visible_B1TS, {}

    def bias(self, dtype, T, S, device):
        """0 where a key is visible, -inf where not, to be added to the scores: [B or 1, 1, T, S]."""
        if dtype not in self.made:
            visible = self.visible_B1TS
            if visible is None:
                visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
            self.made[dtype] = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)
        return self.made[dtype]


def document_mask(doc_ids_BT):
    """Causal within a document: key s is visible to query t iff s <= t and both lie in the same document."""
    same_BTS = doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :]
    return Mask(same_BTS.tril()[:, None])


# ---- Cache (what is remembered about the past) ----

class Cache:
    """What one layer keeps of the tokens it has seen: any number of tensors [B, S, ...], in buffers that double."""

    def __init__(self):
        self.buffers, self.length = None, 0

    def append(self, *new):
        """Add tensors [B, T, ...] of the new tokens; returns those of all tokens so far [B, S, ...]."""
        T, end = new[0].shape[1], self.length + new[0].shape[1]
        if self.buffers is None:
            self.buffers = [t.new_empty(t.shape[0], max(64, T), *t.shape[2:]) for t in new]
        if end > self.buffers[0].shape[1]:
            room = max(end, 2 * self.buffers[0].shape[1])
            self.buffers = [torch.cat([b, b.new_empty(b.shape[0], room - b.shape[1], *b.shape[2:])], 1) for b in self.buffers]
        for buffer, t in zip(self.buffers, new):
            buffer[:, self.length:end] = t
        self.length = end
        return tuple(buffer[:, :end] for buffer in self.buffers)

# ---- Softmax attention (one function for every softmax variant) ----

def attend(q_BTHK, k_BSGK, v_BSGU, mask, scale, dropout=0.0):
    """softmax(scale q k^T + mask) v -> [B, T, H, U]; each key head serves H/G neighbouring query heads.  [AIAYN eq 1]

    On a CPU in half precision up to 1,024 keys three plain products beat the fused kernel by about two (python
    attention.py --bench); everywhere else PyTorch's SDPA runs, which never stores the scores."""
    H, G = q_BTHK.shape[2], k_BSGK.shape[2]
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    if G < H:                       # [GQA sec 2.2] the cache shrinks by H/G, the scores do not
        k_BSGK, v_BSGU = (t.repeat_interleave(H // G, dim=2) for t in (k_BSGK, v_BSGU))
    q_BHTK, k_BHSK, v_BHSU = (t.transpose(1, 2) for t in (q_BTHK, k_BSGK, v_BSGU))
    half = q_BTHK.dtype in (torch.bfloat16, torch.float16)
    if q_BTHK.device.type == "cpu" and half and S <= 1024:
        score_BHTS = (q_BHTK * scale) @ k_BHSK.transpose(-1, -2)
        if T > 1:
            score_BHTS = score_BHTS + mask.bias(score_BHTS.dtype, T, S, score_BHTS.device)
        y_BHTU = F.dropout(score_BHTS.softmax(-1), dropout) @ v_BHSU
    elif mask.visible_B1TS is None and (T == S or T == 1):
        y_BHTU = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSU, dropout_p=dropout, is_causal=T > 1, scale=scale)
    else:
        y_BHTU = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSU, mask.bias(q_BTHK.dtype, T, S, q_BTHK.device),
                                                dropout_p=dropout, scale=scale)
    return y_BHTU.transpose(1, 2)


# ---- MHA, MQA, GQA (all keys, or shared ones) ----

class MHA(nn.Module):
    """Multi-head attention. Fewer key/value heads than query heads make it GQA, a single one MQA.     [AIAYN sec 3.2.2]"""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.head_dim, self.dropout = cfg.n_head, head_dim(cfg), cfg.attn_dropout
        self.n_kv_head = self.kv_heads(cfg)
        if cfg.n_head % self.n_kv_head:
            fits = [g for g in range(1, cfg.n_head + 1) if cfg.n_head % g == 0]
            raise UsageError(f"--n_kv_head={self.n_kv_head} does not divide --n_head={cfg.n_head}: each key head must serve "
                             f"the same number of query heads; use one of {fits}")
        D, H, G, K = cfg.n_embd, cfg.n_head, self.n_kv_head, self.head_dim
        self.rope_dim, self.cache_width = K, 2 * G * K           # numbers kept of each token
        self.w_q = nn.Linear(D, H * K, bias=cfg.qkv_bias)
        self.w_k = nn.Linear(D, G * K, bias=cfg.qkv_bias)
        self.w_v = nn.Linear(D, G * K, bias=cfg.qkv_bias)
        self.w_o = nn.Linear(H * K, D, bias=cfg.out_bias)

    @staticmethod
    def kv_heads(cfg):
        return cfg.n_kv_head or cfg.n_head

    def forward(self, x_BTD, rope, mask, cache=None):
        H, G, K = self.n_head, self.n_kv_head, self.head_dim
        q_BTHK = rope(self.w_q(x_BTD).unflatten(-1, (H, K)))
        k_BSGK = rope(self.w_k(x_BTD).unflatten(-1, (G, K)))      # before the cache: a cached key must not
        v_BSGK = self.w_v(x_BTD).unflatten(-1, (G, K))                       # depend on who asks
        if cache is not None:
            k_BSGK, v_BSGK = cache.append(k_BSGK, v_BSGK)
        y_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, mask, K**-0.5, self.dropout * self.training)
        return self.w_o(y_BTHK.flatten(2))

    def flops_per_pair(self):
        """Multiply-adds of one query with one key, all heads: q.k and p.v."""
        return 2 * self.n_head * self.head_dim


class GQA(MHA):
    """Grouped-query attention: n_kv_head key/value heads.                                                [GQA sec 2.2]"""

    @staticmethod
    def kv_heads(cfg):
        return cfg.n_kv_head or max(1, cfg.n_head // 4)


class MQA(MHA):
    """Multi-query attention: one key/value head for all queries.                                         [GQA sec 1]"""

    @staticmethod
    def kv_heads(cfg):
        if cfg.n_kv_head > 1:
            raise UsageError(f"--attn=mqa has one key/value head, not --n_kv_head={cfg.n_kv_head}; use --attn=gqa or leave it out")
        return 1


# ---- MLA (a latent per token) ----

class MLA(nn.Module):
    """Multi-head latent attention: keys and values of all heads are made from one cached latent of width R; the position
    rides on P extra channels, one rotary key for all heads (rotating the latent's keys would forbid absorbing W_uk)."""

    def __init__(self, cfg):
        super().__init__()
        width = head_dim(cfg)
        self.n_head, self.dropout = cfg.n_head, cfg.attn_dropout
        self.kv_rank = cfg.kv_lora_rank or 4 * width                                        # [DSV2 sec 2.1.4] d_c = 4 d_h
        self.nope, self.rope_dim = cfg.qk_nope_head_dim or width, cfg.qk_rope_head_dim or max(2, width // 4 * 2)     # d_h^R = d_h / 2
        self.v_dim = cfg.v_head_dim or width
        if self.rope_dim % 2:
            raise UsageError(f"--qk_rope_head_dim={self.rope_dim} is odd, and RoPE turns pairs; use {self.rope_dim + 1}")
        D, H, N, P, U, R = cfg.n_embd, cfg.n_head, self.nope, self.rope_dim, self.v_dim, self.kv_rank
        self.cache_width = R + P
        if cfg.q_lora_rank:
            self.w_dq = nn.Linear(D, cfg.q_lora_rank, bias=cfg.qkv_bias)
            self.q_gain = nn.Parameter(torch.ones(cfg.q_lora_rank))
        self.w_q = nn.Linear(cfg.q_lora_rank or D, H * (N + P), bias=False)
        self.w_dkv = nn.Linear(D, R + P, bias=cfg.qkv_bias)
        self.kv_gain = nn.Parameter(torch.ones(R))
        self.w_ukv = nn.Linear(R, H * (N + U), bias=False)
        self.w_o = nn.Linear(H * U, D, bias=cfg.out_bias)

    def forward(self, x_BTD, rope, mask, cache=None):
        H, N, P, U, R = self.n_head, self.nope, self.rope_dim, self.v_dim, self.kv_rank
        q_in = rmsnorm(self.w_dq(x_BTD), self.q_gain) if hasattr(self, "w_dq") else x_BTD                  # [DSV2 eq 12]
        qn_BTHN, qr_BTHP = self.w_q(q_in).unflatten(-1, (H, N + P)).split([N, P], -1)                      # [DSV2 eq 13]
        q_BTHK = torch.cat([qn_BTHN, rope(qr_BTHP)], -1)                                       # [DSV2 eq 16]
        c_BSR, kr_BSP = self.w_dkv(x_BTD).split([R, P], -1)                                                # [DSV2 eq 9]
        c_BSR = rmsnorm(c_BSR, self.kv_gain)
        kr_BSP = rope(kr_BSP[:, :, None])[:, :, 0]                                                      # [DSV2 eq 15]
        if cache is not None:
            c_BSR, kr_BSP = cache.append(c_BSR, kr_BSP)
        kn_BSHN, v_BSHU = self.w_ukv(c_BSR).unflatten(-1, (H, N + U)).split([N, U], -1)                    # [DSV2 eq 10, 11]
        kr_BSHP = kr_BSP[:, :, None].expand(-1, -1, H, -1)
        k_BSHK = torch.cat([kn_BSHN, kr_BSHP], -1)                                                         # [DSV2 eq 17]
        y_BTHU = attend(q_BTHK, k_BSHK, v_BSHU, mask, (N + P)**-0.5, self.dropout * self.training)         # [DSV2 eq 18]
        return self.w_o(y_BTHU.flatten(2))                                                                 # [DSV2 eq 19]

    def flops_per_pair(self):
        return self.n_head * (self.nope + self.rope_dim + self.v_dim)


ATTENTION = {                      # flag --attn
    "mha": MHA,                    # every query head has its own keys and values
    "gqa": GQA,                    # groups of query heads share them
    "mqa": MQA,                    # all query heads share one
    "mla": MLA,                    # all are made from a cached latent
}


# ---- Demo and bench ----

def demo():
    cfg = AttentionConfig(n_embd=1024, n_head=16)
    print(f"n_embd {cfg.n_embd}, n_head {cfg.n_head}: one layer, bfloat16\n")
    print(f"{'attn':5s} {'parameters':>11s} {'cache bytes/token':>18s} {'of mha':>7s} {'flops/query and key':>20s}   last token equals the full pass")
    torch.manual_seed(0)
    x_BTD, full = torch.randn(1, 9, cfg.n_embd), 0
    table = lambda layer, start, stop: Rope(torch.arange(start, stop)[None], layer.rope_dim, cfg.rope_theta)
    for name, variant in ATTENTION.items():
        cfg.attn = name
        layer, cache = variant(cfg), Cache()
        with torch.no_grad():
            want = layer(x_BTD, table(layer, 0, 9), Mask())[:, -1]
            layer(x_BTD[:, :8], table(layer, 0, 8), Mask(), cache)
            got = layer(x_BTD[:, 8:], table(layer, 8, 9), Mask(), cache)[:, 0]
        kept = 2 * layer.cache_width
        full = full or kept
        print(f"{name:5s} {sum(p.numel() for p in layer.parameters()):11,} {kept:18,} {kept / full:7.1%} "
              f"{2 * layer.flops_per_pair():20,}   to {(got - want).abs().max():.0e}")


def bench():
    """Both paths of `attend` on this machine: forward and backward, milliseconds, documents of about 200 tokens."""
    from kernels import best_ms
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for B, T, H, K in ((12, 256, 6, 64), (4, 1024, 6, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.randn(B, T, H, K, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
            mask = document_mask((torch.rand(B, T, device=device) < 1 / 200).cumsum(1))

            def products():
                qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
                return ((qh * K**-0.5) @ kh.transpose(-1, -2) + mask.bias(dtype, T, T, device)).softmax(-1) @ vh

            def sdpa():
                return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask.bias(dtype, T, T, device))

            step = lambda f: lambda: f().sum().backward()
            a, b = best_ms([step(products), step(sdpa)], device)
            print(f"B {B} T {T} H {H} K {K} {str(dtype)[6:]:9s} products {a:8.2f} ms   sdpa {b:8.2f} ms   ratio {b / a:.2f}", flush=True)


def main(argv):
    if argv not in ([], ["--bench"]):
        raise UsageError(f"attention.py takes --bench or nothing, not {' '.join(argv)}")
    bench() if argv else demo()


if __name__ == "__main__":
    run_cli(main)
