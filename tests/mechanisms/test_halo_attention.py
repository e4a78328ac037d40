"""What must hold of HaloNet's attention."""

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
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.mechanisms import configure

F64 = {"dtype": torch.float64}
GRID = (6, 8)
X = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(**options: Any) -> Any:
    torch.manual_seed(0)
    own = {"dim": 32, "heads": 4, "grid": GRID, "block": 2, "halo": 1}
    return ph.build("halo_attention", **{**own, **options}, **F64).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"block": 3, "halo": 2, "compiled": True},
        {"block": 1, "halo": 4, "kv_heads": 2},
        {"block": 4, "halo": 0},
    ],
    ids=str,
)
def test_small_blocks_keep_the_contract(options: dict[str, Any]) -> None:
    assert not broken_rules("halo_attention", **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block": 4, "halo": 3, "kv_heads": 2},
        {"block": 5, "halo": 0, "bias": True},
        {"block": 1, "halo": 2, "qk_norm": True},
        {"block": 8, "halo": 0},
        {"grid": (7, 7), "block": 3, "halo": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [None, ph.causal()], ids=repr)
def test_a_grid_equals_the_twin(options: dict[str, Any], mask: ph.Mask | None) -> None:
    module = built(**options)
    config = configure(
        "halo_attention", **{"dim": 32, "heads": 4, "grid": GRID, "block": 2, "halo": 1, **options}
    )
    names = ("heads", "kv_heads", "grid", "block", "halo")
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in names}
    real = torch.arange(48) < torch.tensor([[48], [30]])
    dense = None if mask is None else densify(mask, queries=48, keys=48)
    for padding in (None, real):
        wanted = ph.reference("halo_attention")(
            X, parameters=module.state_dict(), mask=dense, padding=padding, **fields
        )
        rows = slice(None) if padding is None else padding
        close(module(X, mask=mask, padding=padding)[rows], wanted[rows])


def plain_of(module: Any, mask: ph.Mask | None) -> Any:
    plain = ph.build("mha", dim=32, heads=4, mask=mask, **F64)
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if not n.startswith("offsets")})
    for table in module.offsets:
        torch.nn.init.zeros_(table)
    return plain


def test_without_offsets_it_is_attention_under_its_mask() -> None:
    for options, mask in (
        ({"block": 8, "halo": 0}, None),
        ({"halo": 0}, ph.neighborhood(GRID, 2, stride=2)),
        ({"grid": None, "block": 1, "halo": 3}, ph.window(3, 3)),
    ):
        module = built(**options)  # type: ignore[arg-type]
        plain = plain_of(module, mask)
        close(module(X), plain(X))


def test_blocks_of_one_are_a_window_around_every_place() -> None:
    """SASA: (2h + 1)² places, those beyond the border missing."""
    moved = moved_by(built(block=1, halo=2), X[:1])
    for i in range(48):
        for j in range(48):
            (y, x), (v, u) = divmod(i, 8), divmod(j, 8)
            assert moved[i, j] == (abs(y - v) <= 2 and abs(x - u) <= 2)


def test_the_halo_crosses_borders_of_blocks() -> None:
    inside, around = moved_by(built(halo=0), X[:1]), moved_by(built(), X[:1])
    left, right = 8 * 2 + 3, 8 * 2 + 4  # on both sides of a border
    assert not inside[left, right]
    assert around[left, right]
    assert around[right, left]
    assert not around[left, right + 1]


@pytest.mark.parametrize("by", [1, 2, 4])
def test_it_moves_with_the_picture_by_blocks(by: int) -> None:
    """What stands far enough from the border, and not by one place where blocks have two."""
    module = built(grid=(8, 12), block=2, halo=1)
    picture = torch.randn(1, 8, 12, 32, generator=torch.Generator().manual_seed(1), **F64)
    out, moved = (
        module(x.reshape(1, 96, 32)).view(1, 8, 12, 32) for x in (picture, picture.roll(by, dims=2))
    )
    gap = (out.roll(by, dims=2) - moved)[:, :, 6:10].abs().max()
    assert gap <= 1e-12 if by % 2 == 0 else gap > 1e-3


def test_only_offsets_that_occur_have_a_part() -> None:
    module = built(block=2, halo=1, grid=(8, 8))
    x = torch.randn(1, 64, 32, **F64)
    grads = torch.autograd.grad(module(x).sin().sum(), list(module.offsets))
    assert [tuple(g.shape) for g in grads] == [(5, 8), (5, 8)]  # offsets -2 to 2 on each axis
    assert all(bool((g.abs().sum(1) > 0).all()) for g in grads)


def test_it_reads_no_more_than_it_must() -> None:
    module = built(grid=(20, 20), block=4, halo=2)
    x = torch.randn(1, 400, 32, **F64)
    q, (k, v) = module._queries(x, 0), module._rows(x, 0)
    plan = ph.explain(
        module._wide_queries(q, 0), module._wide_keys(k, torch.arange(400)), v, mask=module.mask()
    )
    assert plan.backend == "grouped"


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        ({"block": 0}, "block must be at least 1; got 0"),
        ({"halo": -1}, "halo must be at least 0; got -1"),
        ({"grid": (4, 4, 4)}, r"grid must be \(height, width\)"),
        ({"select": ph.select(ph.mean_keys(), ph.keep_blocks(1))}, "select must be None in HaloAttention"),
    ):
        with pytest.raises(ConfigError, match=words):
            built(**options)
    with pytest.raises(UnsupportedPattern, match="halo_attention .* does not support a context"):
        built()(X, X)
