import numpy as np
import pytest

from polyhead.errors import ConfigError, ShapeError
from polyhead.report import packing
from polyhead.report.packing import (
    limit_lookups,
    lookup_queries,
    pack_lookups,
    pack_pictures,
    picture_side,
    unpack_lookups,
    unpack_picture,
)


def size_of(packed) -> int:
    return sum(len(head) + 3 for layer in packed for head in layer)


@pytest.mark.parametrize("causal", [True, False])
def test_pictures_come_back_within_a_shade(causal):
    rng = np.random.default_rng(0)
    mass = rng.random((2, 3, 16, 16)) ** 6
    if causal:
        mass = np.tril(mass)
    pictures = pack_pictures(list(mass), causal=causal)
    for layer in range(2):
        for head in range(3):
            got = unpack_picture(pictures, layer, head)
            np.testing.assert_allclose(got, mass[layer, head], rtol=0.03, atol=6e-5)


@pytest.mark.parametrize(("heads", "causal"), [(72, False), (270, True), (2000, True), (5120, True)])
def test_pictures_of_noise_keep_to_their_budget(heads, causal):
    side = picture_side(heads, causal=causal)
    noise = np.random.default_rng(0).random((8, side, side)) ** 8
    one = size_of(pack_pictures([noise], causal=causal).packed) / 8
    assert one * heads <= packing.PICTURE_BYTES


def test_pictures_are_no_finer_than_the_text():
    assert picture_side(8, causal=True, tokens=30) <= 30
    assert picture_side(8, causal=True, tokens=5) == 5


def test_pictures_of_unlike_sides_are_refused():
    with pytest.raises(ShapeError, match=r"mass\[1\] has shape \(2, 8, 9\); expected \(heads, 8, 8\)"):
        pack_pictures([np.zeros((2, 8, 8)), np.zeros((2, 8, 9))], causal=True)


def random_lookups(rng, queries, heads, k, tokens, *, causal):
    top = queries[None, :, None] + 1 if causal else tokens
    positions = (rng.random((heads, queries.size, k)) * top).astype(np.int64)
    weights = rng.dirichlet(np.ones(k + 1), (heads, queries.size))[..., :k]
    return positions, weights


@pytest.mark.parametrize("causal", [True, False])
def test_lookups_come_back(causal):
    rng, queries = np.random.default_rng(1), np.arange(3, 900, 7)
    positions, weights = random_lookups(rng, queries, 2, 4, 1000, causal=causal)
    weights[0, 0, 2] = 0
    lookups = pack_lookups(queries, [positions], [weights])
    for head in range(2):
        got_positions, got_weights = unpack_lookups(lookups, 0, head)
        order = np.argsort(positions[head], axis=1, kind="stable")
        np.testing.assert_array_equal(got_positions, np.take_along_axis(positions[head], order, 1))
        expected = np.take_along_axis(weights[head], order, 1)
        np.testing.assert_allclose(got_weights, expected, atol=0.005)
    assert (unpack_lookups(lookups, 0, 0)[1][0] == 0).sum() == 1


def test_lookups_reach_over_the_longest_text():
    lookups = pack_lookups([0, 65535], [[[[0, 65535], [0, 65535]]]], [[[[0.5, 0.5], [0.5, 0.25]]]])
    np.testing.assert_array_equal(unpack_lookups(lookups, 0, 0)[0], [[0, 65535], [0, 65535]])
    with pytest.raises(ConfigError, match="queries must lie in 0..65535, got 65536"):
        pack_lookups([65536], [[[[0]]]], [[[[1.0]]]])


def test_slots_that_a_token_has_no_use_for_are_empty():
    lookups = pack_lookups([0, 1], [[[[0, -1], [1, 0]]]], [[[[1.0, 0.0], [0.25, 0.75]]]])
    positions, weights = unpack_lookups(lookups, 0, 0)
    assert sorted(weights[0]) == [0, 1]
    assert positions[0][weights[0].argmax()] == 0
    assert (positions >= 0).all()


def test_lookups_of_unlike_shapes_are_refused():
    with pytest.raises(ShapeError, match=r"expected \(heads, 2, 4\) for both"):
        pack_lookups([0, 1], [np.zeros((3, 2, 4))], [np.zeros((3, 2, 3))])


def test_every_token_is_recorded_where_there_is_room():
    np.testing.assert_array_equal(lookup_queries(270, 2048), np.arange(2048))
    np.testing.assert_array_equal(lookup_queries(1, 1), [0])


@pytest.mark.parametrize(("heads", "tokens"), [(2000, 8192), (5120, 8192), (1024, 4096), (100_000, 50)])
def test_else_passages_from_start_to_end(heads, tokens):
    queries = lookup_queries(heads, tokens)
    assert queries[0] == 0
    assert queries[-1] == tokens - 1
    assert (np.diff(queries) > 0).all()
    breaks = np.flatnonzero(np.diff(queries) > 1)
    assert queries.size / (breaks.size + 1) >= 8  # passages, not single tokens


@pytest.mark.parametrize("limit", [60_000, 20_000, 3_000, 100])
def test_lookups_of_noise_are_cut_to_their_limit(limit):
    rng = np.random.default_rng(2)
    queries = np.concatenate([np.arange(0, 300), np.arange(500, 800), np.arange(1700, 2000)])
    positions, weights = random_lookups(rng, queries, 6, 4, 2000, causal=True)
    whole = pack_lookups(queries, [positions], [weights], limit=10**9)
    cut = pack_lookups(queries, [positions], [weights], limit=limit)
    assert size_of(whole.packed) > limit
    assert size_of(cut.packed) <= limit or not cut.queries
    assert set(cut.queries) < set(whole.queries)
    row = {q: i for i, q in enumerate(whole.queries)}
    kept = [row[q] for q in cut.queries]
    for part, full in zip(unpack_lookups(cut, 0, 3), unpack_lookups(whole, 0, 3), strict=True):
        np.testing.assert_array_equal(part, full[kept])
    if limit > 3_000:
        assert size_of(cut.packed) > limit / 2  # cut, but not to the bone
        assert {0, 1999} <= set(cut.queries)


def test_lookups_that_fit_are_left_alone():
    lookups = pack_lookups([0, 1], [[[[0], [1]]]], [[[[1.0], [1.0]]]])
    assert limit_lookups(lookups, 1000) is lookups
