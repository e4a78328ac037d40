"""Mixture of attention heads: what its paper says must hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from flops import counting
from polyhead.errors import ConfigError
from polyhead.nn import auxiliary_losses, routed_heads

F64 = {"dtype": torch.float64}
X = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0), **F64)


@pytest.fixture(autouse=True)
def _rows_are_packed_however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_heads, "SHORT", 0)


def built(name: str = "moa_heads", seed: int = 0, *, route: bool = True, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    module = ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()
    if route and name == "moa_heads":
        with torch.no_grad():
            module.router.gate.weight.normal_(0, 0.4)
    return module


@pytest.mark.parametrize(("experts", "kv_heads"), [(4, 1), (9, 1), (5, 2), (2, 2), (3, 4)])
@pytest.mark.parametrize("renormalise", ["detach", "full", None])
def test_it_is_its_twin_for_any_number_of_experts(
    experts: int, kv_heads: int, renormalise: str | None
) -> None:
    module = built(experts=experts, kv_heads=kv_heads, renormalise=renormalise)
    lower = torch.ones(30, 30, dtype=torch.bool).tril()
    options = {"heads": 4, "kv_heads": kv_heads, "experts": experts, "renormalise": renormalise}
    expected = ph.reference("moa_heads")(X, parameters=module.state_dict(), mask=lower, **options)
    close(module(X, mask=ph.causal()), expected)


def test_uniform_routers_over_as_many_experts_as_are_chosen_make_it_multi_query_attention() -> None:
    module, plain = built(experts=4, route=False), built("multi_query", seed=4)
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if not n.startswith("router")})
    assert module.router.gate.weight.abs().max() == 0
    close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()) / 4)
    grouped = built(experts=2, kv_heads=2, route=False)
    plain = built("grouped_query", kv_heads=2)
    plain.load_state_dict({n: p for n, p in grouped.state_dict().items() if not n.startswith("router")})
    close(grouped(X, mask=ph.causal()), plain(X, mask=ph.causal()) / 2)


def test_weights_sum_to_one_over_exactly_k_experts() -> None:
    module = built(experts=7)
    gates, active, logits = module.choice(X)
    assert (active.sum(-1) == 4).all()
    close(gates.sum(-1), torch.ones(2, 30, **F64))
    raw = built(experts=7, renormalise=None).choice(X).gates
    close(raw, logits.softmax(-1) * active)


@pytest.mark.parametrize("renormalise", ["detach", "full"])
def test_what_gradients_reach(renormalise: str) -> None:
    module = built(experts=6, heads=2, renormalise=renormalise).train()
    x = X[:1, :1]
    active = module.choice(x).active[0, 0]
    y = module(x, X[:1]).sin().sum()
    router, query, output = torch.autograd.grad(
        y, [module.router.gate.weight, module.projection.query.weight, module.output.weight]
    )
    reached = router.abs().amax(1) > 1e-12
    # divided by their sum, weights of chosen experts depend on no other; with the sum as a constant they do
    assert reached[active].all()
    assert reached[~active].any() == (renormalise == "detach")
    assert torch.equal(query.unflatten(0, (6, 16)).abs().amax((1, 2)) > 0, active)
    assert torch.equal(output.unflatten(1, (6, 16)).abs().amax((0, 2)) > 0, active)
    evaluated = torch.autograd.grad(module.eval()(x, X[:1]).sin().sum(), module.router.gate.weight)[0]
    assert (evaluated[~active].abs().max() < 1e-12).all()


def test_losses() -> None:
    module = built(experts=8, balance=0.5, z=0.25).train()
    real = torch.ones(2, 30, dtype=torch.bool)
    real[0, :9] = False
    module(X.masked_fill(~real[..., None], float("nan")), padding=real)
    logits = module.router.gate(X)[real]
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(4).indices, 1.0)
    share, mean = chosen.mean(0) / 4, logits.softmax(-1).mean(0)
    found = auxiliary_losses(module)
    close(found["balance"], 0.5 * 8 * (share * mean).sum())
    close(found["z"], 0.25 * logits.exp().sum(-1).log().square().mean())
    even = built(experts=8, route=False).train()
    even(X)
    close(auxiliary_losses(even)["balance"], torch.tensor(0.01, **F64))


def test_operations_and_cache_do_not_grow_with_the_experts() -> None:
    costs = {e: built(experts=e).cost(2048) for e in (4, 16, 64)}
    for experts, cost in costs.items():
        module = built(experts=experts)
        assert cost.parameters == 2 * experts * 32 * 8 + 2 * 32 * 8 + 32 * experts
        assert (cost.scores, cost.values) == (2 * 4 * 2048 * 2048 * 8,) * 2
        assert cost.projections == 2048 * (2 * 2 * 4 * 32 * 8 + 2 * 2 * 32 * 8 + 2 * 32 * experts)
        assert cost.kv_bytes_per_token == 2 * 8 * 8
        x = torch.randn(1, 2048, 32, generator=torch.Generator().manual_seed(2), **F64)
        with torch.no_grad(), counting() as counter:
            module(x)
        assert cost.flops <= counter.get_total_flops() <= 1.1 * cost.flops
        cache = module.new_cache(1, max_length=9)
        assert [tuple(t.shape) for t in cache.append(*(torch.zeros(1, 1, 9, 8, **F64),) * 2).rows] == [
            (1, 1, 9, 8)
        ] * 2


def test_experts_of_several_heads_decode_with_positions() -> None:
    module = built(experts=5, kv_heads=2, position=ph.nn.rope())
    full, cache = module(X, mask=ph.causal()), module.new_cache(2)
    parts = [module(x, mask=ph.causal(), cache=cache) for x in X.split([20, *[1] * 10], dim=1)]
    close(torch.cat(parts, dim=1), full)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4"):
        built(kv_heads=3)
    with pytest.raises(
        ConfigError, match=r"experts \(at least heads / kv_heads = 4.*must be at least 4; got 3"
    ):
        built(experts=3)
    with pytest.raises(ConfigError, match='renormalise must be "detach", "full" or None'):
        built(renormalise="sum")
