"""Model: what is the network?

A decoder reads ids and writes, at every place, a score for each id that could come next. It is one vector per token, the
residual stream, to which every block adds twice: once what attention fetched from other tokens, once what an MLP
computed from the token alone. Everything that differs between GPT-2, BERT, T5, Llama and Gemma is a field of ModelConfig.

    x = E[token] (+ P[position])
    x = x + Attention(Norm(x));   x = x + MLP(Norm(x))         for every block, norms first                [GPT2 sec 2.3]
    logits = Norm(x) E^T  (or an own head)
    MLP(x)    = W_down act(W_up x)                             gelu                                         [GELU sec 2]
    SwiGLU(x) = W_down (silu(W_gate x) * W_up x)               gated                                        [GLU eq 6]
    and in general, for each of the two:   x = after( alpha x + beta post( f( pre(x) ) ) )                   (--norm_at)

Contents:    config and presets | norms | activation checkpointing | activations and MLP | block | multi-token prediction | initial weights |
             generation | sharing | Model | sizes | plan | drawing | Hugging Face folders | demo and command line
Shapes:      B batch, T queries, S source tokens, D n_embd, F d_ff, V vocab, M rows (B T flattened)
References:
    [GPT2]   Language Models are Unsupervised Multitask Learners, OpenAI 2019
    [GELU] 1606.08415; [GLU] GLU Variants Improve Transformer, 2002.05202; [Swish] 1710.05941; [Mish] 1908.08681;
    [Primer] 2109.08668; [LN] Layer Normalization, 1607.06450; [RMS] RMSNorm, 1910.07467; [GN] Group Normalization, 1803.08494;
    [TNL] TransNormerLLM, 2307.14995; [DeepNet] 2203.00555; [GLM130B] 2210.02414; [CTRL] 1909.05858; [PaLM] 2204.02311;
    [DSV3] DeepSeek-V3 Technical Report, 2412.19437; [Megatron] 1909.08053; [Spec] Speculative Decoding, 2211.17192; [Upcycle] 2212.05055;
    [Sublinear] Training Deep Nets with Sublinear Memory Cost, 1604.06174; [Recompute] Reducing Activation Recomputation, 2205.05198
Run me:      python model.py                               (presets and a first generation)
             python model.py --describe --preset=llama     (what it costs; any flags, or a Hugging Face folder)
             python model.py --draw=out.svg --attn=mla     (every tensor to scale)
             python model.py out --bench                   (ids a second, and what drafts of MTP modules bring)
"""
import contextlib
import copy
import hashlib
import html
import itertools
import json
import math
import re
import textwrap
import time
import warnings
from collections import namedtuple
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dist
from dist import Cut, World, bounds, enter, leave, of_stream, row_places, vocab_parallel_cross_entropy
from attention import (ATTENTION, FEATURE_MAPS, PATTERNS, POSITION_BIAS, POSITIONS, QK_NORMS, ROPE_LAYOUTS, ROPE_SCALINGS,
                       AttentionConfig, Cache, Cross, Layer, Pass, Places, RMSNorm, head_dim, inverse_frequencies,
                       places_in_documents, places_of_memory, rope_base, seen_keys, sinusoid, sparse_sizes, t5_bucket)
from kernels import gated, linear_cross_entropy, to_autocast
from moe import CHOICES, MoE, MoEConfig, aux_sum, expert_width, moe_layers, upcycle, validate_moe
from tokenizer import Parser, UsageError, add_flags, atomic_write, run_cli


@dataclass
class ModelConfig(AttentionConfig, MoEConfig):
    arch: str = "decoder"          # who sees whom, a key of ARCHS
    n_enc_layer: int = 0           # encdec: blocks of the encoder; 0 means n_layer
    start_token: int = 0           # encdec: the id a generated text begins with
    vocab_size: int = 2048         # ids the model knows; a tokenizer trained here gets as many
    d_ff: int = 0                  # hidden width of the MLP; 0 means 4 n_embd, or two thirds of that where gated
    act: str = "swiglu"            # MLP activation, a key of ACTIVATIONS
    mlp_bias: bool = False         # biases in the MLP
    norm: str = "rms"              # normalisation, a key of NORMS
    norm_at: str = "pre"           # where a block normalises, a key of PLACEMENTS
    norm_groups: int = 8           # group: groups of channels
    norm_share: float = 0.0625     # prms: share of the channels that the mean is taken over
    res_alpha: float = 0.0         # factor on the stream in a block; 0 means by its placement
    res_beta: float = 0.0          # factor on what a block adds; 0 means 1
    res_alpha_linear: float = 0.0  # the same around linear mixers; 0 means as res_alpha
    res_beta_linear: float = 0.0   # 0 means as res_beta
    res_alpha_mlp: float = 0.0     # the same around MLPs; 0 means as res_alpha
    res_beta_mlp: float = 0.0      # 0 means as res_beta
    tie_embeddings: bool = True    # the head is the embedding
    head_bias: bool = False        # a bias an id
    headless: bool = False         # no head: the model's output is its hidden states
    mlm_head: bool = False         # BERT: dense, activation and norm before the head
    pooler: bool = False           # BERT: tanh(W x + b) of the first token
    n_token_type: int = 0          # BERT: kinds of segments, each with an embedding
    embed_norm: bool = False       # normalise the embedded input
    embed_scale: bool = False      # embeddings times sqrt(n_embd)
    embed_grad_shrink: float = 1.0 # factor on the embedding's gradient; GLM-130B takes 0.1
    logit_scale: float = 1.0       # factor on what the head reads
    logit_softcap: float = 0.0     # logits l become c tanh(l / c); 0 leaves them
    embed_dropout: float = 0.0     # share of the embedded input dropped in training
    resid_dropout: float = 0.0     # share of what a block adds dropped in training
    z_loss: float = 0.0            # training adds this times (log sum exp of the logits)^2 a token; PaLM takes 1e-4
    label_smoothing: float = 0.0   # training's targets give this share of their weight to all ids alike
    ac: str = "none"               # activation checkpointing: what backward computes again instead of keeping, a key of AC
    mtp: int = 0                   # modules that predict tokens further ahead, one each; 0 means none
    mtp_weight: float = 0.3        # weight of their mean loss beside the main one
    mtp_weight_late: float = 0.1   # the same late in a run, which begins
    mtp_late: float = 0.675        # at this share of its steps
    mtp_normed: bool = True        # they read hidden states after the norm that ends them, else before it
    init_std: float = 0.02         # spread of initial weights
    seed: int = 0                  # decides initial weights, data order and dropout


# What both have, at a size that trains in minutes on a CPU
DEEPSEEK_TINY = dict(n_layer=4, n_head=6, n_embd=192, attn="mla", q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32,
                     qk_rope_head_dim=16, v_head_dim=32, rope_layout="interleaved", d_ff=512, moe=True, n_expert=16, n_active=3,
                     n_shared_expert=1, d_expert=64, n_dense_layer=1, n_group=4, top_group=2, seq_len=256, vocab_size=2048,
                     tie_embeddings=False, lr=2e-3)

PRESETS = {                        # flag --preset: many flags at once, later flags override it
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, seq_len=1024, norm="layer", norm_eps=1e-5, act="gelu_tanh",
                 pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True, lr=6e-4),
    "llama": dict(n_layer=12, n_head=12, n_embd=768, n_kv_head=4, attn="gqa", d_ff=2048, seq_len=1024, norm="rms",
                  norm_eps=1e-5, act="swiglu", pos="rope", tie_embeddings=False, lr=6e-4),
    "mistral": dict(n_layer=32, n_head=32, n_embd=4096, n_kv_head=8, attn="swa", window=4096, d_ff=14336, seq_len=8192, norm_eps=1e-5,
                    tie_embeddings=False, vocab_size=32000, lr=3e-4),                                  # 7B v0.1
    "deepseek-llm": dict(n_layer=30, n_head=32, n_embd=4096, d_ff=11008, seq_len=4096, tie_embeddings=False, vocab_size=102400,
                         lr=4.2e-4),                                                                   # 7B
    "qwen3": dict(n_layer=28, n_head=16, n_embd=1024, head_dim=128, n_kv_head=8, attn="gqa", d_ff=3072, seq_len=4096, qk_norm="head",
                  rope_theta=1e6, vocab_size=151936, lr=3e-4),                                         # 0.6B
    "olmo2": dict(n_layer=16, n_head=16, n_embd=2048, d_ff=8192, seq_len=4096, qk_norm="width", norm_at="branch_post", rope_theta=5e5,
                  tie_embeddings=False, vocab_size=100352, lr=4e-4),                                   # 1B
    "gemma3": dict(n_layer=26, n_head=4, n_embd=1152, head_dim=256, n_kv_head=1, layers="swa*5,gqa", window=512, d_ff=6912, seq_len=8192,
                   norm_at="sandwich", norm_one_plus=True, embed_scale=True, qk_norm="head", act="geglu_tanh", rope_theta=1e6,
                   rope_local_theta=1e4, vocab_size=262144, lr=3e-4),                                  # 1B
    "glm4": dict(n_layer=40, n_head=32, n_embd=4096, n_kv_head=2, attn="gqa", head_dim=128, d_ff=13696, seq_len=8192, qkv_bias=True,
                 rope_fraction=0.5, rope_layout="interleaved", norm_at="sandwich", norm_eps=1e-5, tie_embeddings=False,
                 vocab_size=151552, lr=3e-4),                                                          # 9B of April 2025
    "t5": dict(arch="encdec", n_layer=12, n_head=12, n_embd=768, head_dim=64, d_ff=2048, pos="t5", attn_scale=1.0, act="geglu_tanh",
               seq_len=512, tie_embeddings=False, vocab_size=32128, lr=1e-3),                          # 1.1 base
    "bert": dict(arch="encoder", n_layer=12, n_head=12, n_embd=768, seq_len=512, norm="layer", norm_at="post", norm_eps=1e-12, act="gelu",
                 pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True, embed_norm=True, n_token_type=2, mlm_head=True,
                 head_bias=True, vocab_size=30522, lr=1e-4),                                           # base
    "transnormer": dict(n_layer=12, n_head=12, n_embd=768, d_ff=2048, attn="transnormer", pos="lrpe", lrpe_layers=1, norm="srms",
                        act="bilinear", embed_scale=True, tie_embeddings=False, seq_len=1024, lr=6e-4),     # at GPT-2's size
    "deepseek-v2": dict(n_layer=60, n_head=128, n_embd=5120, attn="mla", q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
                        qk_rope_head_dim=64, v_head_dim=128, rope_layout="interleaved", d_ff=12288, moe=True, n_expert=160,
                        n_active=6, n_shared_expert=2, d_expert=1536, n_dense_layer=1, router="softmax", norm_gates=False,
                        routed_scale=16.0, n_group=8, top_group=3, group_score="max", bias_lr=0.0, aux_loss="expert",
                        aux_alpha=0.003, n_device=8, device_alpha=0.05, comm_alpha=0.02, seq_len=4096, vocab_size=102400,
                        tie_embeddings=False, init_std=0.006, lr=2.4e-4),                                            # 236B
    "deepseek-v3": dict(n_layer=61, n_head=128, n_embd=7168, attn="mla", q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
                        qk_rope_head_dim=64, v_head_dim=128, rope_layout="interleaved", d_ff=18432, moe=True, n_expert=256,
                        n_active=8, n_shared_expert=1, d_expert=2048, n_dense_layer=3, router="sigmoid", norm_gates=True,
                        routed_scale=2.5, n_group=8, top_group=4, group_score="top2", aux_loss="sequence", aux_alpha=1e-4,
                        seq_len=4096, vocab_size=129280, tie_embeddings=False, init_std=0.006, lr=2.2e-4),      # 671B; they trained with --mtp=1
    "deepseek-v2-tiny": dict(DEEPSEEK_TINY, router="softmax", norm_gates=False, routed_scale=4.0, group_score="max", bias_lr=0.0,
                             aux_loss="expert", aux_alpha=0.003, n_device=4, device_alpha=0.05, comm_alpha=0.02),
    "deepseek-v3-tiny": dict(DEEPSEEK_TINY, router="sigmoid", routed_scale=2.5, group_score="top2", aux_loss="sequence",
                             aux_alpha=1e-4, mtp=1),
}

ARCHS = {                          # flag --arch
    "decoder": "every token sees those before it",
    "prefix": "the first prefix_len tokens see each other both ways, the rest those before them",
    "encoder": "every token sees all",
    "encdec": "an encoder reads the source, a decoder reads itself and the encoder",
}


def layer_plan(cfg, n_layer=0):
    """[Layer] of all blocks, from --layers (repeated over the depth) or --attn."""
    names = []
    for item in (cfg.layers or cfg.attn).split(","):
        name, _, count = item.strip().partition("*")
        if name not in ATTENTION or not re.fullmatch("|[1-9][0-9]{0,5}", count):
            raise UsageError(f"--layers={cfg.layers}: {item!r} is neither a mixer nor mixer*count, as in swa*5,mha; "
                             f"mixers are {list(ATTENTION)}")
        names += [name] * int(count or 1)

    def window(name):
        if name == "swa":
            return cfg.window or max(1, cfg.seq_len // 4)
        return 0 if cfg.layers or ATTENTION[name].recurrent else cfg.window      # --layers says itself which see a window

    plan, experts = [names[i % len(names)] for i in range(n_layer or cfg.n_layer)], moe_layers(cfg)
    return [Layer(i, name, window(name), i in experts) for i, name in enumerate(plan)]


AT_LEAST = {                       # smallest value of a field, and of those that follow it
    1: "vocab_size seq_len n_layer n_embd n_head tile shaw_clip t5_buckets t5_distance norm_groups rope_factor",
    0: "n_kv_head head_dim window d_ff n_enc_layer kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim sparse_stride "
       "sparse_width lrpe_layers n_token_type rope_original attn_softcap logit_softcap clip_qkv attn_scale rope_local_theta start_token "
       "n_dense_layer res_alpha res_beta res_alpha_linear res_beta_linear res_alpha_mlp res_beta_mlp "
       "rope_attn_factor rope_mscale rope_mscale_all embed_grad_shrink embed_dropout resid_dropout attn_dropout mtp mtp_weight "
       "mtp_weight_late mtp_late z_loss label_smoothing",
}
ABOVE_ZERO = "norm_eps init_std rope_theta rope_fraction norm_share logit_scale rope_low rope_high rope_beta_fast rope_beta_slow"
AT_MOST_ONE = "rope_fraction norm_share embed_grad_shrink mtp_late bias_until"
BELOW_ONE = "embed_dropout resid_dropout attn_dropout label_smoothing"


def validate(cfg):
    """Refuse impossible shapes and unknown names before anything is built."""
    def refuse(name, rule):
        raise UsageError(f"--{name}={getattr(cfg, name)} {rule}, for example {getattr(ModelConfig, name)}")

    tables = dict(attn=ATTENTION, norm=NORMS, norm_at=PLACEMENTS, act=ACTIVATIONS, pos=POSITIONS, arch=ARCHS,
                  rope_scaling=ROPE_SCALINGS, rope_layout=ROPE_LAYOUTS, qk_norm=QK_NORMS, feature_map=FEATURE_MAPS, ac=AC) | CHOICES
    for name, table in tables.items():
        if getattr(cfg, name) not in table:
            raise UsageError(f"--{name}={getattr(cfg, name)} is not known; use one of {list(table)}")
    for f in fields(ModelConfig):
        if isinstance(getattr(cfg, f.name), float) and not math.isfinite(getattr(cfg, f.name)):
            refuse(f.name, "is not a finite number")
    for name, low in ((name, low) for low, names in AT_LEAST.items() for name in names.split()):
        if getattr(cfg, name) < low:
            refuse(name, f"must be at least {low}")
    for names, wrong, rule in ((ABOVE_ZERO, lambda x: x <= 0, "must be above 0"), (AT_MOST_ONE, lambda x: x > 1, "is a share, at most 1"),
                               (BELOW_ONE, lambda x: x >= 1, "is a share, below 1")):
        for name in names.split():
            if wrong(getattr(cfg, name)):
                refuse(name, rule)
    if cfg.start_token >= cfg.vocab_size:
        refuse("start_token", f"is no id below --vocab_size={cfg.vocab_size}; use one that is")
    if cfg.rope_low >= cfg.rope_high:
        raise UsageError(f"--rope_low={cfg.rope_low} must be below --rope_high={cfg.rope_high}, for example 1 and 4")
    if cfg.rope_beta_slow >= cfg.rope_beta_fast:
        raise UsageError(f"--rope_beta_slow={cfg.rope_beta_slow} must be below --rope_beta_fast={cfg.rope_beta_fast}, "
                         "for example 1 and 32")
    if cfg.norm_one_plus and cfg.norm != "rms":
        raise UsageError(f"--norm_one_plus is for --norm=rms, not {cfg.norm}; leave it out")
    if cfg.norm == "batch" and cfg.ac != "none":
        raise UsageError(f"--ac={cfg.ac} runs norms twice, and --norm=batch would count each batch twice; use --ac=none")
    if cfg.moe:
        validate_moe(cfg)
    if cfg.mtp and (cfg.arch != "decoder" or cfg.headless or cfg.mtp >= cfg.seq_len):
        raise UsageError(f"--mtp={cfg.mtp} predicts tokens that nobody has read yet, through the head, and further ahead than "
                         "--seq_len it never looks; use --arch=decoder, a head and --mtp=1, or --mtp=0")
    for layer in layer_plan(cfg):
        mixer = ATTENTION[layer.attn]
        if mixer.recurrent and cfg.arch != "decoder":
            raise UsageError(f"--attn={layer.attn} reads from left to right, which --arch={cfg.arch} does not; "
                             "use a softmax variant such as mha")
        if mixer.recurrent and cfg.pos in POSITION_BIAS | {"shaw": None}:
            raise UsageError(f"--pos={cfg.pos} changes softmax scores, and --attn={layer.attn} has none; use --pos=rope or none")
        if cfg.pos == "rope" and (mixer.rotary(cfg) or not mixer.recurrent):     # widths that cannot turn are refused in there
            inverse_frequencies(mixer.rotary(cfg), cfg.rope_theta, cfg.rope_scaling, cfg, cfg.seq_len)
    for both_ways in (False, True) if cfg.pos == "t5" else ():
        t5_bucket(torch.zeros(1), cfg.t5_buckets, cfg.t5_distance, both_ways and cfg.arch in ("encoder", "encdec"))


def refuse_no_experts(cfg):
    """Of typed flags alone: folders may hold a mixture all of whose blocks are dense."""
    if cfg.moe and not moe_layers(cfg):
        raise UsageError(f"--n_dense_layer={cfg.n_dense_layer} with --moe_every={cfg.moe_every} and --dense_layers={cfg.dense_layers} "
                         f"leaves no block of --n_layer={cfg.n_layer} for experts; use --n_dense_layer=0 --moe_every=1, and name fewer "
                         "--dense_layers")


def idle(cfg):
    """{pattern of flags: what they would need} of all flags that have no effect on this model."""
    plan = layer_plan(cfg)
    kinds, dense = {layer.attn for layer in plan}, not all(layer.moe for layer in plan)
    keeping, recurrent = ({kind for kind in kinds if ATTENTION[kind].recurrent == r} for r in (False, True))
    table = (
        ("rope_.*", cfg.pos == "rope" and any(ATTENTION[kind].rotary(cfg) for kind in kinds), "--pos=rope and a mixer that turns"),
        ("rope_factor", cfg.rope_scaling != "none", "--rope_scaling, such as yarn"),
        ("rope_original", cfg.rope_scaling in ("dynamic", "llama3", "yarn"), "--rope_scaling=dynamic, llama3 or yarn"),
        ("rope_(low|high)", cfg.rope_scaling == "llama3", "--rope_scaling=llama3"),
        ("rope_(beta_.*|truncate|attn_factor|mscale.*)", cfg.rope_scaling == "yarn", "--rope_scaling=yarn"),
        ("rope_local_theta", "swa" in kinds, "swa layers"), ("rope_fraction", kinds - {"mla"}, "a mixer other than mla"),
        ("t5_.*", cfg.pos == "t5", "--pos=t5"), ("shaw_.*", cfg.pos == "shaw", "--pos=shaw"),
        ("lrpe_.*", cfg.pos == "lrpe" and keeping - {"mla"} | kinds & {"transnormer"}, "--pos=lrpe and mha or transnormer"),
        ("window", "swa" in kinds or keeping and not cfg.layers, "a softmax mixer, in --layers swa"),
        ("n_kv_head|clip_qkv|scale_by_layer|qk_norm", keeping - {"mla"}, "a softmax mixer other than mla"),
        ("attn_scale|attn_softcap|sinks|attn_gate|attn_dropout", keeping, "a softmax mixer, such as mha"),
        ("(q_lora|kv_lora|qk_nope|qk_rope|v_head).*", "mla" in kinds, "--attn=mla"), ("sparse_.*", kinds & PATTERNS.keys(), "a sparse pattern"),
        ("feature_map", "linear" in kinds, "--attn=linear"), ("tile|res_.*_linear", recurrent, "a linear mixer"),
        ("norm_groups", cfg.norm == "group", "--norm=group"), ("norm_share", cfg.norm == "prms", "--norm=prms"),
        ("start_token|n_enc_layer", cfg.arch == "encdec", "--arch=encdec"), ("mtp_.*", cfg.mtp, "--mtp"),
        ("d_ff", dense or not cfg.d_expert, "a dense block"), ("act", dense or not (cfg.d_expert or cfg.d_ff), "a dense block"),
        ("mlp_bias", dense, "a dense block"), ("top_group|group_score", cfg.moe and cfg.n_group, "--moe and --n_group"),
        ("n_group|top_group|group_score", cfg.moe and cfg.top_group != cfg.n_group, "--top_group below --n_group"),
        ("aux_alpha", cfg.moe and cfg.aux_loss != "none", "--moe and --aux_loss"),
        ("aux_loss", cfg.moe and cfg.aux_alpha, "--moe and --aux_alpha"),
        ("n_device", cfg.moe and (cfg.device_alpha or cfg.comm_alpha), "--moe and --device_alpha or --comm_alpha"),
        ("device_alpha|comm_alpha", cfg.moe and cfg.n_device != 1, "--moe and --n_device above 1"),
        ("norm_gates", cfg.moe and cfg.router != "chosen", "--moe and --router=sigmoid or softmax"),
        ("|".join(MoEConfig.__dataclass_fields__.keys() - {"moe"}), cfg.moe, "--moe"),
    )
    return {pattern: needs for pattern, used, needs in table if not used}


def unused(cfg, names):
    """{flag: what it would need} of those among `names` that have no effect."""
    return {name: needs for pattern, needs in idle(cfg).items() for name in names if re.fullmatch(pattern, name)}


def pinned(cfg):
    """{field: value} of what --seq_len decides by default; weights keep it when they go on with rows of another length."""
    plan = layer_plan(cfg)
    kept = dict(window=max(layer.window for layer in plan))
    if cfg.rope_scaling != "none":
        kept["rope_original"] = cfg.rope_original or cfg.seq_len
    if any(layer.attn in PATTERNS for layer in plan):
        kept["sparse_stride"], kept["sparse_width"] = sparse_sizes(cfg)
    return kept


# ---- Norms (keep the stream at unit size) ----

class LayerNorm(nn.LayerNorm):
    """Centre and scale, with a gain and a shift per channel.                                              [LN eq 3]"""

    def __init__(self, D, cfg):
        super().__init__(D, eps=cfg.norm_eps)

    def forward(self, x_BTD):
        return to_autocast(super().forward(x_BTD))


class SRMSNorm(nn.Module):
    """RMSNorm without a gain.                                                                             [TNL]"""

    def __init__(self, D, cfg):
        super().__init__()
        self.eps = cfg.norm_eps

    def forward(self, x_BTD):
        x32_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        return to_autocast((x32_BTD * torch.rsqrt(x32_BTD.square().mean(-1, keepdim=True) + self.eps)).to(x_BTD.dtype))


class PartialRMSNorm(nn.Module):
    """RMSNorm whose mean is estimated from the first share of the channels.                               [RMS sec 5]"""

    def __init__(self, D, cfg):
        super().__init__()
        self.weight, self.eps, self.width = nn.Parameter(torch.ones(D)), cfg.norm_eps, math.ceil(D * cfg.norm_share)

    def forward(self, x_BTD):
        x32_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        rstd_BT1 = torch.rsqrt(x32_BTD[..., :self.width].square().mean(-1, keepdim=True) + self.eps)
        return to_autocast((x32_BTD * rstd_BT1 * self.weight).to(x_BTD.dtype))


class GroupNorm(nn.GroupNorm):
    """LayerNorm inside groups of a token's channels; one group is LayerNorm, one channel a group leaves nothing. [GN eq 7]"""

    def __init__(self, D, cfg):
        if D % cfg.norm_groups or D == cfg.norm_groups:
            fits = [g for g in range(1, min(65, D)) if D % g == 0]
            raise UsageError(f"--norm_groups={cfg.norm_groups} does not cut the width {D} into equal groups of two or more; "
                             f"use one of {fits}")
        super().__init__(cfg.norm_groups, D, eps=cfg.norm_eps)

    def forward(self, x_BTD):
        return to_autocast(super().forward(x_BTD.flatten(0, -2)).view_as(x_BTD))


class BatchNorm(nn.BatchNorm1d):
    """Mean and variance of a channel over all tokens of the batch (training) or over the past (evaluation)."""

    def __init__(self, D, cfg):
        super().__init__(D, eps=cfg.norm_eps)
        warnings.warn("--norm=batch: in training a token's norm depends on the whole batch, later tokens and padding too, so the "
                      "loss leaks the future and micro-batches are not one batch; for comparison only", stacklevel=2)

    def forward(self, x_BTD):
        return to_autocast(super().forward(x_BTD.flatten(0, -2)).view_as(x_BTD))


NORMS = {                          # flag --norm
    "rms": lambda D, cfg: RMSNorm(D, cfg.norm_eps, cfg.norm_one_plus),
    "layer": LayerNorm,            # centre and scale
    "prms": PartialRMSNorm,        # rms of a part of the channels
    "srms": SRMSNorm,              # no gain
    "group": GroupNorm,            # LayerNorm inside groups of channels
    "batch": BatchNorm,            # over tokens instead of channels; leaks
}


# ---- Activation checkpointing (what is computed again instead of kept?) ----

# Backward needs what forward computed, and of L blocks that is most of the memory. Whatever is cheap to make again from something
# that is kept anyway need not be kept. All of these give the same loss and gradients, to the bit on one device.

AC = {                             # flag --ac: backward computes again
    "none": "nothing",
    "norm": "what the norm before a sublayer and the activation of an MLP gave",
    "selective": "a block without its matrix products and attention",                                              # [Recompute]
    "full": "a whole block from its input: a third more work, one tensor a block is kept",                         # [Sublinear]
}


@contextlib.contextmanager
def forgotten(f, *inputs, when):
    """y = f(*inputs), which is not kept for backward: what would save it inside `with` saves the way to make it again."""
    y = f(*inputs)
    if not (when and torch.is_grad_enabled()):
        yield y
        return
    home, kind, kept, made = y.untyped_storage().data_ptr(), y.device.type, [t.detach() for t in inputs], []
    cast = dict(enabled=torch.is_autocast_enabled(kind), dtype=torch.get_autocast_dtype(kind))

    def pack(t):
        return (t.size(), t.stride(), t.storage_offset()) if t.untyped_storage().data_ptr() == home else t

    def unpack(t):
        if isinstance(t, torch.Tensor):
            return t
        if not made:                                             # once for all that ask; it goes when the last of them is done
            with torch.no_grad(), torch.autocast(kind, **cast):
                made.append(f(*kept))
        return made[0].as_strided(*t)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield y


def keep_products(cfg, ctx, op, *args, **options):
    """Policy of --ac=selective. Attention's scores are not kept, which are wider than what they are made of, nor an op that draws
    its own dropout: left out the second time, it would leave other numbers to those after it."""
    scores = op.name() == "aten::bmm" and args[0].shape[2] < min(args[0].shape[1], args[1].shape[2])
    draws = cfg.attn_dropout and torch.Tag.nondeterministic_seeded in op.tags
    keep = re.search("mm|linear|attention|flash|lightning", op.name()) and not scores and not draws
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_options(cfg):
    """What torch.utils.checkpoint is told of a block, or None where blocks keep what they compute."""
    selective = dict(context_fn=partial(create_selective_checkpoint_contexts, partial(keep_products, cfg)))
    return dict(selective=selective, full={}).get(cfg.ac)


# ---- Activations and MLP (what does a token do alone?) ----

class Swish(nn.Module):
    """x sigmoid(beta x), beta learned for each channel: 1 is SiLU, a large one nears ReLU.                [Swish sec 4]"""

    def __init__(self, d_ff):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(d_ff))

    def forward(self, x_BTF):
        return x_BTF * torch.sigmoid(self.beta.to(x_BTF.dtype) * x_BTF)


