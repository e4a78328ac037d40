"""What the paper of weighted grouped-query attention says must hold, paper 120."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName
from polyhead.mechanisms.weighted_grouped_query import merged, weighted

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)
GRANULARITIES = ("head", "output", "input")


def built(name: str = "weighted_grouped_query", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bias", [False, True])
def test_at_the_start_it_is_grouped_query_attention_of_mean_heads(granularity: str, bias: bool) -> None:
    pooled = built(kv_heads=2, granularity=granularity, bias=bias)
    grouped = built("grouped_query", kv_heads=2, bias=bias)
    state = pooled.state_dict()
    for part in ("key", "value"):
        del state[f"projection.{part}_weights"]
        for kind in ("weight", "bias") if bias else ("weight",):
            tensor = state[f"projection.{part}.{kind}"]
            if kind == "bias":
                tensor.normal_()
            state[f"projection.{part}.{kind}"] = tensor.unflatten(0, (2, 2, 8)).mean(1).flatten(0, 1)
    grouped.load_state_dict(state)
    close(pooled(X, mask=ph.causal()), grouped(X, mask=ph.causal()))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("options", [{}, {"bias": True, "qk_norm": True, "value_dim": 5}])
def test_merging_changes_nothing_and_leaves_grouped_query_attention(granularity: str, options: dict) -> None:
    pooled = built(kv_heads=2, granularity=granularity, start="random", position=ph.nn.rope(), **options)
    with torch.no_grad():
        for p in pooled.parameters():
            p.add_(0.1 * torch.randn_like(p))
    whole = merged(pooled)
    close(whole(X, mask=ph.causal()), pooled(X, mask=ph.causal()))
    plain = built("grouped_query", kv_heads=2, position=ph.nn.rope(), **options)
    assert whole.config == plain.config
    assert whole.cost(9) == plain.cost(9)
    assert whole.state_dict().keys() == plain.state_dict().keys()


def test_one_weight_of_one_picks_a_head() -> None:
    pooled, plain = built(kv_heads=1), built("multi_query")
    with torch.no_grad():
        for part in ("key", "value"):
            getattr(pooled.projection, f"{part}_weights").copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    state = {k: v for k, v in pooled.state_dict().items() if not k.endswith("_weights")}
    for part in ("key", "value"):
        state[f"projection.{part}.weight"] = state[f"projection.{part}.weight"][16:24]
    plain.load_state_dict(state)
    close(pooled(X), plain(X))


def test_as_many_groups_as_heads_is_multi_head_attention() -> None:
    pooled, plain = built(kv_heads=4), built("mha")
    plain.load_state_dict({k: v for k, v in pooled.state_dict().items() if not k.endswith("_weights")})
    assert torch.equal(pooled(X), plain(X))


def test_the_gradient_of_a_weight_is_the_product_of_its_head_and_the_group_gradient() -> None:
    pooled = built(kv_heads=2, start="random")
    grouped = merged(pooled)
    for module in (pooled, grouped):
        module(X, mask=ph.causal()).sin().sum().backward()
    for part in ("key", "value"):
        heads = getattr(pooled.projection, part).weight.detach().unflatten(0, (2, 2, 8))
        groups = getattr(grouped.projection, part).weight.grad.unflatten(0, (2, 1, 8))
        close(getattr(pooled.projection, f"{part}_weights").grad, (heads * groups).sum((2, 3)).flatten())


def test_a_factor_may_stand_at_the_weight_or_at_its_head() -> None:
    pooled, other = built(kv_heads=2), built(kv_heads=2)
    with torch.no_grad():
        other.projection.key_weights[1] *= 4.0
        other.projection.key.weight[8:16] /= 4.0
    close(other(X), pooled(X))


@pytest.mark.parametrize(("granularity", "numbers"), [("head", 1), ("output", 8), ("input", 32)])
def test_parameters_and_cache(granularity: str, numbers: int) -> None:
    pooled, plain = built(kv_heads=2, granularity=granularity), built("mha")
    grouped = built("grouped_query", kv_heads=2)
    assert pooled.cost(9).parameters == plain.cost(9).parameters + 2 * 4 * numbers
    assert pooled.cost(9).flops == grouped.cost(9).flops
    assert pooled.cost(9).kv_bytes_per_token == grouped.cost(9).kv_bytes_per_token


def test_a_trained_module_is_pooled_from_its_own_heads() -> None:
    plain = built("mha", position=ph.nn.rope())
    same = weighted(plain, 4)
    close(same(X), plain(X))
    assert same.config.kv_heads == 4
    half = weighted(plain, 2, granularity="output")
    assert half.config == built(kv_heads=2, granularity="output", position=ph.nn.rope()).config
    grouped = built("grouped_query", kv_heads=2)
    one = weighted(grouped, 1)
    assert one.projection.key_weights.tolist() == [0.5, 0.5]
    assert merged(one)(X).shape == X.shape
    assert one.new_cache().nbytes() == 0
    assert one.cost(1).kv_bytes_per_token == 2 * 8 * 8
    close(grouped(X), built("grouped_query", kv_heads=2)(X))  # left as it was


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4; got kv_heads=3"):
        built(kv_heads=3)
    with pytest.raises(UnknownName, match="did you mean 'output'"):
        built(granularity="outputs")
    with pytest.raises(UnknownName, match="did you mean 'mean'"):
        built(start="meen")
    with pytest.raises(ConfigError, match="attention must be weighted grouped-query attention"):
        merged(built("mha"))
    with pytest.raises(ConfigError, match="attention must be a module with a plain Projection"):
        weighted(built(), 2)
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4; got 3; allowed are 1, 2, 4"):
        weighted(built("mha"), 3)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_variant_keeps_the_contract(granularity: str) -> None:
    assert broken_rules("weighted_grouped_query", granularity=granularity, kv_heads=2, start="random") == {}
