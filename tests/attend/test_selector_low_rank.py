"""Scores of pairs by a learned map of low rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend import attend
from polyhead.attend.masks import densify
from polyhead.attend.selectors import Grid, choose
from polyhead.errors import ConfigError, ShapeError

F64 = {"dtype": torch.float64}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64)


def tables(width: int = 8, channels: int = 3, places: int = 30, rank: int = 5) -> dict[str, Tensor]:
    return {
        "queries": normal(channels, width, seed=1),
        "keys": normal(channels, width, seed=2),
        "tokens": normal(places, rank, seed=3),
        "basis": normal(places, rank, seed=4),
        "query_bias": normal(channels, seed=5),
        "key_bias": normal(channels, seed=6),
    }


def by_loops(q: Tensor, k: Tensor, t: dict[str, Tensor], real: Tensor, **cut: Any) -> Tensor:
    """A~ of one sequence and one head, number by number."""
    scale = cut.get("scale", len(t["queries"]) ** -0.5)
    found = torch.zeros(len(q), len(k), **F64)
    reduced = [t["keys"] @ x + t["key_bias"] for x in k]
    for i, x in enumerate(q):
        own = t["queries"] @ x + t["query_bias"]
        logits = [
            scale * sum(float(own @ reduced[j]) * float(t["tokens"][j, m]) for j in range(len(k)) if real[j])
            for m in range(t["tokens"].shape[1])
        ]
        mixed = torch.tensor(logits, **F64).softmax(0)
        kept = mixed.argsort(descending=True)[: cut.get("coefficients", len(mixed))]
        for j in range(len(k)):
            for m in kept:
                z = float(t["basis"][j, m])
                if "least" in cut:
                    z = abs(z) if abs(z) > cut["least"] else 0.0
                found[i, j] += mixed[m] * z
    return found


@pytest.mark.parametrize("cut", [{}, {"least": 0.4}, {"coefficients": 2}, {"least": 0.1, "scale": 0.7}])
def test_scores_are_those_of_loops(cut: dict[str, Any]) -> None:
    q, k, t = normal(2, 4, 7, 8, seed=7), normal(2, 2, 11, 8, seed=8), tables()
    real = torch.arange(11) < torch.tensor([[11], [6]])
    for padding in (None, real):
        grid = Grid(2, 4, 2, 7, 11, 1, 1, 1.0, padding)
        found = ph.low_rank_scores(**t, **cut).prepare(q, k, grid)
        for b in range(2):
            there = torch.ones(11, dtype=torch.bool) if padding is None else real[b]
            for h in range(4):
                expected = by_loops(q[b, h], k[b, h // 2], t, there, **cut)
                torch.testing.assert_close(found(2, 6)[b, h], expected[2:6], rtol=0, atol=1e-12)


def test_the_map_itself_is_not_cut_and_has_gradients() -> None:
    q, k = normal(2, 4, 7, 8, seed=7), normal(2, 2, 11, 8, seed=8)
    t = {name: x.clone().requires_grad_() for name, x in tables().items()}
    own = ph.low_rank_scores(**t, least=0.5, coefficients=1)
    real = torch.arange(11) < torch.tensor([[11], [6]])
    found = own.attention(q, k, real)
    for b in range(2):
        expected = by_loops(q[b, 3], k[b, 1], tables(), real[b])
        torch.testing.assert_close(found[b, 3], expected * real[b], rtol=0, atol=1e-12)
    found.square().sum().backward()
    assert all(x.grad.abs().max() > 0 for x in t.values())


def test_in_a_call_it_reads_the_best_pairs() -> None:
    q, k, v = normal(2, 4, 23, 8, seed=7), normal(2, 2, 29, 8, seed=8), normal(2, 2, 29, 8, seed=9)
    own = ph.low_rank_scores(**tables())
    choice = ph.select(own, ph.keep_at_least(0.2), rows=1, cols=1)
    best = own.attention(q, k).topk(6, dim=-1).indices
    read = torch.zeros(2, 4, 23, 29, dtype=torch.bool).scatter_(-1, best, True)
    found = choose(choice, q, k, None, 1.0)
    assert torch.equal(densify(found, batch=2, heads=4, queries=23, keys=29), read)
    dense = attend(q, k, v, mask=found, backend="reference")
    torch.testing.assert_close(attend(q, k, v, select=choice), dense)
    assert ph.from_json(ph.to_json(choice)) == choice


def test_what_does_not_fit_is_said() -> None:
    q, k, v = normal(1, 2, 40, 8), normal(1, 2, 40, 8), normal(1, 2, 40, 8)
    t = tables()
    for wrong, words in (
        ({"queries": t["queries"][:2]}, r"must both be \(c, D\).*got \(2, 8\), \(3, 8\)"),
        ({"basis": t["basis"][0]}, r"basis must be a floating-point tensor \(S, n\)"),
        ({"query_bias": t["key_bias"][:1]}, "query_bias must have 3 numbers; got 1"),
        ({"coefficients": 0}, "coefficients must be at least 1; got 0"),
        ({"least": "much"}, "least must be a finite number"),
    ):
        with pytest.raises(ConfigError, match=words):
            ph.low_rank_scores(**t | wrong)
    one = {"rows": 1, "cols": 1}
    with pytest.raises(ShapeError, match="knows the places of 30 tokens, and the call has 40"):
        attend(q, k, v, select=ph.select(ph.low_rank_scores(**t), ph.keep_blocks(2), **one))
    narrow = ph.low_rank_scores(**tables(width=4, places=40))
    with pytest.raises(ShapeError, match="it reads keys 4 wide"):
        attend(q, k, v, select=ph.select(narrow, ph.keep_blocks(2), **one))
    with pytest.raises(ConfigError, match="use rows=1, cols=1, got rows=1, cols=4"):
        attend(q, k, v, select=ph.select(ph.low_rank_scores(**t), ph.keep_blocks(2), rows=1, cols=4))
    with pytest.raises(ConfigError, match="keep_at_least: share must be"):
        ph.keep_at_least(1.5)
