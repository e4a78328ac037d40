"""Queries in groups that see the same keys: the dense answer and gradients; biases within windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import polyhead as ph
from attend.operands import results
from polyhead.attend.backends import grouped
from polyhead.attend.masks import densify
from polyhead.attend.scores import window_bias
from polyhead.errors import ConfigError, ShapeError

LENGTH, GRID = 130, (10, 13)


@pytest.fixture(autouse=True)
def _calls_are_grouped_however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_PAIRS", 0)


CAUSAL = ph.causal()
MASKS = [
    ph.blocks(16),
    ph.blocks(16, 5),
    ph.halo(None, 9, 4),
    ph.halo(GRID, 4),
    ph.halo(GRID, (4, 3), (2, 1)),
    ph.halo((10, 14), 3, 1),  # the call does not fill the grid
    ph.halo(GRID, 1, 2),
    ph.halo((5, 2, 13), 2, (1, 0, 1)),
    ph.lattice(None, 7),
    ph.lattice(GRID, (3, 4)),
    ph.lattice((10, 14), 4),
]
REAL = torch.arange(LENGTH) < torch.tensor([[LENGTH], [70]])


def tensors(kv_heads: int = 2, value_width: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, LENGTH, 8), (kv_heads, LENGTH, 8), (kv_heads, LENGTH, value_width))
    return [
        torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def agree(given: list[Tensor], **call: object) -> None:
    wanted = results("reference", given, **call)
    for a, b in zip(results("grouped", given, **call), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_equals_the_dense_form(mask: ph.Mask) -> None:
    agree(tensors(), mask=mask)
    agree(tensors(4, 5), mask=CAUSAL & mask & ph.padding(REAL))


def test_what_differs_by_head_besides() -> None:
    agree(tensors(1), mask=ph.per_head([ph.window(9), CAUSAL, ph.sink(3), ph.sink(0)]) & ph.halo(GRID, 3, 1))


@pytest.mark.parametrize(
    "mask", [ph.blocks(16, 5), ph.halo(GRID, 4), CAUSAL & ph.lattice(GRID, (3, 4))], ids=repr
)
def test_biases_by_place(mask: ph.Mask) -> None:
    tables = [torch.randn(n, dtype=torch.float64).requires_grad_() for n in (7 * 7 + 5 * 9 + 3, 36)]
    own = window_bias(tables[0], [(4, 4), (), (3, 5), (1, 2)], [(1, 1), (), (3, 4), (1, 1)], GRID)
    score = (own, ph.relative_bias(tables[1].view(4, 9)), ph.alibi(4))
    agree([*tensors(), *tables], mask=mask, score=score)


def test_heads_with_windows_and_biases_of_their_own() -> None:
    """Through `by_head`: every run of heads has its share of the table."""
    table = torch.randn(15 + 15 + 9, dtype=torch.float64).requires_grad_()
    score = window_bias(table, [(8,), (8,), (), (5,)])
    mask = ph.per_head([ph.blocks(8), ph.blocks(8), ph.window(None, None), ph.blocks(5)])
    given = [*(x[:, :, :].repeat(1, 1, 3, 1).detach().requires_grad_() for x in tensors()), table]
    assert ph.explain(*given[:3], mask=mask, score=score).backend == "by_head"
    found, wanted = (results(backend, given, mask=mask, score=score) for backend in ("auto", "reference"))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_bias_is_its_definition() -> None:
    """Of a 3 × 4 grid: one head with windows of 2 × 3, one whose lattice has a step of 2 on either axis."""
    table = torch.arange(3 * 5 + 3 * 3, dtype=torch.float64)
    score = window_bias(table, [(2, 3), (2, 2)], [(1, 1), (2, 2)], (3, 4))
    q = torch.zeros(1, 2, 12, 4, dtype=torch.float64)
    seen = ph.per_head([ph.halo((3, 4), (2, 3)), ph.lattice((3, 4), 2)])
    logits = densify(seen, heads=2, queries=12, keys=12)[0].double().log()
    for i in range(12):
        for j in range(12):
            dy, dx = j // 4 - i // 4, j % 4 - i % 4
            if abs(dy) < 2 and abs(dx) < 3:
                logits[0, i, j] += table[(dy + 1) * 5 + dx + 2]
            if dy % 2 == dx % 2 == 0:
                logits[1, i, j] += table[15 + (dy // 2 + 1) * 3 + dx // 2 + 1]
    v = torch.randn(1, 2, 12, 4, dtype=torch.float64)
    for backend in ("reference", "tiles"):
        out = ph.attend(q, q, v, mask=seen, score=score, backend=backend)
        torch.testing.assert_close(out, logits.softmax(-1) @ v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    given = [x.detach() for x in tensors(dtype=dtype)]
    for score in (None, ph.alibi(4)):
        found = ph.attend(*given, mask=MASKS[3], score=score, backend="grouped")
        wanted = ph.attend(*(x.double() for x in given), mask=MASKS[3], score=score, backend="reference")
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2)


def test_when_it_runs() -> None:
    q, k, v = (x.repeat(1, 1, 3, 1) for x in tensors())
    assert ph.explain(q, k, v, mask=CAUSAL & ph.blocks(16)).backend == "grouped"
    for call, words in (
        ({"mask": CAUSAL}, "does not part queries in groups"),
        ({"mask": ph.blocks(16, torch.tensor([1, 2]))}, "does not part queries in groups"),
        ({"mask": ph.halo(None, 200)}, "save too little"),
        ({"mask": ph.blocks(16), "score": ph.soft_cap(3.0)}, "it has biases by place alone"),
        ({"mask": ph.blocks(16), "normalizer": ph.entmax(1.5)}, "it normalises by plain softmax"),
        ({"mask": ph.blocks(16), "dropout": 0.1}, "it has no dropout"),
        ({"mask": ph.blocks(16), "return_lse": True}, "it does not return the log-sum-exp"),
    ):
        assert words in ph.explain(q, k, v, **call).refused["grouped"]  # type: ignore[arg-type]
    later = ph.explain(q[:, :, 1:], k, v, mask=ph.blocks(16))
    assert "it takes whole sequences" in later.refused["grouped"]


def test_wrong_biases_are_named() -> None:
    for make, words in (
        (lambda: window_bias(torch.zeros(4), [(3,)]), r"table must be a floating-point tensor \(5,\)"),
        (lambda: window_bias(torch.zeros(5), [(3, 3)]), "windows must have 1 numbers for every head"),
        (lambda: window_bias(torch.zeros(5), [(3,)], [()]), "of the same heads"),
        (lambda: window_bias(torch.zeros(5), [(3,)], grid=3), r"grid must be \(height, width\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            make()
    q, k, v = tensors()
    with pytest.raises(ShapeError, match="holds the windows of 1 heads, but the call has 4"):
        ph.attend(q, k, v, score=window_bias(torch.zeros(5), [(3,)]), backend="reference")
