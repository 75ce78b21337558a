"""Hugging Face folders of architectures with experts: logits, gradients and cached steps equal theirs, both ways."""
import copy
import json
import re

import pytest
import torch

import dist
import model as M
from model import Model, ModelConfig
from test_hf import DECODER, TINY, YARN, assert_defaults_are_theirs, rope
from tokenizer import UsageError

MLA = TINY | dict(hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=24,
                  kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, moe_intermediate_size=8, n_routed_experts=8,
                  num_experts_per_tok=3, first_k_dense_replace=1)
MSCALE = rope("yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=8.0, mscale=0.7, mscale_all_dim=0.9)
CASES = {       # model_type: class, tiny configurations that differ in what the architecture knows
    "mixtral": ("MixtralForCausalLM", [
        DECODER | dict(num_local_experts=5, sliding_window=3) | rope(),
        DECODER | dict(num_local_experts=4, num_experts_per_tok=1, head_dim=10, tie_word_embeddings=True, rms_norm_eps=1e-3) | YARN]),
    "qwen3_moe": ("Qwen3MoeForCausalLM", [
        DECODER | dict(head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, num_hidden_layers=4, decoder_sparse_step=2, norm_topk_prob=True),
        DECODER | dict(num_experts=4, num_experts_per_tok=3, moe_intermediate_size=8, num_hidden_layers=3, mlp_only_layers=[1], attention_bias=True,
                       use_sliding_window=True, sliding_window=3) | rope("linear", factor=2.0)]),
    "olmoe": ("OlmoeForCausalLM", [
        DECODER | dict(num_experts=5, num_experts_per_tok=3), DECODER | dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, clip_qkv=0.8,
                                                                             attention_bias=True, num_key_value_heads=4)]),
    "deepseek": ("Deepseek", [
        DECODER | dict(n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=8, n_shared_experts=2, first_k_dense_replace=1, num_hidden_layers=3),
        DECODER | dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, n_shared_experts=1, norm_topk_prob=True, num_key_value_heads=4)]),
    "deepseek_v2": ("DeepseekV2ForCausalLM", [
        MLA | dict(q_lora_rank=None, n_shared_experts=2, routed_scaling_factor=1.5) | MSCALE,            # as the Lite model
        MLA | dict(q_lora_rank=12, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0, first_k_dense_replace=0,
                   attention_bias=True, rms_norm_eps=1e-3) | rope()]),
    "deepseek_v3": ("DeepseekV3ForCausalLM", [
        MLA | dict(q_lora_rank=12, n_group=4, topk_group=2) | MSCALE,
        MLA | dict(q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.5, rope_interleave=False, n_shared_experts=2,
                   first_k_dense_replace=2, attention_bias=True, hidden_size=30, rms_norm_eps=1e-3) | rope("linear", factor=2.0, mscale_all_dim=0.9)]),
    "glm4_moe": ("Glm4MoeForCausalLM", [
        DECODER | dict(head_dim=8, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=8, n_group=2, topk_group=1, routed_scaling_factor=2.5,
                       use_qk_norm=True, num_hidden_layers=3) | rope(partial_rotary_factor=0.5),
        DECODER | dict(head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=False, attention_bias=True,
                       n_shared_experts=2) | rope()]),
    "gpt_oss": ("GptOssForCausalLM", [
        DECODER | dict(head_dim=8, num_local_experts=5, num_experts_per_tok=2, sliding_window=3, num_hidden_layers=3)
        | rope("yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=8.0, truncate=False),
        DECODER | dict(head_dim=6, num_local_experts=4, num_experts_per_tok=4, sliding_window=4, attention_bias=False, tie_word_embeddings=True,
                       layer_types=["full_attention", "sliding_attention"]) | rope()]),
    "minimax": ("MiniMaxForCausalLM", [
        DECODER | dict(head_dim=6, num_local_experts=5, layer_types=["linear_attention", "full_attention"], block_size=4, mlp_beta_factor=1.1) | rope()]),
}
EVERY = [(kind, number) for kind, (_, cases) in CASES.items() for number in range(len(cases))]


