"""Blocks of a grid, budgets that queries share, and the threshold of VMoBA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend.masks import densify
from polyhead.attend.selectors import choice, choose
from polyhead.attend.selectors.partition import Partition
from polyhead.errors import ConfigError, ShapeError, UnknownName
from polyhead.reference.vmoba import block_of, chosen_pairs

F64 = {"dtype": torch.float64}
CPU = torch.device("cpu")
# whole frames, columns through all frames, cubes; with smaller ones at the border; a picture; a line
GRIDS = [
    ((4, 6, 8), (2, 6, 8)),
    ((4, 6, 8), (4, 2, 4)),
    ((4, 6, 8), (2, 3, 4)),
    ((5, 7, 8), (2, 3, 4)),
    ((5, 6, 8), (2, 9, 8)),
    ((7, 9), (2, 3)),
    ((37,), (8,)),
]
OVER = ["query", "head", "block", "call"]


def tensors(tokens: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, tokens, 8, generator=draw, **F64) for heads in (4, 2, 2)]


def tokens_of(grid: tuple[int, ...]) -> int:
    return int(torch.tensor(grid).prod())


def table(own: Any, q: Tensor, k: Tensor, mask: ph.Mask | None = None) -> Tensor:
    """What is read, bool (B, H, L, L)."""
    found = choose(own, q, k, mask, 0.35)
    return densify(found, batch=len(q), heads=q.shape[1], queries=q.shape[2], keys=k.shape[2])


@pytest.mark.parametrize(("grid", "block"), GRIDS, ids=str)
def test_a_partition_is_what_it_says(grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    parts = Partition(grid, block)
    parts.check("here")
    own = parts.of_tokens(CPU)
    names = [block_of(t, grid, block) for t in range(len(own))]
    order = sorted(set(names))
    assert own.tolist() == [order.index(name) for name in names]
    assert parts.blocks == len(order)
    assert torch.equal(parts.of_runs(CPU).repeat_interleave(parts.run)[: len(own)], own)
    for n, (tokens, runs) in enumerate(zip(parts.tokens(CPU), parts.runs(CPU), strict=True)):
        assert tokens[tokens >= 0].tolist() == [t for t, block in enumerate(own.tolist()) if block == n]
        starts = runs[runs >= 0] * parts.run
        assert starts.tolist() == tokens[tokens >= 0][:: parts.run].tolist()


@pytest.mark.parametrize(("grid", "block"), GRIDS, ids=str)
@pytest.mark.parametrize("over", OVER)
def test_equals_its_twin(grid: tuple[int, ...], block: tuple[int, ...], over: Any) -> None:
    q, k, v = tensors(tokens_of(grid))
    own = ph.vmoba(block, grid, share=0.4, over=over)
    found = table(own, q, k)
    parts = Partition(grid, block)
    names = parts.of_tokens(CPU)
    means = torch.stack([k[:, :, names == n].mean(2) for n in range(parts.blocks)], 2)
    scores = q @ means.repeat_interleave(2, 1).mT  # B H L N
    for b in range(2):
        rows: dict[object, dict[tuple[int, int, int], float]] = {}
        for (h, t, c), score in zip(
            torch.cartesian_prod(*map(torch.arange, scores.shape[1:])).tolist(),
            scores[b].flatten().tolist(),
            strict=True,
        ):
            row = {"head": h, "query": (h, t), "block": c, "call": None}[over]
            rows.setdefault(row, {})[h, t, c] = score
        wanted = torch.zeros(4, len(names), parts.blocks, dtype=torch.bool)
        for one in rows.values():
            for pair in chosen_pairs(one, {p for p in one if names[p[1]] == p[2]}, 0.4):
                wanted[pair] = True
        assert torch.equal(found[b], wanted[:, :, names])
    torch.testing.assert_close(
        ph.attend(q, k, v, select=own), ph.attend(q, k, v, mask=choose(own, q, k, None, 0.35))
    )


@pytest.mark.parametrize(("grid", "block"), GRIDS, ids=str)
@pytest.mark.parametrize("over", OVER)
def test_more_is_read_as_the_threshold_rises_up_to_everything(
    grid: tuple[int, ...], block: tuple[int, ...], over: Any
) -> None:
    q, k, v = tensors(tokens_of(grid))
    names = Partition(grid, block).of_tokens(CPU)
    before = (names[:, None] == names).expand(2, 4, -1, -1)  # a query's own block is read in any case
    for share in (0.0, 0.2, 0.5, 0.9, 1.0, 3.0):
        found = table(ph.vmoba(block, grid, share=share, over=over), q, k)
        assert (found | ~before).all()
        before = found
    assert found.all()
    torch.testing.assert_close(
        ph.attend(q, k, v, select=ph.vmoba(block, grid, share=1.0, over=over)), ph.attend(q, k, v)
    )
    q, k, v = tensors(tokens_of(grid))
    one = ph.vmoba(max(grid), grid, share=0.0, over=over)
    torch.testing.assert_close(ph.attend(q, k, v, select=one), ph.attend(q, k, v))


def test_queries_of_a_head_read_what_others_leave_them() -> None:
    """One loud query of a head takes what it likes; the head as a whole reaches the threshold."""
    grid, block = (4, 6, 8), (2, 3, 4)
    q, k, _ = tensors(tokens_of(grid))
    q[:, 0, 5] *= 50
    parts = Partition(grid, block)
    names = parts.of_tokens(CPU)
    found = table(ph.vmoba(block, grid, share=0.25), q, k)
    blocks = torch.stack([found[..., names == n].any(-1) for n in range(parts.blocks)], -1)
    counts = blocks.sum(-1)
    assert counts.amin() == 1
    assert counts.amax() > 2 * counts.double().mean()
    means = torch.stack([k[:, :, names == n].mean(2) for n in range(parts.blocks)], 2)
    scores = q @ means.repeat_interleave(2, 1).mT
    like = (scores - scores.amin((2, 3), keepdim=True)) / (
        scores.amax((2, 3), keepdim=True) - scores.amin((2, 3), keepdim=True)
    )
    reached = (like * blocks).sum((2, 3)) / like.sum((2, 3))
    assert (reached >= 0.25).all()
    alone = table(ph.vmoba(block, grid, share=0.25, over="query"), q, k)
    assert (alone.sum(-1) > found.sum(-1)).any()


def test_without_a_grid_it_is_a_ranking_of_blocks() -> None:
    q, k, _ = tensors(37)
    for budget in (ph.keep_blocks(2), ph.keep_share(0.5), ph.together(ph.keep_share(0.4))):
        plain = ph.select(ph.key_bounds(), budget, rows=1, cols=8, always=ph.blocks(8))
        assert torch.equal(table(ph.grid_blocks(ph.key_bounds(), budget, 8), q, k), table(plain, q, k)), (
            budget
        )


def test_bands_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = tensors(63)
    for own in (ph.vmoba((2, 3), (7, 9)), ph.vmoba((2, 3), (7, 9), over="query")):
        whole = table(own, q, k)
        with monkeypatch.context() as patch:
            patch.setattr(choice, "_HELD", 1)
            assert torch.equal(table(own, q, k), whole)


def test_padding_scores_nothing_and_competes_for_nothing() -> None:
    grid, block = (4, 6), (2, 2)
    q, k, _ = tensors(24)
    real = torch.ones(2, 24, dtype=torch.bool)
    real[1, 3:9] = False
    for over in OVER:
        own = ph.vmoba(block, grid, share=0.4, over=over)
        found = table(own, q, k, ph.padding(real))
        loud_q, loud_k = (x.masked_fill(~real[:, None, :, None], 100.0) for x in (q, k))
        again = table(own, loud_q, loud_k, ph.padding(real))
        rows = real[:, None].expand(2, 4, -1)
        assert torch.equal(found[rows], again[rows])


SCORES = torch.tensor(
    [[[[0.0, 1.0, 2.0, 5.0], [9.0, 1.0, 8.0, 7.0]], [[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]]]]
)
VISIBLE = torch.ones_like(SCORES, dtype=torch.bool)
FORCED = torch.tensor([[[[True, False, False, False], [False, True, False, False]]] * 2])


def kept(budget: ph.Budget, forced: Tensor = FORCED) -> list[list[list[int]]]:
    found = budget.kept(SCORES, VISIBLE, forced)[0]
    return [[row.nonzero().view(-1).tolist() for row in head] for head in found]


def test_scores_between_zero_and_one_sum_up_to_a_share() -> None:
    # 0 .2 .4 1 of 1.6; 1 0 .875 .75 of 2.625; nothing; 0 .33 .67 1 of 2
    assert kept(ph.keep_similarity(0.0)) == [[[0, 3], [0, 1]], [[0, 3], [1, 3]]]
    assert kept(ph.keep_similarity(0.6)) == [[[0, 3], [0, 1, 2]], [[0, 3], [1, 3]]]
    assert kept(ph.keep_similarity(0.7)) == [[[0, 2, 3], [0, 1, 2]], [[0, 3], [1, 2, 3]]]
    assert kept(ph.keep_similarity(1.0)) == [[[0, 1, 2, 3]] * 2] * 2
    assert kept(ph.keep_similarity(torch.tensor([0.0, 1.0]))) == [[[0, 3], [0, 1]], [[0, 1, 2, 3]] * 2]
    none = torch.zeros_like(FORCED)
    assert kept(ph.keep_similarity(0.0), none) == [[[3], [0]], [[3], [3]]]
    hidden = ph.keep_similarity(1.0).kept(SCORES, ~VISIBLE, none)
    assert not hidden.any()
    endless = SCORES.masked_fill(SCORES == 0, -torch.inf)
    assert ph.keep_similarity(0.6).kept(endless, VISIBLE, none)[0, 0].tolist() == [
        [False, False, False, True],
        [True, False, True, False],
    ]


def test_rows_compete() -> None:
    share = ph.keep_share(0.5)
    # of the eight pairs of a head four, of the four of a block two, of all sixteen eight
    assert kept(ph.together(share)) == [[[0], [0, 1, 2]], [[0], [1, 2, 3]]]
    assert kept(ph.together(share, "block")) == [[[0, 3], [1, 2, 3]], [[0], [1, 2]]]
    assert kept(ph.together(share, "call")) == [[[0, 3], [0, 1, 2, 3]], [[0], [1]]]
    assert kept(ph.together(ph.keep_blocks(3))) == [[[0], [0, 1]], [[0], [1, 3]]]
    none = torch.zeros_like(FORCED)  # then every row has its best block
    assert kept(ph.together(ph.keep_share(0.0)), none) == [[[3], [0]], [[3], [3]]]
    own = ph.together(ph.keep_share(torch.tensor([0.25, 1.0])))
    assert kept(own) == [[[0], [1]], [[0, 1, 2, 3]] * 2]


def test_what_is_wrong_is_said() -> None:
    for make, words in (
        (lambda: ph.together(3), "together: budget must be one of single rows"),  # type: ignore[arg-type]
        (lambda: ph.together(ph.together(ph.keep_share(0.1))), "together: budget must be one of single rows"),
        (lambda: ph.keep_similarity(-0.1), "keep_similarity: share must be"),
        (lambda: ph.grid_blocks(3, ph.keep_blocks(1), 4), "grid_blocks: scorer must be one"),  # type: ignore[arg-type]
        (lambda: ph.grid_blocks(ph.mean_keys(), 3, 4), "grid_blocks: budget must be one"),  # type: ignore[arg-type]
        (lambda: ph.vmoba((2, 2), (4, 4, 4)), "block"),
        (lambda: ph.vmoba(0), "block"),
        (lambda: ph.vmoba(2, (4, 4, 4, 4)), "grid must have 1 to 3 axes"),
        (lambda: ph.vmoba((2, 3, 3), (4, 6, 8)), "a block of 3 must divide axis 2 of the grid, 8"),
    ):
        with pytest.raises(ConfigError, match=words):
            make()
    for make in (
        lambda: ph.together(ph.keep_share(0.1), "all"),  # type: ignore[arg-type]
        lambda: ph.vmoba(4, over="row"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UnknownName, match="over"):
            make()
    q, k, v = tensors(24)
    with pytest.raises(ShapeError, match="takes the 25 tokens of its grid; the call has 24 queries"):
        ph.attend(q, k, v, select=ph.vmoba(1, (5, 5)))
    with pytest.raises(ShapeError, match="takes as many queries as keys; the call has 3 queries and 24 keys"):
        ph.attend(q[:, :, :3], k, v, select=ph.vmoba(4))
    three = ph.together(ph.keep_similarity(torch.tensor([0.1, 0.2, 0.3])))
    with pytest.raises(ShapeError, match="holds 3 numbers, but the call has 4 heads"):
        ph.attend(q, k, v, select=ph.grid_blocks(ph.mean_keys(), three, 4))
