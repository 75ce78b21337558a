"""Hugging Face folders of every architecture: logits, gradients and cached steps equal theirs, both ways."""
import json
import math
import os

import pytest
import torch

import dist
import model as M
from model import Model, ModelConfig
from tokenizer import UsageError

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
TINY = dict(vocab_size=29, pad_token_id=None, bos_token_id=None, eos_token_id=None)
DECODER = TINY | dict(hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                      max_position_embeddings=24)


def rope(kind="default", theta=100.0, **more):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **more))


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=8.0, truncate=False, attention_factor=1.3)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
NEAR = dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1000.0), sliding_attention=dict(rope_type="default", rope_theta=50.0))

CASES = {       # model_type: class, tiny configurations that differ in what the architecture knows
    "gpt2": ("GPT2LMHeadModel", [
        TINY | dict(n_embd=16, n_layer=2, n_head=2, n_positions=24),
        TINY | dict(n_embd=24, n_layer=3, n_head=4, n_inner=20, n_positions=20, tie_word_embeddings=False, layer_norm_epsilon=1e-3,
                    activation_function="gelu", scale_attn_by_inverse_layer_idx=True)]),
    "llama": ("LlamaForCausalLM", [
        DECODER | LLAMA3,
        DECODER | dict(head_dim=10, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-3, hidden_act="gelu") | YARN,
        DECODER | dict(num_key_value_heads=4, max_position_embeddings=8) | rope("dynamic", factor=2.0)]),
    "mistral": ("MistralForCausalLM", [DECODER | dict(sliding_window=3, head_dim=4), DECODER | dict(sliding_window=None) | rope("linear", factor=2.0)]),
    "qwen2": ("Qwen2ForCausalLM", [
        DECODER | dict(tie_word_embeddings=True), DECODER | dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=3, max_window_layers=1)]),
    "qwen3": ("Qwen3ForCausalLM", [
        DECODER | dict(head_dim=8), DECODER | dict(head_dim=4, attention_bias=True, use_sliding_window=True, sliding_window=5,
                                                   layer_types=["sliding_attention", "full_attention"])]),
    "olmo2": ("Olmo2ForCausalLM", [DECODER, DECODER | dict(attention_bias=True, rms_norm_eps=1e-3) | YARN]),
    "glm": ("GlmForCausalLM", [DECODER | dict(head_dim=8) | rope(partial_rotary_factor=0.5), DECODER | dict(head_dim=8, attention_bias=False) | rope()]),
    "glm4": ("Glm4ForCausalLM", [DECODER | dict(head_dim=8) | rope(partial_rotary_factor=0.5), DECODER | dict(head_dim=4) | rope("linear", factor=2.0)]),
    "gemma2": ("Gemma2ForCausalLM", [
        DECODER | dict(head_dim=8, query_pre_attn_scalar=12, sliding_window=3, attn_logit_softcapping=1.5, final_logit_softcapping=3.0),
        DECODER | dict(head_dim=4, sliding_window=4, num_hidden_layers=3, layer_types=["full_attention"] * 2 + ["sliding_attention"],
                       attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False)]),
    "gemma3_text": ("Gemma3ForCausalLM", [
        DECODER | dict(head_dim=8, num_hidden_layers=7, query_pre_attn_scalar=12, sliding_window=3, rope_parameters=NEAR),
        DECODER | dict(head_dim=4, sliding_window=4, sliding_window_pattern=2, final_logit_softcapping=3.0)]),
    "minimax": ("MiniMaxForCausalLM", [
        DECODER | dict(head_dim=6, num_local_experts=4, layer_types=["linear_attention", "full_attention"], block_size=4,
                       full_attn_alpha_factor=1.5, full_attn_beta_factor=0.7, linear_attn_alpha_factor=2.0, linear_attn_beta_factor=0.9,
                       mlp_alpha_factor=1.2, mlp_beta_factor=1.1) | rope(),
        DECODER | dict(head_dim=4, num_local_experts=2, num_experts_per_tok=1, sliding_window=3, tie_word_embeddings=True)]),
    "bert": ("BertForMaskedLM", [
        TINY | dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, max_position_embeddings=24),
        TINY | dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20, max_position_embeddings=24,
                    tie_word_embeddings=False, hidden_act="gelu_new", type_vocab_size=3, layer_norm_eps=1e-3)]),
    "t5": ("T5ForConditionalGeneration", [
        TINY | dict(d_model=12, d_kv=4, d_ff=20, num_layers=2, num_heads=2, decoder_start_token_id=0),
        TINY | dict(d_model=12, d_kv=6, d_ff=20, num_layers=1, num_decoder_layers=3, num_heads=4, relative_attention_num_buckets=8,
                    relative_attention_max_distance=10, feed_forward_proj="gated-gelu", tie_word_embeddings=False)]),
}
EVERY = [(kind, number) for kind, (_, cases) in CASES.items() for number in range(len(cases))]


