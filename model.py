"""Model: what is the network?

A decoder reads ids and writes, at every place, a score for each id that could come next. It is one vector per token, the
residual stream, to which every block adds twice: once what attention fetched from other tokens, once what an MLP
computed from the token alone. Everything that differs between GPT-2 and Llama is a field of ModelConfig.

    x = E[token] (+ P[position])
    x = x + Attention(Norm(x));   x = x + MLP(Norm(x))         for every block, norms first                [GPT2 sec 2.3]
    logits = Norm(x) E^T  (or an own head)
    MLP(x)    = W_down act(W_up x)                             gelu                                         [GELU eq 1]
    SwiGLU(x) = W_down (silu(W_gate x) * W_up x)               gated                                        [GLU eq 6]

Contents:    config and presets | norms | activations and MLP | block | Model | sizes | Hugging Face folders | demo
Shapes:      B batch, T queries, D n_embd, F d_ff, V vocab, M rows (B T flattened)
References:
    [GPT2]   Language Models are Unsupervised Multitask Learners, OpenAI 2019
    [GELU]   Gaussian Error Linear Units, arXiv:1606.08415
    [GLU]    GLU Variants Improve Transformer, arXiv:2002.05202
    [RMS]    Root Mean Square Layer Normalization, arXiv:1910.07467
    [PaLM]   PaLM: Scaling Language Modeling with Pathways, arXiv:2204.02311
Run me:      python model.py      (parameters, FLOPs and cache of the presets)
"""
import contextlib
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import dist
from attention import ATTENTION, POSITIONS, AttentionConfig, Cache, Mask, Rope, document_mask, unturned
from kernels import linear_cross_entropy, rmsnorm, to_autocast
from moe import ROUTERS, MoE, MoEConfig
from tokenizer import UsageError, atomic_write, run_cli


@dataclass
class ModelConfig(AttentionConfig, MoEConfig):
    vocab_size: int = 2048         # ids the model knows; a tokenizer trained here gets as many
    seq_len: int = 256             # tokens of a training row
    n_layer: int = 4               # blocks
    d_ff: int = 0                  # hidden width of the MLP; 0 means 4 n_embd, or two thirds of that where gated
    norm: str = "rms"              # normalisation, a key of NORMS
    norm_eps: float = 1e-6         # added to the variance
    act: str = "swiglu"            # MLP activation, a key of ACTIVATIONS
    mlp_bias: bool = False         # biases in the MLP
    tie_embeddings: bool = True    # the head is the embedding
    embed_dropout: float = 0.0     # share of the embedded input dropped in training
    resid_dropout: float = 0.0     # share of what a block adds dropped in training
    init_std: float = 0.02         # spread of initial weights
    seed: int = 0                  # decides initial weights, data order and dropout


PRESETS = {                        # flag --preset: many flags at once, later flags override it
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, seq_len=1024, norm="layer", norm_eps=1e-5, act="gelu_tanh",
                 pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True, lr=6e-4),
    "llama": dict(n_layer=12, n_head=12, n_embd=768, n_kv_head=4, attn="gqa", d_ff=2048, seq_len=1024, norm="rms",
                  norm_eps=1e-5, act="swiglu", pos="rope", tie_embeddings=False, lr=6e-4),
}


def validate(cfg):
    """Refuse impossible shapes and unknown names before anything is built."""
    for field, table in (("attn", ATTENTION), ("norm", NORMS), ("act", ACTIVATIONS), ("pos", POSITIONS), ("router", ROUTERS)):
        if getattr(cfg, field) not in table:
            raise UsageError(f"--{field}={getattr(cfg, field)} is not known; use one of {list(table)}")
    for field in ("vocab_size", "seq_len", "n_layer", "n_embd", "n_head"):
        if getattr(cfg, field) < 1:
            raise UsageError(f"--{field}={getattr(cfg, field)} must be at least 1, for example {getattr(ModelConfig, field)}")
    for field in ("embed_dropout", "resid_dropout", "attn_dropout"):
        if not 0 <= getattr(cfg, field) < 1:
            raise UsageError(f"--{field}={getattr(cfg, field)} is a share; use a number from 0 up to but not including 1")
    for field in ("norm_eps", "init_std"):
        if getattr(cfg, field) <= 0:
            raise UsageError(f"--{field}={getattr(cfg, field)} must be above 0, for example {getattr(ModelConfig, field)}")


