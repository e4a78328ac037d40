"""Multi-head mixture of experts: what its papers say must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName, UnsupportedPattern
from polyhead.mechanisms.multi_head_moe import MultiHeadMoE
from polyhead.nn import auxiliary_losses
from polyhead.papers import paper

F64 = {"dtype": torch.float64}
X = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(seed: int = 0, **config: Any) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build("multi_head_moe", **{"dim": 32, "heads": 4, "width": 24, **config}, **F64).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1, "experts": 5, "bias": True},
        {"activation": "swiglu", "bias": True, "renormalise": "full", "shared_width": 20},
        {"head_layer": False, "inner_residual": True, "renormalise": "detach"},
        {"merge_layer": False, "top_k": 3, "experts": 3, "shared_width": 7},
    ],
    ids=lambda options: next(iter(options)),
)
def test_variants_keep_the_contract(options: dict[str, Any]) -> None:
    assert broken_rules("multi_head_moe", **options) == {}


def test_one_head_without_maps_is_a_plain_mixture_of_experts() -> None:
    module = built(heads=1, head_layer=False, merge_layer=False, experts=6)
    p = (X @ module.router.gate.weight.T).softmax(-1)
    expected = torch.zeros_like(X)
    for b in range(2):
        for t in range(30):
            for j in p[b, t].topk(2).indices:
                inner = F.gelu(module.experts.up[j] @ X[b, t])
                expected[b, t] += p[b, t, j] * (module.experts.down[j] @ inner)
    close(module(X), expected)


def test_all_experts_the_identity_and_all_chosen_is_the_identity() -> None:
    module = built(top_k=8, width=16, head_layer=False, merge_layer=False)
    with torch.no_grad():  # gelu(x) - gelu(-x) = x
        eye = torch.eye(8, **F64)
        module.experts.up.copy_(torch.cat([eye, -eye]).expand(8, 16, 8))
        module.experts.down.copy_(torch.cat([eye, -eye], 1).expand(8, 8, 16))
    close(module(X), X)


def test_every_token_by_itself() -> None:
    module = built()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    close(module(X[:, order]), module(X)[:, order])
    close(module(X[:, 7:8], mask=ph.causal()), module(X)[:, 7:8])
    cache = module.new_cache(2)
    module(X, cache=cache)
    assert (cache.length, cache.nbytes()) == (30, 0)


def test_experts_that_change_places_with_their_scores_change_nothing() -> None:
    module, other = built(), built()
    swap = torch.tensor([3, 1, 2, 0, 4, 5, 6, 7])
    state = module.state_dict()
    for name in ("experts.up", "experts.down", "router.gate.weight"):
        state[name] = state[name][swap]
    other.load_state_dict(state)
    close(other(X), module(X))


def test_choice_and_balance() -> None:
    module = built(top_k=3, balance=0.5).train()
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1, 20:] = False
    module(X.masked_fill(~real[..., None], float("nan")), padding=real)
    gates, active, logits = module.choice(X)
    assert active.shape == (2, 120, 8)
    assert active.sum() == 2 * 30 * 4 * 3
    p = logits.softmax(-1)
    close(gates, p * active)
    counted = real.repeat_interleave(4, dim=1)
    share, mean = active[counted].double().mean(0) / 3, p[counted].mean(0)
    close(auxiliary_losses(module)["balance"], 0.5 * 8 * (share * mean).sum())


def counted_flops(module: nn.Module, x: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("heads", "k", "outer"), [(2, 1, 2), (3, 2, 2), (4, 2, 1), (4, 3, 0)])
def test_matching_costs_what_the_plain_mixture_costs(activation: str, heads: int, k: int, outer: int) -> None:
    dim, width, experts = 36, 144, 8
    maps = 2 if activation == "gelu" else 3
    own = {"activation": activation, "head_layer": outer > 0, "merge_layer": outer > 1}
    config = MultiHeadMoE.matching(dim, heads, experts=experts, width=width, top_k=k, **own)
    module = config.build(**F64)
    x = torch.randn(1, 50, dim, **F64)
    router = 2 * 50 * dim * config.experts
    plain = 2 * 50 * maps * k * dim * width
    found = counted_flops(module, x)
    assert found == module.cost(50).flops
    assert config.width == width - outer * dim / (maps * k)
    assert found - router == plain
    parameters = sum(p.numel() for n, p in module.named_parameters() if not n.startswith("router"))
    per_expert = maps * dim // heads * config.width
    assert 0 <= maps * experts * dim * width - parameters < per_expert


def test_matching_parameters_alone() -> None:
    config = MultiHeadMoE.matching(32, 4, experts=8, width=128, match="parameters")
    assert (config.width, config.experts) == (4 * 128 - 4 * 32 // 8, 8)
    parameters = sum(p.numel() for n, p in config.build().named_parameters() if not n.startswith("router"))
    assert parameters == 2 * 8 * 32 * 128


def test_matching_of_the_paper() -> None:
    assert MultiHeadMoE.matching(768, 3, experts=8, width=4 * 768).width == 3 * 768


def test_experts_that_were_not_chosen_have_no_gradient() -> None:
    module = built(experts=16, top_k=1).train()
    x = X[:1, :1]
    chosen = module.choice(x).active[0].any(0)
    (flow,) = torch.autograd.grad(module(x).sin().sum(), module.experts.up)
    assert torch.equal(flow.abs().amax((1, 2)) > 0, chosen)
    assert 1 <= int(chosen.sum()) <= 4


def test_it_is_the_mlp_of_a_stack() -> None:
    torch.manual_seed(0)
    stack = ph.build_stack(["mha", "multi_head_moe"] * 2, dim=32, heads=4, **F64).eval()
    cache = stack.new_cache(2)
    parts = [stack(x, mask=ph.causal(), cache=cache) for x in X.split([20, *[1] * 10], dim=1)]
    close(torch.cat(parts, dim=1), stack(X, mask=ph.causal()))
    assert paper("104").built_in == ("mechanisms/multi_head_moe.py",)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="heads must divide dim=32"):
        built(heads=5)
    with pytest.raises(ConfigError, match=r"top_k \(of 8 experts\) must be"):
        built(top_k=9)
    with pytest.raises(UnknownName, match="no activation is called 'relu'"):
        built(activation="relu")
    with pytest.raises(ConfigError, match="width must be greater than 32"):
        MultiHeadMoE.matching(32, 4, experts=8, width=32)
    with pytest.raises(UnknownName, match="no match is called 'flops'"):
        MultiHeadMoE.matching(32, 4, experts=8, width=32, match="flops")
    with pytest.raises(UnsupportedPattern, match="multi_head_moe maps every token by itself"):
        built().new_context_cache(X)


def test_experts_of_parts_and_of_whole_tokens_both_learn_what_two_attributes_mean() -> None:
    """A token has two symbols, one in each half; each means a symbol. Equal parameters within 2 %."""
    sizes = []
    for heads, width in ((2, 32), (1, 20)):
        torch.manual_seed(0)
        maps = {} if heads > 1 else {"head_layer": False, "merge_layer": False}
        module = ph.build("multi_head_moe", dim=32, heads=heads, experts=8, top_k=1, width=width, **maps)
        read = torch.nn.Linear(32, 32)
        sizes.append(sum(p.numel() for p in module.parameters()))
        table, means = torch.randn(2, 16, 16), torch.stack([torch.randperm(16) for _ in range(2)])
        steps = torch.optim.Adam([*module.parameters(), *read.parameters()], lr=1e-2)
        for _ in range(200):
            said = torch.randint(16, (64, 1, 2))
            x = torch.cat([table[0][said[..., 0]], table[1][said[..., 1]]], -1)
            wanted = torch.stack([means[0][said[..., 0]], means[1][said[..., 1]]], -1)
            loss = F.cross_entropy(read(module(x)).view(-1, 16), wanted.flatten())
            steps.zero_grad()
            loss.backward()
            steps.step()
        assert float(loss.detach()) < 0.02
        active = module.choice(x)[1].flatten(0, 1).double().mean(0)
        assert int((active > 0.01).sum()) >= 6  # of 8, with sub-tokens and without
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
