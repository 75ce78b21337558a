import json

import pytest
import torch

import dist
import model as M
from attention import ATTENTION
from model import Model, ModelConfig
from tokenizer import UsageError

SMALL = dict(vocab_size=37, seq_len=24, n_layer=2, n_embd=24, n_head=4)
GPT2 = dict(norm="layer", act="gelu_tanh", pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True, norm_eps=1e-5)


def randomised(model, scale=1.0):
    """Every parameter random, gains and biases too: at their initial values dropped terms and wrong masks hide."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1))
    return model


def build(**fields):
    return randomised(Model(ModelConfig(**SMALL | fields)))


VARIANTS = [dict(attn=name) for name in ATTENTION] + [
    GPT2, dict(attn="mla", q_lora_rank=8, tie_embeddings=False), dict(moe=True, n_expert=4, n_dense_layer=0), dict(pos="none", act="relu"),
    dict(attn="gqa", n_kv_head=2, head_dim=10, mlp_bias=True), dict(GPT2, attn="mla", moe=True, n_expert=3)]
ids = lambda fields: "-".join(f"{k}={v}" for k, v in fields.items())[:60] or "default"


@pytest.mark.parametrize("fields", VARIANTS, ids=ids)
def test_every_cached_step_equals_the_full_forward(fields, shapes_checked):
    model = build(**fields).eval()
    tokens = torch.randint(37, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full, cache, parts = model(tokens), model.new_cache(), []
        for size in (6, 1, 1, 1, 4, 1, 1, 1, 1):
            at = cache[0].length
            parts.append(model(tokens[:, at:at + size], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens[:1]), full[:1], rtol=1e-5, atol=1e-5)
    assert full.std() > 0.3                                      # flat logits would hide mistakes


@pytest.mark.parametrize("fields", VARIANTS, ids=ids)
@pytest.mark.parametrize("half", [False, True])
def test_packed_documents_do_not_see_each_other(fields, half, shapes_checked):
    model = build(**fields).eval()
    lengths = (9, 1, 7, 4)
    tokens = torch.randint(37, (1, 24), generator=torch.Generator().manual_seed(0))
    doc = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((3,), -1)])[None]
    positions = torch.cat([torch.arange(n) for n in (*lengths, 3)])[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        packed = model(tokens, positions, doc)
        at, close = 0, dict(rtol=0.1, atol=0.15) if half else dict(rtol=1e-5, atol=1e-5)
        for n in lengths:
            torch.testing.assert_close(packed[:, at:at + n], model(tokens[:, at:at + n]), **close)
            at += n
        changed = tokens.clone()
        changed[0, 10] = (changed[0, 10] + 1) % 37               # inside document 2
        after = model(changed, positions, doc)
    same = (after == packed).all(-1)[0]
    if not fields.get("moe"):                                    # MoE sums its experts in another order when a token moves
        assert same[:10].all() and same[17:].all()
    assert not same[10:17].all()
    torch.testing.assert_close(after[:, 17:], packed[:, 17:], **close)


def batch_of(B, T, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(37, (B, T + 1), generator=g)
    keep = torch.randint(1, T + 1, (B, 1), generator=g) > torch.arange(T)        # ragged: a row counts its first few tokens
    return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=keep.float(), positions=torch.arange(T).expand(B, T),
                doc_ids=torch.zeros(B, T, dtype=torch.long))


@pytest.mark.parametrize("fields", VARIANTS, ids=ids)
def test_loss_and_gradients_of_micro_batches_add_up_to_the_batch(fields):
    """k micro-batches = one batch k times as large, on ragged weights; a mean of means is not."""
    model, batch = build(**fields), batch_of(8, 13)
    grads = lambda: [p.grad.clone() for p in model.parameters() if p.grad is not None]
    total = batch["weights"].sum()
    loss, weight, _ = model.loss(batch)
    assert weight == total
    (loss / total).backward()
    want, scale = grads(), max(p.grad.abs().max() for p in model.parameters())
    logits = model(batch["tokens"], batch["positions"], batch["doc_ids"])
    nll = -logits.log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    torch.testing.assert_close(loss, (nll * batch["weights"]).sum())
    for k in (2, 4, 8):
        model.zero_grad()
        parts = [{name: t.chunk(k)[i] for name, t in batch.items()} for i in range(k)]
        losses = [model.loss(part)[0] for part in parts]
        torch.testing.assert_close(sum(losses), loss, rtol=1e-6, atol=1e-6)
        (sum(losses) / total).backward()
        for a, b in zip(grads(), want):
            assert (a - b).abs().max() <= 1e-6 * max(1, scale)
        model.zero_grad()
        (sum(model.loss(part)[0] / part["weights"].sum() for part in parts) / k).backward()
        assert max((a - b).abs().max() for a, b in zip(grads(), want)) > 1e-3 * scale           # the wrong averaging shows


def test_generate_takes_the_likeliest_or_samples():
    model, tokens = build(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = model.generate(tokens, 9)
    assert out.shape == (2, 12) and torch.equal(out[:, :3], tokens) and model.training
    assert torch.equal(out[:, 3:], model(out[:, :-1])[:, 2:].argmax(-1))
    draw = lambda seed, **how: model.generate(tokens, 9, 1.0, generator=torch.Generator().manual_seed(seed), **how)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, top_k=1), out) and torch.equal(draw(0, top_p=1e-9), out)


def test_pick_keeps_the_right_tokens():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    g = torch.Generator().manual_seed(0)
    share = lambda **how: torch.bincount(M.pick(logits, 1.0, generator=g, **how), minlength=4) / 4000
    torch.testing.assert_close(share(), logits[0].exp(), atol=0.03, rtol=0)
    torch.testing.assert_close(share(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    torch.testing.assert_close(share(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    torch.testing.assert_close(share(top_p=0.4), torch.tensor([1.0, 0, 0, 0]))


def test_initial_weights_depend_on_seed_and_name_alone():
    a, b, c = (Model(ModelConfig(**SMALL | f)).state_dict() for f in (dict(), dict(act="gelu", moe=False), dict(seed=1)))
    assert torch.equal(a["blocks.1.attn.w_q.weight"], b["blocks.1.attn.w_q.weight"])
    assert not torch.equal(a["blocks.1.attn.w_q.weight"], c["blocks.1.attn.w_q.weight"])
    assert not torch.equal(a["blocks.0.attn.w_q.weight"], a["blocks.1.attn.w_q.weight"])
    assert abs(a["embed.weight"].std() - 0.02) < 2e-3 and abs(a["blocks.0.attn.w_o.weight"].std() - 0.01) < 1e-3


def test_dropout_is_off_by_default_and_in_evaluation():
    tokens = torch.arange(20)[None]
    assert torch.equal((model := build())(tokens), model(tokens))
    for field in ("embed_dropout", "resid_dropout", "attn_dropout"):
        model = build(**{field: 0.5})
        assert not torch.equal(model(tokens), model(tokens)), field
        model.eval()
        torch.testing.assert_close(model(tokens), build()(tokens))


def test_sizes_by_hand():
    """GPT-2's published 124M; active parameters of a mixture; FLOPs of a token by the PaLM count."""
    fields = ModelConfig.__dataclass_fields__
    gpt2 = M.meta_model(ModelConfig(vocab_size=50257, **{k: v for k, v in M.PRESETS["gpt2"].items() if k in fields}))
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808 == sum(M.parameter_table(gpt2).values())
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert M.flops_per_token(gpt2, 1024) == 6 * matrices + 12 * 12 * 768 * 1024
    moe = M.meta_model(ModelConfig(**SMALL, moe=True, n_expert=8, n_active=2, d_expert=5, n_dense_layer=1))
    assert sum(p.numel() for p in moe.parameters()) - M.active_parameters(moe) == 6 * 3 * 5 * 24


