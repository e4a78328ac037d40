"""What must hold of multi-axis attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import polyhead as ph
from close import close
from mechanisms.grids import moved_by
from mechanisms.variants import broken_rules
from polyhead.attend.masks import densify
from polyhead.errors import ConfigError, ShapeError, UnknownName, UnsupportedPattern
from polyhead.mechanisms import configure

F64 = {"dtype": torch.float64}
GRID = (6, 8)
X = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "multi_axis_attention", **options: Any) -> Any:
    torch.manual_seed(0)
    own = {"grid": GRID, "window": 2} if name == "multi_axis_attention" else {}
    return ph.build(name, **{"dim": 32, "heads": 4, **own, **options}, **F64).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3, "compiled": True},
        {"window": 2, "spread": 5, "kv_heads": 2},
        {"window": 4, "axis": "grid"},
    ],
    ids=str,
)
def test_small_windows_keep_the_contract(options: dict[str, Any]) -> None:
    assert not broken_rules("multi_axis_attention", **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 4, "spread": 3, "kv_heads": 2},
        {"axis": "block", "window": 5},
        {"axis": "grid", "spread": 4, "bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [None, ph.causal(), ph.window(9, 4)], ids=repr)
def test_a_grid_equals_the_twin(options: dict[str, Any], mask: ph.Mask | None) -> None:
    module = built(**options)
    config = configure(
        "multi_axis_attention", **{"dim": 32, "heads": 4, "grid": GRID, "window": 2, **options}
    )
    names = ("heads", "kv_heads", "grid", "window", "spread", "axis")
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in names}
    real = torch.arange(48) < torch.tensor([[48], [30]])
    dense = None if mask is None else densify(mask, queries=48, keys=48)
    for padding in (None, real):
        wanted = ph.reference("multi_axis_attention")(
            X, parameters=module.state_dict(), mask=dense, padding=padding, **fields
        )
        rows = slice(None) if padding is None else padding
        close(module(X, mask=mask, padding=padding)[rows], wanted[rows])


def test_partitions_hold_every_place_once() -> None:
    for name in ("block", "grid"):
        config = configure("multi_axis_attention", dim=8, heads=1, grid=GRID, window=2, axis=name)
        seen = densify(config.pattern(), queries=48, keys=48)[0, 0]  # type: ignore[attr-defined]
        assert torch.equal(seen, seen.T)
        assert torch.equal(seen.double() @ seen.double() > 0, seen)  # whoever sees one sees all that it sees
        assert seen.sum(1).tolist() == [4] * 48


def test_a_window_as_large_as_the_grid_is_full_attention() -> None:
    for axis in ("block", "grid", "both"):
        module = built(axis=axis, window=8, spread=8)
        plain = built("mha")
        state = module.state_dict()
        torch.nn.init.zeros_(state["score.tensor0"])
        plain.load_state_dict({name: part for name, part in state.items() if name != "score.tensor0"})
        close(module(X), plain(X))


def test_one_place_sees_itself_alone() -> None:
    assert torch.equal(moved_by(built(axis="grid", spread=1), X[:1]), torch.eye(48, dtype=torch.bool))


@pytest.mark.parametrize("axis", ["block", "grid"])
def test_an_output_depends_on_its_own_part(axis: str) -> None:
    """Of 6 × 8 places: blocks of 2 × 2, and lattices of 2 × 2 whose places are 3 rows and 4 columns apart."""
    moved = moved_by(built(axis=axis), X[:1])
    for i in range(48):
        for j in range(48):
            (y, x), (v, u) = divmod(i, 8), divmod(j, 8)
            alike = (
                (y // 2, x // 2) == (v // 2, u // 2) if axis == "block" else (y % 3, x % 4) == (v % 3, u % 4)
            )
            assert moved[i, j] == alike


@pytest.mark.parametrize("layers", [1, 2])
def test_block_and_then_grid_reach_everything(layers: int) -> None:
    """Where a lattice's step is at most a block's length; and both at once do so in two layers."""
    maxvit = ["block", "grid"][:layers]
    stack = ph.nn.AttentionStack([built(axis=axis, spread=4) for axis in maxvit], 32, mlp=32).double()
    assert bool(moved_by(stack, X[:1]).all()) == (layers == 2)
    both = ph.nn.AttentionStack([built(spread=4) for _ in range(layers)], 32, mlp=32).double()
    assert bool(moved_by(both, X[:1]).all()) == (layers == 2)


def test_the_bias_goes_by_offsets() -> None:
    """A bias for one offset to the right: in blocks one place away, on lattices four."""
    for axis, step in (("block", 1), ("grid", 4)):
        module = built(axis=axis)
        with torch.no_grad():
            module.projection.query.weight.zero_()
            table = module.score.tensor0.zero_().view(4, 3, 3)
            table[:, 1, 2] = 30.0  # the same row, one further on
            weights = module._weights(
                module._queries(X, 0), module._rows(X, 0), mask=module.mask(), score=module.score()
            )
        at = 8 * 2 + 0
        assert weights[0, :, at, at + step].min() > 1 - 1e-10


def test_it_reads_no_more_than_it_must() -> None:
    """Heads go apart, and each part as a batch of small calls."""
    module = built(grid=(20, 20), window=4)
    x = torch.randn(1, 400, 32, **F64)
    q, (k, v) = module._queries(x, 0), module._rows(x, 0)
    plan = ph.explain(q, k, v, mask=module.mask(), score=module.score())
    assert plan.backend == "by_head"
    alone = built(grid=(20, 20), window=4, axis="grid")
    assert ph.explain(q, k, v, mask=alone.mask(), score=alone.score()).backend == "grouped"


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        ({"axis": "blocks"}, "no axis of multi_axis_attention is called 'blocks'"),
        ({"window": 0}, "window must be at least 1; got 0"),
        ({"grid": 4}, r"grid must be \(height, width\)"),
        ({"heads": 1}, "heads must be at least 2, so that some take blocks"),
    ):
        with pytest.raises((ConfigError, UnknownName), match=words):
            built(**options)
    with pytest.raises(ShapeError, match="the grid 6×8 has 48 places but the call has 50 keys"):
        built()(torch.randn(1, 50, 32, **F64))
    with pytest.raises(UnsupportedPattern, match="multi_axis_attention .* does not support a context"):
        built().new_context_cache(X)