ACTIVATIONS = {                    # flag --act: name -> (function, gated)
    "relu": (F.relu, False),
    "relu2": (lambda x: F.relu(x).square(), False),                # [Primer]
    "gelu": (F.gelu, False),                                       # x Phi(x)                                [GELU sec 2]
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), False),     # the approximation GPT-2 was trained with
    "silu": (F.silu, False),
    "swish": (Swish, False),
    "mish": (F.mish, False),                                       # x tanh(softplus(x))                     [Mish]
    "tanh": (torch.tanh, False),
    "sigmoid": (torch.sigmoid, False),
    "glu": (torch.sigmoid, True),                                  # this and all below                      [GLU eq 6]
    "bilinear": (nn.Identity(), True),
    "reglu": (F.relu, True),
    "geglu": (F.gelu, True),
    "geglu_tanh": (partial(F.gelu, approximate="tanh"), True),
    "swiglu": (F.silu, True),
}


def hidden_width(cfg):
    """d_ff, or 4 n_embd; a gated MLP has three matrices, so two thirds of that, rounded up to a multiple of 32."""
    gated = ACTIVATIONS[cfg.act][1]
    return cfg.d_ff or (math.ceil(8 * cfg.n_embd / (3 * 32)) * 32 if gated else 4 * cfg.n_embd)


def activation(cfg, width):
    act = ACTIVATIONS[cfg.act][0]
    return act(width) if act is Swish else act


class MLP(nn.Module):
    """W_down act(W_up x), or gated: W_down (act(W_gate x) * W_up x)."""

    def __init__(self, cfg, d_ff):
        super().__init__()
        self.act, self.gated, self.kind = activation(cfg, d_ff), ACTIVATIONS[cfg.act][1], cfg.act
        if self.gated:
            self.w_gate = nn.Linear(cfg.n_embd, d_ff, bias=cfg.mlp_bias)
        self.w_up = nn.Linear(cfg.n_embd, d_ff, bias=cfg.mlp_bias)
        self.w_down = nn.Linear(d_ff, cfg.n_embd, bias=cfg.mlp_bias)
        self.forgets = cfg.ac == "norm"

    def activated(self, *inner):
        return gated(*inner, self.kind) if self.gated else self.act(*inner)

    def forward(self, x_BTD):
        inner = [w(x_BTD) for w in ((self.w_gate, self.w_up) if self.gated else (self.w_up,))]
        with forgotten(self.activated, *inner, when=self.forgets) as h_BTF:
            return self.w_down(h_BTF)


# ---- Block (read, then think) ----

PLACEMENTS = {                     # flag --norm_at: which of the norms (before f, on its output, after the sum) there are
    "pre": ("pre",),                       # x + f(norm x)                       GPT-2, Llama
    "branch_post": ("post",),              # x + norm f(x)                       OLMo 2
    "sandwich": ("pre", "post"),           # x + norm f(norm x)                  Gemma 2, GLM-4
    "post": ("after",),                    # norm(x + f(x))                      the first Transformer, BERT
    "deepnorm": ("after",),                # norm(alpha x + f(x))                [DeepNet sec 4.1]
    "prenorm_residual": ("pre",),          # norm x + f(norm x)                  MiniMax
}


def deepnorm(cfg, encoder=False):
    """(alpha, gain of the initial weights) for N encoder and M decoder layers.                       [DeepNet fig 2]"""
    N, M = cfg.n_enc_layer or cfg.n_layer, cfg.n_layer
    if cfg.arch != "encdec":
        return (2 * M) ** 0.25, (8 * M) ** -0.25
    if encoder:
        return 0.81 * (N**4 * M) ** 0.0625, 0.87 * (N**4 * M) ** -0.0625
    return (3 * M) ** 0.25, (12 * M) ** -0.25


def residual_factors(cfg, role, encoder=False):
    """(alpha, beta) around a sublayer; role is "", "_linear" or "_mlp"."""
    alpha = getattr(cfg, f"res_alpha{role}") or cfg.res_alpha
    beta = getattr(cfg, f"res_beta{role}") or cfg.res_beta
    usual = deepnorm(cfg, encoder)[0] if cfg.norm_at == "deepnorm" else 1.0
    return alpha or usual, beta or 1.0


class Residual(nn.Module):
    """x -> after(alpha x + beta post(f(pre(x)))), with the norms and factors that --norm_at says."""

    def __init__(self, cfg, factors):
        super().__init__()
        has = PLACEMENTS[cfg.norm_at]
        self.pre, self.post, self.after = (NORMS[cfg.norm](cfg.n_embd, cfg) if place in has else nn.Identity()
                                           for place in ("pre", "post", "after"))
        self.onto_norm = cfg.norm_at == "prenorm_residual"                 # what is added to: pre(x) or x itself
        alpha, beta = factors
        self.sum = torch.add if factors == (1, 1) else lambda x_BTD, y_BTD: alpha * x_BTD + beta * y_BTD
        self.plain = cfg.norm == "rms" and cfg.norm_at == "pre" and factors == (1, 1) and not cfg.resid_dropout    # x + f(norm x)
        self.dropout, self.forgets = nn.Dropout(cfg.resid_dropout), cfg.ac == "norm" and "pre" in has

    def forward(self, x_BTD, f, *args):
        with forgotten(self.pre, x_BTD, when=self.forgets) as h_BTD:
            y_BTD = self.dropout(self.post(f(h_BTD, *args)))
        return self.after(self.sum(h_BTD if self.onto_norm else x_BTD, y_BTD))


class Block(nn.Module):
    """A mixer, in decoders that have an encoder cross-attention, and an MLP or experts, each in a Residual."""

    def __init__(self, cfg, layer, encoder=False):
        super().__init__()
        factors = partial(residual_factors, cfg, encoder=encoder)
        self.attn = ATTENTION[layer.attn](cfg, layer)
        self.res1 = Residual(cfg, factors("_linear" if self.attn.recurrent else ""))
        self.cross = self.res_cross = None
        if cfg.arch == "encdec" and not encoder:
            plain = replace(cfg, pos="none", sinks=False, attn_softcap=0.0)
            self.cross, self.res_cross = Cross(plain, replace(layer, window=0)), Residual(cfg, factors(""))
        self.mlp = (MoE if layer.moe else MLP)(cfg, hidden_width(cfg))
        self.res2, self.again = Residual(cfg, factors("_mlp")), checkpoint_options(cfg)
        # a sum and the norm after it in one pass
        self.fused = self.res1.plain and self.res2.plain and self.cross is None and cfg.ac != "norm"

    def forward(self, x_BTD, at, cache=None, *more):
        if self.again is not None and torch.is_grad_enabled() and cache is None:
            return checkpoint(self.run, x_BTD, at, cache, *more, use_reentrant=False, **self.again)
        return self.run(x_BTD, at, cache, *more)

    def run(self, x_BTD, at, cache=None, memory_BSD=None, at_memory=None, cross_cache=None):
        def shared(f):                           # ranks of tp hold a part of f each; the stream may be cut along the row
            return lambda h_BTD, *args: leave(f(enter(h_BTD, at.world, at.positions_BT.shape[1]), *args), at.world)

        attn, mlp = shared(self.attn), shared(self.mlp)
        if self.fused:
            x_BTD, h_BTD = self.res2.pre.after_adding(x_BTD, attn(self.res1.pre(x_BTD), at, cache))
            return x_BTD + mlp(h_BTD)
        x_BTD = self.res1(x_BTD, attn, at, cache)
        if self.cross is not None:
            x_BTD = self.res_cross(x_BTD, shared(self.cross), memory_BSD, at_memory, cross_cache)
        return self.res2(x_BTD, mlp)


# ---- Multi-token prediction (what comes after the next token?) ----
#
# The state h_i of place i predicts token i + 1. Module k = 1..D joins what is known at depth k - 1 with the token that came true
# meanwhile, i + k, and predicts token i + k + 1. A row of T tokens has T - k such slots. All share embedding and head.
# In training this asks states to plan ahead; in generation the modules draft tokens, and the model checks them all in one call.

class MTP(nn.Module):
    """h^k_i = Block(proj [norm_embed Emb(t_{i+k}) ; norm_hidden h^{k-1}_i]); the head reads norm(h^k).         [DSV3 eq 21-23]

    As in transformers and the released weights, not in the paper: the embedding's half comes first, a norm stands before the head,
    and h^0 and what a module passes on are states after the norm that ends them (--mtp_normed)."""

    def __init__(self, cfg, layer, end_norm):
        super().__init__()
        self.norm_embed, self.norm_hidden = (NORMS[cfg.norm](cfg.n_embd, cfg) for _ in range(2))
        self.proj = nn.Linear(2 * cfg.n_embd, cfg.n_embd, bias=False)
        self.block, self.norm, self.normed = Block(cfg, layer), end_norm, cfg.mtp_normed

    def forward(self, state_BTD, embed_BTD, at, cache=None):
        """(what the next module starts from, what the head reads)"""
        x_BTD = self.proj(torch.cat([self.norm_embed(embed_BTD), self.norm_hidden(state_BTD)], -1))              # [DSV3 eq 21]
        x_BTD = self.block(x_BTD, at, cache)                                                                     # [DSV3 eq 22]
        read_BTD = self.norm(x_BTD)
        return read_BTD if self.normed else x_BTD, read_BTD


class Drafter:
    """What the modules remember while a row grows: a cache each, whose slot i of module k has read token i + k."""

    def __init__(self, model, doc_BS, length):
        if not model.mtp:
            raise UsageError("draft=True needs modules that draft; train a model with --mtp=1, or leave it out")
        if model.cfg.moe and model.cfg.capacity:
            raise UsageError("draft=True: with --capacity what is dropped depends on the tokens of a call, and drafts are among them; "
                             "leave draft out")
        if any(block.attn.recurrent for block in model.blocks):
            raise UsageError("draft=True takes rejected tokens back, which the state of a linear mixer cannot; use a model with "
                             "softmax mixers alone, or leave it out")
        if model.cfg.rope_scaling == "dynamic":
            raise UsageError("draft=True: --rope_scaling=dynamic turns by the length read so far, and drafts are read, too; "
                             "leave draft out")
        self.model, self.doc_BS = model, doc_BS
        self.place_BS = places_in_documents(doc_BS, length, model.embed.weight.device)
        self.caches = [Cache([layer], spare=len(model.mtp)) for layer in model.mtp_plan]
        self.state_BSD = self.next_BS = None                     # of slots that wait, and the tokens after them
        self.counts = dict(calls=0, drafted=0, accepted=0)       # calls of the main model; drafts of a row, and those kept

    def __call__(self, cache, read_BT, new_B1, rejected, n):
        """After the main model has read tokens, `rejected` of them in vain, and picked a new one: the next n ids [B, n]."""
        kept = read_BT.shape[1] - rejected
        cache.crop(cache.length - rejected)
        state_BSD, next_BS, end = cache.state_BTD[:, :kept], torch.cat([read_BT[:, 1:kept], new_B1], 1), cache.length
        if self.state_BSD is not None:
            state_BSD, next_BS = torch.cat([self.state_BSD, state_BSD], 1), torch.cat([self.next_BS, next_BS], 1)
        # Slots that will have read drafts, up to D - 1, are read again when their tokens are known, so they wait here
        begin = end - state_BSD.shape[1]
        wait = max(begin, end - len(self.caches) + 1)
        self.state_BSD, self.next_BS = state_BSD[:, wait - begin:], next_BS[:, wait - begin:]
        docs, guess = None if self.doc_BS is None else self.doc_BS[:, begin:end], []
        for k, own in enumerate(self.caches[:n], 1):
            state_BSD, head_BSD = self.model.ahead(k, state_BSD, next_BS, self.place_BS[:, begin + k:end + k], docs, own)
            own.crop(wait)
            guess.append(self.model.logits(head_BSD[:, -1:]).argmax(-1))
            next_BS = torch.cat([next_BS[:, 1:], guess[-1]], 1)
        return torch.cat([new_B1[:, :0], *guess], 1)


# ---- Initial weights (a function of seed and name) ----

@contextlib.contextmanager
def undrawn():
    """Layers made in here get no weights of torch's drawing: init_parameters draws them all."""
    drawn = {layer: layer.reset_parameters for layer in (nn.Linear, nn.Embedding)}
    for layer in drawn:
        layer.reset_parameters = lambda self: None
    try:
        yield
    finally:
        for layer, reset in drawn.items():
            layer.reset_parameters = reset


@torch.no_grad()
def init_parameters(model, cfg):
    """Normal weights, smaller where a block writes to the stream (2L such writes add up); gains are one, biases zero, and what
    is given stays. Each tensor is drawn from (seed, its name), so it does not depend on what else is in the model or where it
    lives. With --norm_at=deepnorm Xavier's spread, times a gain where values pass.                      [DeepNet fig 2]"""
    for name, p in model.named_parameters():
        if p.is_meta or getattr(p, "given", False):
            continue
        if p.ndim == 1 or ".b_" in name:                         # experts stack their biases
            p.fill_(0.0 if name.endswith("bias") or ".b_" in name else 1.0)
        else:
            writes = "w_o." in name or "w_down" in name
            std = cfg.init_std / (2 * cfg.n_layer) ** 0.5 if writes else cfg.init_std                  # [GPT2 sec 2.3]
            if cfg.norm_at == "deepnorm" and "block" in name:
                passes = writes or "w_v." in name or ".mlp." in name
                gain = deepnorm(cfg, encoder=name.startswith("enc_"))[1] if passes else 1.0
                std = gain * (2 / sum(p.shape[-2:])) ** 0.5
            number = int.from_bytes(hashlib.sha256(f"{cfg.seed}/{name}".encode()).digest()[:8], "little") >> 1
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * std)


# ---- Generation (which id comes next?) ----

@contextlib.contextmanager
def evaluating(modules):
    """All of these in evaluation; afterwards each is as it was."""
    in_training = [module for module in modules if module.training]
    for module in in_training:
        module.training = False
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def left_padded(prompts, vocab_size, device):
    """(tokens [B, T], which of them are real) of a tensor [B, T], or of a list of unequal rows of ids."""
    rows = [torch.as_tensor(row) for row in prompts]
    if not rows or any(row.ndim != 1 or not len(row) or row.is_floating_point() for row in rows):
        raise UsageError("prompts are rows of at least one id each, for example [[5, 3], [7]] or a tensor [B, T]; begin an empty one "
                         "with the end-of-text id")
    if any(int(row.min()) < 0 or int(row.max()) >= vocab_size for row in rows):
        raise UsageError(f"a prompt holds an id that is not among the {vocab_size} of the model; use its own tokenizer")
    T = max(len(row) for row in rows)
    tokens_BT = torch.stack([F.pad(row.long().to(device), (T - len(row), 0)) for row in rows])
    real_BT = torch.stack([torch.arange(T, device=device) >= T - len(row) for row in rows])
    return tokens_BT, real_BT


def penalised(logits_BV, penalty):
    """Less likely by `penalty`, whatever the logit's sign ([CTRL sec 4.1] divides; negative ones are multiplied by now)."""
    return torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)


