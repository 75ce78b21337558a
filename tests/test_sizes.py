"""Sizes and the drawing: what describe counts is what runs, what draw shows is what is there."""
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
import torch

import model as M
from attention import ATTENTION
from model import Model, ModelConfig
from tokenizer import UsageError

SMALL = dict(vocab_size=37, seq_len=24, n_layer=2, n_embd=24, n_head=4)
FIELDS = ModelConfig.__dataclass_fields__


def meta(**flags):
    return M.meta_model(ModelConfig(**{name: value for name, value in flags.items() if name in FIELDS}))


def preset(name, **more):
    return meta(**dict(vocab_size=50257) | M.PRESETS[name] | more)


ids = lambda fields: "-".join(f"{k}={v}" for k, v in fields.items())[:60] or "default"

# ---- Sizes ----


def test_parameters_by_hand():
    table = M.parameter_table(preset("gpt2"))
    assert table == dict(embedding=(50257 + 1024) * 768, attention=12 * (4 * 768**2 + 4 * 768), mlp=12 * (8 * 768**2 + 5 * 768), norms=25 * 2 * 768)
    assert sum(table.values()) == 124_439_808                                                       # as published
    moe = meta(**SMALL, moe=True, n_expert=8, n_active=2, d_expert=5, n_dense_layer=1)
    assert sum(p.numel() for p in moe.parameters()) - M.active_parameters(moe) == 6 * 3 * 5 * 24
    assert M.parameter_table(moe)["experts"] == 8 * 24 + 9 * 3 * 5 * 24                             # router, routed and shared
    both = M.parameter_table(meta(**SMALL, arch="encdec", pos="t5", tie_embeddings=False))
    assert both["attention"] == 4 * 4 * 24**2 + 2 * 32 * 4 and both["cross-attention"] == 2 * 4 * 24**2 and both["head"] == 37 * 24
    bert = M.parameter_table(meta(**SMALL, arch="encoder", mlm_head=True, head_bias=True, pooler=True, embed_norm=True, norm="layer"))
    assert bert["head"] == 2 * (24**2 + 24) + 37 and bert["norms"] == (2 * 2 + 3) * 48              # final, embed_norm, mlm_norm


RELEASED = {       # parameters of the released models, as transformers counts them
    "mistral": 7_241_732_096, "deepseek-llm": 6_910_365_696, "qwen3": 596_049_920, "olmo2": 1_484_916_736, "gemma3": 999_885_952,
    "glm4": 9_400_279_040, "t5": 247_577_856, "bert": 109_514_298, "deepseek-v3": 671_026_404_352}


@pytest.mark.parametrize("preset", RELEASED)
def test_presets_have_the_size_of_the_released_models(preset):
    fields = {key: value for key, value in M.PRESETS[preset].items() if key in ModelConfig.__dataclass_fields__}
    assert sum(M.parameter_table(M.meta_model(ModelConfig(**fields))).values()) == RELEASED[preset]


@pytest.mark.parametrize("fields", [dict(attn=a) for a in ATTENTION] + [
    dict(norm=n) for n in ("layer", "prms", "group")] + [dict(attn_gate=True, sinks=True, qk_norm="head", qkv_bias=True, out_bias=True, mlp_bias=True),
    dict(attn="mla", q_lora_rank=8, moe=True), dict(pos="shaw"), dict(act="swish"), dict(n_token_type=2, embed_norm=True, head_bias=True)], ids=ids)
def test_every_parameter_has_its_component(fields):
    """head is what is left over: nothing else may end there."""
    model = meta(**SMALL | dict(n_layer=2) | fields)
    assert sum(M.parameter_table(model).values()) == sum(p.numel() for p in model.parameters())
    for name, _ in model.named_parameters():
        assert (M.component(name) == "head") == name.startswith(("head", "mlm_dense", "pooler")), name
        if ".mlp." in name:
            assert M.component(name) in ("mlp", "experts")