@pytest.mark.parametrize("attn", list(ATTENTION))
def test_flops_equal_torchs_counter(attn):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model = Model(ModelConfig(**SMALL | dict(attn=attn, tie_embeddings=False)))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:          # the fused CPU kernel is not counted
        model(torch.zeros(1, 24, dtype=torch.long)).sum().backward()
    assert count.get_total_flops() == 24 * M.flops_per_token(model, 24)


# ---- Hugging Face folders ----

HF_SHAPES = {
    "gpt2": (dict(model_type="gpt2", n_layer=2, n_head=2, n_embd=8, n_positions=16, vocab_size=11, layer_norm_epsilon=1e-5),
             {"transformer.wte.weight": (11, 8), "transformer.wpe.weight": (16, 8), "transformer.ln_f.weight": (8,), "transformer.ln_f.bias": (8,)}
             | {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in {
                 "ln_1.weight": (8,), "ln_1.bias": (8,), "ln_2.weight": (8,), "ln_2.bias": (8,), "attn.c_attn.weight": (8, 24), "attn.c_attn.bias": (24,),
                 "attn.c_proj.weight": (8, 8), "attn.c_proj.bias": (8,), "mlp.c_fc.weight": (8, 32), "mlp.c_fc.bias": (32,),
                 "mlp.c_proj.weight": (32, 8), "mlp.c_proj.bias": (8,)}.items()}),
    "llama": (dict(model_type="llama", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16, intermediate_size=20,
                   vocab_size=11, max_position_embeddings=32, rms_norm_eps=1e-5, rope_theta=500.0, tie_word_embeddings=False),
              {"model.embed_tokens.weight": (11, 16), "model.norm.weight": (16,), "lm_head.weight": (11, 16)}
              | {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in {
                  "input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,), "self_attn.q_proj.weight": (16, 16),
                  "self_attn.k_proj.weight": (8, 16), "self_attn.v_proj.weight": (8, 16), "self_attn.o_proj.weight": (16, 16),
                  "mlp.gate_proj.weight": (20, 16), "mlp.up_proj.weight": (20, 16), "mlp.down_proj.weight": (16, 20)}.items()}),
}
# made by test_golden_logits_come_from_transformers (transformers 5.23.0, torch 2.13.0): logits of the last token
GOLDEN = {
    "gpt2": [-1.814553, -0.133359, 1.607696, 2.627107, 2.467293, 1.19999, -0.605951, -2.1399, -2.713315, -2.06881, -0.495681],
    "llama": [0.022594, -1.359207, -0.574446, 1.125976, 1.031603, -0.707136, -1.318707, 0.171728, 1.38843, 0.391988, -1.229279],
}
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])


