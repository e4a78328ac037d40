"""Neighbourhoods on a grid, tile by tile, equal the dense form."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import polyhead as ph
from polyhead.attend import attend
from polyhead.attend.function import explain
from polyhead.attend.grid_tiles import kinds, sizes
from polyhead.attend.masks import Mask, densify
from polyhead.errors import BackendRefused, PolyheadError

GRIDS = [
    ph.neighborhood(50, 7),
    ph.neighborhood(50, 6, stride=4),
    ph.neighborhood(53, 8, dilation=3, causal=True),
    ph.neighborhood(53, 8, dilation=4, causal=True, stride=3),
    ph.neighborhood((9, 11), (9, 11), stride=(4, 3)),
    ph.neighborhood((13, 11), (4, 3), dilation=(3, 2)),
    ph.neighborhood((12, 8), 4, stride=4),
    ph.neighborhood((7, 40), (1, 9)),
    ph.neighborhood((10, 9), (4, 5), causal=(True, False), stride=(2, 3)),
    ph.neighborhood((4, 6, 5), (3, 2, 4), dilation=(1, 2, 1), causal=(True, False, False)),
    ph.neighborhood((1, 5, 1), 1),
]
BESIDES = {
    "alone": lambda mask: mask,
    "padding": lambda mask: mask & ph.padding(torch.arange(mask.places) % 5 > torch.tensor([[0], [3]])),
    "causal": lambda mask: ph.causal() & mask,
    "heads": lambda mask: mask & ph.per_head([ph.window(n, 3 * n) for n in (0, 5, 20, 60)]),
    "nothing": lambda mask: mask & ~ph.window(12, 12),
    "two": lambda mask: mask & ph.neighborhood(mask.grid, tuple(-(-n // 2) for n in mask.grid)),
}


def operands(mask: Mask, kv_heads: int = 2, width: int = 8, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(mask.places)
    shapes = ((4, 8), (kv_heads, 8), (kv_heads, width))
    return [
        torch.randn(2, heads, mask.places, n, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for heads, n in shapes
    ]


@pytest.mark.parametrize(
    ("mask", "besides", "kv_heads", "width"),
    [
        *((mask, besides, 2, 8) for mask in GRIDS for besides in BESIDES),
        *((mask, "padding", kv_heads, width) for mask in GRIDS[3:6] for kv_heads, width in ((4, 5), (1, 11))),
    ],
    ids=lambda value: repr(value) if isinstance(value, Mask) else None,
)
def test_output_and_gradients_equal_the_dense_form(
    mask: Mask, besides: str, kv_heads: int, width: int
) -> None:
    x = operands(mask, kv_heads, width)
    whole = BESIDES[besides](mask)
    up = torch.randn(2, 4, mask.places, width, dtype=torch.float64)
    up_lse = torch.randn(2, 4, mask.places, dtype=torch.float64)
    found = []
    for backend in ("neighborhood", "reference"):
        out = attend(*x, mask=whole, backend=backend)
        again, lse = attend(*x, mask=whole, backend=backend, return_lse=True)
        both = (again * up).sum() + (lse * up_lse).masked_fill(lse.isinf(), 0.0).sum()
        found.append((out, again, lse, *torch.autograd.grad(out, x, up), *torch.autograd.grad(both, x)))
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("besides", ["alone", "padding"])
def test_pieces_of_a_tile_or_less_make_no_difference(besides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = ph.neighborhood((30, 20), (5, 3))
    x = operands(mask)
    whole = BESIDES[besides](mask)
    expected = attend(*x, mask=whole)
    wanted = torch.autograd.grad(expected.square().sum(), x)
    for size in (1, 5_000, 50_000):
        monkeypatch.setattr(import_module("polyhead.attend.backends.neighborhood"), "_BYTES", size)
        out = attend(*x, mask=whole)
        torch.testing.assert_close(out, expected)
        for own, right in zip(torch.autograd.grad(out.square().sum(), x), wanted, strict=True):
            torch.testing.assert_close(own, right)


@pytest.mark.parametrize("mask", GRIDS, ids=repr)
@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_tiles_hold_every_pair_once(mask: Mask, size: int) -> None:
    count = torch.zeros(mask.places, mask.places, dtype=torch.long)
    for kind in kinds(mask.axes(), [size] * len(mask.grid)):
        rows, cols, table = kind.queries(mask.grid), kind.keys(mask.grid), kind.table()
        grid = torch.arange(mask.places).view(mask.grid)
        for t, (box, keys) in enumerate(zip(kind.boxes("queries"), kind.boxes("keys"), strict=True)):
            assert torch.equal(grid[box].reshape(-1), rows[t])
            assert torch.equal(grid[keys].reshape(-1), cols[t])
            seen = torch.ones(len(rows[t]), len(cols[t]), dtype=torch.bool) if table is None else table
            count[rows[t][:, None], cols[t]] += seen.long()
    assert torch.equal(count, densify(mask, queries=mask.places, keys=mask.places)[0, 0].long())


def test_the_work_is_a_few_windows_for_each_query() -> None:
    for mask, most in (
        (ph.neighborhood((64, 64), 7), 4.2),
        (ph.neighborhood((64, 64), 7, dilation=8), 2.5),
        (ph.neighborhood((64, 64), 8, stride=8), 1.0),
        (ph.neighborhood((64, 64), 64), 1.0),
        (ph.neighborhood((16, 32, 32), (4, 7, 7), causal=(True, False, False)), 5.5),
    ):
        axes = tuple(mask.axes())
        looked_at = most_at_once = 0
        for kind in kinds(axes, sizes(axes, 8)):
            rows, cols = kind.queries(mask.grid), kind.keys(mask.grid)
            looked_at += rows.numel() * cols.shape[1]
            most_at_once = max(most_at_once, rows.shape[1] * cols.shape[1] * (kind.table() is not None))
        window = torch.tensor(mask.window).prod().item()
        assert looked_at <= most * mask.places * window
        assert most_at_once <= 1 << 21


def test_tiles_that_share_their_windows_need_no_table() -> None:
    mask = ph.neighborhood((24, 24, 24), 12, stride=4)
    axes = tuple(mask.axes())
    assert all(kind.table() is None for kind in kinds(axes, (4, 4, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    mask = ph.neighborhood((12, 15), (5, 7), dilation=(2, 1))
    x = operands(mask, dtype=dtype)
    out = attend(*x, mask=mask, backend="neighborhood")
    assert out.dtype == dtype
    exact = [t.detach().double().requires_grad_() for t in x]
    expected = attend(*exact, mask=mask, backend="reference")
    room = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 6e-3}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=room)
    up = torch.randn_like(out)
    own = torch.autograd.grad(out, x, up)
    for grad, right in zip(own, torch.autograd.grad(expected, exact, up.double()), strict=True):
        torch.testing.assert_close(grad.double(), right, rtol=0, atol=4 * room)


def test_it_is_one_step_of_a_compiled_graph() -> None:
    mask = ph.neighborhood((9, 8), (3, 5), dilation=(2, 1))
    real = torch.arange(72) > torch.tensor([[3], [40]])
    x = operands(mask)

    def call(q, k, v, real):
        out, lse = attend(q, k, v, mask=mask & ph.padding(real), return_lse=True)
        return out * lse.clamp(min=-9.0)[..., None]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = compiled(*x, real), call(*x, real)
    torch.testing.assert_close(*found)
    for own, right in zip(*(torch.autograd.grad(out.square().sum(), x) for out in found), strict=True):
        torch.testing.assert_close(own, right)


def test_who_runs_it() -> None:
    mask = ph.neighborhood((16, 20), 5)
    x = [torch.randn(1, 2, 320, 8) for _ in range(3)]
    assert explain(*x, mask=mask).backend == "neighborhood"
    assert explain(*x, mask=mask & ph.padding(torch.ones(1, 320, dtype=torch.bool))).backend == "neighborhood"
    for kind, said in (
        ({"mask": ph.causal()}, "is not a neighborhood"),
        ({"mask": ~mask}, "is not a neighborhood"),
        ({"mask": mask | ph.sink(4)}, "is not a neighborhood"),
        ({"mask": mask, "score": ph.alibi(2)}, "no score maps"),
        ({"mask": mask, "normalizer": ph.entmax(1.5)}, "plain softmax"),
        ({"mask": mask, "dropout": 0.5}, "no dropout"),
        ({"mask": ph.neighborhood((17, 20), 5)}, "the whole grid of 340 places; got 320 queries"),
    ):
        with pytest.raises(BackendRefused, match=said):
            attend(*x, backend="neighborhood", **kind)
        assert explain(*x, **kind).backend != "neighborhood"
    last = x[0][:, :, -7:], *x[1:]
    dense, own = (attend(*last, mask=mask, backend=name) for name in ("reference", "auto"))
    torch.testing.assert_close(own, dense)
    for part in x:
        part.requires_grad_()
    with pytest.raises(PolyheadError, match="create_graph"):
        torch.autograd.grad(attend(*x, mask=mask).sum(), x, create_graph=True)


def test_what_is_kept_of_a_call_does_not_grow_with_its_square() -> None:
    held = []
    for side in (16, 32):
        mask = ph.neighborhood((side, side), 5)
        with torch.profiler.profile(profile_memory=True) as found:
            attend(*(torch.randn(1, 2, side * side, 16) for _ in range(3)), mask=mask)
        held.append(sum(max(0, event.self_cpu_memory_usage) for event in found.events()))
    assert held[1] < 6 * held[0]
