"""What must hold of higher-order attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "nexus_higher_order", **config: object) -> nn.Module:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


@pytest.mark.parametrize("options", [{"order": 1}, {"order": 3, "gated": True}], ids=str)
def test_order_one_and_closed_gates_are_multi_head_attention(options: dict[str, object]) -> None:
    close(built(**options)(X, mask=ph.causal()), built("mha")(X, mask=ph.causal()))


def test_it_has_the_parameters_of_multi_head_attention() -> None:
    shapes = [
        {k: v.shape for k, v in built(name).state_dict().items()} for name in ("nexus_higher_order", "mha")
    ]
    assert shapes[0] == shapes[1]
    assert built(order=4).cost(8).parameters == built("mha").cost(8).parameters


def test_equal_queries_and_keys_stay_as_they_are() -> None:
    x = X[:, :1].expand(-1, 11, -1)
    close(built(order=4)(x, mask=ph.causal()), built("mha")(x, mask=ph.causal()))


@pytest.mark.parametrize("order", [2, 3])
def test_every_order_equals_the_equations(order: int) -> None:
    module = built(order=order)
    q, k, v = (
        getattr(module.projection, name)(X).unflatten(-1, (4, 8)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    hidden = torch.ones(11, 11, dtype=torch.bool).triu(1)

    def weights(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (torch.einsum("bhid,bhjd->bhij", a, b) / 8**0.5).masked_fill(hidden, -torch.inf).softmax(-1)

    for _ in range(order - 1):
        q, k = weights(q, q) @ q, weights(k, k) @ k
    want = (weights(q, k) @ v).transpose(1, 2).flatten(2) @ module.output.weight.T
    close(module(X, mask=ph.causal()), want)


VARIANTS = [{"order": 1}, {"order": 3, "kv_heads": 2}, {"gated": True, "bias": True}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_keep_the_contract(options: dict[str, object]) -> None:
    assert broken_rules("nexus_higher_order", **options) == {}


def test_a_window_of_cached_tokens_with_positions() -> None:
    module = built(order=3, position=ph.nn.rope(), score=ph.alibi(4))
    mask = ph.causal() & (ph.window(4) | ph.sink(2))
    with torch.no_grad():
        cache = module.new_cache(2, window=5, sinks=2)
        steps = [module(x, mask=ph.causal(), cache=cache) for x in X.split(1, dim=1)]
        close(torch.cat(steps, dim=1), module(X, mask=mask))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="order must be"):
        built(order=0)
    with pytest.raises(ConfigError, match="gated must be True or False; got 1"):
        built(gated=1)
    with pytest.raises(ConfigError, match="cache must hold queries and keys of every order"):
        built()(X, cache=built("mha").new_cache(2))
