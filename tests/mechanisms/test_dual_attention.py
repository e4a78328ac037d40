"""What the paper of dual attention says must hold of the module, paper 049."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyhead as ph
from close import close
from flops import counting
from mechanisms.variants import broken_rules
from polyhead.attend.scores import alibi
from polyhead.errors import ConfigError, PolyheadError, ShapeError

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)
LONG = torch.randn(2, 43, 32, generator=torch.Generator().manual_seed(3), **F64)
CAUSAL = ph.causal()
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), **F64)


def built(name: str = "dual_attention", **config: object) -> nn.Module:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def directly(module: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The outputs of the relational heads with every relation made, `(B, Hr, L, Dv)`."""
    made = module.projection
    n, keys = made.own_heads, made.own_kv_heads
    q, k = made.queries(x)[:, n:], made.keys(x)[:, keys:]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    received = torch.einsum("hvr,brij->bhijv", module.relation_map.weight, module.relations(x))
    symbols = made.symbol_values(module.symbols(x, 0)).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (weights[..., None] * (received + symbols[:, :, None])).sum(3)


@pytest.mark.parametrize(
    "options",
    [
        {"relational_heads": 4, "kv_heads": 2, "symmetric": True, "symbols": "positional"},
        {"activation": "relu", "relations": 4, "kv_heads": 2},
        {"relational_heads": 3, "relations": 3, "relation_dim": 5, "value_dim": 6, "activation": "tanh"},
        {"relational_heads": 0, "kv_heads": 2},
        {"symbols": "relative", "reach": 1, "relational_heads": 4, "kv_heads": 2, "bias": True},
        {"symbols": "relative", "activation": "relu", "relations": 4, "kv_heads": 2},
    ],
)
def test_other_options_keep_the_contract(options: dict) -> None:
    # the check of gradients builds two heads
    without = "" if options.get("relational_heads") == 0 else "gradients"
    assert not broken_rules("dual_attention", without=without, **options)


def test_two_relational_heads_with_an_activation_keep_it_too() -> None:
    assert not broken_rules("dual_attention", relational_heads=2, kv_heads=2, activation="tanh")


def test_relative_symbols_keep_all_of_the_contract() -> None:
    assert not broken_rules("dual_attention", whole=True, symbols="relative", reach=3)


def test_without_relational_heads_it_is_multi_head_attention() -> None:
    module, plain = built(relational_heads=0), built("mha")
    state = {name.replace("output.own.", "output."): t for name, t in module.state_dict().items()}
    plain.load_state_dict(state)
    close(module(X, mask=CAUSAL), plain(X, mask=CAUSAL))


def test_without_relations_symbols_are_values() -> None:
    module, plain = built(relational_heads=4), built("mha")
    nn.init.zeros_(module.relation_map.weight)
    module.symbols.forward = lambda x, places: x
    state = module.state_dict()
    names = {"query": "query", "key": "key", "value": "symbol"}
    wanted = {f"projection.{a}.weight": state[f"projection.{b}.weight"] for a, b in names.items()}
    plain.load_state_dict(wanted | {"output.weight": state["output.relational.weight"]})
    close(module(X, mask=CAUSAL), plain(X, mask=CAUSAL))


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"relations": 1}, {"kv_heads": 2}])
def test_it_is_the_sum_over_relations(options: dict) -> None:
    module = built(**options)
    lower = torch.ones(11, 11, dtype=torch.bool).tril()
    found = []
    module.output.register_forward_hook(lambda part, inputs, out: found.append(inputs[0]))
    module(X, mask=CAUSAL)
    close(found[0][:, 2:], directly(module, X, lower))


def test_symmetric_relations_are_the_same_in_both_directions() -> None:
    r = built(symmetric=True).relations(X)
    close(r, r.mT)
    other = built().relations(X)
    assert (other - other.mT).abs().max() > 0.1
    assert built(symmetric=True).cost(3).parameters == built().cost(3).parameters - 32 * 16


