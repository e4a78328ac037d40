"""What the papers of neighbourhood attention say must hold, papers 153, 163 and 188."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.attend.masks import densify
from polyhead.attend.scores import neighborhood_bias
from polyhead.errors import ConfigError, ShapeError, UnsupportedPattern

F64 = {"dtype": torch.float64}
NAME = "neighborhood_attention"


def built(name: str = NAME, **config: object) -> nn.Module:
    torch.manual_seed(0)
    module = ph.build(name, **{"dim": 16, "heads": 4, **config}, **F64).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(length), **F64)


GRIDS = [
    {"grid": (11,), "window": 4},
    {"grid": (13,), "window": 4, "dilation": 3, "causal": True, "stride": 3},
    {"grid": (5, 6), "window": 3},
    {"grid": (5, 7), "window": (5, 2), "dilation": (1, 3), "stride": (2, 1), "kv_heads": 2},
    {"grid": (6, 5), "window": (3, 4), "causal": (True, False)},
    {"grid": (3, 4, 2), "window": (2, 3, 2), "causal": (True, False, False)},
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", GRIDS, ids=repr)
def test_grids_equal_the_twin(options: dict, bias: bool) -> None:
    module = built(**options, relative_bias=bias)
    length = torch.tensor(options["grid"]).prod().item()
    x = tokens(length).requires_grad_()
    config = module.config
    rule = {
        name: getattr(config, name)
        for name in ("heads", "kv_heads", "grid", "window", "dilation", "stride", "causal")
    }
    for real in (None, torch.arange(length) >= torch.tensor([[0], [4]])):
        for mask in (None, ph.causal()):
            dense = None if mask is None else densify(mask, queries=length, keys=length)
            expected = ph.reference(NAME)(x, parameters=module.state_dict(), mask=dense, padding=real, **rule)
            found = module(x, mask=mask, padding=real)
            torch.testing.assert_close(found, expected)
            (own,) = torch.autograd.grad(found.square().sum(), x)
            (right,) = torch.autograd.grad(expected.square().sum(), x)
            torch.testing.assert_close(own, right)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3, "dilation": 2},
        {"window": 1},
        {"window": 4, "dilation": 2, "kv_heads": 2, "relative_bias": True},
        {"window": 50},
    ],
)
def test_lines_keep_the_contract(options: dict) -> None:
    # with a window of 1, gradients of queries and keys are rounding alone
    assert broken_rules(NAME, compiled=options["window"] > 1, **options) == {}


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_a_window_as_wide_as_the_grid_is_plain_attention(stride: int) -> None:
    plain = built("mha")
    module = built(grid=(5, 6), window=(5, 6), stride=stride)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(tokens(30)), plain(tokens(30)))


def test_a_window_of_one_is_a_map_of_each_token() -> None:
    module = built(grid=(5, 6), window=1)
    x = tokens(30)
    expected = module.output(module.projection.keys_values(x)[1])
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("dilation", [1, 3])
def test_a_line_is_a_sliding_window_and_needs_no_more_cache(dilation: int) -> None:
    module = built(window=4, dilation=dilation)
    plain = built("mha")
    plain.load_state_dict(module.state_dict())
    x = tokens(40)
    whole = module(x, mask=ph.causal())
    near = ph.window(3 * dilation) & ph.where(_same_group) if dilation > 1 else ph.window(3)
    torch.testing.assert_close(whole, plain(x, mask=near))
    cache = module.new_cache(2, window=3 * dilation + 1)
    steps = [module(step, mask=ph.causal(), cache=cache) for step in x.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def _same_group(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    return (i - j) % 3 == 0


def reach(*layers: dict, length: int) -> torch.Tensor:
    """Places that the middle of a line depends on."""
    stack = ph.build_stack([(NAME, {"grid": (length,), **layer}) for layer in layers], dim=16, heads=4, **F64)
    x = tokens(length, 1).requires_grad_()
    (grad,) = torch.autograd.grad(stack(x)[0, length // 2].square().sum(), x)
    return grad[0].abs().amax(-1).nonzero().view(-1)


def test_dilation_in_turns_reaches_far() -> None:
    near = reach({"window": 3}, {"window": 3}, {"window": 3}, length=27)
    assert near.tolist() == list(range(13 - 3, 13 + 4))  # l (w - 1) + 1
    far = reach(*({"window": 3, "dilation": d} for d in (1, 3, 9)), length=27)
    assert far.tolist() == list(range(27))  # w to the l


def test_tokens_of_another_remainder_do_not_meet() -> None:
    module = built(grid=(6, 6), window=3, dilation=2)
    x = tokens(36, 1).requires_grad_()
    (grad,) = torch.autograd.grad(module(x)[0, 8].sum(), x)
    moved = grad[0].abs().amax(-1).view(6, 6) > 0
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[1::2, 0::2] = True  # (1, 2) and all of its group, three by three
    assert torch.equal(moved, expected)
    # a group alone is a grid of its own
    alone = built(grid=(3, 3), window=3)
    alone.load_state_dict(module.state_dict())
    part = x.unflatten(1, (6, 6))[:, 1::2, 0::2].flatten(1, 2)
    torch.testing.assert_close(module(x).unflatten(1, (6, 6))[:, 1::2, 0::2].flatten(1, 2), alone(part))


def test_a_stride_of_the_window_gives_separate_blocks() -> None:
    module = built(grid=(4, 6), window=(2, 3), stride=(2, 3))
    x = tokens(24, 1)
    moved = x.clone()
    moved.unflatten(1, (4, 6))[:, :2, 3:] += 1
    same = (module(x) == module(moved)).all(-1).view(4, 6)
    assert bool(same[2:].all())
    assert bool(same[:, :3].all())
    assert not bool(same[:2, 3:].any())


def test_what_is_inside_moves_along() -> None:
    module = built(grid=(9, 9), window=3, relative_bias=True)
    x = tokens(81, 1)
    moved = x.unflatten(1, (9, 9)).roll((1, 2), (1, 2)).flatten(1, 2)
    one, other = (module(z).unflatten(1, (9, 9))[0] for z in (x, moved))
    torch.testing.assert_close(other[2:8, 3:8], one[1:7, 1:6])
    assert not torch.allclose(other[0], one[-1])


def test_the_bias_is_of_offsets_within_a_group() -> None:
    table = torch.zeros(1, 5 * 3, **F64)
    table[0, 3 * 3 + 2] = 7.0  # one group place down, one to the right
    q = torch.zeros(1, 1, 40, 4, **F64)
    score = neighborhood_bias(table, (5, 8), (3, 2), (1, 3))
    bias = score.bias(ph.Tile(batch=1, heads=1, rows=torch.arange(40), cols=torch.arange(40)))[0]
    assert bias[0, 8 + 3] == 7.0
    assert bias[17, 17 + 11] == 7.0
    assert bias[0, 0] == 0.0
    out = ph.attend(q, q, q, score=score, mask=ph.neighborhood((5, 8), (3, 2), (1, 3)))
    assert out.shape == q.shape
    for call, said in (
        (lambda: neighborhood_bias(table, (5, 8), 3), r"\(H, 25\), a column for every offset"),
        (lambda: neighborhood_bias(table, 5, 3), "grid must have 1 to 3 axes"),
        (lambda: neighborhood_bias(table, (5, 8), (3, 2, 1)), "window needs one value, or one for each"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()


def test_a_whole_grid_runs_tile_by_tile() -> None:
    module = built(grid=(16, 16), window=5)
    x = tokens(256)
    with torch.profiler.profile() as found:
        out = module(x)
    assert any("flash_attention_for_cpu" in event.name for event in found.events())
    with ph.strict():
        torch.testing.assert_close(module(x), out)


def test_names_of_the_three_papers() -> None:
    for name in ("dilated_neighborhood_attention", "generalized_neighborhood_attention"):
        assert ph.entry(name).name == NAME


def test_refusals() -> None:
    for options, said in (
        ({"grid": (3, 3), "window": 4}, "window 4 at dilation 1 does not fit axis 0"),
        ({"grid": (3, 3), "window": 2, "stride": 3}, "stride 3 on axis 0"),
        ({"grid": (3, 3, 3, 3)}, "grid must be the lengths of 1 to 3 axes"),
        ({"grid": 9}, "grid must be the lengths of 1 to 3 axes"),
        ({"grid": (8, 8), "window": (3, 3, 3)}, "window needs one value, or one for each of the 2 axes"),
        ({"window": (3, 3)}, "window needs one value, or one for each of the 1 axes"),
        ({"causal": False}, "causal=False moves windows at the end of a line"),
        ({"stride": 2}, "stride=2 moves windows at the end of a line"),
        ({"relative_bias": 1}, "relative_bias must be True or False"),
        ({"kv_heads": 3}, "kv_heads must divide heads=4"),
    ):
        with pytest.raises(ConfigError, match=said):
            built(**options)
    module = built(grid=(4, 4), window=3)
    with pytest.raises(ShapeError, match="x must have 16 tokens, those of the grid 4×4; got 15"):
        module(tokens(15))
    for call in (lambda: module.new_cache(2), lambda: module(tokens(16), cache=built().new_cache(2))):
        with pytest.raises(UnsupportedPattern, match="does not support a cache; leave grid out"):
            call()
    with pytest.raises(UnsupportedPattern, match="take grouped_query for cross-attention"):
        module(tokens(16), tokens(16))
    with pytest.raises(UnsupportedPattern, match="pass mask=causal\\(\\)"):
        built()(tokens(16))