def composed(fields):
    """The first DeepSeek MoE is not in transformers: their Llama, with the MoE of DeepSeek-V2 (greedy, nothing scaled) for MLP."""
    import transformers as hf
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
    v2 = hf.DeepseekV2Config(**{key: value for key, value in fields.items() if key not in ("norm_topk_prob", "head_dim")}, topk_method="greedy")
    v2._experts_implementation = "eager"
    net = hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**fields), attn_implementation="eager")
    for layer in net.model.layers[fields.get("first_k_dense_replace", 0):]:
        layer.mlp = DeepseekV2Moe(v2)
        if fields.get("norm_topk_prob"):
            layer.mlp.gate.register_forward_hook(lambda m, args, out: (out[0], out[1] / out[1].sum(-1, keepdim=True), out[2]))
    return net.eval()


def by_expert(state):
    """{name on disk: tensor}: their modules hold experts fused."""
    out = {}
    for name, t in state.items():
        stem, _, what = name.partition("experts.")
        for e in range(len(t)) if what in ("gate_up_proj", "down_proj") and t.ndim == 3 else ():
            parts = dict(zip(("gate_proj", "up_proj"), t[e].chunk(2))) if what == "gate_up_proj" else {"down_proj": t[e]}
            out |= {f"{stem}experts.{e}.{part}.weight": w.clone() for part, w in parts.items()}
        if what not in ("gate_up_proj", "down_proj"):
            out[name] = t.clone()
    return out


def fused(tensors, like):
    """The reverse of by_expert."""
    out, take = {}, lambda stem, part, n: torch.stack([tensors[f"{stem}.{e}.{part}.weight"] for e in range(n)])
    for name, t in like.items():
        stem = name.rpartition(".")[0]
        out[name] = tensors[name] if name in tensors else (torch.cat([take(stem, "gate_proj", len(t)), take(stem, "up_proj", len(t))], 1)
                                                            if name.endswith("gate_up_proj") else take(stem, "down_proj", len(t)))
    return out


def opened(kind, fields=None, folder=None):
    if kind == "deepseek":
        net = composed(fields)
        if folder:
            net.load_state_dict(fused(dist.read_safetensors(folder / "model.safetensors"), net.state_dict()))
        return net
    import transformers as hf
    cls, how = getattr(hf, CASES[kind][0]), dict(attn_implementation="eager")
    if folder:
        return cls.from_pretrained(folder, **how, experts_implementation="eager").eval()
    config = cls.config_class(**fields)
    config._experts_implementation = "eager"
    return cls._from_config(config, **how).eval()


def write(net, kind, fields, folder, spelling):
    if kind != "deepseek":
        net.save_pretrained(folder, **(dict(max_shard_size="6KB") if spelling == "hub" else {}))
    else:
        folder.mkdir()
        dist.write_safetensors(folder / "model.safetensors", by_expert(net.state_dict()))
        (folder / "config.json").write_text(json.dumps(fields | dict(model_type=kind, moe_layer_freq=1, scoring_func="softmax", seq_aux=True)))
    if spelling == "hub":
        hub_spelling(folder / "config.json", kind)


def hub_spelling(file, kind):
    """config.json as released folders have it."""
    config = json.loads(file.read_text())
    p = config.pop("rope_parameters", None) or {}
    p["type"] = p.pop("rope_type", "default")
    config |= {key: p.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in p}
    config["rope_scaling"] = None if p["type"] == "default" and kind != "gpt_oss" else p        # there null means YaRN
    if kind == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    if kind.startswith("deepseek_v"):
        config |= dict(moe_layer_freq=1, ep_size=1, aux_loss_alpha=0.001, seq_aux=True, scoring_func="softmax" if kind[-1] == "2" else "sigmoid")
        config |= {} if kind[-1] == "2" else dict(topk_method="noaux_tc")
        config = {key: value for key, value in config.items() if key not in ("head_dim", "qk_head_dim", "mlp_bias")}
    if kind == "minimax":
        config["attn_type_list"] = [int(t == "full_attention") for t in config.pop("layer_types")]
    usual = M.CONVERT[kind].usual
    file.write_text(json.dumps({key: value for key, value in config.items() if usual.get(key, ...) != value}))


