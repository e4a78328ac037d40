"""What the paper of knocking heads says must hold, paper 047."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName
from polyhead.mechanisms.knocking_heads import folded

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)
LINEAR = {"knock": "linear", "on": ("q", "k", "v")}


def built(name: str = "knocking_heads", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


def stirred(**config: object) -> nn.Module:
    module = built(**config)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "_map" in name or name.endswith("bias"):
                p.add_(0.3 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("options", [{}, LINEAR, {"knock": "linear"}, {"kv_heads": 1}], ids=str)
def test_it_starts_as_grouped_query_attention(options: dict[str, object]) -> None:
    knocking = built(**options, qk_norm=True, position=ph.nn.rope())
    plain = built("gqa", kv_heads=knocking.kv_heads, qk_norm=True, position=ph.nn.rope())
    plain.load_state_dict({k: v for k, v in knocking.state_dict().items() if "_map" not in k})
    close(knocking(X, mask=ph.causal()), plain(X, mask=ph.causal()))


@pytest.mark.parametrize("on", [("v",), ("k", "q"), ("q", "k", "v")])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "bias": True, "qk_norm": True, "value_dim": 5}])
def test_folded_linear_maps_change_nothing(on: tuple[str, ...], options: dict[str, object]) -> None:
    knocking = stirred(knock="linear", on=on, position=ph.nn.rope(), **options)
    whole = folded(knocking)
    close(whole(X, mask=ph.causal()), knocking(X, mask=ph.causal()))
    plain = built("gqa", **{"kv_heads": 4, **options}, position=ph.nn.rope())
    assert whole.config == plain.config
    assert whole.cost(9) == plain.cost(9)
    assert whole.state_dict().keys() == plain.state_dict().keys()


def test_a_closed_gate_and_inverse_maps_leave_the_values() -> None:
    knocking, plain = built(), built("mha")
    with torch.no_grad():
        knocking.projection.value_map.up.normal_()
        knocking.projection.value_map.down.copy_(torch.linalg.inv(knocking.projection.value_map.up))
    plain.load_state_dict({k: v for k, v in knocking.state_dict().items() if "_map" not in k})
    torch.testing.assert_close(knocking(X), plain(X), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, LINEAR], ids=str)
def test_the_order_of_the_heads_does_not_matter(options: dict[str, object]) -> None:
    knocking, other = stirred(**options), built(**options)
    rows = torch.tensor([2, 0, 3, 1])[:, None] * 8 + torch.arange(8)
    state = knocking.state_dict()
    for name in ("query", "key", "value"):
        state[f"projection.{name}.weight"] = state[f"projection.{name}.weight"][rows.flatten()]
    state["output.weight"] = state["output.weight"][:, rows.flatten()]
    other.load_state_dict(state)
    close(other(X, mask=ph.causal()), knocking(X, mask=ph.causal()))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_parameters_do_not_depend_on_the_heads_and_the_cache_is_as_it_was(heads: int) -> None:
    size = {"heads": heads, "head_dim": 8}
    mlp, linear, plain = built(**size), built(**size, **LINEAR), built("mha", **size)
    for module in (mlp, linear):
        assert module.cost(9).parameters == plain.cost(9).parameters + 3 * 8 * 8
        assert module.cost(9).kv_bytes_per_token == plain.cost(9).kv_bytes_per_token


def test_one_map_learns_from_every_head() -> None:
    knocking, heads = built(), []
    knocking.output.register_forward_pre_hook(lambda m, inputs: heads.append(inputs[0]))
    knocking(X)
    for h in range(4):
        loss = heads[0][:, h].sin().sum()
        (flow,) = torch.autograd.grad(loss, knocking.projection.value_map.gate, retain_graph=True)
        assert flow.abs().max() > 0


def test_linear_maps_keep_the_contract() -> None:
    assert broken_rules("knocking_heads", **LINEAR, kv_heads=2) == {}


def test_refusals() -> None:
    with pytest.raises(UnknownName, match="did you mean 'linear'"):
        built(knock="linaer")
    with pytest.raises(ConfigError, match=r"knock='mlp' maps values only: on=\('v',\); got on=\('q', 'v'\)"):
        built(on=("q", "v"))
    for on in ((), ("w",), ("v", "v"), 3):
        with pytest.raises(ConfigError, match="on must be a tuple of some of 'q', 'k', 'v', each once"):
            built(knock="linear", on=on)
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4; got kv_heads=3"):
        built(kv_heads=3)
    with pytest.raises(ConfigError, match="knock='mlp' cannot be folded"):
        folded(built())
    with pytest.raises(ConfigError, match="attention must be knocking-heads attention"):
        folded(built("mha"))
