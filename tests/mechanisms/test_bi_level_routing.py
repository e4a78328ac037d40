"""What must hold of bi-level routing attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import polyhead as ph
from close import close
from mechanisms.grids import moved_by
from mechanisms.variants import broken_rules
from polyhead.attend.masks import Chosen, densify
from polyhead.attend.selectors import choose
from polyhead.errors import PolyheadError, ShapeError, UnsupportedPattern
from polyhead.mechanisms import configure
from polyhead.nn import rope

F64 = {"dtype": torch.float64}
GRID = (6, 8)
SMALL = {"dim": 32, "heads": 4, "grid": GRID, "region": 2, "top_k": 3}
X = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(**options: Any) -> Any:
    torch.manual_seed(0)
    return ph.build("bi_level_routing", **{**SMALL, **options}, **F64).eval()


def plain_of(module: Any, **options: Any) -> Any:
    plain = ph.build("mha", dim=32, heads=4, **options, **F64)
    plain.load_state_dict(module.state_dict())
    return plain


def region_of(grid: tuple[int, int], side: int) -> Tensor:
    """The region of every token."""
    y, x = torch.arange(grid[0])[:, None] // side, torch.arange(grid[1]) // side
    return (y * -(-grid[1] // side) + x).view(-1)


def choice(module: Any, x: Tensor, mask: ph.Mask | None = None) -> Chosen:
    found = choose(module.select(), module._queries(x, 0), module._rows(x, 0)[0], mask, 1.0)
    assert isinstance(found, Chosen)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"region": 3, "top_k": 2, "kv_heads": 2, "compiled": True},
        {"region": 1, "top_k": 4, "kernel": 1},
        {"region": 4, "top_k": 1, "kernel": 0, "scale_by": "head_dim"},
    ],
    ids=str,
)
def test_small_regions_keep_the_contract(options: dict[str, Any]) -> None:
    # what is not read is not computed either, and `cost` counts all pairs
    assert not broken_rules("bi_level_routing", without="cost", **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"region": 4, "top_k": 2, "kv_heads": 2, "kernel": 3},
        {"top_k": 1, "bias": True, "kernel": 7},
        {"region": 1, "top_k": 5, "qk_norm": True},
        {"kernel": 0, "scale_by": "head_dim", "value_dim": 5},
        {"grid": (16, 3), "region": 3},  # the last regions have one row of three
        {"grid": None, "region": 5},
    ],
    ids=str,
)
def test_a_grid_equals_the_twin(options: dict[str, Any]) -> None:
    module = built(**options)
    config = configure("bi_level_routing", **{**SMALL, **options})
    names = ("heads", "kv_heads", "grid", "region", "top_k", "kernel", "scale_by")
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in names}
    real = torch.arange(48) < torch.tensor([[48], [29]])
    for padding in (None, real):
        wanted = ph.reference("bi_level_routing")(
            X, parameters=module.state_dict(), padding=padding, **fields
        )
        close(module(X, padding=padding), wanted)


@pytest.mark.parametrize("kernel", [0, 3])
def test_padding_on_the_right_is_as_if_it_were_cut_off(kernel: int) -> None:
    module = built(grid=None, region=5, bias=True, kernel=kernel)
    with torch.no_grad():
        module.projection.value.bias.fill_(3.0)  # what a value at padding would be
    real = torch.arange(48) < torch.tensor([[48], [29]])
    found = module(X, padding=real)
    close(found[:1], module(X[:1]))
    close(found[1:, :29], module(X[1:, :29]))


@pytest.mark.parametrize(
    "options", [{"top_k": 12}, {"top_k": 99}, {"grid": (6, 8), "region": 8, "top_k": 1}], ids=str
)
def test_all_regions_are_plain_attention(options: dict[str, Any]) -> None:
    module = built(kernel=0, scale_by="head_dim", position=rope(100.0), **options)
    close(module(X), plain_of(module, position=rope(100.0))(X))
    module.scale = (4 * 8) ** -0.5
    close(built(kernel=0, position=rope(100.0), **options)(X), module(X))


@pytest.mark.parametrize(("grid", "side"), [((6, 8), 2), ((12, 4), 4), ((5, 6), 2), ((3, 10), 1)], ids=str)
def test_a_region_reads_distinct_whole_regions(grid: tuple[int, int], side: int) -> None:
    module = built(grid=grid, region=side, top_k=3)
    length = grid[0] * grid[1]
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1), **F64)
    read = densify(choice(module, x), batch=2, heads=4, queries=length, keys=length)
    own = region_of(grid, side)
    of_region = F.one_hot(own).to(torch.int64)
    taken = read.to(torch.int64) @ of_region  # B H L regions
    sizes = of_region.sum(0)
    assert bool(((taken == 0) | (taken == sizes)).all())
    assert bool(((taken > 0).sum(-1) == 3).all())
    assert torch.equal(read, read[:, :1].expand_as(read))  # heads read the same
    for region in range(len(sizes)):
        rows = read[:, 0, own == region]
        assert torch.equal(rows, rows[:, :1].expand_as(rows))


def test_it_is_the_regions_with_the_best_means_that_are_read() -> None:
    module = built(kv_heads=2)
    q, k = module._queries(X, 0), module._rows(X, 0)[0].repeat_interleave(2, 1)
    own = F.one_hot(region_of(GRID, 2)).to(torch.float64) / 4
    q, k = (torch.einsum("bhld,lr->brhd", z, own).flatten(2) for z in (q, k))
    best = torch.zeros(2, 12, 12, dtype=torch.bool).scatter_(-1, (q @ k.mT).topk(3).indices, True)
    at = region_of(GRID, 2)
    read = densify(choice(module, X), batch=2, heads=4, queries=48, keys=48)
    assert torch.equal(read[:, 0], best[:, at][:, :, at])


def test_the_order_of_a_choice_does_not_matter() -> None:
    module = built(kernel=0)
    found = choice(module, X)
    turned = ph.chosen(found.index.flip(-1), rows=2, cols=2)
    plain = plain_of(module)
    plain.scale = module.scale
    close(plain(X, mask=turned), module(X))


def test_regions_that_change_places_take_their_outputs_along() -> None:
    moved = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    tokens = torch.stack([(region_of(GRID, 2) == r).nonzero().view(-1) for r in range(12)])
    order = torch.empty(48, dtype=torch.int64)
    order[tokens.view(-1)] = tokens[moved].view(-1)
    for kernel, same in ((0, True), (3, False)):
        module = built(kernel=kernel)
        gap = (module(X[:, order]) - module(X)[:, order]).abs().max()
        assert gap <= 1e-12 if same else gap > 1e-3


def test_values_are_convolved_over_the_grid() -> None:
    module, plain = built(), built(kernel=0)
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if not n.startswith("local")})
    values = module.projection.value(X).mT.unflatten(-1, GRID)
    near = F.conv2d(F.pad(values, (2, 2, 2, 2)), module.local.weight, module.local.bias, groups=32)
    close(module(X) - plain(X), near.flatten(2).mT @ module.output.weight.T)


def test_a_far_region_is_found_by_its_content() -> None:
    """One token far away that is like the query's region, in one picture of two."""
    module = built(grid=(8, 8), region=2, top_k=1, kernel=0, heads=1, scale_by="head_dim")
    with torch.no_grad():
        for part in (module.projection.query, module.projection.key):
            part.weight.copy_(torch.eye(32))
    x = 0.01 * torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(2), **F64)
    x[:, 0, 0] = 1.0
    x[0, 63, 0] = x[1, 7, 0] = 9.0
    moved = [moved_by(module, item[None])[0] for item in x]
    for seen, corner in zip(moved, (63, 7), strict=True):
        wanted = region_of((8, 8), 2) == region_of((8, 8), 2)[corner]
        wanted[0] = True  # its own query
        assert torch.equal(seen, wanted)