@torch.no_grad()
def randomise(net, seed):
    """Every parameter random, gains, biases and the router's correction too: biased scores below 0, and clamps that are met."""
    g = torch.Generator().manual_seed(seed)
    for name, p in [*net.named_parameters(), *((n, b) for n, b in net.named_buffers() if n.endswith("correction_bias"))]:
        z = torch.randn(p.shape, generator=g)
        gain = p.ndim == 1 and name.endswith("weight")
        fan_in = p.shape[-2] if p.ndim == 3 and "GptOss" in type(net).__name__ else p.shape[-1]
        p.copy_(0.3 * z + gain - 0.6 * ("correction" in name) if p.ndim == 1 or "bias" in name else 0.5 * z if "embed" in name
                else z * fan_in**-0.5 * (5 if "experts.gate_up_proj" in name and "GptOss" in type(net).__name__ else 1))


gap = lambda x, y: ((x - y).abs().max() / y.abs().max()).item()


def settled(net, read):
    """Randomise until no choice of experts hangs on rounding: weights changed by 1e-6 hardly move the logits."""
    for seed in range(5, 30):
        randomise(net, seed)
        shaken, g = copy.deepcopy(net), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in shaken.parameters():
                p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=g))
            if gap(read(shaken), read(net)) < 1e-4:
                return
    raise AssertionError("every draw has a router that nearly ties")


@pytest.mark.peer
@pytest.mark.parametrize("spelling", ["v5", "hub"])
@pytest.mark.parametrize("kind, number", EVERY)
def test_folders_equal_transformers(kind, number, spelling, tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    fields = CASES[kind][1][number]
    net, tokens = opened(kind, fields), torch.randint(fields["vocab_size"], (2, 17))
    read = lambda net: net(input_ids=tokens, use_cache=False).logits
    settled(net, read)
    write(net, kind, fields, tmp_path / "hf", spelling)
    ours = M.from_pretrained(tmp_path / "hf").eval()
    a, b = ours(tokens), read(net)
    assert b.std() > 0.2 and gap(a, b) <= 1e-5
    assert gap(ours(tokens[:1]), a[:1]) <= 1e-6                                           # a row alone: nothing depends on the batch
    weight = torch.randn_like(b)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    assert gap(ours.embed.weight.grad, net.get_input_embeddings().weight.grad) <= 1e-4
    cache, steps = ours.new_cache(), []
    for piece in (tokens[:, :6], *tokens[:, 6:].split(1, 1)):
        steps.append(ours(piece, cache=cache))
    assert gap(torch.cat(steps, 1), b) <= 1e-5
    M.save_pretrained(ours, tmp_path / "back")
    saved = json.loads((tmp_path / "back/config.json").read_text())
    assert saved["model_type"] == kind
    assert gap(read(opened(kind, fields, tmp_path / "back")), b) <= 1e-5
    assert torch.equal(M.from_pretrained(tmp_path / "back").eval()(tokens), a)
    theirs, back = ({name: t for file in folder.glob("*.safetensors") for name, t in dist.read_safetensors(file).items()
                     if not re.search(M.CONVERT[kind].ignored, name)}
                    for folder in (tmp_path / "hf", tmp_path / "back"))
    assert theirs.keys() == back.keys() and all(torch.equal(back[name], t) for name, t in theirs.items())


@pytest.mark.peer
@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "deepseek"])
def test_what_a_config_leaves_out_is_what_their_class_takes(kind):
    assert_defaults_are_theirs(kind, CASES[kind][0])


# ---- multi-token prediction: layers after the last ----

SMALL = dict(vocab_size=29, n_layer=3, n_embd=24, n_head=4, d_ff=20, tie_embeddings=False, n_active=2, n_expert=6, d_expert=8)
V3 = dict(attn="mla", q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, rope_layout="interleaved", moe=True,
          n_group=3, top_group=2, routed_scale=2.5, n_dense_layer=1)
