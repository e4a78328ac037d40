"""What must hold of Gaussian adaptive attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from polyhead.errors import ConfigError
from polyhead.nn.gaussian import gaussian_weights, importance_factor

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build("gaussian_adaptive", **{"dim": 32, "heads": 4, **config}, **F64).eval()


def test_weights_of_a_head_sum_to_one() -> None:
    module = built()
    w = module.weights(X)
    assert bool((w >= 0).all())
    close(w.unflatten(-1, (4, 8)).sum(-1), torch.ones(2, 11, 4, **F64))
    close(module(X), X * w)
    # the last head takes what remains
    w = built(dim=32, heads=5).weights(X)
    close(w[..., 24:].sum(-1), torch.ones(2, 11, **F64))


def test_wide_gaussians_weigh_all_alike() -> None:
    module = built(gaussians=1)
    nn.init.constant_(module.spread, 1e9)
    close(module(X), X / 8)


def test_it_is_a_product_of_densities_over_their_sum() -> None:
    offset, spread = torch.tensor([0.1, -0.4], **F64), torch.tensor([0.8, -1.3], **F64)
    x = X[0]
    shifted = x[..., None] - x.mean(-1)[:, None, None] - offset
    z = shifted / x.std(-1)[:, None, None]
    width = (spread.square() + 1e-4).sqrt()
    density = torch.distributions.Normal(0.0, width).log_prob(z).exp().prod(-1)
    close(gaussian_weights(x, offset, spread), density / density.sum(-1, keepdim=True), 1e-6)


def test_without_offsets_scale_and_shift_of_the_inputs_do_not_matter() -> None:
    module = built()
    close(module.weights(3 * X + 7), module.weights(X), 1e-6)


def test_features_of_a_head_may_be_reordered_and_tokens_do_not_meet() -> None:
    module = built()
    nn.init.normal_(module.offset)
    order = torch.cat([torch.randperm(8) + 8 * h for h in range(4)])
    close(module(X[..., order]), module(X)[..., order])
    changed = X.clone()
    changed[:, 3] += 1
    assert (module(changed) != module(X)).any(-1).any(0).nonzero().tolist() == [[3]]


def test_along_time_padding_does_not_count() -> None:
    offset, spread = torch.tensor([0.3], **F64), torch.tensor([0.7], **F64)
    real = torch.arange(11) < torch.tensor([[11], [6]])
    poisoned = X.masked_fill(~real[..., None], float("nan"))
    found = gaussian_weights(poisoned, offset, spread, dim=1, real=real[..., None])
    close(found[1, :6], gaussian_weights(X[1:, :6], offset, spread, dim=1)[0])
    assert found[1, 6:].abs().max() == 0
    close(found.sum(1), torch.ones(2, 32, **F64))


def test_the_importance_factor_finds_what_lies_near_the_mean() -> None:
    x = torch.randn(500, 64, **F64)
    x[:, :3] *= 0.05
    factor = importance_factor(gaussian_weights(x, torch.zeros(1), torch.ones(1)))
    assert factor.shape == (64,)
    assert factor.min() == 0
    assert factor.max() == 1
    assert set(factor.topk(3).indices.tolist()) == {0, 1, 2}


def test_cost_and_refusals() -> None:
    cost = built(gaussians=3).cost(64)
    assert (cost.parameters, cost.flops, cost.cache_bytes) == (2 * 3 * 4, 0, 0)
    with pytest.raises(ConfigError, match="heads must be at most dim=4, which they share out; got 5"):
        built(dim=4, heads=5)
    with pytest.raises(ConfigError, match="gaussians must be"):
        built(gaussians=0)