# ---- Norms (keep the stream at unit size) ----

class RMSNorm(nn.Module):
    """Scale only, no mean to compute.                                                                     [RMS eq 4]"""

    def __init__(self, D, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

    def forward(self, x_BTD):
        return rmsnorm(x_BTD, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Centre and scale, with a gain and a shift per channel."""

    def __init__(self, D, eps):
        super().__init__(D, eps=eps)

    def forward(self, x_BTD):
        return to_autocast(super().forward(x_BTD))


NORMS = {                          # flag --norm
    "rms": RMSNorm,
    "layer": LayerNorm,
}


# ---- Activations and MLP (what does a token do alone?) ----

ACTIVATIONS = {                    # flag --act: name -> (function, gated)
    "gelu": (F.gelu, False),                                       # x Phi(x)                                [GELU eq 1]
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), False),     # the approximation GPT-2 was trained with
    "relu": (F.relu, False),
    "silu": (F.silu, False),
    "swiglu": (F.silu, True),                                      # [GLU eq 6]
    "geglu": (F.gelu, True),                                       # [GLU eq 6]
    "reglu": (F.relu, True),                                       # [GLU eq 6]
}


def hidden_width(cfg):
    """d_ff, or 4 n_embd; a gated MLP has three matrices, so two thirds of that, rounded up to a multiple of 32."""
    if cfg.d_ff:
        return cfg.d_ff
    return -(-8 * cfg.n_embd // 3 // 32) * 32 if ACTIVATIONS[cfg.act][1] else 4 * cfg.n_embd


class MLP(nn.Module):
    def __init__(self, cfg, d_ff):
        super().__init__()
        self.act, self.gated = ACTIVATIONS[cfg.act]
        if self.gated:
            self.w_gate = nn.Linear(cfg.n_embd, d_ff, bias=cfg.mlp_bias)
        self.w_up = nn.Linear(cfg.n_embd, d_ff, bias=cfg.mlp_bias)
        self.w_down = nn.Linear(d_ff, cfg.n_embd, bias=cfg.mlp_bias)

    def forward(self, x_BTD):
        if self.gated:
            return self.w_down(self.act(self.w_gate(x_BTD)) * self.w_up(x_BTD))
        return self.w_down(self.act(self.w_up(x_BTD)))


# ---- Block (read, then think) ----

class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        norm, d_ff = NORMS[cfg.norm], hidden_width(cfg)
        self.norm1, self.norm2 = norm(cfg.n_embd, cfg.norm_eps), norm(cfg.n_embd, cfg.norm_eps)
        self.attn = ATTENTION[cfg.attn](cfg)
        self.mlp = MoE(cfg, d_ff) if cfg.moe and layer >= cfg.n_dense_layer else MLP(cfg, d_ff)
        self.dropout = nn.Dropout(cfg.resid_dropout)

    def forward(self, x_BTD, rope, mask, cache=None):
        x_BTD = x_BTD + self.dropout(self.attn(self.norm1(x_BTD), rope, mask, cache))
        return x_BTD + self.dropout(self.mlp(self.norm2(x_BTD)))


# ---- Model (the decoder) ----

class Model(nn.Module):
    """m(tokens [B, T]) -> logits [B, T, V]; m.loss(batch) -> (loss_sum, weight_sum, metrics); m.generate(tokens)."""

    def __init__(self, cfg):
        super().__init__()
        validate(cfg)
        self.cfg = cfg
        with undrawn():
            self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
            if cfg.pos == "learned":
                self.pos_embed = nn.Embedding(cfg.seq_len, cfg.n_embd)
            self.dropout = nn.Dropout(cfg.embed_dropout)
            self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
            self.norm = NORMS[cfg.norm](cfg.n_embd, cfg.norm_eps)
            self.head = self.embed if cfg.tie_embeddings else nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.rope_dim = self.blocks[0].attn.rope_dim if cfg.pos == "rope" else 0
        init_parameters(self, cfg)

    def hidden(self, tokens_BT, positions_BT=None, doc_ids_BT=None, caches=None):
        """The normalised residual stream [B, T, D] that the head reads."""
        past, T = caches[0].length if caches else 0, tokens_BT.shape[1]
        if self.cfg.pos == "learned" and past + T > self.cfg.seq_len:
            raise UsageError(f"{past + T} tokens, but learned positions end at --seq_len={self.cfg.seq_len}; give fewer tokens")
        if positions_BT is None:
            positions_BT = torch.arange(past, past + T, device=tokens_BT.device).expand(tokens_BT.shape)
        x_BTD = self.embed(tokens_BT)
        if self.cfg.pos == "learned":
            x_BTD = x_BTD + self.pos_embed(positions_BT)
        x_BTD = self.dropout(x_BTD)
        rope = Rope(positions_BT, self.rope_dim, self.cfg.rope_theta) if self.rope_dim else unturned
        mask = Mask() if doc_ids_BT is None else document_mask(doc_ids_BT)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x_BTD = block(x_BTD, rope, mask, cache)
        return self.norm(x_BTD)

    def forward(self, tokens_BT, positions_BT=None, doc_ids_BT=None, cache=None):
        """Logits [B, T, V]. `cache` (new_cache()) holds the tokens before these and is extended by them."""
        return F.linear(self.hidden(tokens_BT, positions_BT, doc_ids_BT, cache), self.head.weight)

    def loss(self, batch):
        """(sum of weights * nll, sum of weights, metrics): sums, so that micro-batches and ranks add up to one batch."""
        x_BTD = self.hidden(batch["tokens"], batch.get("positions"), batch.get("doc_ids"))
        loss_sum = linear_cross_entropy(x_BTD.flatten(0, 1), self.head.weight, batch["targets"].flatten(),
                                        batch["weights"].flatten())
        return loss_sum, batch["weights"].sum(), {}

    def new_cache(self):
        return [Cache() for _ in self.blocks]

    @torch.no_grad()
    def generate(self, tokens_BT, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, generator=None):
        """Continue tokens [B, T] by max_new_tokens ids -> [B, T + max_new_tokens]. Temperature 0 takes the likeliest id;
        top_k keeps the k likeliest (0: all), top_p the fewest that together reach that probability."""
        was_training = self.training
        self.eval()
        cache, new_BT = self.new_cache(), tokens_BT
        for _ in range(max_new_tokens):
            logits_BV = self(new_BT, cache=cache)[:, -1].float()
            new_BT = pick(logits_BV, temperature, top_k, top_p, generator)[:, None]
            tokens_BT = torch.cat([tokens_BT, new_BT], 1)
        self.train(was_training)
        return tokens_BT


def pick(logits_BV, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """One id for each row of logits."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    if top_k:
        least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    prob_BV = (logits_BV / temperature).softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = prob_BV.sort(-1, descending=True)
        sorted_BV[sorted_BV.cumsum(-1) - sorted_BV >= top_p] = 0          # what comes before already reaches top_p
        prob_BV = torch.zeros_like(prob_BV).scatter(1, order_BV, sorted_BV)
    return torch.multinomial(prob_BV, 1, generator=generator).squeeze(1)


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
    """Normal weights, smaller where a block writes to the stream (2L such writes add up), gains one, biases zero. Each
    tensor is drawn from (seed, its name), so it does not depend on what else is in the model or where it lives."""
    for name, p in model.named_parameters():
        if p.is_meta:
            continue
        elif p.ndim == 1:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            writes = "w_o." in name or "w_down" in name
            std = cfg.init_std / (2 * cfg.n_layer) ** 0.5 if writes else cfg.init_std                  # [GPT2 sec 2.3]
            number = int.from_bytes(hashlib.sha256(f"{cfg.seed}/{name}".encode()).digest()[:8], "little") >> 1
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * std)


# ---- Sizes (what does it cost?) ----

def meta_model(cfg):
    """The model without memory: shapes only, instant at any size."""
    with torch.device("meta"):
        return Model(cfg)


def parameter_table(model):
    """{component: parameters}; a tied head counts once, under embedding."""
    kinds = {"embed": "embedding", "norm": "norms", ".attn.": "attention", "experts": "experts", ".mlp.": "mlp", "head": "head"}
    table = dict.fromkeys(("embedding", "attention", "mlp", "experts", "norms", "head"), 0)
    for name, p in model.named_parameters():
        table[next(kind for part, kind in kinds.items() if part in name)] += p.numel()
    return {kind: count for kind, count in table.items() if count}


def active_parameters(model):
    """Parameters that one token meets: all, less the experts it does not visit."""
    idle = sum(sum(p.numel() for p in m.experts.parameters()) * (1 - m.n_active / len(m.bias_E))
               for m in model.modules() if isinstance(m, MoE))
    return int(sum(p.numel() for p in model.parameters()) - idle)


def flops_per_token(model, seq_len):
    """Training FLOPs of a token, forward and backward: 6 per matmul parameter (head included, lookups not) and, for each
    layer, 6 per multiply-add of a query with all seq_len keys.                                       [PaLM app B]"""
    cfg = model.cfg
    looked_up = {"pos_embed.weight"} if cfg.tie_embeddings else {"pos_embed.weight", "embed.weight"}
    matmul = active_parameters(model) - sum(p.numel() for n, p in model.named_parameters() if p.ndim == 1 or n in looked_up)
    return 6 * matmul + 6 * seq_len * sum(block.attn.flops_per_pair() for block in model.blocks)


# ---- Hugging Face folders (GPT-2 and Llama, in and out) ----

def _gpt2_config(hf):
    for key, expected in (("activation_function", "gelu_new"), ("scale_attn_weights", True),
                          ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)):
        _refuse_other(hf, key, expected)
    return dict(n_layer=hf["n_layer"], n_head=hf["n_head"], n_embd=hf["n_embd"], d_ff=hf.get("n_inner") or 0,
                vocab_size=hf["vocab_size"], seq_len=hf["n_positions"], norm="layer",
                norm_eps=hf.get("layer_norm_epsilon", 1e-5), act="gelu_tanh", pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True,
                tie_embeddings=hf.get("tie_word_embeddings", True))


