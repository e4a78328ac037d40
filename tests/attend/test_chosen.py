"""Masks of chosen blocks, and the backend that reads those blocks alone."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend import attend
from polyhead.attend.function import explain
from polyhead.attend.masks import Chosen, Mask, densify, tile_map
from polyhead.attend.pieces import Sizes, pieces
from polyhead.errors import BackendRefused, ConfigError, PolyheadError, ShapeError


def choice(
    batch: int, heads: int, queries: int, keys: int, rows: int, cols: int, *, most: int = 4, groups: int = 0
) -> tuple[Mask, Tensor]:
    """Random blocks, some rows without any; and the pairs as a table."""
    draw = torch.Generator().manual_seed(batch + 10 * heads + queries + 7 * rows + cols)
    m, n = -(-queries // rows), -(-keys // cols)
    index = torch.full((batch, heads, m, min(n, most)), -1)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, (batch, heads, m))).tolist():
        if groups and h % (heads // groups):
            index[b, h, r] = index[b, h - 1, r]
            continue
        count = int(torch.randint(0, index.shape[3] + 1, (), generator=draw))
        index[b, h, r, :count] = torch.randperm(n, generator=draw)[:count]
    table = torch.zeros(batch, heads, m, n + 1, dtype=torch.bool)
    table.scatter_(-1, torch.where(index < 0, n, index), True)
    pairs = table[..., :-1].repeat_interleave(rows, 2)[:, :, :queries].repeat_interleave(cols, 3)[..., :keys]
    return ph.chosen(index, rows=rows, cols=cols, first=keys - queries), pairs


@pytest.mark.parametrize(("rows", "cols"), [(8, 5), (1, 4), (16, 1), (1, 1), (64, 64)])
def test_pairs_are_those_of_the_chosen_blocks(rows: int, cols: int) -> None:
    mask, pairs = choice(2, 3, 37, 53, rows, cols)
    assert torch.equal(densify(mask, batch=2, heads=3, queries=37, keys=53), pairs)
    for height, width in ((4, 4), (8, 5), (16, 10), (37, 53), (3, 7)):
        tiles = tile_map(mask, batch=2, heads=3, queries=37, keys=53, rows=height, cols=width)
        for r in range(tiles.some.shape[2]):
            for c in range(tiles.some.shape[3]):
                here = pairs[:, :, r * height : (r + 1) * height, c * width : (c + 1) * width].flatten(2)
                assert torch.equal(tiles.some[:, :, r, c], here.any(-1))
                assert torch.equal(tiles.every[:, :, r, c], here.all(-1))


def test_tiles_of_a_choice_too_large_to_count_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("polyhead.attend.masks.chosen"), "_TABLE", 10)
    mask, pairs = choice(1, 2, 37, 53, 8, 5)
    tiles = tile_map(mask, heads=2, queries=37, keys=53, rows=8, cols=5)
    assert bool(tiles.some.all())
    assert not bool(tiles.every.any())
    x = [torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (37, 53, 53)]
    torch.testing.assert_close(
        attend(*x, mask=mask, backend="tiles"), attend(*x, mask=mask, backend="reference")
    )
    assert torch.equal(densify(mask, heads=2, queries=37, keys=53), pairs)


def test_a_choice_combines_prints_and_goes_through_json() -> None:
    mask, pairs = choice(1, 2, 20, 20, 8, 5)
    both = ph.causal() & mask
    found = densify(both, heads=2, queries=20, keys=20)
    assert torch.equal(found, pairs & torch.ones(20, 20, dtype=torch.bool).tril())
    assert ph.from_json(ph.to_json(both)) == both
    assert repr(mask) == "chosen(<int64 1×2×3×4>, rows=8, cols=5)"
    assert torch.equal(densify(~mask, heads=2, queries=20, keys=20), ~pairs)


def documents(batch: int, keys: int) -> Mask:
    return ph.documents(torch.arange(keys) // 11) & ph.causal()


def padded(batch: int, keys: int) -> Mask:
    return ph.padding(torch.arange(keys) >= torch.arange(batch)[:, None] * 5) & ph.causal()


RESTS: list[Callable[[int, int], Mask | None]] = [
    lambda batch, keys: None,
    lambda batch, keys: ph.causal(),
    lambda batch, keys: ph.causal() & ph.window(9),
    padded,
    documents,
]


@pytest.mark.parametrize("rest", RESTS, ids=["all", "causal", "window", "padding", "documents"])
@pytest.mark.parametrize(("rows", "cols"), [(16, 8), (8, 16), (1, 8), (4, 4), (32, 5), (1, 1)])
@pytest.mark.parametrize("groups", [0, 2], ids=["heads", "groups"])
def test_output_and_gradients_equal_the_dense_form(
    rest: Callable[[int, int], Mask | None], rows: int, cols: int, groups: int
) -> None:
    for batch, heads, kv_heads, queries, keys in ((2, 4, 2, 37, 53), (1, 2, 2, 40, 40), (1, 4, 2, 1, 30)):
        chosen, _ = choice(batch, heads, queries, keys, rows, cols, groups=min(groups, kv_heads))
        other = rest(batch, keys)
        mask = chosen if other is None else other & chosen
        shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
        x = [
            torch.randn(batch, n, length, 8, dtype=torch.float64, requires_grad=True) for n, length in shapes
        ]
        up = torch.randn_like(x[0])
        found = []
        for backend in ("chosen", "reference"):
            out = attend(*x, mask=mask, backend=backend)
            found.append((out, *torch.autograd.grad(out, x, up)))
        for own, expected in zip(*found, strict=True):
            torch.testing.assert_close(own, expected)
        with torch.no_grad():
            own, expected = (
                attend(*x, mask=mask, backend=backend, return_lse=True) for backend in ("chosen", "reference")
            )
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("backend", ["auto", "chosen", "reference"])
@pytest.mark.parametrize("width", [0, 1])
@pytest.mark.parametrize(("rows", "cols"), [(16, 8), (1, 64), (1, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (37, 700), (1, 700)])
def test_a_choice_of_nothing_gives_zeros(
    queries: int, keys: int, rows: int, cols: int, width: int, backend: str
) -> None:
    q, k, v = (torch.randn(2, h, n, 8, requires_grad=True) for h, n in ((4, queries), (2, keys), (2, keys)))
    index = torch.full((2, 4, -(-queries // rows), width), -1)
    nothing = ph.causal() & ph.chosen(index, rows=rows, cols=cols, first=keys - queries)
    out = attend(q, k, v, mask=nothing, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    for own in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.equal(own, torch.zeros_like(own))
    with torch.no_grad():
        out, lse = attend(q, k, v, mask=nothing, backend=backend, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert lse.isneginf().all()


def test_heads_that_choose_together_may_see_different_pairs() -> None:
    """What one head of a group sees whole, in part or not at all, is no other head's."""
    for keys in (48, 53):
        chosen, _ = choice(1, 4, keys, keys, 16, 8, most=7, groups=2)
        heads = ph.per_head([ph.causal(), ph.window(3), ph.causal() & ph.sink(9), ph.window(20)])
        x = [torch.randn(1, n, keys, 8, dtype=torch.float64) for n in (4, 2, 2)]
        found = [attend(*x, mask=heads & chosen, backend=b) for b in ("chosen", "reference")]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    mask = ph.causal() & choice(1, 4, 200, 200, 16, 8)[0]
    x = [torch.randn(1, 4, 200, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    out = attend(*x, mask=mask, backend="chosen")
    assert out.dtype == dtype
    exact = [t.detach().double().requires_grad_() for t in x]
    expected = attend(*exact, mask=mask, backend="reference")
    room = {"rtol": 0, "atol": {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 6e-3}[dtype]}
    torch.testing.assert_close(out.double(), expected, **room)
    up = torch.randn_like(out)
    own = torch.autograd.grad(out, x, up)
    for grad, right in zip(own, torch.autograd.grad(expected, exact, up.double()), strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=0, atol=4 * room["atol"])


def test_every_pair_is_in_one_piece_and_no_piece_is_large() -> None:
    chosen, pairs = choice(1, 2, 600, 600, 16, 8, most=40)
    assert isinstance(chosen, Chosen)
    sizes = Sizes(1, 2, 2, 600, 600, 2**16)
    count = torch.zeros(2 * 600 + 1, 600, dtype=torch.long)
    for piece in pieces(chosen, ph.causal(), sizes, torch.float64):
        assert piece.blocks.numel() == piece.blocks.shape[1] or piece.blocks.numel() * 8 * 2**16 <= 1 << 22
        hides = [None] if piece.added is None else piece.added
        each = hides if len(hides) == len(piece.rows) else [hides[0]] * len(piece.rows)
        for rows, blocks, added in zip(piece.rows, piece.blocks, each, strict=True):
            columns = ((blocks % 75)[:, None] * 8 + torch.arange(8)).view(-1)
            seen = torch.ones(len(rows), len(columns), dtype=torch.long)
            if added is not None:
                seen = (added[0] == 0).long()
            count.index_put_((rows[:, None], columns[None]), seen, accumulate=True)
    causal = torch.ones(600, 600, dtype=torch.bool).tril()
    assert torch.equal(count[:-1].view(1, 2, 600, 600), (pairs & causal).long())


@pytest.mark.parametrize(
    ("rest", "keys", "alike"),
    [
        (ph.causal(), 512, True),
        (ph.window(40), 512, True),
        (ph.causal() & ph.sink(3), 512, False),  # what a key is counts too
        (ph.padding(torch.arange(512)[None] < 500) & ph.causal(), 512, False),
        (ph.causal(), 500, True),  # the last, short blocks have a table of their own
    ],
    ids=repr,
)
def test_groups_that_see_alike_share_one_table(rest: Mask, keys: int, alike: bool) -> None:
    near = torch.arange(8)[:, None] * 4 + torch.arange(4)  # of the last 64 queries and keys
    mask = ph.chosen(near.expand(1, 2, 8, 4), rows=64, cols=16)
    assert isinstance(mask, Chosen)
    found = list(pieces(mask, rest, Sizes(1, 2, 1, keys, keys, 64), torch.float32))
    tables = [(len(piece.rows), len(piece.added)) for piece in found if piece.added is not None]
    assert any(groups > 1 == held for groups, held in tables) == alike
    q, k, v = torch.randn(1, 2, keys, 8), torch.randn(1, 1, keys, 8), torch.randn(1, 1, keys, 8)
    x = [t.requires_grad_() for t in (q, k, v)]
    out, expected = (attend(*x, mask=mask & rest, backend=way) for way in ("chosen", "reference"))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    up = torch.randn_like(out)
    for own, right in zip(torch.autograd.grad(out, x, up), torch.autograd.grad(expected, x, up), strict=True):
        torch.testing.assert_close(own, right, rtol=0, atol=1e-4)


def test_a_choice_of_everything_goes_the_way_of_the_call_without_it() -> None:
    x = [torch.randn(1, 2, 100, 8) for _ in range(3)]
    every = ph.chosen(torch.arange(7).expand(1, 1, 7, 7), rows=16, cols=16)
    out = attend(*x, mask=ph.causal() & every)
    assert torch.equal(out, attend(*x, mask=ph.causal()))
    # of what is left out here, nothing may be seen anyway
    visible = torch.tensor([[m if m <= r else -1 for m in range(7)] for r in range(7)]).view(1, 1, 7, 7)
    assert torch.equal(attend(*x, mask=ph.causal() & ph.chosen(visible, rows=16, cols=16)), out)


def test_who_runs_it() -> None:
    x = [torch.randn(1, 2, 300, 8) for _ in range(3)]
    mask = ph.causal() & choice(1, 2, 300, 300, 16, 16)[0]
    assert explain(*x, mask=mask).backend == "chosen"
    assert explain(*x, mask=mask, score=ph.alibi(2)).backend == "tiles"
    assert "no score maps" in explain(*x, mask=mask, score=ph.alibi(2)).refused["chosen"]
    for kind, said in (
        ({"mask": ph.causal()}, "not one choice of blocks"),
        ({"mask": ~mask}, "not one choice of blocks"),
        ({"mask": mask, "normalizer": ph.entmax(1.5)}, "plain softmax"),
        ({"mask": mask, "dropout": 0.5}, "no dropout"),
    ):
        with pytest.raises(BackendRefused, match=said):
            attend(*x, backend="chosen", **kind)
    for part in x:
        part.requires_grad_()
    with pytest.raises(BackendRefused, match="gradient of the log-sum-exp"):
        attend(*x, mask=mask, backend="chosen", return_lse=True)
    with pytest.raises(PolyheadError, match="create_graph"):
        torch.autograd.grad(attend(*x, mask=mask).sum(), x, create_graph=True)


def test_what_does_not_fit_is_said() -> None:
    x = [torch.randn(2, 2, 30, 8) for _ in range(3)]
    with pytest.raises(ConfigError, match="index must be an integer tensor"):
        ph.chosen(torch.zeros(2, 2), rows=1, cols=1)
    with pytest.raises(ConfigError, match="rows must be at least 1"):
        ph.chosen(torch.zeros(1, 1, 1, 1, dtype=torch.long), rows=0, cols=1)
    index = torch.zeros(1, 1, 4, 1, dtype=torch.long)
    with pytest.raises(ShapeError, match="blocks of 16 queries"):
        attend(*x, mask=ph.chosen(index, rows=16, cols=16))
    with pytest.raises(ShapeError, match="first must be"):
        attend(*x, mask=ph.chosen(index, rows=8, cols=16, first=3))
    with pytest.raises(ShapeError, match=r"blocks 0..1 of 16 keys, or -1 for none; it holds 5..5"):
        attend(*x, mask=ph.chosen(index + 5, rows=8, cols=16))