GLM = dict(attn="gqa", n_kv_head=2, head_dim=8, rope_fraction=0.5, qk_norm="head", moe=True, n_dense_layer=2)


def random_model(fields):
    model = Model(ModelConfig(**SMALL | fields)).eval()
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("bias_E"))]:
            z = torch.randn(p.shape, generator=g)
            keeps = name.endswith("bias_E") and not ("group_score" not in fields and fields.get("router", "sigmoid") == "sigmoid" and fields.get("moe"))
            p.copy_(0 * z if keeps else 0.3 * z + (p.ndim == 1 and "bias" not in name) if p.ndim == 1 else z * p.shape[-1]**-0.5)
    return model


@pytest.mark.peer
@pytest.mark.parametrize("kind, fields, D", [("deepseek_v3", V3, 2), ("glm4_moe", GLM, 1)])
def test_modules_that_predict_further_equal_transformers(kind, fields, D, tmp_path, monkeypatch):
    hf = pytest.importorskip("transformers")
    layers = pytest.importorskip("transformers.modeling_layers")
    ours, tokens = random_model(fields | dict(mtp=D)), torch.randint(29, (2, 11), generator=torch.Generator().manual_seed(1))
    M.save_pretrained(ours, tmp_path)
    cls = getattr(hf, CASES[kind][0])
    monkeypatch.setattr(cls, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34]\..*"])          # they list released depths
    net = opened(kind, folder=tmp_path)
    modules = layers.MtpModel.from_pretrained(net).eval()
    state = net.model(tokens, use_cache=False).last_hidden_state
    with torch.no_grad():
        want = ours.mtp_logits(tokens)
        for k in range(1, D + 1):
            places = torch.arange(k, 11)[None].expand(2, -1)
            state = modules.forward_layer(k - 1, state[:, :11 - k], places, None, input_ids=tokens[:, k:])
            assert gap(net.lm_head(state), want[k - 1]) <= 1e-5
    assert gap(net(tokens).logits, ours(tokens)) <= 1e-5


def changed(folder, tensors=lambda t: t, **config):
    """The folder with other tensors and configuration."""
    file = folder / "model.safetensors"
    dist.write_safetensors(file, tensors({name: t.clone() for name, t in dist.read_safetensors(file).items()}))
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return folder


def test_layers_after_the_last(tmp_path):
    """Read where config.json wants them and they are there, else left out; released folders repeat embedding and head in them."""
    ours, tokens = random_model(V3 | dict(mtp=2)), torch.arange(9)[None]
    M.save_pretrained(ours, tmp_path / "hf")
    names = dist.read_safetensors(tmp_path / "hf/model.safetensors")
    assert {"model.layers.4.enorm.weight", "model.layers.4.eh_proj.weight", "model.layers.4.mlp.gate.e_score_correction_bias"} <= names.keys()
    want, logits = ours.mtp_logits(tokens), ours(tokens)
    repeat = lambda t: t | {f"model.layers.{i}.{name}.weight": t[f"{of}.weight"].clone() for i in (3, 4) for name, of in (
        ("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head"))}
    again = M.from_pretrained(changed(tmp_path / "hf", repeat)).eval()
    assert all(torch.equal(x, y) for x, y in zip(again.mtp_logits(tokens), want))
    for D in (0, 1):
        fewer = M.from_pretrained(changed(tmp_path / "hf", num_nextn_predict_layers=D)).eval()
        assert fewer.cfg.mtp == D and torch.equal(fewer(tokens), logits)
    alone = lambda t: {name: x for name, x in t.items() if not re.search(r"layers\.[34]\.", name)}
    assert M.from_pretrained(changed(tmp_path / "hf", alone, num_nextn_predict_layers=1)).cfg.mtp == 0     # as transformers saves them
    M.save_pretrained(ours, tmp_path / "own")
    other = lambda t: t | {"model.layers.3.shared_head.head.weight": -t["lm_head.weight"]}
    with pytest.raises(UsageError, match="unexpected model.layers.3.shared_head.head.weight"):
        M.from_pretrained(changed(tmp_path / "own", other))
    with pytest.raises(UsageError, match="unexpected model.layers.2."):                  # a layer, not a module
        M.from_pretrained(changed(tmp_path / "own", alone, num_hidden_layers=2))


