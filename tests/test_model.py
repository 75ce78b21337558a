import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import dist
import model as M
from attention import ATTENTION, POSITIONS
from model import ACTIVATIONS, NORMS, PLACEMENTS, Model, ModelConfig
from tokenizer import UsageError

SMALL = dict(vocab_size=37, seq_len=24, n_layer=2, n_embd=24, n_head=4)
GPT2 = dict(norm="layer", act="gelu_tanh", pos="learned", qkv_bias=True, out_bias=True, mlp_bias=True, norm_eps=1e-5)
BERT = dict(GPT2, arch="encoder", norm_at="post", act="gelu", n_token_type=2, embed_norm=True, mlm_head=True, head_bias=True, pooler=True)
T5 = dict(arch="encdec", pos="t5", act="relu", attn_scale=1.0, logit_scale=24**-0.5, n_enc_layer=3)


def randomised(model, scale=1.0):
    """Every parameter random, gains and biases too: at their initial values dropped terms and wrong masks hide."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1))
    return model


def build(**fields):
    return randomised(Model(ModelConfig(**SMALL | fields)))


VARIANTS = [dict(attn=name) for name in ATTENTION] + [dict(pos=name) for name in POSITIONS if name != "rope"] + [dict(norm_at=place) for place in PLACEMENTS] + [
    GPT2, dict(attn="mla", q_lora_rank=8, tie_embeddings=False), dict(moe=True, n_expert=4, n_dense_layer=0), dict(pos="none", act="relu"),
    dict(attn="gqa", n_kv_head=2, head_dim=10, mlp_bias=True), dict(GPT2, attn="mla", moe=True, n_expert=3),
    dict(layers="swa*2,gqa", window=5, n_layer=3, n_kv_head=2, rope_local_theta=50.0, rope_scaling="linear", rope_factor=4.0, qk_norm="head", norm_at="sandwich",
         norm_one_plus=True, embed_scale=True, logit_softcap=5.0, attn_softcap=3.0, act="geglu_tanh"),
    dict(layers="lightning,mha", norm_at="prenorm_residual", res_alpha=1.5, res_beta=0.8, res_alpha_linear=2.0, res_beta_mlp=0.7),
    dict(attn="transnormer", pos="lrpe", lrpe_layers=1, norm="srms", act="bilinear", embed_scale=True), dict(window=5, sinks=True, attn_gate=True)]
ids = lambda fields: "-".join(f"{k}={v}" for k, v in fields.items())[:60] or "default"


@pytest.mark.parametrize("fields", VARIANTS, ids=ids)
def test_every_cached_step_equals_the_full_forward(fields, shapes_checked):
    model = build(**fields).eval()
    tokens = torch.randint(37, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full, cache, parts = model(tokens), model.new_cache(), []
        for size in (6, 1, 1, 1, 4, 1, 1, 1, 1):
            parts.append(model(tokens[:, cache.length:cache.length + size], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(model(tokens[:1]), full[:1], rtol=1e-5, atol=1e-5)
    assert full.std() > 0.3                                      # flat logits would hide mistakes
    assert cache.length == 17 and cache.numel() == 2 * sum(block.attn.kept(17) for block in model.blocks)


@pytest.mark.parametrize("fields", VARIANTS, ids=ids)
@pytest.mark.parametrize("half", [False, True])
def test_packed_documents_do_not_see_each_other(fields, half, shapes_checked):
    model = build(**fields).eval()
    lengths = (9, 1, 7, 4)
    tokens = torch.randint(37, (1, 24), generator=torch.Generator().manual_seed(0))
    doc = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((3,), -1)])[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        packed = model(tokens, doc_ids=doc)
        at, close = 0, dict(rtol=0.1, atol=0.15) if half else dict(rtol=3e-5, atol=3e-5)
        for n in lengths:
            torch.testing.assert_close(packed[:, at:at + n], model(tokens[:, at:at + n]), **close)
            at += n
        changed = tokens.clone()
        changed[0, 10] = (changed[0, 10] + 1) % 37               # inside document 2
        after = model(changed, doc_ids=doc)
    torch.testing.assert_close(after[:, :10], packed[:, :10], **close)
    torch.testing.assert_close(after[:, 17:], packed[:, 17:], **close)
    assert not torch.equal(after[:, 10:17], packed[:, 10:17])


def batch_of(B, T, seed=0, **more):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(37, (B, T + 1), generator=g)
    keep = torch.randint(1, T + 1, (B, 1), generator=g) > torch.arange(T)        # ragged: a row counts its first few tokens
    return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=keep.float(), positions=torch.arange(T).expand(B, T),
                doc_ids=torch.zeros(B, T, dtype=torch.long), **more)


SOURCE = torch.randint(37, (8, 11), generator=torch.Generator().manual_seed(7))
LOSSES = [(fields, {}) for fields in VARIANTS[:20] + VARIANTS[-6:]] + [
    (BERT, {}), (T5, dict(enc_tokens=SOURCE)), (dict(arch="prefix"), dict(prefix_len=torch.tensor([3, 1, 9, 13, 2, 5, 6, 4])))]


@pytest.mark.parametrize("fields, more", LOSSES, ids=lambda x: ids(x) if isinstance(x, dict) else x)
def test_loss_and_gradients_of_micro_batches_add_up_to_the_batch(fields, more):
    """k micro-batches = one batch k times as large, on ragged weights; a mean of means is not."""
    model, batch = build(**fields), batch_of(8, 13, **more)
    grads = lambda: [p.grad.clone() for p in model.parameters() if p.grad is not None]
    total = batch["weights"].sum()
    loss, weight, _ = model.loss(batch)
    assert weight == total
    (loss / total).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)
    want, scale = grads(), max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    where = {key: batch[key] for key in ("positions", "doc_ids", "prefix_len") if key in batch}
    texts = (batch["enc_tokens"], batch["tokens"]) if more.get("enc_tokens") is not None else (batch["tokens"],)
    nll = -model(*texts, **where).log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    torch.testing.assert_close(loss, (nll * batch["weights"]).sum())
    for k in (2, 8):
        model.zero_grad()
        parts = [{name: t.chunk(k)[i] for name, t in batch.items()} for i in range(k)]
        losses = [model.loss(part)[0] for part in parts]
        torch.testing.assert_close(sum(losses), loss, rtol=2e-6, atol=1e-6)
        (sum(losses) / total).backward()
        for a, b in zip(grads(), want):
            assert (a - b).abs().max() <= 2e-6 * max(1, scale)
        model.zero_grad()
        (sum(model.loss(part)[0] / part["weights"].sum() for part in parts) / k).backward()
        assert max((a - b).abs().max() for a, b in zip(grads(), want)) > 1e-3 * scale           # the wrong averaging shows


@pytest.mark.parametrize("attn", list(ATTENTION))
def test_every_mixer_placement_and_activation_train_together(attn):
    batch = batch_of(1, 5)
    for norm_at in PLACEMENTS:
        for act in ACTIVATIONS:
            model = Model(ModelConfig(**SMALL | dict(n_layer=1, n_embd=8, n_head=2, attn=attn, norm_at=norm_at, act=act, d_ff=8)))
            model.loss(batch)[0].backward()
            with torch.no_grad():
                before = model.loss(batch)[0]
                for p in model.parameters():
                    assert p.grad is not None and p.grad.isfinite().all()
                    p -= 1e-4 * p.grad
                assert model.loss(batch)[0] < before, (attn, norm_at, act)


# ---- Norms, activations, placements ----

def test_norms_equal_their_formulas(shapes_checked):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    cfg = ModelConfig(n_embd=12, norm_groups=3, norm_share=0.3, norm_eps=1e-3)
    rms = lambda z: (z.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        norms = {name: randomised(make(12, cfg)) for name, make in NORMS.items()}
    assert len(said) == 1 and "leaks the future" in str(said[0].message)
    gain = {name: getattr(norm, "weight", None) for name, norm in norms.items()}
    centred = lambda z: (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
    flat = x.flatten(0, 1)
    want = {"rms": x / rms(x) * gain["rms"], "layer": centred(x) * gain["layer"] + norms["layer"].bias, "srms": x / rms(x),
            "prms": x / rms(x[..., :4]) * gain["prms"],                                          # ceil(12 x 0.3) = 4 channels   [RMS sec 3.2]
            "group": centred(x.unflatten(-1, (3, 4))).flatten(-2) * gain["group"] + norms["group"].bias,
            "batch": ((flat - flat.mean(0)) / (flat.var(0, correction=0) + 1e-3).sqrt() * gain["batch"] + norms["batch"].bias).view_as(x)}
    for name, norm in norms.items():
        torch.testing.assert_close(norm(x), want[name], msg=name)
    torch.testing.assert_close(NORMS["group"](12, ModelConfig(norm_groups=1))(x), NORMS["layer"](12, ModelConfig())(x))     # one group is LayerNorm
    one_plus = NORMS["rms"](12, ModelConfig(norm_one_plus=True))
    assert (one_plus.weight == 0).all() and (Model(ModelConfig(**SMALL, norm_one_plus=True)).norm.weight == 0).all()
    torch.testing.assert_close(one_plus(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def test_activations_equal_their_formulas():
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    phi = 0.5 * (1 + torch.erf(x / 2**0.5))
    sig = 1 / (1 + torch.exp(-x))
    plain = {"relu": x.clamp(min=0), "relu2": x.clamp(min=0) ** 2, "gelu": x * phi, "silu": x * sig, "mish": x * torch.tanh(torch.log1p(x.exp())), "tanh": torch.tanh(x),
             "gelu_tanh": 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))), "sigmoid": sig}
    gates = {"glu": sig, "bilinear": x, "reglu": x.clamp(min=0), "geglu": x * phi, "geglu_tanh": plain["gelu_tanh"], "swiglu": x * sig}
    for name, (act, gated) in ACTIVATIONS.items():
        if name != "swish":
            torch.testing.assert_close(act(x), (gates if gated else plain)[name], msg=name)
    swish = M.Swish(41).double()
    torch.testing.assert_close(swish(x), x * sig)                                                # beta 1 is SiLU
    with torch.no_grad():
        swish.beta.fill_(1e4)
    torch.testing.assert_close(swish(x), x.clamp(min=0))                                         # and a large one ReLU       [Swish sec 4]
    low = min((F.silu(torch.tensor(v / 1e4)).item(), v / 1e4) for v in range(-20000, 0))
    assert abs(low[0] + 0.27846) < 1e-5 and abs(low[1] + 1.2785) < 1e-3                          # bounded below, not above


def test_placements_by_hand():
    x = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(0))
    f = lambda h: 3 * h + 1
    for place, want in {"pre": lambda r: x + f(r.pre(x)), "branch_post": lambda r: x + r.post(f(x)), "sandwich": lambda r: x + r.post(f(r.pre(x))),
                        "post": lambda r: r.after(x + f(x)), "deepnorm": lambda r: r.after(4**0.25 * x + f(x)), "prenorm_residual": lambda r: r.pre(x) + f(r.pre(x))}.items():
        cfg = ModelConfig(**SMALL, norm_at=place)
        res = randomised(M.Residual(cfg, M.residual_factors(cfg, "")))
        torch.testing.assert_close(res(x, f), want(res), msg=place)
    cfg = ModelConfig(**SMALL, norm_at="prenorm_residual", res_alpha=2.0, res_beta=0.5, res_beta_mlp=3.0)
    assert M.residual_factors(cfg, "") == (2.0, 0.5) and M.residual_factors(cfg, "_mlp") == (2.0, 3.0)
    assert M.deepnorm(ModelConfig(n_layer=6, arch="encdec", n_enc_layer=6)) == (18**0.25, 72**-0.25)      # [DeepNet fig 2]
    alpha, gain = M.deepnorm(ModelConfig(n_layer=6, arch="encdec", n_enc_layer=6), encoder=True)
    assert abs(alpha - 1.417) < 1e-3 and abs(gain - 0.497) < 1e-3


def test_embedding_gradient_shrinks_and_its_value_does_not():
    tokens = torch.arange(12)[None]
    plain, shrunk = build(tie_embeddings=False), build(tie_embeddings=False, embed_grad_shrink=0.1)
    a, b = plain(tokens), shrunk(tokens)
    torch.testing.assert_close(a, b)
    a.square().sum().backward(), b.square().sum().backward()
    torch.testing.assert_close(shrunk.embed.weight.grad, 0.1 * plain.embed.weight.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shrunk.blocks[0].attn.w_q.weight.grad, plain.blocks[0].attn.w_q.weight.grad, rtol=1e-3, atol=1e-3)


# ---- Encoders, prefixes, images ----

def test_an_encoder_sees_both_ways_but_no_padding():
    model, tokens = build(**BERT).eval(), torch.randint(37, (1, 9), generator=torch.Generator().manual_seed(0))
    padded = model(tokens, doc_ids=torch.tensor([[0] * 5 + [-1] * 4]))[:, :5]
    torch.testing.assert_close(padded, model(tokens[:, :5]))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 37
    assert (model(changed) != model(tokens)).any(-1).all()       # the last token changes every place
    assert model.pooled(model.hidden(tokens)).shape == (1, 24) and not torch.equal(model(tokens), model(tokens, types=torch.ones_like(tokens)))
    with pytest.raises(UsageError, match="does not generate"):
        model.generate(tokens, 3)


def test_a_prefix_is_read_both_ways_and_nothing_else_is():
    model, tokens = build(arch="prefix").eval(), torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))
    length = torch.tensor([4, 6])
    full = model(tokens, prefix_len=length)

    def changes(place):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 37
        return ((model(other, prefix_len=length) - full).abs().amax(-1) > 1e-6).int().tolist()

    assert changes(3) == [[1] * 9, [1] * 9] and changes(5) == [[0] * 5 + [1] * 4, [1] * 9] and changes(7) == [[0] * 7 + [1] * 2] * 2
    cache = model.new_cache()
    parts = [model(tokens[:, :6], prefix_len=length, cache=cache)] + [model(tokens[:, i:i + 1], cache=cache) for i in range(6, 9)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens), build()(tokens))   # without a prefix it is a decoder
    out = model.generate(tokens, 3)
    assert torch.equal(out[:, 9:], torch.stack([model(out[:, :n], prefix_len=torch.tensor([9, 9]))[:, -1].argmax(-1) for n in (9, 10, 11)], 1))
    with pytest.raises(UsageError, match="--arch=prefix"):
        build()(tokens, prefix_len=length)


def test_an_image_block_sees_itself_both_ways():
    model, tokens = build(layers="swa,mha", window=3).eval(), torch.randint(37, (1, 9), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UsageError, match="one piece"):
        cache = model.new_cache()
        model(tokens[:, :3], image=torch.tensor([[0, 1, 1]]), cache=cache)
        model(tokens[:, 3:5], image=torch.tensor([[1, 0]]), cache=cache)
    with pytest.raises(UsageError, match="linear mixers"):
        build(attn="linear")(tokens, image=torch.ones_like(tokens))
    with pytest.raises(UsageError, match="give image"):
        model(tokens, embeds=torch.zeros(1, 9, 24))
    image, embeds = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0]]), torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(1))
    full = model(tokens, image=image, embeds=embeds)

    def changed(place):
        other = embeds.clone()
        other[:, place] += 1
        return (model(tokens, image=image, embeds=other) - full).abs().amax(-1)[0] > 1e-6

    assert changed(5).tolist() == [False, False, True, True, True, True, True, True, True] and not changed(6).any()
    cache = model.new_cache()
    parts = [model(tokens[:, :7], image=image[:, :7], embeds=embeds[:, :7], cache=cache)] + [model(tokens[:, i:i + 1], cache=cache) for i in (7, 8)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [T5, dict(arch="encdec"), dict(arch="encdec", pos="learned", attn="gqa", n_kv_head=2), dict(arch="encdec", attn="mla", norm_at="deepnorm"), dict(arch="encdec", moe=True, pos="alibi"), dict(arch="encdec", sinks=True, attn_softcap=2.0, attn="swa", window=4)],
                         ids=ids)
def test_an_encoder_decoder_reads_its_source(fields, shapes_checked):
    model = build(**fields).eval()
    source, target = torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(0)), torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(1))
    full, cache, parts = model(source, target), model.new_cache(), []
    for size in (3, 1, 1, 2, 1, 1):
        parts.append(model(source, target[:, cache.length:cache.length + size], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-5, atol=1e-5)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), source[:1, 4:]], 1)
    torch.testing.assert_close(model(padded, target[:1], enc_doc_ids=torch.tensor([[-1] * 4 + [0] * 7])), model(source[:1, 4:], target[:1]), rtol=1e-5, atol=1e-5)
    cache, hidden_docs = model.new_cache(), torch.tensor([[-1] * 4 + [0] * 7])
    parts = [model(padded, target[:1, :4], enc_doc_ids=hidden_docs, cache=cache), model(padded, target[:1, 4:], cache=cache)]      # the cache knows them
    torch.testing.assert_close(torch.cat(parts, 1), model(padded, target[:1], enc_doc_ids=hidden_docs), rtol=1e-5, atol=1e-5)
    packed = model(source[:1], target[:1], doc_ids=torch.tensor([[0] * 4 + [1] * 5]), enc_doc_ids=torch.tensor([[0] * 6 + [1] * 5]))
    torch.testing.assert_close(packed, torch.cat([model(source[:1, :6], target[:1, :4]), model(source[:1, 6:], target[:1, 4:])], 1), rtol=1e-5, atol=1e-5)
    out = model.generate(source, 7)
    assert out.shape == (2, 8) and (out[:, 0] == 0).all() and torch.equal(model(source, out[:, :-1]).argmax(-1), out[:, 1:])
    short, long = model.generate([source[0, :5].tolist(), source[1]], 7)
    assert torch.equal(short, model.generate(source[:1, :5], 7)[0]) and torch.equal(long, out[1])
    with pytest.raises(UsageError, match="two texts"):
        model(source)
    with pytest.raises(UsageError, match="by keyword"):
        build()(source, torch.arange(11)[None])


# ---- Generation ----

def test_generate_takes_the_likeliest_or_samples():
    model, tokens = build(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = model.generate(tokens, 9)
    assert out.shape == (2, 12) and torch.equal(out[:, :3], tokens) and model.training
    assert torch.equal(out[:, 3:], model(out[:, :-1])[:, 2:].argmax(-1))
    draw = lambda seed, **how: model.generate(tokens, 9, temperature=1.0, generator=torch.Generator().manual_seed(seed), **how)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, top_k=1), out) and torch.equal(draw(0, top_p=1e-9), out)
    assert torch.equal(torch.stack(list(model.stream(tokens, 9)), 1), out[:, 3:])
    assert torch.equal(model.generate(tokens, 0), tokens)


@pytest.mark.parametrize("fields", [dict(), GPT2, dict(attn="swa", window=4), dict(attn="mla"), dict(attn="lightning"), dict(attn="gdn"), dict(attn="strided"), dict(pos="t5"), dict(arch="prefix")], ids=ids)
def test_unequal_prompts_are_continued_as_if_alone(fields):
    model, prompts = build(**fields).eval(), [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [3]]
    for row, prompt in zip(model.generate(prompts, 9), prompts):
        assert torch.equal(row, model.generate(torch.tensor([prompt]), 9)[0])


def test_generation_calls_the_model_once_a_step_on_new_tokens_alone():
    model, seen = build(), []
    forward = model.forward
    model.forward = lambda tokens, *a, **how: seen.append(tuple(tokens.shape)) or forward(tokens, *a, **how)
    model.generate(torch.zeros(2, 5, dtype=torch.long), 4)
    assert seen == [(2, 5), (2, 1), (2, 1), (2, 1)]


def test_stop_ids_end_a_row_and_then_the_batch():
    model, tokens = build(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    free = model.generate(tokens, 12)[:, 3:].tolist()
    stop = free[0][2]
    first = [row.index(stop) if stop in row else 12 for row in free]
    out = model.generate(tokens, 12, stop=[stop])[:, 3:].tolist()
    assert len(out[0]) == min(12, max(first) + 1)
    for row, whole, end in zip(out, free, first):
        assert row[:end + 1] == whole[:min(end + 1, len(row))] and all(token == stop for token in row[end:])
    for given in ([stop], {stop}, torch.tensor([stop]), iter([stop])):
        rows = model.generate([[1, 2, 3], [4, 5]], 12, stop=given)
        assert rows[0].tolist() == [1, 2, 3, *free[0][:first[0] + 1]]


def test_generation_leaves_every_module_in_its_mode():
    model = build(resid_dropout=0.5)
    model.blocks[0].eval()
    one, two = (model.stream(torch.tensor([[1, 2]]), 5) for _ in range(2))
    a = [next(one), next(two)]
    one.close()
    assert model.training and model.blocks[1].training and not model.blocks[0].training
    assert torch.equal(a[0], a[1]) and torch.equal(torch.stack([a[1], *two], 1)[0], model.generate(torch.tensor([[1, 2]]), 5)[0, 2:])


@pytest.mark.parametrize("prompts", [[], [[]], [[1.5]], torch.zeros(1, 0, dtype=torch.long), [1, 2], [[37]], [[-1]]], ids=str)
def test_strange_prompts_are_refused(prompts):
    with pytest.raises(UsageError, match="prompt"):
        build().generate(prompts, 2)


@pytest.mark.parametrize("how", [dict(temperature=-1.0), dict(temperature=math.nan), dict(top_p=0.0), dict(top_k=-1), dict(repetition_penalty=0.0)], ids=str)
def test_impossible_sampling_is_refused(how):
    with pytest.raises(UsageError, match="for example 0.8"):
        build().generate([[1]], 2, **how)
    assert build().generate([[1]], 3, temperature=1e-40, generator=torch.Generator().manual_seed(0))[0].tolist() == build().generate([[1]], 3)[0].tolist()


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    torch.testing.assert_close(M.penalised(logits, 2.0), torch.tensor([[1.0, -2.0, 0.25]]))
    model = build()
    out = model.generate(torch.tensor([[1, 2, 3]]), 20, repetition_penalty=1e9)[0].tolist()
    assert len(set(out)) == len(out)                             # nothing is ever said twice


def test_pick_keeps_the_right_tokens():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    g = torch.Generator().manual_seed(0)
    share = lambda **how: torch.bincount(M.pick(logits, 1.0, generator=g, **how), minlength=4) / 4000
    torch.testing.assert_close(share(), logits[0].exp(), atol=0.03, rtol=0)
    torch.testing.assert_close(share(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    torch.testing.assert_close(share(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    torch.testing.assert_close(share(top_p=0.4), torch.tensor([1.0, 0, 0, 0]))


@pytest.mark.peer
@pytest.mark.parametrize("how", [dict(), dict(repetition_penalty=1.7), dict(stop=[5, 9])])
def test_generation_equals_transformers(how, tmp_path):
    hf = pytest.importorskip("transformers")
    model = build(attn="gqa", n_kv_head=2, tie_embeddings=False).eval()
    M.save_pretrained(model, tmp_path)
    theirs, tokens = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), torch.tensor([[1, 2, 3], [4, 7, 6]])
    rename = dict(how)
    stop = rename.pop("stop", None)
    want = theirs.generate(tokens, max_new_tokens=15, do_sample=False, eos_token_id=stop, pad_token_id=0, **rename)
    got = model.generate(tokens, 15, **how)
    for a, b in zip(got.tolist(), want.tolist()):
        end = next((i + 1 for i, token in enumerate(b) if i > 2 and stop and token in stop), len(b))
        assert a[:end] == b[:end]


# ---- Initial weights, sizes ----

def test_initial_weights_depend_on_seed_and_name_alone():
    a, b, c = (Model(ModelConfig(**SMALL | f)).state_dict() for f in (dict(), dict(act="gelu", moe=False), dict(seed=1)))
    assert torch.equal(a["blocks.1.attn.w_q.weight"], b["blocks.1.attn.w_q.weight"])
    assert not torch.equal(a["blocks.1.attn.w_q.weight"], c["blocks.1.attn.w_q.weight"])
    assert not torch.equal(a["blocks.0.attn.w_q.weight"], a["blocks.1.attn.w_q.weight"])
    assert abs(a["embed.weight"].std() - 0.02) < 2e-3 and abs(a["blocks.0.attn.w_o.weight"].std() - 0.01) < 1e-3
    deep = Model(ModelConfig(**SMALL | dict(norm_at="deepnorm", n_layer=8))).state_dict()
    assert abs(deep["blocks.0.attn.w_q.weight"].std() - 24**-0.5) < 0.02 and abs(deep["blocks.0.attn.w_v.weight"].std() - 64**-0.25 * 24**-0.5) < 0.01
    for name in ATTENTION:                                       # nothing keeps the memory it was born with
        one, two = (Model(ModelConfig(**SMALL, attn=name, sinks=True, norm_one_plus=True)).state_dict() for _ in range(2))
        assert all(torch.equal(one[key], two[key]) and one[key].isfinite().all() for key in one), name


def test_dropout_is_off_by_default_and_in_evaluation():
    tokens = torch.arange(20)[None]
    assert torch.equal((model := build())(tokens), model(tokens))
    for field in ("embed_dropout", "resid_dropout", "attn_dropout"):
        model = build(**{field: 0.5})
        assert not torch.equal(model(tokens), model(tokens)), field
        model.eval()
        torch.testing.assert_close(model(tokens), build()(tokens))


@pytest.mark.parametrize("fields, says", [
    (dict(attn="nope"), "mla"), (dict(norm="nope"), "rms"), (dict(n_layer=0), "n_layer"), (dict(resid_dropout=1.0), "share"), (dict(norm_eps=0.0), "norm_eps"),
    (dict(layers="swa*x"), "swa.5,mha"), (dict(layers="mha,,mha"), "mixers are"), (dict(window=-1), "window"), (dict(arch="encoder", attn="linear"), "left to right"),
    (dict(pos="alibi", attn="lightning"), "--pos=rope"), (dict(norm="group", norm_groups=7), "norm_groups"), (dict(n_head=5), "n_head"), (dict(attn="strided", n_head=1), "sparse"),
    (dict(head_dim=7), "even width"), (dict(rope_fraction=0.001), "even width"), (dict(rope_scaling="ntk", head_dim=2), "use linear"), (dict(pos="t5", t5_distance=8), "32 and 128"),
    (dict(pos="t5", t5_buckets=1), "t5_buckets"), (dict(attn_scale=math.nan), "finite"), (dict(rope_theta=0.0), "above 0"), (dict(rope_factor=0.5), "at least 1"),
    (dict(rope_low=4.0), "rope_high"), (dict(rope_beta_slow=40.0), "rope_beta_fast"), (dict(moe=True, n_shared_expert=-1), "at least 0"),
    (dict(norm="group", norm_groups=24), "two or more"), (dict(layers="mha*99999999999"), "mixers are"), (dict(start_token=37), "below"), (dict(embed_grad_shrink=1.5), "at most 1"),
    (dict(norm="layer", norm_one_plus=True), "norm_one_plus"), (dict(rope_scaling="magic"), "yarn"), (dict(rope_fraction=0.0), "rope_fraction"),
])
def test_impossible_models_are_refused(fields, says):
    with pytest.raises(UsageError, match=says):
        Model(ModelConfig(**SMALL | fields))


def test_flags_without_effect_are_named():
    said = lambda *names, **fields: M.unused(ModelConfig(**SMALL | fields), names)
    assert said("window", "tile", "n_kv_head") == {"tile": "a linear mixer"}
    assert list(said("window", "sinks", "tile", attn="gdn")) == ["window", "sinks"]
    assert "swa" in said("window", layers="mha,mla", window=3)["window"] and not said("window", layers="mha,swa", window=3)
    assert list(said("n_kv_head", "rope_fraction", "kv_lora_rank", attn="mla")) == ["rope_fraction", "n_kv_head"]
    assert list(said("rope_factor", "rope_theta", "rope_beta_fast", "rope_low", rope_scaling="yarn")) == ["rope_low"]
    assert list(said("n_expert", "d_ff")) == ["n_expert"] and list(said("n_expert", "d_ff", moe=True, n_dense_layer=0, d_expert=8)) == ["d_ff"]
    assert not said("d_ff", "act", moe=True, n_dense_layer=0) and list(said("act", "mlp_bias", moe=True, n_dense_layer=0, d_ff=64)) == ["act", "mlp_bias"]
    assert list(said("aux_loss", moe=True, aux_loss="switch", aux_alpha=0.0)) == ["aux_loss"] and said("device_alpha", moe=True, n_device=1, device_alpha=0.1)
    assert len(said("n_group", "top_group", moe=True, n_group=4, top_group=4)) == 2 and not said("n_group", "top_group", moe=True, n_group=4, top_group=2)
    with pytest.raises(UsageError, match="leaves no block"):
        M.refuse_no_experts(ModelConfig(**SMALL, moe=True, n_dense_layer=2))


def test_another_run_of_the_same_weights():
    model = build(**GPT2, moe=True, n_expert=3)
    again = M.rebuilt(model, ModelConfig(**SMALL | GPT2 | dict(moe=True, n_expert=3, seq_len=10, resid_dropout=0.5)))
    tokens = torch.arange(10)[None]
    assert torch.equal(again.eval()(tokens), model.eval()(tokens)) and again.train() and not torch.equal(again(tokens), model(tokens))
    assert again.pos_embed.weight.shape == (10, 24) and all(b.device.type == "cpu" for b in again.buffers())


def test_learned_positions_end():
    with pytest.raises(UsageError, match="--seq_len=24"):
        build(**GPT2)(torch.zeros(1, 25, dtype=torch.long))
    assert build()(torch.zeros(1, 40, dtype=torch.long)).shape == (1, 40, 37)
