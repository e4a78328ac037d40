"""What must hold of context broadcasting, as a layer and as a head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn import ContextBroadcast, context_broadcast

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)
REAL = torch.arange(11) < torch.tensor([[11], [7]])


def built(name: str = "context_broadcasting", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def test_the_layer_keeps_the_mean_and_halves_what_deviates_from_it() -> None:
    y, mean = context_broadcast(X), X.mean(1, keepdim=True)
    close(y.mean(1, keepdim=True), mean)
    close(y - mean, (X - mean) / 2)
    close(context_broadcast(X[:, :1]), X[:, :1])
    order = torch.randperm(11)
    close(context_broadcast(X[:, order]), y[:, order])
    close(context_broadcast(2 * X + X.flip(0)), 2 * y + y.flip(0))


def test_the_layer_is_a_uniform_head() -> None:
    for causal in (False, True):
        weights = torch.ones(11, 11, **F64).tril() if causal else torch.ones(11, 11, **F64)
        seen = weights * REAL[:, None].double()
        mean = seen / seen.sum(-1, keepdim=True) @ X
        found = context_broadcast(X, padding=REAL, causal=causal)
        close(found[REAL], ((X + mean) / 2)[REAL])
        scale = torch.randn(32, **F64)
        found = context_broadcast(X, padding=REAL, causal=causal, scale=scale)
        close(found[REAL], (X + scale * mean)[REAL])


def test_what_is_padded_does_not_count() -> None:
    poisoned = X.masked_fill(~REAL[..., None], float("nan"))
    close(context_broadcast(poisoned, padding=REAL)[1, :7], context_broadcast(X[1:, :7])[0])


def test_the_layer_with_a_learned_scale_starts_as_the_identity() -> None:
    layer = ContextBroadcast(32, **F64)
    close(layer(X), X)
    layer(X).sum().backward()
    close(layer.scale.grad, X.mean(1).sum(0) * 11)
    assert not list(ContextBroadcast().parameters())
    block = nn.Sequential(
        nn.Linear(32, 64, **F64), nn.GELU(), nn.Linear(64, 32, **F64), ContextBroadcast(causal=True)
    )
    changed = X.clone()
    changed[:, 6:] += 1
    close(block(changed)[:, :6], block(X)[:, :6])


def test_the_head_keeps_the_contract_with_other_options() -> None:
    assert not broken_rules("context_broadcasting", kv_heads=2, amount=0.5, bias=True)


def test_the_mechanism_starts_as_multi_head_attention() -> None:
    module, plain = built(), built("mha")
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k != "channels"})
    close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()))
    with torch.no_grad():
        module.channels.fill_(0.7)
    close(module(X), plain(X) + 0.7 * X.mean(1, keepdim=True))
    close(built(amount=0.7)(X), module(X))


def test_masked_heads_leave_the_uniform_one() -> None:
    module = built(amount=1.0).train()
    with ph.nn.HeadMask(module, masked=4) as heads:
        heads.draw()
        close(module(X), X.mean(1, keepdim=True).expand_as(X))


def test_the_cache_holds_the_inputs_too() -> None:
    mine, plain = built().cost(16), built("mha").cost(16)
    assert mine.kv_bytes_per_token == plain.kv_bytes_per_token + 32 * 8
    assert mine.parameters == plain.parameters + 32


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="context_dim must be dim=32"):
        built(context_dim=16)
    with pytest.raises(ConfigError, match="amount must be a finite number"):
        built(amount="half")
    with pytest.raises(ConfigError, match=r"scale must be a tensor \(32,\); got"):
        context_broadcast(X, scale=torch.ones(3))
    with pytest.raises(ShapeError, match="padding must be a bool tensor"):
        context_broadcast(X, padding=REAL.long())
    with pytest.raises(ShapeError, match="x must"):
        context_broadcast(X[0])
