"""What the paper of token-aware average pooling says must hold, paper 126."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, ShapeError, UnsupportedPattern
from polyhead.nn.token_pooling import TokenPooling

F64 = {"dtype": torch.float64}
X = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "tap_adl", **config: object) -> nn.Module:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def test_one_scale_is_plain_attention() -> None:
    plain = built("mha")
    pooled = built(scales=1)
    assert pooled.cost(9) == plain.cost(9)
    plain.load_state_dict(pooled.state_dict())
    assert torch.equal(pooled(X, mask=ph.causal()), plain(X, mask=ph.causal()))
    cache = pooled.new_cache(2)
    steps = [pooled(x, mask=ph.causal(), cache=cache) for x in X.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), plain(X, mask=ph.causal()))


@pytest.mark.parametrize("layout", ["around", (3, 4)])
def test_tokens_around_equal_the_twin(layout: object) -> None:
    module = built(layout=layout, scales=3)
    module.train()(X)  # so that the statistics of the batch are some
    module.eval()
    for real in (None, torch.arange(12) >= torch.tensor([[0], [3]])):
        expected = ph.reference("tap_adl")(
            X, parameters=module.state_dict(), heads=4, kv_heads=4, scales=3, layout=layout, temperature=1.0,
            padding=real,
        )  # fmt: skip
        torch.testing.assert_close(module(X, padding=real), expected)


def test_a_class_token_stands_before_the_grid_and_is_not_blended() -> None:
    x = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(1), **F64)
    module = built(layout=(3, 4), scales=3, class_token=True)
    module.train()(x)
    module.eval()
    for real in (None, torch.arange(13) >= torch.tensor([[0], [3]])):
        expected = ph.reference("tap_adl")(
            x, parameters=module.state_dict(), heads=4, kv_heads=4, scales=3, layout=(3, 4), temperature=1.0,
            class_token=True, padding=real,
        )  # fmt: skip
        torch.testing.assert_close(module(x, padding=real), expected)
    blended = module.pooling(x)
    assert torch.equal(blended[:, 0], x[:, 0])
    without = built(layout=(3, 4), scales=3)
    without.load_state_dict(module.state_dict())
    torch.testing.assert_close(blended[:, 1:], without.pooling(x[:, 1:]), rtol=0, atol=0)
    with pytest.raises(ShapeError, match="those of the grid and a class token before them; got 12"):
        module(x[:, 1:])
    with pytest.raises(ConfigError, match="it takes a grid, layout=\\(height, width\\)"):
        built(layout="around", class_token=True)


@pytest.mark.parametrize("layout", ["past", "around", (3, 4)])
def test_weights_of_the_scales_sum_to_one(layout: object) -> None:
    weights = built(layout=layout).pooling.weights(X)
    assert weights.shape == (2, 12, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 12, **F64))


def test_a_constant_image_stays_within_and_shrinks_at_the_borders() -> None:
    pooling = TokenPooling(8, 3, layout=(7, 9), **F64).eval()
    image = torch.randn(8, **F64).expand(1, 63, 8)
    share = (pooling(image) / image).unflatten(1, (7, 9))
    inside = share[:, 2:-2, 2:-2]
    torch.testing.assert_close(inside, torch.ones_like(inside))
    assert share[:, 0].max() < 1
    assert share[:, :, -1].max() < 1
    # at a corner four of nine neighbours are inside, at any scale
    m = pooling.weights(image).unflatten(1, (7, 9))[0, 0, 0]
    torch.testing.assert_close(share[0, 0, 0, 0], m[0] + 4 / 9 * (m[1] + m[2]))


def test_a_grid_knows_columns_from_rows() -> None:
    pooling = TokenPooling(4, 2, layout=(3, 4), **F64).eval()
    x = torch.zeros(1, 12, 4, **F64)
    x[0, 5] = 1.0  # row 1, column 1: all of rows 0..2 and columns 0..2 see it
    moved = pooling(x)[0].abs().amax(-1).view(3, 4)
    assert (moved[:, :3] > 0).all()
    assert (moved[:, 3] == 0).all()


def test_layouts_that_look_ahead_are_no_causal_attention() -> None:
    for layout in ("around", (3, 4)):
        module = built(layout=layout)
        module(X)
        module(X, mask=ph.window(3, 2))
        with pytest.raises(UnsupportedPattern, match='tap_adl with layout=.* take layout="past"'):
            module(X, mask=ph.causal() & ph.window(3))
        with pytest.raises(UnsupportedPattern, match="neither a causal mask nor a cache"):
            module(X, cache=module.new_cache(2))
    with pytest.raises(ShapeError, match="x must have 3·4 tokens, those of the grid; got 11"):
        built(layout=(3, 4))(X[:, :11])


def test_batch_statistics_are_learned_on_a_grid() -> None:
    module = built(layout=(3, 4)).train()
    module(X).sum().backward()
    assert module.pooling.norm.running_mean.abs().max() > 0
    assert not any("running" in name for name in built().state_dict())


@torch.no_grad()
def test_what_the_cache_remembers() -> None:
    module = built()
    cache = module.new_cache(2, max_length=40)
    cost = module.cost(40, batch=2)
    assert cost.state_bytes == (6 + 16) * (32 * 8 + 1)
    assert cache.nbytes() == cost.cache_bytes
    long = torch.cat([X, X, X], dim=1)
    module(long, mask=ph.causal(), cache=cache)
    assert cache.nbytes() == cost.cache_bytes
    cache.crop(20)
    again = module(long[:, 20:], mask=ph.causal(), cache=cache)
    torch.testing.assert_close(again, module(long, mask=ph.causal())[:, 20:])
    with pytest.raises(ConfigError, match="at most 16 tokens can be taken back"):
        cache.crop(19)
    with pytest.raises(ConfigError, match="make it with new_cache of this module; got a GrowingCache"):
        module(X, cache=built("mha").new_cache(2))
    with pytest.raises(ShapeError, match=r"RecentInputs holds inputs of shape \(2, L, 32\)"):
        module(X[:1], cache=cache)


# ---- the loss ----


def loss(weights: torch.Tensor, threshold: float = 2.0, **real: torch.Tensor) -> torch.Tensor:
    return ph.nn.attention_diversification(threshold).losses(weights, **real)["diversification"]


def test_the_loss_equals_its_twin_and_lies_in_the_unit_interval() -> None:
    twin = ph.reference("attention_diversification")
    for seed, sharp in enumerate((0.5, 3.0, 10.0)):
        torch.manual_seed(seed)
        weights = (sharp * torch.randn(2, 3, 9, 11, **F64)).softmax(-1)
        found = loss(weights)
        torch.testing.assert_close(found, twin(weights))
        assert 0 <= found <= 1


def test_uniform_attention_costs_all_or_nothing() -> None:
    weights = torch.full((2, 3, 8, 8), 1 / 8, **F64)
    torch.testing.assert_close(loss(weights, 0.5), torch.tensor(1.0, **F64))
    assert loss(weights, 1.0) == 0
    assert loss(weights) == 0


def test_one_token_for_all_costs_one_and_one_each_costs_nothing() -> None:
    each = torch.eye(8, **F64)[torch.randperm(8)].expand(2, 3, 8, 8)
    assert loss(each) == 0
    same = torch.zeros(2, 3, 8, 8, **F64)
    same[..., 5] = 1.0
    torch.testing.assert_close(loss(same), torch.tensor(1.0, **F64))


def test_the_gradient_reaches_weights_above_the_threshold_only() -> None:
    torch.manual_seed(0)
    weights = (3 * torch.randn(1, 1, 6, 10, **F64)).softmax(-1).requires_grad_()
    (grad,) = torch.autograd.grad(loss(weights), weights)
    assert torch.isfinite(grad).all()
    row, column = weights > 0.2, weights.mean(2, keepdim=True) > 0.2
    assert (grad[~row & ~column] == 0).all()
    assert (grad[row & column] != 0).any()


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    part = (3 * torch.randn(1, 2, 6, 6, **F64)).softmax(-1)
    padded = torch.zeros(1, 2, 9, 9, **F64)
    padded[..., :6, :6] = part
    padded[..., 6:, :6] = 1 / 6
    real = torch.arange(9)[None] < 6
    torch.testing.assert_close(loss(padded, queries=real, keys=real), loss(part))


@pytest.mark.parametrize("name", ["mha", "multi_query", "talking_heads", "tap_adl", "weighted_grouped_query"])
def test_other_mechanisms_can_be_trained_with_it(name: str) -> None:
    module = built(name, regularizers=ph.nn.attention_diversification(1.2, weight=0.5), dropout=0.2)
    module.eval()(X, mask=ph.causal())
    assert ph.auxiliary_losses(module) == {}
    real = torch.arange(12) < torch.tensor([[12], [8]])
    module.train()(X, mask=ph.causal(), padding=real)
    (found,) = ph.auxiliary_losses(module).values()
    assert 0 < found <= 0.5
    found.backward()
    assert module.projection.key.weight.grad.abs().max() > 0
    module.eval()(X)
    assert ph.auxiliary_losses(module) == {}


def test_descending_it_spreads_the_attention() -> None:
    module = built("mha", regularizers=ph.nn.attention_diversification(0.5)).train()
    with torch.no_grad():
        module.projection.query.weight.mul_(4)
    steps = torch.optim.SGD(module.parameters(), lr=0.5)
    seen = []
    for _ in range(12):
        module(X)
        found = sum(ph.auxiliary_losses(module).values())
        seen.append(found.item())
        steps.zero_grad()
        found.backward()
        steps.step()
    assert seen[-1] < seen[0]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="regularizers must not read weights in SelectedHeads"):
        built("selective_mha_uoe", regularizers=ph.nn.attention_diversification())
    with pytest.raises(ConfigError, match="attention_diversification: threshold must be"):
        ph.nn.attention_diversification(-1.0)
    with pytest.raises(ConfigError, match='layout must be "past", "around", or'):
        built(layout="behind")
    with pytest.raises(ConfigError, match="layout: height must be at least 1; got 0"):
        built(layout=(0, 4))
    with pytest.raises(ConfigError, match="scales must be at least 1; got 0"):
        built(scales=0)
    module = built()
    with pytest.raises(UnsupportedPattern, match="tap_adl blends .* take mha for cross-attention"):
        module(X, X)
    with pytest.raises(UnsupportedPattern, match="tap_adl"):
        module.new_context_cache(X)


@pytest.mark.parametrize("options", [{"scales": 2, "kv_heads": 2}, {"scales": 6, "temperature": 0.5}])
def test_variants_keep_the_contract(options: dict) -> None:
    assert broken_rules("tap_adl", compiled=True, **options) == {}