def golden_folder(kind, path):
    """A Hugging Face folder with weights sin(0.7 i + number of the tensor), gains around one."""
    config, shapes = HF_SHAPES[kind]
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        size = torch.Size(shape).numel()
        wave = torch.sin(0.7 * torch.arange(size, dtype=torch.float64) + number).float().reshape(shape)
        gain = len(shape) == 1 and name.endswith("weight")
        tensors[name] = 1 + 0.2 * wave if gain else 0.4 * wave
    path.mkdir(exist_ok=True)
    dist.write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", list(GOLDEN))
def test_golden_logits(kind, tmp_path):
    model = M.from_pretrained(golden_folder(kind, tmp_path / "hf"))
    torch.testing.assert_close(model(PROMPT)[0, -1], torch.tensor(GOLDEN[kind]), rtol=1e-5, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("kind", list(GOLDEN))
def test_golden_logits_come_from_transformers(kind, tmp_path):
    hf = pytest.importorskip("transformers")
    theirs = hf.AutoModelForCausalLM.from_pretrained(golden_folder(kind, tmp_path / "hf")).eval()
    got = theirs(PROMPT).logits[0, -1].detach()
    assert GOLDEN[kind], f"golden values of {kind}: {[round(x, 6) for x in got.tolist()]}"
    torch.testing.assert_close(got, torch.tensor(GOLDEN[kind]), rtol=1e-5, atol=1e-5)


HF_CONFIGS = [
    ("GPT2", dict(n_layer=2, n_head=2, n_embd=16, n_positions=40, vocab_size=53)),
    ("GPT2", dict(n_layer=3, n_head=4, n_embd=24, n_inner=50, n_positions=20, vocab_size=29, layer_norm_epsilon=1e-3)),
    ("Llama", dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=48, vocab_size=61)),
    ("Llama", dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, hidden_size=24, intermediate_size=40, vocab_size=31, head_dim=10,
                   tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3)),
    ("Llama", dict(num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=3, hidden_size=24, intermediate_size=40, vocab_size=31,
                   rope_parameters=dict(rope_type="default", rope_theta=300.0))),
]


