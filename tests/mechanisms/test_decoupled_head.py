"""What the paper of decoupled heads says must hold of the module, paper 076."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError
from polyhead.mechanisms.decoupled_head import decoupled

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)
# nested either way; not nested; groups of different sizes; not in a row; crossing each other
MAPS = {
    "fewer keys": ((0, 0, 0, 0), (0, 0, 1, 1)),
    "fewer values": ((0, 1, 2, 3), (0, 0, 1, 1)),
    "uneven": ((0, 0, 0, 1), (0, 1, 1, 1)),
    "apart": ((0, 1, 0, 1), (0, 0, 1, 1)),
    "crossed": ((1, 0, 1, 0), (0, 1, 2, 1)),
    "swapped": ((1, 1, 0, 0), (1, 1, 0, 0)),
}


def built(name: str = "decoupled_head", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


def written_out(module: nn.Module, **config: object) -> nn.Module:
    """Multi-head attention with every head's own copy of what it reads."""
    plain, state = built("mha", **config), module.state_dict()
    for part, shared in (("key", module.config.key_map), ("value", module.config.value_map)):
        heads = state[f"projection.{part}.weight"].unflatten(0, (max(shared) + 1, -1))
        state[f"projection.{part}.weight"] = heads[list(shared)].flatten(0, 1)
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS.keys())
def test_it_is_multi_head_attention_with_shared_heads_repeated(maps: tuple) -> None:
    for config in ({}, {"position": ph.nn.rope()}, {"score": ph.alibi(4)}, {"value_dim": 5}):
        module = built(key_map=maps[0], value_map=maps[1], **config)
        plain = written_out(module, **config)
        real = torch.ones(2, 11, dtype=torch.bool)
        real[1, :3] = False
        for mask in (None, ph.causal(), ph.causal() & ph.window(3), ph.window(2, 2)):
            close(module(X, mask=mask), plain(X, mask=mask))
            close(module(X, mask=mask, padding=real), plain(X, mask=mask, padding=real))
        cache = module.new_cache(2)
        steps = [module(x, mask=ph.causal(), cache=cache) for x in X.split([7, 1, 1, 2], dim=1)]
        close(torch.cat(steps, dim=1), plain(X, mask=ph.causal()))


def test_as_many_keys_and_values_as_heads_is_multi_head_attention() -> None:
    module, plain = built(key_heads=4, value_heads=4), built("mha")
    plain.load_state_dict(module.state_dict())
    close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()))


@pytest.mark.parametrize("groups", [1, 2])
def test_equal_maps_of_groups_in_a_row_are_grouped_query_attention(groups: int) -> None:
    module, grouped = built(key_heads=groups, value_heads=groups), built("grouped_query", kv_heads=groups)
    grouped.load_state_dict(module.state_dict())
    close(module(X, mask=ph.causal()), grouped(X, mask=ph.causal()))
    assert module.kv_heads == groups


@pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS.keys())
def test_the_cache_holds_the_distinct_heads_alone_and_cost_says_so(maps: tuple) -> None:
    module = built(key_map=maps[0], value_map=maps[1])
    keys, values = max(maps[0]) + 1, max(maps[1]) + 1
    cache = module.new_cache(2, max_length=11)
    module(X, mask=ph.causal(), cache=cache)
    cost = module.cost(11, batch=2)
    assert cache.nbytes() == cost.cache_bytes == 2 * 11 * 8 * 8 * (keys + values)
    assert cost.parameters == 32 * 8 * (2 * 4 + keys + values)
    assert cost.scores == built("mha").cost(11, batch=2).scores


@pytest.mark.parametrize("heads", [(1, 8), (8, 4), (8, 1)])
def test_a_step_copies_no_keys_or_values_of_nested_groups(heads: tuple[int, int]) -> None:
    module = ph.build("decoupled_head", dim=256, heads=16, key_heads=heads[0], value_heads=heads[1])
    x, keys = torch.randn(1, 1, 256), 16384
    held = tuple(torch.randn(1, n, keys, 16) for n in heads)
    cache = module.new_cache(1)
    with torch.no_grad():
        cache.append(*held)
        module(x, mask=ph.causal(), cache=cache)  # the cache has room now, the next step adds in place
        with torch.profiler.profile(profile_memory=True) as profile:
            module(x, mask=ph.causal(), cache=cache)
    peak = max(event.cpu_memory_usage for event in profile.events())
    assert peak < keys * 16 * 4, f"{peak} bytes were taken at once"


