"""What the paper of dual attention says must hold of the module, paper 049."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.attend.scores import alibi
from polyhead.errors import ConfigError, PolyheadError, ShapeError

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)
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
    ],
)
def test_other_options_keep_the_contract(options: dict) -> None:
    # the check of gradients builds two heads
    without = "" if options.get("relational_heads") == 0 else "gradients"
    assert not broken_rules("dual_attention", without=without, **options)


def test_two_relational_heads_with_an_activation_keep_it_too() -> None:
    assert not broken_rules("dual_attention", relational_heads=2, kv_heads=2, activation="tanh")


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
def test_what_differs_between_heads_reaches_the_right_ones(options: dict) -> None:
    # relations held pair by pair do not part the heads
    module, pairs = built(**options), built(**options)
    pairs._holds_pairs = lambda queries: True
    close(module(X, mask=CAUSAL), pairs(X, mask=CAUSAL))


def test_positions_turn_what_attends_and_not_relations() -> None:
    module = built(position=ph.nn.rope())
    close(module.relations(X)[:, :, 3:, 3:], module.relations(X[:, 3:]))
    cache = module.new_cache(2)
    steps = [module(x, mask=CAUSAL, cache=cache) for x in X.split([4, 1, 1, 5], dim=1)]
    close(torch.cat(steps, 1), module(X, mask=CAUSAL))


def test_layers_may_share_their_symbols() -> None:
    one, other = built(), built()
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
