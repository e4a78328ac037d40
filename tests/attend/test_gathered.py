"""Queries picked out of a larger call: what holds for a pair, a tile and a whole call is what held there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.attend.masks import Gathered, densify, gathered, padding, some_of, tile_map
from polyhead.attend.scores import GatheredScore, alibi, chain, score_function, soft_cap
from polyhead.errors import ConfigError, ShapeError

BATCH, HEADS, LENGTH, KEYS = 2, 3, 20, 26


def leaves():
    real = torch.rand(BATCH, KEYS, generator=torch.Generator().manual_seed(1)) > 0.3
    ids = torch.arange(KEYS) // 7
    return st.sampled_from(
        [
            ph.causal(),
            ph.window(4),
            ph.window(3, 2),
            ph.sink(3),
            ph.prefix(torch.tensor([2, 9])),
            ph.documents(torch.stack([ids, ids.flip(0)])),
            padding(real),
            ph.strided(3),
            ph.neighborhood(KEYS, 5),
            ph.where(lambda b, h, i, j: (b + 2 * h + i + j) % 3 > 0),
            ph.per_head([ph.causal(), ph.window(2), ~ph.window(5, 5)]),
        ]
    )


def masks():
    return st.recursive(
        leaves(),
        lambda inner: (
            st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1])
            | st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1])
            | inner.map(lambda mask: ~mask)
        ),
        max_leaves=4,
    )


@st.composite
def picks(draw):
    """Some heads of some items, each with rows of its own, in order or not, perhaps twice."""
    count, rows = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(KEYS - LENGTH, KEYS, (count, rows), generator=generator)
    positions = positions.sort(1).values if draw(st.booleans()) else positions
    items = torch.randint(BATCH, (count,), generator=generator)
    heads = torch.randint(HEADS, (count,), generator=generator)
    return positions, items, heads


@settings(max_examples=60, deadline=None)
@given(mask=masks(), pick=picks(), rows=st.integers(1, 5), cols=st.integers(1, 9))
def test_pairs_are_those_of_the_larger_call_and_bounds_are_sure(mask, pick, rows, cols):
    positions, items, heads = pick
    whole = densify(mask, batch=BATCH, heads=HEADS, queries=LENGTH, keys=KEYS)
    whole = whole.expand(BATCH, HEADS, -1, -1)
    expected = whole[items[:, None], heads[:, None], positions - (KEYS - LENGTH)]
    count, length = positions.shape
    picked = gathered(mask, positions, items=items, heads=heads, first=KEYS - length)
    shape = {"heads": count, "queries": length, "keys": KEYS}
    found = densify(picked, **shape).expand(1, count, -1, -1)[0]
    assert torch.equal(found, expected)
    bounds_are_sure(expected[None], tile_map(picked, **shape, rows=rows, cols=cols), rows, cols)


def bounds_are_sure(expected, tiles, rows, cols):
    some, every = (t.expand(*expected.shape[:2], -1, -1) for t in (tiles.some, tiles.every))
    for a, strip in enumerate(expected.split(rows, dim=2)):
        for c, part in enumerate(strip.split(cols, dim=3)):
            assert not (part.any(3).any(2) & ~some[..., a, c]).any(), "a visible pair was passed over"
            assert not (every[..., a, c] & ~part.all(3).all(2)).any(), "a forbidden pair was let through"


@settings(max_examples=60, deadline=None)
@given(
    mask=masks(),
    batch=st.none() | st.lists(st.integers(0, BATCH - 1), min_size=1, max_size=3),
    heads=st.none() | st.lists(st.integers(0, HEADS - 1), min_size=1, max_size=4),
)
def test_some_items_and_heads_see_what_they_saw(mask, batch, heads):
    expected = densify(mask, batch=BATCH, heads=HEADS, queries=LENGTH, keys=KEYS)
    expected = expected.expand(BATCH, HEADS, -1, -1)
    maps = {}
    for axis, (name, chosen) in enumerate((("batch", batch), ("heads", heads))):
        if chosen is not None:
            maps[name] = torch.tensor(chosen)
            expected = expected.index_select(axis, maps[name])
    part = some_of(mask, **maps)
    shape = {"batch": len(expected), "heads": expected.shape[1], "queries": LENGTH, "keys": KEYS}
    assert torch.equal(densify(part, **shape).expand_as(expected), expected)
    bounds_are_sure(expected, tile_map(part, **shape, rows=3, cols=4), 3, 4)


def test_masks_that_treat_all_alike_stay_as_they_are():
    some = {"batch": torch.tensor([1]), "heads": torch.tensor([0, 2])}
    band = ph.causal() & (ph.window(5) | ph.sink(2)) & ~ph.blocks(4)
    assert some_of(band, **some) == band
    real = padding(torch.ones(BATCH, KEYS, dtype=torch.bool))
    assert some_of(real, heads=some["heads"]) is real
    causal, own = some_of(ph.causal() & real, **some).terms
    assert causal == ph.causal()
    assert isinstance(own, Gathered)
    assert own.heads is None


def test_sorted_rows_leave_out_the_tiles_that_lie_ahead():
    positions = torch.arange(0, 4096, 2).expand(2, -1)
    mask = gathered(ph.causal(), positions, first=4096 - 2048)
    tiles = tile_map(mask, heads=2, queries=2048, keys=4096, rows=128, cols=64)
    assert tiles.density() < 0.54


def test_without_maps_it_is_the_mask_itself():
    mask = ph.causal() & ph.window(3)
    shape = {"batch": 2, "heads": 2, "queries": 6, "keys": 9}
    assert torch.equal(densify(gathered(mask), **shape), densify(mask, **shape))


@pytest.mark.parametrize("backend", ["tiles", "reference", "auto"])
def test_attend_gives_the_rows_of_the_larger_call(backend):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    q.requires_grad_()
    mask = ph.causal() & (ph.window(90) | ph.sink(2))
    positions = torch.stack([torch.randperm(300, generator=generator)[:140].sort().values for _ in range(2)])
    whole = ph.attend(q, k, v, mask=mask, backend="reference")
    index = positions[None, :, :, None].expand(-1, -1, -1, 8)
    picked = gathered(mask, positions, first=300 - 140)
    found = ph.attend(q.gather(2, index), k, v, mask=picked, backend=backend)
    expected = whole.gather(2, index)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    one, two = (torch.autograd.grad(y.sin().sum(), q)[0] for y in (found, expected))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["tiles", "reference"])
@pytest.mark.parametrize(
    "score",
    [
        alibi(4),
        (alibi(4), soft_cap(2.0)),
        score_function(lambda s, b, h, i, j: s * (1 + 0.1 * b) - 0.1 * h * (i - j)),
    ],
    ids=["alibi", "chain", "function"],
)
def test_scores_are_those_of_the_larger_call(score, backend):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 150, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    whole = ph.attend(q, k, v, mask=ph.causal(), score=score, backend="reference")
    positions = torch.randperm(150, generator=generator)[:70].sort().values
    for rows in (positions, torch.arange(20, 150)):
        picked = GatheredScore(chain(score), rows, head=2, total_heads=4, item=1)
        found = ph.attend(
            q[1:, 2:3, rows],
            k[1:, 2:3],
            v[1:, 2:3],
            mask=gathered(ph.causal(), rows[None], first=150 - len(rows)),
            score=picked,
            backend=backend,
        )
        torch.testing.assert_close(found, whole[1:, 2:3, rows], rtol=0, atol=1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"gathered: positions must be an integer tensor \(H, L\)"):
        gathered(ph.causal(), torch.arange(4))
    with pytest.raises(ConfigError, match="gathered: mask must be a mask"):
        gathered(torch.ones(2, 2))
    with pytest.raises(
        ConfigError, match="gathered: items say already where every head comes from; leave batch"
    ):
        gathered(ph.causal(), items=torch.zeros(2).long(), batch=torch.zeros(1).long())
    with pytest.raises(ConfigError, match=r"gathered: batch must be an integer tensor \(B,\)"):
        gathered(ph.causal(), batch=torch.zeros(1, 2).long())
    with pytest.raises(ShapeError, match=r"gathered: batch must have shape \(2,\); got \(3,\)"):
        densify(gathered(ph.causal(), batch=torch.zeros(3).long()), batch=2, heads=2, queries=4, keys=4)
    with pytest.raises(ShapeError, match=r"gathered: items must have shape \(2,\); got \(3,\)"):
        densify(gathered(ph.causal(), items=torch.zeros(3).long()), heads=2, queries=4, keys=4)
    with pytest.raises(ShapeError, match="first must be the position that the call gives its first row, 3"):
        densify(gathered(ph.causal(), torch.zeros(1, 4).long()), queries=4, keys=7)