def test_only_what_is_shared_less_finely_is_repeated() -> None:
    projection = built(key_map=(0, 0, 1, 1), value_map=(0, 1, 2, 3)).projection
    k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 4, 5, 8)
    pairs = projection.gathered(k, v)
    assert torch.equal(pairs[0], k[:, [0, 0, 1, 1]])
    assert pairs[1] is v
    one = built(key_heads=1, value_heads=2).projection
    assert one.kv_heads == 2
    assert one.gathered(k[:, :1], v[:, :2])[0].stride(1) == 0


def test_planted_copies_are_fused_without_error_and_factors_go_to_queries_and_outputs() -> None:
    plain = built("mha", position=ph.nn.rope())
    with torch.no_grad():
        key, value = (getattr(plain.projection, n).weight.unflatten(0, (4, 8)) for n in ("key", "value"))
        key[2], value[3] = key[0], value[1]
    close(decoupled(plain, (0, 1, 0, 2), (0, 1, 2, 1))(X, mask=ph.causal()), plain(X, mask=ph.causal()))
    scaled = built("mha", position=ph.nn.rope())
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():  # heads that are multiples of one another: the factor is moved, then they are one
        for part, head, factor in (("key", 2, 3.0), ("value", 3, -0.5)):
            getattr(scaled.projection, part).weight.unflatten(0, (4, 8))[head].mul_(factor)
        before = scaled(X)
        scaled.projection.query.weight.unflatten(0, (4, 8))[2].mul_(3.0)
        scaled.output.weight.unflatten(1, (4, 8))[:, 3].mul_(-0.5)
        scaled.projection.key.weight.unflatten(0, (4, 8))[2].div_(3.0)
        scaled.projection.value.weight.unflatten(0, (4, 8))[3].div_(-0.5)
    close(decoupled(scaled, (0, 1, 0, 2), (0, 1, 2, 1))(X), before)


def test_groups_of_a_trained_module_start_from_their_means() -> None:
    plain = built("mha", bias=True)
    fused = decoupled(plain, (0, 0, 1, 1), (0, 0, 1, 1))
    grouped = built("grouped_query", kv_heads=2, bias=True)
    state = plain.state_dict()
    for part in ("key", "value"):
        for kind in ("weight", "bias"):
            heads = state[f"projection.{part}.{kind}"].unflatten(0, (2, 2, 8))
            state[f"projection.{part}.{kind}"] = heads.mean(1).flatten(0, 1)
    grouped.load_state_dict(state)
    close(fused(X), grouped(X))
    assert fused.config == built(key_heads=2, value_heads=2, bias=True).config


@pytest.mark.parametrize("name", ["uneven", "crossed"])
def test_any_maps_keep_the_contract(name: str) -> None:
    keys, values = MAPS[name]
    options = {"key_map": keys, "value_map": values, "qk_norm": True, "bias": True}
    assert broken_rules("decoupled_head", without="gradients", **options) == {}


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="key_heads must divide heads=4 where there is no key_map; got 3"):
        built(key_heads=3)
    with pytest.raises(ConfigError, match="value_map must have an index for each of the 4 heads"):
        built(value_map=(0, 1, 1))
    with pytest.raises(ConfigError, match="use every index from 0"):
        built(key_map=(0, 2, 2, 0))
    with pytest.raises(ConfigError, match="key_heads=3 .* does not fit key_map"):
        built(key_heads=3, key_map=(0, 0, 1, 1))
    with pytest.raises(ConfigError, match="attention must be mha, built by name"):
        decoupled(built("multi_query"), (0, 0, 0, 0), (0, 0, 0, 0))