def pick(logits_BV, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """One id for each row of logits."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    if top_k:
        least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    prob_BV = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = prob_BV.sort(-1, descending=True)
        sorted_BV[sorted_BV.cumsum(-1) - sorted_BV >= top_p] = 0          # what comes before already reaches top_p
        prob_BV = torch.zeros_like(prob_BV).scatter(1, order_BV, sorted_BV)
    return torch.multinomial(prob_BV, 1, generator=generator).squeeze(1)


# ---- Sharing (which part of the weights does a rank hold?) ----

# Of a product's weights a rank of tp holds the rows of some outputs or, of what follows, the columns of the same inputs, so that nothing
# crosses the network between the two [Megatron sec 3]. What no pattern names is whole on every rank. A name matches the first.

CUTS = (                           # (pattern of a parameter's name, the dimension that tp cuts, in how many parts that dimension comes)
    (r"^(embed|head)\.weight|^head_bias", 0, 1),
    (r"^(enc_)?rel_bias\.weight", 1, 1),
    (r"\.(attn|cross)\.(w_q|w_k|w_v|w_ukv|w_beta|(w_gate|w_decay)(\.1)?)\.(weight|bias)$", 0, 1),
    (r"\.(attn|cross)\.(sinks|dt_bias|a_log|lrpe|norm\.weight|[qk]_norm\.weight)$", 0, 1),
    (r"\.attn\.conv$", 0, 3),      # channels of q, of k, of v
    (r"\.(w_o|w_down)\.weight$", 1, 1),
    (r"\.(w_o\.bias|w_down\.bias|b_down)$", None, 1),                      # added once: by the first rank
    (r"\.mlp\.((w_gate|w_up)\.(weight|bias)|act\.\w+)$", 0, 1),
    (r"\.(experts|shared)\.(w_gate|w_up|b_gate|b_up)$", 1, 1),
    (r"\.(experts|shared)\.w_down$", 2, 1),
)
INSIDE = r"\.(attn|cross|mlp)\.|^mlm_"     # read by what tp shares: a rank's gradient is a part of it


def read_whole(root, mixer):
    """Names of what CUTS would cut, but what this mixer reads whole: norms of single heads, projections of too few key heads."""
    names = [f"{name}.weight" for name in ("norm", "q_norm", "k_norm")
             if getattr(getattr(mixer, name, None), "weight", None) is not None and len(getattr(mixer, name).weight) == mixer.head_dim]
    if getattr(mixer, "picked", slice(None)) != slice(None):
        names += ["w_k.weight", "w_k.bias", "w_v.weight", "w_v.bias", "k_norm.weight", "lrpe"]
    return {f"{root}.{name}" for name in names}


def spread(model, world, cp_mode):
    """Leave this rank its part of the weights. Returns {name: (shape of the whole, [Cut], is a gradient here a part of it?)}."""
    tp, table, whole = world.tp, {}, set()
    model.world, model.cp_mode = world, cp_mode if world.cp.size > 1 else ""
    in_order = cp_mode == "ulysses" or model.cfg.arch != "decoder" or any(ATTENTION[layer.attn].recurrent for layer in model.plan)
    model.zigzag = bool(model.cp_mode) and not in_order
    for root, module in model.named_modules():
        if isinstance(module, MoE):
            module.tp, module.cp, module.experts.ep = tp, world.cp, world.ep
        if tp.size > 1 and hasattr(module, "share"):
            module.share(tp)
            whole |= read_whole(root, module)
    for name, p in list(model.named_parameters()):
        cuts = [Cut(0, world.ep)] if world.ep.size > 1 and ".mlp.experts." in name else []
        if tp.size > 1 and name not in whole:
            for pattern, dim, parts in [row for row in CUTS if re.search(row[0], name)][:1]:
                heads = dim is not None and re.search(r"\.(attn|cross)\.|rel_bias", name) and p.shape[dim] // parts % model.cfg.n_head == 0
                cuts.append(Cut(dim, tp, parts, model.cfg.n_head if heads else 0))
        shared = any(cut.group is tp for cut in cuts)
        table[name] = tuple(p.shape), cuts, tp.size > 1 and not shared and (world.sp or bool(re.search(INSIDE, name)))
        if cuts:
            home, _, leaf = name.rpartition(".")
            local = dist.cut(p.detach(), cuts)
            setattr(model.get_submodule(home), leaf, None if local is None else nn.Parameter(local))
    return table


def part_of(model, low, high, first, last):
    """A stage of a pipeline: blocks low ... high - 1 under their names, with the embedding and the head if it has them. What several stages
    have, each has for itself: tied embeddings, those that MTP reads, tables of relative positions."""
    part = copy.copy(model)
    part._modules, part._parameters = dict(model._modules), dict(model._parameters)
    part.blocks, part.last = nn.ModuleDict({str(i): model.blocks[i] for i in range(low, high)}), last
    reads = first or last and bool(model.mtp)
    for name in ("embed", "pos_embed", "type_embed", "embed_norm"):
        if not reads and not (name == "embed" and last and model.cfg.tie_embeddings):
            setattr(part, name, None)
        elif not first:
            setattr(part, name, copy.deepcopy(getattr(model, name)))
    if last and model.cfg.tie_embeddings:
        part.head = part.embed
    if not first and part.rel_bias is not None:
        part.rel_bias = copy.deepcopy(model.rel_bias)
    if not last:
        part.norm = part.head = part.head_bias = part.mlm_dense = part.mlm_act = part.mlm_norm = None
        part.mtp = nn.ModuleList()
    return part


# ---- Model (decoder, encoder, or both) ----

def places_of(cfg, plan, this):
    """{kind of layer: its Places}, made once for all layers of a kind."""
    return {kind: Places(cfg, layer, this) for kind, layer in {layer.kind: layer for layer in plan}.items()}



class Model(nn.Module):
    """m(tokens [B, T]) -> logits [B, T, V]; an encoder-decoder: m(source [B, S], decoder tokens [B, T]) -> [B, T, V];
    m.loss(batch) -> (loss_sum, weight_sum, metrics); m.generate(tokens, n)."""
    world, cp_mode, zigzag = World(), "", False              # ranks that share this model, and how they share rows: see spread
    last = True                                              # has it the head? A pipeline stage may not
    spread, part = spread, part_of

    def __init__(self, cfg):
        super().__init__()
        validate(cfg)
        self.cfg, self.plan, self.mtp_weight = cfg, layer_plan(cfg), cfg.mtp_weight          # which train.py lowers late in a run
        both, D = cfg.arch == "encdec", cfg.n_embd
        ends_in_norm = "after" not in PLACEMENTS[cfg.norm_at]
        norm = lambda wanted=True: NORMS[cfg.norm](D, cfg) if wanted else nn.Identity()
        with undrawn():
            self.embed = nn.Embedding(cfg.vocab_size, D)
            self.pos_embed = nn.Embedding(cfg.seq_len, D) if cfg.pos == "learned" else None
            self.type_embed = nn.Embedding(cfg.n_token_type, D) if cfg.n_token_type else None
            self.embed_norm, self.dropout = norm(cfg.embed_norm), nn.Dropout(cfg.embed_dropout)
            self.enc_plan = layer_plan(replace(cfg, moe=False), cfg.n_enc_layer) if both else []
            self.enc_rel_bias = nn.Embedding(cfg.t5_buckets, cfg.n_head) if both and cfg.pos == "t5" else None
            self.enc_blocks = nn.ModuleList(Block(cfg, layer, encoder=True) for layer in self.enc_plan)
            self.enc_norm = norm(both and ends_in_norm)
            self.rel_bias = nn.Embedding(cfg.t5_buckets, cfg.n_head) if cfg.pos == "t5" else None
            self.blocks = nn.ModuleList(Block(cfg, layer) for layer in self.plan)
            self.norm = norm(ends_in_norm)
            self.mtp_plan = [replace(self.plan[-1], index=cfg.n_layer + k, moe=cfg.moe) for k in range(cfg.mtp)]
            self.mtp = nn.ModuleList(MTP(cfg, layer, norm(ends_in_norm)) for layer in self.mtp_plan)
            self.mlm_dense = self.mlm_act = self.mlm_norm = None
            if cfg.mlm_head:
                self.mlm_dense, self.mlm_act, self.mlm_norm = nn.Linear(D, D), activation(cfg, D), norm()
            self.pooler = nn.Linear(D, D) if cfg.pooler else None
            self.head = None if cfg.headless else self.embed if cfg.tie_embeddings else nn.Linear(D, cfg.vocab_size, bias=False)
            self.head_bias = nn.Parameter(torch.zeros(cfg.vocab_size)) if cfg.head_bias else None
        init_parameters(self, cfg)

    def own(self, t_BT):
        """Of whole rows, the places that this rank holds where cp shares them."""
        if t_BT is None or not self.cp_mode:
            return t_BT
        return t_BT[:, row_places(t_BT.shape[1], self.world.cp, self.zigzag).to(t_BT.device)]

    def looked_up(self, tokens_BT):
        """Rows of the embedding, as the stream holds them; ranks of tp have a part of the ids each.          [Megatron sec 3]"""
        if self.world.tp.size == 1:
            return self.embed(tokens_BT)
        low, high = bounds(self.cfg.vocab_size, self.world.tp)
        here_BT = (tokens_BT >= low) & (tokens_BT < high)
        return leave(self.embed(torch.where(here_BT, tokens_BT - low, 0)) * here_BT[..., None], self.world)

    def embedded(self, tokens_BT, positions, types=None, embeds=None, image=None):
        """The stream before the first block. embeds [B, T, D] stand in for the embedding where image [B, T] is above 0."""
        cfg, part = self.cfg, lambda t: None if t is None else of_stream(self.own(t), self.world)
        x_BTD, positions, types, embeds, image = self.looked_up(self.own(tokens_BT)), *map(part, (positions, types, embeds, image))
        if cfg.embed_grad_shrink != 1:                           # the same value, a smaller gradient       [GLM130B sec 3]
            x_BTD = cfg.embed_grad_shrink * x_BTD + (1 - cfg.embed_grad_shrink) * x_BTD.detach()
        if cfg.embed_scale:
            x_BTD = x_BTD * torch.tensor(cfg.n_embd**0.5, dtype=x_BTD.dtype, device=x_BTD.device)
        if embeds is not None:
            x_BTD = torch.where((image > 0)[..., None], embeds.to(x_BTD.dtype), x_BTD)
        if cfg.pos == "learned":
            x_BTD = x_BTD + self.pos_embed(positions)
        elif cfg.pos == "sinusoidal":
            x_BTD = x_BTD + sinusoid(positions, cfg.n_embd).to(x_BTD.dtype)
        if self.type_embed is not None:
            x_BTD = x_BTD + (self.type_embed.weight[0] if types is None else self.type_embed(types))
        return self.dropout(self.embed_norm(x_BTD))

    def refuse_beyond(self, length):
        if self.cfg.pos == "learned" and length > self.cfg.seq_len:
            raise UsageError(f"{length} tokens, but learned positions end at --seq_len={self.cfg.seq_len}; give fewer tokens")

    def locate(self, tokens_BT, positions, doc_ids, cache, prefix_len, image):
        """The Pass of these tokens, which the cache is told of and places after its own."""
        past, (B, T), device = cache.length if cache else 0, tokens_BT.shape, tokens_BT.device
        self.refuse_beyond(past + T)
        if prefix_len is not None and (self.cfg.arch != "prefix" or past):
            raise UsageError("prefix_len needs a model with --arch=prefix, and the whole prefix in the first call")
        if image is not None and any(ATTENTION[layer.attn].recurrent for layer in self.plan):
            raise UsageError("an image sees itself both ways, which linear mixers cannot; use a model with softmax mixers alone")
        if cache:
            doc_ids, image = cache.rows(B, T, doc_ids, image)
            cache.length = past + T
        if positions is None:                                    # they begin anew with every document
            positions = places_in_documents(doc_ids, past + T, device)[:, past:]
        return Pass(positions, past, doc_ids, self.cfg.arch != "encoder", prefix_len, image, self.rel_bias, self.compute_dtype,
                    self.world, self.cp_mode, self.zigzag)

    @property
    def compute_dtype(self):
        """Of queries and keys: autocast's, else the weights'."""
        weight = next(self.parameters())
        on = torch.is_autocast_enabled(weight.device.type)
        return torch.get_autocast_dtype(weight.device.type) if on else weight.dtype

    def encode(self, source_BS, doc_ids=None):
        """The encoder's output [B, S, D]."""
        self.refuse_beyond(source_BS.shape[1])
        positions = places_in_documents(doc_ids, source_BS.shape[1], source_BS.device)
        this = Pass(positions, doc_BS=doc_ids, causal=False, rel_bias=self.enc_rel_bias, dtype=self.compute_dtype, world=self.world)
        x_BSD = self.embedded(source_BS, positions)
        places = places_of(self.cfg, self.enc_plan, this)
        for block, layer in zip(self.enc_blocks, self.enc_plan):
            x_BSD = block(x_BSD, places[layer.kind])
        return enter(self.dropout(self.enc_norm(x_BSD)), self.world, source_BS.shape[1])

    def hidden(self, tokens, dec=None, **where):
        """The normalised residual stream [B, T, D] that the head reads; arguments as in before_norm."""
        return self.norm(self.before_norm(tokens, dec, **where))

    def before_norm(self, tokens, dec=None, *, positions=None, doc_ids=None, cache=None, prefix_len=None, enc_doc_ids=None,
                    types=None, embeds=None, image=None, stream=None):
        """The residual stream [B, T, D] after the last block. tokens [B, T]; of an encoder-decoder the source [B, S],
        and dec [B, T]. By keyword, where there is more to say:
            doc_ids [B, T]      documents of a row do not see each other, -1 is padding; enc_doc_ids [B, S] those of a source
            positions [B, T]    where they are not those in the document
            cache               new_cache(): it holds the tokens before these, and is extended by them
            prefix_len [B]      --arch=prefix: so many tokens see each other both ways
            types [B, T]        BERT's segments
            image [B, T]        tokens with the same number above 0 are one image, which sees itself both ways     (Gemma 3)
            embeds [B, T, D]    stand in for the embeddings of images
            stream [B, T, D]    what the pipeline stage before this one gave; tokens are not read then"""
        memory = at_memory = None
        if (self.cfg.arch == "encdec") != (dec is not None):
            raise UsageError(f"--arch={self.cfg.arch} reads " + ("two texts: m(source, decoder_tokens)" if dec is None else
                                                                  "one text: m(tokens), all else by keyword"))
        if embeds is not None and image is None:
            raise UsageError("embeds stand where image is above 0: give image [B, T], too")
        if dec is not None:
            memory, enc_doc_ids = cache.memory if cache and cache.memory else (self.encode(tokens, enc_doc_ids), enc_doc_ids)
            tokens = dec
        this = self.locate(tokens, positions, doc_ids, cache, prefix_len, image)
        if dec is not None:
            at_memory = places_of_memory(this, enc_doc_ids)
        if cache and dec is not None:
            cache.memory = memory, enc_doc_ids
        x_BTD = self.embedded(tokens, this.positions_BT, types, embeds, image) if stream is None else stream
        places = places_of(self.cfg, self.plan, this)
        for name, block in self.blocks.named_children():
            i = int(name)
            own, cross = (cache.layers[i], cache.cross[i]) if cache else (None, None)
            x_BTD = block(x_BTD, places[self.plan[i].kind], own, memory, at_memory, cross)
        if cache and self.mtp:
            cache.state_BTD = self.norm(x_BTD) if self.cfg.mtp_normed else x_BTD
        return x_BTD

    def before_head(self, x_BTD):
        """What the head multiplies: MLM's own layer, T5's scale."""
        if self.mlm_dense is not None:
            x_BTD = self.mlm_norm(self.mlm_act(self.mlm_dense(x_BTD)))
        return x_BTD if self.cfg.logit_scale == 1 else x_BTD * self.cfg.logit_scale

    def logits(self, x_BTD):
        assert self.world.tp.size == 1, "ranks of tp know the logits of some ids each; loss() brings them together"
        logits_BTV = F.linear(self.before_head(x_BTD), self.head.weight, self.head_bias)
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(logits_BTV / cap) if cap else logits_BTV

    def forward(self, tokens, dec=None, **where):
        """Logits [B, T, V] (of a headless model hidden states [B, T, D]); arguments as in before_norm."""
        x_BTD = self.hidden(tokens, dec, **where)
        return x_BTD if self.head is None else self.logits(x_BTD)

    def pooled(self, x_BTD):
        """BERT's summary [B, D] of hidden states, from the first token."""
        return torch.tanh(self.pooler(x_BTD[:, 0]))

    def ahead(self, k, state_BTD, tokens_BT, positions, doc_ids, cache=None):
        """Module k on slots with these states, which read tokens k places ahead of them (positions: theirs)."""
        this = self.locate(tokens_BT, positions, doc_ids, cache, None, None)
        places = Places(self.cfg, self.mtp_plan[k - 1], this)
        return self.mtp[k - 1](state_BTD, self.embedded(tokens_BT, positions), places, cache and cache.layers[0])

    def mtp_states(self, state_BTD, tokens_BS, positions=None, doc_ids=None):
        """What the head reads at every depth k, [B, S, D]; the last k slots of a row have nothing ahead to read and mean nothing. A slot
        belongs to its state's document: one that has read a token of the next document is seen only by slots that have, too."""
        S, out = tokens_BS.shape[1], []
        if S <= len(self.mtp):
            raise UsageError(f"{S} tokens, and --mtp={len(self.mtp)} reads as many ahead; give rows of {len(self.mtp) + 1} or "
                             "more")
        positions = places_in_documents(doc_ids, S, tokens_BS.device) if positions is None else positions
        for k in range(1, len(self.mtp) + 1):
            ahead = lambda t: torch.cat([t[:, k:], t[:, -1:].expand(-1, k)], 1)
            state_BTD, read_BTD = self.ahead(k, state_BTD, ahead(tokens_BS), ahead(positions), doc_ids)
            out.append(read_BTD)
        return out

    def mtp_logits(self, tokens, **where):
        """[logits [B, T - k, V] for depth k = 1..D]: slot i has read tokens up to i + k and predicts the one after. By keyword
        positions and doc_ids, as in before_norm."""
        x_BTD = self.before_norm(tokens, **where)
        state_BTD = self.norm(x_BTD) if self.cfg.mtp_normed else x_BTD
        return [self.logits(read[:, :-k]) for k, read in enumerate(self.mtp_states(state_BTD, tokens, **where), 1)]

    def nll_sum(self, x_BTD, targets_BT, weights_BT):
        """Of the states that the head reads: sum of weights * loss, which in training has the z-loss and smoothed targets, and
        the sum of weights * nll."""
        cfg, tp, weights_M = self.cfg, self.world.tp, weights_BT.flatten()
        extra = dict(z_alpha=cfg.z_loss, smoothing=cfg.label_smoothing) if self.training else {}
        read_MD = self.before_head(enter(x_BTD, self.world, targets_BT.shape[1])).flatten(0, 1)
        given = read_MD, self.head.weight, targets_BT.flatten(), weights_M, self.head_bias, cfg.logit_softcap
        if tp.size == 1:
            loss_sum, nll_M = linear_cross_entropy(*given, return_nll=True, **extra)
        else:
            loss_sum, nll_M = vocab_parallel_cross_entropy(*given, **extra, n_vocab=cfg.vocab_size, tp=tp)
        return loss_sum, (nll_M * weights_M).sum()

    @property
    def metric_names(self):
        """What the metrics of `loss` have in training."""
        extra = self.mtp_plan or self.cfg.z_loss or self.cfg.label_smoothing
        return ["nll"] * bool(extra) + [f"mtp{k}_nll" for k in range(1, len(self.mtp_plan) + 1)]

    def loss(self, batch):
        """(sum of weights * nll, sum of weights, metrics): sums, so that micro-batches and ranks add up to one batch. In training
        the first holds self.mtp_weight times the mean of the MTP modules' sums, too, over the same sum of weights   [DSV3 eq 24, 25],
        and z-loss and smoothing; metrics then has [sum, weight] of the nll of the model and of each module, whose targets are its own.
        Where cp shares rows, batch has whole ones, and the sums are of the places that this rank holds."""
        return self.stage(batch)

    def stage(self, batch, stream=None, aux=0.0):
        """The part of `loss` that a pipeline stage does, from the stream that came from the one before and the auxiliary losses so far:
        the same for the next stage or, of the last, the loss."""
        texts = [batch[key] for key in (("enc_tokens", "tokens") if self.cfg.arch == "encdec" else ("tokens",))]
        where = {key: batch[key] for key in ("positions", "doc_ids", "prefix_len", "enc_doc_ids", "types") if key in batch}
        x_BTD, metrics = self.before_norm(*texts, **where, stream=stream), {}
        if not self.last:
            return x_BTD.float(), aux + aux_sum(self, batch["weights"].sum(1)) + 0 * x_BTD.sum().view(1)
        read_BTD, targets, weights, docs = self.norm(x_BTD), self.own(batch["targets"]), self.own(batch["weights"]), batch.get("doc_ids")
        loss_sum, nll_sum = self.nll_sum(read_BTD, targets, weights)
        if self.training and (self.mtp or self.cfg.z_loss or self.cfg.label_smoothing):
            metrics["nll"] = torch.stack([nll_sum, weights.sum()])
        if self.mtp and self.training:
            states = self.mtp_states(read_BTD if self.cfg.mtp_normed else x_BTD, batch["tokens"], batch.get("positions"), docs)
            for k, state in enumerate(states, 1):
                same = 1 if docs is None else docs[:, k:] == docs[:, :-k]          # no target in another document
                ahead, weight = F.pad(batch["targets"][:, k:], (0, k)), self.own(F.pad(batch["weights"][:, k:] * same, (0, k)))
                mtp_sum, nll_sum = self.nll_sum(state, self.own(ahead), weight)
                metrics[f"mtp{k}_nll"] = torch.stack([nll_sum, weight.sum()])
                loss_sum = loss_sum + self.mtp_weight / self.cfg.mtp * mtp_sum
        extra = aux_sum(self, batch["weights"].sum(1)) + (aux if stream is None else aux.sum())
        return (loss_sum + extra if self.training else loss_sum), weights.sum(), metrics

    def new_cache(self, spare=0):
        """spare: so many tokens, at least, can be taken back with crop, through windows too."""
        return Cache(self.plan, spare)

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, generator=None, repetition_penalty=1.0,
               stop=(), draft=False):
        """Yield the next ids [B] of each row, one call of the model a step, until there are max_new_tokens of them or every
        row has met an id of `stop` (a row that has goes on repeating it). Arguments as in generate.

        draft: the MTP modules guess the next D ids, and one call of the model reads them all. Each id is then picked from the
        model's own logits as ever, until one is not what was guessed in some row; so the ids are those of draft=False, drawn
        ones too (where logits of one token or several, which round differently, do not nearly tie).       [Spec sec 2.3]"""
        if self.cfg.arch == "encoder" or self.head is None:
            raise UsageError("an encoder or a model without a head does not generate; use --arch=decoder, prefix or encdec")
        for name, value, good in (("temperature", temperature, temperature >= 0), ("top_k", top_k, top_k >= 0),
                                  ("top_p", top_p, 0 < top_p <= 1), ("repetition_penalty", repetition_penalty, repetition_penalty > 0)):
            if not (good and math.isfinite(value)):
                raise UsageError(f"{name}={value} cannot be sampled with; use temperature 0 or more, top_k 0 or more, top_p above 0 "
                                 "up to 1, repetition_penalty above 0, for example 0.8, 50, 0.95, 1")
        device = self.embed.weight.device
        tokens_BT, real_BT = left_padded(prompts, self.cfg.vocab_size, device)
        new, source, where, B = tokens_BT, (), {}, len(tokens_BT)
        seen_BV = torch.zeros(B, self.cfg.vocab_size, dtype=torch.bool, device=device)
        if not real_BT.all():                                    # padding is a document of its own, which nobody reads
            where["doc_ids"] = real_BT.long() - 1
        if self.cfg.arch == "encdec":
            source, where = (tokens_BT,), {"enc_doc_ids": ids for ids in where.values()}
            new = tokens_BT.new_full((B, 1), self.cfg.start_token)
        else:
            seen_BV.scatter_(1, tokens_BT.where(real_BT, tokens_BT[:, -1:]), True)
        if self.cfg.arch == "prefix":
            where["prefix_len"] = tokens_BT.new_full((B,), tokens_BT.shape[1])
        stop_ids = torch.tensor([int(token) for token in stop], device=device)
        done_B = torch.zeros(B, dtype=torch.bool, device=device)
        drafter, guess, left = None, tokens_BT[:, :0], max_new_tokens          # guess [B, n]
        if draft:
            docs = F.pad(where["doc_ids"], (0, left)) if where else None         # new tokens go on with document 0
            drafter = Drafter(self, docs, tokens_BT.shape[1] + left)
            self.drafted = drafter.counts
        cache, modules = self.new_cache(spare=len(self.mtp) if draft else 0), list(self.modules())
        while left > 0:
            read, n_guess = torch.cat([new, guess], 1), guess.shape[1]
            with evaluating(modules):
                logits_BCV = self(*source, read, cache=cache, **where)[:, -1 - n_guess:].float()
            if draft:
                drafter.counts["calls"] += 1
                drafter.counts["drafted"] += n_guess
            for i in range(n_guess + 1):
                logits_BV = logits_BCV[:, i]
                if repetition_penalty != 1:
                    seen_BV.scatter_(1, new[:, -1:], True)
                    logits_BV = logits_BV.where(~seen_BV, penalised(logits_BV, repetition_penalty))
                new_B = pick(logits_BV, temperature, top_k, top_p, generator).where(~done_B, new[:, -1])
                done_B = done_B | torch.isin(new_B, stop_ids)
                agreed = i < n_guess and bool((done_B | (guess[:, i] == new_B)).all())         # the row that agrees least decides
                if agreed:
                    drafter.counts["accepted"] += 1
                yield new_B
                if len(stop_ids) and done_B.all():
                    return
                new, where, left = new_B[:, None], {}, left - 1                          # the cache knows the documents
                if not agreed:
                    break
            if draft:
                with evaluating(modules):
                    guess = drafter(cache, read, new, n_guess - i, max(0, min(len(self.mtp), left - 1)))

    def generate(self, tokens, max_new_tokens, **how):
        """Continue tokens [B, T] -> [B, T + n], where n is max_new_tokens, or fewer if every row meets a `stop` id before. A list
        of unequal prompts -> a list of rows, each up to its stop id. An encoder-decoder reads `tokens` and returns [B, 1 + n],
        its start token first. temperature 0 takes the likeliest id; top_k keeps the k likeliest (0: all), top_p the fewest
        that together reach that probability; repetition_penalty above 1 makes ids that stand in the row already less likely.
        draft=True: the same ids in fewer calls, by the MTP modules; then m.drafted counts the calls, the ids drafted for each row
        and those accepted in all of them."""
        how["stop"] = [int(token) for token in how.get("stop", ())]
        new = [new_B[:, None] for new_B in self.stream(tokens, max_new_tokens, **how)]
        begin = tokens if isinstance(tokens, torch.Tensor) else [torch.as_tensor(row) for row in tokens]
        if self.cfg.arch == "encdec":
            start_B1 = torch.full((len(tokens), 1), self.cfg.start_token, device=self.embed.weight.device)
            begin = start_B1 if isinstance(tokens, torch.Tensor) else list(start_B1)
        if isinstance(begin, torch.Tensor):
            return torch.cat([begin.to(self.embed.weight.device), *new], 1)
        rows = []
        for row, ids in zip(begin, torch.cat(new, 1).tolist() if new else [[]] * len(begin)):
            end = next((i + 1 for i, token in enumerate(ids) if token in how["stop"]), len(ids))
            rows.append(torch.cat([row, row.new_tensor(ids[:end])]))
        return rows