def _llama_config(hf):
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}            # written by transformers 5, by older ones
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UsageError(f"config.json asks for RoPE scaling {kind!r}, which is not implemented; only unscaled RoPE is")
    _refuse_other(hf, "hidden_act", "silu")
    return dict(n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"], n_embd=hf["hidden_size"], attn="gqa",
                n_kv_head=hf.get("num_key_value_heads") or hf["num_attention_heads"], head_dim=hf.get("head_dim") or 0,
                d_ff=hf["intermediate_size"], vocab_size=hf["vocab_size"], seq_len=hf["max_position_embeddings"],
                norm="rms", norm_eps=hf["rms_norm_eps"], act="swiglu", pos="rope",
                rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
                qkv_bias=hf.get("attention_bias", False), out_bias=hf.get("attention_bias", False),
                mlp_bias=hf.get("mlp_bias", False), tie_embeddings=hf.get("tie_word_embeddings", False))


def _refuse_other(hf, key, expected):
    if hf.get(key, expected) != expected:
        raise UsageError(f"config.json has {key}={hf[key]!r}, which changes the maths and is not implemented; "
                         f"only {expected!r} is")


def _linear(ours, theirs):
    return [(f"{ours}.weight", f"{theirs}.weight"), (f"{ours}.bias", f"{theirs}.bias")]