@pytest.mark.peer
def test_totals_equal_transformers():
    hf = pytest.importorskip("transformers")
    count = lambda cls, config: sum(p.numel() for p in cls(config).parameters())
    with torch.device("meta"):
        gpt2 = count(hf.GPT2LMHeadModel, hf.GPT2Config())
        llama = count(hf.LlamaForCausalLM, hf.LlamaConfig(num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4, hidden_size=768,
                                                          intermediate_size=2048, vocab_size=50257, tie_word_embeddings=False))
        v3 = count(hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config())          # its defaults are the released model
    total = lambda name: sum(M.parameter_table(preset(name)).values())
    assert (total("gpt2"), total("llama"), total("deepseek-v3")) == (gpt2, llama, v3)


COUNTED = [dict(attn=a) for a in ATTENTION] + [dict(attn=a, tile=8) for a in ("linear", "lightning", "gdn", "kda")] + [
    dict(tie_embeddings=False), dict(attn="gqa", n_kv_head=2), dict(attn="mla", q_lora_rank=8), dict(layers="swa,lightning", window=5),
    dict(moe=True, n_expert=4, n_dense_layer=0), dict(moe=True, n_expert=4, n_shared_expert=0), dict(mlm_head=True, act="gelu"), dict(attn_gate=True, sinks=True),
    dict(pos="t5"), dict(pos="learned", n_token_type=2), dict(pos="alibi"), dict(pos="lrpe", attn="transnormer"), dict(headless=True), dict(arch="prefix"),
    dict(act="swish", qk_norm="width"), dict(arch="encoder", pooler=True), dict(arch="encdec", pos="t5", n_enc_layer=3), dict(arch="encdec", tie_embeddings=False)]