# ---- Sizes (what does it cost?) ----

def meta_model(cfg):
    """The model without memory: shapes only, instant at any size."""
    with torch.device("meta"):
        return Model(cfg)


PART_OF = {                        # the first of these in a parameter's name says which component it belongs to
    "mtp.": "mtp", "norm": "norms", ".res": "norms", "_gain": "norms", "rel_bias": "attention", "embed": "embedding",
    ".cross.": "cross-attention", ".attn.": "attention", "router": "experts", "experts": "experts", "shared": "experts",
    ".mlp.": "mlp",
}


def component(name):
    return next((part for piece, part in PART_OF.items() if piece in name), "head")


def parameter_table(model, active=False):
    """{component: parameters}, or of them those that one token meets; a tied head counts once, under embedding."""
    cfg = model.cfg
    table = dict.fromkeys(("embedding", "attention", "cross-attention", "mlp", "experts", "norms", "head", "mtp"), 0)
    for name, p in model.named_parameters():
        table[component(name)] += p.numel() * cfg.n_active // cfg.n_expert if active and ".experts." in name else p.numel()
    return {part: count for part, count in table.items() if count}


def active_parameters(model):
    """Parameters that one token meets: all, less the experts it does not visit."""
    return sum(parameter_table(model, active=True).values())


def mixers(block):
    return [mixer for mixer in (block.attn, block.cross) if mixer is not None]


def block_macs(block, cfg, T):
    """Multiply-adds of a token in a block that reads T at once: one for each weight of a matrix it meets, and the mixers'."""
    weights = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
    experts = sum(p.numel() * (cfg.n_active if ".experts." in name else cfg.n_expert) // cfg.n_expert
                  for name, p in block.named_parameters() if p.ndim == 3)
    return weights + experts + sum(mixer.macs(T) for mixer in mixers(block))


def flops_per_token(model, seq_len, mtp=True):
    """Training FLOPs of a token: 2 for a multiply-add, as much again for each of the two gradients; the head counts, lookups
    do not. Of an encoder-decoder: a token of the source and one of the target together.                 [PaLM app B]"""
    blocks = sum(block_macs(block, model.cfg, seq_len) for block in [*model.enc_blocks, *model.blocks])
    head = sum(m.weight.numel() for m in (model.mlm_dense, model.head) if m is not None)
    ahead = sum(head + m.proj.weight.numel() + block_macs(m.block, model.cfg, seq_len) for m in model.mtp) if mtp else 0
    return 6 * (blocks + head + ahead)


def cache_bytes(model, T, size=2):
    """Bytes kept of T tokens (encoder-decoder: of as many on each side), `size` a number; recurrent states are float32."""
    each = [mixer.kept(T) * (4 if mixer.recurrent else size) for block in model.blocks for mixer in mixers(block)]
    return 0 if model.cfg.arch == "encoder" else sum(each)


