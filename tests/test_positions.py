"""Positions and sparse patterns: every rule written a second time, slowly."""
import math
from types import SimpleNamespace

import pytest
import torch

import attention as P
from tokenizer import UsageError

CFG = dict(seq_len=64, rope_original=0, rope_factor=1.0, rope_low=1.0, rope_high=4.0, rope_beta_fast=32.0, rope_beta_slow=1.0,
           rope_truncate=True, rope_attn_factor=0.0, rope_mscale=0.0, rope_mscale_all=0.0)


def config(**fields):
    return SimpleNamespace(**CFG | fields)


# ---- RoPE's frequencies ----

def slow_frequencies(dim, theta, scaling, c, length):
    """The equations in Python's float64, pair by pair."""
    original, s, pairs = c.rope_original or c.seq_len, c.rope_factor, range(dim // 2)
    base, factor = [theta ** (-2 * j / dim) for j in pairs], 1.0
    if scaling in ("ntk", "dynamic"):
        stretch = s if scaling == "ntk" else s * max(length, original) / original - s + 1
        base = [(theta * stretch ** (dim / (dim - 2))) ** (-2 * j / dim) for j in pairs]
    if scaling == "linear":
        base = [w / s for w in base]
    if scaling == "llama3":
        for j, w in enumerate(base):
            count = original * w / (2 * math.pi)                       # turns within the original length
            share = min(1, max(0, (count - c.rope_low) / (c.rope_high - c.rope_low)))
            base[j] = share * w + (1 - share) * w / s
    if scaling == "yarn":
        ends = [dim / 2 * math.log(original / (2 * math.pi * n), theta) for n in (c.rope_beta_fast, c.rope_beta_slow)]
        if c.rope_truncate:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        ends = [max(ends[0], 0), min(ends[1], dim - 1)]
        for j, w in enumerate(base):
            share = min(1, max(0, (j - ends[0]) / (ends[1] - ends[0])))
            base[j] = (1 - share) * w + share * w / s
        m = lambda scale: 0.1 * scale * math.log(s) + 1
        factor = c.rope_attn_factor or (m(c.rope_mscale) / m(c.rope_mscale_all) if c.rope_mscale and c.rope_mscale_all else m(1))
    return base, factor


CASES = [("none", {}), ("linear", dict(rope_factor=4.0)), ("ntk", dict(rope_factor=4.0)), ("dynamic", dict(rope_factor=2.0)),
         ("dynamic", dict(rope_factor=2.0, rope_original=4096)), ("llama3", dict(rope_factor=8.0, rope_original=2048)),
         ("llama3", dict(rope_factor=2.0, rope_high=8.0)), ("yarn", dict(rope_factor=16.0, rope_original=4096)),
         ("yarn", dict(rope_factor=4.0, rope_original=1024, rope_truncate=False, rope_beta_fast=16.0)),
         ("yarn", dict(rope_factor=40.0, rope_original=4096, rope_mscale=1.0, rope_mscale_all=0.707)),
         ("yarn", dict(rope_factor=40.0, rope_original=4096, rope_mscale=0.707)),
         ("yarn", dict(rope_factor=40.0, rope_original=4096, rope_mscale=1.0, rope_mscale_all=1.0, rope_attn_factor=1.25))]


@pytest.mark.parametrize("scaling, fields", CASES)
@pytest.mark.parametrize("dim, theta, length", [(4, 10000.0, 1), (32, 500000.0, 64), (64, 10000.0, 9000), (128, 1e6, 200)])
def test_frequencies_equal_the_equations(scaling, fields, dim, theta, length):
    got_J, factor = P.inverse_frequencies(dim, theta, scaling, config(**fields), length)
    want, want_factor = slow_frequencies(dim, theta, scaling, config(**fields), length)
    assert got_J.dtype == torch.float32 and factor == pytest.approx(want_factor, rel=1e-12)
    torch.testing.assert_close(got_J.double(), torch.tensor(want, dtype=torch.float64), rtol=3e-6, atol=0)


def test_frequencies_of_a_head_of_eight():
    """240 tokens stretched four times, 480 read. The last three lines were made by transformers' ROPE_INIT_FUNCTIONS."""
    base = [1.0, 0.1, 0.01, 0.001]
    golden = {"none": base, "linear": [w / 4 for w in base],
              "ntk": [4 ** (-j / 3) * w for j, w in enumerate(base)],              # (4^(8/6))^(-2j/8)
              "dynamic": [1.0, 0.058480352, 0.003419952, 0.0002],
              "llama3": [1.0, 0.095492959, 0.0025, 0.00025],
              "yarn": [1.0, 0.054001998, 0.0025, 0.00025]}
    for scaling, want in golden.items():
        cfg = config(rope_factor=4.0, rope_original=240, rope_truncate=False)
        got_J, factor = P.inverse_frequencies(8, 10000.0, scaling, cfg, 480)
        torch.testing.assert_close(got_J, torch.tensor(want), rtol=1e-6, atol=0)
        assert factor == (pytest.approx(1.138629436) if scaling == "yarn" else 1.0)


def test_what_the_original_length_means():
    """none, linear and ntk do not read it; dynamic is plain up to it; 0 is seq_len."""
    def f(scaling, original, length=1):
        return P.inverse_frequencies(16, 1e4, scaling, config(rope_factor=4.0, rope_original=original), length)[0]

    for scaling in ("none", "linear", "ntk"):
        assert torch.equal(f(scaling, 50), f(scaling, 5000))
    for scaling in P.ROPE_SCALINGS:
        assert torch.equal(f(scaling, 0, 100), f(scaling, 64, 100))
    assert torch.equal(f("dynamic", 256, 256), f("none", 0)) and (f("dynamic", 256, 257)[1:] < f("none", 0)[1:]).all()
    assert f("dynamic", 256, 512)[-1] == pytest.approx(f("none", 0)[-1] / 5)      # the slowest pair: 4 * 2 - 3
    assert P.yarn_m(0.5) == P.yarn_m(1.0) == P.yarn_m(9.0, 0.0) == 1.0 and P.yarn_m(math.e, 2.0) == pytest.approx(1.2)
    assert f("ntk", 0)[-1] == pytest.approx(f("none", 0)[-1] / 4)


def test_a_width_that_rope_cannot_turn_is_refused():
    for dim, scaling in ((7, "none"), (0, "none"), (2, "ntk"), (2, "dynamic")):
        with pytest.raises(UsageError, match="width"):
            P.inverse_frequencies(dim, 10000.0, scaling, config(), 1)
    assert P.inverse_frequencies(2, 10000.0, "yarn", config(rope_factor=2.0), 1)[0].tolist() == [1.0]


# ---- RoPE ----

@pytest.mark.parametrize("layout", P.ROPE_LAYOUTS)
@pytest.mark.parametrize("P_, K", [(2, 2), (6, 6), (4, 7)])
def test_rope_multiplies_complex_numbers(layout, P_, K):
    """A pair (a, b) is a + ib; turning it is a product with e^(i t w); the channels beyond P pass.      [RoPE eq 13]"""
    torch.manual_seed(0)
    positions_BT, x_BTHK = torch.tensor([[0, 1, 5], [7, 7, 100]]), torch.randn(2, 3, 2, K, dtype=torch.float64)
    inv_freq_J = torch.rand(P_ // 2, dtype=torch.float64)
    got_BTHK = P.Rope(positions_BT, P_, inv_freq_J, 1.5, layout, torch.float64)(x_BTHK)
    want_BTHK = x_BTHK.clone()
    for b, t, h, j in [(b, t, h, j) for b in range(2) for t in range(3) for h in range(2) for j in range(P_ // 2)]:
        one, two = (j, j + P_ // 2) if layout == "half" else (2 * j, 2 * j + 1)
        angle = int(positions_BT[b, t]) * float(inv_freq_J[j])
        z = complex(x_BTHK[b, t, h, one], x_BTHK[b, t, h, two]) * complex(math.cos(angle), math.sin(angle)) * 1.5
        want_BTHK[b, t, h, one], want_BTHK[b, t, h, two] = z.real, z.imag
    torch.testing.assert_close(got_BTHK, want_BTHK)


def test_rope_knows_the_distance_alone():
    torch.manual_seed(0)
    q_BTHK, k_BTHK = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    inv_freq_J = P.turns(10000.0, 6).double()
    turned = lambda x, t, sign=1: P.Rope(torch.tensor([[t]]), 6, sign * inv_freq_J, dtype=torch.float64)(x)
    dot = lambda t, s, sign=1: float((turned(q_BTHK, t, sign) * turned(k_BTHK, s, sign)).sum())
    assert dot(3, 1) == pytest.approx(dot(103, 101), rel=1e-12) == pytest.approx(dot(2, 0), rel=1e-12)
    assert abs(dot(3, 1) - dot(3, 2)) > 1e-3
    assert dot(3, 1, -1) == pytest.approx(dot(1, 3), rel=1e-12)        # the other sense of turning: the sign of the distance
    assert float(turned(q_BTHK, 9).norm()) == pytest.approx(float(q_BTHK.norm()))


def test_layouts_differ_by_an_order_of_channels():
    torch.manual_seed(0)
    x_BTHK, positions_BT, inv_freq_J = torch.randn(2, 5, 3, 8), torch.arange(5)[None], P.turns(100.0, 8)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    half, pairs = (P.Rope(positions_BT, 8, inv_freq_J, layout=layout) for layout in ("half", "interleaved"))
    assert torch.equal(pairs(x_BTHK)[..., order], half(x_BTHK[..., order]))


def test_rope_keeps_the_type():
    rope = P.Rope(torch.arange(3)[None], 4, P.turns(10000.0, 4))
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        assert rope(torch.ones(1, 3, 1, 6, dtype=dtype)).dtype == dtype


def test_gradients():
    torch.manual_seed(0)
    x_BTHK, theta_HK = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 3, 2, 5), (2, 5)))
    positions_BT = torch.tensor([[0, 2, 3]])
    for layout in P.ROPE_LAYOUTS:
        assert torch.autograd.gradcheck(P.Rope(positions_BT, 4, torch.rand(2), layout=layout, dtype=torch.float64), (x_BTHK,))
    assert torch.autograd.gradcheck(lambda x, theta: P.lrpe(x, theta, positions_BT), (x_BTHK, theta_HK))


# ---- The other ways ----

def test_sinusoid_equals_the_paper():
    positions_BT = torch.tensor([[0, 1, 2, 50], [3, 9, 9, 511]])
    for D in (1, 2, 7, 16):
        wave = lambda t, i: (math.cos if i % 2 else math.sin)(t / 10000 ** (i // 2 * 2 / D))
        want = [[[wave(t, i) for i in range(D)] for t in row] for row in positions_BT.tolist()]
        torch.testing.assert_close(P.sinusoid(positions_BT, D), torch.tensor(want), rtol=0, atol=5e-5)


def test_alibi_slopes():
    assert P.alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert P.alibi_slopes(1).tolist() == [1 / 256] and P.alibi_slopes(2).tolist() == [1 / 16, 1 / 256]
    assert P.alibi_slopes(3).tolist() == [1 / 16, 1 / 256, 1 / 4]                  # of 2: both, of 4: the first
    torch.testing.assert_close(P.alibi_slopes(12)[8:], torch.tensor([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]))


def test_t5_bucket_by_hand():
    """8 buckets up to 16: one each for 0..3, then 4 * 4^(i/4) = 4, 5.66, 8, 11.3 begin the four wide ones."""
    rows = lambda distance, both: P.t5_bucket(torch.tensor(distance), 8, 16, both).tolist()
    assert rows([0, -1, -2, -3, -4, -5, -6, -7, -8, -11, -12, -16, -999], False) == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7]
    assert rows([1, 9], False) == [0, 0]
    # both ways: four each; 0, 1, then 2 * 8^(i/2) = 2 and 5.66; later keys 4 further on
    assert rows([0, -1, -2, -5, -6, -50, 1, 2, 5, 6, 50], True) == [0, 1, 2, 2, 3, 3, 5, 6, 6, 7, 7]
    for n_bucket, max_distance, both in ((1, 128, False), (2, 128, True), (32, 16, False)):
        with pytest.raises(UsageError, match="t5_buckets"):
            P.t5_bucket(torch.tensor([0]), n_bucket, max_distance, both)


@pytest.mark.parametrize("n_bucket, max_distance, both", [(32, 128, False), (32, 128, True), (16, 100, False), (9, 33, True)])
def test_t5_bucket_equals_a_slow_one(n_bucket, max_distance, both):
    for distance in range(-300, 301):
        n, row, away = n_bucket, 0, max(-distance, 0)
        if both:
            n, away = n_bucket // 2, abs(distance)
            row = n if distance > 0 else 0
        exact = n // 2
        place = away if away < exact else exact + math.log(away / exact) / math.log(max_distance / exact) * (n - exact)
        if abs(place - round(place)) > 1e-4 or away < exact:           # a boundary: float32 decides
            assert int(P.t5_bucket(torch.tensor(distance), n_bucket, max_distance, both)) == row + min(int(place), n - 1)


def test_shaw_index_by_hand():
    assert P.shaw_index(torch.tensor([-9, -3, -2, -1, 0, 1, 2, 3, 9]), 2).tolist() == [0, 0, 0, 1, 2, 3, 4, 4, 4]


def test_lrpe_knows_the_distance_alone():
    torch.manual_seed(0)
    q_BTHK, k_BTHK = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    theta_HK, positions_BT = torch.rand(3, 4, dtype=torch.float64), torch.tensor([[0, 1, 2, 3, 50]])
    score_BHTS = torch.einsum("bthk,bshk->bhts", *(P.lrpe(x, theta_HK, positions_BT) for x in (q_BTHK, k_BTHK)))
    for b, h, t, s in [(b, h, t, s) for b in range(2) for h in range(3) for t in range(5) for s in range(5)]:
        distance = int(positions_BT[0, t] - positions_BT[0, s])
        want = sum(float(q_BTHK[b, t, h, i] * k_BTHK[b, s, h, i]) * math.cos(float(theta_HK[h, i]) * distance) for i in range(4))
        assert float(score_BHTS[b, h, t, s]) == pytest.approx(want, abs=1e-12)
    assert P.lrpe(q_BTHK.bfloat16(), theta_HK.bfloat16(), positions_BT).dtype == torch.bfloat16


# ---- Peers ----

def hf_rope(draw, scaling):
    """A random config of transformers and the same of ours: (config, head width, theta, ours)."""
    transformers = pytest.importorskip("transformers")
    pick = lambda *values: values[int(torch.randint(len(values), (), generator=draw))]
    K, theta = pick(4, 8, 16, 64, 80, 128), pick(1e4, 5e5, 1e6, 150000.0)
    length, factor = pick(64, 512, 4096, 131072), pick(1.0, 1.5, 2.0, 8.0, 40.0)
    theirs, ours = dict(rope_type=scaling, rope_theta=theta, factor=factor), dict(seq_len=length, rope_factor=factor)
    if scaling in ("llama3", "yarn") and pick(0, 1, 1):
        ours["rope_original"] = theirs["original_max_position_embeddings"] = pick(32, 128, 2048, 8192)
    if scaling == "llama3":
        ours["rope_low"] = theirs["low_freq_factor"] = pick(1.0, 2.0)
        ours["rope_high"] = theirs["high_freq_factor"] = pick(4.0, 8.0)
    if scaling == "yarn":
        ours["rope_truncate"] = theirs["truncate"] = pick(True, False)
        for key, name, values in (("attention_factor", "rope_attn_factor", (1.25,)), ("mscale", "rope_mscale", (1.0, 0.707)),
                                  ("mscale_all_dim", "rope_mscale_all", (1.0, 0.5)), ("beta_fast", "rope_beta_fast", (8.0, 64.0)),
                                  ("beta_slow", "rope_beta_slow", (0.5, 2.0))):
            if pick(0, 1):
                ours[name] = theirs[key] = pick(*values)
    if scaling == "default":
        theirs.pop("factor")
    return transformers.LlamaConfig(hidden_size=2 * K, num_attention_heads=2, head_dim=K, max_position_embeddings=length,
                                    rope_parameters=theirs), K, theta, config(**ours)


@pytest.mark.peer
@pytest.mark.parametrize("scaling", ["linear", "dynamic", "llama3", "yarn"])
def test_frequencies_equal_transformers_bit_for_bit(scaling):
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        theirs, K, theta, ours = hf_rope(draw, scaling)
        for length in (1, theirs.max_position_embeddings + 1, 3 * theirs.max_position_embeddings):
            want_J, want_factor = functions[scaling](theirs, "cpu", seq_len=length)
            got_J, factor = P.inverse_frequencies(K, theta, scaling, ours, length)
            assert torch.equal(got_J, want_J) and factor == want_factor, (ours, length)


@pytest.mark.peer
@pytest.mark.parametrize("scaling", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_equals_llama_bit_for_bit(scaling, dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    draw = torch.Generator().manual_seed(1)
    for _ in range(8):
        theirs, K, theta, ours = hf_rope(draw, scaling)
        q_BTHK, positions_BT = torch.randn(2, 5, 3, K, generator=draw).to(dtype), torch.tensor([[0, 1, 2, 63, 1000]])
        cos, sin = llama.LlamaRotaryEmbedding(theirs)(q_BTHK, positions_BT)
        want_BTHK = llama.apply_rotary_pos_emb(q_BTHK, q_BTHK, cos, sin, unsqueeze_dim=2)[0]
        inv_freq_J, factor = P.inverse_frequencies(K, theta, scaling.replace("default", "none"), ours, 1001)
        assert torch.equal(P.Rope(positions_BT, K, inv_freq_J, factor)(q_BTHK), want_BTHK)


@pytest.mark.peer
def test_interleaved_rope_equals_glm_bit_for_bit():
    glm = pytest.importorskip("transformers.models.glm.modeling_glm")
    torch.manual_seed(0)
    q_BTHK, positions_BT, inv_freq_J = torch.randn(2, 5, 3, 12), torch.arange(7, 12)[None], P.turns(10000.0, 6)
    angle_BTP = (positions_BT[..., None] * inv_freq_J).repeat(1, 1, 2)
    want_BTHK = glm.apply_rotary_pos_emb(q_BTHK, q_BTHK, angle_BTP.cos(), angle_BTP.sin(), unsqueeze_dim=2)[0]
    assert torch.equal(P.Rope(positions_BT, 6, inv_freq_J, layout="interleaved")(q_BTHK), want_BTHK)


@pytest.mark.peer
def test_t5_bucket_equals_transformers():
    bucket = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention._relative_position_bucket
    distance = torch.arange(-1000, 1001)
    for n_bucket, max_distance in ((32, 128), (32, 256), (16, 100), (9, 33), (64, 40)):
        for both in (True, False):
            want = bucket(distance, both, n_bucket, max_distance)
            assert torch.equal(P.t5_bucket(distance, n_bucket, max_distance, both), want)


@pytest.mark.peer
def test_alibi_slopes_equal_bloom_and_mpt():
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom").build_alibi_tensor
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt").build_mpt_alibi_tensor
    for H in range(1, 41):
        theirs = bloom(torch.ones(1, 2, dtype=torch.long), H, torch.float32)[:, 0, 1]      # the bias at place 1 is the slope
        torch.testing.assert_close(P.alibi_slopes(H), theirs, rtol=1e-6, atol=0)
        torch.testing.assert_close(P.alibi_slopes(H), -mpt(H, 2)[:, 0, 0], rtol=1e-6, atol=0)


# ---- Sparse patterns ----

def mask(name, T, H, l, c):
    """[H, T, S]: what each head sees, keys ahead of the query left out."""
    q, k, head = torch.arange(T)[:, None], torch.arange(T), torch.arange(H)[:, None, None]
    return (P.PATTERNS[name](q, k, head, l, c) & (k <= q)).expand(H, T, T)


SLOW = {                           # the keys of query i in head h, as sets
    "local": lambda i, h, l, c: set(range(i - l + 1, i + 1)),
    "dilated": lambda i, h, l, c: set(range(i, -1, -l)),
    "blocks": lambda i, h, l, c: set(range(i - i % l, i + 1)),
    "sparse": lambda i, h, l, c: set(range(i - l + 1, i + 1)) | set(range(i, -1, -l)),
    "strided": lambda i, h, l, c: set(range(i, -1, -l)) if h % 2 else set(range(i - l + 1, i + 1)),
    "star": lambda i, h, l, c: {0, i - 1, i},
    "global": lambda i, h, l, c: set(range(c)) | {i},
}


def slow_fixed(i, h, l, c):
    if h % 2 == 0:
        return set(range(i - i % l, i + 1))
    groups = [list(range(max(end - c, 0), end)) for end in range(l, 0, -c)]        # columns, from the last c to the first
    return {j for j in range(i + 1) if j % l in groups[(h - 1) // 2 % len(groups)]} | {i}


@pytest.mark.parametrize("name", [*SLOW, "fixed"])
@pytest.mark.parametrize("T, H, l, c", [(1, 1, 1, 1), (23, 6, 5, 2), (40, 9, 8, 3), (17, 4, 30, 4), (12, 3, 1, 1)])
def test_pattern_equals_its_sets(name, T, H, l, c):
    see = (SLOW | {"fixed": slow_fixed})[name]
    want_HTS = torch.tensor([[[s <= t and s in see(t, h, l, c) for s in range(T)] for t in range(T)] for h in range(H)])
    assert torch.equal(mask(name, T, H, l, c), want_HTS)


def test_patterns_by_hand():
    draw = lambda name, head: ["".join(".#"[int(s)] for s in row) for row in mask(name, 6, 4, 3, 1)[head]]
    assert draw("strided", 0) == draw("local", 0) == ["#.....", "##....", "###...", ".###..", "..###.", "...###"]
    assert draw("strided", 1) == draw("dilated", 0) == ["#.....", ".#....", "..#...", "#..#..", ".#..#.", "..#..#"]
    assert draw("fixed", 2) == draw("blocks", 1) == ["#.....", "##....", "###...", "...#..", "...##.", "...###"]
    assert draw("fixed", 1) == ["#.....", ".#....", "..#...", "..##..", "..#.#.", "..#..#"]
    assert draw("fixed", 3) == ["#.....", ".#....", ".##...", ".#.#..", ".#..#.", ".#..##"]
    assert draw("star", 1) == ["#.....", "##....", "###...", "#.##..", "#..##.", "#...##"]
    assert draw("global", 1) == ["#.....", "##....", "#.#...", "#..#..", "#...#.", "#....#"]


@pytest.mark.parametrize("name", P.PATTERNS)
def test_every_query_sees_itself_in_every_head(name):
    for l, c in ((1, 1), (4, 1), (7, 3), (8, 8), (5, 9)):
        assert mask(name, 33, 7, l, c).diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize("name", ["strided", "fixed", "sparse"])
@pytest.mark.parametrize("l, c", [(1, 1), (4, 1), (6, 2), (7, 3), (50, 3)])
def test_two_layers_reach_every_past_token(name, l, c):
    """The paper's validity: a path of at most two steps from each token to each earlier one.            [Sparse sec 4.2]"""
    one_TS = mask(name, 41, 2, l, c).any(0).float()
    assert torch.equal((one_TS @ one_TS > 0), torch.ones(41, 41).tril() > 0)
    if l in (4, 6, 7):
        assert not torch.equal(one_TS, torch.ones(41, 41).tril())      # one layer does not


def test_strided_masks_equal_openai():
    """openai/sparse_attention's masks from their definitions: 'all' the lower triangle, 'local' a band of local_attn_ctx
    diagonals, 'strided' the lower triangle where q - k is a multiple of local_attn_ctx."""
    numpy = pytest.importorskip("numpy")
    for n, ctx in ((1, 1), (13, 4), (32, 8), (20, 64)):
        triangle = numpy.tril(numpy.ones((n, n), bool))
        band = triangle & ~numpy.tril(numpy.ones((n, n), bool), -ctx)
        comb = triangle & (numpy.subtract.outer(numpy.arange(n), numpy.arange(n)) % ctx == 0)
        got = mask("strided", n, 2, ctx, 1).numpy()
        assert (got[0] == band).all() and (got[1] == comb).all()
        assert (mask("global", n, 1, 1, n).numpy()[0] == triangle).all()


@pytest.mark.parametrize("l, c", [(4, 1), (6, 2), (7, 3), (5, 5), (3, 9)])
def test_fixed_heads_take_distinct_columns_that_add_up(l, c):
    """As many odd heads as there are groups of c columns see everything together, and share nothing but themselves."""
    groups, T = math.ceil(l / c), 29
    odd_HTS = mask("fixed", T, 2 * groups, l, c)[1::2]
    assert torch.equal(odd_HTS.any(0), torch.ones(T, T).tril() > 0)
    assert torch.equal(odd_HTS.sum(0) * (1 - torch.eye(T)), torch.ones(T, T).tril(-1))
    assert groups == 1 or not torch.equal(odd_HTS[1:].any(0), torch.ones(T, T).tril() > 0)
    again_HTS = mask("fixed", T, 4 * groups, l, c)[1::2]
    assert torch.equal(again_HTS[:groups], again_HTS[groups:])         # then in turn


def test_sparse_is_both_heads_of_strided():
    assert torch.equal(mask("sparse", 37, 1, 6, 1)[0], mask("strided", 37, 2, 6, 1).any(0))


def test_random_keys():
    T, H, c = 400, 4, 8
    see_HTS = mask("random", T, H, 1, c)
    assert torch.equal(see_HTS[:, :c], (torch.ones(c, T).tril() > 0).expand(H, c, T))       # fewer than c keys: all of them
    assert float(see_HTS[:, 50:].sum(-1).float().mean()) == pytest.approx(c + 1, abs=0.4)   # c by chance, and itself
    assert see_HTS.sum(-1).max() < 4 * c
    q, k = torch.tensor([[70], [399]]), torch.arange(T)
    for h in range(H):                                                 # a function of places and head: a cached step agrees
        assert torch.equal(P.PATTERNS["random"](q, k, h, 1, c), P.PATTERNS["random"](q, k, torch.tensor(h), 1, c))
        assert torch.equal(P.PATTERNS["random"](q, k, h, 1, c)[1], see_HTS[h, 399])
    read_S = see_HTS[:, 200:, :200].float().mean((0, 1))               # no key is favoured, no two heads or rows alike
    assert 0.01 < read_S.min() and read_S.max() < 0.06
    overlap = lambda a, b: float((a & b).sum(-1).float().mean())
    assert overlap(see_HTS[0, 200:], see_HTS[1, 200:]) < 1.6 and overlap(see_HTS[0, 201:], see_HTS[0, 200:-1]) < 0.8
    assert P.scrambled(1) == int(P.scrambled(torch.tensor(1))) and len({P.scrambled(i) for i in range(5000)}) == 5000
    rows = lambda head: [torch.nonzero(row).flatten().tolist() for row in mask("random", 60, 2, 1, 3)[head, [10, 29, 59]]]
    assert rows(0) == [[1, 3, 7, 10], [1, 23, 29], [22, 47, 59]] and rows(1)[2] == [7, 9, 24, 47, 59]      # for ever
