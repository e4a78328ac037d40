"""Selectors: what scorers score, what budgets keep, what is read in the end."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import polyhead as ph
from polyhead.attend import attend
from polyhead.attend.function import explain
from polyhead.attend.masks import Chosen, Mask, densify
from polyhead.attend.selectors import Grid, Scorer, Selector, choose
from polyhead.attend.selectors.lists import places_of
from polyhead.errors import ConfigError, ShapeError, UnknownName

SHAPES = [
    (2, 4, 2, 100, 100, 16, 8),
    (1, 4, 1, 37, 90, 8, 16),
    (1, 2, 2, 1, 70, 1, 8),
    (1, 4, 2, 64, 64, 1, 8),
]


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int = 16) -> list[Tensor]:
    draw = torch.Generator().manual_seed(queries + keys)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, n, m, width, generator=draw, dtype=torch.float64) for n, m in shapes]


def scores_of(scorer: Scorer, q: Tensor, k: Tensor, rows: int, cols: int, scale: float = 0.25) -> Tensor:
    grid = Grid(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], rows, cols, scale)
    found = scorer.prepare(q, k, grid)
    middle = grid.row_blocks // 2
    return torch.cat([found(0, middle), found(middle, grid.row_blocks)], dim=2)


def blocks(x: Tensor, length: int) -> list[Tensor]:
    return list(x.split(length, dim=2))


def test_mean_keys() -> None:
    q, k, _ = tensors(2, 4, 2, 37, 90)
    found = scores_of(ph.mean_keys(), q, k, 8, 16)
    every = k.repeat_interleave(2, 1)
    for m, queries in enumerate(blocks(q, 8)):
        for n, keys in enumerate(blocks(every, 16)):
            expected = 0.25 * (queries.mean(2) * keys.mean(2)).sum(-1)
            torch.testing.assert_close(found[:, :, m, n], expected)


def test_key_bounds_are_never_below_the_score_of_a_key() -> None:
    q, k, _ = tensors(2, 4, 2, 9, 90)
    found = scores_of(ph.key_bounds(), q, k, 1, 16)
    for n, keys in enumerate(blocks(k.repeat_interleave(2, 1), 16)):
        products = 0.25 * q @ keys.mT
        assert (found[..., n] >= products.amax(-1) - 1e-12).all()
        least, most = keys.amin(2, keepdim=True), keys.amax(2, keepdim=True)
        torch.testing.assert_close(found[..., n], 0.25 * torch.maximum(q * least, q * most).sum(-1))
    one = scores_of(ph.key_bounds(), q, k, 1, 1)  # a bound of one key is its score
    torch.testing.assert_close(one, 0.25 * q @ k.repeat_interleave(2, 1).mT)


def test_sampled_mass_of_every_pair_is_the_mass() -> None:
    q, k, _ = tensors(1, 4, 2, 37, 90)
    found = scores_of(ph.sampled_mass(1), q, k, 8, 16)
    weights = (0.25 * q @ k.repeat_interleave(2, 1).mT).masked_fill(
        ~densify(ph.causal(), queries=37, keys=90), -math.inf
    )
    weights = weights.softmax(-1)
    for m, rows in enumerate(blocks(weights, 8)):
        for n, part in enumerate(rows.split(16, dim=-1)):
            torch.testing.assert_close(found[:, :, m, n].exp(), part.sum((-1, -2)))
    sampled = scores_of(ph.sampled_mass(4), q, k, 8, 16)
    assert sampled.shape == found.shape
    assert torch.equal(sampled.isneginf(), found.isneginf())


@pytest.mark.parametrize(
    ("stride", "keys", "power"),
    [(4, 4, 1.0), (8, 2, 2.0), (3, 5, 1.0), (8, 1, 1.0), (1, 16, 3.0), (4, 2, 2.0)],
)
def test_sampled_mass_is_the_mass_of_the_pairs_that_are_taken(stride: int, keys: int, power: float) -> None:
    q, k, _ = tensors(1, 4, 2, 37, 90)
    found = scores_of(ph.sampled_mass(stride, keys, power), q, k, 8, 16)
    logits = (0.25 * q @ k.repeat_interleave(2, 1).mT).masked_fill(
        ~densify(ph.causal(), queries=37, keys=90), -math.inf
    )
    logits[..., torch.arange(90) % keys != 0] = -math.inf
    weights = logits.softmax(-1)
    # of blocks of 8 queries, and of the last one with 5
    taken, left = {8: ([4], [2]), 4: ([2, 6], [1, 3]), 3: ([1, 4, 6], [0, 2, 4]), 1: (range(8), range(5))}[
        stride
    ]
    for m, rows in enumerate(blocks(weights, 8)):
        for n, part in enumerate(rows.split(16, dim=-1)):
            own = part[:, :, list(left if m == 4 else taken)].sum(-1)
            torch.testing.assert_close(found[:, :, m, n].exp(), own.pow(power).sum(-1).pow(1 / power))


def test_sampled_mass_asks_every_query_of_a_short_call() -> None:
    q, k, _ = tensors(1, 4, 2, 3, 90)
    one, other = ph.sampled_mass(16, 2), ph.sampled_mass(1, 2)
    torch.testing.assert_close(scores_of(one, q, k, 64, 16), scores_of(other, q, k, 64, 16))


@pytest.mark.parametrize(
    ("queries", "keys", "rows", "cols", "asked", "taken"),
    [
        (37, 90, 8, 16, 4, 8),  # parts divide blocks, not the call
        (90, 90, 16, 7, 5, 3),  # nor blocks
        (41, 90, 8, 16, 8, 16),
        (37, 90, 8, 16, 8, 1),
        (9, 4, 2, 2, 1, 1),  # queries before the first key
    ],
)
def test_mean_mass_is_the_mass_of_means(
    queries: int, keys: int, rows: int, cols: int, asked: int, taken: int
) -> None:
    q, k, _ = tensors(2, 4, 2, queries, keys)
    found = scores_of(ph.mean_mass(asked, taken), q, k, rows, cols)
    means = torch.stack([part.mean(2) for part in blocks(k.repeat_interleave(2, 1), taken)], 2)
    first = torch.arange(means.shape[2]) * taken
    for m, block in enumerate(blocks(q, rows)):
        expected = torch.zeros(2, 4, -(-keys // cols), dtype=torch.float64)
        end = m * rows
        for part in blocks(block, asked):
            end += part.shape[2]
            logits = (0.25 * part.mean(2, keepdim=True) @ means.mT)[:, :, 0]
            seen = first <= end - 1 + keys - queries
            weights = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
            expected.index_add_(-1, first // cols, weights)
        torch.testing.assert_close(found[:, :, m].exp(), expected)


def test_mean_mass_of_single_queries_and_keys_are_the_weights() -> None:
    q, k, _ = tensors(1, 4, 2, 37, 37)
    weights = (0.25 * q @ k.repeat_interleave(2, 1).mT).masked_fill(
        ~densify(ph.causal(), queries=37, keys=37), -math.inf
    )
    torch.testing.assert_close(scores_of(ph.mean_mass(1, 1), q, k, 1, 1).exp(), weights.softmax(-1))


def test_mean_mass_of_whole_blocks_ranks_as_mean_keys() -> None:
    q, k, _ = tensors(1, 4, 2, 64, 64)
    found, expected = (
        choose(ph.select(scorer, ph.keep_blocks(2), rows=8, cols=8), q, k, ph.causal(), 0.25)
        for scorer in (ph.mean_mass(8, 8), ph.mean_keys())
    )
    assert found == expected


@pytest.mark.parametrize("over", ["group", "all"])
@pytest.mark.parametrize("by", ["mean", "max"])
@pytest.mark.parametrize(
    "always", [None, ph.sink(1) | ph.window(9), ph.per_head([ph.window(n) for n in (2, 9, 4, 5)])]
)
@pytest.mark.parametrize(
    "mask", [None, ph.causal(), ph.causal() & ph.per_head([ph.window(n) for n in (9, 9, 30, 40)])]
)
@pytest.mark.parametrize(
    "budget", [ph.keep_mass(0.7), ph.keep_mass(torch.tensor([0.2, 0.4, 0.6, 0.8]))], ids=repr
)
def test_heads_that_score_alike_choose_what_they_would_alone(
    over: Any, by: Any, always: Mask | None, mask: Mask | None, budget: Any
) -> None:
    q, k, _ = tensors(2, 4, 2, 100, 110)
    joined = ph.shared(ph.mean_mass(4, 3), over, by)
    found, expected = (
        choose(ph.select(scorer, budget, rows=16, cols=5, always=always), q, k, mask, 0.25)
        for scorer in (joined, _HeadByHead(joined))
    )
    assert found == expected


class _HeadByHead(Scorer):
    """A scorer that does not say which heads score alike."""

    scorer: Scorer

    def prepare(self, q: Tensor, k: Tensor, grid: Grid) -> Any:
        return self.scorer.prepare(q, k, grid)


def test_shared_scores_are_joined_over_heads() -> None:
    q, k, _ = tensors(1, 4, 2, 37, 90)
    each = scores_of(ph.mean_keys(), q, k, 8, 16)
    group = scores_of(ph.shared(ph.mean_keys()), q, k, 8, 16)
    torch.testing.assert_close(group[:, 0], each[:, :2].mean(1))
    assert torch.equal(group[:, 0], group[:, 1])
    everybody = scores_of(ph.shared(ph.mean_keys(), "all", "max"), q, k, 8, 16)
    torch.testing.assert_close(everybody, each.amax(1, keepdim=True).expand_as(each))


SCORES = torch.tensor([[[[3.0, 1.0, 2.0, 0.0, 9.0]], [[0.0, 0.0, 0.0, 4.0, 9.0]]]])
VISIBLE = torch.tensor([[[[True, True, True, True, False]], [[True, True, True, True, False]]]])
NOTHING = torch.zeros_like(VISIBLE)


def kept(budget: Any, forced: Tensor = NOTHING) -> list[list[int]]:
    found = budget.kept(SCORES, VISIBLE, forced)
    assert found.dtype == torch.bool
    assert not (found & ~VISIBLE).any()
    return [found[0, h, 0].nonzero().view(-1).tolist() for h in range(2)]


def test_budgets_keep_the_best_visible_blocks() -> None:
    assert kept(ph.keep_blocks(2)) == [[0, 2], [2, 3]]  # of equals the later one
    assert kept(ph.keep_blocks(torch.tensor([1, 3]))) == [[0], [1, 2, 3]]
    assert kept(ph.keep_blocks(9)) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept(ph.keep_share(0.5)) == [[0, 2], [2, 3]]
    assert kept(ph.keep_share(torch.tensor([0.25, 1.0]))) == [[0], [0, 1, 2, 3]]
    assert kept(ph.keep_at_least(0.25)) == [[0], [3]]
    assert kept(ph.keep_at_least(0.26)) == [[0, 2], [2, 3]]  # where keep_share rounds to one
    assert kept(ph.keep_above(1.5)) == [[0, 2], [3]]
    # softmax of 3, 1, 2, 0: .644 .087 .237 .032, and of 0, 0, 0, 4: .948 for the last
    assert kept(ph.keep_mass(0.6)) == [[0], [3]]
    assert kept(ph.keep_mass(0.9)) == [[0, 1, 2], [3]]
    assert kept(ph.keep_mass(0.95)) == [[0, 1, 2], [2, 3]]
    assert kept(ph.keep_mass(1.0)) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept(ph.keep_total(0.5)) == [[0, 1, 2], [3]]  # .948 .644 .237 .087 over both heads


@pytest.mark.parametrize(
    "budget",
    [
        ph.keep_share(0.0),
        ph.keep_at_least(0.0),
        ph.keep_mass(0.0),
        ph.keep_above(100.0),
        ph.keep_total(0.0),
    ],
)
def test_no_budget_reads_nothing(budget: Any) -> None:
    assert kept(budget) == [[0], [3]]


@pytest.mark.parametrize(
    "budget",
    [ph.keep_blocks(2), ph.keep_share(0.5), ph.keep_mass(0.5), ph.keep_above(2.5), ph.keep_total(0.5)],
)
def test_forced_blocks_are_kept_and_count(budget: Any) -> None:
    forced = NOTHING.clone()
    forced[..., 1] = True
    found = kept(budget, forced)
    assert all(1 in row for row in found)
    if isinstance(budget, type(ph.keep_blocks(1)) | type(ph.keep_share(1))):
        assert found == [[0, 1], [1, 3]]


SCORERS = [ph.mean_keys(), ph.key_bounds(), ph.shared(ph.mean_keys()), ph.sampled_mass(1), ph.mean_mass(1, 3)]
BUDGETS = [ph.keep_blocks(2), ph.keep_share(0.3), ph.keep_mass(0.8), ph.keep_above(0.0), ph.keep_total(0.3)]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: type(s).__name__)
def test_what_is_chosen_is_read_exactly(scorer: Scorer, budget: Any) -> None:
    for batch, heads, kv_heads, queries, keys, rows, cols in SHAPES:
        x = tensors(batch, heads, kv_heads, queries, keys)
        own = ph.select(scorer, budget, rows=rows, cols=cols, always=ph.sink(1) | ph.window(3))
        for mask in (ph.causal(), None):
            dense = attend(*x, mask=mask, select=own, backend="reference")
            torch.testing.assert_close(attend(*x, mask=mask, select=own), dense)
            found = choose(own, x[0], x[1], mask, 0.25)
            torch.testing.assert_close(attend(*x, mask=found if mask is None else mask & found), dense)


def test_everything_kept_is_plain_attention() -> None:
    x = tensors(2, 4, 2, 100, 100)
    for own in (
        ph.select(ph.mean_keys(), ph.keep_share(1.0), rows=16, cols=8),
        ph.select(ph.mean_keys(), ph.keep_mass(1.0), rows=7, cols=9),
        ph.select(ph.mean_keys(), ph.keep_blocks(1000), rows=1000, cols=1000),
    ):
        torch.testing.assert_close(attend(*x, mask=ph.causal(), select=own), attend(*x, mask=ph.causal()))


@pytest.mark.parametrize(
    "scorer",
    [ph.sampled_mass(3), ph.mean_mass(2, 2), ph.mean_mass(3, 5), ph.shared(ph.mean_mass(2, 2), by="max")],
    ids=repr,
)
def test_bands_do_not_change_the_choice(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = tensors(2, 4, 2, 100, 100)
    own = ph.select(scorer, ph.keep_mass(0.7), rows=8, cols=8)
    whole = choose(own, q, k, ph.causal(), 0.25)
    monkeypatch.setattr(import_module("polyhead.attend.selectors.masses"), "_HELD", 500)
    monkeypatch.setattr(import_module("polyhead.attend.selectors.choice"), "_HELD", 100)
    assert choose(own, q, k, ph.causal(), 0.25) == whole


@pytest.mark.parametrize("always", [None, ph.sink(1), ph.sink(9) | ph.window(9), ph.window(1000)])
@pytest.mark.parametrize("mask", [None, ph.causal(), ph.causal() & ph.window(20)])
@pytest.mark.parametrize(
    "budget",
    [
        ph.keep_blocks(3),
        ph.keep_blocks(100),
        ph.keep_share(0.0),
        ph.keep_share(0.25),
        ph.keep_share(1.0),
        ph.keep_at_least(0.3),
        ph.keep_share(torch.tensor([0.1, 0.2, 0.3, 0.9])),
    ],
    ids=repr,
)
def test_the_step_of_decoding_chooses_what_a_table_of_all_blocks_would(
    always: Mask | None, mask: Mask | None, budget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 61, 8)
    q[1, 1], k[0, 0, :30] = 0.0, k[0, 0, 30:60]  # equal scores
    k[1, 1, 7] = torch.nan
    selector = ph.select(ph.mean_keys(), budget, rows=16, cols=5, always=always)
    found = choose(selector, q, k, mask, 1.0)
    monkeypatch.setattr(type(selector), "single", lambda *_: None)
    expected = choose(selector, q, k, mask, 1.0)
    for found_row, expected_row in zip(found.index.flatten(0, 2), expected.index.flatten(0, 2), strict=True):
        assert sorted(found_row[found_row >= 0].tolist()) == sorted(expected_row[expected_row >= 0].tolist())


def test_choice_is_causal_where_queries_choose_for_themselves() -> None:
    q, k, v = tensors(1, 2, 2, 64, 64)
    own = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=1, cols=8, always=ph.window(0))
    before = attend(q, k, v, mask=ph.causal(), select=own)
    for x in (q, k, v):
        x[:, :, 40:] += torch.randn_like(x[:, :, 40:])
    torch.testing.assert_close(attend(q, k, v, mask=ph.causal(), select=own)[:, :, :40], before[:, :, :40])


def test_places_of_a_table() -> None:
    table = torch.tensor(
        [[[True, False, True, True], [False, False, False, False], [False, False, False, True]]]
    )
    assert places_of(table).tolist() == [[[0, 2, 3], [-1, -1, -1], [3, -1, -1]]]
    assert places_of(torch.zeros(2, 0, 4, dtype=torch.bool)).shape == (2, 0, 0)
    assert places_of(torch.zeros(2, 3, 4, dtype=torch.bool)).shape == (2, 3, 0)


def test_either_reads_what_any_reads() -> None:
    q, k, _ = tensors(1, 2, 2, 64, 64)
    a = ph.select(ph.mean_keys(), ph.keep_blocks(1), rows=8, cols=8)
    b = ph.select(ph.key_bounds(), ph.keep_blocks(1), rows=8, cols=8)

    def table(own: Any) -> Tensor:
        found: Mask = choose(own, q, k, ph.causal(), 0.25)
        return densify(found, heads=2, queries=64, keys=64)

    assert torch.equal(table(a | b), table(a) | table(b))
    assert (a | b | a).terms == (a, b, a)
    with pytest.raises(ConfigError, match="blocks of one size"):
        a | ph.select(ph.mean_keys(), ph.keep_blocks(1), rows=8, cols=4)


def test_padding_is_never_chosen_and_rows_without_keys_give_zeros() -> None:
    x = tensors(2, 2, 2, 40, 40)
    real = torch.arange(40) >= torch.tensor([[0], [24]])
    own = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=8, cols=8)
    mask = ph.causal() & ph.padding(real)
    out = attend(*x, mask=mask, select=own)
    assert (out[1, :, :24] == 0).all()
    found = choose(own, x[0], x[1], mask, 0.25)
    assert isinstance(found, Chosen)
    assert int(found.index[1][found.index[1] >= 0].min()) >= 3


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(
    "scorer",
    [ph.mean_keys(), ph.key_bounds(), ph.sampled_mass(1), ph.sampled_mass(4), ph.mean_mass(2, 3)],
    ids=repr,
)
def test_what_stands_at_padding_counts_in_no_score(scorer: Scorer, left: bool) -> None:
    q, k, _ = tensors(2, 4, 2, 40, 40)
    places = torch.arange(40)
    real = places >= torch.tensor([[0], [21]]) if left else places < torch.tensor([[40], [19]])
    mask = ph.causal() & ph.padding(real)
    own = ph.select(scorer, ph.keep_blocks(2), rows=8, cols=8)
    found = choose(own, q, k, mask, 0.25)
    for poison in (1e6, math.nan):
        k[1, :, ~real[1]] = poison
        assert choose(own, q, k, mask, 0.25) == found


IDS = torch.tensor([0, 2] * 10 + [1] * 22 + [0, 2] * 11)
UNSURE = {
    "where": ph.where(lambda b, h, i, j: (j <= i) & (j >= 5 * b)),
    "left padding": ph.causal() & ph.padding(torch.arange(64) >= torch.tensor([[5], [37]])),
    "documents": ph.documents(IDS) & (ph.sink(4) | ph.window(8)),
    "by head": ph.per_head([ph.causal(), ph.window(9), ph.strided(5), ph.dilated(8, 5)]) & ph.documents(IDS),
}


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("name", UNSURE)
def test_blocks_of_which_nothing_is_seen_are_no_candidates(name: str, rows: int) -> None:
    mask = UNSURE[name]
    q, k, v = tensors(2, 4, 2, 64, 64)
    pairs = densify(mask, batch=2, heads=4, queries=64, keys=64).expand(2, 4, -1, -1)
    visible = pairs.unflatten(2, (-1, rows)).unflatten(4, (-1, 16)).any(5).any(3)
    for budget in (ph.keep_blocks(1), ph.keep_share(0.3), ph.keep_mass(0.5), ph.keep_total(0.3)):
        own = ph.select(ph.mean_keys(), budget, rows=rows, cols=16)
        found = choose(own, q, k, mask, 0.25)
        read = densify(found, batch=2, heads=4, queries=64, keys=64)
        read = read.unflatten(2, (-1, rows)).unflatten(4, (-1, 16))[:, :, :, 0, :, 0]
        assert not (read & ~visible).any()
        assert (read.any(-1) == visible.any(-1)).all()
        if rows == 1:
            out = attend(q, k, v, mask=mask, select=own)
            assert torch.equal((out != 0).any(-1), pairs.any(-1))
    share = ph.select(ph.mean_keys(), ph.keep_share(0.5), rows=rows, cols=16)
    counts = (choose(share, q, k, mask, 0.25).index >= 0).sum(-1)
    seen = visible.sum(-1)
    assert torch.equal(counts, (0.5 * seen).round().clamp(min=1).long() * (seen > 0))
    everything = ph.select(ph.mean_keys(), ph.keep_share(1.0), rows=rows, cols=16)
    torch.testing.assert_close(attend(q, k, v, mask=mask, select=everything), attend(q, k, v, mask=mask))


def test_a_query_that_sees_nothing_of_what_its_block_chose_gives_zeros_unless_its_own_key_is_read() -> None:
    q, k, v = tensors(1, 4, 2, 256, 256)
    for rows, cols in ((64, 16), (16, 4), (32, 32)):
        blind = {}
        for always in (None, ph.window(0)):
            own = ph.select(ph.mean_keys(), ph.keep_blocks(1), rows=rows, cols=cols, always=always)
            read = densify(choose(own, q, k, ph.causal(), 0.25), batch=1, heads=4, queries=256, keys=256)
            nothing = ~(read & densify(ph.causal(), queries=256, keys=256)).any(-1)
            out = attend(q, k, v, mask=ph.causal(), select=own)
            assert torch.equal((out == 0).all(-1), nothing)
            blind[always] = int(nothing.sum())
        assert blind[ph.window(0)] == 0
        assert blind[None] > 0 or rows == cols  # the own block is seen from its first key on


@pytest.mark.parametrize("length", [40, 700])
def test_where_nothing_may_be_read_nothing_is_and_nothing_is_missed(length: int) -> None:
    q, k, v = tensors(1, 4, 2, length, length)
    blind = ph.causal() & ph.padding(torch.zeros(1, length, dtype=torch.bool))
    own = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=8, cols=8)
    away = ph.fixed(ph.padding(torch.zeros(1, length, dtype=torch.bool)))  # shares no pair with the mask
    for mask, select in ((blind, own), (blind, ph.guarded(own)), (ph.causal(), away)):
        for backend in ("auto", "chosen", "tiles"):
            out, lse = attend(q, k, v, mask=mask, select=select, return_lse=True, backend=backend)
            assert torch.equal(out, torch.zeros_like(out))
            assert lse.isneginf().all()
            assert (attend(q, k, v, mask=mask, select=select, backend=backend) == 0).all()
        missed = ph.missed_mass(q, k, v, mask=mask, select=select)
        assert (missed.mass == (0.0 if mask is blind else 1.0)).all()
        assert missed.bound.isfinite().all()


def test_means_and_bounds_are_those_of_the_real_keys() -> None:
    q, k, _ = tensors(2, 4, 2, 20, 20)
    real = torch.arange(20) >= torch.tensor([[0], [11]])
    grid = Grid(2, 4, 2, 20, 20, 1, 8, 0.25, real)
    means, bounds = grid.mean_keys(k), ph.key_bounds().prepare(q, k, grid)(0, 20)
    torch.testing.assert_close(means[0, :, 2], k[0, :, 16:].mean(1))
    torch.testing.assert_close(means[1, :, 1], k[1, :, 11:16].mean(1))
    assert (means[1, :, 0] == 0).all()
    assert (bounds[1, ..., 0] == 0).all()
    every = k.repeat_interleave(2, 1)[1, :, 11:16]
    own = torch.maximum(q[1] * every.amin(1, keepdim=True), q[1] * every.amax(1, keepdim=True)).sum(-1)
    torch.testing.assert_close(bounds[1, ..., 1], 0.25 * own)


@pytest.mark.parametrize("scorer", [*SCORERS, ph.sampled_mass(2)], ids=repr)
def test_of_nothing_nothing_is_chosen(scorer: Scorer) -> None:
    own = ph.guarded(ph.select(scorer, ph.keep_blocks(2), rows=8, cols=8, always=ph.window(0)))
    for queries, keys in ((0, 0), (3, 0), (0, 9)):
        out = attend(*tensors(2, 4, 2, queries, keys), select=own)
        assert out.shape == (2, 4, queries, 16)
        assert not out.any()


@pytest.mark.parametrize(
    "own",
    [
        *(ph.select(scorer, ph.keep_blocks(2), rows=8, cols=8) for scorer in SCORERS),
        ph.rectified(ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=8, cols=8)),
        ph.token_indexer(8),
        ph.hisa(8, blocks=2, size=8),
        ph.dhsa(16, local=8, rows=8),
        ph.vertical_slash(),
    ],
    ids=repr,
)
def test_heads_without_features_may_choose(own: Selector) -> None:
    """They score all keys 0, as heads of one feature do that is 0."""
    q, k, v = tensors(2, 4, 2, 40, 40)
    out = attend(q[..., :0], k[..., :0], v, mask=ph.causal(), select=own)
    expected = attend(0 * q[..., :1], 0 * k[..., :1], v, mask=ph.causal(), select=own)
    torch.testing.assert_close(out, expected)


def test_gradients_flow_through_what_is_read() -> None:
    x = [t.requires_grad_() for t in tensors(1, 2, 2, 40, 40)]
    own = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=8, cols=8)
    up = torch.randn(1, 2, 40, 16, dtype=torch.float64)
    found = [
        torch.autograd.grad(attend(*x, mask=ph.causal(), select=own, backend=backend), x, up)
        for backend in ("chosen", "tiles", "reference")
    ]
    for one in found[:2]:
        for a, b in zip(one, found[2], strict=True):
            torch.testing.assert_close(a, b)


def test_other_normalisers_and_scores_are_run_by_the_tile_engine() -> None:
    x = tensors(1, 2, 2, 300, 300)
    own = ph.select(ph.mean_keys(), ph.keep_share(0.2), rows=16, cols=16)
    call: dict[str, Any] = {
        "mask": ph.causal(),
        "select": own,
        "normalizer": ph.entmax(1.5),
        "score": ph.alibi(2),
    }
    assert explain(*x, **call).backend == "tiles"
    torch.testing.assert_close(attend(*x, **call), attend(*x, **call, backend="reference"))


def test_selectors_are_values() -> None:
    own = ph.select(ph.shared(ph.key_bounds()), ph.keep_mass(0.9), rows=8, cols=8, always=ph.sink(1))
    guard = ph.guarded(own | own, 0.02)
    assert ph.from_json(ph.to_json(guard)) == guard
    assert hash(own) == hash(
        ph.select(ph.shared(ph.key_bounds()), ph.keep_mass(0.9), rows=8, cols=8, always=ph.sink(1))
    )


def test_wrong_input_is_said() -> None:
    x = tensors(1, 2, 2, 40, 40)
    with pytest.raises(ConfigError, match=r"select must be a selector such as select\(mean_keys"):
        attend(*x, select=ph.mean_keys())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="scorer must be one such as mean_keys"):
        ph.select(ph.keep_share(0.1), ph.mean_keys())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="budget must be one such as keep_share"):
        ph.select(ph.mean_keys(), 0.1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cols must be at least 1"):
        ph.select(ph.mean_keys(), ph.keep_share(0.1), cols=0)
    with pytest.raises(ConfigError, match="always must be a mask"):
        ph.select(ph.mean_keys(), ph.keep_share(0.1), always=4)  # type: ignore[arg-type]
    for wrong in (-0.1, 1.1, "half", math.nan):
        with pytest.raises(ConfigError, match="keep_share: share must be a finite number"):
            ph.keep_share(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        ph.keep_blocks(0)
    with pytest.raises(ConfigError, match="must be an integer"):
        ph.keep_blocks(1.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="for every head; got -1 to 2"):
        ph.keep_share(torch.tensor([-1.0, 2.0]))
    with pytest.raises(ShapeError, match="holds 3 numbers, but the call has 2 heads"):
        attend(*x, select=ph.select(ph.mean_keys(), ph.keep_share(torch.full((3,), 0.5))))
    with pytest.raises(ConfigError, match="stride must be at most the length of a block, 8; got 16"):
        attend(*x, select=ph.select(ph.sampled_mass(16), ph.keep_share(0.1), rows=8, cols=8))
    with pytest.raises(ConfigError, match="keys must be at most the length of a block, 8; got 9"):
        attend(*x, select=ph.select(ph.sampled_mass(4, keys=9), ph.keep_share(0.1), rows=8, cols=8))
    with pytest.raises(ConfigError, match="mean_mass: queries must be at most the length of a block, 8"):
        attend(*x, select=ph.select(ph.mean_mass(), ph.keep_share(0.1), rows=8, cols=16))
    with pytest.raises(ConfigError, match="mean_mass: keys must be at least 1"):
        ph.mean_mass(keys=0)
    with pytest.raises(ConfigError, match="sampled_mass: power"):
        ph.sampled_mass(4, power=0.5)
    with pytest.raises(ConfigError, match="sampled_mass: keys must be at least 1"):
        ph.sampled_mass(4, keys=0)
    with pytest.raises(UnknownName, match="group"):
        ph.shared(ph.mean_keys(), over="grou")  # type: ignore[arg-type]


def test_numbers_by_head_are_looked_at_as_single_ones_are() -> None:
    for make, said in (
        (
            lambda: ph.keep_blocks(torch.tensor([1.5, 2.0])),
            "blocks must be an integer for every head",
        ),
        (lambda: ph.vertical_slash(torch.tensor([2.5])), "vertical_slash: verticals must be an integer for"),
        (lambda: ph.keep_above(torch.tensor([math.nan, 1.0])), "keep_above: threshold must be finite for"),
        (
            lambda: ph.keep_above(torch.tensor([True, False])),
            r"threshold must be a number or a tensor",
        ),
        (lambda: ph.keep_above(torch.ones(1, 2)), r"threshold must be a number or a tensor"),
        (lambda: ph.keep_above("1"), "keep_above: threshold must be a finite number"),
    ):
        with pytest.raises(ConfigError, match=said):
            make()  # type: ignore[no-untyped-call]
    assert ph.keep_blocks(torch.tensor([1.0, 2.0])).blocks.tolist() == [1, 2]
    assert ph.keep_above(torch.tensor([-1, 2])).threshold.tolist() == [-1, 2]


def test_rows_do_not_share_a_budget_that_is_one_of_rows() -> None:
    with pytest.raises(ConfigError, match="KeepLastMass.* how much a single row keeps") as error:
        ph.together(ph.keep_last_mass(0.5))
    assert "budget must say how much many rows share" in str(error.value)
    for over in ("block", "call"):
        with pytest.raises(ConfigError, match=f"all heads share one budget over a {over}.*Numbers by head"):
            ph.together(ph.keep_share(torch.tensor([0.5, 0.1])), over)
        ph.together(ph.keep_share(torch.tensor([0.5])), over)
    x = tensors(1, 2, 2, 30, 30)
    three = ph.together(ph.keep_share(torch.full((3,), 0.5)))
    with pytest.raises(ShapeError, match="holds 3 numbers, but the call has 2 heads"):
        attend(*x, select=ph.select(ph.mean_keys(), three))


def test_operations_of_a_choice_are_those_that_torch_counts() -> None:
    q, k, _ = tensors(2, 4, 2, 100, 100)
    for scorer in (
        ph.mean_keys(),
        ph.key_bounds(),
        ph.sampled_mass(4),
        ph.shared(ph.key_bounds()),
        ph.mean_mass(4, 2),
    ):
        own = ph.select(scorer, ph.keep_blocks(2), rows=16, cols=8)
        probed = 2 * 2 * 4 * 10 * 100 * 16
        for selector, times, more in (
            (own, 1, 0),
            (own | own, 2, 0),
            (ph.guarded(own, probes=10), 1, probed),
        ):
            with FlopCounterMode(display=False) as counter:
                choose(selector, q, k, None, 0.25)
            grid = Grid(2, 4, 2, 100, 100, 16, 8, 0.25)
            expected = times * scorer.flops(grid, 16) + more
            assert counter.get_total_flops() == selector.flops(grid, 16) == expected > 0