def human(n, unit=""):
    """1234567 -> 1.23M, with a unit 1.23 MB: three digits."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G" if unit else "B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= 0.9995 * size:
            return f"{n / size:#.3g}".rstrip(".") + " " * bool(unit) + prefix + unit
    return f"{n:.0f} {unit}".strip()


def kinds_of(blocks, plan):
    """[(Layer, block, indices)] of the blocks that differ in mixer, window or a shape, in order of appearance."""
    kinds = {}
    for block, layer in zip(blocks, plan):
        key = layer.attn, layer.window, tuple((name, p.shape) for name, p in block.named_parameters())
        kinds.setdefault(key, (layer, block, []))[2].append(layer.index)
    return list(kinds.values())


def ranges(numbers):
    """[0, 1, 2, 5] -> 0-2, 5"""
    ends = zip([n for n in numbers if n - 1 not in numbers], [n for n in numbers if n + 1 not in numbers])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in ends)


def describe(model, seq_len=0):
    """What the model costs, 100 columns wide: parameters, compute, memory, its kinds of blocks, the wavelengths of RoPE."""
    cfg, T = model.cfg, seq_len or model.cfg.seq_len
    table, used = parameter_table(model), parameter_table(model, active=True)
    total, active, flops = sum(table.values()), sum(used.values()), flops_per_token(model, T)
    blocks, plan = [*model.enc_blocks, *model.blocks], [*model.enc_plan, *model.plan]
    between = 6 * sum(mixer.macs(T) for block in [*blocks, *(m.block for m in model.mtp)] for mixer in mixers(block))
    reads = flops_per_token(model, T, mtp=False) / 3
    depth = f"{len(model.enc_blocks)} + " * bool(model.enc_plan) + f"{cfg.n_layer}"
    out = [f"{cfg.arch} of {depth} blocks, {cfg.n_embd:,} wide, {cfg.n_head} heads, vocabulary {cfg.vocab_size:,}, {T:,} tokens"]

    out += ["", f"{'parameters':38s}{'share':>8s}{'active a token':>24s}{'share':>8s}"]
    for part, n, a in [*((part, n, used[part]) for part, n in table.items()), ("all", total, active)]:
        out.append(f"  {part:16s}{n:20,}{n / total:8.1%}{a:24,}{a / active:8.1%}")
    out += ["", f"{'compute a token':18s}{human(flops, 'FLOP'):>20s} to train on, {human(reads, 'FLOP')} to read; "
            f"{between / flops:.1%} of it between tokens" + " (one of the source, one of the target)" * bool(model.enc_plan)]

    sizes = dict(float32=4, bfloat16=2, int8=1, int4=0.5)
    costs = {"weights": lambda size: total * size}
    for length in sorted({T, 32768}) if cfg.arch != "encoder" else ():
        costs[f"cache, {length:,} tokens"] = partial(cache_bytes, model, length)
    out += ["", f"{'memory':26s}" + "".join(f"{name:>15s}" for name in sizes)]
    for name, cost in costs.items():
        out.append(f"  {name:24s}" + "".join(f"{human(cost(size), 'B'):>15s}" for size in sizes.values()))
    out += [f"  {'training with AdamW':24s}{human(16 * total, 'B'):>15s}   weights, gradients, two moments; activations on top"]

    out += ["", f"{'blocks':27s}{'mixer':12s}{'window':>8s}  {'then':8s}{'parameters':>11s}{'FLOP a token':>14s}"
            f"{'kept a token':>16s}"]
    for side, *stack in (("encoder ", model.enc_blocks, model.enc_plan), ("", model.blocks, model.plan)):
        for layer, block, at in kinds_of(*stack):
            where = textwrap.shorten(side + ranges(at), 18, placeholder=" ..")
            grows = 0 if side or cfg.arch == "encoder" else sum(mixer.kept(2) - mixer.kept(1) for mixer in mixers(block))
            once = sum(mixer.kept(1) for mixer in mixers(block) if mixer.recurrent)
            kept = f"{human(4 * once, 'B')} once" if once else f"{2 * grows:,} B" if grows else "nothing"
            weights, cost = sum(p.numel() for p in block.parameters()), 6 * block_macs(block, cfg, T)
            out.append(f"  {where:18s}{f'x {len(at)}':>5s}  {layer.attn:12s}{layer.window or 'all':>8}  "
                       f"{('mlp', 'experts')[layer.moe]:8s}{human(weights):>11s}{human(cost, 'FLOP'):>14s}{kept:>16s}")
    return "\n".join(out + rope_lines(cfg, plan, T))


def rope_lines(cfg, plan, T):
    """How many tokens a whole turn of the pairs takes, before and after scaling."""
    tables, out = {}, []
    for layer in plan if cfg.pos == "rope" else ():
        key = ATTENTION[layer.attn].rotary(cfg), *rope_base(cfg, layer.attn)
        tables.setdefault(key, set()).add(layer.attn)
    for (dim, theta, scaling), names in tables.items():
        for how in dict.fromkeys(("none", scaling) if dim else ()):
            wave_J = 2 * math.pi / inverse_frequencies(dim, theta, how, cfg, T)[0]
            name = ", ".join(sorted(names)) if how == "none" else f"  {how} x {cfg.rope_factor:g}"
            out.append(f"  {name:22s}{dim // 2:6d}{theta:14,.0f}{wave_J.min():12,.1f}{wave_J.median():14,.1f}"
                       f"{wave_J.max():16,.0f}{int((wave_J > T).sum()):14d}")
    return ["", f"{'RoPE, tokens a turn':24s}{'pairs':>6s}{'base':>14s}{'shortest':>12s}{'median':>14s}{'longest':>16s}"
            f"{'never in T':>14s}", *out] if out else []


# ---- Plan (what would a rank hold, keep and send?) ----

def held(name, p, model):
    """How a layout cuts a parameter."""
    dim, parts = next(((-1 if dim is None else dim, parts) for pattern, dim, parts in CUTS if re.search(pattern, name)), (None, 1))
    home, _, leaf = name.rpartition(".")
    mixer = model.get_submodule(re.match(r"(.*\.(attn|cross))\.|", name)[1] or "")
    one = re.search(r"\.(q_|k_)?norm\.weight$", name) and p.numel() == getattr(mixer, "head_dim", 0)       # of single heads
    key = re.search(r"\.(w_k|w_v|k_norm|lrpe)\b", name) and getattr(mixer, "n_kv_head", 0)
    linear = isinstance(model.get_submodule(home), nn.Linear) and p.ndim == 2 and "router" not in name and not name.startswith("head")
    return dist.Weight(tuple(p.shape), None if one else dim, parts, key or 0, expert=".mlp.experts." in name, cast=linear or p.ndim == 3,
                     inside=bool(re.search(INSIDE, name)))


def pieces(model):
    """{where: [dist.Piece]} of which pipeline stages are made."""
    cfg, groups = model.cfg, {}
    for name, p in model.named_parameters():
        unit = re.match(r"(blocks\.\d+|mtp\.\d+\.block|mtp|(pos_|type_)?embed(_norm)?|rel_bias)\.|", name)[1] or "end"
        groups.setdefault("embed" if "embed" in unit else "each" if unit == "rel_bias" else unit, []).append((name, p))
    made = lambda name, *more, **rest: dist.Piece(name, [held(*pair, model) for pair in groups.get(name, [])], *more, **rest)

    def unit(root, block, layer):
        return made(root, block_macs(block, cfg, cfg.seq_len), partial(block_keeps, block), partial(block_moves, block), block=True)

    blocks = {}
    for layer, block, at in kinds_of(model.blocks, model.plan):
        blocks |= dict.fromkeys(at, unit(f"blocks.{at[0]}", block, layer))
    head = sum(m.weight.numel() for m in (model.mlm_dense, model.head) if m is not None)
    embed, end = made("embed", moves=embed_moves), made("end", head, head_keeps, head_moves)
    twice = [dist.Piece("twice", embed.held)] if model.mtp else [dist.Piece("twice", embed.held[:1])] if cfg.tie_embeddings else []
    ahead = [unit(f"mtp.{k}.block", m.block, layer) for k, (m, layer) in enumerate(zip(model.mtp, model.mtp_plan))]
    own = made("mtp", cfg.mtp * (head + 2 * cfg.n_embd**2), partial(head_keeps, mtp=cfg.mtp), partial(head_moves, mtp=cfg.mtp))
    masked = {layer.kind for layer in model.plan if not ATTENTION[layer.attn].recurrent}
    return dict(blocks=[blocks[i] for i in range(cfg.n_layer)], embed=[embed], end=[end] + [own, *ahead] * bool(ahead), twice=twice,
                each=[made("each", keeps=partial(mask_keeps, len(masked)))])


RECURRENT_KEEPS = {                # float32 numbers a channel of its queries, fitted to what is kept; w: bytes of one / 4, C: tile, K: head
    "Linear": lambda w, C, K: 2.8 + w * (9 + 2.5 * C / K),
    "Lightning": lambda w, C, K: w * (12.5 + 1.5 * C / K),
    "TransNormer": lambda w, C, K: 1 + w * (10.5 + 1.5 * C / K),
    "GatedDeltaNet": lambda w, C, K: 19 + 7 * w + 5.7 * C / K,
    "KDA": lambda w, C, K: 25 + 6.5 * w + 2.9 * C,
}


def mixer_keeps(mixer, cfg, n, cuda):
    """[(bytes a token that backward needs, bytes that --ac=selective keeps)] of what a mixer makes. On a CPU the keys of a group are copied
    for its queries, and scores are stored where SDPA is slower (attention.small_half) or has no kernel: keys wider than values."""
    H, rows = mixer.n_head / cfg.tp, cfg.cp if cfg.cp_mode == "gather" else 1
    wide = 4 if cfg.cp > 1 and cfg.cp_mode == "ring" else n
    changed = cfg.attn_softcap or cfg.sinks or cfg.pos == "shaw"
    if mixer.recurrent:
        K = mixer.head_dim
        kept = RECURRENT_KEEPS[type(mixer).__name__](n / 4, mixer.tile, K)
        return [(4 * H * K * kept, n * H * K * (12 if hasattr(mixer, "conv") else 7))]
    if hasattr(mixer, "kv_rank"):
        N, P, R, K, U = mixer.nope, mixer.rope_dim, mixer.kv_rank, mixer.nope + mixer.rope_dim, mixer.v_dim
        Q = cfg.q_lora_rank
        kept = [(2 * n * Q, n * Q), (0, n * H * K), (n * R, n * (R + P)), (n * (R + P) * rows, 0), (0, n * H * (N + U) * rows),
                (wide * H * K * (1 + rows), 0), (wide * H * (N + U if cuda else U) * rows, 0)]
    else:
        G, K = mixer.n_kv_head / cfg.tp if mixer.n_kv_head % cfg.tp == 0 else 1, mixer.head_dim
        U, norms = K, 0 if mixer.q_norm is None else n * (H + G) * K
        copies = H if not cuda or cfg.cp > 1 and cfg.cp_mode == "ulysses" and G % cfg.cp else G
        clipped = n * (H + 2 * G) * K if mixer.clip else 0
        kept = [(wide * H * K, n * H * K), (2 * wide * copies * K * rows, 2 * n * G * K), (norms, 0), (clipped, 0)]
    plain = not changed and not (n < 4 and cfg.seq_len <= 896) and K == U
    scores = 4 * H if cuda or plain or wide > n else (n if changed or cfg.seq_len <= 896 else 4) * H * cfg.seq_len
    gate = 0 if mixer.w_gate is None else n * H * U
    return kept + [(wide * H * U, n * H * U), (scores, 4 * H * cuda), (2 * gate, gate), (n * H * U * (wide > n), 0)]


def block_keeps(block, cfg, tokens, n, cuda):
    """{--ac: bytes that a block keeps for backward} of a micro-batch on a rank. The stream is float32."""
    D, E, A, tp, has = cfg.n_embd, cfg.n_expert, cfg.n_active, cfg.tp, PLACEMENTS[cfg.norm_at]
    part = 1 / tp if cfg.sp else 1
    read = n * D if "pre" in has or n < 4 or tp > 1 else 0
    rows = mixer_keeps(block.attn, cfg, n, cuda)
    for _ in range(2):                                           # what norms keep, what a sublayer reads and gives
        rows += [((4 * D + 4) * part * ("pre" in has), 0), ((4 * D + 4) * part * ("after" in has), 0), (n * D * part * ("post" in has), 0),
                 (read, 0), (0, n * D), (n * D * bool(cfg.resid_dropout), 0)]
    if isinstance(block.mlp, MoE):
        width, own = block.mlp.experts.w_up.shape[1] / tp, n < 4 and cuda                      # own: kernels.moe_mlp
        shared = cfg.n_shared_expert * width
        copies = 4 if cfg.ep > 1 else 0 if own else 3            # of the row of a visit: sorted, what its expert gave, sent back, in order
        rows += [(4 * D * (n < 4), 0), (4 * E * (1 + (cfg.aux_loss != "none")) + 48 * A, 4 * E),              # the router reads float32
                 (copies * n * A * D, 0 if own else n * A * D), (4 * n * shared, 2 * n * shared),
                 ((2 if own else 4) * n * A * width, 0 if own else 2 * n * A * width)]
    else:
        width = block.mlp.w_up.weight.shape[0] / tp
        inner = 2 if block.mlp.gated else 1
        rows += [(n * width * (inner + 1 + (inner == 2 and n < 4 and not cuda)), n * width * inner)]
    forgotten = 2 * read * ("pre" in has and part == 1) + (0 if isinstance(block.mlp, MoE) else n * width)
    none, selective, full = (tokens * sum(column) for column in (*zip(*rows), [4 * D * part]))
    return dict(none=none, norm=none - tokens * forgotten, selective=selective + full, full=full)


def head_keeps(cfg, tokens, n, cuda, mtp=0):
    """The same of the end of the model: its norm, what the head reads, and logits where one chunk holds them, else their gradients by the
    head's weights. mtp: of so many modules, beside their blocks."""
    D, V, tp, part = cfg.n_embd, cfg.vocab_size, cfg.tp, 1 / cfg.tp if cfg.sp else 1
    least, size = (4096, 256 << 20) if cuda else (256, 28 << 20)                         # kernels.chunk_rows
    if tp > 1:
        logits = 3 * 4 * V / tp * tokens if tokens * 4 * V / tp <= 32 << 20 else 0
    elif not cuda and tokens * V <= 2 << 20:                                             # kernels.few_logits
        logits = 4 * V * tokens
    else:
        logits = n * V * tokens if tokens <= max(least, size // (V * n)) else 4 * V * D
    joined = (2 * (4 * D + 4) * part + 2 * n * D) * tokens * bool(mtp)
    kept = (mtp or 1) * (((4 * D + 4) * part + n * D + 8) * tokens + logits + joined)
    return dict.fromkeys(AC, kept)


def mask_keeps(kinds, cfg, tokens, n, cuda):
    """Masks of documents, one for each kind of softmax attention, where no kernel of ours reads the documents themselves."""
    return dict.fromkeys(AC, 0 if cuda else kinds * n * tokens * cfg.seq_len)


def embed_moves(cfg, rows, n):
    """[(axis, collective there, bytes of it, bytes once more where a block runs again, collective back, bytes)] of a micro-batch: of what
    looks ids up."""
    stream = rows * -(-cfg.seq_len // cfg.cp // cfg.tp) * cfg.tp * cfg.n_embd
    return [("tp", "reduce-scatter" if cfg.sp else "all-reduce", 4 * stream, 0, "all-gather", 4 * stream * cfg.sp)]


def head_moves(cfg, rows, n, mtp=0):
    """Of the end of the model: what the head reads, and three numbers a token of the loss. mtp: of so many modules; they look up ids."""
    stream, tokens = rows * -(-cfg.seq_len // cfg.cp // cfg.tp) * cfg.tp * cfg.n_embd, rows * cfg.seq_len // cfg.cp
    again = 1 + (tokens * 4 * cfg.vocab_size / cfg.tp > 32 << 20)                        # logits in lots are made twice
    one = [("tp", "all-gather", n * stream * cfg.sp, 0, "reduce-scatter" if cfg.sp else "all-reduce", n * stream),
           ("tp", "all-reduce", 3 * 4 * tokens * again, 0, "all-reduce", 0)]
    return one if not mtp else mtp * (one + embed_moves(cfg, rows, n))


def block_moves(block, cfg, rows, n):
    """Of a block: two sublayers around which tp meets, the row that cp shares, visits to experts."""
    T, D, tp, cp, mixer = cfg.seq_len // cfg.cp, cfg.n_embd, cfg.tp, cfg.cp, block.attn
    H, stream = mixer.n_head // tp, n * rows * -(-T // tp) * tp * D
    if cfg.sp:                                                   # the last scatter need not be made again
        moves = [("tp", "all-gather", 2 * stream, 2 * stream, "reduce-scatter", 2 * stream),
                 ("tp", "reduce-scatter", 2 * stream, stream, "all-gather", 2 * stream)]
    else:
        moves = [("tp", "all-reduce", 2 * stream, stream, "all-reduce", 2 * stream)]
    here = rows * T
    over_heads = 4 * here * (2 if cfg.qk_norm == "width" else type(mixer).__name__ in ("Lightning", "TransNormer"))      # sums of norms
    moves += [("tp", "all-reduce", over_heads, over_heads, "all-reduce", over_heads)]
    if mixer.recurrent:
        K = mixer.head_dim
        state = 4 * rows * cp * H * (mixer.key_dim * mixer.value_dim + (K * K + 9 * K) * hasattr(mixer, "conv"))
        there = state + 4 * rows * cp * H * (1 + getattr(mixer, "turns", False)) * (not hasattr(mixer, "conv"))        # and decays
        moves += [("cp", "all-gather", there, there, "reduce-scatter", state)]
    else:
        mla = hasattr(mixer, "kv_rank")
        K, U = (mixer.nope + mixer.rope_dim, mixer.v_dim) if mla else (mixer.head_dim, mixer.head_dim)
        G = H if mla else mixer.n_kv_head // tp or 1
        if cfg.cp_mode == "gather":
            keys = n * here * cp * (mixer.kv_rank + mixer.rope_dim if mla else 2 * G * K)
            moves += [("cp", "all-gather", keys, keys, "reduce-scatter", keys)]
        elif cfg.cp_mode == "ulysses":
            swapped = n * here * (H * (K + U) + (H if G % cp else G) * (K + U))
            moves += [("cp", "all-to-all", swapped, swapped, "all-to-all", swapped)]
        else:                                                    # backward takes the gradients of keys and values along, and home
            keys = 4 * here * G * (K + U)
            moves += [("cp", "send", (cp - 1) * keys, (cp - 1) * keys, "send", (2 * cp - 1) * keys)]
    if isinstance(block.mlp, MoE):
        visits = n * here * cfg.n_active * D
        moves += [("ep", "all-to-all", 2 * visits, 2 * visits, "all-to-all", 2 * visits)]
        if cfg.aux_loss != "none":                               # of whole rows: shares of visits, as chosen and by score, and probabilities
            shares = 4 * rows * cfg.n_expert
            there = shares * (2 + (cfg.aux_loss == "sequence"))
            moves += [("cp", "all-reduce", there, there, "all-reduce", shares)]
    return moves


# ---- Drawing (what does it look like?) ----

COLOURS = {      # on a light page, on a dark one
    "page": ("#fdfcfa", "#14161a"), "ink": ("#23262b", "#e7e5df"), "soft": ("#6d737c", "#9aa1ab"), "line": ("#8a9099", "#757c87"),
    "band": ("#e9e5dc", "#2a2d33"), "card": ("#f5f2ec", "#1b1e23"), "embedding": ("#b9770e", "#e8b45a"),
    "attention": ("#2f6fc1", "#6aa5ee"), "cross-attention": ("#11857e", "#4cc7bf"), "mlp": ("#cf5a3c", "#f08a6c"),
    "experts": ("#8350b8", "#b48ae6"), "norms": ("#4d8b3d", "#86c574"), "head": ("#b8437f", "#ec86b8"),
    "mtp": ("#7d7a1f", "#c9c45a"),
}
STYLE = """*{fill:currentColor} text{font-family:ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif}
.mono{font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace} .bold{font-weight:600} .card,.op{stroke:#8a909966}
.matrix{fill-opacity:.26;stroke:currentColor;stroke-width:.8} .tied{fill:none;stroke:currentColor;stroke-dasharray:4 3}
.flow,.heads,.cut{fill:none;stroke:currentColor;stroke-width:1.3} .heads{stroke-width:.5} .cut{stroke-width:5}
.tint{fill-opacity:.34} .cell{shape-rendering:crispEdges}"""
STAGES = {       # tensors of a branch from left to right: | an arrow, / on top of each other, * all not named, work no weights
    "attn": "w_dq w_dkv | q_gain/kv_gain | w_q/w_ukv w_k w_v * w_gate | q_norm/k_norm lrpe shaw_k/shaw_v sinks rel_bias | work | "
            "norm | w_o",
    "mlp": "router | w_gate w_up * | act.beta | work | w_down",
}
THIN, BREAK, TALL, WIDE = 1.5, 300, 130, 1000      # pixels: least side of a tensor, longest vocabulary, widest stream, page


def text_width(said, size, css=""):
    return (0.68 if "bold" in css else 0.61) * size * len(said)              # of a wide font


class Sheet:
    """Shapes and the box they fill [left, top, right, bottom]; sheets are pasted into larger ones, as letters into lines and
    lines into pages. ends: where arrows may touch it, at y = 0. points: places that will be joined to others."""

    def __init__(self):
        self.svg, self.box, self.ends, self.points = [], [0, 0, 0, 0], None, {}

    def put(self, x, y, w, h, svg=""):
        l, t, r, b = self.box
        self.box = [min(l, x), min(t, y), max(r, x + w), max(b, y + h)]
        self.svg.append(svg)

    def rect(self, x, y, w, h, css, tip="", rx=0):
        tip = f"><title>{tip}</title></rect>" if tip else "/>"               # shown where the pointer rests
        at = f'x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}" rx="{rx}"'
        self.put(x, y, w, h, f'<rect class="{css}" {at}{tip}')

    def text(self, x, y, said, css="ink", size=9, anchor="start"):
        wide = text_width(said, size, css)
        at = f'x="{x:.2f}" y="{y:.2f}" font-size="{size}" text-anchor="{anchor}"'
        left = x - wide * ("start", "middle", "end").index(anchor) / 2
        self.put(left, y - size, wide, size * 1.3, f'<text class="{css}" {at}>{html.escape(said)}</text>')

    def labels(self, y, lines):
        for k, line in enumerate(lines):
            self.text(0, y + 12 + 11 * k, line, "mono soft" if k else "mono ink", 9, "middle")

    def path(self, x, y, d, css="flow line", more=""):
        self.svg.append(f'<path class="{css}" d="M{x:.2f} {y:.2f}{d}"{more}/>')

    def arrow(self, x, y, *steps, css="flow line"):
        """Steps are relative: right, down, right, ..."""
        self.path(x, y, "".join(f"{'hv'[i % 2]}{step:.2f}" for i, step in enumerate(steps)), css, ' marker-end="url(#tip)"')

    def paste(self, other, x, y):
        """Returns the ends of what was pasted."""
        l, t, r, b = other.box
        self.put(x + l, y + t, r - l, b - t, f'\n<g transform="translate({x:.2f} {y:.2f})">{"".join(other.svg)}</g>')
        self.points |= {name: (x + dx, y + dy) for name, (dx, dy) in other.points.items()}
        return [x + end for end in other.ends or (l, r)]


def word(said):
    out = Sheet()
    out.text(4, 4, said, "ink bold", 10.5)
    return out


def row(sheets, arrow=0):
    """Side by side along y = 0, with arrows to the right (1) or to the left (-1) between them."""
    out, x = Sheet(), 0
    for sheet in sheets:
        left, right = out.paste(sheet, x - sheet.box[0], 0)
        if arrow and out.ends:
            a, b = (out.ends[1] + 3, left - 3)[::arrow]
            out.arrow(a, 0, b - a)
        out.ends, x = ((out.ends or [left])[0], right), out.box[2] + (24 if arrow else 10)
    return out


def pile(sheets, fork=0):
    """On top of each other around y = 0; fork pixels wide, if any, is the way from the stream to each of them, and back."""
    if len(sheets) == 1:
        return sheets[0]
    out, gap = Sheet(), 16 if fork else 6
    heights, wide = [b - t + gap for l, t, r, b in (s.box for s in sheets)], max(s.box[2] - s.box[0] for s in sheets)
    for k, sheet in enumerate(sheets):
        y = sum(heights[:k]) - sum(heights) / 2 - sheet.box[1]
        left, right = out.paste(sheet, fork or (wide - sheet.box[2] - sheet.box[0]) / 2, y)
        if fork:
            out.arrow(0, 0, 0, y, left - 3)
            out.path(right + 3, y, f"H{wide + 2 * fork}V0")
    out.put(0, 0, wide + 2 * fork, 0)
    return out


def work(lines, *paths):
    """A box for what has no weights: paths (d, css, opacity) in 32 x 32 pixels."""
    out = Sheet()
    out.rect(-22, -22, 44, 44, "op page", rx=5)
    for d, css, opacity in paths:
        out.path(-16, -16, d, css, f' opacity="{opacity:.2f}"')
    out.labels(22, lines)
    out.ends = -22, 22
    return out


def acting(name):
    """The activation from -3 to 2."""
    y_X = 20 - 10 * activation(SimpleNamespace(act=name), 33)(torch.linspace(-3, 2, 33)).detach().clamp(-0.5, 2)
    curve = f"m0 {y_X[0]:.2f}" + "".join(f"l1 {dy:.2f}" for dy in y_X.diff())
    return work([name] + ["f(gate) up"] * ACTIVATIONS[name][1], (curve, "flow ink", 1))


def mixing(cfg, mixer, layer, causal):
    """Which of 16 keys (across) each of 16 queries (down) reads, darker the more heads do; or the state that is kept."""
    if mixer.recurrent:
        loop = "m11 11c0 -16 26 -12 21 3l-6 7"
        return work(["state", human(mixer.kept(1))], ("m2 12h18v18h-18z", "soft", 0.8), (loop, "flow line", 1))
    n, prefix, place_1S = 16, cfg.arch == "prefix", torch.arange(16)[None]
    name = "prefix" if prefix else layer.attn if layer.attn in PATTERNS else "causal" if causal else "all keys"
    small = replace(cfg, seq_len=n, sparse_stride=0, sparse_width=0)
    near = replace(layer, window=math.ceil(layer.window * n / cfg.seq_len))
    this = Pass(place_1S, causal=causal, prefix_B=torch.tensor([6]) if prefix else None)
    share_TS = seen_keys(small, near, this, place_1S.T, place_1S, slice(None))[0].float().mean(0)
    paths = []
    for share in share_TS[share_TS > 0].unique().tolist():
        cells = (share_TS == share).nonzero().tolist()
        d = "".join(f"m{2 * s} {2 * t}h2v2h-2zm{-2 * s} {-2 * t}" for t, s in cells)
        paths.append((d, "soft cell", 0.2 + 0.6 * share))
    return work(["softmax", f"{layer.window} keys" if layer.window else name], *paths)


class Picture:
    """The model at a scale of s pixels a number."""

    def __init__(self, model, s):
        self.model, self.cfg, self.s, self.band, self.thin = model, model.cfg, s, model.cfg.n_embd * s, max(THIN, s)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def below(self, root):
        """{rest of the name: name} of the tensors under a root; biases go with their weights."""
        return {name.removeprefix(root).removesuffix(".weight"): name for name in self.shapes
                if name.startswith(root) and not name.endswith(".bias")}

    def size(self, name):
        return "×".join(map(str, self.shapes[name])) or "1"

    def tensor(self, label, name="", heads=0, tint=1, tied=False):
        """A tensor around y = 0, `tint` of its heads tinted, its bias on the side of its outputs. The stream's side stands
        upright: what reads the stream has its outputs along x, what writes to it its inputs."""
        out, name, writes = Sheet(), name or f"{label}.weight", label in ("w_o", "w_down")
        shape, part = self.shapes[name], "head" if label == "head" else component(re.sub(r"mtp\.\d+\.block", "", name))
        biases = [b for b in (name.replace(".weight", ".bias"), f"{label}_bias") if b in self.shapes and b != name]
        high, wide = (shape[-2:] if writes else shape[:-3:-1]) if len(shape) > 1 else (*shape, 1, 1)[:2]
        w, h = max(THIN, wide * self.s), max(THIN, high * self.s)
        if cut := w > BREAK and part in ("embedding", "head"):
            w = BREAK
        lines = [label, "= embed" if tied else self.size(name), *(f"+ bias {self.size(b)}" for b in biases)]
        x, y, fan = -w / 2, -h / 2, min(4, shape[0]) if len(shape) == 3 else 1
        for k in reversed(range(fan)):                           # stacked experts
            out.rect(x + 4 * k, y - 4 * k, w, h, "page")
            css = f"{part} {'tied' if tied else 'matrix' if len(shape) > 1 else ''}"
            out.rect(x + 4 * k, y - 4 * k, w, h, css, "" if k or tied else f"{name} {self.size(name)}")
        for bias in biases:
            beside = writes or len(shape) == 1
            at = (x + w + 1.5, y, self.thin, h) if beside else (x, y - 1.5 - self.thin, w, self.thin)
            out.rect(*at, part, f"{bias} {self.size(bias)}")
        if heads:
            out.rect(x, y, w * tint / heads, h, f"{part} tint")
            if w / heads > 2:
                out.path(x, y, f"m{w / heads:.3f} 0v{h:.2f}m0 {-h:.2f}" * (heads - 1), f"{part} heads")
        if cut:
            out.path(x + 0.62 * w, y - 6, "".join(f"l{7 * (-1)**k} {(h + 12) / 8:.2f}" for k in range(8)), "cut page")
        out.labels(h / 2, lines)
        out.ends, out.points = (x, x + w + 4 * (fan - 1)), {name: (0, y)}
        return out

    def norm(self, label, name):
        """A norm of the stream itself lies across its band."""
        out, names = Sheet(), [n for n in dict.fromkeys((name, name.replace(".weight", ".bias"))) if n in self.shapes]
        for k, each in enumerate(names):
            out.rect(0, (self.thin + 1.5) * k, self.band, self.thin, "norms", f"{each} {self.size(each)}")
        out.text(self.band + 10, 5, f"{label} " + " + bias ".join(map(self.size, names)), "mono soft")
        return out

    def stages(self, key, tensors, between, heads={}):
        """The stages of a branch from {label: name}; heads {label: (how many, how many of them to tint)}."""
        others = [label for label in tensors if label not in re.split(r"[ |/]+", STAGES[key])]
        make = lambda label: between if label == "work" else self.tensor(label, tensors[label], *heads.get(label, ()))
        out = []
        for part in STAGES[key].replace("*", " ".join(others)).split("|"):
            columns = [[label for label in column.split("/") if label in tensors or label == "work"] for column in part.split()]
            if sheets := [pile([make(label) for label in labels]) for labels in columns if labels]:
                out.append(row(sheets))
        return out

    def branch(self, title, sheets, norms):
        """What leaves the stream (the band at the left), works, and is added back above."""
        out, x, middle, on_stream = Sheet(), self.band + 40, self.band / 2, self.cfg.norm_at == "prenorm_residual"
        if "after" in norms:
            out.paste(self.norm(*norms["after"]), 0, 5)
        before, after = ([self.tensor(*norms[at])] if at in norms and not on_stream else [] for at in ("pre", "post"))
        line = row([*before, *sheets, *after], 1)
        top = out.box[3] + 13
        y = top + 36 - line.box[1]
        left, right = out.paste(line, x, y)
        out.text(x, top + 20, title, "ink bold", 10.5)
        turn = out.box[2] + 12
        out.arrow(self.band, y, left - 3 - self.band)
        out.arrow(right + 3, y, turn - right - 3, top - y, middle + 11 - turn)
        out.path(middle, top, "m-8 0a8 8 0 1 1 16 0a8 8 0 1 1 -16 0z", "op page")
        out.path(middle - 4, top, "h8m-4 -4v8", "flow ink")
        out.path(self.band - 2.5, y, "a2.5 2.5 0 1 1 5 0a2.5 2.5 0 1 1 -5 0z", "line")
        if on_stream and norms:
            out.paste(self.norm(*norms["pre"]), 0, out.box[3] + 8)
        out.put(0, 0, turn, out.box[3] + 8)
        return out

    def branches(self, layer, block, root, causal):
        """Those of a block, first one first."""
        cfg, H = self.cfg, self.cfg.n_head
        norms = lambda res: {at: (f"{res}.{at}", name) for at, name in self.below(f"{root}{res}.").items()}
        for inner, res, mixer, reads, title in (
                ("attn", "res1", block.attn, (layer, causal), f"attention · {layer.attn}"),
                ("cross", "res_cross", block.cross, (Layer(0, "mha"), False), "cross-attention · keys and values: encoder")):
            if mixer is None:
                continue
            tensors, G = self.below(f"{root}{inner}."), getattr(mixer, "n_kv_head", H)
            if root.endswith("blocks.0.") and inner == "attn" and cfg.pos == "t5":     # one table for all blocks
                tensors["rel_bias"] = root.replace("blocks.0.", "rel_bias.weight")
            heads = dict.fromkeys(("w_q", "w_o", "w_gate", "w_ukv"), (H, H // G)) | dict(w_k=(G, 1), w_v=(G, 1))
            sheets = self.stages("attn", tensors, mixing(cfg, mixer, *reads), heads)
            sheets[0].box[1] -= 14 * (inner == "cross")          # room for what comes from the encoder
            yield self.branch(title + (f" · {H} query and {G} key heads" if G < H else f" · {H} heads"), sheets, norms(res))
        own = lambda *parts: {label.removeprefix("experts.").removeprefix("shared."): name
                              for label, name in self.below(f"{root}mlp.").items() if label.startswith(parts)}
        lane = lambda act, *parts: self.stages("mlp", own(*parts), acting(act))
        title, sheets = "mlp", [] if layer.moe else lane(cfg.act, "")
        if layer.moe:
            title, sheets = f"experts · {cfg.n_active} of {cfg.n_expert} for each token", lane("swiglu", "router", "experts")
            if cfg.n_shared_expert:
                title += f" · {cfg.n_shared_expert} shared, below"
                sheets = [pile([row(sheets, 1), row(lane("swiglu", "shared"), 1)], fork=20)]
        yield self.branch(title, sheets, norms("res2"))

    def ahead(self):
        """A module of multi-token prediction: what it joins, its block, its norm; for embedding and head it has no weights."""
        out, x, middle, there = Sheet(), self.band + 40, self.band / 2, lambda *labels: [
            self.tensor(label, f"mtp.0.{label}.weight") for label in labels if f"mtp.0.{label}.weight" in self.shapes]
        line = row([*there("norm"), word("the same head")], 1)
        y = 40 - line.box[1]
        out.arrow(middle, y, out.paste(line, x, y)[0] - 3 - middle)
        for each in reversed([*self.branches(self.model.mtp_plan[0], self.model.mtp[0].block, "mtp.0.block.", True)]):
            out.paste(each, 0, out.box[3])
        joined = [row([*there(label), word(said)], -1) for label, said in
                  (("norm_hidden", "states of the model, or of the module before"), ("norm_embed", "embeddings of the tokens k ahead"))]
        line = row([*there("proj"), pile(joined)], -1)
        y = out.box[3] + 16 - line.box[1]
        out.arrow(out.paste(line, x, y)[0] - 3, y, middle + 7 - x)
        out.put(0, 0, 1, out.box[3] + 12)
        return out

    def stack(self, side=""):
        """Encoder or decoder, tokens at the bottom: embedding, each kind of block once, what comes after them."""
        model, cfg, inside, x, middle, cards = self.model, self.cfg, Sheet(), self.band + 40, self.band / 2, []
        bands = []
        there = lambda *labels: [self.tensor(label) for label in labels if f"{label}.weight" in self.shapes]
        tied = lambda label: [self.tensor(label, "embed.weight", tied=True)]
        tops = {"memory": there("enc_norm")}
        if not side:
            head = tied("head") if model.head is model.embed else there("head")
            tops = {"hidden states" if cfg.headless else "logits": there("norm", "mlm_dense", "mlm_norm") + head}
            tops |= {"summary of the first token": there("pooler")} if cfg.pooler else {}
        if model.mtp and not side:
            module = self.ahead()
            inside.paste(module, 0, 0)
            cards.append((0, module.box[3], len(model.mtp)))
            bands.append((32, module.box[3] - 44))
            inside.text(x, 18, "multi-token prediction", "ink bold", 12)
            inside.put(0, module.box[3], 1, 20)
        end = None                                               # of the stream
        for label, sheets in tops.items():
            line = row([*sheets, word(label)], 1)
            y = inside.box[3] + 16 - line.box[1]
            end = y if end is None else end
            left, right = inside.paste(line, x, y)
            inside.arrow(middle, y, left - 3 - middle)
            inside.points["out"] = right + 6, y
        kinds = kinds_of(*((model.enc_blocks, model.enc_plan) if side else (model.blocks, model.plan)))
        for layer, block, at in reversed(kinds):
            top = inside.box[3] + 26
            inside.put(0, top, 1, 22)
            for each in reversed([*self.branches(layer, block, f"{side}blocks.{at[0]}.", cfg.arch != "encoder" and not side)]):
                inside.paste(each, 0, inside.box[3])
            cards.append((top, inside.box[3] - top, len(at)))
            where = textwrap.shorten(f"{'encoder ' * bool(side)}block{'s' * (len(at) > 1)} {ranges(at)}", 60, placeholder=" ..")
            inside.text(x, top + 18, where, "ink bold", 12)
        embeds = row(tied("embed") if side else there("embed", "pos_embed", "type_embed"))
        line = row([*there("embed_norm"), embeds, word("source ids" if side else "token ids")], -1)
        y = inside.box[3] + 26 - line.box[1]
        inside.arrow(inside.paste(line, x, y)[0] - 3, y, middle + 7 - x)
        inside.text(middle, y + 19, f"{cfg.n_embd}", "mono soft", 9, "middle")
        out, wide = Sheet(), inside.box[2] + 14
        for top, high, times in cards:
            for k in reversed(range(min(3, times))):
                out.rect(4 * k - 14, top - 4 * k, wide + 14, high, "card", rx=8)
            inside.text(wide - 12, top + 20, f"× {times}", "ink bold", 14, "end")
        for top, high in (*bands, (end - 8, y + 34 - end)):
            out.rect(0, top, self.band, high, "band", "the residual stream", 3)
        out.paste(inside, 0, 0)
        return out

    def page(self):
        out, decoder, gutter = Sheet(), self.stack(), -20
        if self.model.enc_plan:
            encoder = self.stack("enc_")
            out.paste(encoder, 14, max(0, decoder.box[3] - encoder.box[3]))
            (x, y), gutter = out.points["out"], out.box[2] + 16
        out.paste(decoder, gutter + 34, max(0, out.box[3] - decoder.box[3]))
        for name, (to, top) in out.points.items():
            if ".cross.w_k." in name or ".cross.w_v." in name:
                out.arrow(x, y, gutter - x, top - 14 - y, to - gutter, 8, css="flow cross-attention")
        return out


def draw(model):
    """An SVG of the model: the stream as a band, each kind of block once, every tensor to one scale."""
    cfg, table, out = model.cfg, parameter_table(model), Sheet()
    for s in (TALL / cfg.n_embd * 0.95**k for k in range(26)):   # the largest scale that fits
        page = Picture(model, s).page()
        if page.box[2] <= WIDE * (1.4 if model.enc_plan else 1):
            break
    wide, total, active = max(page.box[2], 700), sum(table.values()), active_parameters(model)
    out.text(0, 20, f"{human(total)} parameters" + f", {human(active)} active a token" * (active < total), "ink bold", 22)
    flags = " ".join(f"--{f.name}={getattr(cfg, f.name)}" for f in fields(cfg) if getattr(cfg, f.name) != f.default)
    for line in textwrap.wrap(flags or "all flags at their defaults", int(wide / text_width("x", 9))):
        out.text(0, out.box[3] + 13, line, "mono soft")
    bar, key, y = 0, 0, out.box[3] + 10
    for part, n in table.items():                                # the shares, as a bar and as its legend
        said = f"{part} {human(n)}, {n / total:.1%}"
        out.rect(bar, y, wide * n / total, 12, part, f"{part} {n:,}")
        out.rect(key, y + 22, 9, 9, part)
        out.text(key + 14, y + 30, said, "ink", 10)
        bar, key = bar + wide * n / total, key + 30 + text_width(said, 10)
    out.paste(page, 0, out.box[3] + 24)
    unit, y = 2 ** round(math.log2(90 / s)), out.box[3] + 34
    out.path(0, y - 7, f"v8m0 -4h{unit * s:.2f}m0 -4v8")
    note = (f"{unit:,} numbers, along both sides of every tensor (no side is drawn under {THIN} pixels). Upright: the side that "
            "meets the stream; across: heads, hidden units or ids. A zigzag cuts a vocabulary short. Lines bound heads; those "
            "tinted share a key head. Stacked: experts.")
    for k, line in enumerate(textwrap.wrap(note, int((wide - unit * s - 12) / text_width("x", 9)))):
        out.text(unit * s + 12, y + 13 * k, line, "soft")
    light, dark = ("".join(f".{name}{{color:{pair[mode]}}}" for name, pair in COLOURS.items()) for mode in (0, 1))
    w, h = round(out.box[2] + 40), round(out.box[3] + 40)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-20 -20 {w} {h}" width="{w}" height="{h}">\n'
            f"<style>{STYLE}\n{light}\n@media(prefers-color-scheme:dark){{{dark}}}</style>\n"
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="line" d="M0 1L7 4L0 7Z"/></marker></defs>\n'
            f'<rect class="page" x="-20" y="-20" width="{w}" height="{h}"/>\n{"".join(out.svg)}\n</svg>\n')


# ---- Hugging Face folders (every architecture of the list, in and out) ----

# An architecture is a table, read in both directions: opening a folder turns their config.json into our fields and splits
# their tensors into ours, saving does the reverse. The architecture of a model of ours is found by trying: it is the
# first whose config.json, read back, gives the same fields. (DeepSeek LLM is a llama, and so are a few others.)

@dataclass
class Arch:
    cls: str                                     # their class
    keys: dict                                   # {our field: (their key, its value where left out[, {their value: ours}])}
    usual: dict                                  # {their key: its value where left out}: differs from the above, or for `parts`
    fixed: dict                                  # {our field: what this architecture always has}
    names: list                                  # Names of the tensors
    parts: tuple = ()                            # (read(hf, ours), write(c, hf)): what is not one key for one field
    only: dict = field(default_factory=dict)     # {their key: values implemented}: it changes the maths, others are refused
    renames: tuple = ()                          # (pattern, replacement): other names found on disk
    ignored: str = "$^"                          # tensors that say nothing to this model
    whole_heads: bool = False                    # their class refuses widths that n_head does not divide

    def renamed(self, name):
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


# A row of an architecture's table of tensors:
#     theirs   their name; {i} stands for the layer, {n} for a layer after the last, {e} for the expert
#     ours     our names, several where theirs holds them one after the other
#     how      it is stored: "turned" ([in, out], GPT-2), "heads" (ours one after the other in every head), "row" ([H, 1, K]),
#              "one" (ours has an axis of one expert before), "columns" ([E, in, out], the columns of ours in turn, gpt-oss)
#     when     a module of ours that must be in the block, or with - must not
Names = namedtuple("Names", "theirs ours how when")


def _named(table, theirs="", ours=""):
    """[Names] of {their name: ours, or (ours, how, when)} inside one module."""
    rows = {name: (row, "", "") if isinstance(row, str) else row for name, row in table.items()}
    return [Names(theirs + name, [ours + n for n in row.split()], how, when) for name, (row, how, when) in rows.items()]


FACTOR = dict(rope_factor="factor")
LONG = FACTOR | dict(rope_original="original_max_position_embeddings")
ROPE = {                                         # rope_type: {our field: key of their dict}
    "default": {}, "linear": FACTOR, "dynamic": FACTOR,
    "llama3": LONG | dict(rope_low="low_freq_factor", rope_high="high_freq_factor"),
    "yarn": LONG | dict(rope_beta_fast="beta_fast", rope_beta_slow="beta_slow", rope_truncate="truncate",
                        rope_attn_factor="attention_factor", rope_mscale="mscale", rope_mscale_all="mscale_all_dim"),
}


TWINS = (("num_experts", "num_local_experts"), ("num_nextn_predict_layers", "num_mtp_layers"))      # two keys for one thing


def _one_spelling(config):
    """RoPE as the hub spells it: rope_theta and partial_rotary_factor at the top, the rest in rope_scaling. Transformers 5
    writes all of it in rope_parameters, for Gemma 3 one dict for each type of layer. A key that has a twin is there twice."""
    config = {b: config[a] for pair in TWINS for a, b in (pair, pair[::-1]) if a in config} | config
    new, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    near = new.get("sliding_attention") or {}
    rope = (new.get("full_attention") or {}) | scaling if near or "full_attention" in new else scaling or new
    if near.get("rope_type", "default") != "default":
        raise UsageError(f"config.json scales the RoPE of sliding layers ({near}), which is not implemented; leave it unscaled")
    top = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}
    return config | top | ({"rope_local_base_freq": near["rope_theta"]} if "rope_theta" in near else {}) | dict(rope_scaling=rope)


def _read_rope(hf, ours):
    rope = hf["rope_scaling"] or hf.get("usual_rope", {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE:
        raise UsageError(f"config.json asks for RoPE scaling {kind!r}, which is not implemented; these are: {list(ROPE)}")
    if "rope_original" in ROPE[kind] and hf.get("original_max_position_embeddings"):                # Phi's place for it wins
        rope = rope | {"original_max_position_embeddings": hf["original_max_position_embeddings"]}
    ours |= dict(rope_theta=_number("rope_theta", hf), rope_scaling="none" if kind == "default" else kind)
    ours |= {name: _number(name, rope, key) for name, key in ROPE[kind].items() if rope.get(key) is not None}
    if kind == "yarn" and "rope_original" in ours:
        ours.setdefault("rope_factor", ours["seq_len"] / ours["rope_original"])
    if kind != "default" and "rope_factor" not in ours:
        raise UsageError(f"config.json asks for RoPE scaling {kind!r} without a factor; give one, such as factor=4.0")


def _write_rope(c, hf):
    kind = c["rope_scaling"]
    scaling = {key: c[name] for name, key in ROPE.get(kind, {}).items() if c[name] or key == "truncate"}
    hf |= dict(rope_theta=c["rope_theta"], rope_scaling=None if kind == "none" else dict(rope_type=kind, **scaling))
    if kind == "dynamic":                        # begins beyond this in their code
        hf["max_position_embeddings"] = c["rope_original"]


MIXERS = {"full_attention": "gqa", "sliding_attention": "swa", "linear_attention": "lightning"}     # layer type: our mixer


def _layers(usual, reads=("layer_types",), windowed="swa", choices=("full_attention", "sliding_attention")):
    """The mixers of all layers: layer_types, or where it is left out choices[usual(hf, i)] of layer i. A sliding_window is
    meant for the mixer `windowed` ("gqa": for every softmax layer)."""
    def read(hf, ours):
        L, off = ours["n_layer"], "use_sliding_window" in reads and not hf["use_sliding_window"]
        window = 0 if off else hf["sliding_window"] or 0
        types = "layer_types" in reads and hf.get("layer_types") or [choices[bool(usual(hf, i))] for i in range(L)]
        if len(types) != L or not set(types) <= MIXERS.keys():
            raise UsageError(f"config.json has layer_types={types} for {L} layers; give each one of {list(MIXERS)}")
        names = ["swa" if window and MIXERS[t] == windowed else MIXERS[t] for t in types]
        if "swa" in names and window < 1:
            raise UsageError("config.json has sliding layers without a window; give sliding_window, such as 4096")
        period = next(n for n in range(1, L + 1) if all(name == names[i % n] for i, name in enumerate(names)))
        runs = [(name, len(list(run))) for name, run in itertools.groupby(names[:period])]
        ours |= dict(window=window if "swa" in names else 0, attn=names[0] if period == 1 else "gqa",
                     layers="" if period == 1 else ",".join(name if n == 1 else f"{name}*{n}" for name, n in runs))

    def write(c, hf):
        types = {ours: theirs for theirs, ours in MIXERS.items()} | ({"swa": "full_attention"} if windowed == "gqa" else {})
        if not set(c["layers"]) <= types.keys():
            raise KeyError("layers")
        hf["sliding_window"] = c["window"] or (None if windowed == "gqa" else c["seq_len"])
        if "layer_types" in reads:
            hf["layer_types"] = [types[name] for name in c["layers"]]
        if "use_sliding_window" in reads:        # older versions know the pattern by its last full layer
            late = max((i + 1 for i, name in enumerate(c["layers"]) if name == "gqa"), default=0)
            hf |= dict(use_sliding_window=c["window"] > 0, max_window_layers=late)
    return read, write


def _read_t5(hf, ours):
    gated, act = hf["feed_forward_proj"].startswith("gated-"), hf["feed_forward_proj"].split("-")[-1]
    act = "gelu_new" if hf["feed_forward_proj"] == "gated-gelu" else act
    if (hf.get("is_gated_act", gated), hf.get("dense_act_fn", act)) != (gated, act):
        raise UsageError(f"config.json has feed_forward_proj={hf['feed_forward_proj']!r}, which means is_gated_act={gated} and "
                         f"dense_act_fn={act!r}; make them agree or leave them out")
    scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings") is not False)
    ours |= dict(n_layer=ours["n_layer"] or ours["n_enc_layer"], logit_scale=ours["n_embd"] ** -0.5 if scaled else 1.0,
                 tie_embeddings=True)            # whatever is said of it: an lm_head.weight on disk decides


def _write_t5(c, hf):
    hf |= dict(tie_word_embeddings=c["tie_embeddings"], scale_decoder_outputs=c["logit_scale"] != 1,
               pad_token_id=c["start_token"])


def _read_tnl(hf, ours):
    uses = [bool(use) for use in hf["linear_use_lrpe_list"]] or [False] * ours["n_layer"]
    if len(uses) != ours["n_layer"] or uses != sorted(uses, reverse=True):
        raise UsageError(f"config.json has linear_use_lrpe_list={hf['linear_use_lrpe_list']}, which is not implemented for "
                         f"{ours['n_layer']} layers; use ones for the first layers and zeros for the rest")
    ours |= dict(pos="lrpe" if any(uses) else "none", lrpe_layers=sum(uses), head_dim=hf["hidden_dim"] // ours["n_head"])
    ours["d_ff"] = ours["n_embd"] if ours["d_ff"] < 0 else ours["d_ff"]


def _write_tnl(c, hf):
    first = c["lrpe_layers"] if c["pos"] == "lrpe" else 0
    hf |= dict(linear_use_lrpe_list=[int(i < first) for i in range(c["n_layer"])], hidden_dim=c["head_dim"] * c["n_head"])


def _read_mla(hf, ours):
    ours["head_dim"] = ours["v_head_dim"]        # every width is said: n_head need not divide n_embd
    if ours["rope_scaling"] != "none":           # sharpens the scores with any scaling, not with YaRN alone
        ours["rope_mscale_all"] = _number("rope_mscale_all", {"mscale_all_dim": None} | hf["rope_scaling"], "mscale_all_dim")


def _write_mla(c, hf):
    hf["q_lora_rank"] = c["q_lora_rank"] or None
    if c["rope_scaling"] != "none" and c["rope_mscale_all"]:
        hf["rope_scaling"]["mscale_all_dim"] = c["rope_mscale_all"]


def _groups(free, limited):
    """Group-limited choice of experts; free and limited are names of topk_method without and with it."""
    def read(hf, ours):
        if free != limited and hf["topk_method"] == free or ours["n_group"] < 2:
            one = int(ours["n_expert"] > 1)      # one group of all: their order of choice, so that gates sum to the same bit
            ours |= dict(n_group=one, top_group=one)

    def write(c, hf):
        hf |= dict(n_group=c["n_group"] or 1, topk_group=c["top_group"] or 1, topk_method=limited if c["n_group"] else free)
    return read, write


def _write_dense(c, hf):
    """first_k_dense_replace: dense blocks come first."""
    dense = c["dense_layers"].split(",") if c["dense_layers"] else []
    if dense != [str(i) for i in range(len(dense))]:
        raise KeyError("dense_layers")
    hf["first_k_dense_replace"] = len(dense)


def _read_floor(hf, ours):
    ours["head_dim"] = ours["head_dim"] or ours["n_embd"] // ours["n_head"]        # their class rounds down


def _read_sparse(hf, ours):
    dense = hf["mlp_only_layers"] or []
    if not all(type(i) is int for i in dense) or _number("moe_every", hf, "decoder_sparse_step") < 1:
        raise UsageError(f"config.json has mlp_only_layers={dense}, decoder_sparse_step={hf['decoder_sparse_step']}; expected "
                         "numbers of layers, such as [0, 5], and a step such as 1")
    ours |= dict(moe_every=hf["decoder_sparse_step"],
                 dense_layers=",".join(str(i) for i in sorted(set(dense)) if 0 <= i < ours["n_layer"]))


def _write_sparse(c, hf):
    hf |= dict(decoder_sparse_step=1, mlp_only_layers=[int(i) for i in c["dense_layers"].split(",") if i])


def _write_oss(c, hf):
    if c["rope_scaling"] == "none":              # nothing said means YaRN
        hf["rope_scaling"] = dict(rope_type="default")


PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "relu2": "relu2",
         "silu": "silu", "swish": "silu", "mish": "mish", "tanh": "tanh", "sigmoid": "sigmoid"}
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh", "gelu": "geglu",
         "relu": "reglu", "sigmoid": "glu", "linear": "bilinear"}
T5_MLP = {"wi": ("mlp.w_up", "", "-mlp.w_gate"), "wi_0": "mlp.w_gate", "wi_1": ("mlp.w_up", "", "mlp.w_gate"), "wo": "mlp.w_down"}
T5_ACT = {"gated-gelu": "geglu_tanh", "gated-silu": "swiglu", "gated-relu": "reglu"} | PLAIN
ONLY = {"quantization_config": (None,), "pruned_heads": (None, {}), "partial_rotary_factor": (None, 1.0)}        # everywhere

KEYS = dict(vocab_size=("vocab_size", 32000), n_layer=("num_hidden_layers", 32), n_embd=("hidden_size", 4096),
            n_head=("num_attention_heads", 32), d_ff=("intermediate_size", 11008), seq_len=("max_position_embeddings", 2048),
            tie_embeddings=("tie_word_embeddings", False))
LLAMA_KEYS = KEYS | dict(n_kv_head=("num_key_value_heads", None), head_dim=("head_dim", None), norm_eps=("rms_norm_eps", 1e-6),
                         act=("hidden_act", "silu", GATED), attn_dropout=("attention_dropout", 0.0))
BIASES = dict(qkv_bias=("attention_bias", False), out_bias=("attention_bias", False))
GLM_KEYS = dict(qkv_bias=("attention_bias", True), rope_fraction=("partial_rotary_factor", 0.5))
GEMMA_KEYS = BIASES | dict(act=("hidden_activation", "gelu_pytorch_tanh", GATED), logit_softcap=("final_logit_softcapping", 30.0))
MLA_KEYS = BIASES | dict(head_dim=None, **{name: (name, usual) for name, usual in (
    ("q_lora_rank", 1536), ("kv_lora_rank", 512), ("qk_nope_head_dim", 128), ("qk_rope_head_dim", 64), ("v_head_dim", 128))})
SWIGLU_ONLY = dict(act=("hidden_act", "silu", {"silu": "swiglu"}))
MOE_KEYS = SWIGLU_ONLY | dict(n_active=("num_experts_per_tok", 8), d_expert=("moe_intermediate_size", 1407),
                              norm_gates=("norm_topk_prob", False))
SHARED_KEYS = MOE_KEYS | dict(n_expert=("n_routed_experts", 64), n_shared_expert=("n_shared_experts", 2),
                              n_dense_layer=("first_k_dense_replace", 0))
V3_KEYS = SHARED_KEYS | dict(n_group=("n_group", 8), top_group=("topk_group", 4), routed_scale=("routed_scaling_factor", 2.5),
                             mtp=("num_nextn_predict_layers", 1))
MIXTRAL_KEYS = SWIGLU_ONLY | dict(d_ff=None, d_expert=("intermediate_size", 14336), n_expert=("num_local_experts", 8),
                                  n_active=("num_experts_per_tok", 2))
SPARSE = dict(moe=True, router="softmax", n_shared_expert=0, n_dense_layer=0, bias_lr=0.0)
V3_ROUTER = dict(moe=True, router="sigmoid", group_score="top2")
V3_ONLY = dict(scoring_func=("sigmoid",), topk_method=("noaux_tc",), moe_layer_freq=(1,))
MISTRAL = dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
QWEN = dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
            use_sliding_window=False, sliding_window=4096, max_window_layers=28)
GLM = dict(vocab_size=151552, intermediate_size=13696, num_hidden_layers=40, num_key_value_heads=2, head_dim=128,
           max_position_embeddings=131072, rms_norm_eps=1.5625e-7)
GEMMA = dict(vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
             num_key_value_heads=4, head_dim=256, max_position_embeddings=8192, tie_word_embeddings=True,
             query_pre_attn_scalar=256, sliding_window=4096)

QKVO = {f"self_attn.{p}_proj": f"attn.w_{p}" for p in "qkvo"} | {f"self_attn.{p}_norm": f"attn.{p}_norm" for p in "qk"}
SWIGLU = {f"mlp.{p}_proj": f"mlp.w_{p}" for p in ("gate", "up", "down")}
FUSED = {"mlp.gate_up_proj": "mlp.w_gate mlp.w_up", "mlp.down_proj": "mlp.w_down"}
MIXTRAL = {"block_sparse_moe.gate": "mlp.router"} | {f"block_sparse_moe.experts.{{e}}.{theirs}.weight": f"mlp.experts.w_{ours}"
                                                     for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down"))}
EXPERTS = {f"mlp.experts.{{e}}.{p}_proj.weight": f"mlp.experts.w_{p}" for p in ("gate", "up", "down")} | {"mlp.gate": "mlp.router"}
SHARED = EXPERTS | {f"mlp.shared_experts.{p}_proj.weight": (f"mlp.shared.w_{p}", "one", "") for p in ("gate", "up", "down")}
V3_MLP = SWIGLU | SHARED | {"mlp.gate.e_score_correction_bias": "mlp.bias_E"}
OSS_MOE = {"mlp.router": "mlp.router", "mlp.experts.gate_up_proj": ("mlp.experts.w_gate mlp.experts.w_up", "columns", ""),
           "mlp.experts.gate_up_proj_bias": ("mlp.experts.b_gate mlp.experts.b_up", "columns", ""),
           "mlp.experts.down_proj": ("mlp.experts.w_down", "columns", ""), "mlp.experts.down_proj_bias": "mlp.experts.b_down"}
MLA = {"self_attn.q_proj": ("attn.w_q", "", "-attn.w_dq"), "self_attn.q_a_proj": "attn.w_dq",
       "self_attn.q_a_layernorm.weight": "attn.q_gain", "self_attn.q_b_proj": ("attn.w_q", "", "attn.w_dq"),
       "self_attn.kv_a_proj_with_mqa": "attn.w_dkv", "self_attn.kv_a_layernorm.weight": "attn.kv_gain",
       "self_attn.kv_b_proj": "attn.w_ukv", "self_attn.o_proj": "attn.w_o"}
LIGHTNING = {name: (ours, "", "-attn.norm") for name, ours in QKVO.items()} | {
    "self_attn.qkv_proj": ("attn.w_q attn.w_k attn.w_v", "heads", "attn.norm"), "self_attn.norm": "attn.norm",
    "self_attn.out_proj": ("attn.w_o", "", "attn.norm"), "self_attn.output_gate": "attn.w_gate"}
PRE = {"input_layernorm": "res1.pre", "post_attention_layernorm": "res2.pre"}
POST = {"post_attention_layernorm": "res1.post", "post_feedforward_layernorm": "res2.post"}
SANDWICH = POST | {"input_layernorm": "res1.pre", "pre_feedforward_layernorm": "res2.pre"}
GLM4 = PRE | {"post_self_attn_layernorm": "res1.post", "post_mlp_layernorm": "res2.post"}
BARE = (r"^(?=(embed_tokens|layers|norm)\.)", "model.")         # saved without the wrapper that holds the head
SCALAR = (lambda hf, ours: ours.update(attn_scale=hf["query_pre_attn_scalar"] ** -0.5),
          lambda c, hf: hf.update(query_pre_attn_scalar=round(c["attn_scale"] ** -2)))     # their class takes whole numbers
GEMMA_BLOCK = dict(norm_at="sandwich", norm_one_plus=True, embed_scale=True)
QWEN_LAYERS = _layers(lambda hf, i: hf["use_sliding_window"] and hf["sliding_window"] and i >= hf["max_window_layers"],
                      ("layer_types", "use_sliding_window"))


def _decoder(block):
    return (_named({"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"})
            + _named(block, "model.layers.{i}.", "blocks.{i}."))


def _mtp(block):
    """Names of the modules that predict further tokens: they follow the last layer."""
    own = {"enorm": "norm_embed", "hnorm": "norm_hidden", "eh_proj": "proj", "shared_head.norm": "norm"}
    return _named(own, "model.layers.{n}.", "mtp.{i}.") + _named(block, "model.layers.{n}.", "mtp.{i}.block.")


def _llama_like(cls, defaults, keys={}, fixed={}, block=PRE | QKVO | SWIGLU, parts=(), **rest):
    keys = {name: key for name, key in (LLAMA_KEYS | keys).items() if key}
    names = _decoder(block) + (_mtp(block) if "mtp" in keys else [])
    return Arch(cls, keys, dict(rope_theta=10000.0) | defaults, dict(attn="gqa", pos="rope") | fixed, names,
                ((_read_rope, _write_rope), *parts), **dict(renames=(BARE,)) | rest)


def _t5_stack(stack, ours, last):
    """Names of the encoder, or of the decoder, whose MLP comes third after cross attention."""
    rows = {f"{last}.layer_norm": "res2.pre"} | {f"{last}.DenseReluDense.{name}": row for name, row in T5_MLP.items()}
    rows |= {"0.layer_norm": "res1.pre"} | {f"0.SelfAttention.{p}": f"attn.w_{p}" for p in "qkvo"}
    cross = {"1.layer_norm": "res_cross.pre"} | {f"1.EncDecAttention.{p}": f"cross.w_{p}" for p in "qkvo"}
    return (_named({f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias": f"{ours}rel_bias",
                    f"{stack}.final_layer_norm": f"{ours}norm"})
            + _named(rows | (cross if last == 2 else {}), f"{stack}.block.{{i}}.layer.", f"{ours}blocks.{{i}}."))


CONVERT = {                                      # their model_type
    "gpt2": Arch(
        "GPT2LMHeadModel",
        dict(vocab_size=("vocab_size", 50257), n_layer=("n_layer", 12), n_embd=("n_embd", 768), n_head=("n_head", 12),
             d_ff=("n_inner", None), seq_len=("n_positions", 1024), norm_eps=("layer_norm_epsilon", 1e-5),
             act=("activation_function", "gelu_new", PLAIN), tie_embeddings=("tie_word_embeddings", True),
             scale_by_layer=("scale_attn_by_inverse_layer_idx", False), attn_dropout=("attn_pdrop", 0.1),
             resid_dropout=("resid_pdrop", 0.1), embed_dropout=("embd_pdrop", 0.1)), {},
        dict(norm="layer", pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True),
        _named({"transformer.wte": "embed", "transformer.wpe": "pos_embed", "transformer.ln_f": "norm", "lm_head": "head"})
        + _named({"ln_1": "res1.pre", "ln_2": "res2.pre", "attn.c_attn": ("attn.w_q attn.w_k attn.w_v", "turned", ""),
                  "attn.c_proj": ("attn.w_o", "turned", ""), "mlp.c_fc": ("mlp.w_up", "turned", ""),
                  "mlp.c_proj": ("mlp.w_down", "turned", "")}, "transformer.h.{i}.", "blocks.{i}."),
        only=dict(add_cross_attention=(False,), scale_attn_weights=(True,)),
        renames=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),)),
    "llama": _llama_like("LlamaForCausalLM", {}, BIASES | dict(mlp_bias=("mlp_bias", False)), whole_heads=True),
    "mistral": _llama_like("MistralForCausalLM", MISTRAL, parts=[_layers(lambda hf, i: False, (), "gqa")]),
    "qwen2": _llama_like("Qwen2ForCausalLM", QWEN, {}, dict(qkv_bias=True), parts=[QWEN_LAYERS]),
    "qwen3": _llama_like("Qwen3ForCausalLM", QWEN | dict(head_dim=128), BIASES, dict(qk_norm="head"), parts=[QWEN_LAYERS]),
    "olmo2": _llama_like("Olmo2ForCausalLM", dict(vocab_size=50304, rms_norm_eps=1e-5), BIASES,
                         dict(norm_at="branch_post", qk_norm="width"), POST | QKVO | SWIGLU),
    "glm": _llama_like("GlmForCausalLM", GLM, GLM_KEYS, dict(rope_layout="interleaved"), PRE | QKVO | FUSED),
    "glm4": _llama_like("Glm4ForCausalLM", GLM, GLM_KEYS, dict(rope_layout="interleaved", norm_at="sandwich"),
                        GLM4 | QKVO | FUSED),
    "gemma2": _llama_like(
        "Gemma2ForCausalLM", GEMMA, GEMMA_KEYS | dict(attn_softcap=("attn_logit_softcapping", 50.0)), GEMMA_BLOCK,
        SANDWICH | QKVO | SWIGLU, [SCALAR, _layers(lambda hf, i: i % 2 == 0)], whole_heads=True,
        only=dict(use_bidirectional_attention=(None, False))),
    "gemma3_text": _llama_like(
        "Gemma3ForCausalLM",
        GEMMA | dict(vocab_size=262208, max_position_embeddings=131072, rope_theta=1e6, sliding_window_pattern=6,
                     final_logit_softcapping=None),
        GEMMA_KEYS | dict(rope_local_theta=("rope_local_base_freq", 1e4)), GEMMA_BLOCK | dict(qk_norm="head"),
        SANDWICH | QKVO | SWIGLU, [SCALAR, _layers(lambda hf, i: (i + 1) % hf["sliding_window_pattern"])], whole_heads=True,
        only=dict(use_bidirectional_attention=(None, False), attn_logit_softcapping=(None,)),
        renames=((r"^(model\.)?language_model\.(model\.)?(?=embed|layers|norm)", "model."),
                 (r"^language_model\.lm_head", "lm_head"), BARE),
        ignored=r"^(model\.)?(vision_tower|multi_modal_projector)\."),
    "minimax": _llama_like(
        "MiniMaxForCausalLM", MISTRAL | dict(rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None, attn_type_list=None),
        MIXTRAL_KEYS | {f"res_{factor}{ours}": (f"{theirs}_{factor}_factor", 1) for factor in ("alpha", "beta")
           for ours, theirs in (("", "full_attn"), ("_linear", "linear_attn"), ("_mlp", "mlp"))},
        SPARSE | dict(norm_at="prenorm_residual"),
        PRE | MIXTRAL | LIGHTNING, [_layers(lambda hf, i: (hf["attn_type_list"] or [1, 0] * (i + 1))[i], ("layer_types",), "gqa",
                                            ("linear_attention", "full_attention"))], only=dict(rotary_dim=(None,)),
        ignored=r"self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)$"),
    "mixtral": _llama_like("MixtralForCausalLM", MISTRAL | dict(rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None),
                           MIXTRAL_KEYS, SPARSE, PRE | MIXTRAL | QKVO, [_layers(lambda hf, i: False, (), "gqa")]),
    "qwen3_moe": _llama_like(
        "Qwen3MoeForCausalLM", QWEN | dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_key_value_heads=4,
                                           moe_intermediate_size=768, decoder_sparse_step=1, mlp_only_layers=None),
        BIASES | MOE_KEYS | dict(n_expert=("num_experts", 128)), SPARSE | dict(qk_norm="head"), PRE | QKVO | SWIGLU | EXPERTS,
        [_layers(lambda hf, i: False, ("use_sliding_window",), "gqa"), (_read_sparse, _write_sparse)]),
    "olmoe": _llama_like(
        "OlmoeForCausalLM", dict(vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16,
                                 max_position_embeddings=4096, rms_norm_eps=1e-5),
        BIASES | MOE_KEYS | dict(d_ff=None, head_dim=None, d_expert=("intermediate_size", 2048), n_expert=("num_experts", 64),
                                 clip_qkv=("clip_qkv", None)), SPARSE | dict(qk_norm="width"), PRE | QKVO | EXPERTS),
    "deepseek": _llama_like(                                     # their own class, not among those of transformers
        "DeepseekForCausalLM", dict(vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=28,
                                    num_attention_heads=16, num_experts_per_tok=6, moe_intermediate_size=1408),
        BIASES | SHARED_KEYS, dict(moe=True, router="softmax", bias_lr=0.0), PRE | QKVO | SWIGLU | SHARED,
        [(lambda hf, ours: None, _write_dense)], only=dict(scoring_func=("softmax",), moe_layer_freq=(1,))),
    "deepseek_v2": _llama_like(
        "DeepseekV2ForCausalLM", dict(vocab_size=102400, topk_method="greedy", num_experts_per_tok=None),
        MLA_KEYS | SHARED_KEYS | dict(norm_gates=None, n_group=("n_group", None), top_group=("topk_group", None),
                                      routed_scale=("routed_scaling_factor", 1.0)),
        dict(attn="mla", rope_layout="interleaved", moe=True, router="softmax", norm_gates=False, group_score="max", bias_lr=0.0),
        PRE | MLA | SWIGLU | SHARED,
        [(_read_mla, _write_mla), _groups("greedy", "group_limited_greedy"), (lambda hf, ours: None, _write_dense)],
        only=dict(scoring_func=("softmax",), topk_method=("greedy", "group_limited_greedy"), moe_layer_freq=(1,),
                  mlp_bias=(False,), norm_topk_prob=(False, None))),                 # their code and transformers' disagree on it
    "deepseek_v3": _llama_like(
        "DeepseekV3ForCausalLM", dict(
            vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
            num_attention_heads=128, num_key_value_heads=128, max_position_embeddings=4096, n_shared_experts=1,
            n_routed_experts=256, first_k_dense_replace=3, norm_topk_prob=True),
        MLA_KEYS | V3_KEYS | dict(rope_layout=("rope_interleave", True, {True: "interleaved", False: "half"})),
        V3_ROUTER | dict(attn="mla"), PRE | MLA | V3_MLP, [(_read_mla, _write_mla), _groups("noaux_tc", "noaux_tc"),
                                                           (lambda hf, ours: None, _write_dense)], only=V3_ONLY),
    "glm4_moe": _llama_like(
        "Glm4MoeForCausalLM", dict(
            vocab_size=151552, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=46, num_attention_heads=96,
            num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, n_shared_experts=1, n_routed_experts=128,
            routed_scaling_factor=1.0, n_group=1, topk_group=1, first_k_dense_replace=1, norm_topk_prob=True),
        V3_KEYS | dict(qkv_bias=("attention_bias", False), rope_fraction=("partial_rotary_factor", 0.5),
                       qk_norm=("use_qk_norm", False, {False: "none", True: "head"})),
        V3_ROUTER, PRE | QKVO | V3_MLP, [(_read_floor, _write_dense), _groups("noaux_tc", "noaux_tc")], only=V3_ONLY),
    "gpt_oss": _llama_like(
        "GptOssForCausalLM", dict(
            vocab_size=201088, hidden_size=2880, num_hidden_layers=36, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
            max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=150000.0, sliding_window=128, attention_bias=True,
            usual_rope=dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                            original_max_position_embeddings=4096)),
        BIASES | MIXTRAL_KEYS | dict(act=None, d_expert=("intermediate_size", 2880), n_expert=("num_local_experts", 128),
                                     n_active=("num_experts_per_tok", 4)),
        SPARSE | dict(router="chosen", router_bias=True, expert_act="swiglu_oss", expert_bias=True, sinks=True),
        PRE | QKVO | OSS_MOE | {"self_attn.sinks": "attn.sinks"},
        [_layers(lambda hf, i: (i + 1) % 2), (lambda hf, ours: None, _write_oss)],
        only=dict(hidden_act=("silu",), swiglu_alpha=(1.702,), swiglu_limit=(7.0,))),
    "transnormer": Arch(
        "TransnormerForCausalLM",
        dict(vocab_size=("vocab_size", 64000), n_layer=("decoder_layers", 24), n_embd=("decoder_embed_dim", 1024),
             n_head=("decoder_attention_heads", 8), d_ff=("glu_dim", 2816), seq_len=("max_position_embeddings", 2048),
             tie_embeddings=("tie_word_embeddings", True), embed_scale=("no_scale_embedding", False, {False: True, True: False})),
        dict(hidden_dim=1024, linear_use_lrpe_list=[]), dict(attn="transnormer", norm="srms", norm_eps=1e-6, act="bilinear"),
        _decoder({"token_mixer.qkvu_proj": "attn.w_q attn.w_k attn.w_v attn.w_gate", "token_mixer.out_proj": "attn.w_o",
                  "token_mixer.lrpe.theta": ("attn.lrpe", "row", ""), "channel_mixer.l1": "mlp.w_gate",
                  "channel_mixer.l2": "mlp.w_up", "channel_mixer.l3": "mlp.w_down"}),
        [(_read_tnl, _write_tnl)], dict(norm_type=("simplermsnorm",), bias=(False,), linear_act_fun=("silu", "swish"))),
    "bert": Arch(
        "BertForMaskedLM",
        KEYS | dict(act=("hidden_act", "gelu", PLAIN), norm_eps=("layer_norm_eps", 1e-12), n_token_type=("type_vocab_size", 2),
                    attn_dropout=("attention_probs_dropout_prob", 0.1), resid_dropout=("hidden_dropout_prob", 0.1),
                    embed_dropout=("hidden_dropout_prob", 0.1)),
        dict(vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
             max_position_embeddings=512, tie_word_embeddings=True),
        dict(arch="encoder", norm="layer", norm_at="post", pos="learned", embed_norm=True, qkv_bias=True, out_bias=True,
             mlp_bias=True),
        _named({"word_embeddings": "embed", "position_embeddings": "pos_embed", "token_type_embeddings": "type_embed",
                "LayerNorm": "embed_norm"}, "bert.embeddings.") + _named({"bert.pooler.dense": "pooler"})
        + _named({"transform.dense": "mlm_dense", "transform.LayerNorm": "mlm_norm", "bias": "head_bias",
                  "decoder.bias": "head_bias", "decoder": "head"}, "cls.predictions.")
        + _named({"attention.self.query": "attn.w_q", "attention.self.key": "attn.w_k", "attention.self.value": "attn.w_v",
                  "attention.output.dense": "attn.w_o", "attention.output.LayerNorm": "res1.after",
                  "intermediate.dense": "mlp.w_up", "output.dense": "mlp.w_down", "output.LayerNorm": "res2.after"},
                 "bert.encoder.layer.{i}.", "blocks.{i}."),
        [(lambda hf, ours: None, lambda c, hf: hf.update(architectures=["BertModel" if c["headless"] else "BertForMaskedLM"]))],
        dict(is_decoder=(False,), add_cross_attention=(False,), position_embedding_type=("absolute",)),
        ((r"^(?=(embeddings|encoder|pooler)\.)", "bert."), (r"LayerNorm\.gamma$", "LayerNorm.weight"),
         (r"LayerNorm\.beta$", "LayerNorm.bias"), (r"^cls\.predictions\.bias$", "cls.predictions.decoder.bias")),
        r"^cls\.seq_relationship\."),
    "t5": Arch(
        "T5ForConditionalGeneration",
        dict(vocab_size=("vocab_size", 32128), n_embd=("d_model", 512), head_dim=("d_kv", 64), d_ff=("d_ff", 2048),
             n_enc_layer=("num_layers", 6), n_layer=("num_decoder_layers", None), n_head=("num_heads", 8),
             t5_buckets=("relative_attention_num_buckets", 32), t5_distance=("relative_attention_max_distance", 128),
             seq_len=("n_positions", 512), norm_eps=("layer_norm_epsilon", 1e-6), start_token=("decoder_start_token_id", 0),
             act=("feed_forward_proj", "relu", T5_ACT), resid_dropout=("dropout_rate", 0.1)), {},
        dict(arch="encdec", attn="mha", pos="t5", attn_scale=1.0),
        _named({"shared": "embed", "lm_head": "head"}) + _t5_stack("encoder", "enc_", 1) + _t5_stack("decoder", "", 2),
        [(_read_t5, _write_t5)], dict(is_decoder=(False,), is_encoder_decoder=(True,), tie_encoder_decoder=(None, False)),
        ((r"^(encoder|decoder)\.embed_tokens\.", "shared."),), r"EncDecAttention\.relative_attention_bias"),
}