GPT2_NAMES = [("embed.weight", "transformer.wte.weight"), ("pos_embed.weight", "transformer.wpe.weight"),
              *_linear("norm", "transformer.ln_f"), ("head.weight", "lm_head.weight")]
GPT2_BLOCK = [*_linear("norm1", "ln_1"), *_linear("norm2", "ln_2"), *_linear("attn.w_o", "attn.c_proj"),
              *_linear("mlp.w_up", "mlp.c_fc"), *_linear("mlp.w_down", "mlp.c_proj")]
LLAMA_NAMES = [("embed.weight", "model.embed_tokens.weight"), ("norm.weight", "model.norm.weight"),
               ("head.weight", "lm_head.weight")]
LLAMA_BLOCK = [("norm1.weight", "input_layernorm.weight"), ("norm2.weight", "post_attention_layernorm.weight"),
               *(pair for p in "qkvo" for pair in _linear(f"attn.w_{p}", f"self_attn.{p}_proj")),
               *(pair for p in ("gate", "up", "down") for pair in _linear(f"mlp.w_{p}", f"mlp.{p}_proj"))]


def _names(model, outer, inner, prefix):
    """{our name: their name} for the parameters this model has."""
    own = {name for name, _ in model.named_parameters()}
    pairs = outer + [(f"blocks.{i}.{a}", f"{prefix}.{i}.{b}") for i in range(model.cfg.n_layer) for a, b in inner]
    return {ours: theirs for ours, theirs in pairs if ours in own}


