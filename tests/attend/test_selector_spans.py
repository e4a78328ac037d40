"""A span of its own for every head, which grows with the length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend.masks import Chosen, densify
from polyhead.attend.selectors import Selector, choose
from polyhead.errors import ConfigError, ShapeError

ALPHA, BETA = [0.0, -20.0, 24.0, 7.5], [1.0, 0.75, 0.0, 0.2]
# queries, keys, rows, cols
SHAPES = [(64, 64, 16, 16), (90, 90, 16, 16), (37, 90, 8, 16), (70, 70, 16, 3), (1, 70, 1, 8), (50, 61, 1, 8)]


def tensors(queries: int, keys: int, heads: int = 4) -> list[Tensor]:
    draw = torch.Generator().manual_seed(queries + keys)
    sizes = ((heads, queries), (2, keys), (2, keys))
    return [torch.randn(2, h, n, 8, generator=draw, dtype=torch.float64) for h, n in sizes]


def table(selector: Selector, queries: int, keys: int, heads: int = 4) -> Tensor:
    """Which blocks are read: bool (H, M, N)."""
    q, k, _ = tensors(queries, keys, heads)
    found = choose(selector, q, k, ph.causal(), 1.0)
    assert isinstance(found, Chosen)
    blocks = -(-keys // selector.cols)
    read = torch.zeros(*found.index.shape[:3], blocks + 1, dtype=torch.bool)
    read = read.scatter_(-1, found.index.masked_fill(found.index < 0, blocks), True)[..., :-1]
    assert torch.equal(read[0], read[1])
    return read[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first", [0, 1, 20])
def test_equals_its_twin(shape: tuple[int, ...], first: int) -> None:
    queries, keys, rows, cols = shape
    own = ph.spans(torch.tensor(ALPHA), torch.tensor(BETA), first=first, rows=rows, cols=cols)
    twin = ph.reference("spans")(queries, keys, alpha=ALPHA, beta=BETA, first=first, rows=rows, cols=cols)
    assert torch.equal(table(own, queries, keys), twin)


def test_all_of_the_length_is_plain_attention() -> None:
    for queries, keys, rows, cols in SHAPES:
        x = tensors(queries, keys)
        own = ph.spans(0.0, 1.0, first=1, rows=rows, cols=cols)
        torch.testing.assert_close(
            ph.attend(*x, mask=ph.causal(), select=own), ph.attend(*x, mask=ph.causal())
        )


def test_spans_that_do_not_grow_are_a_window_with_sinks() -> None:
    own = ph.spans(24.0, first=4, rows=1, cols=1)
    q, k, _ = tensors(90, 90)
    found = densify(choose(own, q, k, ph.causal(), 1.0) & ph.causal(), batch=2, heads=4, queries=90, keys=90)
    mask = densify(ph.causal() & (ph.sink(4) | ph.window(23)), queries=90, keys=90)
    assert torch.equal(found, mask.expand_as(found))
    # by blocks it is that of MInference, whose window counts tokens back from the query's own
    blocks = ph.spans(32.0, first=16, rows=16, cols=16)
    assert torch.equal(table(blocks, 96, 96), table(ph.a_shape(16, 17, rows=16, cols=16), 96, 96))


def test_a_span_grows_with_the_length_unless_it_is_fixed() -> None:
    own = ph.spans(0.0, 0.5, first=0, rows=16, cols=16)
    assert [int(table(own, n, n)[0, -1].sum()) for n in (32, 64, 128)] == [1, 2, 4]
    fixed = ph.spans(0.0, 0.5, first=0, rows=16, cols=16, length=64)
    assert [int(table(fixed, n, n)[0, -1].sum()) for n in (32, 64, 128)] == [2, 2, 2]


def test_steps_read_as_the_whole_call_where_the_length_is_fixed() -> None:
    q, k, v = tensors(60, 60)
    own = ph.spans(torch.tensor(ALPHA), torch.tensor(BETA), first=4, rows=1, cols=8, length=40)
    whole = ph.attend(q, k, v, mask=ph.causal(), select=own)
    for stop in range(40, 61):
        step = ph.attend(
            q[:, :, stop - 1 : stop], k[:, :, :stop], v[:, :, :stop], mask=ph.causal(), select=own
        )
        torch.testing.assert_close(step, whole[:, :, stop - 1 : stop])


def test_heads_have_spans_of_their_own() -> None:
    own = ph.spans(torch.tensor(ALPHA), torch.tensor(BETA), first=16, rows=16, cols=16)
    found = table(own, 90, 90)
    for head, (alpha, beta) in enumerate(zip(ALPHA, BETA, strict=True)):
        alone = ph.spans(alpha, beta, first=16, rows=16, cols=16)
        assert torch.equal(found[head], table(alone, 90, 90)[head])


def test_it_is_a_value_and_wrong_input_is_said() -> None:
    own = ph.spans(torch.tensor(ALPHA), 0.5, length=8)
    assert ph.from_json(ph.to_json(own)) == own
    with pytest.raises(ShapeError, match="spans: alpha holds 4 numbers, but the call has 3 heads"):
        ph.attend(*(x[:, :1].expand(-1, 3, -1, -1) for x in tensors(8, 8)), select=own)
    with pytest.raises(ConfigError, match="spans: beta must be a finite number, got 'far'"):
        ph.spans(1.0, "far")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"spans: alpha must be finite for every head; got \[nan\]"):
        ph.spans(torch.tensor([float("nan")]))
    with pytest.raises(ConfigError, match="spans: first must be at least 0; got -1"):
        ph.spans(1.0, first=-1)
    with pytest.raises(ConfigError, match="spans: length must be at least 1; got 0"):
        ph.spans(1.0, length=0)
