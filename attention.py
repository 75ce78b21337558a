"""Attention: how a token reads other tokens.

Every variant here answers one question: what must be remembered about the past to serve a new query?
MHA keeps all keys and values, MQA and GQA share them between heads, MLA keeps one small latent per token from which
the keys and values of all heads can be made again, a window forgets what lies too far back, and the linear variants
fold the whole past into one matrix that does not grow.

    y_t = sum_{s <= t} softmax_s( q_t . k_s / sqrt(K) ) v_s                                              [AIAYN eq 1]
    MLA:     c_s = RMSNorm(W_dkv x_s);  k_s = [W_uk c_s ; RoPE(W_kr x_s)],  v_s = W_uv c_s             [DSV2 eq 9-19]
    linear:  y_t = phi(q_t) . M_t / phi(q_t) . z_t,   M_t = M_{t-1} + phi(k_t) v_t^T                    [LinTr eq 18-20]
    decayed: y_t = q_t . M_t,                         M_t = lambda M_{t-1} + k_t v_t^T                    [LA2 eq 4]
    delta:   y_t = q_t . M_t,                         M_t = alpha_t (I - beta_t k_t k_t^T) M_{t-1} + beta_t k_t v_t^T
                                                                                                         [GDN eq 10]

Contents:    config | positions | sparse patterns | places and masks | cache | softmax attention | context parallel |
             MHA, GQA, MQA and windows | MLA | linear attention | feature maps | fixed decay | delta rule | ATTENTION | demo and bench
             First reading: attend, MHA, MLA, recurrence. What stands before attend says which keys it reads, how far away.
Shapes:      B batch, T queries, S keys, D n_embd, H heads, G kv heads, K query/key head dim, U value head dim,
             N no-position dim, P rotary dim, J pairs of channels, R latent rank, L = R + P what MLA caches, C tile
References:
    [AIAYN] Attention Is All You Need, arXiv:1706.03762; [RMS] RMSNorm, 1910.07467; [Shaw] Relative Positions, 1803.02155;
    [T5] 1910.10683; [RoPE] RoFormer, 2104.09864; [ALiBi] 2108.12409; [PI] Position Interpolation, 2306.15595; [YaRN] 2309.00071;
    [LRPE] 2307.09270; [Sparse] Sparse Transformers, 1904.10509; [Star] Star-Transformer, 1902.09113; [Long] Longformer,
    2004.05150; [BigBird] 2007.14062; [Su] spaces.ac.cn 6853 and 7546; [GQA] 2305.13245; [DSV2] DeepSeek-V2, 2405.04434;
    [Gem2] Gemma 2, 2408.00118; [GptOss] gpt-oss, 2508.10925; [Gate] Gated Attention, 2505.06708; [LinTr] Transformers are RNNs,
    2006.16236; [EffAttn] Efficient Attention, 1812.01243; [LA2] Lightning Attention-2, 2401.04658; [MiniMax] MiniMax-01,
    2501.08313; [Llama3] 2407.21783; [Ulysses] 2309.14509; [Ring] 2310.01889; [Flash2] 2307.08691; [TNL] TransNormerLLM, 2307.14995;
    [GDN] Gated Delta Networks, 2412.06464; [KDA] Kimi Linear, 2510.26692
Run me:      python attention.py             (parameters, cost and cache of every variant)
             python attention.py --bench     (plain products beside PyTorch's SDPA, on this device)
"""
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as td
import torch.nn as nn
import torch.nn.functional as F

from torch.nn.attention import SDPBackend, sdpa_kernel

from dist import ALONE, World, bounds, move, row_places, swap
from kernels import (Sight, add_rmsnorm, best_ms, decayed_attention, flash, flash_decode, no_autocast, qk_norm_rope, rmsnorm, rope_ref,
                     takes_triton)
from tokenizer import UsageError, run_cli


@dataclass
class AttentionConfig:
    attn: str = "mha"              # token mixer of every block, a key of ATTENTION
    layers: str = ""               # mixers block by block, repeated over the depth, as in swa*5,gqa; empty means attn everywhere
    n_embd: int = 192              # width of the residual stream
    n_layer: int = 4               # blocks
    n_head: int = 3                # query heads
    n_kv_head: int = 0             # key/value heads; 0 means n_head, for gqa a quarter of them, for mqa 1
    head_dim: int = 0              # width of a head; 0 means n_embd / n_head
    seq_len: int = 256             # tokens of a training row
    window: int = 0                # keys a query sees, its own included; 0 means all (for swa a quarter of seq_len)
    pos: str = "rope"              # how positions enter, a key of POSITIONS
    rope_theta: float = 10000.0    # RoPE: base of the wavelengths
    rope_local_theta: float = 0.0  # RoPE: base in swa layers, never scaled; 0 means that they turn as the others do
    rope_fraction: float = 1.0     # RoPE: share of a head's channels that turn
    rope_layout: str = "half"      # RoPE: which channels make a pair, a key of ROPE_LAYOUTS
    rope_scaling: str = "none"     # RoPE: how to read beyond the trained length, a key of ROPE_SCALINGS
    rope_factor: float = 1.0       # scaling: how many times longer
    rope_original: int = 0         # scaling: trained length; 0 means seq_len
    rope_low: float = 1.0          # llama3: fewer turns than this in the trained length, and a pair is slowed down
    rope_high: float = 4.0         # llama3: more turns than this, and it is left alone
    rope_beta_fast: float = 32.0   # yarn: more turns than this, and a pair is left alone
    rope_beta_slow: float = 1.0    # yarn: fewer turns than this, and it is slowed down
    rope_truncate: bool = True     # yarn: round the two borders to whole pairs
    rope_attn_factor: float = 0.0  # yarn: factor on cosine and sine; 0 means by its rule
    rope_mscale: float = 0.0       # yarn: weight of the rule for cosine and sine
    rope_mscale_all: float = 0.0   # yarn: weight of the rule for the softmax scale of MLA
    t5_buckets: int = 32           # T5: distances told apart
    t5_distance: int = 128         # T5: distance from which on all are one
    shaw_clip: int = 16            # Shaw: distance from which on all are one
    lrpe_layers: int = 0           # LRPE: only in the first so many layers; 0 means in all
    qk_norm: str = "none"          # RMSNorm of queries and keys, a key of QK_NORMS
    norm_eps: float = 1e-6         # added to the variance in every norm
    norm_one_plus: bool = False    # gains are stored less one (Gemma)
    attn_scale: float = 0.0        # factor on q . k; 0 means 1 / sqrt(head_dim)
    attn_softcap: float = 0.0      # scores s become c tanh(s / c); 0 leaves them
    scale_by_layer: bool = False   # divide the scores of layer i by i + 1
    sinks: bool = False            # one more logit a head, which takes probability and gives nothing
    attn_gate: bool = False        # sigmoid(W x) times what was read, before the output projection
    clip_qkv: float = 0.0          # queries, keys and values are cut to +-this; 0 leaves them
    q_lora_rank: int = 0           # MLA: width of the query latent; 0 means queries come straight from x
    kv_lora_rank: int = 0          # MLA: width of the cached latent; 0 means 4 head_dim, but at most half of n_embd
    qk_nope_head_dim: int = 0      # MLA: width of a head's position-free part; 0 means head_dim
    qk_rope_head_dim: int = 0      # MLA: width of the shared rotary key; 0 means half of head_dim
    v_head_dim: int = 0            # MLA: width of a head's value; 0 means head_dim
    sparse_stride: int = 0         # sparse patterns: stride, or size of a block; 0 means sqrt(seq_len)
    sparse_width: int = 0          # sparse patterns: columns that all may read; 0 means a quarter of the stride
    feature_map: str = "elu"       # linear: what makes q . k positive, a key of FEATURE_MAPS
    tile: int = 64                 # linear variants: tokens handled at once
    qkv_bias: bool = False         # biases in the query, key and value projections
    out_bias: bool = False         # bias in the output projection
    attn_dropout: float = 0.0      # share of attention probabilities dropped in training


@dataclass(frozen=True)
class Layer:
    """One block of the network, decided before anything is built."""
    index: int
    attn: str                      # its mixer, a key of ATTENTION
    window: int = 0                # keys a query sees; 0 all
    moe: bool = False              # experts instead of an MLP

    @property
    def kind(self):
        return self.attn, self.window


def head_dim(cfg):
    """Width of a head; refuses shapes that do not divide."""
    if cfg.head_dim > 0 and cfg.n_head > 0:
        return cfg.head_dim
    if cfg.n_head < 1 or cfg.n_embd % cfg.n_head:
        fits = [h for h in range(1, cfg.n_embd + 1) if cfg.n_embd % h == 0 and cfg.n_embd // h >= 8]
        raise UsageError(f"--n_head={cfg.n_head} does not divide --n_embd={cfg.n_embd}: heads share the width equally; "
                         f"use one of {fits} or give --head_dim")
    return cfg.n_embd // cfg.n_head


def given(value):
    """A parameter that starts at this value; all others are drawn, or start at one (biases at zero), by model.py."""
    parameter = nn.Parameter(value)
    parameter.given = True
    return parameter


class RMSNorm(nn.Module):
    """Scale to unit root mean square, no mean to compute: of the stream, of queries and keys.            [RMS eq 4]"""

    def __init__(self, D, eps, one_plus=False):
        super().__init__()
        self.weight, self.eps, self.one_plus = given(torch.zeros(D) if one_plus else torch.ones(D)), eps, one_plus

    @property
    def gain(self):
        return 1 + self.weight if self.one_plus else self.weight

    def forward(self, x):
        return rmsnorm(x, self.gain, self.eps)

    def after_adding(self, x, y):
        """(x + y, its norm) in one pass."""
        return add_rmsnorm(x, y, self.gain, self.eps)[::-1]


# ---- Positions (how does a query know how far away a key is?) ----

POSITIONS = {                      # flag --pos
    "rope": "rotate queries and keys by an angle that grows with the position",
    "learned": "add a trained vector for each of seq_len positions to the embedding",
    "sinusoidal": "add fixed sines and cosines of the position to the embedding",
    "t5": "add to each score a trained number for its distance, in buckets that widen with it",
    "shaw": "add to each key and value a trained vector for its clipped distance",
    "alibi": "subtract from each score its distance, times a slope of the head's own",
    "lrpe": "multiply queries and keys by cosines and sines of trained frequencies (linear attention)",
    "none": "nothing but the causal mask",
}


def turns(theta, dim, device=None):
    """theta^(-2j/dim): the angle by which pair j turns from one position to the next, its inverse frequency. [RoPE eq 15]"""
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=device).float() / dim)


def sinusoid(positions_BT, D):
    """PE(t, 2i) = sin(t / 10000^(2i/D)), PE(t, 2i+1) = cos of the same angle: [B, T, D].                 [AIAYN sec 3.5]"""
    angle_BTJ = positions_BT[..., None].float() * turns(10000.0, D, positions_BT.device)
    return torch.stack([angle_BTJ.sin(), angle_BTJ.cos()], -1).flatten(-2)[..., :D]