# ---- what is refused, and how ----

KINDS = {
    "mixtral": dict(moe=True, router="softmax", n_shared_expert=0, n_dense_layer=0, bias_lr=0.0),
    "qwen3_moe": dict(moe=True, router="softmax", n_shared_expert=0, n_dense_layer=0, moe_every=2, n_layer=4, norm_gates=False, qk_norm="head", bias_lr=0.0),
    "olmoe": dict(moe=True, router="softmax", n_shared_expert=0, n_dense_layer=0, qk_norm="width", clip_qkv=1.0, bias_lr=0.0),
    "deepseek": dict(moe=True, router="softmax", norm_gates=False, bias_lr=0.0),
    "deepseek_v2": V3 | dict(router="softmax", group_score="max", norm_gates=False, bias_lr=0.0, capacity=0.0),
    "deepseek_v3": V3, "glm4_moe": GLM | dict(rope_fraction=0.5),
    "gpt_oss": dict(moe=True, router="chosen", router_bias=True, expert_bias=True, expert_act="swiglu_oss", n_shared_expert=0, n_dense_layer=0, sinks=True,
                    layers="swa,gqa", n_kv_head=2, window=3, qkv_bias=True, out_bias=True, bias_lr=0.0)}


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_mixtures_without_a_block_of_experts_open(kind, tmp_path):
    fields = KINDS[kind] | dict(n_layer=2, moe_every=1) | (dict(dense_layers="0,1") if kind == "qwen3_moe" else dict(n_dense_layer=2))
    model, tokens = random_model(fields), torch.arange(9)[None]
    M.save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind and M.active_parameters(model) == sum(p.numel() for p in model.parameters())
    assert torch.equal(M.from_pretrained(tmp_path).eval()(tokens), model(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folders_open_again(kind, tmp_path):
    model, tokens = random_model(KINDS[kind]), torch.arange(9)[None]
    M.save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    again = M.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens), model(tokens)) and [layer.moe for layer in again.plan] == [layer.moe for layer in model.plan]
    assert "experts" in M.describe(M.from_pretrained(tmp_path, "meta"))
    half = M.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(b, model.get_buffer(name)) for name, b in half.named_buffers() if name.endswith("bias_E"))     # not rounded


