"""Heads of a whole model that are switched off in training, and how much each matters to a loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn import HeadMask, head_importance


class Model(nn.Module):
    """Three attention layers of different kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        kinds = ("mha", "grouped_query", "multi_query")
        self.layers = nn.ModuleList(
            ph.build(k, dim=16, heads=h) for k, h in zip(kinds, (4, 8, 2), strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, mask=ph.causal())
        return x


X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))


def masked(heads: HeadMask) -> list[tuple[int, int]]:
    return [(n, h) for n, gate in enumerate(heads.gates) for h, on in enumerate(gate.tolist()) if not on]


def test_exactly_so_many_heads_are_masked_and_each_equally_often() -> None:
    heads = HeadMask(Model(), 5, generator=torch.Generator().manual_seed(0))
    assert heads.heads == 14
    counts, draws = np.zeros(14), 3000
    for _ in range(draws):
        heads.draw()
        assert len(masked(heads)) == 5
        counts += ~torch.cat(heads.gates).numpy()
    share = 5 / 14
    assert np.abs(counts / draws - share).max() < 4.5 * math.sqrt(share * (1 - share) / draws)


def test_nothing_masked_changes_nothing_and_evaluation_never_masks() -> None:
    model = Model()
    plain = model(X)
    with HeadMask(model, 0) as heads:
        heads.draw()
        assert torch.equal(model(X), plain)
    with HeadMask(model, 6) as heads:
        heads.draw()
        assert not torch.equal(model(X), plain)
        model.eval()
        assert torch.equal(model(X), plain)
        model.train()
    assert torch.equal(model(X), plain)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_masked_heads_get_no_gradient_and_the_others_do() -> None:
    model = Model()
    with HeadMask(model, 2) as heads:
        heads.mask([(0, 1), (0, 3), (2, 0)])
        model(X).square().sum().backward()
    own = model.layers[0]
    for part in (own.projection.query, own.projection.key, own.projection.value):
        size = part.weight.grad.unflatten(0, (4, 4)).abs().amax((1, 2))
        assert ((size == 0).nonzero().flatten().tolist()) == [1, 3]
    size = own.output.weight.grad.unflatten(1, (4, 4)).abs().amax((0, 2))
    assert ((size == 0).nonzero().flatten().tolist()) == [1, 3]


def test_a_masked_head_contributes_nothing_and_a_layer_without_heads_gives_its_bias() -> None:
    torch.manual_seed(0)
    module = ph.build("mha", dim=16, heads=4, bias=True)
    nn.init.normal_(module.output.bias)
    with HeadMask(module, 4) as heads:
        heads.draw()
        torch.testing.assert_close(module(X), module.output.bias.expand(3, 7, 16))
    with HeadMask(module, 1, rescale=True) as heads:
        heads.mask([(0, 2)])
        found = module(X)
    without = ph.build("mha", dim=16, heads=4, bias=True)
    without.load_state_dict(module.state_dict())
    with torch.no_grad():
        without.output.weight[:, 8:12] = 0
        expected = (without(X) - module.output.bias) * (4 / 3) + module.output.bias
    torch.testing.assert_close(found, expected)


def test_importance_is_the_product_of_output_and_gradient() -> None:
    model, kept = Model(), []

    def keep(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        given[0].retain_grad()
        kept.append(given[0])

    handles = [layer.output.register_forward_pre_hook(keep) for layer in model.layers]
    model(X).pow(3).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    found = head_importance(model, lambda: model(X).pow(3).sum())
    for values, heads in zip(found.values, kept, strict=True):
        expected = (heads * heads.grad).sum((-1, -2)).abs().sum(0)
        np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_most_important_heads_are_masked() -> None:
    model = Model()
    with HeadMask(model, 4) as heads:
        heads.draw()
        importance = heads.draw_important(lambda: model(X).square().mean())
        alone = head_importance(Model(), lambda: model(X).square().mean())
        assert set(masked(heads)) == set(importance.top(4))
        assert alone.flat.sum() == 0  # another model's loss: none of its heads takes part
        heads.clear()
        np.testing.assert_allclose(
            importance.flat, head_importance(model, lambda: model(X).square().mean()).flat, rtol=1e-5
        )


def test_hooks_go_when_a_step_fails() -> None:
    model = Model()
    with pytest.raises(ZeroDivisionError), HeadMask(model, 3):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        head_importance(model, lambda: 1 / 0)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_makes_no_sense_is_refused() -> None:
    model = Model()
    with pytest.raises(ConfigError, match="masked must be at most 14; got 15"):
        HeadMask(model, 15)
    with pytest.raises(ConfigError, match="model must hold MultiHeadAttention modules; Linear has none"):
        HeadMask(nn.Linear(2, 2), 1)
    with pytest.raises(ConfigError, match=r"heads must be among the layers \(4, 8, 2\); got \(0, 4\)"):
        HeadMask(model, 1).mask([(0, 4)])
    with pytest.raises(ConfigError, match="loss must return a scalar tensor"):
        head_importance(model, lambda: model(X))
    heads = HeadMask(model, 1)
    with heads, pytest.raises(ConfigError, match="in use already"), heads:
        pass
    model.layers[1].output = nn.Sequential(nn.Flatten(1, 2), nn.Identity())
    with HeadMask(model, 1) as heads:
        heads.mask([(1, 0)])
        model.layers[1].heads = 9
        with pytest.raises(ShapeError, match=r"layers\.1: its output must take heads \(B, 9, L, Dv\)"):
            model(X)