def opened_by_transformers(hf, cls, folder=None, config=None):
    how = dict(attn_implementation="eager") | (dict(experts_implementation="eager") if cls.startswith("MiniMax") else {})
    cls = getattr(hf, cls)
    if folder:
        return cls.from_pretrained(folder, **how).eval()
    config = cls.config_class(**config)
    config._experts_implementation = "eager"
    return cls._from_config(config, attn_implementation="eager").eval()


def randomise(net, one_plus):
    """Every parameter random, gains and biases too: at their initial values dropped terms and wrong masks hide."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in net.named_parameters():
            z = torch.randn(p.shape, generator=g)
            gain = p.ndim == 1 and name.endswith("weight") and not one_plus
            p.copy_(0.3 * z + gain if p.ndim == 1 else 0.5 * z if "embed" in name or "shared" in name else z * p.shape[-1] ** -0.5)


def hub_spelling(folder, kind):
    """Rewrite config.json as released folders have it, with the defaults of the class left out."""
    config = json.loads((folder / "config.json").read_text())
    p = config.pop("rope_parameters", None) or {}
    if "full_attention" in p:
        config["rope_local_base_freq"] = p["sliding_attention"]["rope_theta"]
        p = p["full_attention"]
    if p:
        p["type"] = p.pop("rope_type")
        config |= {key: p.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in p}
        config["rope_scaling"] = None if p["type"] == "default" else p
    if kind == "minimax":
        config["attn_type_list"] = [int(t == "full_attention") for t in config.pop("layer_types")]
    if kind == "gemma3_text":
        config["sliding_window_pattern"] = 6 if len(config.pop("layer_types")) == 7 else 2
    if kind == "qwen2":
        config.pop("layer_types")
    config["torch_dtype"] = config.pop("dtype")
    usual = M.CONVERT[kind].usual
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if usual.get(key, ...) != value}))


@pytest.mark.peer
@pytest.mark.parametrize("spelling", ["v5", "hub"])
@pytest.mark.parametrize("kind, number", EVERY)
def test_folders_equal_transformers(kind, number, spelling, tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cls, fields = CASES[kind][0], CASES[kind][1][number]
    net = opened_by_transformers(hf, cls, config=fields)
    untied = kind == "t5" and fields.get("tie_word_embeddings") is False                 # transformers 5 ties it all the same
    if untied:
        net.lm_head.weight = torch.nn.Parameter(torch.zeros_like(net.lm_head.weight))
    randomise(net, kind.startswith("gemma"))
    net.save_pretrained(tmp_path / "hf", **(dict(max_shard_size="3KB") if spelling == "hub" and not untied else {}))
    if untied:
        file = tmp_path / "hf/model.safetensors"
        dist.write_safetensors(file, {n: t.clone() for n, t in dist.read_safetensors(file).items()} | {"lm_head.weight": net.lm_head.weight.detach()})
    if spelling == "hub":
        hub_spelling(tmp_path / "hf", kind)
    ours = M.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(fields["vocab_size"], (2, 17))
    texts = (torch.randint(fields["vocab_size"], (2, 9)), tokens) if kind == "t5" else (tokens,)
    read = lambda net: net(input_ids=texts[0], **(dict(decoder_input_ids=tokens) if kind == "t5" else {}), use_cache=False).logits
    a, b = ours(*texts), read(net)
    near = lambda x, y, tol=1e-5: (x - y).abs().max() <= tol * y.abs().max()
    assert b.std() > 0.2 and near(a, b)
    weight = torch.randn_like(b)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    assert near(ours.embed.weight.grad, net.get_input_embeddings().weight.grad, 1e-4)
    if kind != "bert" and ours.cfg.rope_scaling != "dynamic":                             # each cached step, not the last alone
        cache, steps = ours.new_cache(), []
        for piece in (tokens[:, :6], *tokens[:, 6:].split(1, 1)):
            steps.append(ours(*texts[:-1], piece, cache=cache))
        assert near(torch.cat(steps, 1), b)
    M.save_pretrained(ours, tmp_path / "back")
    saved = json.loads((tmp_path / "back/config.json").read_text())
    assert near(read(opened_by_transformers(hf, saved["architectures"][0], tmp_path / "back")), b)
    assert torch.equal(M.from_pretrained(tmp_path / "back").eval()(*texts), a)


def assert_defaults_are_theirs(kind, cls):
    """An empty config.json means what their class takes for every key."""
    hf = pytest.importorskip("transformers")
    whole = json.loads(getattr(hf, cls).config_class().to_json_string(use_diff=False))
    fields = [M._fields(M.CONVERT[kind], M._one_spelling(config)) for config in ({}, whole)]
    a, b = (M._canonical(ModelConfig(**f)) for f in fields)
    assert a == b


@pytest.mark.peer
@pytest.mark.parametrize("kind", CASES)
def test_what_a_config_leaves_out_is_what_their_class_takes(kind):
    assert_defaults_are_theirs(kind, CASES[kind][0])


@pytest.mark.peer
def test_bert_without_a_head(tmp_path):
    hf = pytest.importorskip("transformers")
    net = opened_by_transformers(hf, "BertModel", config=CASES["bert"][1][0])
    randomise(net, False)
    net.save_pretrained(tmp_path / "hf")
    ours, tokens = M.from_pretrained(tmp_path / "hf").eval(), torch.randint(29, (2, 9))
    types = torch.randint(2, (2, 9))
    want = net(tokens, token_type_ids=types)
    x_BTD = ours(tokens, types=types)
    torch.testing.assert_close(x_BTD, want.last_hidden_state)
    torch.testing.assert_close(ours.pooled(x_BTD), want.pooler_output)
    M.save_pretrained(ours, tmp_path / "back")
    torch.testing.assert_close(opened_by_transformers(hf, "BertModel", tmp_path / "back")(tokens, token_type_ids=types).pooler_output, want.pooler_output)


@pytest.mark.peer
def test_the_text_part_of_a_gemma3_that_sees(tmp_path):
    """Its vision tower stays theirs: what that makes of a picture goes into our model as a block that sees itself both ways."""
    hf = pytest.importorskip("transformers")
    text = DECODER | dict(head_dim=8, sliding_window=3, num_hidden_layers=7)
    vision = dict(model_type="siglip_vision_model", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    net = opened_by_transformers(hf, "Gemma3ForConditionalGeneration", config=dict(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=28, boi_token_index=27, eoi_token_index=26))
    randomise(net, True)
    net.save_pretrained(tmp_path / "hf")
    ours, tokens, pixels = M.from_pretrained(tmp_path / "hf").eval(), torch.randint(25, (2, 19)), torch.randn(4, 3, 28, 28)
    torch.testing.assert_close(ours(tokens), net(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    image = torch.tensor([[0] * 3 + [1] * 4 + [0] * 3 + [2] * 4 + [0] * 5, [0] * 5 + [1] * 4 + [0] + [2] * 4 + [0] * 5])
    tokens[image > 0] = 28
    seen = net.model.get_image_features(pixels)
    seen = seen if isinstance(seen, torch.Tensor) else seen.pooler_output
    embeds = torch.zeros(2, 19, 24).masked_scatter((image > 0)[..., None], seen)
    want = net(input_ids=tokens, pixel_values=pixels, token_type_ids=(image > 0).long(), use_cache=False).logits
    torch.testing.assert_close(ours(tokens, image=image, embeds=embeds), want, rtol=1e-5, atol=3e-5)


# ---- Golden logits: what transformers says, for a run without it ----

MORE = dict(vocab_size=11, n_layer=2, n_embd=16, n_head=4, d_ff=20, seq_len=32)
PRE = dict(norm_eps=1e-5, tie_embeddings=False, n_kv_head=2, attn="gqa")
GEMMA = dict(attn="gqa", n_kv_head=2, norm_at="sandwich", norm_one_plus=True, embed_scale=True, act="geglu_tanh", head_dim=6, attn_scale=0.5)
GLM4 = dict(PRE, qkv_bias=True, rope_layout="interleaved", rope_fraction=0.5, head_dim=8, norm_at="sandwich")
GOLDEN = {       # class in transformers: our fields, logits of the last token
    "GPT2LMHeadModel": (dict(norm="layer", act="gelu_tanh", pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True, norm_eps=1e-5),
        [-2.933608, -4.81012, 0.980652, 5.208274, 1.133958, -4.747876, -3.061642, 3.50482, 4.484632, -1.684015, -5.16836]),
    "LlamaForCausalLM": (dict(PRE, rope_theta=500.0, rope_scaling="llama3", rope_factor=4.0, rope_original=8),
        [-0.21485, 1.138012, 0.676894, -0.863186, -1.027356, 0.44607, 1.208465, 0.044579, -1.190365, -0.527879, 0.976041]),
    "MistralForCausalLM": (dict(PRE, window=3, layers="swa", head_dim=6),
        [-0.297544, 0.003891, 0.299124, 0.117556, -0.251395, -0.219625, 0.162225, 0.28549, -0.046313, -0.304294, -0.077233]),
    "Qwen2ForCausalLM": (dict(PRE, qkv_bias=True),
        [0.286093, 1.556883, 0.346017, -1.416396, -0.921087, 1.042426, 1.344322, -0.496618, -1.545954, -0.131054, 1.492745]),
    "Qwen3ForCausalLM": (dict(PRE, qk_norm="head", head_dim=8),
        [-0.209122, 0.861192, 0.558775, -0.634324, -0.816317, 0.302892, 0.939294, 0.07847, -0.907434, -0.446898, 0.725989]),
    "Olmo2ForCausalLM": (dict(PRE, qk_norm="width", norm_at="branch_post"),
        [-0.63278, 1.118846, 1.087043, -0.677496, -1.362113, 0.124465, 1.412647, 0.449083, -1.230315, -0.948603, 0.845173]),
    "Gemma2ForCausalLM": (dict(GEMMA, layers="swa,gqa", window=3, attn_softcap=2.0, logit_softcap=3.0),
        [-1.861857, 1.681102, 2.263298, -0.690013, -2.377648, -0.602457, 2.27921, 1.627743, -1.903328, -2.166033, 1.084484]),
    "Gemma3ForCausalLM": (dict(GEMMA, layers="swa,gqa", window=3, qk_norm="head", rope_local_theta=50.0, rope_scaling="linear", rope_factor=8.0),
        [-1.575937, 0.29217, 1.694561, 0.395838, -1.533846, -1.018595, 1.120287, 1.473442, -0.522055, -1.685402, -0.162235]),
    "GlmForCausalLM": (dict(GLM4, norm_at="pre"),
        [-0.263125, 0.419018, 0.43325, -0.243114, -0.531957, 0.027135, 0.542974, 0.193318, -0.464485, -0.381904, 0.309428]),
    "Glm4ForCausalLM": (GLM4,
        [-0.497359, 0.273553, 0.608424, -0.026527, -0.619195, -0.224872, 0.527894, 0.439202, -0.349574, -0.581132, 0.113629]),
    "MiniMaxForCausalLM": (dict(PRE, layers="lightning,gqa", norm_at="prenorm_residual", res_alpha=1.5, res_beta_mlp=0.5, moe=True, router="softmax", n_expert=3, n_active=2, n_shared_expert=0, n_dense_layer=0),
        [-1.548099, 2.920969, 2.734041, -1.810922, -3.469293, 0.402355, 3.632653, 1.072537, -3.197193, -2.370629, 2.234694]),
    "BertForMaskedLM": (dict(arch="encoder", norm="layer", norm_at="post", pos="learned", embed_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, act="gelu", mlm_head=True, head_bias=True, n_token_type=2),
        [0.148817, 1.521657, 0.847422, -0.731924, -0.841285, 0.408644, 0.731871, -0.550952, -1.352462, -0.165837, 1.425539]),
    "T5ForConditionalGeneration": (dict(arch="encdec", pos="t5", attn_scale=1.0, act="relu", logit_scale=16**-0.5, n_enc_layer=3),
        [-0.302654, 0.160073, 0.367645, -0.010805, -0.372032, -0.140244, 0.315092, 0.268174, -0.206211, -0.351897, 0.063337]),
}
TEXT = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])


def golden_folder(cls, path):
    """Weights sin(0.7 i + number of the tensor), gains around one, under the names that save_pretrained gives."""
    M.save_pretrained(Model(ModelConfig(**MORE | GOLDEN[cls][0])), path)
    tensors, file = {}, path / "model.safetensors"
    for number, (name, t) in enumerate(sorted(dist.read_safetensors(file).items())):
        wave = torch.sin(0.7 * torch.arange(t.numel(), dtype=torch.float64) + number).float().reshape(t.shape)
        gain = t.ndim == 1 and name.endswith("weight") and not cls.startswith("Gemma")
        tensors[name] = 1 + 0.2 * wave if gain else 0.4 * wave
    dist.write_safetensors(file, tensors, {"format": "pt"})
    assert json.loads((path / "config.json").read_text())["architectures"] == [cls]
    return path


@pytest.mark.parametrize("cls", GOLDEN)
def test_golden_logits(cls, tmp_path):
    texts = (TEXT, TEXT) if cls.startswith("T5") else (TEXT,)
    logits = M.from_pretrained(golden_folder(cls, tmp_path / "hf")).eval()(*texts)[0, -1]
    torch.testing.assert_close(logits, torch.tensor(GOLDEN[cls][1]), rtol=1e-5, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("cls", GOLDEN)
def test_golden_logits_come_from_transformers(cls, tmp_path):
    hf = pytest.importorskip("transformers")
    net = opened_by_transformers(hf, cls, golden_folder(cls, tmp_path / "hf"))
    logits = net(TEXT, **(dict(decoder_input_ids=TEXT) if cls.startswith("T5") else {})).logits[0, -1].detach()
    torch.testing.assert_close(logits, torch.tensor(GOLDEN[cls][1]), rtol=1e-5, atol=1e-5)


# ---- TransNormerLLM: transformers does not have it, so the released model file's equations, one token and head at a time ----

TNL = dict(model_type="transnormer", vocab_size=13, decoder_embed_dim=12, hidden_dim=12, decoder_layers=2, decoder_attention_heads=3, glu_dim=7,
           linear_use_lrpe_list=[1, 0], tie_word_embeddings=False)


def tnl_tensors():
    D, H, g = 12, 3, torch.Generator().manual_seed(3)
    shapes = {"model.embed_tokens.weight": (13, D), "lm_head.weight": (13, D), "model.layers.0.token_mixer.lrpe.theta": (H, 1, D // H)}
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in {
            "token_mixer.qkvu_proj": (4 * D, D), "token_mixer.out_proj": (D, D), "channel_mixer.l1": (7, D), "channel_mixer.l2": (7, D),
            "channel_mixer.l3": (D, 7)}.items()}
    return {name: torch.randn(shape, generator=g) * 0.5 for name, shape in shapes.items()}


def tnl_slow(w, tokens):
    """[TNL eq 5-13] as released: v and u raw, the norm without a gain, LRPE in the first layer."""
    D, H, K, T, L = 12, 3, 4, len(tokens), 2
    srms = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    x = w["model.embed_tokens.weight"][tokens].double() * D**0.5
    slopes = [2**-4, 2**-8, 2**-2]                               # ALiBi for 3 heads: those of 2, then the first of 4
    for i in range(L):
        p = lambda name: w[f"model.layers.{i}.{name}.weight"].double()
        q, k, v, u = (srms(x) @ p("token_mixer.qkvu_proj").T).split(D, -1)
        q, k = (t * torch.sigmoid(t) for t in (q, k))
        out = torch.zeros(T, D, dtype=torch.float64)
        for h in range(H):
            s, c = slopes[h] * (1 - i / (L - 1) + 1e-5), slice(h * K, h * K + K)
            for t in range(T):
                for j in range(t + 1):
                    turn = (w["model.layers.0.token_mixer.lrpe.theta"][h, 0].double() * (t - j)).cos() if i == 0 else 1
                    out[t, c] += math.exp(-s * (t - j)) * (q[t, c] * turn * k[j, c]).sum() * v[j, c]
        x = x + (u * srms(out)) @ p("token_mixer.out_proj").T
        y = srms(x)
        x = x + (y @ p("channel_mixer.l1").T * (y @ p("channel_mixer.l2").T)) @ p("channel_mixer.l3").T
    return (srms(x) @ w["lm_head.weight"].double().T).float()


def test_transnormer_equals_the_released_code(tmp_path):
    dist.write_safetensors(tmp_path / "model.safetensors", tnl_tensors())
    (tmp_path / "config.json").write_text(json.dumps(TNL))
    model, tokens = M.from_pretrained(tmp_path).eval(), torch.arange(11)
    torch.testing.assert_close(model(tokens[None])[0], tnl_slow(tnl_tensors(), tokens), rtol=1e-5, atol=1e-5)
    M.save_pretrained(model, tmp_path / "back")
    again = json.loads((tmp_path / "back/config.json").read_text())
    assert {key: again[key] for key in TNL} == TNL
    back = dist.read_safetensors(tmp_path / "back/model.safetensors")
    assert back.keys() == tnl_tensors().keys() and all(torch.equal(back[name], t) for name, t in tnl_tensors().items())


# ---- what is refused, and how ----

SMALL = dict(vocab_size=29, n_layer=2, n_embd=24, n_head=4, d_ff=20)
KINDS = {"llama": {}, "gemma3_text": dict(layers="swa,gqa", n_kv_head=2, window=3, norm_at="sandwich", norm_one_plus=True, embed_scale=True, qk_norm="head",
                                          act="geglu_tanh", rope_local_theta=50.0),
         "t5": dict(arch="encdec", pos="t5", attn_scale=1.0, act="relu", logit_scale=24**-0.5), "qwen2": dict(qkv_bias=True, attn="mqa"),
         "bert": dict(arch="encoder", norm="layer", norm_at="post", pos="learned", embed_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True,
                      act="gelu", mlm_head=True, head_bias=True, n_token_type=2),
         "gpt2": dict(norm="layer", pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True, act="gelu_tanh"),
         "minimax": dict(norm_at="prenorm_residual", layers="lightning*3,gqa", n_layer=8, n_kv_head=2, moe=True, router="softmax", n_expert=4,
                         n_shared_expert=0, n_dense_layer=0, res_alpha=1.5, res_beta_linear=0.5)}


def folder(path, kind, change={}, drop=()):
    """A folder of a small model of ours, its config.json changed."""
    if not path.is_dir():
        M.save_pretrained(Model(ModelConfig(**SMALL | KINDS[kind])), path)
        (path / "first.json").write_text((path / "config.json").read_text())
    config = json.loads((path / "first.json").read_text())
    assert config["model_type"] == kind
    (path / "config.json").write_text(json.dumps({key: value for key, value in (config | change).items() if key not in drop}))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folders_open_again(kind, tmp_path):
    model = Model(ModelConfig(**SMALL | KINDS[kind])).eval()
    M.save_pretrained(model, tmp_path / "hf")
    again = M.from_pretrained(tmp_path / "hf").eval()
    texts = (torch.arange(9)[None],) * (2 if kind == "t5" else 1)
    assert torch.equal(again(*texts), model(*texts))
    assert [layer.window for layer in again.plan] == [layer.window for layer in model.plan]
    half = M.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    M.save_pretrained(half, tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert half(*texts).dtype == torch.bfloat16 and (half(*texts).float() - model(*texts)).norm() < 0.05 * model(*texts).norm()
    state = M.from_pretrained(tmp_path / "half", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(state[name], t) and (t.dtype == torch.bfloat16 or "bias_E" in name) for name, t in half.state_dict().items())


@pytest.mark.parametrize("kind, change, says", [
    ("llama", dict(quantization_config=dict(bits=4)), "quantization_config"), ("llama", dict(rope_scaling=dict(type="longrope", factor=2.0)), "longrope"),
    ("llama", dict(rope_scaling=dict(rope_type="linear")), "factor"), ("llama", dict(hidden_act="quick_gelu"), "quick_gelu.*'silu'"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"), ("llama", dict(hidden_size="24"), "hidden_size='24'"),
    ("llama", dict(num_hidden_layers=1.5), "num_hidden_layers=1.5"), ("llama", dict(rope_scaling=7), "strange type"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights=False"), ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
    ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention"), ("gemma3_text", dict(sliding_window=None), "sliding_window"),
    ("gemma3_text", dict(rope_local_base_freq=0), "rope_local_base_freq"),
    ("gemma3_text", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"), ("gemma3_text", dict(layer_types=["full_attention"]), "layer_types"),
    ("gemma3_text", dict(rope_parameters=dict(sliding_attention=dict(rope_type="linear", factor=2.0))), "sliding layers"),
    ("qwen2", dict(layer_types=["full_attention", "chunked_attention"]), "chunked_attention"), ("bert", dict(is_decoder=True), "is_decoder"),
    ("bert", dict(position_embedding_type="relative_key"), "relative_key"), ("t5", dict(feed_forward_proj="gated-mish"), "gated-mish"),
    ("t5", dict(dense_act_fn="silu"), "dense_act_fn"), ("minimax", dict(mlp_alpha_factor=0), "mlp_alpha_factor=0"), ("minimax", dict(rotary_dim=4), "rotary_dim"),
])
def test_keys_that_change_the_maths_are_refused(kind, change, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        M.from_pretrained(folder(tmp_path / "hf", kind, change))


def test_every_key_of_rope_scaling_arrives():
    yarn = dict(rope_type="yarn", factor=3.0, original_max_position_embeddings=7, beta_fast=9.0, beta_slow=2.0, truncate=False,
                attention_factor=1.2, mscale=0.5, mscale_all_dim=0.7)
    llama3 = dict(rope_type="llama3", factor=3.0, original_max_position_embeddings=7, low_freq_factor=2.0, high_freq_factor=5.0)
    for rope, want in ((yarn, [3.0, 7, 9.0, 2.0, False, 1.2, 0.5, 0.7]), (llama3, [3.0, 7, 2.0, 5.0])):
        fields = M._fields(M.CONVERT["llama"], M._one_spelling(dict(rope_scaling=rope, rope_theta=500.0)))
        assert [fields[name] for name in M.ROPE[rope["rope_type"]]] == want and fields["rope_theta"] == 500.0
        back = M._described(M.CONVERT["llama"], M._canonical(ModelConfig(**fields)))
        assert back["rope_scaling"] == rope and back["rope_theta"] == 500.0
    longer = dict(max_position_embeddings=64, rope_scaling=dict(type="yarn", factor=None, original_max_position_embeddings=16))
    assert M._fields(M.CONVERT["qwen3"], M._one_spelling(longer))["rope_factor"] == 4.0


def test_all_that_does_not_fit_is_listed_by_its_name_on_disk(tmp_path):
    path = folder(tmp_path / "hf", "llama", dict(num_hidden_layers=3, intermediate_size=21))
    with pytest.raises(UsageError) as refusal:
        M.from_pretrained(path)
    assert "missing model.layers.2.input_layernorm.weight [24]" in str(refusal.value)
    assert "model.layers.0.mlp.gate_proj.weight is [20, 24], not [21, 24]" in str(refusal.value)
    with pytest.raises(UsageError, match=r"unexpected model.layers.1.input_layernorm.weight \[24\]"):
        M.from_pretrained(folder(path, "llama", dict(num_hidden_layers=1)))
    with pytest.raises(UsageError, match=r"transformer.h.0.mlp.c_fc.weight is \[24, 20\], not \[24, 21\]"):       # as stored: [in, out]
        M.from_pretrained(folder(tmp_path / "gpt2", "gpt2", dict(n_inner=21)))
    with pytest.raises(UsageError, match=r"missing model.layers.0.block_sparse_moe.experts.4.w1.weight \[8, 24\]"):
        M.from_pretrained(folder(tmp_path / "minimax", "minimax", dict(num_local_experts=5)))
    with pytest.raises(UsageError, match="'mamba'.*llama"):
        M.from_pretrained(folder(path, "llama", dict(model_type="mamba")))


def test_other_names_on_disk(tmp_path):
    """Folders saved without the head's wrapper, by old versions, with both names of one tensor, or with tables of old versions."""
    def rewritten(kind, change):
        path = folder(tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}", kind)
        before, text = M.from_pretrained(path).eval(), torch.arange(9)[None]
        tensors = {name: t.clone() for name, t in dist.read_safetensors(path / "model.safetensors").items()}
        dist.write_safetensors(path / "model.safetensors", change(tensors))
        return M.from_pretrained(path).eval(), before, (text, text) if kind == "t5" else (text,)

    for kind, change in {
        "llama": lambda t: {name.removeprefix("model."): x for name, x in t.items()} | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)},
        "gpt2": lambda t: {name.removeprefix("transformer."): x for name, x in t.items()} | {"h.0.attn.bias": torch.ones(1, 1, 9, 9)},
        "t5": lambda t: t | {"encoder.embed_tokens.weight": t["shared.weight"], "lm_head.weight": t["shared.weight"]},
        "bert": lambda t: {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in t.items()
                           if name != "cls.predictions.decoder.bias"} | {"bert.embeddings.position_ids": torch.arange(9)[None]},
    }.items():
        after, before, texts = rewritten(kind, change)
        assert torch.equal(after(*texts), before(*texts)), kind
    own_head, before, texts = rewritten("llama", lambda t: t | {"lm_head.weight": -t["model.embed_tokens.weight"]})
    assert not own_head.cfg.tie_embeddings                       # as transformers 5: a head of its own, whatever the configuration says
    torch.testing.assert_close(own_head(*texts), -before(*texts))
    assert M.from_pretrained(folder(tmp_path / "started", "t5", dict(decoder_start_token_id=3))).cfg.start_token == 3
    no_head, before, texts = rewritten("bert", lambda t: {name.removeprefix("bert."): x for name, x in t.items() if name[:4] != "cls."})
    assert no_head.cfg.headless and no_head(*texts).shape == (1, 9, 24)


