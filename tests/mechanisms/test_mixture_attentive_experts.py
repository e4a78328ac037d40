"""Mixture of attentive experts: what its paper says must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName
from polyhead.nn.attentive_experts import BlockCoordinates

F64 = {"dtype": torch.float64}
X = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "mixture_attentive_experts", *, gated: bool = True, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    own = {"hidden": 12} if name == "mixture_attentive_experts" else {}
    module = ph.build(name, **{"dim": 32, "heads": 4, **own, **config}, **F64).eval()
    if gated and own:
        with torch.no_grad():
            module.gate.out.weight.normal_()
            module.gate.bias.normal_()
    return module


def plain_of(module: nn.Module, kept: Tensor | None = None) -> nn.Module:
    """Plain attention with the same weights; of the heads those that are kept, times H/(H-1)."""
    plain = built("mha")
    state = {name: p.clone() for name, p in module.state_dict().items() if not name.startswith("gate")}
    if kept is not None:
        factors = kept.double() * len(kept) / (len(kept) - 1)
        state["output.weight"] *= factors.repeat_interleave(8)
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("options", [{"inference": "best"}, {"kv_heads": 2, "bias": True}], ids=str)
def test_variants_keep_the_contract(options: dict[str, Any]) -> None:
    assert broken_rules("mixture_attentive_experts", hidden=8, **options) == {}


def test_it_starts_as_multi_head_attention() -> None:
    module = built(gated=False)
    close(module(X, mask=ph.causal()), plain_of(module)(X, mask=ph.causal()))
    close(module(X, X[:, :7]), plain_of(module)(X, X[:, :7]))


def test_one_expert_is_all_heads_but_one() -> None:
    module = built(gated=False)
    for i in range(4):
        with torch.no_grad():
            module.gate.out.bias.copy_(1e4 * (torch.arange(4) == i))
        close(module(X), plain_of(module, torch.arange(4) != i)(X))


def test_factors_sum_to_the_heads_and_are_bounded() -> None:
    module = built()
    g = module.gate(module.gate.rows(X)[:, 0])
    factors = module.factors(g)
    close(factors.sum(-1), torch.full((2, 30), 4.0, **F64))
    assert 0 <= factors.min() <= factors.max() <= 4 / 3
    assert g.std() > 0.01


@pytest.mark.parametrize(
    "mask",
    [None, ph.causal(), ph.causal() & ph.window(5), ph.per_head([ph.causal(), ph.causal()] * 2)],
    ids=str,
)
def test_the_gate_reads_the_mean_of_what_is_seen(mask: Any) -> None:
    module = built()
    rows = module.gate.rows(X)
    found = module._mean(rows, 30, mask)
    for t in (0, 3, 20, 29):
        first = max(0, t - 5) if mask == ph.causal() & ph.window(5) else 0
        seen = X if mask is None else X[:, first : t + 1]
        close(found[:, t], seen.mean(1) @ module.gate.inner.weight.T)


def test_experts_are_drawn_by_their_weights_and_without_bias() -> None:
    module = built().train()
    module.drawn = True
    weights = torch.tensor([0.1, 0.5, 0.15, 0.25], **F64)
    torch.manual_seed(0)
    drawn = module.factors(weights.expand(40000, 3, 4))
    assert torch.equal(drawn[:, :1].expand_as(drawn), drawn)
    assert set(drawn.unique().tolist()) == {0.0, 4 / 3}
    assert (drawn[:, 0] == 0).sum(-1).eq(1).all()
    close((drawn[:, 0] == 0).double().mean(0), weights, 0.01)
    close(drawn[:, 0].mean(0), module.eval().factors(weights), 0.02)


def test_turns_leave_the_others_as_they_are() -> None:
    torch.manual_seed(0)
    model = ph.build_stack(["mixture_attentive_experts", "mha"], dim=32, heads=4, mlp=16, **F64)
    turns = BlockCoordinates(model, every=3)
    assert [turns.of_gates(epoch) for epoch in range(6)] == [False, False, True] * 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for epoch in range(6):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with turns.epoch(epoch):
            assert turns.layers[0].drawn != turns.of_gates(epoch)
            for _ in range(2):
                optimizer.zero_grad()
                model(X, mask=ph.causal()).sin().square().sum().backward()
                optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == ((".gate." in name) != turns.of_gates(epoch)), name
    assert not turns.layers[0].drawn
    assert all(p.requires_grad for p in model.parameters())


def test_it_decodes_with_positions_and_says_what_it_keeps() -> None:
    module = built(position=ph.nn.rope(), kv_heads=2)
    full, cache = module(X, mask=ph.causal()), module.new_cache(2)
    parts = [module(x, mask=ph.causal(), cache=cache) for x in X.split([20, *[1] * 10], dim=1)]
    close(torch.cat(parts, dim=1), full)
    cost = module.cost(64)
    assert cost.kv_bytes_per_token == (2 * 2 * 8 + 12) * 8
    assert cost.parameters == 2 * 32 * 32 + 2 * 32 * 16 + 12 * (32 + 4 + 1) + 4


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="heads must be at least 2, since an expert is all but one; got 1"):
        built(heads=1)
    with pytest.raises(UnknownName, match="no inference is called 'hard'"):
        built(inference="hard")
    with pytest.raises(ConfigError, match="model must hold a layer"):
        BlockCoordinates(built("mha"))
    with pytest.raises(ConfigError, match="every must be"):
        BlockCoordinates(built(), every=0)
