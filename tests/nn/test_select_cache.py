"""Decoding under `select=` with a cache: what is kept of the keys changes no number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend.selectors import Summaries

F64 = {"dtype": torch.float64}
X = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0), **F64)
OWN = ph.select(ph.key_bounds(), ph.keep_blocks(2), rows=1, cols=4, always=ph.window(0))


def built(name: str = "grouped_query", **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"kv_heads": 2} | options if name == "grouped_query" else options
    return ph.build(name, **{"dim": 32, "heads": 4, **options}, **F64).eval()


def decode(module: Any, cache: Any, x: Tensor, start: int, stop: int, real: Tensor | None = None) -> Tensor:
    def step(n: int) -> Tensor:
        padding = None if real is None else real[:, n : n + 1]
        return module(x[:, n : n + 1], mask=ph.causal(), cache=cache, padding=padding)

    return torch.cat([step(n) for n in range(start, stop)], 1)


def run(kept: bool, kind: dict[str, int], padded: bool) -> Tensor:
    module = built(select=OWN, position=ph.nn.rope(100.0))
    cache = module.new_cache(2, **kind)
    assert isinstance(cache.summaries, Summaries)
    if not kept:
        cache.summaries = None
    real = None
    if padded:
        real = torch.ones(2, 40, dtype=torch.bool)
        real[0, :5] = False
    first = module(X[:, :13], mask=ph.causal(), cache=cache, padding=None if real is None else real[:, :13])
    found = [first, decode(module, cache, X, 13, 20, real)]
    cache.crop(14)
    found.append(decode(module, cache, X.flip(1), 14, 22, real))
    cache.reorder(torch.tensor([1, 1]))
    found.append(decode(module, cache, X, 22, 27, real))
    cache = copy.deepcopy(cache)
    found.append(decode(module, cache, X, 27, 30, real))
    cache._tokens.streams[0][:, :, 3:6] *= -2
    found.append(decode(module, cache, X, 30, 33, real))
    cache.reset()
    found.append(decode(module, cache, X, 0, 9))
    return torch.cat(found, 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [{}, {"max_length": 40}], ids=str)
def test_the_numbers_are_those_worked_out_anew(kind: dict[str, int], padded: bool) -> None:
    with torch.no_grad():
        found, expected = run(True, kind, padded), run(False, kind, padded)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_gradients_go_through_a_cache_as_before() -> None:
    module, x = built(select=OWN), X.clone().requires_grad_()
    found = []
    for kept in (True, False):
        cache = module.new_cache(2)
        if not kept:
            cache.summaries = None
        y = torch.cat(
            [module(part, mask=ph.causal(), cache=cache) for part in x.split([20, 1, 1, 3, 1, 14], 1)], 1
        )
        found.append((y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_steps_look_at_new_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []
    rows = Summaries.rows

    def counted(own: Summaries, name: Any, size: int, keys: int, make: Any) -> Any:
        return rows(own, name, size, keys, lambda start: (starts.append(start), make(start))[1])

    monkeypatch.setattr(Summaries, "rows", counted)
    module = built(select=OWN)
    with torch.no_grad():
        cache = module.new_cache(2)
        module(X[:, :13], mask=ph.causal(), cache=cache)
        decode(module, cache, X, 13, 18)
        cache.crop(9)
        decode(module, cache, X, 9, 11)
        cache.reorder(torch.tensor([1, 0]))
        decode(module, cache, X, 11, 14)
        cache._tokens.streams[0].mul_(2)
        decode(module, cache, X, 14, 15)
        cache.reset()
        decode(module, cache, X, 0, 2)
    assert starts == [0, 12, 12, 12, 16, 16, 8, 8, 8, 12, 12, 0, 0, 0]
    plain = built().new_cache(2)
    assert plain.summaries is None


@pytest.mark.parametrize("name", ["mha", "decoupled_head", "entmax_attention", "talking_heads", "moba"])
def test_mechanisms(name: str) -> None:
    module = built(name, **({"block_size": 4, "top_k": 2} if name == "moba" else {"select": OWN}))
    found = []
    with torch.no_grad():
        for kept in (True, False):
            cache = module.new_cache(2)
            assert cache.summaries is not None
            if not kept:
                cache.summaries = None
            module(X[:, :13], mask=ph.causal(), cache=cache)
            found.append(decode(module, cache, X, 13, 30))
    torch.testing.assert_close(*found, rtol=0, atol=1e-13)