def t5_bucket(distance, n_bucket, max_distance, both_ways):
    """Row of T5's table for distance = key place - query place: half the buckets hold one distance each, the others grow
    geometrically, the last holds all from max_distance on [T5 sec 2.1 and its code]. both_ways: later keys have their own."""
    half = n_bucket // 2 if both_ways else n_bucket
    exact = half // 2
    if not 1 <= exact < max_distance:
        raise UsageError(f"--t5_buckets={n_bucket} and --t5_distance={max_distance} leave no room for distances: "
                         f"use at least 4 buckets and a distance above {max(exact, 1)}, such as 32 and 128")
    away = distance.abs() if both_ways else (-distance).clamp(min=0)
    ratio = torch.log(away.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(away < exact, away, far) + (distance > 0) * (half * both_ways)


def shaw_index(distance, clip):
    """Row of the tables a^K and a^V, of 2 clip + 1 rows, for distance = key place - query place.            [Shaw sec 3.2]"""
    return distance.clamp(-clip, clip) + clip


def alibi_slopes(H):
    """Slope of each head: 2^(-8h/H) for h = 1..H. Where H is no power of two, those of the power below it come first and
    every second slope of the power above it fills up, as in the authors' code.                               [ALiBi sec 3]"""
    below = 2 ** int(math.log2(H))
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    return torch.tensor(slopes + [2 ** (-4 * h / below) for h in range(1, 2 * (H - below), 2)])


def t5_bias(cfg, distance_TS, this, heads):
    bucket_TS = t5_bucket(distance_TS, cfg.t5_buckets, cfg.t5_distance, both_ways=not this.causal)
    first = bounds(cfg.n_head, this.world.tp)[0]                               # of the heads that this rank's table has
    return this.rel_bias(bucket_TS)[..., heads.start - first:heads.stop - first].permute(2, 0, 1)[None]


def alibi_bias(cfg, distance_TS, this, heads):
    return -alibi_slopes(cfg.n_head)[heads].to(distance_TS.device).view(1, -1, 1, 1) * distance_TS.abs()


POSITION_BIAS = {                  # [1, H, T, S], added to the scores
    "t5": t5_bias,
    "alibi": alibi_bias,
}


def lrpe(x_BTHK, theta_HK, positions):
    """[x cos(theta t), x sin(theta t)] for positions t [B or 1, T]. The product of two such vectors, sum_k q_k k_k cos(theta_k
    (t - s)), knows the distance alone, and q and k are mapped one by one, as attention without a softmax needs.     [LRPE]"""
    wide = torch.promote_types(x_BTHK.dtype, torch.float32)
    angle = positions[..., None, None].to(wide) * theta_HK.to(wide)
    return torch.cat([x_BTHK * angle.cos(), x_BTHK * angle.sin()], -1).to(x_BTHK.dtype)


def lrpe_start(H, K):
    """Wavelengths that run on through the heads: the first turns fast, the last hardly at all."""
    return 10000 ** (-2 * torch.arange(H * K) / (H * K)).view(H, K)


# A model trained on `original` tokens has never seen its slow pairs complete a turn. To read `factor` times as many, each
# scaling below slows pairs down until the angles fit again: (theta, dim, cfg, original, length) -> (inv_freq_J, factor of
# cos and sin). `original`, cfg.rope_original or else seq_len, is the length trained on before scaling; what it does differs:
#   none, linear, ntk   nothing
#   dynamic             scaling begins beyond it, and grows with the length being read
#   llama3, yarn        pairs that turn many times within it keep their speed

def rope_unscaled(theta, dim, cfg, original, length):
    return turns(theta, dim), 1.0


def rope_linear(theta, dim, cfg, original, length):
    return turns(theta, dim) / cfg.rope_factor, 1.0                            # as if positions were divided              [PI]


def rope_ntk(theta, dim, cfg, original, length):
    """A larger base: the slowest pair is slowed by factor, the fastest not at all.                         [YaRN sec 3.1]"""
    return turns(theta * cfg.rope_factor ** (dim / (dim - 2)), dim), 1.0


def rope_dynamic(theta, dim, cfg, original, length):
    """The same, growing with the length beyond `original` [YaRN sec 3.3]; the stretch is Hugging Face's formula, and keys in a
    cache keep the turn they were given when the text was shorter."""
    stretch = cfg.rope_factor * max(length, original) / original - (cfg.rope_factor - 1)
    return turns(theta * stretch ** (dim / (dim - 2)), dim), 1.0


def rope_llama3(theta, dim, cfg, original, length):
    """Slow pairs (at most rope_low turns in `original` tokens) as in linear, fast ones (rope_high turns) kept: the released
    code of Llama 3.1."""
    inv_freq_J = turns(theta, dim)
    wave_J = 2 * math.pi / inv_freq_J                                          # tokens of a whole turn
    keep_J = ((original / wave_J - cfg.rope_low) / (cfg.rope_high - cfg.rope_low)).clamp(0, 1)
    return (1 - keep_J) * inv_freq_J / cfg.rope_factor + keep_J * inv_freq_J, 1.0


def yarn_m(factor, mscale=1.0):
    """How much sharper attention over factor times as many keys should be, as a factor on q and on k.      [YaRN sec 3.4]"""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_yarn(theta, dim, cfg, original, length):
    """As llama3, between other borders; the ramp is straight in the pair's number, as in the released code, where the paper has
    it straight in the turns. And sharper scores.                                                   [YaRN sec 3.2, 3.4]"""
    pair = lambda n: dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(theta))     # that makes n turns in `original`
    low, high = pair(cfg.rope_beta_fast), pair(cfg.rope_beta_slow)
    if cfg.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)                                # dim, not dim/2, as in the released code
    keep_J = 1 - ((torch.arange(dim // 2).float() - low) / (high - low or 0.001)).clamp(0, 1)
    inverse_J = theta ** (torch.arange(0, dim, 2).float() / dim)
    inv_freq_J = 1.0 / (cfg.rope_factor * inverse_J) * (1 - keep_J) + 1.0 / inverse_J * keep_J
    both = cfg.rope_mscale and cfg.rope_mscale_all                             # DeepSeek puts the second into the softmax scale
    m, rest = (yarn_m(cfg.rope_factor, mscale) for mscale in ((cfg.rope_mscale, cfg.rope_mscale_all) if both else (1.0, 0.0)))
    return inv_freq_J, cfg.rope_attn_factor or m / rest


ROPE_SCALINGS = {                  # flag --rope_scaling
    "none": rope_unscaled,         # positions as in training
    "linear": rope_linear,         # all pairs slower by the same factor
    "ntk": rope_ntk,               # slow pairs slower, fast pairs kept, by a larger base
    "dynamic": rope_dynamic,       # the same, growing with the length
    "llama3": rope_llama3,         # in three parts: slow pairs slower, fast pairs kept, a ramp between
    "yarn": rope_yarn,             # the same with another ramp, and sharper scores
}


def inverse_frequencies(dim, theta, scaling, cfg, length):
    """Radians a position for each of the dim/2 pairs, and what cos and sin are multiplied by. length: tokens read so far."""
    if dim < 2 or dim % 2:
        raise UsageError(f"RoPE turns pairs of channels, so it needs an even width, not {dim}; "
                         "change --head_dim, --rope_fraction or --qk_rope_head_dim")
    if dim == 2 and scaling in ("ntk", "dynamic"):
        raise UsageError(f"--rope_scaling={scaling} slows every pair but the first, and a rotary width of 2 has one; use linear")
    return ROPE_SCALINGS[scaling](theta, dim, cfg, cfg.rope_original or cfg.seq_len, length)


ROPE_LAYOUTS = {                   # flag --rope_layout: axis that stacks the two channels of a pair
    "half": -2,                    # j with j + P/2: Llama
    "interleaved": -1,             # 2j with 2j + 1: paper, DeepSeek, GLM
}                                  # they differ in the order of channels alone, which q . k does not see


class Rope:
    """Turns pair j of the first dim channels of every head by the angle position * inv_freq_j; the other channels pass.

    (q R(t)) . (k R(s)) = q R(t - s) . k. Turning rows from the right instead of columns from the left flips only the sign of
    the angle: distances count the other way. Either trains as well, but a checkpoint needs the sign it was trained with."""

    def __init__(self, positions_BT, dim, inv_freq_J, factor=1.0, layout="half", dtype=torch.float32):
        wide = torch.promote_types(dtype, torch.float32)
        angle_BT1J = positions_BT[..., None, None].to(wide) * inv_freq_J.to(positions_BT.device, wide)
        cos, sin = (angle_BT1J.cos() * factor).to(dtype), (angle_BT1J.sin() * factor).to(dtype)
        pair, self.layout = ROPE_LAYOUTS[layout], layout
        self.cos, self.sin = torch.stack([cos, cos], pair).flatten(-2), torch.stack([-sin, sin], pair).flatten(-2)

    def __call__(self, x_BTHK):
        return rope_ref(x_BTHK, self.cos, self.sin, self.layout)                                             # [RoPE eq 34]

    def both(self, q_BTHK, k_BSGK, q_norm=None, k_norm=None):
        """Queries and keys in one pass, each head normalised before where there are norms."""
        gains, eps = ((q_norm.gain, k_norm.gain), q_norm.eps) if q_norm is not None else ((None, None), 0.0)
        return qk_norm_rope(q_BTHK, k_BSGK, *gains, self.cos, self.sin, self.layout, eps)


# ---- Sparse patterns (which keys, if not all?) ----

# Each takes places inside the document of queries and keys, the number of the head, a stride l and a width c, and says which
# keys are read; that keys do not lie ahead of the query is seen to elsewhere. A query reads itself in every head, so no row is
# empty (the paper's fixed pattern lacks that: until the first such column its odd heads would have nothing to read). Strided
# and fixed share the work: what one head gathers nearby, another hands on to all later tokens, two layers for any distance.

def see_local(q, k, head, l, c):           # the l latest keys
    return (q - k).abs() < l


def see_dilated(q, k, head, l, c):         # every l-th key, counted back from the query              [Su], [Long sec 3.1]
    return (q - k) % l == 0


def see_blocks(q, k, head, l, c):          # the query's own block of l
    return q // l == k // l


def see_sparse(q, k, head, l, c):          # both in every head                                                       [Su]
    return see_local(q, k, head, l, c) | see_dilated(q, k, head, l, c)


def see_strided(q, k, head, l, c):         # local in even heads, dilated in odd ones                     [Sparse sec 4.3]
    return (head % 2 == 0) & see_local(q, k, head, l, c) | (head % 2 == 1) & see_dilated(q, k, head, l, c)


def see_fixed(q, k, head, l, c):           # own block in even heads, c columns of all blocks in odd [Sparse sec 4.3]
    column = (l - 1 - k % l) // c == head // 2 % math.ceil(l / c)              # head 1 has the last c, head 3 those before
    return (head % 2 == 0) & see_blocks(q, k, head, l, c) | (head % 2 == 1) & (column | (q == k))


def see_star(q, k, head, l, c):            # neighbours and the first token, the relay                      [Star sec 3.1]
    return ((q - k).abs() <= 1) | (q == 0) | (k == 0)


def see_global(q, k, head, l, c):          # the first c tokens are read by all and read all                [Long sec 3.1]
    return (k < c) | (q < c) | (q == k)


def scrambled(x):
    """A fixed number of 32 bits for each integer, close numbers far apart: reproducible on any machine, with no state."""
    for _ in range(2):
        x = (x ^ x >> 16) * 0x45D9F3B & 0xFFFFFFFF
    return x ^ x >> 16


def see_random(q, k, head, l, c):          # about c keys by a hash of head, query and key                 [BigBird sec 2]
    drawn = scrambled(k + scrambled(q + scrambled(head + 1)))
    return (drawn % (torch.maximum(q, k) + 1) < c) | (q == k)                  # each of q + 1 keys with chance c / (q + 1)


PATTERNS = {                       # also keys of --attn
    "local": see_local,            # the same keys in every head
    "dilated": see_dilated,
    "blocks": see_blocks,
    "sparse": see_sparse,
    "strided": see_strided,        # heads take turns
    "fixed": see_fixed,
    "star": see_star,              # far keys through a few
    "global": see_global,
    "random": see_random,          # or by chance
}


def sparse_sizes(cfg):
    """(stride, width) of the sparse patterns."""
    stride = cfg.sparse_stride or math.ceil(cfg.seq_len**0.5)
    return stride, cfg.sparse_width or max(1, stride // 4)


# ---- Places and masks (made once a forward pass for each kind of layer) ----

@dataclass
class Pass:
    """One call of the model: where its tokens stand, and what was there before."""
    positions_BT: torch.Tensor               # [B or 1, T] for RoPE, LRPE and position embeddings
    past: int = 0                            # tokens in the cache
    doc_BS: torch.Tensor = None              # document of every token, cached ones too; None is one document a row
    causal: bool = True
    prefix_B: torch.Tensor = None            # the first so many tokens see each other both ways
    image_BS: torch.Tensor = None            # tokens with the same number above 0 see each other both ways
    rel_bias: nn.Module = None               # T5: the table of biases
    dtype: torch.dtype = torch.float32       # of queries and keys
    world: World = World()                   # whose tp shares the heads and whose cp the places of a row; all above is of whole rows
    cp_mode: str = ""                        # how, a key of MEETINGS; "" where a rank has whole rows
    zigzag: bool = False                     # which places of a row a rank has, as dist.row_places deals them


def hide(bias, visible, dtype):
    """bias [B or 1, H or 1, T, S], or zeros, with -inf where a key is not visible."""
    if visible is None:
        return bias
    return (torch.zeros_like(visible, dtype=dtype) if bias is None else bias).masked_fill(~visible, -torch.inf)


def small_half(dtype, device, S, masked):
    """On a CPU plain products win in half precision, up to 640 keys, or 896 where SDPA would have to read a mask. SDPA's time over
    theirs, forward and backward, process time of one core, B 4, H 6, K 64, causal (and with documents of 200 tokens), bfloat16:
    3.0 (2.9) at 128 tokens, 1.9 (2.0) at 512, 1.2 (1.6) at 640, 0.8 (1.1) at 896, 0.6 (1.1) at 2,048; float32: 0.9 (1.0) at
    128, 0.8 (0.7) at 512, 0.3 (0.6) at 2,048."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and S <= (896 if masked else 640)


def places_in_documents(doc_BS, S, device):
    """Each token's place in its own document, from 0: [B or 1, S]. Documents lie in one piece."""
    index_1S = torch.arange(S, device=device)[None]
    if doc_BS is None:
        return index_1S
    begins_BS = F.pad(doc_BS[:, 1:] != doc_BS[:, :-1], (1, 0), value=True)
    return index_1S - (index_1S * begins_BS).cummax(1).values


def seen_plainly(layer, this, T):
    """Is no mask needed: every key is seen, or every key up to the query's own place, which SDPA knows as is_causal while nothing
    is cached?"""
    fits = not layer.window or this.past + T <= layer.window or this.causal and T == 1
    plain = fits and layer.attn not in PATTERNS and this.doc_BS is None and this.prefix_B is None and this.image_BS is None
    return plain and (not this.causal or T == 1 or not this.past)


def seen_keys(cfg, layer, this, q_T1, k_1S, heads):
    """bool [B or 1, H or 1, T, S]: which of the keys at these places of the row do queries at those see."""
    T, S, of_q, of_k = len(q_T1), k_1S.shape[1], lambda t: t[:, q_T1[:, 0]], lambda t: t[:, k_1S[0]]
    see = (k_1S <= q_T1) if this.causal else torch.ones(T, S, dtype=torch.bool, device=k_1S.device)
    see = see[None, None]
    if this.prefix_B is not None:
        prefix_B111 = this.prefix_B[:, None, None, None]
        see = see | (q_T1 < prefix_B111) & (k_1S < prefix_B111)
    if this.image_BS is not None:
        q_B1T1, k_B11S = of_q(this.image_BS)[:, None, :, None], of_k(this.image_BS)[:, None, None]
        see = see | (q_B1T1 == k_B11S) & (q_B1T1 > 0)
    if layer.window:                                             # w keys, one's own among them; it bounds the past of images too
        away_TS = q_T1 - k_1S
        see = see & ((away_TS if this.causal else away_TS.abs()) < layer.window)
    if layer.attn in PATTERNS:                                   # patterns count places inside a document
        place_BS = places_in_documents(this.doc_BS, this.past + this.positions_BT.shape[1], k_1S.device)
        head_H11 = torch.arange(cfg.n_head, device=k_1S.device)[heads, None, None]
        stride, width = sparse_sizes(cfg)
        q_B1T1, k_B11S = of_q(place_BS)[:, None, :, None], of_k(place_BS)[:, None, None]
        see = see & PATTERNS[layer.attn](q_B1T1, k_B11S, head_H11, stride, width)
    if this.doc_BS is not None:
        see = see & (of_q(this.doc_BS)[:, None, :, None] == of_k(this.doc_BS)[:, None, None])
    return see


def rope_base(cfg, attn):
    """(base, scaling) of a mixer: layers with a window may have a base of their own, which is never scaled."""
    local = attn == "swa" and cfg.rope_local_theta
    return (cfg.rope_local_theta, "none") if local else (cfg.rope_theta, cfg.rope_scaling)


def rope_of(cfg, layer, this, positions_BT, length):
    """The turning of one kind of layer."""
    mixer, (theta, scaling) = ATTENTION[layer.attn], rope_base(cfg, layer.attn)
    dim = mixer.rotary(cfg)
    inv_freq_J, factor = inverse_frequencies(dim, theta, scaling, cfg, length)
    dtype = torch.promote_types(this.dtype, torch.float32) if mixer.recurrent else this.dtype
    return Rope(positions_BT, dim, inv_freq_J, factor, cfg.rope_layout, dtype)


def sight_of(cfg, layer, this, S):
    """Who sees whom in the words of kernels.Sight, so that no mask is made; None where it has none for it."""
    both_ways = this.prefix_B is not None or this.image_BS is not None
    if both_ways or cfg.pos in ("t5", "shaw") or layer.attn in ("star", "global", "random"):
        return None
    keys, (stride, width) = this.past + this.positions_BT.shape[1], sparse_sizes(cfg)
    doc_BS = None if this.doc_BS is None else this.doc_BS[:, keys - S:]
    place_BS = None
    if layer.attn in ("blocks", "fixed"):
        place_BS = places_in_documents(this.doc_BS, keys, this.positions_BT.device)[:, keys - S:]
    if layer.attn == "local":
        return Sight(this.causal, min(layer.window or stride, stride), doc_BS)
    if layer.attn == "blocks":                                   # each is a document
        return Sight(this.causal, layer.window, (place_BS % stride == 0).cumsum(1))
    return Sight(this.causal, layer.window, doc_BS, layer.attn if layer.attn in PATTERNS else "", stride, width, place_BS)


class Places:
    """What one kind of layer reads of a Pass. `rope` turns heads (`turns`: RoPE is on); `added` joins the scores: a bias, and
    -inf where a key is hidden (None: no bias and no mask); `sight` is the same for flash (None: it can't); the one
    that will be asked for is made at once. `stored`: the scores are to be kept in memory; `plain`: SDPA needs no mask.
    q_T1 and k_1S are places of the row: of this rank's queries and of the keys that they will meet (cp: of all ranks, one after the
    other, or, with `way` ulysses, both of the whole row for some of the heads)."""

    def __init__(self, cfg, layer, this):
        mixer, past, device, self.world = ATTENTION[layer.attn], this.past, this.positions_BT.device, this.world
        T, cp, self.causal, self.rope, self.turns = this.positions_BT.shape[1], this.world.cp, this.causal, None, False
        here = row_places(T, cp, this.zigzag)                                        # of the places of these rows, mine
        first, own = past + int(here[0]), lambda t: t if cp.size == 1 or t is None else t[:, here.to(device)]
        self.positions_BT, self.row, self.way = own(this.positions_BT), T, this.cp_mode
        self.ahead = this.prefix_B is not None or this.image_BS is not None          # some keys come after their queries
        self.doc_BT = None if this.doc_BS is None else own(this.doc_BS[:, past:])
        self.doc_before_B = None if this.doc_BS is None or not first else this.doc_BS[:, first - 1]
        if cfg.pos == "rope" and mixer.rotary(cfg) > 0:
            self.rope, self.turns = rope_of(cfg, layer, this, self.positions_BT, past + T), True
        self.of, self.made = (cfg, layer, this), {}
        if mixer.recurrent:
            return
        low, high = bounds(cfg.n_head, this.world.tp)
        if self.way == "ulysses":
            low, high = (low + place for place in bounds(high - low, cp))
        self.heads = slice(low, high)                                                # those whose scores this rank makes
        self.whole = self.way in ("", "ulysses")                                     # keys in their order, the newest of them the queries'
        if self.whole:
            kept = min(past, layer.window - 1) if layer.window else past             # what LayerCache holds
            self.k_1S = torch.arange(past - kept, past + T, device=device)[None]
            self.q_T1 = self.k_1S[:, kept:].T
        else:
            self.k_1S = torch.cat([row_places(T, cp, this.zigzag, rank) for rank in range(cp.size)]).to(device)[None]
            self.q_T1 = here[:, None].to(device)
        changed = cfg.attn_softcap or cfg.sinks or cfg.pos == "shaw"                 # scores that SDPA does not make
        unhidden = self.whole and seen_plainly(layer, this, T)
        self.plain = unhidden and cfg.pos not in POSITION_BIAS and not changed
        self.stored = bool(changed) or small_half(this.dtype, device, self.k_1S.shape[1], not self.plain)
        self.unhidden = unhidden and not (this.causal and T > 1 and (self.stored or cfg.pos in POSITION_BIAS))
        self.slope_H = alibi_slopes(cfg.n_head)[self.heads].to(device) if cfg.pos == "alibi" else None
        # made here, not in the blocks, which may be compiled, or run again for what a checkpoint did not keep
        if self.way != "ring" and (self.plain or cfg.attn_dropout or not takes_triton(this.positions_BT) or self.sight is None):
            self.added

    def goes_through(self):
        """1 where one document fills this rank's part of a row and began before it: a state gets through."""
        if self.doc_BT is None:
            return torch.ones(1, device=self.positions_BT.device)
        through_B = self.doc_BT[:, 0] == self.doc_BT[:, -1]
        return (through_B if self.doc_before_B is None else through_B & (self.doc_before_B == self.doc_BT[:, 0])).float()

    @property
    def distance_TS(self):
        return self.k_1S - self.q_T1

    @property
    def sight(self):
        if "sight" not in self.made:
            turned = self.of[1].attn in ("strided", "fixed") and self.heads.start      # kernels count heads from 0
            self.made["sight"] = sight_of(*self.of, self.k_1S.shape[1]) if self.whole and not turned else None
        return self.made["sight"]

    def added_to(self, q_T1, k_1S):
        """What joins the scores of these queries with these keys: [B or 1, H or 1, T, S], or None."""
        cfg, layer, this = self.of
        visible = None if self.unhidden else seen_keys(cfg, layer, this, q_T1, k_1S, self.heads)
        bias = POSITION_BIAS[cfg.pos](cfg, k_1S - q_T1, this, self.heads).to(this.dtype) if cfg.pos in POSITION_BIAS else None
        return hide(bias, visible, this.dtype)

    @property
    def added(self):
        if "added" not in self.made:
            self.made["added"] = self.added_to(self.q_T1, self.k_1S)
        return self.made["added"]


def places_of_memory(this, memory_doc_BS):
    """The places of an encoder's output as the decoder sees them: padding (document -1) hidden, packed documents apart."""
    visible = None
    if memory_doc_BS is not None:
        doc_B1S = memory_doc_BS[:, None]
        visible = (doc_B1S >= 0 if this.doc_BS is None else doc_B1S == this.doc_BS[:, this.past:, None])[:, None]
    added = hide(None, visible, this.dtype)
    return SimpleNamespace(causal=False, stored=False, plain=added is None, sight=None, slope_H=None, added=added, way="")


# ---- Cache (what is remembered about the past) ----

class LayerCache:
    """What one layer keeps of the tokens it has seen: tensors [B, S, ...]; through a window the newest window - 1 of them
    (a query brings its own key), and `spare` more that crop may bring back; or, in the linear variants, a state that does not
    grow."""

    def __init__(self, window=0, spare=0):
        self.kept, self.length, self.window, self.spare, self.folded = [], 0, window, spare, False

    def append(self, *new):
        """Add tensors [B, T, ...] of the new tokens; returns those of all that these tokens may read [B, S, ...]."""
        before, T = self.length, new[0].shape[1]
        self.length += T
        old = self.kept or [t[:, :0] for t in new]
        if not self.window:
            self.kept = [_extended(a, b) for a, b in zip(old, new)]
            return self.kept
        whole = [torch.cat(pair, 1) for pair in zip(old, new)]
        self.kept = [t[:, max(0, t.shape[1] - self.window + 1 - self.spare):].clone() for t in whole]
        return [t[:, t.shape[1] - T - min(before, self.window - 1):] for t in whole]

    def crop(self, length):
        """Forget the tokens from place `length` on."""
        back = self.length - length
        if back <= 0:
            return
        if self.folded:
            raise UsageError(f"a linear mixer has folded its past into one state, from which the last {back} tokens cannot be "
                             "taken out again; keep a copy of the cache from before them, or use a softmax mixer such as mha")
        left = self.kept[0].shape[1] - back
        if left < (min(length, self.window - 1) if self.window else length):
            raise UsageError(f"a window has forgotten what it saw {back} tokens ago; make the cache with new_cache(spare={back})")
        self.kept, self.length = [t[:, :left] for t in self.kept], length


def _extended(old, new):
    """old and new one after the other. The memory behind `old` doubles when it is full: its strides say how much there is."""
    B, S, T = *old.shape[:2], new.shape[1]
    if old.numel() == 0 or old.stride(0) // old.stride(1) < S + T:
        room = old.new_empty(B, max(2 * S, S + T), *new.shape[2:])
        room[:, :S] = old
        old = room[:, :S]
    both = old.as_strided((B, S + T, *new.shape[2:]), old.stride(), old.storage_offset())
    both[:, S:] = new
    return both


class Cache:
    """The caches of all layers, and what the next tokens must know of the row: its documents, its image blocks."""

    def __init__(self, plan, spare=0):
        self.layers = [LayerCache(layer.window, spare) for layer in plan]
        self.cross = [LayerCache() for _ in plan]                # encoder-decoder: keys and values of the source
        self.length, self.doc_BS, self.image_BS = 0, None, None
        self.memory = None                                       # encoder-decoder: the encoder's output, and its documents
        self.state_BTD = None                                    # what MTP modules start from, of the latest call's tokens

    def rows(self, B, T, doc_ids_BT, image_BT):
        """Documents and image blocks [B, S] of the whole row, these T tokens included. Without ids the last document goes on,
        and tokens are text."""
        def longer(old_BS, new_BT, goes_on):
            if old_BS is None and new_BT is None:
                return None
            blank = lambda n: torch.zeros(B, n, dtype=torch.long, device=(old_BS if new_BT is None else new_BT).device)
            old_BS = blank(self.length) if old_BS is None else old_BS
            if new_BT is None:
                new_BT = old_BS[:, -1:].expand(B, T) if goes_on else blank(T)
            return torch.cat([old_BS, new_BT], 1)

        if self.image_BS is not None and image_BT is not None:
            if ((self.image_BS[:, -1] == image_BT[:, 0]) & (image_BT[:, 0] > 0)).any():
                raise UsageError("an image goes on from one call to the next, so it could not see itself both ways; "
                                 "give it in one piece")
        self.doc_BS, self.image_BS = longer(self.doc_BS, doc_ids_BT, True), longer(self.image_BS, image_BT, False)
        return self.doc_BS, self.image_BS

    def crop(self, length):
        """Take back the tokens from place `length` on, as if they had never been read."""
        for layer in self.layers:
            layer.crop(length)
        self.length = min(self.length, length)
        self.doc_BS, self.image_BS = (None if t is None else t[:, :length] for t in (self.doc_BS, self.image_BS))

    def numel(self):
        """Numbers that the layers hold."""
        return sum(t.numel() for layer in self.layers + self.cross for t in layer.kept)


# ---- Softmax attention (one function for every softmax variant) ----

def products(q_BHTK, k_BHSK, v_BHSU, added, dropout=0.0, softcap=0.0, sinks=None, shaw=None):
    """softmax(q k^T + added) v with the scores in memory, where options can change them."""
    score_BHTS = q_BHTK @ k_BHSK.mT
    if shaw:
        key_JK, value_JU, index = shaw
        score_BHTS = score_BHTS + (q_BHTK @ key_JK.T.to(q_BHTK.dtype)).gather(-1, index.expand_as(score_BHTS))     # [Shaw eq 5]
    if softcap:
        score_BHTS = softcap * torch.tanh(score_BHTS / softcap)                                           # [Gem2 sec 2]
    if added is not None:
        score_BHTS = score_BHTS + added
    scores = score_BHTS
    if sinks is not None:
        sink = sinks.to(score_BHTS.dtype).view(1, score_BHTS.shape[1], -1, 1)                 # [1, G, H/G, 1] in decoding
        scores = torch.cat([score_BHTS, sink.expand(*score_BHTS.shape[:3], 1)], -1)                       # [GptOss sec 2.2]
    p_BHTS = F.dropout(scores.softmax(-1)[..., :k_BHSK.shape[2]], dropout)
    y_BHTU = p_BHTS @ v_BHSU
    if shaw:                       # sum_s p_s a_{s-t}: add up the probability of each relative position first      [Shaw eq 3]
        p_BHTJ = p_BHTS.new_zeros(*p_BHTS.shape[:3], len(value_JU)).scatter_add(-1, index.expand_as(p_BHTS), p_BHTS)
        y_BHTU = y_BHTU + p_BHTJ @ value_JU.to(p_BHTJ.dtype)
    return y_BHTU


@torch.compiler.assume_constant_result
def cudnn_first():
    """On Hopper cuDNN's attention is up to twice as fast as the one that SDPA picks (pytorch#142132)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def for_heads(x_BGSK, H):
    """[GQA sec 2.2] the cache shrinks by H/G, the scores do not."""
    return x_BGSK if x_BGSK.shape[1] == H else x_BGSK.repeat_interleave(H // x_BGSK.shape[1], dim=1)


HOPPER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(q_BHTK, k_BGSK, v_BGSU, added, dropout, causal, scale):
    """PyTorch's attention. Without a mask its GPU kernels read the shared keys of a group themselves; elsewhere they are copied."""
    shared = q_BHTK.is_cuda and added is None and k_BGSK.shape[1] < q_BHTK.shape[1]
    if not shared:
        k_BGSK, v_BGSU = (for_heads(t, q_BHTK.shape[1]) for t in (k_BGSK, v_BGSU))
    run = lambda: F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSU, added, dropout, causal, scale=scale, enable_gqa=shared)
    if not (q_BHTK.is_cuda and cudnn_first()):
        return run()
    with sdpa_kernel(HOPPER, set_priority=True):
        return run()


def flash_runs(q_BTHK, v_BSGU, at, dropout, shaw, widest=256):
    """Do our kernels cover this, and win? Where nothing is hidden but the future, SDPA is faster."""
    if not takes_triton(q_BTHK) or dropout or shaw is not None or q_BTHK.dtype == torch.float64:
        return False
    return not at.plain and max(q_BTHK.shape[-1], v_BSGU.shape[-1]) <= widest and at.sight is not None


def decode_runs(q_BTHK, v_BSGU, at, dropout, shaw):
    """The same for one query a row, without a gradient. SDPA is left with heads that share no keys."""
    if q_BTHK.shape[1] > 1 or torch.is_grad_enabled() or at.slope_H is not None:
        return False
    at = at if v_BSGU.shape[2] == q_BTHK.shape[2] else SimpleNamespace(plain=False, sight=at.sight)
    return flash_runs(q_BTHK, v_BSGU, at, dropout, shaw, 1024) and not at.sight.pattern


def attend(q_BTHK, k_BSGK, v_BSGU, at, scale, dropout=0.0, softcap=0.0, sinks=None, shaw=None):
    """softmax(scale q k^T + mask) v -> [B, T, H, U]; each key head serves H/G neighbouring query heads.  [AIAYN eq 1]

    softcap: scores s become c tanh(s / c). sinks [H]: a logit a head that takes probability and has no value. shaw: vectors of
    the relative positions, ([2c+1, K] for keys, [2c+1, U] for values, index [T, S]). Our kernels where they run, else these
    three need at.stored and take plain products; all else is PyTorch's SDPA, which never stores the scores either. Where
    ranks share the row, --cp_mode brings queries and keys together."""
    return MEETINGS[at.way](q_BTHK, k_BSGK, v_BSGU, at, scale, dropout, softcap, sinks, shaw)


def attend_here(q_BTHK, k_BSGK, v_BSGU, at, scale, dropout=0.0, softcap=0.0, sinks=None, shaw=None):
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    if decode_runs(q_BTHK, v_BSGU, at, dropout, shaw):
        return flash_decode(q_BTHK[:, 0], k_BSGK, v_BSGU, scale, softcap, sinks, at.sight.doc_BS)[:, None]
    if flash_runs(q_BTHK, v_BSGU, at, dropout, shaw):
        return flash(q_BTHK, k_BSGK, v_BSGU, at.sight, scale, softcap, sinks, at.slope_H)
    added = None if at.added is None else at.added.to(q_BTHK.dtype)
    if T == 1 and G < H:           # decoding: the H/G queries of a key head are its rows, and no key is copied
        q_BTHK = q_BTHK.view(B, G, H // G, K).transpose(1, 2)
        if added is not None and added.shape[1] > 1:
            added = added.view(added.shape[0], G, H // G, S)
    q_BHTK, k_BGSK, v_BGSU = (t.transpose(1, 2) for t in (q_BTHK, k_BSGK, v_BSGU))
    if at.stored:
        k_BHSK, v_BHSU = (for_heads(t, q_BHTK.shape[1]) for t in (k_BGSK, v_BGSU))
        whole = not at.causal or at.ahead or shaw is not None or not T == S >= 256
        run = lambda q_BHTK, k_BHSK, v_BHSU, added: products(q_BHTK * scale, k_BHSK, v_BHSU, added, dropout, softcap, sinks, shaw)
        if whole:
            y_BHTU = run(q_BHTK, k_BHSK, v_BHSU, added)
        else:                      # a quarter of the scores is not made: 1.3 times as fast on a CPU
            half = T // 2
            y_BHTU = torch.cat([run(q_BHTK[:, :, :half], k_BHSK[:, :, :half], v_BHSU[:, :, :half], added[:, :, :half, :half]),
                                run(q_BHTK[:, :, half:], k_BHSK, v_BHSU, added[:, :, half:])], 2)
    else:
        assert not softcap and sinks is None and shaw is None, "these need the scores"
        y_BHTU = sdpa(q_BHTK, k_BGSK, v_BGSU, added, dropout, at.causal and T > 1 and added is None, scale)
    return y_BHTU.reshape(B, 1, H, -1) if T == 1 else y_BHTU.transpose(1, 2)


# ---- Context parallel (how do queries meet the keys of other ranks?) ----

def gathered(q_BTHK, k_BTGK, v_BTGU, at, *how):
    """Every rank gets all keys and values of the row.                                                  [Llama3 sec 3.3.2]"""
    if k_BTGK.shape[1] < at.row:                                 # MLA gathers its latents, which are smaller
        k_BTGK, v_BTGU = (move(t, at.world.cp, "gather", "scatter", 1) for t in (k_BTGK, v_BTGU))
    return attend_here(q_BTHK, k_BTGK, v_BTGU, at, *how)


def ulysses(q_BTHK, k_BTGK, v_BTGU, at, scale, dropout, softcap, sinks, shaw):
    """Every rank gets the whole row of some of the heads, and gives the outputs back.                       [Ulysses sec 3.1]"""
    cp, H, G = at.world.cp, q_BTHK.shape[2], k_BTGK.shape[2]
    if G % cp.size:
        k_BTGK, v_BTGU = (t.repeat_interleave(H // G, 2) for t in (k_BTGK, v_BTGU))
    q_BSHK, k_BSGK, v_BSGU = (swap(t, cp, 2, 1) for t in (q_BTHK, k_BTGK, v_BTGU))
    sinks = None if sinks is None else sinks.chunk(cp.size)[cp.rank]
    y_BSHU = attend_here(q_BSHK, k_BSGK, v_BSGU, at, scale, dropout, softcap, sinks, shaw)
    return swap(y_BSHU, cp, 1, 2)


class Ring(torch.autograd.Function):
    """Keys and values travel from rank to rank while each computes with what it has; a running log-sum-exp joins the parts, and
    backward makes the probabilities again from it, while gradients of keys and values travel along.     [Ring sec 3] [Flash2 alg 1]
    Scores exist a quarter of a block at a time: half of the queries by half of the keys, where any of them is seen."""

    @staticmethod
    def forward(ctx, q_BTHK, k_BTGK, v_BTGU, sinks, at, scale, softcap):
        wide = torch.promote_types(q_BTHK.dtype, torch.float32)
        q_BHTK, k_BGTK, v_BGTU = (t.transpose(1, 2).to(wide).contiguous() for t in (q_BTHK, k_BTGK, v_BTGU))
        y_BHTU = q_BHTK.new_zeros(*q_BHTK.shape[:3], v_BGTU.shape[-1])
        lse_BHT1 = q_BHTK.new_full((*q_BHTK.shape[:3], 1), -torch.inf)
        if sinks is not None:                                    # a key of its own, with no value
            lse_BHT1 = sinks.to(wide).view(1, -1, 1, 1).expand_as(lse_BHT1).clone()
        travelling = k_BGTK, v_BGTU
        for turn in range(at.world.cp.size):
            k, v = travelling = Ring.pass_on(at.world.cp, travelling) if turn else travelling
            for qs, ks, added in Ring.blocks(at, turn):
                score, _ = Ring.scores(q_BHTK[:, :, qs], k[:, :, ks], added, scale, softcap)
                new = score.logsumexp(-1, keepdim=True)
                both = torch.logaddexp(lse_BHT1[:, :, qs], new)
                base = both.masked_fill(both == -torch.inf, 0.0)             # no key seen yet
                y_new = (score - base).exp() @ for_heads(v[:, :, ks], score.shape[1])
                y_BHTU[:, :, qs] = y_BHTU[:, :, qs] * (lse_BHT1[:, :, qs] - base).exp() + y_new
                lse_BHT1[:, :, qs] = both
        ctx.save_for_backward(q_BHTK, k_BGTK, v_BGTU, sinks, y_BHTU, lse_BHT1)
        ctx.rest, ctx.kinds = (at, scale, softcap), (q_BTHK.dtype, k_BTGK.dtype, v_BTGU.dtype)
        return y_BHTU.transpose(1, 2).to(v_BTGU.dtype)

    @staticmethod
    def backward(ctx, dy_BTHU):
        (q, k0, v0, sinks, y, lse), (at, scale, softcap) = ctx.saved_tensors, ctx.rest
        dy, dq, G = dy_BTHU.transpose(1, 2).to(q.dtype), torch.zeros_like(q), k0.shape[1]
        delta = (dy * y).sum(-1, keepdim=True)
        shared = lambda t: t.unflatten(1, (G, -1)).sum(2)        # heads of a group share a key
        travelling = k0, v0, torch.zeros_like(k0), torch.zeros_like(v0)
        for turn in range(at.world.cp.size):
            k, v, dk, dv = travelling
            for qs, ks, added in Ring.blocks(at, turn):
                k_here, v_here = (for_heads(t[:, :, ks], q.shape[1]) for t in (k, v))
                score, slope = Ring.scores(q[:, :, qs], k[:, :, ks], added, scale, softcap)
                p = (score - lse[:, :, qs]).exp().nan_to_num(0.0)            # rows that see nothing
                dscore = p * (dy[:, :, qs] @ v_here.mT - delta[:, :, qs]) * slope * scale
                dq[:, :, qs] += dscore @ k_here
                dk[:, :, ks] += shared(dscore.mT @ q[:, :, qs])
                dv[:, :, ks] += shared(p.mT @ dy[:, :, qs])
            last = turn == at.world.cp.size - 1                            # then the gradients are home, and nobody needs the rest
            travelling = Ring.pass_on(at.world.cp, travelling[2:] if last else travelling)
        dsinks = None if sinks is None else -((sinks.view(1, -1, 1, 1) - lse).exp() * delta).sum((0, 2, 3)).to(sinks.dtype)
        return *(t.transpose(1, 2).to(kind) for t, kind in zip((dq, *travelling), ctx.kinds)), dsinks, None, None, None

    @staticmethod
    def scores(q, k, added, scale, softcap):
        """(scores, what their gradient is multiplied by)"""
        score, slope = q @ for_heads(k, q.shape[1]).mT * scale, 1.0
        if softcap:
            tanh = torch.tanh(score / softcap)
            score, slope = softcap * tanh, 1 - tanh.square()
        return score if added is None else score + added.to(score.dtype), slope

    @staticmethod
    def blocks(at, turn):
        """[(queries, keys, what joins their scores)] of the keys that are here on this turn, without those that nobody sees."""
        cp, T, window = at.world.cp, len(at.q_T1), at.of[1].window
        k_1S = at.k_1S[:, (cp.rank - turn) % cp.size * T:][:, :T]
        halves, ends, seen = [slice(0, (T + 1) // 2), slice((T + 1) // 2, T)], lambda t: (int(t.min()), int(t.max())), []
        for qs, ks in ((qs, ks) for qs in halves for ks in halves if len(at.q_T1[qs]) and len(at.q_T1[ks])):
            (q_low, q_high), (k_low, k_high) = ends(at.q_T1[qs]), ends(k_1S[:, ks])
            near = not window or q_low - k_high < window and (at.causal or k_low - q_high < window)
            if at.ahead or near and (not at.causal or k_low <= q_high):
                seen.append((qs, ks, at.added_to(at.q_T1[qs], k_1S[:, ks])))
        return seen

    @staticmethod
    def pass_on(cp, tensors):
        """Tensors to the next rank of the ring, and those of the one before."""
        sent, came = [t.contiguous() for t in tensors], [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
        after, before = cp.ranks[(cp.rank + 1) % cp.size], cp.ranks[cp.rank - 1]
        ops = [td.P2POp(td.isend, t, after, group=cp.pg) for t in sent] + [td.P2POp(td.irecv, t, before, group=cp.pg) for t in came]
        for work in td.batch_isend_irecv(ops):
            work.wait()
        return came


@torch.compiler.disable
def ring(q_BTHK, k_BTGK, v_BTGU, at, scale, dropout, softcap, sinks, shaw):
    assert not dropout and shaw is None, "refused by dist.validate"
    return Ring.apply(q_BTHK, k_BTGK, v_BTGU, sinks, at, scale, softcap)


MEETINGS = {                       # dist.CP_MODES; "" where a rank has whole rows
    "": attend_here, "gather": gathered, "ulysses": ulysses, "ring": ring,
}


# ---- MHA, GQA, MQA and windows (all keys, shared ones, or near ones) ----

# A mixer, here and below, is Mixer(cfg, layer) with forward(x_BTD, at, cache): Places and a LayerCache. It says what it costs,
# macs(T) and kept(T), and its class answers before one is built: recurrent, and rotary(cfg), the channels that RoPE turns.

QK_NORMS = ("none", "head", "width")       # flag --qk_norm


def wide_norm(norm, x_BTF, tp, width):
    """RMSNorm over all heads, `width` channels of which each rank of tp holds a part."""
    if tp.size == 1:
        return norm(x_BTF)
    wide_BTF = x_BTF.to(torch.promote_types(x_BTF.dtype, torch.float32))
    square_BT1 = move(wide_BTF.square().sum(-1, keepdim=True), tp, "sum", "sum") / width
    return (wide_BTF * torch.rsqrt(square_BT1 + norm.eps) * norm.gain).to(x_BTF.dtype)


def gated(mixer, x_BTD, y):
    """sigmoid(W x) * y where --attn_gate asks for it.                                                    [Gate eq 5]"""
    return y if mixer.w_gate is None else torch.sigmoid(mixer.w_gate(x_BTD)) * y


class MHA(nn.Module):
    """Multi-head attention [AIAYN sec 3.2.2]. Fewer key/value heads than query heads make it GQA, a single one MQA; a window
    or a sparse pattern is a matter of Places alone."""
    recurrent = False                      # keeps keys, not a state
    tp, picked = ALONE, slice(None)        # the ranks that share the heads; which key heads of the projections it reads

    def __init__(self, cfg, layer):
        super().__init__()
        D, H, K, G = cfg.n_embd, cfg.n_head, head_dim(cfg), self.kv_heads(cfg)
        if H % G:
            fits = [g for g in range(1, H + 1) if H % g == 0]
            raise UsageError(f"--n_kv_head={G} does not divide --n_head={H}: each key head must serve the same number of query "
                             f"heads; use one of {fits}")
        if layer.attn in ("strided", "fixed") and H < 2:
            raise UsageError(f"--attn={layer.attn} gives its heads different keys, so it needs --n_head=2 or more; "
                             "use --attn=sparse for one")
        self.n_head, self.n_kv_head, self.head_dim, self.q_width, self.k_width = H, G, K, H * K, G * K
        self.dropout, self.softcap, self.clip, self.window = cfg.attn_dropout, cfg.attn_softcap, cfg.clip_qkv, layer.window
        self.scale = (cfg.attn_scale or K**-0.5) / (layer.index + 1 if cfg.scale_by_layer else 1)
        self.w_q = nn.Linear(D, H * K, bias=cfg.qkv_bias)
        self.w_k = nn.Linear(D, G * K, bias=cfg.qkv_bias)
        self.w_v = nn.Linear(D, G * K, bias=cfg.qkv_bias)
        self.w_o = nn.Linear(H * K, D, bias=cfg.out_bias)
        self.w_gate = nn.Linear(D, H * K, bias=False) if cfg.attn_gate else None
        self.q_norm = self.k_norm = None
        if cfg.qk_norm != "none":          # of each head by itself, or of all heads together
            q_width, k_width = (K, K) if cfg.qk_norm == "head" else (H * K, G * K)
            self.q_norm, self.k_norm = (RMSNorm(width, cfg.norm_eps, cfg.norm_one_plus) for width in (q_width, k_width))
        self.norm_heads = cfg.qk_norm == "head"
        self.norm_turns = self.norm_heads and not cfg.clip_qkv              # nothing stands between that norm and RoPE
        self.sinks = given(torch.zeros(H)) if cfg.sinks else None
        self.lrpe = self.shaw_k = self.shaw_v = None
        if cfg.pos == "lrpe" and (not cfg.lrpe_layers or layer.index < cfg.lrpe_layers):
            self.lrpe = given(lrpe_start(G, K))
        if cfg.pos == "shaw":              # one vector for each distance from -clip to clip, shared by the heads
            self.shaw_k, self.shaw_v = (nn.Parameter(torch.empty(2 * cfg.shaw_clip + 1, K)) for _ in range(2))
            self.shaw_clip = cfg.shaw_clip

    @staticmethod
    def kv_heads(cfg):
        return cfg.n_kv_head or cfg.n_head

    @staticmethod
    def rotary(cfg):
        return int(head_dim(cfg) * cfg.rope_fraction)

    def share(self, tp):
        """Read with this rank's part of the query heads, and of the key heads with those that serve them."""
        (low, high), H, G = bounds(self.n_head, tp), self.n_head, self.n_kv_head
        if G < H and G % tp.size:          # fewer than ranks: their projections stay whole, and each rank reads one
            self.picked = slice(low * G // H, low * G // H + 1)
        self.tp, self.n_head, self.n_kv_head = tp, high - low, high - low if G == H else max(1, G // tp.size)

    def queries(self, x_BTD, norm=True):
        return self.split(self.w_q(x_BTD), self.q_norm if norm else None, self.tp, self.q_width)

    def keys_values(self, x_BSD, norm=True):
        tp = self.tp if self.picked == slice(None) else ALONE
        k_BSGK = self.split(self.w_k(x_BSD), self.k_norm if norm else None, tp, self.k_width)
        return k_BSGK[:, :, self.picked], self.split(self.w_v(x_BSD))[:, :, self.picked]

    def split(self, y_BTD, norm=None, tp=ALONE, width=0):
        """Norm, clip, and cut into heads [B, T, heads, K]."""
        if norm is not None and self.norm_heads:
            y_BTD = norm(y_BTD.unflatten(-1, (-1, self.head_dim))).flatten(2)
        elif norm is not None:
            y_BTD = wide_norm(norm, y_BTD, tp, width)
        y_BTD = y_BTD.clamp(-self.clip, self.clip) if self.clip else y_BTD                       # in this order in OLMoE
        return y_BTD.unflatten(-1, (-1, self.head_dim))

    def forward(self, x_BTD, at, cache=None):
        together = at.turns and self.norm_turns                  # the norms of heads are left to what turns them
        q_BTHK = self.queries(x_BTD, not together)
        k_BSGK, v_BSGU = self.keys_values(x_BTD, not together)
        if at.turns:
            q_BTHK, k_BSGK = at.rope.both(q_BTHK, k_BSGK, *(self.q_norm, self.k_norm) if together else ())
        elif self.lrpe is not None:
            theta = self.lrpe[self.picked]
            each = theta.repeat_interleave(self.n_head // self.n_kv_head, 0)
            q_BTHK, k_BSGK = lrpe(q_BTHK, each, at.positions_BT), lrpe(k_BSGK, theta, at.positions_BT)
        if cache is not None:                                    # turned before the cache: a cached key must not depend on who asks
            k_BSGK, v_BSGU = cache.append(k_BSGK, v_BSGU)
        return self.read(x_BTD, q_BTHK, k_BSGK, v_BSGU, at)

    def read(self, x_BTD, q_BTHK, k_BSGK, v_BSGU, at):
        shaw = None
        if self.shaw_k is not None:
            shaw = self.shaw_k, self.shaw_v, shaw_index(at.distance_TS, self.shaw_clip)
        y_BTHU = attend(q_BTHK, k_BSGK, v_BSGU, at, self.scale, self.dropout * self.training, self.softcap, self.sinks, shaw)
        return self.w_o(gated(self, x_BTD, y_BTHU.flatten(2)))

    def macs(self, T):
        """Multiply-adds of one token beyond its projections when T are read at once: q . k, which LRPE makes twice as wide, and
        p v of all heads."""
        return T * self.n_head * self.head_dim * (3 if self.lrpe is not None else 2)

    def kept(self, T):
        """Numbers in the cache of one sequence after T tokens."""
        tokens = min(T, self.window - 1) if self.window else T
        return tokens * self.n_kv_head * self.head_dim * (3 if self.lrpe is not None else 2)


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
            raise UsageError(f"--attn=mqa has one key/value head, not --n_kv_head={cfg.n_kv_head}; "
                             "use --attn=gqa or leave it out")
        return 1


class Cross(MHA):
    """Queries of the decoder, keys and values of the encoder's output, which are made once.            [AIAYN sec 3.2.3]"""

    def forward(self, x_BTD, memory_BSD, at, cache=None):
        if cache is None:
            k_BSGK, v_BSGU = self.keys_values(memory_BSD)
        elif cache.kept:
            k_BSGK, v_BSGU = cache.kept
        else:
            k_BSGK, v_BSGU = cache.append(*self.keys_values(memory_BSD))
        return self.read(x_BTD, self.queries(x_BTD), k_BSGK, v_BSGU, at)


# ---- MLA (a latent per token) ----

class MLA(nn.Module):
    """Multi-head latent attention: keys and values of all heads are made from one cached latent of width R; the position
    rides on P extra channels, one rotary key for all heads (rotating the latent's keys would forbid absorbing W_uk).

    While decoding, making keys and values of all cached tokens again costs more than it saves. Then W_uk is folded into the
    query and W_uv into the output [DSV2 sec 2.1.2], and the heads read the latents themselves, as in MQA of width R + P."""
    recurrent = False

    def __init__(self, cfg, layer):
        super().__init__()
        width = head_dim(cfg)
        for field, off in (("qk_norm", "none"), ("clip_qkv", 0.0), ("scale_by_layer", False)):
            if getattr(cfg, field) != off:
                raise UsageError(f"--{field}={getattr(cfg, field)} is for --attn=mha and its relatives; leave it out")
        if cfg.pos in ("shaw", "lrpe"):
            raise UsageError(f"--pos={cfg.pos} changes keys head by head, and MLA's heads share one latent; use --pos=rope")
        self.n_head, self.dropout, self.softcap, self.window = cfg.n_head, cfg.attn_dropout, cfg.attn_softcap, layer.window
        # [DSV2 sec 2.1.4] d_c = 4 d_h, where that is narrow beside the stream: a latent wider than it is learns far more slowly
        self.kv_rank, self.rope_dim = cfg.kv_lora_rank or min(4 * width, max(2, cfg.n_embd // 2)), self.rotary(cfg)
        self.nope, self.v_dim = cfg.qk_nope_head_dim or width, cfg.v_head_dim or width
        if self.rope_dim % 2 or self.rope_dim < 2:
            raise UsageError(f"--qk_rope_head_dim={self.rope_dim} is odd, and RoPE turns pairs; use {self.rope_dim + 1}")
        D, H, N, P, U, R = cfg.n_embd, cfg.n_head, self.nope, self.rope_dim, self.v_dim, self.kv_rank
        self.scale = cfg.attn_scale or (N + P)**-0.5
        if cfg.rope_scaling != "none" and cfg.rope_mscale_all:   # DeepSeek's YaRN sharpens all of q . k, not its rotary part
            self.scale *= yarn_m(cfg.rope_factor, cfg.rope_mscale_all) ** 2
        self.w_dq = nn.Linear(D, cfg.q_lora_rank, bias=cfg.qkv_bias) if cfg.q_lora_rank else None
        self.q_gain = nn.Parameter(torch.ones(cfg.q_lora_rank)) if cfg.q_lora_rank else None
        self.w_q = nn.Linear(cfg.q_lora_rank or D, H * (N + P), bias=False)
        self.w_dkv = nn.Linear(D, R + P, bias=cfg.qkv_bias)
        self.kv_gain = nn.Parameter(torch.ones(R))
        self.w_ukv = nn.Linear(R, H * (N + U), bias=False)
        self.w_o = nn.Linear(H * U, D, bias=cfg.out_bias)
        self.w_gate = nn.Linear(D, H * U, bias=False) if cfg.attn_gate else None
        self.sinks = given(torch.zeros(H)) if cfg.sinks else None

    def share(self, tp):
        """Read with this rank's part of the heads; all ranks make the latents."""
        low, high = bounds(self.n_head, tp)
        self.n_head = high - low

    @staticmethod
    def rotary(cfg):
        return cfg.qk_rope_head_dim or max(2, head_dim(cfg) // 4 * 2)                              # d_h^R = d_h / 2

    def forward(self, x_BTD, at, cache=None):
        H, N, P, R = self.n_head, self.nope, self.rope_dim, self.kv_rank
        q_in = x_BTD if self.w_dq is None else rmsnorm(self.w_dq(x_BTD), self.q_gain)                      # [DSV2 eq 12]
        qn_BTHN, qr_BTHP = self.w_q(q_in).unflatten(-1, (H, N + P)).split([N, P], -1)                      # [DSV2 eq 13]
        c_BTR, kr_BTP = self.w_dkv(x_BTD).split([R, P], -1)                                                # [DSV2 eq 9]
        if at.turns:
            qr_BTHP, kr_BT1P = at.rope.both(qr_BTHP, kr_BTP[:, :, None])                                   # [DSV2 eq 14, 15]
            kr_BTP = kr_BT1P[:, :, 0]
        latent_BTL = torch.cat([rmsnorm(c_BTR, self.kv_gain), kr_BTP], -1)
        latent_BSL = latent_BTL if cache is None else cache.append(latent_BTL)[0]
        if at.way == "gather":
            latent_BSL = move(latent_BSL, at.world.cp, "gather", "scatter", 1)
        way = self.absorbed if cache is not None and self.absorbing_pays(x_BTD.shape[1], latent_BSL.shape[1]) else self.expanded
        return self.w_o(gated(self, x_BTD, way(qn_BTHN, qr_BTHP, latent_BSL, at).flatten(2)))              # [DSV2 eq 19]

    def expanded(self, qn_BTHN, qr_BTHP, latent_BSL, at):
        """Make keys and values of all heads, then attend as MHA does."""
        H, N, U = self.n_head, self.nope, self.v_dim
        c_BSR, kr_BSP = latent_BSL.split([self.kv_rank, self.rope_dim], -1)
        kn_BSHN, v_BSHU = self.w_ukv(c_BSR).unflatten(-1, (H, N + U)).split([N, U], -1)                    # [DSV2 eq 10, 11]
        k_BSHK = torch.cat([kn_BSHN, kr_BSP[:, :, None].expand(-1, -1, H, -1)], -1)                        # [DSV2 eq 17]
        return self.attend(torch.cat([qn_BTHN, qr_BTHP], -1), k_BSHK, v_BSHU, at)                          # [DSV2 eq 16, 18]

    def absorbed(self, qn_BTHN, qr_BTHP, latent_BSL, at):
        """q . W_uk c = (W_uk^T q) . c and sum p W_uv c = W_uv sum p c: attend to the latents, then bring up the result."""
        w_uk_HNR, w_uv_HUR = self.w_ukv.weight.to(qn_BTHN.dtype).unflatten(0, (self.n_head, -1)).split([self.nope, self.v_dim], 1)
        qc_BTHR = torch.einsum("bthn,hnr->bthr", qn_BTHN, w_uk_HNR)
        latent_BS1L = latent_BSL[:, :, None]
        yc_BTHR = self.attend(torch.cat([qc_BTHR, qr_BTHP], -1), latent_BS1L, latent_BS1L[..., :self.kv_rank], at)
        return torch.einsum("bthr,hur->bthu", yc_BTHR, w_uv_HUR)

    def attend(self, q_BTHK, k_BSGK, v_BSGU, at):
        return attend(q_BTHK, k_BSGK, v_BSGU, at, self.scale, self.dropout * self.training, self.softcap, self.sinks)

    def absorbing_pays(self, T, S):
        """Fewer multiply-adds for T queries of S latents?"""
        N, P, U, R = self.nope, self.rope_dim, self.v_dim, self.kv_rank
        return T * (N + U) * R + T * S * (2 * R + P) < S * (N + U) * R + T * S * (N + P + U)

    def macs(self, T):
        return T * self.n_head * (self.nope + self.rope_dim + self.v_dim)

    def kept(self, T):
        return (min(T, self.window - 1) if self.window else T) * (self.kv_rank + self.rope_dim)


# ---- Linear attention (a state instead of a cache) ----
#
# Without the softmax the past can be summed once: y_t = sum_{s <= t} (q_t . k_s) v_s = q_t M_t with M_t = sum_s k_s v_s^T, a
# K x U matrix a head however long the text. The variants differ in what becomes of M before a token is added to it:
#     linear                  M_t = M_{t-1} + k_t v_t^T                                        nothing is forgotten
#     lightning, transnormer  M_t = e^{-slope} M_{t-1} + k_t v_t^T                             a fixed half-life a head
#     gdn, kda                M_t = (I - beta k_t k_t^T) e^{g_t} M_{t-1} + beta k_t v_t^T      what k_t points to is replaced
# A decay that no token changes is kernels.decayed_attention; one that tokens choose, a head or a channel, is recurrence below.

def documents(doc_BT, doc_before_B, like):
    """doc_BT and the document of the token before it; one document without end where there is no doc_BT."""
    if doc_BT is None:
        doc_BT, doc_before_B = torch.zeros(like.shape[:2], dtype=torch.long, device=like.device), None
    return doc_BT, doc_BT[:, 0] if doc_before_B is None else doc_before_B


def recurrence(q_BTHK, k_BTHK, v_BTHU, log_decay_BTHJ, beta_BTH=None, state_BHKU=None, doc_BT=None, doc_before_B=None, tile=64):
    """-> y_t = q_t M_t [B, T, H, U] and the last M [B, H, K, U], in float32 or wider. J is 1 (a decay per head) or K (per
    channel); without beta nothing is corrected. A document starts from an empty state.

    Tiles of C tokens: their C^2 pairs directly, all before them through the state, so no loop over tokens.  [LA2 alg 1]"""
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    q_BHTK, k_BHTK, v_BHTU, log_decay_BHTJ = (x.to(wide).transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHU, log_decay_BTHJ))
    if state_BHKU is None:
        state_BHKU = k_BHTK.new_zeros(*k_BHTK[:, :, 0].shape, v_BHTU.shape[-1])
    doc_BT, before_B = documents(doc_BT, doc_before_B, q_BTHK)
    y_BHCU = []
    with no_autocast(q_BTHK):
        for here in (slice(start, start + tile) for start in range(0, q_BTHK.shape[1], tile)):
            q_BHCK, k_BHCK, write_BHCU = q_BHTK[:, :, here], k_BHTK[:, :, here], v_BHTU[:, :, here]
            doc_B1C1 = doc_BT[:, None, here, None]
            visible_B1CC1 = (doc_B1C1 == doc_B1C1.mT).tril()[..., None]
            fresh_B1C1 = doc_B1C1 != before_B[:, None, None, None]
            before_B = doc_B1C1[:, 0, -1, 0]
            # the share left, at token t of the tile, of what token s <= t wrote, and of the state before the tile
            sum_BHCJ = log_decay_BHTJ[:, :, here].cumsum(2)
            left_BHCCJ = (sum_BHCJ[:, :, :, None] - sum_BHCJ[:, :, None]).masked_fill(~visible_B1CC1, -torch.inf).exp()
            old_BHCJ = sum_BHCJ.masked_fill(fresh_B1C1, -torch.inf).exp()
            if beta_BTH is not None:
                # a token writes its value less what its key reads already, in the old state and in the writes before it in
                # the tile: (I + known below the diagonal) write = beta (value - read of the old state)                  [GDN]
                beta_BHC1 = beta_BTH[:, here].to(wide).transpose(1, 2)[..., None]
                write_BHCU = beta_BHC1 * (write_BHCU - (k_BHCK * old_BHCJ) @ state_BHKU)
                known_BHCC = beta_BHC1 * decayed_scores(k_BHCK, k_BHCK, left_BHCCJ)
                write_BHCU = torch.linalg.solve_triangular(known_BHCC, write_BHCU, upper=False, unitriangular=True)
            y_BHCU.append((q_BHCK * old_BHCJ) @ state_BHKU + decayed_scores(q_BHCK, k_BHCK, left_BHCCJ) @ write_BHCU)
            state_BHKU = old_BHCJ[:, :, -1, :, None] * state_BHKU + (k_BHCK * left_BHCCJ[:, :, -1]).mT @ write_BHCU
    return torch.cat(y_BHCU, 2).transpose(1, 2), state_BHKU


def decayed_scores(x_BHCK, k_BHCK, left_BHCCJ):
    """sum over channels of x_t left_ts k_s. A decay per head factors out; one per channel would only as e^sum_t e^-sum_s,
    whose second factor overflows, so the product of all three is formed."""
    if left_BHCCJ.shape[-1] == 1:
        return (x_BHCK @ k_BHCK.mT) * left_BHCCJ[..., 0]
    return torch.einsum("bhtk,bhtsk->bhts", x_BHCK, left_BHCCJ * k_BHCK[:, :, None])


def carried(kept, wrote_BHKU, cp, times):
    """The state that enters rank cp.rank, when rank r turns a state M into kept_r M + wrote_r."""
    kept_n, wrote_n = (move(t[None].contiguous(), cp, "gather", "scatter") for t in (kept, wrote_BHKU))
    state_BHKU = torch.zeros_like(wrote_BHKU) + 0 * (kept_n.sum() + wrote_n.sum())           # all ranks have a gradient to send back
    for rank in range(cp.rank):
        state_BHKU = times(kept_n[rank], state_BHKU) + wrote_n[rank]
    return state_BHKU


class Recurrent(nn.Module):
    """What the variants share: H heads of q, k, v, and a state that goes from call to call in cache.kept."""
    recurrent = True

    def __init__(self, cfg, layer):
        super().__init__()
        if cfg.tile < 1:
            raise UsageError(f"--tile={cfg.tile}: the past is summed in tiles of at least one token; use --tile=64")
        self.n_head, self.head_dim, self.tile = cfg.n_head, head_dim(cfg), cfg.tile
        self.all_heads, self.heads, self.tp = cfg.n_head, slice(None), ALONE         # the heads of this rank, where tp shares them
        self.key_dim = self.value_dim = self.head_dim        # of the state
        self.scores = self.reads = 1                         # products q.k of a pair, readings of the state by a token
        D, H, K = cfg.n_embd, self.n_head, self.head_dim
        self.w_q = nn.Linear(D, H * K, bias=cfg.qkv_bias)
        self.w_k = nn.Linear(D, H * K, bias=cfg.qkv_bias)
        self.w_v = nn.Linear(D, H * K, bias=cfg.qkv_bias)
        self.w_o = nn.Linear(H * K, D, bias=cfg.out_bias)

    @staticmethod
    def rotary(cfg):
        return 0                    # decays tell distances

    def qkv(self, x_BTD):
        return [w(x_BTD).unflatten(-1, (self.n_head, self.head_dim)) for w in (self.w_q, self.w_k, self.w_v)]

    def share(self, tp):
        """Read with this rank's part of the heads."""
        low, high = bounds(self.n_head, tp)
        self.tp, self.heads, self.n_head = tp, slice(low, high), high - low

    def before(self, cache, n=1):
        """The n states that the last call left; None each where there was none."""
        return list(cache.kept) if cache is not None and cache.kept else [None] * n

    def state(self, cache, k_BTHK, v_BTHU, slope_H, at):
        """The state before the first token here: what the last call left or, where ranks share the row, what those before this one
        wrote: each its part from an empty state, e^(-slope (T - 1 - t)) k_t v_t^T summed over its last document."""
        if not at.way:
            return self.before(cache)[0]
        T, doc_BT = k_BTHK.shape[1], documents(at.doc_BT, at.doc_before_B, k_BTHK)[0]
        wide, steps_T1 = torch.promote_types(k_BTHK.dtype, torch.float32), torch.arange(T - 1, -1, -1, device=k_BTHK.device)[:, None]
        left_BTH1 = (-slope_H * steps_T1).exp()[None, :, :, None] * (doc_BT == doc_BT[:, -1:])[:, :, None, None]
        with no_autocast(k_BTHK):
            wrote_BHKU = torch.einsum("bthk,bthu->bhku", k_BTHK.to(wide) * left_BTH1, v_BTHU.to(wide))
        kept_BH11 = (-slope_H * T).exp()[None, :, None, None] * at.goes_through()[:, None, None, None]
        return carried(kept_BH11.expand(len(k_BTHK), -1, -1, -1), wrote_BHKU, at.world.cp, torch.mul)

    def keep(self, cache, T, *states):
        if cache is not None:
            cache.kept, cache.length, cache.folded = list(states), cache.length + T, True

    def macs(self, T):
        K, U, (full, rest) = self.key_dim, self.value_dim, divmod(T, self.tile)
        pairs = full * self.tile**2 + rest**2                # also those above the diagonal
        return self.n_head * (pairs * (self.scores * K + U) + T * (self.reads + 1) * K * U) // T

    def kept(self, T):
        return self.n_head * self.key_dim * self.value_dim


# ---- Linear (positive features instead of e^(q . k)) ----

FEATURE_MAPS = {                   # flag --feature_map: phi with phi(q) . phi(k) >= 0, so that weights can be shares of a sum
    "elu": lambda x: F.elu(x) + 1,                                                                            # [LinTr eq 7]
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "softmax": lambda x: x.softmax(-1),            # [EffAttn], whose keys take theirs over positions: not causal
    "taylor": lambda x: F.pad(F.normalize(x, dim=-1), (0, 1), value=1.0),      # 1 + cos(q, k), e^cos to first order [Su]
}


class Linear(Recurrent):
    """y_t = sum_s (phi(q_t) . phi(k_s)) v_s / sum_s phi(q_t) . phi(k_s), the softmax's e^(q . k) replaced.        [LinTr]"""

    def __init__(self, cfg, layer):
        super().__init__(cfg, layer)
        if cfg.feature_map not in FEATURE_MAPS:
            raise UsageError(f"--feature_map={cfg.feature_map} is not a feature map; use one of {list(FEATURE_MAPS)}")
        self.phi, self.turns = FEATURE_MAPS[cfg.feature_map], cfg.pos == "rope"
        self.key_dim, self.value_dim = self.head_dim + (cfg.feature_map == "taylor"), self.head_dim + 1
        self.scores = 1 + self.turns

    @staticmethod
    def rotary(cfg):
        return int(head_dim(cfg) * cfg.rope_fraction)

    def forward(self, x_BTD, at, cache=None):
        q_BTHK, k_BTHK, v_BTHU = self.qkv(x_BTD)
        wide = torch.promote_types(v_BTHU.dtype, torch.float32)
        kind = v_BTHU.dtype if v_BTHU.dtype == torch.bfloat16 else wide      # sums of positive features overflow float16
        q_BTHK, k_BTHK = self.phi(q_BTHK.to(wide)).to(kind), self.phi(k_BTHK.to(wide)).to(kind)
        one_BTH1, zero_H = torch.ones_like(v_BTHU[..., :1]), q_BTHK.new_zeros(self.n_head)
        states = self.before(cache, 1 + at.turns)

        def read(i, q, k, v):
            before = self.state(None, k, v, zero_H, at) if at.way else states[i]
            y, states[i] = decayed_attention(q, k, v.to(kind), zero_H, before, at.doc_BT, at.doc_before_B, self.tile)
            return y

        if at.turns:                # turned features can have a negative product, so only the numerator turns   [RoPE eq 19]
            y_BTHU, sum_BTH1 = read(0, at.rope(q_BTHK), at.rope(k_BTHK), v_BTHU), read(1, q_BTHK, k_BTHK, one_BTH1)
        else:                       # the denominator is the numerator of a value that is always 1
            y_BTHU, sum_BTH1 = read(0, q_BTHK, k_BTHK, torch.cat([v_BTHU, one_BTH1], -1)).split([self.head_dim, 1], -1)
        self.keep(cache, x_BTD.shape[1], *states)
        return self.w_o((y_BTHU / (sum_BTH1 + 1e-6)).flatten(2).to(v_BTHU.dtype))


# ---- Lightning, TransNormer (each head forgets at its own fixed pace) ----

class Lightning(Recurrent):
    """MiniMax-Text-01's layer: no denominator, so the output is normalised; no RoPE, the decay tells near from far. Heads
    forget at different paces, and the deeper the layer, the slower.                                          [MiniMax]"""

    def __init__(self, cfg, layer):
        super().__init__(cfg, layer)
        self.pace = 1 - layer.index / (cfg.n_layer - 1 + 1e-5) + 1e-5       # 1 in the first layer, nearly 0 in the last
        D, H, K = cfg.n_embd, self.n_head, self.head_dim
        self.norm = RMSNorm(H * K, 1e-6)                     # over all heads
        self.w_gate = nn.Linear(D, H * K, bias=False)

    def slopes(self, like):
        h = torch.arange(1, self.all_heads + 1, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        return (torch.exp2(-8 / self.all_heads * h) * self.pace)[self.heads]

    def forward(self, x_BTD, at, cache=None):
        q_BTHK, k_BTHK, v_BTHU = (F.silu(x) for x in self.qkv(x_BTD))
        slope_H = self.slopes(x_BTD)
        y_BTHU, state_BHKU = decayed_attention(q_BTHK, k_BTHK, v_BTHU, slope_H, self.state(cache, k_BTHK, v_BTHU, slope_H, at),
                                               at.doc_BT, at.doc_before_B, self.tile)
        self.keep(cache, x_BTD.shape[1], state_BHKU)
        y_BTF = wide_norm(self.norm, y_BTHU.flatten(2), self.tp, self.all_heads * self.head_dim).to(v_BTHU.dtype)
        return self.w_o(self.w_gate(x_BTD).sigmoid() * y_BTF)


class UnitRMS(nn.Module):
    """RMSNorm without a gain."""
    eps, gain = 1e-6, 1.0

    def forward(self, x_BTF):
        return F.rms_norm(x_BTF, x_BTF.shape[-1:], eps=self.eps)


class TransNormer(Recurrent):
    """TransNormerLLM's layer, as released: v and the gate stay raw, the norm has no gain, and --pos=lrpe doubles the key
    width by a learned turn, [x cos(theta t), x sin(theta t)].                                                   [TNL]"""

    def __init__(self, cfg, layer):
        super().__init__(cfg, layer)
        self.pace = 1 - layer.index / max(1, cfg.n_layer - 1) + 1e-5
        D, H, K = cfg.n_embd, self.n_head, self.head_dim
        self.turns = cfg.pos == "lrpe" and (not cfg.lrpe_layers or layer.index < cfg.lrpe_layers)
        if self.turns:
            self.lrpe, self.key_dim = given(lrpe_start(H, K)), 2 * K
        self.w_gate = nn.Linear(D, H * K, bias=False)
        self.norm = UnitRMS()

    def slopes(self, like):
        """ALiBi's: 2^(-8/P), 2^(-16/P), ... for the P heads of the largest power of two, then every other one of 2P."""
        h = torch.arange(self.all_heads, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        P = 1 << (self.all_heads.bit_length() - 1)
        return (torch.exp2(-8 / P * torch.where(h < P, h + 1, h - P + 0.5)) * self.pace)[self.heads]

    def forward(self, x_BTD, at, cache=None):
        q_BTHK, k_BTHK, v_BTHU = self.qkv(x_BTD)
        q_BTHK, k_BTHK = F.silu(q_BTHK), F.silu(k_BTHK)
        if self.turns:
            q_BTHK, k_BTHK = lrpe(q_BTHK, self.lrpe, at.positions_BT), lrpe(k_BTHK, self.lrpe, at.positions_BT)
        slope_H = self.slopes(x_BTD)
        y_BTHU, state_BHKU = decayed_attention(q_BTHK, k_BTHK, v_BTHU, slope_H, self.state(cache, k_BTHK, v_BTHU, slope_H, at),
                                               at.doc_BT, at.doc_before_B, self.tile)
        self.keep(cache, x_BTD.shape[1], state_BHKU)
        y_BTF = wide_norm(self.norm, y_BTHU.flatten(2), self.tp, self.all_heads * self.head_dim).to(v_BTHU.dtype)
        return self.w_o(self.w_gate(x_BTD) * y_BTF)


# ---- Gated DeltaNet, Kimi Delta Attention (a memory that is corrected) ----

class GatedDeltaNet(Recurrent):
    """A memory that is corrected: all decays by e^g, then the token replaces a share beta of what its key points to; both
    are read from the token. Keys of unit length make I - beta k k^T a contraction.                           [GDN eq 10]"""
    gate = staticmethod(F.silu)

    def __init__(self, cfg, layer):
        super().__init__(cfg, layer)
        D, H, K = cfg.n_embd, self.n_head, self.head_dim
        self.scores = self.reads = 2                         # keys ask as queries do; the triangular solve is not counted
        self.taps = 4                                        # width of the convolution
        self.conv = given(torch.eye(self.taps)[-1].repeat(3 * H * K, 1))       # begins by passing its input on
        self.w_beta = nn.Linear(D, H, bias=False)
        self.w_decay, self.w_gate, J = self.gates(D, H, K)
        step_J = torch.logspace(-3, -1, H * J)               # paces spread evenly over what the authors draw from
        self.dt_bias, self.a_log = given(step_J.expm1().log()), given(torch.linspace(1, 16, H).log())
        self.norm = RMSNorm(K, 1e-6)                         # per head

    @staticmethod
    def gates(D, H, K):
        return nn.Linear(D, H, bias=False), nn.Linear(D, H * K, bias=False), 1

    def convolve(self, x_BTF, at, tail_BCF):
        """silu of a causal depthwise convolution within the document, and the inputs that the next call will need."""
        T, C = x_BTF.shape[1], self.taps - 1
        if tail_BCF is None:
            tail_BCF = x_BTF.new_zeros(len(x_BTF), C, x_BTF.shape[-1])
        past_BSF = torch.cat([tail_BCF, x_BTF], 1)
        doc_BT, before_B = documents(at.doc_BT, at.doc_before_B, x_BTF)
        doc_BS = torch.cat([before_B[:, None].expand(-1, C), doc_BT], 1)
        y_BTF = sum(self.conv[:, i] * past_BSF[:, i:i + T] * (doc_BS[:, i:i + T] == doc_BT)[..., None] for i in range(C + 1))
        return F.silu(y_BTF), past_BSF[:, T:] * (doc_BS[:, T:] == doc_BS[:, -1:])[..., None]

    def tail(self, x_BTF, at):
        """What the convolution reads of the rank before this one."""
        C, (doc_BT, _) = self.taps - 1, documents(at.doc_BT, at.doc_before_B, x_BTF)
        own_BCF = x_BTF[:, -C:] * (doc_BT[:, -C:] == doc_BT[:, -1:])[..., None]
        every = move(own_BCF[None].contiguous(), at.world.cp, "gather", "scatter")
        return every[at.world.cp.rank - 1] * min(1, at.world.cp.rank)

    def forward(self, x_BTD, at, cache=None):
        state_BHKU, tail_BCF = self.before(cache, 2)
        x_BTF = torch.cat([x.flatten(2) for x in self.qkv(x_BTD)], -1)
        x_BTF, tail_BCF = self.convolve(x_BTF, at, self.tail(x_BTF, at) if at.way else tail_BCF)
        x_BTF = x_BTF.to(torch.promote_types(x_BTF.dtype, torch.float32))
        q_BTHK, k_BTHK, v_BTHU = (x.unflatten(-1, (self.n_head, self.head_dim)) for x in x_BTF.chunk(3, -1))
        q_BTHK, k_BTHK = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q_BTHK, k_BTHK))
        step_BTHJ = F.softplus(self.w_decay(x_BTD).to(x_BTF.dtype) + self.dt_bias).unflatten(-1, (self.n_head, -1))
        log_decay_BTHJ = -self.a_log.to(x_BTF.dtype).exp()[:, None] * step_BTHJ
        beta_BTH = self.w_beta(x_BTD).sigmoid()
        run = lambda v_BTHU, state: recurrence(q_BTHK * self.key_dim**-0.5, k_BTHK, v_BTHU, log_decay_BTHJ, beta_BTH, state, at.doc_BT,
                                               at.doc_before_B, self.tile)
        if at.way:                  # ranks share the row: what this one makes of any state before it, column by column, and of none
            eye_BHKK = torch.eye(self.key_dim, device=x_BTF.device, dtype=x_BTF.dtype).expand(len(x_BTF), self.n_head, -1, -1)
            start_BHKL = torch.cat([eye_BHKK, eye_BHKK.new_zeros(*eye_BHKK.shape[:3], v_BTHU.shape[-1])], -1)
            end_BHKL = run(torch.cat([torch.zeros_like(k_BTHK), v_BTHU], -1), start_BHKL)[1]
            state_BHKU = carried(*(t.contiguous() for t in end_BHKL.split([self.key_dim, v_BTHU.shape[-1]], -1)), at.world.cp, torch.matmul)
        y_BTHU, state_BHKU = run(v_BTHU, state_BHKU)
        self.keep(cache, x_BTD.shape[1], state_BHKU, tail_BCF)
        gate_BTHU = self.gate(self.w_gate(x_BTD)).view_as(y_BTHU)
        return self.w_o((gate_BTHU * self.norm(y_BTHU).to(gate_BTHU.dtype)).flatten(2))

    def kept(self, T):
        return super().kept(T) + (self.taps - 1) * len(self.conv)


class KDA(GatedDeltaNet):
    """Kimi Delta Attention: every key channel forgets at its own pace.                                               [KDA]"""
    gate = staticmethod(torch.sigmoid)

    def __init__(self, cfg, layer):
        super().__init__(cfg, layer)
        self.tile = max(1, cfg.tile // 4)            # a tile's pairs take C C K numbers here, not C C

    @staticmethod
    def gates(D, H, K):             # through a bottleneck of one head's width
        narrow = lambda: nn.Sequential(nn.Linear(D, K, bias=False), nn.Linear(K, H * K, bias=False))
        return narrow(), narrow(), K


ATTENTION = {                      # flag --attn
    "mha": MHA,                    # every query head has its own keys and values
    "gqa": GQA,                    # groups of query heads share them
    "mqa": MQA,                    # all query heads share one
    "mla": MLA,                    # all are made from a cached latent
    "swa": MHA,                    # the newest --window keys alone
    "local": MHA, "dilated": MHA, "blocks": MHA, "sparse": MHA, "strided": MHA, "fixed": MHA,      # the keys that PATTERNS say
    "star": MHA, "global": MHA, "random": MHA,
    "linear": Linear,              # feature maps instead of a softmax
    "lightning": Lightning,        # a decay a head, gated (MiniMax)
    "transnormer": TransNormer,    # the same, as TransNormerLLM has it
    "gdn": GatedDeltaNet,          # the state is corrected, not only added to
    "kda": KDA,                    # the same with a decay a channel
}


# ---- Start-up (which attention will run?) ----

def backends(cfg, plan, device, dtype):
    """In words, for training rows, which always say where documents end. The tensors here hold one number each."""
    names = set()
    for layer in {layer.kind: layer for layer in plan}.values():
        if ATTENTION[layer.attn].recurrent:
            names.add("tiles")
            continue
        mla, width, T = layer.attn == "mla", head_dim(cfg), cfg.seq_len
        blank = torch.zeros(1, 1, dtype=torch.long, device=device)
        K, U = ((cfg.qk_nope_head_dim or width) + MLA.rotary(cfg), cfg.v_head_dim or width) if mla else (width, width)
        arch = getattr(cfg, "arch", "decoder")
        prefix_B = blank[0] if arch == "prefix" else None
        this = Pass(blank.expand(1, T), 0, blank.expand(1, T), arch != "encoder", prefix_B, dtype=dtype)
        at, like = Places(cfg, layer, this), torch.empty(1, 1, 1, 1, device=device, dtype=dtype)
        shaw = True if cfg.pos == "shaw" else None
        if flash_runs(like.expand(1, T, 1, K), like.expand(1, T, 1, U), at, cfg.attn_dropout, shaw):
            names.add("flash in triton")
        else:
            names.add("products" if at.stored else "sdpa" + (", cudnn first" if cudnn_first() and like.is_cuda else ""))
    return " and ".join(sorted(names))


# ---- Demo and bench ----

def demo():
    cfg = AttentionConfig(n_embd=1024, n_head=16, seq_len=4096)
    print(f"n_embd {cfg.n_embd}, n_head {cfg.n_head}, rows of {cfg.seq_len:,} tokens: one layer, bfloat16 (states float32)\n")
    print(f"{'attn':12s}{'parameters':>11s}{'MFLOPs a token':>15s}{'cache, KiB':>12s}{'of mha':>8s}{'a token more':>14s}"
          "   last token equals the full pass")
    torch.manual_seed(0)
    x_BTD, full = torch.randn(1, 9, cfg.n_embd), 0
    for name, variant in ATTENTION.items():
        layer = Layer(0, name, cfg.seq_len // 4 if name == "swa" else 0)
        mixer, cache = variant(cfg, layer), LayerCache(layer.window)
        places = lambda past, T: Places(cfg, layer, Pass(torch.arange(past, past + T)[None], past))
        with torch.no_grad():
            want = mixer(x_BTD, places(0, 9))[:, -1]
            mixer(x_BTD[:, :8], places(0, 8), cache)
            got = mixer(x_BTD[:, 8:], places(8, 1), cache)[:, 0]
        T, parameters, size = cfg.seq_len, sum(p.numel() for p in mixer.parameters()), 4 if mixer.recurrent else 2
        kept, more = size * mixer.kept(T), size * (mixer.kept(T + 1) - mixer.kept(T))
        full = full or kept
        print(f"{name:12s}{parameters:11,}{2 * (parameters + mixer.macs(T)) / 1e6:15,.1f}{kept / 1024:12,.0f}{kept / full:8.1%}"
              f"{more:12,} B   to {(got - want).abs().max():.0e}")


def bench(shapes=((12, 256, 6, 64), (4, 1024, 6, 64))):
    """Both paths of `attend` on this machine: forward and backward, milliseconds, documents of about 200 tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for B, T, H, K in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            q_BTHK, k_BTHK, v_BTHK = (torch.randn(B, T, H, K, device=device, dtype=dtype).requires_grad_() for _ in range(3))
            doc_BT = (torch.rand(B, T, device=device) < 1 / 200).cumsum(1)
            cfg = AttentionConfig(n_head=H, head_dim=K, pos="none")
            at = Places(cfg, Layer(0, "mha"), Pass(torch.arange(T, device=device)[None], doc_BS=doc_BT, dtype=dtype))

            def step(stored):
                at.stored = stored
                attend(q_BTHK, k_BTHK, v_BTHK, at, K**-0.5).sum().backward()

            plain, sdpa = best_ms([lambda: step(True), lambda: step(False)], device)
            print(f"B {B} T {T} H {H} K {K} {str(dtype)[6:]:9s} products {plain:8.2f} ms   sdpa {sdpa:8.2f} ms   "
                  f"ratio {sdpa / plain:.2f}", flush=True)


def main(argv):
    if argv not in ([], ["--bench"]):
        raise UsageError(f"attention.py takes --bench or nothing, not {' '.join(argv)}")
    bench() if argv else demo()


if __name__ == "__main__":
    run_cli(main)
