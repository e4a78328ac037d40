"""What must hold of Gaussian mixture keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName
from polyhead.nn.mixture_keys import MixtureKeys

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "gaussian_mixture_keys", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def take_over(module: nn.Module, other: nn.Module) -> None:
    own = module.state_dict().keys()
    module.load_state_dict({k: v for k, v in other.state_dict().items() if k in own}, strict=False)


def weights(module: nn.Module) -> torch.Tensor:
    q, rows = module._queries(X, 0), module._rows(X, 0)
    return module._weights(q, rows, mask=ph.causal(), score=None, scale=None)


@pytest.mark.parametrize(
    "options",
    [{"keys": "separate", "bias": True, "kv_heads": 2}, {"components": 3, "qk_norm": True}],
    ids=str,
)
def test_other_options_keep_the_contract(options: dict[str, object]) -> None:
    assert not broken_rules("gaussian_mixture_keys", **options)


def test_one_component_is_attention_with_a_bias_for_long_keys() -> None:
    module, plain = built(components=1), built("mha")
    take_over(module, plain)
    q, k, v = plain.projection.queries(X), *plain.projection.keys_values(X)
    logits = (q @ k.transpose(-1, -2) - k.square().sum(-1)[..., None, :] / 2) / 8**0.5
    close(module(X), plain.output(logits.softmax(-1) @ v))
    assert "prior" not in module.state_dict()


def test_one_component_with_keys_of_one_length_is_softmax_attention() -> None:
    module, plain = built(components=1, qk_norm=True), built("mha", qk_norm=True)
    take_over(module, plain)
    # the norm's epsilon leaves lengths that differ by a millionth
    close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()), 1e-5)


@pytest.mark.parametrize("keys", ["shifted", "separate"])
def test_equal_components_are_one_whatever_their_priors(keys: str) -> None:
    module, one = built(keys=keys, variances=(2.0, 2.0)), built(components=1, variances=(2.0,))
    take_over(one, module)
    with torch.no_grad():
        if keys == "shifted":
            module.shift.zero_()
        else:
            module.projection.keys[0].weight.copy_(module.projection.key.weight)
        module.prior.copy_(torch.rand(4, 2))
    close(module(X, mask=ph.causal()), one(X, mask=ph.causal()))


def test_a_prior_of_one_and_zero_is_the_first_component() -> None:
    module, one = built(), built(components=1)
    take_over(one, module)
    with torch.no_grad():
        module.prior.copy_(torch.tensor([1.0, 0.0]))
    close(module(X), one(X), 1e-5)


def test_shifted_keys_are_separate_keys_with_a_bias() -> None:
    shifted, separate = built(), built(keys="separate", bias=True)
    take_over(separate, shifted)
    with torch.no_grad():
        separate.projection.keys[0].weight.copy_(shifted.projection.key.weight)
        separate.projection.key.bias.copy_(-shifted.shift[0].flatten())
        separate.projection.keys[0].bias.copy_(-shifted.shift[1].flatten())
    close(separate(X, mask=ph.causal()), shifted(X, mask=ph.causal()))


def test_weights_are_densities_over_their_sum() -> None:
    module = built()
    found = weights(module)
    close(found.sum(-1), torch.ones(2, 4, 11, **F64))
    assert found.triu(1).abs().max() == 0
    q, k = module.projection.queries(X), module.projection.keys_values(X)[0]
    near = torch.zeros(2, 4, 11, 11, **F64)
    for r, variance in enumerate((8**0.5, 8**0.5 / 3)):
        distance = torch.cdist(q, k - module.shift[r][:, None])
        near = near + 0.5 * torch.exp(-distance.square() / (2 * variance))
    near = near.tril()
    close(found, near / near.sum(-1, keepdim=True))
    close(found @ module._rows(X, 0)[-1], module._mix(q, module._rows(X, 0), mask=ph.causal(), score=None))


def test_far_apart_components_stay_finite() -> None:
    module = built(variances=(0.01, 100.0))
    y = module(100 * X, mask=ph.causal())
    y.sum().backward()
    assert bool(torch.isfinite(y).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in module.parameters())


def test_cost_and_cache() -> None:
    plain = built("mha").cost(64)
    mine, apart = built().cost(64), built(keys="separate").cost(64)
    assert mine.parameters == plain.parameters + 4 * 2 + 2 * 4 * 8
    assert apart.parameters == plain.parameters + 4 * 2 + 32 * 32
    assert mine.kv_bytes_per_token == plain.kv_bytes_per_token + 4 * 8
    assert mine.values == 2 * plain.values
    assert mine.scores * 8 == 2 * plain.scores * 9
    assert apart.projections == plain.projections + 2 * 64 * 32 * 32


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"normalizer must be softmax\(\) where keys are mixtures"):
        built(normalizer=ph.entmax(1.5))
    with pytest.raises(ConfigError, match="weight_map must be None where keys are mixtures"):
        built(weight_map=ph.head_mix(torch.eye(4)))
    with pytest.raises(ConfigError, match="variances must be 2 numbers or None"):
        built(variances=(1.0,))
    with pytest.raises(ConfigError, match="components must be"):
        built(components=0)
    with pytest.raises(UnknownName, match="shifted"):
        built(keys="shift")
    module = built()
    with pytest.raises(ConfigError, match="scale must be None where keys are mixtures"):
        MixtureKeys(module.projection, module.output, variances=(1.0, 2.0), scale=2.0)
