"""What must hold of video mixture of block attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from close import close
from mechanisms.grids import moved_by
from mechanisms.variants import broken_rules
from polyhead.attend.masks import densify
from polyhead.attend.selectors import choose
from polyhead.errors import ConfigError, ShapeError, UnknownName, UnsupportedPattern
from polyhead.mechanisms import configure
from polyhead.nn import rope

F64 = {"dtype": torch.float64}
GRID = (4, 3, 4)
FRAMES, COLUMNS, CUBES = (2, 3, 4), (4, 1, 2), (2, 3, 2)
SMALL = {"dim": 32, "heads": 4, "grid": GRID, "block": CUBES, "share": 0.4}
X = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(**options: Any) -> Any:
    torch.manual_seed(0)
    return ph.build("vmoba", **{**SMALL, **options}, **F64).eval()


def plain_of(module: Any, **options: Any) -> Any:
    plain = ph.build("grouped_query", dim=32, heads=4, kv_heads=module.kv_heads, **options, **F64)
    plain.load_state_dict(module.state_dict())
    return plain


def read_by(module: Any, x: Tensor) -> Tensor:
    found = choose(module.select(), module._queries(x, 0), module._rows(x, 0)[0], None, 8**-0.5)
    return densify(found, batch=len(x), heads=4, queries=x.shape[1], keys=x.shape[1])


@pytest.mark.parametrize(
    "options",
    [
        {"block": 4, "share": 0.4, "kv_heads": 2, "compiled": True},
        {"block": 3, "share": 0.3, "over": "query"},
        {"block": 5, "over": "block"},
        {"block": 2, "over": "call", "share": 0.5},
    ],
    ids=str,
)
def test_small_blocks_keep_the_contract(options: dict[str, Any]) -> None:
    # what is not read is not computed either, and `cost` counts all pairs
    assert not broken_rules("vmoba", without="cost", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"block": FRAMES, "kv_heads": 2},
        {"block": COLUMNS, "over": "call"},
        {"block": CUBES, "over": "query", "bias": True},
        {"block": CUBES, "over": "block", "qk_norm": True, "value_dim": 5},
        {"grid": (5, 3, 3), "block": (2, 2, 1), "kv_heads": 2},  # smaller at the border
        {"grid": (6, 8), "block": (2, 4)},
        {"grid": None, "block": 7},
    ],
    ids=str,
)
def test_a_grid_equals_the_twin(options: dict[str, Any]) -> None:
    module = built(**options)
    config = configure("vmoba", **{**SMALL, **options})
    names = ("heads", "kv_heads", "grid", "block", "share", "over")
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in names}
    x = X if config.grid != (5, 3, 3) else X[:, :45]
    real = torch.arange(x.shape[1]) < torch.tensor([[48], [29]])
    for padding in (None, real):
        wanted = ph.reference("vmoba")(x, parameters=module.state_dict(), padding=padding, **fields)
        close(module(x, padding=padding), wanted)


@pytest.mark.parametrize("block", [FRAMES, COLUMNS, CUBES], ids=str)
@pytest.mark.parametrize("over", ["head", "query", "block", "call"])
def test_all_that_is_asked_for_is_plain_attention(block: tuple[int, ...], over: str) -> None:
    module = built(block=block, over=over, share=1.0, kv_heads=2, position=rope(100.0))
    close(module(X), plain_of(module, position=rope(100.0))(X))
    one = built(block=GRID, over=over, share=0.0, kv_heads=2)
    close(one(X), plain_of(one)(X))


@pytest.mark.parametrize("block", [FRAMES, COLUMNS, CUBES], ids=str)
def test_whole_blocks_are_read_the_own_one_among_them(block: tuple[int, ...]) -> None:
    module = built(block=block, share=0.3)
    read = read_by(module, X)
    own = densify(ph.halo(GRID, block), queries=48, keys=48)[0, 0]
    assert (read | ~own).all()
    of = own.long().argmax(-1)  # the first token of a block stands for it
    assert torch.equal(read, read[..., of])
    per_query = read.sum(-1)
    assert (per_query == own.sum(-1)).any()
    assert (per_query > own.sum(-1)).any()
    close(module(X), plain_of(module)(X, mask=choose(module.select(), *_of(module, X), None, 1.0)))


def _of(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return module._queries(x, 0), module._rows(x, 0)[0]


def test_a_token_reaches_those_whose_heads_read_it() -> None:
    module = built(heads=1, head_dim=8, share=0.3)
    x = X[:1]
    found = choose(module.select(), *_of(module, x), None, 1.0)
    assert torch.equal(moved_by(module, x), densify(found, queries=48, keys=48)[0, 0])


def test_layers_in_a_row_cut_the_video_each_in_its_own_way() -> None:
    layers = [("vmoba", {"grid": GRID, "block": block, "share": 0.2}) for block in (FRAMES, COLUMNS, CUBES)]
    stack = ph.build_stack(layers, dim=32, heads=4, **F64)
    x = X.clone().requires_grad_()
    stack(x).square().mean().backward()
    assert torch.isfinite(x.grad).all()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in stack.parameters())


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        ({"select": ph.select(ph.mean_keys(), ph.keep_blocks(1))}, "select must be None in vmoba"),
        ({"mask": ph.window(3)}, "vmoba: mask must be None: what a query reads depends on"),
        ({"block": (2, 3)}, "block"),
        ({"block": (2, 3, 3)}, "a block of 3 must divide axis 2 of the grid, 4"),
        ({"share": -0.5}, "share must be"),
        ({"context_dim": 16}, "context_dim must be left out"),
    ):
        with pytest.raises(ConfigError, match=words):
            built(**options)
    with pytest.raises(UnknownName, match="over"):
        built(over="row")
    module = built()
    with pytest.raises(ShapeError, match="takes the 48 tokens of its grid; the call has 47 queries"):
        module(X[:, 1:])
    with pytest.raises(UnsupportedPattern, match="does not support a mask other than padding"):
        module(X, mask=ph.causal())
    with pytest.raises(UnsupportedPattern, match="does not support decoding with a cache"):
        module.new_cache(2)


def test_it_costs_the_parameters_of_plain_attention_and_the_scores_of_the_means() -> None:
    own, plain = built(kv_heads=2).cost(48), plain_of(built(kv_heads=2)).cost(48)
    assert own.parameters == plain.parameters
    assert own.scores - plain.scores == 2 * 4 * 48 * 4 * 8  # 48 queries by 4 means, in 4 heads 8 wide
    assert dataclasses.replace(own, scores=plain.scores) == plain