def test_padding_has_no_part_in_a_mean() -> None:
    """Half of region 0 is padding, whose keys point away as the bias does; the other half decides."""
    module = built(grid=None, region=4, top_k=1, kernel=0, heads=1, dim=2, head_dim=2)
    with torch.no_grad():
        for part in (module.projection.query, module.projection.key):
            part.weight.copy_(torch.eye(2))
            part.bias = torch.nn.Parameter(torch.zeros(2, **F64))
        module.projection.key.bias.copy_(torch.tensor([-3.0, 0.0]))
    x = torch.tensor([[5.0, 0.0]] * 4 + [[4.5, 0.0]] * 4, **F64)[None]
    real = torch.ones(1, 8, dtype=torch.bool)
    real[0, :2] = False
    padded = x.masked_fill(~real[..., None], 0.0)
    assert choice(module, padded, ph.padding(real)).index.unique().tolist() == [0]
    assert choice(module, padded).index.unique().tolist() == [1]


def test_no_gradient_flows_through_the_choice() -> None:
    module = built(heads=1, top_k=1, kernel=0)
    x = X[:1].clone().requires_grad_()
    (flow,) = torch.autograd.grad(module(x)[0, 47].sum(), x)
    own = region_of(GRID, 2)
    read = densify(choice(module, x.detach()), batch=1, heads=1, queries=48, keys=48)[0, 0, 47]
    assert read.sum() == 4
    assert own[47] not in own[read]
    read[47] = True
    assert torch.equal(flow[0].abs().sum(-1) > 0, read)  # 47 itself, not the others of its region


