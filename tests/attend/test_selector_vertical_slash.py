"""Columns and diagonals of the attention map, by its last rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import polyhead as ph
from attend.chosen_parts import blocks_read
from polyhead.attend.masks import Chosen, densify
from polyhead.attend.selectors import choose
from polyhead.errors import ConfigError, ShapeError

SHAPES = [
    (2, 4, 2, 64, 64, 16, 1),
    (1, 2, 1, 37, 90, 8, 16),
    (1, 2, 2, 70, 70, 16, 3),
    (1, 2, 2, 1, 70, 1, 8),
]


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int = 16) -> list[Tensor]:
    draw = torch.Generator().manual_seed(queries + keys)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, h, n, width, generator=draw, dtype=torch.float64) for h, n in sizes]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_twin(shape: tuple[int, ...]) -> None:
    *sizes, rows, cols = shape
    q, k, _ = tensors(*sizes)
    for counts in (
        {"verticals": 5, "slashes": 4, "first": 2, "nearest": 2, "probes": 9},
        {"verticals": 12, "slashes": 1, "first": 0, "nearest": 1, "probes": 64},
        {"verticals": 1, "slashes": 20, "first": 1, "nearest": 5, "probes": 1},
    ):
        own = ph.vertical_slash(**counts, rows=rows, cols=cols)
        assert torch.equal(
            blocks_read(own, q, k), ph.reference("vertical_slash")(q, k, rows=rows, cols=cols, **counts)
        )


def test_columns_and_diagonals_that_were_put_in_are_found() -> None:
    length, block = 256, 16
    weights = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        for j in (7, 101, i, i - 90):
            if 0 <= j <= i:
                weights[i, j] = 8.0
    q = weights[None, None]  # with keys as unit vectors the scores are these numbers
    k = torch.eye(length, dtype=torch.float64)[None, None]
    own = ph.vertical_slash(2, 2, first=0, nearest=1, rows=block, cols=1)
    found = choose(own, q, k, ph.causal(), 1.0)
    table = densify(found, heads=1, queries=length, keys=length)
    expected = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        start = i // block * block  # a diagonal is read as all keys that it crosses within a block of rows
        for j in range(length):
            crossed = any(0 <= j + s - start < block for s in (0, 90))
            expected[i, j] = (j in (7, 101) or crossed) and j < start + block
    assert torch.equal(table.view(length, length), expected)


def test_all_columns_or_all_diagonals_are_plain_attention() -> None:
    x = tensors(2, 4, 2, 90, 90)
    dense = ph.attend(*x, mask=ph.causal())
    for counts in ((90, 1), (1, 90), (10**6, 10**6)):
        own = ph.vertical_slash(*counts, first=0, nearest=1, rows=16, cols=4)
        torch.testing.assert_close(ph.attend(*x, mask=ph.causal(), select=own), dense)


def test_what_is_chosen_is_read_exactly() -> None:
    for *sizes, rows, cols in SHAPES:
        x = tensors(*sizes)
        own = ph.vertical_slash(6, 5, first=2, nearest=3, rows=rows, cols=cols)
        table = blocks_read(own, *x[:2]).repeat_interleave(rows, 2).repeat_interleave(cols, 3)
        table = table[:, :, : sizes[3], : sizes[4]] & densify(ph.causal(), queries=sizes[3], keys=sizes[4])
        assert table.any(-1).all()  # the own block is always read
        k, v = (t.repeat_interleave(sizes[1] // sizes[2], 1) for t in x[1:])
        weights = (x[0] @ k.mT / 4).masked_fill(~table, -math.inf).softmax(-1)
        torch.testing.assert_close(ph.attend(*x, mask=ph.causal(), select=own), weights @ v)


def test_heads_have_numbers_of_their_own() -> None:
    q, k, _ = tensors(1, 2, 2, 64, 64)
    own = ph.vertical_slash(
        torch.tensor([1, 9]), torch.tensor([7, 2]), first=0, nearest=1, rows=8, cols=1, probes=8
    )
    found = blocks_read(own, q, k)
    for head, (verticals, slashes) in enumerate([(1, 7), (9, 2)]):
        alone = ph.vertical_slash(verticals, slashes, first=0, nearest=1, rows=8, cols=1, probes=8)
        assert torch.equal(found[:, head], blocks_read(alone, q, k)[:, head])


def test_padding_is_asked_by_no_probe() -> None:
    q, k, _ = tensors(2, 2, 2, 40, 40)
    real = torch.arange(40) >= torch.tensor([[0], [16]])
    k[1, :, :16] = 100 * q[1, :, -1:]  # would draw everything
    own = ph.vertical_slash(4, 3, first=0, nearest=1, rows=8, cols=1)
    found = choose(own, q, k, ph.causal() & ph.padding(real), 0.25)
    assert isinstance(found, Chosen)
    late = choose(own, q[1:, :, 16:], k[1:, :, 16:], ph.causal(), 0.25)
    table = densify(found, batch=2, heads=2, queries=40, keys=40)[1, :, 16:, 16:]
    assert torch.equal(table, densify(late, heads=2, queries=24, keys=24)[0])


def test_it_is_a_value_and_wrong_input_is_said() -> None:
    own = ph.vertical_slash(10, torch.tensor([4, 5]))
    assert ph.from_json(ph.to_json(own)) == own
    x = tensors(1, 3, 3, 8, 8)
    with pytest.raises(ShapeError, match="slashes holds 2 numbers, but the call has 3 heads"):
        ph.attend(*x, select=own)
    with pytest.raises(ConfigError, match="vertical_slash: verticals must be a finite number at least 1"):
        ph.vertical_slash(0, 1)
    with pytest.raises(ConfigError, match="slashes must be an integer"):
        ph.vertical_slash(1, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="vertical_slash: nearest must be at least 1; got 0"):
        ph.vertical_slash(1, 1, nearest=0)
