"""Scores against loops over (i, j), transformers' T5, the published slopes, and autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.attend.scores import (
    Chain,
    Score,
    alibi,
    alibi_slopes,
    chain,
    relative_bias,
    score_function,
    soft_cap,
    t5_bias,
    t5_bucket,
    temperature,
)
from polyhead.attend.tile import Tile
from polyhead.attend.toeplitz import by_distance, toeplitz
from polyhead.description import from_json, to_json
from polyhead.errors import ConfigError, ShapeError


def by_parity(score, b, h, i, j):
    return score + 0.5 * (b + 2 * h + 3 * (i % 2) - (j % 3)).to(score.dtype)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HEADS = 3
EVERY = (
    alibi(HEADS),
    alibi(random(HEADS)),
    relative_bias(random(HEADS, 9)),
    t5_bias(random(16, HEADS)),
    t5_bias(random(12, HEADS), bidirectional=False, max_distance=9),
    soft_cap(3.0),
    temperature(0.7),
    temperature(random(HEADS).exp()),
    score_function(by_parity),
    Chain((alibi(HEADS), relative_bias(random(HEADS, 3)))),
    Chain((soft_cap(2.0), t5_bias(random(16, HEADS)), temperature(random(HEADS).exp()))),
)
TILES = {
    "consecutive": Tile(2, HEADS, torch.arange(5, 12), torch.arange(3, 30), consecutive=True),
    "not told": Tile(2, HEADS, torch.arange(40, 47), torch.arange(3, 30)),
    "gaps": Tile(2, HEADS, torch.arange(20, 24), torch.tensor([0, 1, 2, 9, 10, 23, 40])),
    "one pair": Tile(2, HEADS, torch.tensor([7]), torch.tensor([2])),
    "one row": Tile(2, HEADS, torch.tensor([7]), torch.arange(12)),
    "many rows": Tile(1, HEADS, torch.arange(70), torch.arange(17)),
}


def change(score, s, b, h, i, j):
    """What a score makes of the logit s of one pair, as its definition says."""
    match score.kind:
        case "ALiBi":
            return s - float(score.slopes[h]) * abs(i - j)
        case "RelativeBias":
            reach = score.table.shape[1] // 2
            return s + float(score.table[h, reach + max(-reach, min(reach, j - i))])
        case "T5Bias":
            bucket = t5_bucket(
                torch.tensor(j - i), score.weight.shape[0], score.bidirectional, score.max_distance
            )
            return s + float(score.weight[bucket, h])
        case "SoftCap":
            return score.cap * math.tanh(s / score.cap)
        case "Temperature":
            return s / float(score.t[h] if isinstance(score.t, torch.Tensor) else score.t)
        case "ScoreFunction":
            return float(
                score.function(torch.tensor(s, dtype=torch.float64), *map(torch.tensor, (b, h, i, j)))
            )
        case "Chain":
            for part in score.scores:
                s = change(part, s, b, h, i, j)
            return s


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("score", EVERY, ids=lambda s: s.kind)
def test_equals_its_definition_pair_by_pair(score, tile):
    s = random(tile.batch, HEADS, len(tile.rows), len(tile.cols))
    before = s.clone()
    made = score.apply(s, tile)
    assert torch.equal(s, before)
    expected = torch.empty_like(s)
    for b, h, x, y in torch.cartesian_prod(*map(torch.arange, s.shape)).tolist():
        i, j = int(tile.rows[x]), int(tile.cols[y])
        expected[b, h, x, y] = change(score, float(s[b, h, x, y]), b, h, i, j)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("score", EVERY, ids=lambda s: s.kind)
def test_positional_scores_are_their_bias(score, tile):
    s = random(tile.batch, HEADS, len(tile.rows), len(tile.cols))
    bias = score.bias(tile, torch.float64)
    assert (bias is not None) == score.positional
    if bias is not None:
        assert bias.dtype == torch.float64
        assert torch.broadcast_shapes(bias.shape, s.shape[1:]) == s.shape[1:]
        torch.testing.assert_close(s + bias, score.apply(s, tile))


@pytest.mark.parametrize("tile", [TILES["consecutive"], TILES["gaps"]], ids=["consecutive", "gaps"])
@pytest.mark.parametrize("score", EVERY, ids=lambda s: s.kind)
def test_gradients(score, tile):
    spec, tensors = score.flatten()
    tensors = tuple(t.double().requires_grad_() for t in tensors)
    small = Tile(1, HEADS, tile.rows[:3], tile.cols[:6], consecutive=tile.consecutive)
    s = random(1, HEADS, len(small.rows), len(small.cols)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, *t: spec.unflatten(t).apply(s, small), (s, *tensors))


@pytest.mark.parametrize("score", EVERY, ids=lambda s: s.kind)
def test_description_round_trip(score):
    again = from_json(to_json(score))
    assert type(again) is type(score)
    assert hash(again) == hash(score)
    if score.kind != "ScoreFunction":  # importlib mode gives the tests' module another name
        assert again == score


@pytest.mark.parametrize("score", EVERY, ids=lambda s: s.kind)
def test_dtype_is_that_of_the_scores(score):
    tile = TILES["consecutive"]
    for dtype in (torch.float32, torch.bfloat16):
        s = random(tile.batch, HEADS, len(tile.rows), len(tile.cols)).to(dtype)
        assert score.apply(s, tile).dtype == dtype


@pytest.mark.parametrize(
    "score", [s for s in EVERY if s.kind not in ("ScoreFunction",)], ids=lambda s: s.kind
)
def test_a_tile_of_some_heads_takes_their_values(score):
    whole = TILES["consecutive"]
    part = Tile(2, 2, whole.rows, whole.cols, head_start=1, total_heads=HEADS, consecutive=True)
    s = random(2, HEADS, len(whole.rows), len(whole.cols))
    torch.testing.assert_close(score.apply(s[:, 1:], part), score.apply(s, whole)[:, 1:])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_tiles(shape):
    tile = Tile(1, HEADS, torch.arange(shape[0]), torch.arange(shape[1]))
    for score in EVERY:
        assert score.apply(torch.zeros(1, HEADS, *shape), tile).shape == (1, HEADS, *shape)


def test_alibi_slopes_are_the_published_ones():
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-n for n in range(1, 9)]))
    torch.testing.assert_close(alibi_slopes(16), torch.tensor([2.0 ** (-n / 2) for n in range(1, 17)]))
    # 12 heads: the 8 of 8 heads, then the 1st, 3rd, 5th and 7th of 16 heads
    expected = [*(2.0**-n for n in range(1, 9)), *(2.0**-n for n in (0.5, 1.5, 2.5, 3.5))]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(expected))
    assert alibi_slopes(1).tolist() == [2.0**-8]


@pytest.mark.parametrize("heads", [1, 3, 6, 8, 12, 20, 40, 64])
def test_alibi_slopes_equal_those_of_transformers(heads):
    modeling = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    bias = modeling.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # slope_h * j
    torch.testing.assert_close(alibi_slopes(heads), bias.view(heads, 2)[:, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 20), (16, 64), (64, 500), (8, 128)])
def test_t5_buckets_equal_those_of_transformers(bidirectional, buckets, max_distance):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    ahead = torch.arange(-3000, 3001)
    expected = modeling.T5Attention._relative_position_bucket(ahead, bidirectional, buckets, max_distance)
    assert torch.equal(t5_bucket(ahead, buckets, bidirectional, max_distance), expected)


@pytest.mark.parametrize("decoder", [False, True])
def test_t5_bias_equals_that_of_transformers(decoder):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    configuration = pytest.importorskip("transformers").T5Config(
        d_model=12, d_kv=4, num_heads=3, is_decoder=decoder, relative_attention_num_buckets=16
    )
    attention = modeling.T5Attention(configuration, has_relative_attention_bias=True, layer_idx=0)
    tile = Tile(1, 3, torch.arange(150, 200), torch.arange(200), consecutive=True)
    expected = attention.compute_bias(50, 200, past_seen_tokens=150)[0]
    score = t5_bias(attention.relative_attention_bias.weight, bidirectional=not decoder)
    torch.testing.assert_close(score.bias(tile), expected)
    up = torch.randn(expected.shape)
    weight = attention.relative_attention_bias.weight
    (mine,) = torch.autograd.grad(score.bias(tile), weight, up)
    (theirs,) = torch.autograd.grad(expected, weight, up)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 140), st.integers(1, 60), st.integers(1, 3))
def test_toeplitz_and_its_sum_along_diagonals(rows, cols, heads):
    values = random(heads, rows + cols - 1).requires_grad_()
    index = rows - 1 - torch.arange(rows)[:, None] + torch.arange(cols)
    tile = toeplitz(values, rows)
    assert torch.equal(tile, values[:, index])
    up = random(heads, rows, cols, seed=1)
    (mine,) = torch.autograd.grad(tile, values, up)
    (gathered,) = torch.autograd.grad(values[:, index], values, up)
    torch.testing.assert_close(mine, gathered)


def test_toeplitz_of_any_layout():
    """Values that are a slice, transposed or expanded, also for one row, where nothing need be copied."""
    for rows in (1, 4):
        for values in (random(5, rows + 6)[2:4], random(rows + 6, 2).T, random(1, rows + 6).expand(2, -1)):
            index = rows - 1 - torch.arange(rows)[:, None] + torch.arange(7)
            assert torch.equal(toeplitz(values, rows), values[:, index])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(1, 20), st.sets(st.integers(0, 80), min_size=1, max_size=20))
def test_by_distance(first, rows, cols):
    i, j = torch.arange(first, first + rows), torch.tensor(sorted(cols))
    tile = by_distance(lambda d: torch.stack([d**2, -d]), i, j)
    distance = i[:, None] - j
    assert torch.equal(tile, torch.stack([distance**2, -distance]))


def test_a_tile_gathers_nothing_of_its_own_size():
    """The bias of a long tile looks up r + c - 1 distances, not r * c."""
    seen = []
    score = relative_bias(random(2, 5))
    at = type(score).at

    class Watched(type(score)):
        def at(self, distance):
            seen.append(distance.numel())
            return at(self, distance)

    Watched(score.table).bias(Tile(1, 2, torch.arange(30), torch.arange(500), consecutive=True))
    assert seen == [529]


def test_chain_takes_one_many_or_none():
    a, b, c = alibi(2), soft_cap(1.0), temperature(2.0)
    assert chain(None) is None
    assert chain(()) is None
    assert chain(a) is a
    assert chain([a]) is a
    assert chain([a, b, c]) == Chain((a, b, c))
    assert chain((Chain((a, b)), c)) == Chain((a, b, c))
    assert Chain((a, a)).positional
    assert not Chain((a, b)).positional


def test_a_score_of_ones_own():
    class Doubled(Score):
        def apply(self, scores, tile):
            return 2 * scores

    tile = TILES["one row"]
    s = random(2, HEADS, 1, 12)
    torch.testing.assert_close(Chain((Doubled(), soft_cap(1.0))).apply(s, tile), (2 * s).tanh())


def test_messages():
    tile = TILES["one row"]
    with pytest.raises(ConfigError, match="heads must be at least 1; got 0"):
        alibi(0)
    with pytest.raises(ConfigError, match=r"slopes must be a floating-point tensor \(H,\), got .*\(2, 2\)"):
        alibi(torch.zeros(2, 2))
    with pytest.raises(
        ConfigError, match=r"table must be a floating-point tensor \(H, 2 R \+ 1\), .*\(3, 4\)"
    ):
        relative_bias(torch.zeros(3, 4))
    with pytest.raises(ConfigError, match=r"weight must be a floating-point tensor \(buckets, H\)"):
        t5_bias(torch.zeros(3))
    with pytest.raises(ConfigError, match="a multiple of 2 when bidirectional is True; got 7"):
        t5_bias(torch.zeros(7, 2))
    with pytest.raises(ConfigError, match="max_distance must be above 8, .*; got 8"):
        t5_bias(torch.zeros(32, 2), max_distance=8)
    with pytest.raises(ConfigError, match="cap must be a finite number above 0, got 0"):
        soft_cap(0)
    with pytest.raises(ConfigError, match="t must be a finite number above 0, got -1"):
        temperature(-1)
    with pytest.raises(ConfigError, match=r"must be callable as f\(score, b, h, i, j\), got 3"):
        score_function(3)
    with pytest.raises(ConfigError, match="score must be a Score or a sequence of them, got 3"):
        chain(3)
    with pytest.raises(ConfigError, match=r"got 3 \(int\) inside"):
        chain([soft_cap(1.0), 3])
    with pytest.raises(ShapeError, match="alibi holds values for 4 heads, but the call has 3 query heads"):
        alibi(4).bias(tile)
    with pytest.raises(ShapeError, match=r"returned shape .* it must keep the shape"):
        score_function(lambda s, b, h, i, j: s.sum()).apply(random(2, HEADS, 1, 12), tile)