def _number(name, hf, key=None):
    """hf[key] as the type of our field; null becomes 0, which with us is off or automatic."""
    value, default = hf[key or name], ModelConfig.__dataclass_fields__[name].default
    if value is not None and (not isinstance(value, (bool, int, float)) or isinstance(default, int) and value % 1):
        raise UsageError(f"config.json has {key or name}={value!r}; expected a number such as {default}")
    return type(default)(value or 0)


def _fields(arch, config):
    """{our field: value} of their config.json. Dropout stays off: an opened model computes what theirs does in evaluation."""
    hf, ours = {key: usual for key, usual, *_ in arch.keys.values()} | arch.usual | config, dict(arch.fixed)
    known = {key for key, *_ in arch.keys.values()}
    for key, values in (ONLY | arch.only).items():
        if key not in known and hf.get(key, values[0]) not in values:
            raise UsageError(f"config.json has {key}={hf[key]!r}, which changes the maths and is not implemented; "
                             f"it can be {values[0]!r}")
    for name, (key, usual, *choices) in arch.keys.items():
        if choices and hf[key] not in choices[0] or re.match("res_|rope_local", name) and not hf[key]:
            raise UsageError(f"config.json has {key}={hf[key]!r}, which is not implemented; it can be "
                             f"{', '.join(map(repr, choices[0] if choices else [usual]))}")
        ours[name] = choices[0][hf[key]] if choices else _number(name, hf, key)
    ours["n_kv_head"] = ours.get("n_kv_head") or ours["n_head"]
    for read, _ in arch.parts:
        read(hf, ours)
    return {name: value for name, value in ours.items() if not name.endswith("dropout")}


