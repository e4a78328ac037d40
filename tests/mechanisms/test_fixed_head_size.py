"""What the paper of fixed head sizes says must hold, paper 053."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.errors import ConfigError, ShapeError
from polyhead.mechanisms.fixed_head_size import head_ranks, realise

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "fixed_head_size", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


def drawn(n: int, seed: int = 0) -> torch.Tensor:
    logits = 3 * torch.randn(n, n, generator=torch.Generator().manual_seed(seed), **F64)
    return logits.softmax(-1)


def test_the_usual_width_is_multi_head_attention_bit_for_bit() -> None:
    fixed, plain = built(head_dim=8), built("mha")
    plain.load_state_dict(fixed.state_dict())
    assert torch.equal(fixed(X, mask=ph.causal()), plain(X, mask=ph.causal()))


@pytest.mark.parametrize("heads", [1, 3, 16])
def test_the_width_does_not_depend_on_the_number_of_heads(heads: int) -> None:
    fixed = built(heads=heads, head_dim=24)
    assert fixed.head_dim == 24
    cost = fixed.cost(11)
    assert cost.parameters == 4 * 32 * heads * 24
    assert cost.scores == cost.values == 2 * 11 * 11 * heads * 24
    assert cost.kv_bytes_per_token == 2 * heads * 24 * 8


@pytest.mark.parametrize("head_dim", [6, 9])
def test_a_head_as_wide_as_the_sequence_gives_any_weights(head_dim: int) -> None:
    weights, x = drawn(6), X[0, :6]
    fixed = built(heads=1, head_dim=head_dim)
    query, key = realise(weights, x, head_dim)
    state = fixed.state_dict() | {"projection.query.weight": query, "projection.key.weight": key}
    fixed.load_state_dict(state)
    values = fixed.projection.value(x)
    torch.testing.assert_close(
        fixed(x[None])[0], (weights @ values) @ fixed.output.weight.T, rtol=0, atol=1e-10
    )


def test_what_cannot_be_realised_is_refused() -> None:
    with pytest.raises(ConfigError, match="head_dim must be at least 6, the inputs"):
        realise(drawn(6), X[0, :6], 5)
    with pytest.raises(ConfigError, match="weights must be positive with rows that sum to 1"):
        realise(torch.eye(6, **F64), X[0, :6])
    with pytest.raises(ShapeError, match="inputs must be linearly independent"):
        realise(drawn(6), X[0, :1].expand(6, -1))
    with pytest.raises(ShapeError, match=r"weights must have shape \(6, 6\)"):
        realise(drawn(5), X[0, :6])


@pytest.mark.parametrize(("dim", "head_dim", "length"), [(32, 5, 11), (4, 9, 11), (32, 24, 7)])
def test_the_rank_of_logits_is_at_most_that_of_the_narrowest(dim: int, head_dim: int, length: int) -> None:
    fixed = built(dim=dim, heads=2, head_dim=head_dim)
    ranks = head_ranks(fixed, X[:, :length, :dim])
    assert ranks.shape == (2, 2)
    assert bool((ranks == min(dim, head_dim, length)).all())


def test_ranks_are_those_of_the_logits_themselves() -> None:
    grouped = built(heads=4, kv_heads=2, head_dim=6)
    with torch.no_grad():
        grouped.projection.query.weight[:4] = 0.0  # head 0 uses two of its six dimensions
    q, (k, _) = grouped.projection.queries(X), grouped.projection.keys_values(X)
    logits = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2)
    assert torch.equal(head_ranks(grouped, X), torch.linalg.matrix_rank(logits))
    assert head_ranks(grouped, X)[0].tolist() == [2, 6, 6, 6]


def best_fit(weights: torch.Tensor, rank: int) -> float:
    """The least mean KL divergence of softmax(A Bᵀ), A and B of width `rank`, that descent finds."""
    n = len(weights)
    generator = torch.Generator().manual_seed(rank)
    a, b = (torch.randn(n, rank, generator=generator, **F64).requires_grad_() for _ in range(2))
    search = torch.optim.LBFGS([a, b], max_iter=400, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        found = (weights * (weights.log() - (a @ b.T).log_softmax(-1))).sum(-1).mean()
        found.backward()
        return found

    search.step(loss)
    return loss().item()


def test_a_narrow_head_stays_away_from_weights_that_a_wider_one_reaches() -> None:
    n = 7
    # every token looks at itself and, far less, at others in an order that no plane can hold
    weights = (4 * torch.eye(n, **F64) + torch.log(drawn(n, seed=3))).softmax(-1)
    fits = [best_fit(weights, rank) for rank in (1, 2, 4, n - 1)]
    assert fits == sorted(fits, reverse=True)
    assert fits[0] > 0.1
    assert fits[1] > 1e-3
    assert fits[-1] < 1e-6  # one less than n: softmax does not see a shift of a row


def test_a_narrow_head_is_a_wider_one_with_rows_of_zeros() -> None:
    narrow, wide = built(head_dim=8), built(head_dim=20, seed=1)
    state = {}
    for part in ("query", "key", "value"):
        weight = narrow.state_dict()[f"projection.{part}.weight"].unflatten(0, (4, 8))
        factor = 1.0 if part == "value" else (20 / 8) ** 0.25
        state[f"projection.{part}.weight"] = nn.functional.pad(factor * weight, (0, 0, 0, 12)).flatten(0, 1)
    output = narrow.state_dict()["output.weight"].unflatten(1, (4, 8))
    state["output.weight"] = nn.functional.pad(output, (0, 12)).flatten(1)
    wide.load_state_dict(state)
    torch.testing.assert_close(wide(X), narrow(X), rtol=0, atol=1e-13)


def test_the_default_width_and_refusals() -> None:
    assert built(dim=24, heads=5).head_dim == 64
    with pytest.raises(ConfigError, match="FixedHeadSize: head_dim must be an integer"):
        built(head_dim=None)
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4"):
        built(kv_heads=3)
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4; got kv_heads=8"):
        built(kv_heads=8)