@pytest.mark.parametrize("fields", COUNTED, ids=ids)
def test_flops_equal_torchs_counter(fields):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    torch.manual_seed(0)
    model = Model(ModelConfig(**SMALL | fields))
    tokens = torch.zeros(1, 24, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:          # the fused CPU kernel is not counted
        y = model(*[tokens] * (2 if model.enc_plan else 1))
        first = count.get_total_flops()
        y.sum().backward()
    flops = M.flops_per_token(model, 24)
    assert first == 24 * flops / 3                                                       # forward
    # the state before the first tile is zero, and so is the gradient that torch does not compute for it
    recurrent = any(block.attn.recurrent for block in model.blocks)
    assert 0.9 < count.get_total_flops() / (24 * flops) < 1.01 if recurrent else count.get_total_flops() == 24 * flops


CACHED = [dict(attn=a) for a in ("mha", "gqa", "mqa", "mla", "strided", "linear", "lightning", "transnormer", "gdn")] + [
    dict(layers="swa,mha", window=5), dict(layers="lightning,gqa"), dict(attn="mla", window=6)]


@pytest.mark.parametrize("fields", CACHED, ids=ids)
@pytest.mark.parametrize("T", [1, 4, 23])
def test_cache_bytes_are_those_of_a_cache(fields, T):
    model = Model(ModelConfig(**SMALL | fields))
    cache = model.new_cache()
    with torch.no_grad():
        model(torch.zeros(1, T, dtype=torch.long), cache=cache)
    kept = [t for layer in cache.layers for t in layer.kept]
    assert M.cache_bytes(model, T, 4) == sum(t.numel() * t.element_size() for t in kept)
    half = sum(layer.kept[0].numel() and sum(t.numel() for t in layer.kept) * (4 if block.attn.recurrent else 2)
               for layer, block in zip(cache.layers, model.blocks))
    assert M.cache_bytes(model, T) == half


def test_cache_of_an_encoder_decoder():
    model = Model(ModelConfig(**SMALL, arch="encdec"))
    cache, tokens = model.new_cache(), torch.zeros(1, 7, dtype=torch.long)
    with torch.no_grad():
        model(tokens, tokens, cache=cache)
    assert M.cache_bytes(model, 7, 4) == 4 * cache.numel() == 4 * 2 * 2 * 2 * 7 * 24      # layers, self and cross, keys and values
    assert M.cache_bytes(meta(**SMALL, arch="encoder"), 7) == 0


def rows_of(text):
    return {line[:18].strip(): line.split() for line in text.splitlines() if line.startswith("  ")}


def test_describe_says_what_was_counted():
    text = M.describe(preset("deepseek-v3"))
    assert max(map(len, text.splitlines())) <= 102
    for said in ("671,026,404,352", "37,552,282,624", "656,569,532,416", "61 blocks", "129,280", "1.34 TB", "10.7 TB", "1,152 B"):
        assert said in text, said
    rows = rows_of(text)
    assert rows["3-60"][:3] == ["3-60", "x", "58"] and "experts" in rows["3-60"] and "mlp" in rows["0-2"]
    # by hand: 61 layers of (512 + 64) numbers, 2 bytes each, 32,768 tokens
    assert M.cache_bytes(preset("deepseek-v3"), 32768) == 61 * 576 * 2 * 32768 and "2.30 GB" in text


def test_describe_of_mixed_layers():
    text = M.describe(meta(**SMALL | dict(n_layer=8), layers="swa*3,lightning", window=5, moe=True, n_dense_layer=1))
    kinds = [line.split() for line in text.splitlines() if " x " in line]
    assert [(k[0], k[2]) for k in kinds] == [("0", "1"), ("1-2,", "x"), ("3,", "x")]
    assert "once" in kinds[2] and "lightning" in kinds[2] and "5" in kinds[1]
    assert "nothing" in M.describe(meta(**SMALL, arch="encdec")) and "cache" not in M.describe(meta(**SMALL, arch="encoder"))


def test_wavelengths_by_hand():
    """Four channels, base 100: the pairs turn once in 2 pi and in 20 pi tokens; linear scaling by 4 makes that four times as long."""
    text = M.describe(meta(**SMALL | dict(n_embd=16), rope_theta=100.0, rope_scaling="linear", rope_factor=4.0))
    plain, scaled = [line.split()[-6:] for line in text.splitlines()[-2:]]
    assert plain[-6:] == ["2", "100", "6.3", "6.3", "63", "1"] and scaled[-6:] == ["2", "100", "25.1", "25.1", "251", "2"]
    local = M.describe(meta(**SMALL | dict(n_embd=16), layers="swa,mha", rope_local_theta=4.0, rope_scaling="linear", rope_factor=4.0))
    assert [line.split()[0] for line in local.splitlines()[-3:]] == ["swa", "mha", "linear"]
    assert "RoPE" not in M.describe(meta(**SMALL, pos="learned")) and "RoPE" not in M.describe(meta(**SMALL, attn="lightning"))


def test_numbers_for_people():
    assert [M.human(n) for n in (0, 7, 999, 999.6, 1000, 12345, 999_499, 999_600, 1e9, 671e9)] == [
        "0", "7", "999", "1.00k", "1.00k", "12.3k", "999k", "1.00M", "1.00B", "671B"]
    assert M.human(5e9, "B") == "5.00 GB" and M.human(12, "B") == "12 B"
    assert M.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and M.ranges([3]) == "3"


# ---- Drawing ----

T5 = dict(arch="encdec", pos="t5", n_layer=3, n_enc_layer=2, n_embd=64, n_head=4, head_dim=8, d_ff=96, act="geglu_tanh", vocab_size=4000, tie_embeddings=False)
BERT = dict(arch="encoder", norm="layer", norm_at="post", act="gelu", qkv_bias=True, out_bias=True, mlp_bias=True, pos="learned", n_token_type=2,
            embed_norm=True, mlm_head=True, head_bias=True, pooler=True, n_embd=96, vocab_size=3000)
DRAWN = {
    "default": {}, "gpt2": M.PRESETS["gpt2"] | dict(vocab_size=50257), "llama": M.PRESETS["llama"] | dict(vocab_size=32000), "deepseek-v3": M.PRESETS["deepseek-v3"],
    "gemma": dict(layers="swa*5,gqa", n_layer=26, n_embd=1152, n_head=4, n_kv_head=1, head_dim=256, d_ff=6912, act="geglu_tanh", norm_at="sandwich", qk_norm="head",
                  window=512, vocab_size=262144, seq_len=32768),
    "gpt-oss": dict(layers="swa,gqa", n_layer=24, n_embd=2880, n_head=64, n_kv_head=8, head_dim=64, sinks=True, qkv_bias=True, out_bias=True, moe=True,
                    n_expert=32, n_active=4, n_shared_expert=0, d_expert=2880, n_dense_layer=0, window=128, vocab_size=201088, tie_embeddings=False, seq_len=4096),
    "lightning": dict(layers="lightning*7,gqa", n_layer=16, n_embd=1024, n_head=8, moe=True, n_expert=32, norm_at="prenorm_residual", n_dense_layer=0),
    "t5": T5, "t5 post": T5 | dict(norm_at="post", norm="layer", layers="mha,gqa", qkv_bias=True), "bert": BERT, "headless": BERT | dict(headless=True, mlm_head=False, head_bias=False),
    "tiny": SMALL, "wide": SMALL | dict(n_embd=8, n_head=1, d_ff=1000), "deep": SMALL | dict(n_layer=130, layers="mha*3,linear"), "all": SMALL | dict(n_layer=14, layers=",".join(list(ATTENTION)[:14])),
    "kda": dict(layers="kda*3,gqa,gdn", n_layer=8, n_embd=256, n_head=4, norm_at="branch_post", qk_norm="width"), "prefix": SMALL | dict(arch="prefix", norm_at="deepnorm"),
    "mla": dict(attn="mla", q_lora_rank=8, moe=True, n_expert=4, n_embd=64, n_head=4), "shaw": SMALL | dict(pos="shaw", act="swish", attn_gate=True), "srms": SMALL | dict(norm="srms"),
    "lrpe": SMALL | dict(pos="lrpe", layers="transnormer,mha"), "norm placements": SMALL | dict(norm_at="sandwich", moe=True, norm="layer", norm_at_="x"),
}
drawn = pytest.mark.parametrize("name", list(DRAWN))


class Seen:
    """A drawing as a reader's eye has it: absolute boxes (left, top, right, bottom) of its rectangles and texts."""

    def __init__(self, svg, names=()):
        self.svg, self.root, self.rects, self.texts, self.paths = svg, ET.fromstring(svg), [], [], []
        self.walk(self.root, 0.0, 0.0)
        self.view = [float(n) for n in self.root.get("viewBox").split()]
        self.tensors = {}                                        # name: (shape, box)
        for box, css, title in self.rects:
            tensor, _, shape = title.partition(" ")
            if tensor in names:
                assert tensor not in self.tensors, f"{tensor} is drawn twice"
                self.tensors[tensor] = tuple(map(int, shape.split("×"))), box, css

    def walk(self, element, dx, dy):
        tag = element.tag.split("}")[1]
        if tag in ("defs", "style"):
            return
        if tag == "g":
            x, y = re.fullmatch(r"translate\((\S+) (\S+)\)", element.get("transform")).groups()
            dx, dy = dx + float(x), dy + float(y)
        number = lambda key: float(element.get(key))
        if tag == "rect":
            x, y = number("x") + dx, number("y") + dy
            title = element[0].text if len(element) else ""
            self.rects.append(((x, y, x + number("width"), y + number("height")), element.get("class"), title))
        if tag == "text":
            size, css = number("font-size"), element.get("class")
            wide = size * len(element.text) * (0.602 if "mono" in css else 0.65 if "bold" in css else 0.56)       # DejaVu, a wide font
            left = number("x") + dx - wide * ("start", "middle", "end").index(element.get("text-anchor")) / 2
            self.texts.append(((left, number("y") + dy - 0.76 * size, left + wide, number("y") + dy + 0.2 * size), element.text))
        if tag == "path":
            self.paths.append((element.get("class"), element.get("d"), dx, dy))
        for child in element:
            if tag in ("svg", "g"):
                self.walk(child, dx, dy)


def overlap(a, b):
    return min(a[2], b[2]) - max(a[0], b[0]) > 0.3 and min(a[3], b[3]) - max(a[1], b[1]) > 0.3


@pytest.fixture(scope="module")
def seen():
    made = {}

    def of(name):
        if name not in made:
            model = meta(**DRAWN[name])
            made[name] = model, Seen(M.draw(model), [n for n, _ in model.named_parameters()])
        return made[name]
    return of


@drawn
def test_every_kind_of_tensor_is_drawn_once_with_its_shape(name, seen):
    model, picture = seen(name)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    expected = {n for n in shapes if not n.startswith(("blocks.", "enc_blocks."))}
    for prefix, blocks, plan in (("blocks", model.blocks, model.plan), ("enc_blocks", model.enc_blocks, model.enc_plan)):
        first = {}
        for i, (block, layer) in enumerate(zip(blocks, plan)):
            first.setdefault((layer.attn, layer.window, layer.moe, str([(n, p.shape) for n, p in block.named_parameters()])), i)
        expected |= {n for n in shapes if n.startswith(tuple(f"{prefix}.{i}." for i in first.values()))}
        assert sum(int(text[2:]) for _, text in picture.texts if re.fullmatch(r"× \d+", text)) == len(model.blocks) + len(model.enc_blocks)
    assert picture.tensors.keys() == expected
    assert all(picture.tensors[n][0] == (shapes[n] or (1,)) for n in expected)
    written = " ".join(text for _, text in picture.texts)
    for n, shape in shapes.items():                              # every tensor of the model, also of blocks not drawn, can be read
        assert "×".join(map(str, shape)) in written, n


@drawn
def test_rectangles_are_to_scale(name, seen):
    """One scale, both axes: rows and columns of what reads the stream lie across and upright, of what writes to it the other way."""
    model, picture = seen(name)
    band = next(box for box, _, title in picture.rects if title == "the residual stream")
    s, cuts = (band[2] - band[0]) / model.cfg.n_embd, sum(css == "cut page" for css, *_ in picture.paths)
    broken, near = 0, lambda a, b: abs(a - max(1.5, b)) < 0.02 + 3e-4 * b
    for n, (shape, (l, t, r, b), css) in picture.tensors.items():
        w, h = r - l, b - t
        if len(shape) == 1:                                      # a thin bar, either way
            long, short = sorted((w, h), reverse=True) if n != "head_bias" else (w, h)
            assert near(short, s) and (near(long, shape[0] * s) or n == "head_bias" and near(long, 300) and 300 < shape[0] * s), n
            continue
        across, upright = shape[-2:][::-1] if re.search(r"w_(o|down)(\.weight)?$", n) else shape[-2:]
        assert near(h, upright * s), n
        if across * s > 300 and M.component(n) in ("embedding", "head"):
            broken += 1
            assert near(w, 300), n
        else:
            assert near(w, across * s), n
    tied = [box for box, css, _ in picture.rects if "tied" in css]
    assert cuts == broken + sum(near(box[2] - box[0], 300) for box in tied)
    assert len(tied) == (model.head is model.embed) + bool(model.enc_plan)


@drawn
def test_nothing_leaves_the_page_or_collides(name, seen):
    _, picture = seen(name)
    x, y, w, h = picture.view
    for box, what in [(box, title or css) for box, css, title in picture.rects] + picture.texts:
        assert x <= box[0] and y <= box[1] and box[2] <= x + w + 0.01 and box[3] <= y + h + 0.01, what
    for i, (box, text) in enumerate(picture.texts):
        for other, said in picture.texts[:i]:
            assert not overlap(box, other), (text, said)
    tensors = [(box, n) for n, (_, box, _) in picture.tensors.items()] + [(box, "tied") for box, css, _ in picture.rects if "tied" in css or "op" in css.split()]
    for i, (box, n) in enumerate(tensors):
        for other, m in tensors[:i]:
            assert not overlap(box, other), (n, m)
        for other, text in picture.texts:
            assert not overlap(box, other), (n, text)


@drawn
def test_arrows_begin_outside_of_tensors(name, seen):
    _, picture = seen(name)
    tensors = [box for box, css, _ in picture.rects if "matrix" in css]                  # also the experts behind
    starts = [[float(n) for n in re.match(r"M(\S+) ([-\d.]+)", d).groups()] + [dx, dy] for css, d, dx, dy in picture.paths if css == "flow line"]
    assert starts
    for x, y, dx, dy in starts:
        assert not any(l < x + dx < r and t < y + dy < b for l, t, r, b in tensors), (x, y)


def test_heads_are_marked(seen):
    """Lines between heads, and the query heads of the first key head tinted: 12 heads, 4 of keys, so a quarter."""
    _, picture = seen("llama")
    lines = [d.count("v") for css, d, *_ in picture.paths if css == "attention heads"]
    assert sorted(lines) == [3, 3, 11, 11]
    box = lambda n: picture.tensors[f"blocks.0.attn.{n}.weight"][1]
    tints = [box for box, css, _ in picture.rects if css == "attention tint"]
    for n in "qkvo":
        l, t, r, b = box(f"w_{n}")
        assert any(abs(l - a) < 0.02 and abs(t - c) < 0.02 and abs((e - a) / (r - l) - 1 / 4) < 1e-3 for a, c, e, _ in tints), n


def test_masks_are_those_of_the_attention(seen):
    """16 x 16 cells: causal 136, a window of half the row 100, both ways 256; strided heads differ, so cells come in shades."""
    cells = lambda **flags: sum(d.count("h2v2h-2z") for css, d, *_ in Seen(M.draw(meta(**SMALL, **flags))).paths if css == "soft cell")
    assert cells() == 136 and cells(arch="encoder") == 256
    assert cells(attn="swa", window=12) == 8 * 9 // 2 + 8 * 8
    assert cells(arch="prefix") == 136 + 15 and not cells(attn="lightning")
    assert cells(arch="encdec") == 256 + 136 + 256          # encoder, decoder, and all of the source
    svg = M.draw(meta(**SMALL, attn="strided"))
    assert len(set(re.findall(r'soft cell".*?opacity="([\d.]+)"', svg))) > 1


def test_cross_attention_is_fed_by_the_encoder(seen):
    _, picture = seen("t5")
    arrows = [d for css, d, *_ in picture.paths if css == "flow cross-attention"]
    assert len(arrows) == 2
    _, plain = seen("default")
    assert not any("cross" in css for css, *_ in plain.paths)


@drawn
def test_the_picture_stands_alone_in_light_and_dark(name, seen):
    svg = seen(name)[1].svg
    assert svg.count("prefers-color-scheme:dark") == 1 and "<script" not in svg and "href" not in svg and "url(http" not in svg
    light, dark = re.search(r"\.page\{color:(#\w+)", svg)[1], re.search(r"dark\)\{\.page\{color:(#\w+)", svg)[1]
    assert light != dark and len(svg) < 400_000


# ---- Command line ----

def test_commands(tmp_path, capsys):
    M.main(["--preset=gpt2", "--n_layer=3", "--vocab_size=50257"])
    assert "decoder of 3 blocks, 768 wide" in capsys.readouterr().out
    M.main([f"--draw={tmp_path}/a.svg", "--attn=mla", "--n_layer=2"])
    assert "wide" not in capsys.readouterr().out and ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    M.main(["--describe", f"--draw={tmp_path}/b.svg"])
    assert "decoder of" in capsys.readouterr().out and (tmp_path / "b.svg").exists()
    for argv, word in ((["--preset=gpt3"], "gpt2"), (["--draw=a.png"], "a.svg"), ([str(tmp_path), "--moe"], "--moe"), ([str(tmp_path)], "config.json"), (["--n_head=5"], "n_head"), (["--lr=1"], "lr")):
        with pytest.raises(UsageError, match=re.escape(word)):
            M.main(argv)


@pytest.mark.peer
def test_a_folder_describes_itself(tmp_path, capsys):
    hf = pytest.importorskip("transformers")
    hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=40, vocab_size=53)).save_pretrained(tmp_path)
    M.main([str(tmp_path), "--seq_len=20"])
    out = capsys.readouterr().out
    assert "decoder of 2 blocks, 16 wide, 2 heads, vocabulary 53, 20 tokens" in out
    (tmp_path / "model.safetensors").unlink()                    # config.json is enough
    M.main([str(tmp_path), "--seq_len=20"])
    assert capsys.readouterr().out == out
