"""Soft mixture of attention: what its paper says must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError
from polyhead.mechanisms.soft_mixture_of_attention import soft_mixture
from polyhead.nn import auxiliary_losses

F64 = {"dtype": torch.float64}
X = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "soft_mixture_of_attention", seed: int = 0, **config: Any) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def branches(count: int = 3, **config: Any) -> list[nn.Module]:
    return [built("grouped_query", seed, kv_heads=2, **config) for seed in range(count)]


def one_hot(module: nn.Module, i: int, x: Tensor) -> Tensor:
    """Weights that choose expert i for every token of x, whose first feature is 1."""
    with torch.no_grad():
        module.gate.router.weight.zero_()
        module.gate.router.weight[i, 0] = 1e4
    return x


@pytest.mark.parametrize(
    "options",
    [
        {"share_kv": True, "kv_heads": 2, "bias": True},
        {"kv_heads": 2, "experts": 3},
        {"share_kv": True, "kv_heads": 1, "experts": 1, "qk_norm": True},
    ],
    ids=["shared", "own", "one"],
)
def test_variants_keep_the_contract(options: dict[str, Any]) -> None:
    assert broken_rules("soft_mixture_of_attention", **options) == {}


@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "qk_norm": True, "position": ph.nn.rope()}], ids=["", "all"]
)
def test_equal_experts_are_one_layer_whatever_the_router(share_kv: bool, options: dict[str, Any]) -> None:
    plain = branches(1, **options)[0]
    mixture = soft_mixture([plain] * 3, share_kv=share_kv)
    with torch.no_grad():
        mixture.gate.router.weight.normal_()
    close(mixture(X, mask=ph.causal()), plain(X, mask=ph.causal()))


def test_a_router_that_chooses_one_gives_that_branch() -> None:
    made = branches()
    mixture = soft_mixture(made)
    x = X.clone()
    x[..., 0] = 1.0
    for i, branch in enumerate(made):
        one_hot(mixture, i, x)
        close(mixture(x, mask=ph.causal()), branch(x, mask=ph.causal()))


def test_shared_keys_and_values_are_means_and_equal_to_own_ones_where_those_agree() -> None:
    made = branches()
    shared = soft_mixture(made, share_kv=True)
    for name in ("key", "value"):
        expected = sum(getattr(one.projection, name).weight for one in made) / 3
        close(getattr(shared.projection, name).weight, expected)
    for one in made[1:]:
        for name in ("key", "value"):
            getattr(one.projection, name).load_state_dict(getattr(made[0].projection, name).state_dict())
    own, shared = soft_mixture(made), soft_mixture(made, share_kv=True)
    with torch.no_grad():
        own.gate.router.weight.normal_()
    shared.gate.load_state_dict(own.gate.state_dict())
    close(shared(X, mask=ph.causal()), own(X, mask=ph.causal()))


def test_weights_sum_to_one_and_every_expert_learns() -> None:
    module = built(experts=3).train()
    with torch.no_grad():
        module.gate.router.weight.normal_()
    factors = module.gate.factors(module.gate.scores(X)).unflatten(-1, (3, 4))
    close(factors[..., 0].sum(-1), torch.ones(2, 30, **F64))
    close(factors.std(-1), torch.zeros(2, 30, 3, **F64))
    module(X).sin().sum().backward()
    for weight in (module.projection.query.weight, module.projection.key.weight):
        assert (weight.grad.unflatten(0, (3, 32)).abs().amax((1, 2)) > 0).all()
    expected = 0.001 * module.gate.scores(X).exp().sum(-1).log().square().mean()
    close(auxiliary_losses(module)["z"], expected)


def test_parameters_and_cache() -> None:
    for share_kv in (False, True):
        cost = built(experts=3, share_kv=share_kv).cost(64)
        copies = 1 if share_kv else 3
        assert cost.parameters == 3 * 2 * 32**2 + copies * 2 * 32**2 + 3 * 32
        assert cost.kv_bytes_per_token == copies * 2 * 32 * 8
        assert cost.scores == 3 * 2 * 64 * 64 * 32


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4"):
        built(kv_heads=3)
    with pytest.raises(ConfigError, match="experts must be an integer, at least 1"):
        built(experts=0)
    with pytest.raises(ConfigError, match="built by name with the same"):
        soft_mixture([built("mha"), built("grouped_query", kv_heads=2)])
    with pytest.raises(ConfigError, match="attentions must be layers"):
        soft_mixture([])
    with pytest.raises(ConfigError, match="may tell heads apart.*position=AlibiPosition"):
        soft_mixture([built("mha", position=ph.nn.alibi_position())])