def _gpt2_read(model, hf):
    """Their tensors under our names: GPT-2 stores weights as [in, out] and q, k, v side by side."""
    hf = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": t for name, t in hf.items()
          if not name.endswith((".attn.bias", ".attn.masked_bias"))}             # causal masks, stored by old versions
    out = {}
    for i in range(model.cfg.n_layer):
        for kind in ("weight", "bias"):
            fused = hf.pop(f"transformer.h.{i}.attn.c_attn.{kind}", None)
            if fused is not None:
                parts = (fused.T if kind == "weight" else fused).chunk(3, 0)
                out |= {f"blocks.{i}.attn.w_{p}.{kind}": part for p, part in zip("qkv", parts)}
    names = {theirs: ours for ours, theirs in _names(model, GPT2_NAMES, GPT2_BLOCK, "transformer.h").items()}
    for theirs, tensor in hf.items():
        turned = theirs.endswith("weight") and any(part in theirs for part in ("c_proj", "c_fc"))
        out[names.get(theirs, theirs)] = tensor.T if turned else tensor
    return out


def _gpt2_write(model, own):
    names, out = _names(model, GPT2_NAMES, GPT2_BLOCK, "transformer.h"), {}
    for ours, theirs in names.items():
        turned = theirs.endswith("weight") and any(part in theirs for part in ("c_proj", "c_fc"))
        out[theirs] = own[ours].T if turned else own[ours]
    for i in range(model.cfg.n_layer):
        for kind in ("weight", "bias"):
            fused = torch.cat([own[f"blocks.{i}.attn.w_{p}.{kind}"] for p in "qkv"])
            out[f"transformer.h.{i}.attn.c_attn.{kind}"] = fused.T if kind == "weight" else fused
    return out


def _llama_read(model, hf):
    names = {theirs: ours for ours, theirs in _names(model, LLAMA_NAMES, LLAMA_BLOCK, "model.layers").items()}
    return {names.get(theirs, theirs): tensor for theirs, tensor in hf.items() if not theirs.endswith("rotary_emb.inv_freq")}


def _llama_write(model, own):
    return {theirs: own[ours] for ours, theirs in _names(model, LLAMA_NAMES, LLAMA_BLOCK, "model.layers").items()}


