"""What must hold of complex vector attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "complex_rotation", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def scores(module: nn.Module, x: torch.Tensor, where: int | torch.Tensor = 0) -> torch.Tensor:
    return module._queries(x, where) @ module._rows(x, where)[0].transpose(-1, -2)


def test_other_options_keep_the_contract() -> None:
    options = {"kv_heads": 2, "start": "random", "scaled": False, "bias": True}
    assert not broken_rules("complex_rotation", **options)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_it_starts_as_rotary_attention(kv_heads: int) -> None:
    module, plain = built(kv_heads=kv_heads), built("grouped_query", kv_heads=kv_heads, position=ph.nn.rope())
    lacking = module.load_state_dict(plain.state_dict(), strict=False)
    assert lacking.missing_keys == ["projection.stretch", "projection.shift"]
    close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()))


def test_scores_depend_on_how_far_apart_tokens_are_alone() -> None:
    module = built(start="random")
    nn.init.normal_(module.projection.shift)
    close(scores(module, X, 0), scores(module, X, 1000), 1e-9)
    places = torch.arange(11) * 2
    assert (scores(module, X, 0) - scores(module, X, places)).abs().max() > 0.01


def test_without_stretch_only_magnitudes_and_positions_count() -> None:
    module = built()
    nn.init.zeros_(module.projection.stretch)
    turned = X.clone()
    before = scores(module, X)
    with torch.no_grad():  # turn every key and every query by some phase
        for name in ("query", "key"):
            w = getattr(module.projection, name).weight.unflatten(0, (4, 2, 4))
            re, im = w[:, 0].clone(), w[:, 1].clone()
            w[:, 0], w[:, 1] = (
                re * math.cos(2.0) - im * math.sin(2.0),
                re * math.sin(2.0) + im * math.cos(2.0),
            )
    close(scores(module, turned), before)


def test_a_shift_of_pi_turns_the_sign_of_a_frequency() -> None:
    module = built(heads=1, head_dim=2)
    before = scores(module, X).diagonal(dim1=-2, dim2=-1)
    nn.init.constant_(module.projection.shift, math.pi)
    close(scores(module, X).diagonal(dim1=-2, dim2=-1), -before)


def test_zeros_have_a_gradient() -> None:
    module = built()
    x = torch.zeros(1, 3, 32, **F64, requires_grad=True)
    module(x, mask=ph.causal()).sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert bool(torch.isfinite(module.projection.query.weight.grad).all())


def test_a_phase_near_pi_is_not_rounded_past_it_by_autocast() -> None:
    torch.manual_seed(0)
    module = ph.build("complex_rotation", dim=32, heads=4, start="random")
    x = torch.randn(4, 64, 32)
    with torch.no_grad():
        plain = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            cache = module.new_cache(4)
            halves = module(x)
            steps = [module(part, mask=ph.causal(), cache=cache) for part in x.split(32, dim=1)]
            close(torch.cat(steps, dim=1), module(x, mask=ph.causal()), 0.02)
    close(halves.float(), plain, 0.02)


def test_other_positions_take_the_place_of_rotary_ones() -> None:
    module = built(position=ph.nn.no_position())
    plain = built("mha")
    module.load_state_dict(plain.state_dict(), strict=False)
    close(module(X), plain(X))
    assert ph.from_json(ph.to_json(module.config)) == module.config


def test_cost_and_refusals() -> None:
    mine, other = built(kv_heads=2).cost(64), built("grouped_query", kv_heads=2).cost(64)
    assert mine.parameters == other.parameters + (4 + 2) * 4
    assert (mine.flops, mine.cache_bytes) == (other.flops, other.cache_bytes)
    with pytest.raises(ConfigError, match="head_dim must be even, since its coordinates are pairs; got 3"):
        built(head_dim=3, position=ph.nn.no_position())
    with pytest.raises(UnknownName, match="rotary"):
        built(start="rotry")
    with pytest.raises(ConfigError, match="scaled must be True or False; got 0"):
        built(scaled=0)