@pytest.mark.parametrize("kind, change, says", [
    ("gpt_oss", dict(quantization_config=dict(quant_method="mxfp4")), "quantization_config.*mxfp4"), ("gpt_oss", dict(swiglu_limit=5.0), "swiglu_limit=5.0"),
    ("gpt_oss", dict(swiglu_alpha=1.0), "swiglu_alpha"), ("gpt_oss", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ("deepseek_v3", dict(quantization_config=dict(quant_method="fp8")), "fp8"), ("deepseek_v3", dict(scoring_func="softmax"), "scoring_func='softmax'"),
    ("deepseek_v3", dict(topk_method="greedy"), "topk_method='greedy'"), ("deepseek_v3", dict(moe_layer_freq=2), "moe_layer_freq=2"),
    ("deepseek_v3", dict(rope_interleave=None), "rope_interleave=None"), ("deepseek_v3", dict(topk_group=9), "top_group"),
    ("deepseek_v2", dict(norm_topk_prob=True), "norm_topk_prob=True"), ("deepseek_v2", dict(topk_method="noaux_tc"), "topk_method='noaux_tc'"),
    ("deepseek_v2", dict(mlp_bias=True), "mlp_bias"), ("deepseek_v2", dict(scoring_func="sigmoid"), "scoring_func"),
    ("deepseek_v2", dict(num_experts_per_tok=None), "n_active=0"), ("deepseek", dict(moe_layer_freq=2), "moe_layer_freq"),
    ("deepseek", dict(scoring_func="sigmoid"), "scoring_func"), ("mixtral", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ("qwen3_moe", dict(mlp_only_layers=["0"]), "mlp_only_layers"), ("qwen3_moe", dict(decoder_sparse_step=0), "decoder_sparse_step=0"),
    ("qwen3_moe", dict(num_experts="4"), "num_experts='4'"), ("glm4_moe", dict(hidden_act="relu"), "hidden_act"),
    ("glm4_moe", dict(use_qk_norm=2), "use_qk_norm=2"),
])
def test_keys_that_change_the_maths_are_refused(kind, change, says, tmp_path):
    M.save_pretrained(Model(ModelConfig(**SMALL | KINDS[kind])), tmp_path)
    with pytest.raises(UsageError, match=says):
        M.from_pretrained(changed(tmp_path, **change))


@pytest.mark.parametrize("kind, change, says", [
    ("mixtral", dict(router_bias=True), "router_bias|bias"), ("mixtral", dict(capacity=1.5), "capacity"), ("mixtral", dict(routed_scale=2.0), "routed_scale"),
    ("deepseek_v3", dict(dense_layers="2", n_dense_layer=0), "dense_layers"), ("deepseek_v3", dict(group_score="max", bias_lr=0.0), "group_score"),
    ("deepseek_v3", dict(expert_act="swiglu_oss"), "expert_act"), ("deepseek_v3", dict(mtp=1, mtp_normed=False), "mtp_normed"),
    ("deepseek_v2", dict(norm_gates=True), "norm_gates"), ("deepseek_v2", dict(mtp=1), "mtp"), ("gpt_oss", dict(n_shared_expert=1), "shared"),
    ("gpt_oss", dict(expert_bias=False), "expert_bias"),
])
def test_what_no_architecture_has_is_named(kind, change, says, tmp_path):
    with pytest.raises(UsageError, match=f"no Hugging Face architecture.*({says})"):
        M.save_pretrained(Model(ModelConfig(**SMALL | KINDS[kind] | change)), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_trained_router_bias_has_a_place_or_is_not_lost(tmp_path):
    model = random_model(KINDS["mixtral"])
    model.blocks[0].mlp.bias_E[1] = 0.5
    with pytest.raises(UsageError, match="blocks.0.mlp.bias_E"):
        M.save_pretrained(model, tmp_path / "hf")


def test_one_choice_of_groups_has_one_spelling(tmp_path):
    """No limit can be said in many ways; how groups are judged counts only where there is one."""
    model = random_model(KINDS["deepseek_v3"] | dict(n_group=3, top_group=3))
    M.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["n_group"], config["topk_group"]) == (1, 1)
    assert torch.equal(M.from_pretrained(tmp_path).eval()(torch.arange(9)[None]), model(torch.arange(9)[None]))


def test_presets_of_laptop_size():
    for name in ("deepseek-v2-tiny", "deepseek-v3-tiny"):
        model = M.meta_model(ModelConfig(**{key: value for key, value in M.PRESETS[name].items() if key in ModelConfig.__dataclass_fields__}))
        assert 3e6 < sum(p.numel() for p in model.parameters()) < 6e6 and model.cfg.vocab_size == 2048 and model.cfg.seq_len == 256


@pytest.mark.peer
def test_totals_equal_transformers():
    hf = pytest.importorskip("transformers")
    size = lambda name, **more: sum(p.numel() for p in M.meta_model(ModelConfig(**{
        key: value for key, value in (M.PRESETS[name] | more).items() if key in ModelConfig.__dataclass_fields__})).parameters())
    with torch.device("meta"):
        v2 = hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(
            hidden_size=5120, num_hidden_layers=60, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, n_routed_experts=160, n_shared_experts=2,
            num_experts_per_tok=6, moe_intermediate_size=1536, intermediate_size=12288, first_k_dense_replace=1, n_group=8, topk_group=3,
            topk_method="group_limited_greedy", routed_scaling_factor=16.0))
        v3 = hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config())
    assert size("deepseek-v2") == sum(p.numel() for p in v2.parameters())
    assert size("deepseek-v3", mtp=0) == sum(p.numel() for p in v3.parameters())
