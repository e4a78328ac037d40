"""What must hold of Activator: no token sees another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName, UnsupportedPattern

F64 = {"dtype": torch.float64}
X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "activator_glu_block", **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 16, "heads": 2, **config}, **F64).eval()


@pytest.mark.parametrize(
    "options", [{"ffn": False}, {"shared_norm": False, "width": 5}, {"activation": "swiglu"}], ids=str
)
def test_other_options_keep_the_contract(options: dict[str, Any]) -> None:
    assert broken_rules("activator_glu_block", **options) == {}


def test_rectified_gates_equal_the_twin() -> None:
    module = built("activator_glu", activation="reglu")
    want = ph.reference("activator_glu")(X, parameters=module.state_dict(), activation="reglu")
    torch.testing.assert_close(module(X), want)


@pytest.mark.parametrize("name", ["activator_glu", "activator_glu_block"])
def test_an_output_depends_on_its_own_token_alone(name: str) -> None:
    module = built(name)
    flow = torch.autograd.functional.jacobian(lambda x: module(x[None])[0].sum(-1), X[0])  # L L d
    own = torch.eye(12, dtype=torch.bool)
    assert flow[own].abs().amax(-1).min() > 0
    assert flow[~own].abs().max() == 0


def test_a_classifier_does_not_see_that_patches_changed_places() -> None:
    blocks, order = [built(), built(ffn=False)], torch.randperm(12)

    def classify(x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x.mean(1)

    torch.testing.assert_close(blocks[0](X[:, order]), blocks[0](X)[:, order])
    torch.testing.assert_close(classify(X[:, order]), classify(X))


@pytest.mark.parametrize("ffn", [True, False])
def test_without_last_maps_it_is_the_identity(ffn: bool) -> None:
    module = built(ffn=ffn)
    with torch.no_grad():
        for last in [module.unit.merge, *([module.ffn.down] if ffn else [])]:
            last.weight.zero_()
            last.bias.zero_()
    assert torch.equal(module(X), X)


def test_parameters_are_counted_as_the_paper_has_them() -> None:
    d, f = 16, 24
    count = {ffn: built(width=f, ffn=ffn).cost(1).parameters for ffn in (True, False)}
    assert count[False] == 3 * d * f + 2 * f + d + 2 * f + 2 * d
    assert count[True] - count[False] == 2 * d * f + f + d
    assert built(width=f, shared_norm=False).cost(1).parameters - count[True] == 2 * d
    assert [name for name in built().state_dict() if "norm" in name] == [
        "norm.weight",
        "norm.bias",
        "unit.norm.weight",
        "unit.norm.bias",
    ]


def test_the_activation_is_on_one_side_only() -> None:
    module, swapped = built("activator_glu"), built("activator_glu")
    state = module.state_dict()
    swapped.load_state_dict(
        state
        | {f"gate.{p}": state[f"value.{p}"] for p in ("weight", "bias")}
        | {f"value.{p}": state[f"gate.{p}"] for p in ("weight", "bias")}
    )
    assert (module(X) - swapped(X)).abs().max() > 0.1


def test_a_stack_of_units_is_a_row_of_blocks() -> None:
    stack = ph.build_stack(["activator_glu"] * 2, dim=16, heads=2, norm="layer", **F64).eval()
    blocks = [built(ffn=False), built(ffn=False)]
    x = X
    for n, block in enumerate(blocks):
        layer = stack.layers[n]
        block.unit.load_state_dict(layer.attention.state_dict())
        block.norm.load_state_dict(layer.norm.state_dict())
        x = block(x)
    torch.testing.assert_close(stack(X), x, rtol=1e-4, atol=1e-4)  # the epsilons of the norms differ


def test_what_is_not_allowed() -> None:
    for options, error, message in (
        ({"activation": "gegl"}, UnknownName, "geglu"),
        ({"width": 0}, ConfigError, "width must be an integer, at least 1; got 0"),
        ({"ffn": False, "dropout": 0.5}, ConfigError, "dropout must be 0 with ffn=False.*got 0.5"),
        ({"ffn": 1}, ConfigError, "ffn must be"),
    ):
        with pytest.raises(error, match=message):
            built(**options)
    with pytest.raises(UnsupportedPattern, match="activator_glu_block maps every token by itself"):
        built()(X, X)