def _described(arch, c):
    """Their config.json of our fields, as old and new transformers read it. KeyError: a field without a place there."""
    hf = dict(architectures=[arch.cls])
    for name, (key, _, *choices) in arch.keys.items():
        hf[key] = {ours: theirs for theirs, ours in reversed(choices[0].items())}[c[name]] if choices else c[name]
        if (name.endswith("softcap") or name == "clip_qkv") and not c[name]:
            hf[key] = None
    for _, write in arch.parts:
        write(c, hf)
    return hf


TRAINING = (r"ac|.*_dropout|init_std|seed|tile|embed_grad_shrink|bias_lr|bias_until|aux_.*|z_alpha|n_device|device_alpha|comm_alpha|dispatch|"
            "mtp_weight.*|mtp_late|z_loss|label_smoothing")  # fields that do not change what is computed


def _canonical(cfg):
    """{field: value} with every automatic value worked out."""
    c, plan = {name: getattr(cfg, name) for name in ModelConfig.__dataclass_fields__}, layer_plan(cfg)
    kinds = {layer.attn for layer in plan}
    alike = {"mha", "gqa", "mqa", "swa"}                         # one mixer: its heads and its window say the rest
    heads = sorted({ATTENTION[layer.attn].kv_heads(cfg) for layer in plan if layer.attn in alike} or {cfg.n_head})
    c |= dict(layers=[("swa" if layer.window else "gqa") if layer.attn in alike else layer.attn for layer in plan],
              n_kv_head=heads[0] if len(heads) == 1 else 0, window=max(layer.window for layer in plan), head_dim=head_dim(cfg), d_ff=hidden_width(cfg),
              attn_scale=cfg.attn_scale or head_dim(cfg) ** -0.5, n_enc_layer=cfg.n_enc_layer or cfg.n_layer,
              lrpe_layers=min(cfg.lrpe_layers or cfg.n_layer, cfg.n_layer),
              d_expert=expert_width(cfg, hidden_width(cfg)),
              tie_embeddings=cfg.tie_embeddings or cfg.headless, rope_original=cfg.rope_original or cfg.seq_len)
    for factor in ("res_alpha", "res_beta") if cfg.norm_at != "deepnorm" else ():
        linear, usual = any(ATTENTION[kind].recurrent for kind in kinds) and c[f"{factor}_linear"], c[factor] or 1.0
        c |= {factor: usual, f"{factor}_linear": linear or usual, f"{factor}_mlp": c[f"{factor}_mlp"] or usual}
    limited = cfg.top_group < cfg.n_group                        # else every group may be chosen
    c |= dict(n_group=cfg.n_group * limited, top_group=cfg.top_group * limited, n_dense_layer=0, moe_every=1,
              dense_layers=",".join(str(layer.index) for layer in plan if not layer.moe))
    if "mla" in kinds:
        with torch.device("meta"):
            mla = ATTENTION["mla"](cfg, plan[0])
        c |= dict(kv_lora_rank=mla.kv_rank, qk_nope_head_dim=mla.nope, qk_rope_head_dim=mla.rope_dim, v_head_dim=mla.v_dim)
        c["head_dim"] *= kinds != {"mla"}
    near = cfg.rope_local_theta if "swa" in kinds else cfg.rope_theta
    c["rope_local_theta"] = near or (cfg.rope_theta if cfg.rope_scaling == "none" else 0.0)
    return c