def test_it_is_a_selector_too() -> None:
    q, k, v = torch.randn(3, 1, 2, 1024, 16, generator=torch.Generator().manual_seed(3))
    own = ph.region_routing(8, 4, (32, 32))
    mask = choose(own, q, k, None, 0.25)
    plan = ph.explain(q, k, v, mask=mask)
    assert plan.backend == "chosen"
    dense = densify(mask, batch=1, heads=2, queries=1024, keys=1024)
    assert bool((dense.sum(-1) == 256).all())
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(ph.attend(q, k, v, select=own), wanted)
    with pytest.raises(ShapeError, match="region_routing takes the tokens of .*; the call has 9 queries"):
        ph.attend(q[:, :, :9], k, v, select=own)
    with pytest.raises(ShapeError, match="region_routing takes as many queries as keys"):
        ph.attend(q[:, :, :9], k, v, select=ph.region_routing(8, 4))


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        ({"region": 3}, "region must divide the width of the grid, 8"),
        ({"region": 0}, "region must be at least 1; got 0"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"kernel": 4}, "kernel must be odd, or 0 for none; got 4"),
        ({"scale_by": "heads"}, "scale_by of bi_level_routing"),
        ({"grid": (4, 4, 4)}, r"grid must be \(height, width\)"),
        ({"mask": ph.window(3)}, "mask must be None: regions are chosen by the mean"),
        ({"select": ph.region_routing(2, 2)}, "select must be None in bi_level_routing"),
        ({"context_dim": 16}, "context_dim must be left out"),
    ):
        with pytest.raises(PolyheadError, match=words):
            built(**options)
    module = built()
    for call in (lambda: module(X, X), lambda: module.new_context_cache(X)):
        with pytest.raises(UnsupportedPattern, match="does not support a context"):
            call()
    with pytest.raises(UnsupportedPattern, match="does not support decoding with a cache"):
        module.new_cache(2)
    with pytest.raises(ShapeError, match="the call has 40 queries and 40 keys"):
        module(X[:, :40])


def test_it_costs_what_the_paper_says() -> None:
    module = built(kernel=5, bias=True)
    plain = ph.build("mha", dim=32, heads=4, bias=True, **F64)
    own, other = module.cost(48), plain.cost(48)
    assert own.parameters - other.parameters == 32 * (5 * 5 + 1)
    assert own.projections - other.projections == 2 * 48 * 32 * 5 * 5
    assert own.scores - other.scores == 2 * 12 * 12 * 32