def test_relations_change_nothing_when_both_sides_are_turned_alike() -> None:
    module = built()
    expected = module(X, mask=CAUSAL)
    turn = torch.linalg.qr(torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1), **F64))[0]
    with torch.no_grad():
        for part in (module.projection.relation_query, module.projection.relation_key):
            part.weight.copy_((turn @ part.weight.unflatten(0, (2, 8))).flatten(0, 1))
        close(module(X, mask=CAUSAL), expected)
        part.weight.neg_()
    assert (module(X, mask=CAUSAL) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"score": alibi(4)},
        {"mask": ph.per_head([ph.window(2), ph.sink(3), ph.window(1), ph.causal()])},
        {"weight_map": ph.head_mix(MIX)},
        {"score": ph.head_mix(MIX), "kv_heads": 2},
        {"normalizer": ph.softmax(sink=MIX[0])},
    ],
)
@pytest.mark.parametrize("symbols", ["attention", "relative"])
def test_what_differs_between_heads_reaches_the_right_ones(
    options: dict, symbols: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, pairs = (built(symbols=symbols, **options) for _ in range(2))
    found = module(X, mask=CAUSAL)
    # all heads in one call, and relations held pair by pair
    pairs._holds_pairs = lambda queries: True
    monkeypatch.setattr("polyhead.nn.dual_attention._together", lambda score, weight_map: True)
    close(pairs(X, mask=CAUSAL), found)


@pytest.mark.parametrize("kind", [{"symbols": "relative", "reach": 5}, {"activation": "relu"}])
@pytest.mark.parametrize(
    "options",
    [
        {"mask": ph.chosen(torch.tensor([[[[0, 1], [0, 2]]]]), rows=22, cols=16)},
        {"mask": ph.per_head([ph.window(2), ph.sink(3), ph.window(1), ph.causal()])},
        {"score": alibi(4), "mask": ph.documents(torch.arange(43) // 20)},
        {"mask": ph.causal() & ph.window(20)},
        {"weight_map": ph.head_mix(MIX), "mask": ph.causal()},
        {"score": ph.head_mix(MIX), "normalizer": ph.softmax(sink=MIX[0]), "kv_heads": 2},
    ],
)
def test_some_queries_at_a_time_give_what_all_do(
    kind: dict, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = built(**kind, **options), LONG.clone().requires_grad_()
    real = torch.arange(43) < torch.tensor([43, 30])[:, None]
    outputs, gradients = [], []
    for held in (1 << 22, 1):  # the least is 16 queries
        monkeypatch.setattr("polyhead.nn.weight_strips._HELD", held)
        y = module(x, padding=real)[real]
        outputs.append(y.detach())
        gradients.append(torch.autograd.grad(y.sin().sum(), [x, *module.parameters()]))
        with torch.no_grad():
            close(module(x, padding=real)[real], y)
    close(outputs[1], outputs[0])
    for one, other in zip(*gradients, strict=True):
        close(one, other)


@pytest.mark.parametrize("kind", [{"symbols": "relative", "reach": 5}, {"activation": "relu"}])
def test_some_queries_at_a_time_behind_a_cache(kind: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    module, window = built(**kind, score=alibi(4)), CAUSAL & (ph.window(24) | ph.sink(2))
    with torch.no_grad():
        for mask, cache in ((CAUSAL, {}), (window, {"window": 25, "sinks": 2})):
            expected, held = module(LONG, mask=mask), module.new_cache(2, **cache)
            with monkeypatch.context() as few:
                few.setattr("polyhead.nn.weight_strips._HELD", 1)
                parts = [module(x, mask=CAUSAL, cache=held) for x in LONG.split([5, 18, 20], dim=1)]
            close(torch.cat(parts, 1), expected)


def test_a_mask_is_checked_against_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyhead.nn.weight_strips._HELD", 1)
    with pytest.raises(ShapeError, match="ids has 16 positions but there are 43 keys"):
        built(symbols="relative")(LONG, mask=ph.documents(torch.zeros(16, dtype=torch.int64)))


def test_relative_symbols_are_dropped_alike_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyhead.nn.weight_strips._HELD", 1)
    module = built(symbols="relative", relational_heads=4, dropout=0.5).train()
    nn.init.zeros_(module.relation_map.weight)
    total, library = module(LONG, mask=CAUSAL).square().sum(), module.symbols.library  # now quadratic in it
    close((torch.autograd.grad(total, library)[0] * library).sum(), 2 * total)


def test_relative_symbols_make_no_table_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                self.most = max(self.most, found.numel())
            return found

    monkeypatch.setattr("polyhead.nn.weight_strips._HELD", 1)
    module = built(symbols="relative", reach=8, relational_heads=4)
    with Largest() as seen:
        module(torch.randn(1, 600, 32, **F64), mask=CAUSAL).sum().backward()
    assert 600 * 32 < seen.most < 600 * 600


def test_relative_symbols_of_a_packed_sequence_are_those_of_each_alone() -> None:
    module = built(symbols="relative", reach=3)
    both = module(X, mask=CAUSAL & ph.documents(torch.tensor([0] * 4 + [1] * 7)))
    close(both, torch.cat([module(part, mask=CAUSAL) for part in X.split([4, 7], dim=1)], 1))
    close(module(X, positions=torch.arange(11) * 3), module(X))  # by the sequence, as masks and biases go


def test_relative_symbols_are_of_the_places_that_masks_count() -> None:
    module = built(symbols="relative", reach=2, relational_heads=4)
    nn.init.zeros_(module.relation_map.weight)
    module.symbols.library.data[[0, 1, 3, 4]] = 0  # all but that of a query's own place
    own, others = ph.window(0, 0), ~ph.window(0, 0)
    for context in (None, torch.randn_like(X[:, :7]), torch.cat([X, X], 1)):  # queries stand at its end
        y = module(X, context, mask=own)[:, -7:]
        assert y.abs().amax(-1).min() > 0.01
        close(y, y[0, 0].expand_as(y))
        assert module(X, context, mask=others).abs().max() == 0


def test_no_symbols_are_cached_where_they_are_relative() -> None:
    told = {name: built(symbols=name).cost(9).kv_bytes_per_token for name in ("positional", "relative")}
    keys, values, senders, symbols = 32, 16, 16, 16
    assert told["positional"] == 8 * (keys + values + senders + symbols)
    assert told["relative"] == 8 * (keys + values + senders)


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"bias": True}, {"kv_heads": 2}])
@pytest.mark.parametrize("queries", [1, 2, 30])
def test_the_cost_of_a_step_with_relative_symbols_is_what_torch_counts(options: dict, queries: int) -> None:
    module = built(symbols="relative", **options)
    cache = module.new_cache(2)
    with torch.no_grad():
        module(LONG[:, :12], mask=CAUSAL, cache=cache)
        with counting() as counter:
            module(LONG[:, 12 : 12 + queries], mask=CAUSAL, cache=cache)
    assert counter.get_total_flops() == module.step_cost(12, queries, batch=2).flops


def test_positions_turn_what_attends_and_not_relations() -> None:
    module = built(position=ph.nn.rope())
    close(module.relations(X)[:, :, 3:, 3:], module.relations(X[:, 3:]))
    cache = module.new_cache(2)
    steps = [module(x, mask=CAUSAL, cache=cache) for x in X.split([4, 1, 1, 5], dim=1)]
    close(torch.cat(steps, 1), module(X, mask=CAUSAL))


@pytest.mark.parametrize("symbols", ["attention", "relative"])
def test_layers_may_share_their_symbols(symbols: str) -> None:
    one, other = built(symbols=symbols), built(symbols=symbols)
    other.symbols = one.symbols
    both = nn.ModuleList([one, other])
    own = sum(p.numel() for p in one.symbols.parameters())
    assert sum(p.numel() for p in both.parameters()) == 2 * one.cost(1).parameters - own
    with torch.no_grad():
        one.symbols.library.add_(1.0)
    close(one(X), other(X))


def test_what_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="relational_heads must be at most 4; got 5"):
        built(relational_heads=5)
    with pytest.raises(
        ConfigError, match="kv_heads=2 gives 2 heads the same keys, .* the 3 heads that are not"
    ):
        built(relational_heads=1, kv_heads=2)
    with pytest.raises(ConfigError, match="relations must divide 16, .* got 3; allowed are 1, 2, 4, 8, 16"):
        built(relations=3)
    with pytest.raises(ConfigError, match="symmetric relations need context_dim to be dim=32"):
        built(symmetric=True, context_dim=16)
    with pytest.raises(ConfigError, match="symbol_heads must divide dim=32; got symbol_heads=5"):
        built(symbol_heads=5)
    with pytest.raises(PolyheadError, match="no activation is called 'gelu'; did you mean 'relu'"):
        built(activation="gelu")
    with pytest.raises(ShapeError, match="symbols for 8 positions, but the call has 11"):
        built(symbols="positional", library=8)(X)
    with pytest.raises(
        PolyheadError, match="no kind of symbols is called 'relatives'; did you mean 'relative'"
    ):
        built(symbols="relatives")
    with pytest.raises(ConfigError, match="reach must be at least 1; got 0"):
        built(symbols="relative", reach=0)
    with pytest.raises(
        ConfigError, match="reach must be left out with symbols='attention', .* library; got 8"
    ):
        built(reach=8)
    with pytest.raises(
        ConfigError, match="library must be left out with symbols='relative', .* 2·reach \\+ 1; got 9"
    ):
        built(symbols="relative", library=9)