def _free(cfg):
    """Pattern of the fields in which configurations of one function may differ."""
    kinds, same = {layer.attn for layer in layer_plan(cfg)}, ["seq_len"] * (cfg.pos != "learned")
    settled = replace(cfg, d_expert=cfg.d_expert or 1, d_ff=cfg.d_ff or 1)           # automatic widths are worked out by _canonical
    return "|".join([TRAINING, "attn", *idle(settled), *same, *["attn_scale"] * ("mla" in kinds and not cfg.attn_scale),
                     *["group_score"] * (cfg.top_group >= cfg.n_group), *["mtp_normed"] * (not cfg.mtp)])


def _own(model):
    """{our name: tensor}, parameters and buffers; a head that is the embedding only once."""
    return {name: t for name, t in model.state_dict().items() if not (model.cfg.tie_embeddings and name == "head.weight")}


def _pairs(arch, cfg, own):
    """[(their name, our names, expert or None, how)] of all that is in `own`."""
    pairs = []
    for theirs, names, how, when in arch.names:
        for i in range(cfg.mtp if "{n}" in theirs else max(cfg.n_layer, cfg.n_enc_layer) if "{i}" in theirs else 1):
            sibling = re.match(r"(.*\{i\}\.(block\.)?)?", names[0])[0].format(i=i) + f"{when.lstrip('-')}.weight"
            for suffix in ("", ".weight", ".bias") if not when or (sibling in own) == (when[0] != "-") else ():
                ours = [name.format(i=i) + suffix for name in names]
                if own.keys() >= set(ours):
                    experts = range(len(own[ours[0]])) if "{e}" in theirs else (None,)
                    pairs += [(theirs.format(i=i, e=e, n=cfg.n_layer + i) + suffix, ours, e, how) for e in experts]
    return pairs


def _join(parts, how, K):
    """Our tensors -> theirs."""
    if how == "heads":
        return torch.stack([part.unflatten(0, (-1, K)) for part in parts], 1).flatten(0, 2)
    if how == "columns":
        return torch.stack([part.mT if part.ndim == 3 else part for part in parts], -1).flatten(-2)
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return (whole.T if how == "turned" and whole.ndim == 2 else whole[:, None] if how == "row" else whole[0] if how == "one"
            else whole)


def _split(whole, like, how, K):
    """Their tensor -> ours, of the sizes of those in `like`."""
    if how == "heads":
        return [part.flatten(0, 1) for part in whole.unflatten(0, (-1, len(like), K)).unbind(1)]
    if how == "columns":
        return [part.mT if part.ndim == 3 else part for part in whole.unflatten(-1, (-1, len(like))).unbind(-1)]
    whole = (whole.T if how == "turned" and whole.ndim == 2 else whole[:, 0] if how == "row" else whole[None] if how == "one"
             else whole)
    return whole.split([len(part) for part in like]) if len(like) > 1 else [whole]


def _heads(arch, fields, tensors):
    """Which heads there are is said by the tensors. A head beside an embedding that it should be tied to, and other than it, is
    a head of its own. Of the modules that predict further tokens as many count as are there and config.json wants; they may
    bring copies of embedding and head."""
    if fields.get("arch") == "encoder":
        mlm = any(name.startswith("cls.predictions.") for name in tensors)
        fields |= dict(mlm_head=mlm, head_bias=mlm, headless=not mlm, pooler="bert.pooler.dense.weight" in tensors)
    head, embed = (next(f"{row.theirs}.weight" for row in arch.names if row.ours == [name]) for name in ("head", "embed"))
    if fields["tie_embeddings"] and head in tensors:
        a, b = tensors[head], tensors.setdefault(embed, tensors[head])
        fields["tie_embeddings"] = a.dtype == b.dtype and torch.equal(a, b)
        if fields["tie_embeddings"]:
            del tensors[head]
    if "mtp" in arch.keys and tensors:
        L, layer_of = fields["n_layer"], lambda name: int((re.match(r"model\.layers\.(\d{1,6})\.", name) or [0, -1])[1])
        more = {layer_of(name) for name in tensors if name.endswith(".enorm.weight")} - set(range(L))
        fields["mtp"] = min(fields["mtp"], next(k for k in itertools.count() if L + k not in more))
        same = {"embed_tokens": tensors.get(embed), "shared_head.head": tensors.get(head, tensors.get(embed))}
        for name in [name for name in tensors if layer_of(name) in more]:          # not asked for, or a copy of what is shared
            of = same.get(name.split(".", 3)[3].removesuffix(".weight"))
            if layer_of(name) >= L + fields["mtp"] or of is not None and torch.equal(tensors[name], of):
                del tensors[name]
    return fields


IGNORED = r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|position_ids$"            # tables that old versions stored


def from_pretrained(path, device="cpu", dtype=torch.float32):
    """Open a Hugging Face folder (its model_type a key of CONVERT; safetensors, single or sharded), a checkpoint or a run.
    On device "meta" for its shapes alone, and then config.json is enough."""
    path = Path(path)
    if (path / "manifest.json").is_file() or (path / "ckpt").is_dir():
        return _from_checkpoint(path, device, dtype)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") == "gemma3":                 # of a model that also sees, the part that reads
            config = config["text_config"] | dict(model_type="gemma3_text",
                                                  tie_word_embeddings=config.get("tie_word_embeddings", True))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"{path} is neither a checkpoint (no manifest.json) nor a Hugging Face folder (config.json: "
                         f"{error})") from None
    arch = CONVERT.get(config.get("model_type"))
    if arch is None:
        raise UsageError(f"{path}: model_type {config.get('model_type')!r} is not known; these are: {list(CONVERT)}")
    try:
        fields = _fields(arch, _one_spelling(config))
    except (TypeError, AttributeError, ZeroDivisionError, IndexError) as error:
        raise UsageError(f"{path}/config.json holds a value of a strange type ({error}); compare it with one that "
                         "transformers wrote") from None
    if torch.device(device).type == "meta" and not any(path.glob("*.safetensors")):
        return meta_model(ModelConfig(**_heads(arch, fields, {})))                   # shapes need no weights
    tensors = _read_folder(path)                                 # where two names of one tensor are there, our tables' counts
    tensors = {now: t for name, t in tensors.items() if (now := arch.renamed(name)) == name or now not in tensors}
    return _fill(ModelConfig(**_heads(arch, fields, tensors)), tensors, path, device, dtype, arch)


def _read_folder(path):
    index, files = path / "model.safetensors.index.json", [path / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(path.glob("*.safetensors"))
        if index.is_file():
            try:
                files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{index} does not say which file holds which tensor ({error!r}); copy it again") from None
    if not files:
        raise UsageError(f"{path} holds no .safetensors file; save it with save_pretrained(..., safe_serialization=True)")
    tensors = {}
    for file in files:
        if not file.is_file():
            raise UsageError(f"{index} names {file.name}, which is missing; copy it beside the others")
        tensors |= dist.read_safetensors(file)
    return tensors


def _from_checkpoint(path, device, dtype):
    saved = dist.open_checkpoint(path) if (path / "manifest.json").is_file() else dist.newest_checkpoint(path / "ckpt")
    if saved is None:
        raise UsageError(f"{path}/ckpt holds no checkpoint yet; train for at least --save_every steps first")
    cfg = ModelConfig(**{key: value for key, value in saved.state["config"].items() if key in ModelConfig.__dataclass_fields__})
    own = {name.removeprefix("model."): saved.whole(name) for name in saved.table if name.startswith("model.")}
    if cfg.tie_embeddings:
        own.pop("head.weight", None)
    return _fill(cfg, own, path, device, dtype)


def _pick(own, names, e):
    return [own[name] if e is None else own[name][e] for name in names]


def _fill(cfg, tensors, path, device, dtype, arch=None):
    """Build the model without memory, then give every parameter its tensor; list all that is missing, extra or misshapen."""
    model = meta_model(cfg)
    own, K = _own(model), head_dim(cfg)
    pairs = {arch.renamed(theirs): rest for theirs, *rest in _pairs(arch, cfg, own)} if arch else {
        name: ([name], None, "") for name in own}
    shapes = {theirs: list(_join(_pick(own, names, e), how, K).shape) for theirs, (names, e, how) in pairs.items()}
    found, ignored = {name: list(t.shape) for name, t in tensors.items()}, f"{IGNORED}|{arch.ignored}" if arch else "$^"
    wrong = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in found]
    wrong += [f"unexpected {name} {found[name]}" for name in found if name not in shapes and not re.search(ignored, name)]
    wrong += [f"{name} is {found[name]}, not {shape}" for name, shape in shapes.items() if found.get(name, shape) != shape]
    if wrong:
        more = f"; {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise UsageError(f"{path} does not fit its configuration: {'; '.join(wrong[:20])}{more}")
    own = _own(model.to_empty(device=device))
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
        for theirs, (names, e, how) in pairs.items():
            goals = _pick(own, names, e)
            for goal, part in zip(goals, _split(tensors[theirs], goals, how, K)):
                goal.copy_(part)
    for p in model.parameters():
        p.data = p.data.to(dtype)                                # buffers (the router's bias) stay float32
    return model


def rebuilt(model, cfg):
    """The weights of a model in one of another configuration: dropout, shorter rows."""
    new, weights = meta_model(cfg), model.state_dict()
    if cfg.pos == "learned":
        weights["pos_embed.weight"] = weights["pos_embed.weight"][:cfg.seq_len].clone()
    new.load_state_dict(weights, assign=True)
    for module in new.modules():
        if isinstance(module, MoE):
            module.start_counting(module.bias_E.device)
    return new


def upcycled(dense, cfg):
    """A model with experts that begins as `dense`, whose weights it takes; its routers are drawn.                [Upcycle sec 3]
    --d_expert=0 stands for the least width that holds the dense MLP together with the shared experts'."""
    if dense.cfg.moe or cfg.act != "swiglu":
        raise UsageError("upcycling makes experts of dense MLPs with --act=swiglu, and these are "
                         + ("experts already" if dense.cfg.moe else f"--act={cfg.act}") + "; use the weights of such a model")
    each = 1 + cfg.n_shared_expert
    new = Model(replace(cfg, d_expert=cfg.d_expert or -(-hidden_width(cfg) // (8 * each)) * 8))
    weights = dense.state_dict()
    for place, layer in new.named_modules():
        if isinstance(layer, MoE):
            names = [name for name in weights if name.startswith(f"{place}.")]
            mlp = {name.removeprefix(f"{place}."): weights.pop(name) for name in names}
            weights |= {f"{place}.{name}": tensor for name, tensor in upcycle(mlp, layer.cfg).items()}
    new.load_state_dict(new.state_dict() | weights)
    return new


def save_pretrained(model, path):
    """Write a folder that transformers opens with equal logits (config.json, model.safetensors)."""
    cfg, path, own, misfits = model.cfg, Path(path), _own(model), {}
    c, parameters = _canonical(cfg), {name for name, _ in model.named_parameters()}
    counts = lambda name: not re.fullmatch(_free(cfg), name)
    same = lambda x, y: x == y or isinstance(x, float) and isinstance(y, (int, float)) and math.isclose(x, y, rel_tol=1e-9)
    for kind, arch in CONVERT.items():
        pairs = _pairs(arch, cfg, own)
        wrong = ["n_embd / n_head"] * (arch.whole_heads and cfg.n_embd % cfg.n_head > 0)
        wrong += [name for name, value in (dict(moe=False) | arch.fixed).items() if counts(name) and c[name] != value]
        try:
            hf = _described(arch, c)
            fields = _fields(arch, _one_spelling(hf))
            fields = _heads(arch, fields, {arch.renamed(theirs): own[names[0]] for theirs, names, *_ in pairs})
            back = _canonical(ModelConfig(**fields))
            wrong += [name for name in sorted(c) if counts(name) and not same(c[name], back[name])]
        except (KeyError, UsageError) as error:
            wrong.append(str(error.args[0]))
        lost = own.keys() - {name for _, names, *_ in pairs for name in names}
        misfits[kind] = list(dict.fromkeys(wrong)) or [name for name in lost if name in parameters or own[name].any()]
        if not misfits[kind]:
            break
    else:
        nearest = sorted(misfits, key=lambda kind: len(misfits[kind]))[:3]
        raise UsageError("no Hugging Face architecture fits this model; what differs from the nearest: "
                         + "; ".join(f"{kind}: {', '.join(misfits[kind])}" for kind in nearest))
    path.mkdir(parents=True, exist_ok=True)
    tensors = {theirs: _join(_pick(own, names, e), how, head_dim(cfg)).contiguous() for theirs, names, e, how in pairs}
    dist.write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
    common = dict(model_type=kind, torch_dtype=str(model.embed.weight.dtype)[6:], bos_token_id=None, eos_token_id=None,
                  pad_token_id=None)
    with atomic_write(path / "config.json", "w") as file:
        json.dump(common | hf, file, indent=1)


# ---- Demo and command line ----

def bench(model, n_prompts=16, prompt=16, n=128):
    """Ids a second of greedy generation, one row at a time, prompts drawn by the model itself: one id a call, and with drafts."""
    g = torch.Generator(model.embed.weight.device).manual_seed(0)
    start_B1 = torch.arange(n_prompts, device=model.embed.weight.device)[:, None] % model.cfg.vocab_size
    prompts = model.generate(start_B1, prompt, temperature=1.0, generator=g).split(1)
    ways, ids, seconds = [False, True] if model.mtp else [False], {}, {}
    counts = dict(calls=0, drafted=0, accepted=0)
    for row in [prompts[0], *prompts]:                           # the first one warms up
        for draft in ways:                                       # in turn, so both meet the same machine
            begin = time.perf_counter()
            ids.setdefault(draft, []).append(model.generate(row, n, draft=draft).tolist())
            seconds.setdefault(draft, []).append(time.perf_counter() - begin)
        if len(ids[False]) > 1 and model.mtp:
            counts = {name: count + model.drafted[name] for name, count in counts.items()}
    speed = {draft: n * n_prompts / sum(seconds[draft][1:]) for draft in ways}
    print(f"{n_prompts} prompts x {n} ids, one at a time: {speed[False]:,.0f} ids a second")
    if model.mtp:
        print(f"with drafts of its {len(model.mtp)} MTP module{'s' * (len(model.mtp) > 1)}: {speed[True]:,.0f} ids a second, "
              f"{speed[True] / speed[False]:.2f}x; {counts['calls']:,} calls for {n * n_prompts:,} ids; {counts['accepted']:,} of "
              f"{counts['drafted']:,} drafts accepted ({counts['accepted'] / max(1, counts['drafted']):.1%}); the ids "
              + ("are the same" if ids[True] == ids[False] else "DIFFER"))


def demo():
    print(f"{'':26s}{'parameters':>11s}{'active':>8s}{'FLOP a token':>15s}{'cache of seq_len':>18s}   by component")
    cases = {"default": {}, "default --attn=mla": dict(attn="mla"), "default --attn=lightning": dict(attn="lightning"),
             "default --moe": dict(moe=True)}
    cases |= {f"--preset={name}": dict(vocab_size=50257) | preset for name, preset in PRESETS.items()}
    for name, flags in cases.items():
        model = meta_model(ModelConfig(**{key: flags[key] for key in flags if key in ModelConfig.__dataclass_fields__}))
        T, table, active = model.cfg.seq_len, parameter_table(model), active_parameters(model)
        print(f"{name:26s}{human(sum(table.values())):>11s}{human(active):>8s}{human(flops_per_token(model, T), 'FLOP'):>15s}"
              f"{human(cache_bytes(model, T), 'B'):>18s}   " + ", ".join(f"{part} {human(n)}" for part, n in table.items()))
    model = Model(ModelConfig(vocab_size=64, n_layer=2, n_embd=64, n_head=2))
    out = model.generate(torch.tensor([[1, 2, 3]]), 8)
    full = model(out[:, :-1])[:, 2:].argmax(-1)
    print(f"\nuntrained 2-layer model continues 1 2 3 with {out[0, 3:].tolist()}; without a cache {full[0].tolist()}")


def main(argv):
    if not argv:
        return demo()
    parser = Parser(prog="model.py", usage="model.py [folder] [--describe] [--bench] [--draw=FILE.svg] [--preset=NAME] [--flag=value ...]",
                    description="What a model costs and what it looks like; nothing is trained and no weights are made.")
    parser.add_argument("folder", nargs="?", default="", help="a Hugging Face folder, or a checkpoint or run of ours")
    parser.add_argument("--describe", action="store_true", help="print what it costs (without --draw: always)")
    parser.add_argument("--bench", action="store_true", help="time greedy generation of the folder's model, with drafts if it has MTP modules")
    parser.add_argument("--draw", metavar="FILE.svg", default="", help="write a picture, every tensor to scale")
    parser.add_argument("--preset", choices=list(PRESETS), help="many flags at once; other flags override it")
    add_flags(parser, [Path(__file__).with_name(f"{name}.py") for name in ("kernels", "attention", "moe", "model")])
    typed = vars(parser.parse_args(argv))
    folder, describing, timing, file, preset = (typed.pop(name) for name in ("folder", "describe", "bench", "draw", "preset"))
    more = [f"--{name}" for name in typed if name != "seq_len"] + [f"--preset={preset}"] * bool(preset)
    if folder and more:
        raise UsageError(f"{folder} says itself what model it holds; leave out {', '.join(more)}")
    if typed.get("seq_len", 1) < 1:
        raise UsageError(f"--seq_len={typed['seq_len']} must be at least 1, for example 4096")
    if file and not file.endswith(".svg"):
        raise UsageError(f"--draw={file}: an SVG is written; use a name such as --draw={Path(file).stem}.svg")
    if timing:
        if not folder:
            raise UsageError("--bench generates with trained weights; name a folder, as in python model.py out --bench")
        return bench(from_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu").eval())
    flags = PRESETS.get(preset, {}) | typed
    refuse_no_experts(cfg := ModelConfig(**{name: value for name, value in flags.items() if name in ModelConfig.__dataclass_fields__}))
    model = from_pretrained(folder, "meta") if folder else meta_model(cfg)
    if describing or not file:
        print(describe(model, typed.get("seq_len", 0)))
        for name, needs in unused(model.cfg, typed).items():
            print(f"\n--{name}={typed[name]} has no effect here: it needs {needs}")
    if file:
        try:
            with atomic_write(file, "w") as out:
                out.write(draw(model))
        except OSError as error:
            raise UsageError(f"--draw={file} cannot be written ({error.strerror}); choose another place, such as --draw=model.svg") from None
        print(f"{file}: open it in a browser; the pointer on a tensor shows its full name")


if __name__ == "__main__":
    run_cli(main)
