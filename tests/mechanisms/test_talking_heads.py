"""What must hold of talking heads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from polyhead.attend.weight_maps import WeightMap
from polyhead.errors import ConfigError

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "talking_heads", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


def stirred(seed: int = 0, **config: object) -> nn.Module:
    module = built(seed=seed, **config)
    with torch.no_grad():
        for mixing in (module.logit_mixing, module.weight_mixing):
            if mixing is not None:
                mixing.weight.copy_(torch.randn(4, 4, **F64))
    return module


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_starts_as_grouped_query_attention(kv_heads: int) -> None:
    talking, plain = built(kv_heads=kv_heads), built("grouped_query", kv_heads=kv_heads)
    plain.load_state_dict({k: v for k, v in talking.state_dict().items() if "mixing" not in k})
    close(talking(X, mask=ph.causal()), plain(X, mask=ph.causal()))


@pytest.mark.parametrize("options", [{}, {"logits": False}, {"weights": False}, {"kv_heads": 2}], ids=str)
def test_every_form_equals_the_twin(options: dict[str, object]) -> None:
    module = stirred(**options)
    state, kv_heads = module.state_dict(), module.config.kv_heads
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    want = ph.reference("talking_heads")(X, parameters=state, heads=4, kv_heads=kv_heads, mask=mask)
    close(module(X, mask=ph.causal()), want)


def test_a_matrix_of_a_permutation_swaps_the_maps_of_heads() -> None:
    """P permutes logits and R permutes back: the heads keep their values, and nothing has changed."""
    talking, plain = built(), built("mha")
    plain.load_state_dict({k: v for k, v in talking.state_dict().items() if "mixing" not in k})
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        talking.logit_mixing.weight.copy_(torch.eye(4)[order])
        talking.weight_mixing.weight.copy_(torch.eye(4)[order].T)
    close(talking(X), plain(X))


def test_mixed_weights_need_not_sum_to_one_and_mixed_logits_do() -> None:
    for options, sums in (({"weights": False}, True), ({"logits": False}, False)):
        module = stirred(**options)
        with torch.no_grad():  # every value is one: the outputs of the heads are sums of weights
            module.projection.value.weight.zero_()
            module.projection.value.bias = nn.Parameter(torch.ones(32, **F64))
        heads = []
        module.output.register_forward_pre_hook(lambda m, inputs, heads=heads: heads.append(inputs[0]))
        module(X)
        assert torch.allclose(heads[0], torch.ones_like(heads[0])) is sums
        if not sums:
            row = module.weight_mixing.weight.sum(1).view(1, 4, 1, 1)
            close(heads[0], row.expand_as(heads[0]))


def test_one_head_learns_from_the_gradient_of_another() -> None:
    module = stirred()
    heads = []
    module.output.register_forward_pre_hook(lambda m, inputs: heads.append(inputs[0]))
    module(X, mask=ph.causal())
    (flow,) = torch.autograd.grad(heads[0][:, 0].sum(), module.projection.query.weight)
    assert (flow.unflatten(0, (4, 8)).abs().amax((1, 2)) > 0).all()


def test_biases_of_the_logits_are_mixed_with_them() -> None:
    module = stirred(score=ph.alibi(4))
    eye = stirred(score=ph.alibi(4), logits=False)
    eye.load_state_dict({k: v for k, v in module.state_dict().items() if "logit_mixing" not in k})
    assert (module(X) - eye(X)).abs().max() > 1e-3
    scores = module._score().scores
    assert [type(s).__name__ for s in scores] == ["ALiBi", "HeadMix"]


def test_cost_counts_the_matrices() -> None:
    talking, plain = built().cost(64, batch=3), built("mha").cost(64, batch=3)
    assert talking.parameters == plain.parameters + 2 * 16
    assert talking.scores == plain.scores + 2 * 3 * 64 * 64 * 16
    assert talking.values == plain.values + 2 * 3 * 64 * 64 * 16
    assert talking.cache_bytes == plain.cache_bytes


def test_a_window_of_cached_tokens_with_positions() -> None:
    module = stirred(position=ph.nn.rope(), score=ph.alibi(4)).eval()
    mask = ph.causal() & (ph.window(4) | ph.sink(2))
    with torch.no_grad():
        full = module(X, mask=mask)
        cache = module.new_cache(2, window=5, sinks=2)
        close(torch.cat([module(x, mask=mask, cache=cache) for x in X.split(1, dim=1)], dim=1), full)


class Fading(WeightMap):
    """A weight map that goes by positions."""

    def apply(self, weights: torch.Tensor, tile: ph.Tile) -> torch.Tensor:
        return weights * torch.exp(-(tile.i - tile.j).abs().to(weights) / 3)


def test_weight_maps_go_by_the_true_positions_of_cached_tokens() -> None:
    module = built("mha", weight_map=Fading(), position=ph.nn.rope()).eval()
    mask = ph.causal() & (ph.window(4) | ph.sink(2))
    with torch.no_grad():
        full = module(X, mask=mask)
        for cache in (module.new_cache(2), module.new_cache(2, window=5, sinks=2)):
            close(torch.cat([module(x, mask=mask, cache=cache) for x in X.split(1, dim=1)], dim=1), full)
        cross = module(X, X, mask=ph.causal())
        cache = module.new_context_cache(X, queries=11)
        steps = [module(x, mask=ph.causal(), cache=cache) for x in X.split(4, dim=1)]
        close(torch.cat(steps, dim=1), cross)


def test_any_mechanism_takes_a_weight_map() -> None:
    mix = torch.randn(4, 4, **F64, requires_grad=True)
    module = built("grouped_query", kv_heads=2, weight_map=(ph.head_mix(mix),))
    talking = stirred(kv_heads=2, logits=False)
    talking.load_state_dict(
        {k.replace("weight_map.tensor0", "weight_mixing.weight"): v for k, v in module.state_dict().items()}
    )
    assert "weight_map.tensor0" in dict(module.named_parameters())
    close(module(X, mask=ph.causal()), talking(X, mask=ph.causal()))
    assert ph.from_json(ph.to_json(module.config)) == module.config
    cache = module.new_cache(2)
    steps = [module(x, mask=ph.causal(), cache=cache) for x in X.split(3, dim=1)]
    close(torch.cat(steps, dim=1), module(X, mask=ph.causal()))
    with pytest.raises(ConfigError, match="weight_map must be a WeightMap or a sequence of them, got 3"):
        built("mha", weight_map=3)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="one of logits and weights must be True"):
        built(logits=False, weights=False)
    with pytest.raises(ConfigError, match="weights must be True or False; got 1"):
        built(weights=1)
    with pytest.raises(
        ConfigError, match="kv_heads must divide heads=4; got kv_heads=3; allowed are 1, 2, 4"
    ):
        built(kv_heads=3)