def _gpt2_describe(cfg):
    return dict(architectures=["GPT2LMHeadModel"], n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd,
                n_inner=cfg.d_ff or None, n_positions=cfg.seq_len, n_ctx=cfg.seq_len, layer_norm_epsilon=cfg.norm_eps,
                activation_function="gelu_new", resid_pdrop=cfg.resid_dropout, embd_pdrop=cfg.embed_dropout,
                attn_pdrop=cfg.attn_dropout)


def _llama_describe(cfg):
    G = ATTENTION[cfg.attn].kv_heads(cfg)
    return dict(architectures=["LlamaForCausalLM"], num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
                num_key_value_heads=G, head_dim=cfg.head_dim or cfg.n_embd // cfg.n_head, hidden_size=cfg.n_embd,
                intermediate_size=hidden_width(cfg), max_position_embeddings=cfg.seq_len, rms_norm_eps=cfg.norm_eps,
                hidden_act="silu", rope_theta=cfg.rope_theta, attention_bias=cfg.qkv_bias, mlp_bias=cfg.mlp_bias,
                attention_dropout=cfg.attn_dropout)


def _is_gpt2(c):
    return dict(attn=c.attn == "mha" and c.n_kv_head in (0, c.n_head), norm=c.norm == "layer", act=c.act == "gelu_tanh",
                pos=c.pos == "learned", moe=not c.moe, qkv_bias=c.qkv_bias, out_bias=c.out_bias, mlp_bias=c.mlp_bias,
                head_dim=c.head_dim in (0, c.n_embd // c.n_head))


def _is_llama(c):
    return dict(attn=c.attn in ("mha", "gqa", "mqa"), norm=c.norm == "rms", act=c.act == "swiglu", pos=c.pos == "rope",
                moe=not c.moe, out_bias=c.qkv_bias == c.out_bias)


CONVERT = {      # model_type: their config to ours, their tensors to ours, ours to theirs, our config to theirs, does it fit?
    "gpt2": (_gpt2_config, _gpt2_read, _gpt2_write, _gpt2_describe, _is_gpt2),
    "llama": (_llama_config, _llama_read, _llama_write, _llama_describe, _is_llama),
}


def from_pretrained(path, device="cpu", dtype=torch.float32):
    """Open a Hugging Face folder (gpt2 or llama; safetensors, single or sharded), or one of our checkpoints or runs."""
    path = Path(path)
    if (path / "manifest.json").is_file() or (path / "ckpt").is_dir():
        return _from_checkpoint(path, device, dtype)
    try:
        hf = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is neither a checkpoint (no manifest.json) nor a Hugging Face folder (config.json: "
                         f"{error})") from None
    if hf.get("model_type") not in CONVERT:
        raise UsageError(f"{path}: model_type {hf.get('model_type')!r} is not known; these are: {list(CONVERT)}")
    to_ours, read, *_ = CONVERT[hf["model_type"]]
    try:
        cfg = ModelConfig(**to_ours(hf))
    except KeyError as error:
        raise UsageError(f"{path}/config.json lacks the key {error}") from None
    files = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not files:
        raise UsageError(f"{path} holds no .safetensors file; save it with save_pretrained(..., safe_serialization=True)")
    tensors = {}
    for file in files:
        if not file.is_file():
            raise UsageError(f"{index} names {file.name}, which is missing; copy it beside the others")
        tensors |= dist.read_safetensors(file)
    return _fill(cfg, lambda model: read(model, tensors), path, device, dtype)


def _from_checkpoint(path, device, dtype):
    tensors, state, _ = dist.read_checkpoint(path) if (path / "manifest.json").is_file() else (
        dist.newest_checkpoint(path / "ckpt") or _no_checkpoint(path))
    fields = ModelConfig.__dataclass_fields__
    cfg = ModelConfig(**{key: value for key, value in state["config"].items() if key in fields})
    own = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    return _fill(cfg, lambda model: own, path, device, dtype)


def _no_checkpoint(path):
    raise UsageError(f"{path}/ckpt holds no checkpoint yet; train for at least --save_every steps first")


def _fill(cfg, read, path, device, dtype):
    """Build the model without memory, then give every parameter its tensor; list all that is missing, extra or misshapen."""
    model = meta_model(cfg)
    own, given = dict(model.state_dict()), read(model)
    if cfg.tie_embeddings:                                       # one tensor under two names: either will do
        own.pop("head.weight")
        if given.pop("lm_head.weight", given.pop("head.weight", None)) is not None and "embed.weight" not in given:
            raise UsageError(f"{path}: the head is there, the embedding it is tied to is not")
    wrong = [f"missing {n} {list(own[n].shape)}" for n in own if n not in given]
    wrong += [f"unexpected {n} {list(given[n].shape)}" for n in given if n not in own]
    wrong += [f"{n} is {list(given[n].shape)}, not {list(t.shape)}" for n, t in own.items() if n in given and given[n].shape != t.shape]
    if wrong:
        more = f"; {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise UsageError(f"{path} does not fit its configuration: {'; '.join(wrong[:20])}{more}")
    model.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in given:
                tensor.copy_(given[name])
        for module in model.modules():
            if isinstance(module, MoE):
                module.count_E.zero_()
    for p in model.parameters():
        p.data = p.data.to(dtype)                                # buffers (the router's bias) stay float32
    return model


def save_pretrained(model, path):
    """Write a folder that transformers opens with equal logits (config.json, model.safetensors)."""
    cfg, path = model.cfg, Path(path)
    misfits = {}
    for model_type, (_, _, write, describe, fits) in CONVERT.items():
        misfits[model_type] = [key for key, good in fits(cfg).items() if not good]
        if not misfits[model_type]:
            break
    else:
        raise UsageError(f"no Hugging Face architecture fits this model: {misfits} differ")
    own = {name: p.detach() for name, p in model.named_parameters()}
    tensors = {name: t.contiguous() for name, t in write(model, own).items()}
    dtype = next(iter(own.values())).dtype
    path.mkdir(parents=True, exist_ok=True)
    dist.write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
    with atomic_write(path / "config.json", "w") as file:
        common = dict(model_type=model_type, vocab_size=cfg.vocab_size, tie_word_embeddings=cfg.tie_embeddings,
                      dtype=str(dtype)[6:], bos_token_id=None, eos_token_id=None)
        json.dump(describe(cfg) | common, file, indent=1)


# ---- Demo ----

def demo(argv):
    if argv:
        raise UsageError(f"model.py takes no arguments, not {' '.join(argv)}")
    print(f"{'':24s} {'parameters':>13s} {'active':>13s} {'FLOPs/token':>12s} {'cache B/token':>14s}   by component")
    fields = ModelConfig.__dataclass_fields__
    cases = {"default": {}, "default --attn=mla": dict(attn="mla"), "default --moe": dict(moe=True),
             **{f"--preset={name}": preset | dict(vocab_size=50257) for name, preset in PRESETS.items()}}
    for name, flags in cases.items():
        model = meta_model(ModelConfig(**{key: value for key, value in flags.items() if key in fields}))
        kept = sum(2 * block.attn.cache_width for block in model.blocks)
        print(f"{name:24s} {sum(p.numel() for p in model.parameters()):13,} {active_parameters(model):13,} "
              f"{flops_per_token(model, model.cfg.seq_len):12.3e} {kept:14,}   "
              + ", ".join(f"{kind} {count / 1e6:.1f}M" for kind, count in parameter_table(model).items()))
    torch.manual_seed(0)
    model = Model(ModelConfig(vocab_size=64, n_layer=2, n_embd=64, n_head=2))
    out = model.generate(torch.tensor([[1, 2, 3]]), 8)
    full = model(out[:, :-1])[:, 2:].argmax(-1)
    print(f"\nuntrained 2-layer model continues 1 2 3 with {out[0, 3:].tolist()}; without a cache {full[0].tolist()}")


if __name__ == "__main__":
    run_cli(demo)
