"""What must hold of affine-scaled attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError
from polyhead.nn.visible_mean import visible_mean

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "affine_scaled", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def plain_of(module: nn.Module) -> nn.Module:
    plain = built("grouped_query", kv_heads=module.kv_heads)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k not in _OWN})
    return plain


_OWN = ("row_scale.weight", "row_scale.bias", "average")


def stirred(**config: object) -> nn.Module:
    module = built(**config)
    with torch.no_grad():
        module.row_scale.weight.normal_()
        module.average.copy_(torch.tensor([0.2, 0.5, 0.7, 1.0]))
    return module


def heads_of(module: nn.Module, *args: object, **call: object) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = module.output.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    module(*args, **call)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("options", [{"shift": False}, {"kv_heads": 2, "bias": True}], ids=str)
def test_other_options_keep_the_contract(options: dict[str, object]) -> None:
    assert not broken_rules("affine_scaled", **options)


def test_scales_of_one_are_softmax_attention() -> None:
    module = built()
    with torch.no_grad():
        module.row_scale.bias.fill_(60.0)
        module.average.fill_(1.0)
    close(module(X, mask=ph.causal()), plain_of(module)(X, mask=ph.causal()))


def test_it_starts_as_half_of_softmax_attention_and_a_constant_scale_stays_one() -> None:
    module = built(kv_heads=2)
    close(module(X, mask=ph.causal()), plain_of(module)(X, mask=ph.causal()) / 2)


@pytest.mark.parametrize("mask", [None, ph.causal(), ph.window(2), ph.causal() & ph.blocks(3)], ids=repr)
def test_rows_sum_to_the_average_whatever_the_scale(mask: ph.Mask | None) -> None:
    module = stirred()
    with torch.no_grad():  # all values are one
        module.projection.value.weight.zero_()
        module.projection.value.bias = nn.Parameter(torch.ones(32, **F64))
    padding = torch.arange(11) < torch.tensor([[11], [7]])
    found = heads_of(module, X, mask=mask, padding=padding)[0]
    close(found, module.average.view(4, 1, 1).expand_as(found))


def test_weights_that_a_regularizer_reads_are_those_of_the_heads() -> None:
    module = stirred(kv_heads=2, regularizers=(ph.nn.attention_diversification(),)).train()
    with torch.no_grad():
        q, rows = module._queries(X, 0), module._rows(X, 0)
        weights = module._weights(q, rows, mask=ph.causal(), score=None, scale=None)
        values = rows[1].repeat_interleave(2, dim=1)
        close(weights @ values, module._mix(q, rows, mask=ph.causal(), score=None, scale=None))
    module(X, mask=ph.causal())
    assert ph.nn.auxiliary_losses(module)


def test_a_weight_may_be_negative() -> None:
    """Two keys, P = (0.1, 0.9), α = 0.8 and an average of 0.4 give (-0.12, 0.52)."""
    module = built(heads=1, head_dim=2, dim=2)
    with torch.no_grad():
        module.projection.query.weight.copy_(torch.eye(2))
        module.projection.key.weight.copy_(
            torch.tensor([[0.0, torch.log(torch.tensor(9.0)) * 2**0.5], [0, 0]])
        )
        module.projection.value.weight.copy_(torch.eye(2))
        module.row_scale.bias.fill_(torch.logit(torch.tensor(0.8, **F64)))
        module.average.fill_(0.4)
    x = torch.tensor([[[1.0, 0.0]]], **F64)
    found = heads_of(module, x, torch.eye(2, **F64)[None])
    close(found[0, 0, 0], torch.tensor([-0.12, 0.52], **F64), 1e-7)


def test_the_average_follows_real_queries_in_training_only() -> None:
    module = stirred().train()
    before = module.average.clone()
    padding = torch.arange(11) < torch.tensor([[11], [4]])
    alpha = torch.sigmoid(module.row_scale(X))[padding].mean(0).detach()
    y = module(X, padding=padding)
    close(module.average, 0.9 * before + 0.1 * alpha)
    after = module.average.clone()
    module(X)  # a second pass before the gradient of the first
    y.sum().backward()
    assert not module.average.requires_grad
    module.average.copy_(after)
    close(y[0], module.eval()(X, padding=padding)[0])
    close(module.average, after)
    assert "average" in module.state_dict()
    assert built(shift=False).average is None


def test_the_mean_of_what_is_seen() -> None:
    v = torch.randn(2, 3, 7, 4, **F64)
    real = torch.arange(7) >= torch.tensor([[0], [3]])
    for mask in (None, ph.causal(), ph.causal() & ph.padding(real), ph.padding(real), ph.window(2)):
        for queries in (1, 7, 9):
            found = visible_mean(v, queries, mask)
            want = ph.attend(torch.zeros(2, 3, queries, 4, **F64), torch.zeros_like(v), v, mask=mask)
            close(found.expand_as(want), want)


def test_long_sums_of_halves_stay_exact() -> None:
    v = torch.ones(1, 1, 5000, 1, dtype=torch.bfloat16)
    assert bool((visible_mean(v, 5000, ph.causal()) == 1).all())


def test_cost_and_refusals() -> None:
    mine, other = built().cost(64, batch=3), built("mha").cost(64, batch=3)
    assert mine.parameters == other.parameters + 4 * 33
    assert mine.projections == other.projections + 2 * 3 * 64 * 32 * 4
    assert mine.cache_bytes == other.cache_bytes
    with pytest.raises(ConfigError, match=r"momentum must be .* below 1, got 1"):
        built(momentum=1.0)
    with pytest.raises(ConfigError, match="shift must be True or False; got 1"):
        built(shift=1)
