"""What the paper that takes attention apart says must hold of its six variants, paper 010."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyhead as ph
from close import close
from conformance.contract import Case, causal, cost
from flops import counting
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, ShapeError, UnsupportedPattern
from polyhead.mechanisms import Promises

F64 = {"dtype": torch.float64}
DRAW = torch.Generator().manual_seed(0)
X, OTHER = torch.randn(2, 2, 11, 48, generator=DRAW, **F64)
FIXED = ("random_embeddings", "fixed_sequence")
SIX = ("token_mlp", "taylor2", "self_gate", *FIXED, "static")


def built(name: str, **config: object) -> Any:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 48, "heads": 4, **config}, **F64)


def stacked(*layers: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return ph.build_stack(list(layers), dim=48, heads=4, **options, **F64).eval()


def by_head(linear: nn.Module, x: Tensor) -> Tensor:
    return linear(x).unflatten(-1, (4, 12)).transpose(1, 2)  # B H L D


def causal_sums(terms: Tensor) -> Tensor:
    """A recurrence: the sum of the terms so far, token by token."""
    state, found = torch.zeros_like(terms[:, :, 0]), []
    for t in range(terms.shape[2]):
        state = state + terms[:, :, t]
        found.append(state)
    return torch.stack(found, dim=2)


def test_all_variants_have_as_many_parameters() -> None:
    counts = {name: sum(p.numel() for p in built(name).parameters()) for name in ("mha", *SIX)}
    assert set(counts.values()) == {4 * 48 * 48}, counts


@pytest.mark.parametrize("name", ["mlp_mixer_free", "rnd_emb_qk", "fixed_seq_qk", "static_emb_qk", "static"])
def test_the_names_that_the_variants_go_by(name: str) -> None:
    assert name in ph.entry(name).aliases
    assert ph.entry(name).family == "ablation"


# ---- no mixing of tokens ----


def test_the_mlp_sees_its_own_token_alone() -> None:
    module, changed = built("token_mlp"), X.clone()
    changed[:, 4] += 1.0
    moved = (module(changed) - module(X)).abs().amax(-1)
    assert moved[:, 4].min() > 0.01
    assert moved[:, [0, 1, 2, 3, *range(5, 11)]].max() == 0.0
    assert module.new_cache(2, max_length=11).nbytes() == 0


def test_the_contract_notices_an_mlp_that_mixes_after_all() -> None:
    for check in (causal, cost):
        with pytest.raises(AssertionError):
            check(Case(dataclasses.replace(ph.entry("taylor2"), promises=Promises(tokenwise=True))))
        with pytest.raises(AssertionError):
            check(Case(dataclasses.replace(ph.entry("token_mlp"), promises=Promises())))


# ---- no softmax ----


def taylor_weights(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (by_head(getattr(module.projection, part), x) for part in ("query", "key"))
    logits = q @ k.mT / math.sqrt(12)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    powers = (1 + logits + logits.square() / 2).masked_fill(later, 0.0)
    return logits.masked_fill(later, -math.inf), powers / powers.sum(-1, keepdim=True)


def test_taylor_weights_are_positive_and_nearly_softmax_where_logits_are_small() -> None:
    module = built("taylor2")
    logits, weights = taylor_weights(module, X)
    v = by_head(module.projection.value, X)
    close(module(X, mask=ph.causal()), module.output(weights @ v))
    seen = torch.isfinite(logits)
    assert weights[seen].min() > 0
    with torch.no_grad():
        module.projection.query.weight *= 0.1 / logits[seen].abs().max()
    logits, weights = taylor_weights(module, X)
    assert (weights - logits.softmax(-1)).abs().max() < 1e-3
    plain = built("mha")
    plain.load_state_dict(module.state_dict())
    close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()), 1e-3)


def test_taylor_attention_is_a_recurrence_over_features() -> None:
    module = built("taylor2")
    q, k, v = (by_head(getattr(module.projection, part), X) for part in ("query", "key", "value"))

    def features(z: Tensor) -> Tensor:
        z = z / 12**0.25
        squares = (z[..., :, None] * z[..., None, :]).flatten(-2) / math.sqrt(2)
        return torch.cat([torch.ones_like(z[..., :1]), z, squares], dim=-1)

    q, k = features(q), features(k)
    sums = causal_sums(k[..., :, None] * v[..., None, :])  # B H L F Dv
    y = torch.einsum("bhlf,bhlfd->bhld", q, sums) / (q * causal_sums(k)).sum(-1, keepdim=True)
    close(module(X, mask=ph.causal()), module.output(y))


# ---- no pairs ----


def test_gates_are_a_recurrence_of_two_sums() -> None:
    module = built("self_gate")
    q, k, v = (by_head(getattr(module.projection, part), X) for part in ("query", "key", "value"))
    powers = (torch.nn.functional.silu(q) * k).sum(-1, keepdim=True).div(math.sqrt(12)).exp()
    close(module(X, mask=ph.causal()), module.output(causal_sums(powers * v) / causal_sums(powers)))


def test_the_ratio_of_two_gated_weights_is_the_same_in_every_row() -> None:
    module = built("self_gate", value_dim=11)
    with torch.no_grad():  # values that say which token they are of: the outputs of the heads are the weights
        module.projection.value.weight.zero_()
        module.projection.value.weight.view(4, 11, 48)[:, :, :11] = torch.eye(11)
    x = X.clone()
    x[:, :, :11] = torch.eye(11)
    heads: list[Tensor] = []
    module.output.register_forward_pre_hook(lambda _, given: heads.append(given[0]))
    module(x, mask=ph.causal())
    weights = heads[0]  # B H L 11
    close(weights.sum(-1), torch.ones(2, 4, 11, **F64))
    ratios = weights[..., 0] / weights[..., 1]
    close(ratios[:, :, 1:], ratios[:, :, -1:].expand(-1, -1, 10), 1e-10)


# ---- maps that do not depend on the input ----


@pytest.mark.parametrize("name", FIXED)
def test_fixed_maps_are_the_same_for_every_input_and_learn(name: str) -> None:
    module = built(name)
    close(
        module(X + 3 * OTHER, mask=ph.causal()),
        module(X, mask=ph.causal()) + 3 * module(OTHER, mask=ph.causal()),
    )
    assert (built("mha")(X + OTHER) - built("mha")(X) - built("mha")(OTHER)).abs().max() > 0.1
    module(X, mask=ph.causal()).square().sum().backward()
    assert module.projection.query.weight.grad.abs().max() > 0
    assert module.projection.key.weight.grad.abs().max() > 0
    assert not module.sequence.requires_grad


@pytest.mark.parametrize("name", FIXED)
def test_in_a_stack_the_sequence_goes_through_the_layers(name: str) -> None:
    stack = stacked("mha", name, "taylor2", name, "mha", mlp=32)
    e = stack.attention[1].sequence[None, :11]
    x = X
    for layer in stack.layers:
        attention, beside = layer.attention, {"mask": ph.causal()}
        attend = attention
        if attention.takes_embeddings:
            beside["embeddings"] = layer.norm(e)
        x = x + attend(layer.norm(x), **beside)
        x = x + layer.mlp(layer.mlp_norm(x))
        e = e + attend(layer.norm(e), **beside)
        e = e + layer.mlp(layer.mlp_norm(e))
    close(stack(X, mask=ph.causal()), x)


def test_another_sequence_can_be_given_and_gets_gradients() -> None:
    stack = stacked("fixed_sequence", "mha", "fixed_sequence")
    own = stack.attention[0].sequence
    assert torch.equal(stack(X, sequence=own), stack(X))
    table = torch.randn(20, 48, generator=DRAW, **F64).requires_grad_()
    stack(X, mask=ph.causal(), sequence=table).square().sum().backward()
    assert table.grad[:11].abs().amax(-1).min() > 0
    assert table.grad[11:].abs().max() == 0
    assert torch.equal(built("fixed_sequence").sequence, own)  # drawn from its seed alone
    assert not torch.equal(built("fixed_sequence", seed=1).sequence, own)


def test_layers_of_static_maps_read_the_inputs_of_the_stack() -> None:
    stack = stacked("static", "mha", "static", mlp=32)
    x = X
    for layer in stack.layers:
        given = {"embeddings": X} if layer.attention.takes_embeddings else {}
        x = x + layer.attention(layer.norm(x), mask=ph.causal(), **given)
        x = x + layer.mlp(layer.mlp_norm(x))
    close(stack(X, mask=ph.causal()), x)


def test_static_maps_stay_when_the_input_of_the_layer_changes() -> None:
    module, e = built("static"), torch.randn(2, 11, 48, generator=DRAW, **F64)
    call = {"embeddings": e, "mask": ph.causal()}
    close(module(X + 3 * OTHER, **call), module(X, **call) + 3 * module(OTHER, **call))
    assert (module(X, mask=ph.causal()) - module(X, **call)).abs().max() > 0.1
    plain = built("mha")
    plain.load_state_dict(module.state_dict())
    close(module(X), plain(X))  # without embeddings, as in a first layer


def test_the_map_of_a_static_layer_does_not_depend_on_where_it_stands() -> None:
    stack = stacked("static", "static", "static")
    maps: dict[int, list[Tensor]] = {}
    for n, layer in enumerate(stack.attention):
        key = layer.projection.key
        key.register_forward_hook(lambda _, given, made, n=n: maps.setdefault(n, []).append(made))
    stack(X)
    stack.layers = nn.ModuleList([stack.layers[2], stack.layers[0], stack.layers[1]])
    stack(X)
    assert len(maps) == 3
    assert all(torch.equal(*found) for found in maps.values())


# ---- alone and in turns ----


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("turns", [False, True], ids=["alone", "in turns"])
def test_stacks_decode_as_they_read(name: str, turns: bool) -> None:
    stack = stacked(*(("mha", name, "mha", name) if turns else (name,) * 3), mlp=32)
    with torch.no_grad():
        full = stack(X, mask=ph.causal())
        cache = stack.new_cache(2, max_length=11)
        parts = [stack(x, mask=ph.causal(), cache=cache) for x in X.split([4, 1, 6], dim=1)]
        close(torch.cat(parts, dim=1), full, 1e-10)
        assert cache.nbytes() == stack.cost(11, batch=2).cache_bytes
        cache.crop(5)
        cache.reorder(torch.tensor([0, 1]))
        close(stack(X[:, 5:], mask=ph.causal(), cache=cache), full[:, 5:], 1e-10)
        cache.reset()
        close(stack(X, mask=ph.causal(), cache=cache), full, 1e-10)
    config = ph.from_json(ph.to_json(stack.config))
    again = config.build(**F64).eval()
    again.load_state_dict(stack.state_dict())
    assert torch.equal(again(X), stack(X))


@pytest.mark.parametrize("name", FIXED)
def test_a_stack_counts_what_goes_beside(name: str) -> None:
    stack = ph.build_stack(["mha", name, "mha"], dim=48, heads=4, mlp=32)
    with torch.no_grad(), counting() as counter:
        stack(X.float())
    assert counter.get_total_flops() == stack.cost(11, batch=2).flops


@pytest.mark.parametrize("name", [name for name in SIX if name != "token_mlp"])
def test_biases_and_norms_keep_the_contract(name: str) -> None:
    assert broken_rules(ph.entry(name).name, without="gradients", bias=True, qk_norm=True) == {}


@pytest.mark.parametrize("name", ["taylor2", "random_embeddings", "static"])
def test_rotary_positions_and_shared_keys_keep_the_contract(name: str) -> None:
    without = "equals_twin equals_twin_masked gradients"
    assert broken_rules(ph.entry(name).name, without=without, position=ph.nn.rope(), kv_heads=2) == {}


def test_refusals() -> None:
    with pytest.raises(UnsupportedPattern, match="token_mlp maps every token by itself"):
        built("token_mlp")(X, X)
    with pytest.raises(ConfigError, match="inner must be an integer, at least 1"):
        built("token_mlp", inner=0)
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4; got kv_heads=3"):
        built("taylor2", kv_heads=3)
    with pytest.raises(ConfigError, match="position must not turn queries and keys: self_gate has none"):
        built("self_gate", position=ph.nn.rope())
    with pytest.raises(ConfigError, match="position must not add to the inputs"):
        built("static", position=ph.nn.sinusoidal())
    with pytest.raises(ShapeError, match="embeddings of x must have its shape"):
        built("static")(X, embeddings=X[:, :3])
    with pytest.raises(ConfigError, match="context_embeddings were given without a context"):
        built("static")(X, context_embeddings=X)
    with pytest.raises(
        ShapeError, match="has 8 tokens, and the call reaches 11; build with length=11 or more"
    ):
        built("random_embeddings", length=8)(X)
    with pytest.raises(UnsupportedPattern, match="fixed_sequence looks at places of its own sequence"):
        built("fixed_sequence").new_context_cache(X)
    with pytest.raises(ConfigError, match="length must be at most"):
        built("fixed_sequence", length=10**8)
    with pytest.raises(ConfigError, match="deviation must be"):
        built("random_embeddings", deviation=0)
    with pytest.raises(ConfigError, match="seed must be an integer"):
        built("random_embeddings", seed=0.5)
    with pytest.raises(ConfigError, match="context_dim must be left out"):
        built("random_embeddings", context_dim=8)
    with pytest.raises(ConfigError, match="no layer reads one"):
        stacked("mha")(X, sequence=X[0])
    with pytest.raises(ShapeError, match=r"sequence must have shape \(n, 48\)"):
        stacked("random_embeddings")(X, sequence=X)