@pytest.mark.peer
@pytest.mark.parametrize("kind, fields", HF_CONFIGS)
@pytest.mark.parametrize("spelling", ["v5", "hub"])
def test_logits_and_gradients_equal_transformers(kind, fields, spelling, tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = randomised(getattr(hf, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**fields)), 1.2).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")               # several shards and an index
    if spelling == "hub":
        config = json.loads((tmp_path / "hf/config.json").read_text())
        rope = config.pop("rope_parameters", None) or {}
        config |= dict(rope_theta=rope.get("rope_theta", 10000.0), rope_scaling=None, torch_dtype=config.pop("dtype", "float32"))
        (tmp_path / "hf/config.json").write_text(json.dumps(config))
    ours = M.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(fields["vocab_size"], (2, 17))
    a, b = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert b.std() > 0.3
    weight = torch.randn_like(b)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    g, h = ours.embed.weight.grad, theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-4 * h.abs().max().item())
    M.save_pretrained(ours, tmp_path / "back")
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(opened(tokens).logits, b, rtol=1e-5, atol=1e-5)
    half = M.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_saved_folders_open_again(tmp_path):
    tokens = torch.arange(12)[None]
    for number, fields in enumerate((dict(attn="gqa", n_kv_head=2), dict(GPT2, norm_eps=1e-4), dict(tie_embeddings=False, attn="mqa"))):
        model = build(**fields)
        M.save_pretrained(model, tmp_path / str(number))
        torch.testing.assert_close(M.from_pretrained(tmp_path / str(number))(tokens), model(tokens))
    with pytest.raises(UsageError, match="no Hugging Face architecture"):
        M.save_pretrained(build(attn="mla"), tmp_path / "mla")


def test_folders_that_do_not_fit_are_refused_by_name(tmp_path):
    folder = golden_folder("llama", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())

    def refused(says, **change):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UsageError, match=says):
            M.from_pretrained(folder)

    refused("missing blocks.2.norm1.weight", num_hidden_layers=3)
    refused("unexpected model.layers.1", num_hidden_layers=1)
    refused(r"blocks.0.mlp.w_gate.weight is \[20, 16\], not \[21, 16\]", intermediate_size=21)
    refused("yarn", rope_scaling=dict(rope_type="yarn", factor=4.0))
    refused("hidden_act", hidden_act="gelu")
    refused("'mamba'", model_type="mamba")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "hidden_size"}))
    with pytest.raises(UsageError, match="hidden_size"):
        M.from_pretrained(folder)
    with pytest.raises(UsageError, match="neither"):
        M.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("fields, says", [
    (dict(attn="nope"), "mla"), (dict(norm="nope"), "rms"), (dict(n_layer=0), "n_layer"), (dict(resid_dropout=1.0), "share"), (dict(norm_eps=0.0), "norm_eps"),
])
def test_impossible_models_are_refused(fields, says):
    with pytest.raises(UsageError, match=says):
        Model(ModelConfig(**fields))


def test_learned_positions_end():
    with pytest.raises(UsageError, match="--seq_len=24"):
        build(**GPT2)(torch.zeros(1, 25, dtype=torch.long))
    assert build()(torch.zeros(1, 40, dtype=torch.long)).shape == (1, 40, 37)
