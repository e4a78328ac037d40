"""What must hold of neural attention search."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.attend.masks import densify, until
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.nn import rope
from polyhead.nn.token_roles import kept_pairs, spans_of, stops_of

F64 = {"dtype": torch.float64}
X = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(0), **F64)
CAUSAL = ph.causal()
GLOBAL, LOCAL, SLIDING = range(3)


def built(name: str = "neural_attention_search", **options: Any) -> Any:
    small = {"window": 4} if name == "neural_attention_search" else {}
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **small, **options}, **F64).eval()


def always(module: Any, role: int) -> Any:
    """The module with one role for all tokens."""
    module.roles_of = lambda x: torch.eye(3, **F64)[role].expand(len(x), module.kv_heads, x.shape[1], 3)
    return module


def drawn(length: int = 30) -> Tensor:
    """Roles `(2, 3, L, 3)`, some tokens without any."""
    kinds = torch.randint(3, (2, 3, length), generator=torch.Generator().manual_seed(length))
    roles = torch.eye(3, **F64)[kinds]
    roles[1, :, :4] = 0.0
    return roles


def pairs_of(roles: Tensor, window: int) -> Tensor:
    """M by the formula, product and all, `(B, G, L, L)`."""
    length = roles.shape[2]
    found = []
    for i in range(length):
        for j in range(length):
            still = (1 - roles[:, :, j + 1 : i, GLOBAL]).prod(-1)
            near = float(i <= j + window)
            m = roles[:, :, j, GLOBAL] + roles[:, :, j, LOCAL] * still + roles[:, :, j, SLIDING] * near
            found.append(m if j <= i else m * 0)
    return torch.stack(found, dim=-1).unflatten(-1, (length, length))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [{"window": 2, "kv_heads": 2, "compiled": True}, {"window": 0, "bias": True}],
    ids=str,
)
def test_small_windows_keep_the_contract(options: dict[str, Any]) -> None:
    assert not broken_rules("neural_attention_search", **options)


def test_roles_that_are_all_alike() -> None:
    for role, mask in (
        (GLOBAL, None),
        (LOCAL, None),  # but for the first, which is global, no other ends it
        (SLIDING, ph.window(4) | ph.sink(1)),
    ):
        module = always(built(kv_heads=2, position=rope(100.0)), role)
        plain = built("grouped_query", kv_heads=2, position=rope(100.0), mask=mask)
        plain.load_state_dict({n: t for n, t in module.state_dict().items() if n in plain.state_dict()})
        close(module(X, mask=CAUSAL), plain(X, mask=CAUSAL))


@pytest.mark.parametrize("window", [0, 3, 40])
def test_the_mask_is_the_formula_s(window: int) -> None:
    roles = drawn()
    stop = stops_of(spans_of(roles), torch.arange(30), window)
    found = densify(CAUSAL & until(stop), batch=2, heads=3, queries=30, keys=30)
    assert torch.equal(found.to(roles.dtype), pairs_of(roles, window))
    assert 0.1 < found.double().mean() < 0.5


@pytest.mark.parametrize("window", [0, 3, 40])
def test_the_share_that_is_read_and_its_gradient_are_the_formula_s(window: int) -> None:
    roles = drawn().requires_grad_()
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1, :4] = False
    found = kept_pairs(spans_of(roles), window, real)
    wanted = (pairs_of(roles, window) * real[:, None, :, None]).sum((2, 3))
    close(found, wanted)
    there = (roles.detach().sum(-1, keepdim=True) > 0).to(roles.dtype)
    for f, w in ((found, wanted), (found.sin(), wanted.sin())):
        pair = (torch.autograd.grad(y.sum(), roles, retain_graph=True)[0] * there for y in (f, w))
        close(*pair)


def test_training_reads_what_evaluation_would_read_with_the_same_roles() -> None:
    """The weights over all pairs, mapped, are the softmax over those that are read."""
    module = built(kv_heads=2)
    y = module(X, mask=CAUSAL)
    assert y.requires_grad  # so it went by the weights
    with torch.no_grad():
        close(module(X, mask=CAUSAL), y.detach())


def test_roles_learn_from_the_task_and_from_the_price() -> None:
    module = built(kv_heads=2, price=0.5, window=0).train()
    torch.manual_seed(1)
    module(X, mask=CAUSAL).square().sum().backward()
    by_task = module.roles.weight.grad.clone()
    assert by_task.abs().amax(1).min() > 0
    module.zero_grad()
    torch.manual_seed(1)
    module(X, mask=CAUSAL)
    (loss,) = ph.auxiliary_losses(module).values()
    assert 0 < loss.item() < 0.5
    loss.backward()
    assert module.roles.weight.grad.abs().amax(1).min() > 0
    steps = torch.optim.SGD([module.roles.weight], lr=30.0)
    shares = []
    for _ in range(30):
        steps.zero_grad()
        module(X, mask=CAUSAL)
        (loss,) = ph.auxiliary_losses(module).values()
        loss.backward()
        steps.step()
        shares.append(loss.item())
    assert sum(shares[-5:]) < 0.7 * sum(shares[:5])


def test_roles_send_nothing_into_their_inputs() -> None:
    module = built()
    x = X.clone().requires_grad_()
    assert torch.autograd.grad(module.roles_of(x).sum(), x, allow_unused=True)[0] is None


@pytest.mark.parametrize("left", [False, True])
def test_a_cache_that_forgets_by_role_gives_the_same(left: bool) -> None:
    module = built(kv_heads=2, position=rope(100.0))
    places = torch.arange(37)
    real = (places >= torch.tensor([0, 9])[:, None]) if left else torch.ones(2, 37, dtype=torch.bool)
    with torch.no_grad():
        whole = module(X, mask=CAUSAL, padding=real)
        roles = module.roles_of(X).argmax(-1)
        for chunks in ([1] * 37, [20, *[1] * 17], [3, 30, 4]):
            cache = module.new_cache(2, forget=True)
            parts = []
            for x, own in zip(X.split(chunks, dim=1), real.split(chunks, dim=1), strict=True):
                parts.append(module(x, mask=CAUSAL, cache=cache, padding=None if own.all() else own))
            close(torch.cat(parts, dim=1)[real], whole[real])
            first = real.int().argmax(1)
            for b in range(2):
                for g in range(2):
                    kinds = [GLOBAL if t == first[b] else int(roles[b, g, t]) for t in range(37)]
                    marks = [t for t in range(first[b], 37) if kinds[t] == GLOBAL]
                    held = len(marks)
                    held += sum(kinds[t] == LOCAL and t > marks[-1] for t in range(first[b], 37))
                    held += sum(kinds[t] == SLIDING and t + 4 >= 37 for t in range(first[b], 37))
                    assert int(cache.held[b, g]) == held < 30


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        ({"select": ph.select(ph.mean_keys(), ph.keep_blocks(1))}, "select must be None in neural_attention"),
        ({"mask": ph.window(3)}, "mask must be None: calls are causal"),
        ({"window": -1}, "window must be at least 0; got -1"),
        ({"price": -1.0}, "price must be"),
        ({"normalizer": ph.entmax(1.5)}, r"normalizer must be softmax\(\) where roles are learned"),
        ({"weight_map": ph.head_mix(torch.eye(4))}, "weight_map must be None where roles are learned"),
        ({"context_dim": 16}, "context_dim must be left out"),
    ):
        with pytest.raises(ConfigError, match=words):
            built(**options)
    with pytest.raises(UnsupportedPattern, match=r"what comes later; pass mask=causal\(\)"):
        built()(X)


def test_it_costs_three_numbers_a_token_and_head() -> None:
    own, plain = built(kv_heads=2).cost(64), built("grouped_query", kv_heads=2).cost(64)
    assert own.parameters == plain.parameters + 3 * 32 * 2
    assert own.kv_bytes_per_token == plain.kv_bytes_per_token + 3 * 2 * 8
    same = {"parameters": 0, "projections": 0, "kv_bytes_per_token": 0, "cache_bytes": 0}
    assert dataclasses.replace(own, **same) == dataclasses.replace(plain, **same)