@pytest.mark.parametrize("fields, says", [
    (dict(attn="mla"), "layers"), (dict(pos="alibi"), "pos"), (dict(moe=True, capacity=1.5), "capacity"), (dict(attn_gate=True), "attn_gate"), (dict(arch="prefix"), "arch"),
    (dict(rope_scaling="ntk", rope_factor=2.0), "ntk"), (dict(norm="group"), "norm"), (dict(layers="swa*3,mha", window=4, n_layer=4), "layers"),
    (dict(layers="swa,gqa", window=4, qkv_bias=True), "n_kv_head"),
    (KINDS["gemma3_text"] | dict(rope_scaling="linear", rope_factor=2.0, rope_local_theta=0.0), "rope_local_base_freq"),     # its local table is plain
])
def test_what_no_architecture_has_is_named(fields, says, tmp_path):
    with pytest.raises(UsageError, match=f"no Hugging Face architecture.*{says}"):
        M.save_pretrained(Model(ModelConfig(**SMALL | fields)), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_trained_router_bias_is_not_lost(tmp_path):
    model = Model(ModelConfig(**SMALL | KINDS["minimax"]))
    model.blocks[0].mlp.bias_E[1] = 0.5
    with pytest.raises(UsageError, match="blocks.0.mlp.bias_E"):
        M.save_pretrained(model, tmp_path / "hf")


def test_fields_without_effect_do_not_stand_in_the_way(tmp_path):
    M.save_pretrained(Model(ModelConfig(**SMALL, t5_buckets=8, n_expert=3, rope_beta_fast=9.0, init_std=0.1, attn_dropout=0.1, tile=16)), tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "llama"
