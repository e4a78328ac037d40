"""Stacks of layers of different mechanisms."""

from __future__ import annotations

import json

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, ShapeError, UnknownName
from polyhead.mechanisms import StackConfig, configure

NAMES = ["mha", ("grouped_query", {"kv_heads": 1}), "sparse_query", "multi_query"]


def build(layers=tuple(NAMES), **options) -> ph.nn.AttentionStack:
    torch.manual_seed(0)
    return ph.build_stack(layers, dim=32, heads=4, dtype=torch.float64, **options).eval()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


X = draw(2, 11, 32)


def test_it_is_what_the_equation_says() -> None:
    stack = build(mlp=48, norm="layer", final_norm=True)
    x = X
    for layer in stack.layers:
        x = x + layer.attention(layer.norm(x), mask=ph.causal())
        x = x + layer.mlp.down(torch.nn.functional.gelu(layer.mlp.up(layer.mlp_norm(x))))
    torch.testing.assert_close(stack(X, mask=ph.causal()), stack.norm(x), rtol=0, atol=1e-12)
    plain = build(("mha",))
    expected = X + plain.layers[0].attention(X / (X.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    torch.testing.assert_close(plain(X), expected, rtol=0, atol=1e-12)


def test_layers_are_those_that_were_asked_for() -> None:
    stack = build(position=ph.nn.rope())
    assert [layer.config for layer in stack.attention] == list(stack.config.layers)
    assert [layer.kv_heads for layer in stack.attention] == [4, 1, 1, 1]
    assert all(layer.config.position == ph.nn.rope() for layer in stack.attention)
    own = configure("mha", dim=32, heads=8)
    assert build(("mha", own)).attention[1].config == own


@pytest.mark.parametrize("chunks", [[1] * 11, [5, 1, 5], [11]], ids=str)
@pytest.mark.parametrize("options", [{}, {"mlp": 16, "position": ph.nn.rope()}], ids=["plain", "mlp"])
def test_decoding_equals_the_full_call(chunks: list[int], options: dict) -> None:
    stack = build(**options)
    padding = torch.ones(2, 11, dtype=torch.bool)
    padding[1, :3] = False
    with torch.no_grad():
        full = stack(X, mask=ph.causal(), padding=padding)
        cache, seen, parts = stack.new_cache(2), 0, []
        for x in X.split(chunks, dim=1):
            real = padding[:, seen : seen + x.shape[1]]
            parts.append(stack(x, mask=ph.causal(), padding=real, cache=cache))
            seen += x.shape[1]
        found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found[padding], full[padding], rtol=0, atol=1e-10)
    assert cache.length == 11
    assert len(cache.layers) == 4


def test_the_cache_can_be_edited_and_says_what_it_holds() -> None:
    stack = build()
    with torch.no_grad():
        cache = stack.new_cache(2, max_length=11)
        stack(X, mask=ph.causal(), cache=cache)
        assert cache.nbytes() == stack.cost(11, batch=2).cache_bytes
        cache.crop(6)
        again = stack(X[:, 6:], mask=ph.causal(), cache=cache)
        torch.testing.assert_close(again, stack(X, mask=ph.causal())[:, 6:], rtol=0, atol=1e-10)
        beams = torch.tensor([1, 1])
        cache.crop(6)
        cache.reorder(beams)
        mixed = torch.cat([X[beams, :6], X[:, 6:]], dim=1)
        again = stack(X[:, 6:], mask=ph.causal(), cache=cache)
        torch.testing.assert_close(again, stack(mixed, mask=ph.causal())[:, 6:], rtol=0, atol=1e-10)
        cache.reset()
        assert cache.length == 0
        assert not cache.holds_context


def test_padding_and_context_are_handed_through() -> None:
    stack = build(mlp=16)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[0, 8:] = False
    clean = stack(X, padding=real)
    poisoned = X.masked_fill(~real[..., None], float("nan"))
    torch.testing.assert_close(stack(poisoned, padding=real)[real], clean[real], rtol=0, atol=1e-12)
    context = draw(2, 7, 32)
    found = stack(X, context)
    assert not torch.allclose(found, stack(X))
    cache = stack.new_context_cache(context, queries=11)
    assert cache.holds_context
    torch.testing.assert_close(stack(X, cache=cache), found, rtol=0, atol=1e-12)


def test_a_mask_for_every_layer() -> None:
    stack = build()
    masks = [ph.causal(), ph.causal() & ph.window(2), ph.causal(), None]
    x = X
    for layer, mask in zip(stack.layers, masks, strict=True):
        x = layer(x, None, mask=mask)
    assert torch.equal(stack(X, mask=masks), x)


def test_positions_reach_every_layer() -> None:
    stack = build(position=ph.nn.rope())
    torch.testing.assert_close(stack(X, positions=torch.arange(11) + 5), stack(X), rtol=0, atol=1e-9)
    assert not torch.allclose(stack(X, positions=2 * torch.arange(11)), stack(X))


def test_the_description_goes_through_json() -> None:
    stack = build(mlp=48, norm="layer", position=ph.nn.rope(), regularizers=ph.nn.drop_head(0.1))
    config = ph.from_json(json.loads(json.dumps(ph.to_json(stack.config))))
    assert config == stack.config
    assert hash(config) == hash(stack.config)
    again = config.build(dtype=torch.float64).eval()
    again.load_state_dict(stack.state_dict())
    assert torch.equal(again(X), stack(X))


def test_it_costs_what_its_layers_cost() -> None:
    stack = build(mlp=48, final_norm=True)
    cost = stack.cost(100, batch=2)
    layers = [layer.cost(100, batch=2) for layer in stack.attention]
    assert cost.parameters == sum(p.numel() for p in stack.parameters())
    assert cost.scores == sum(one.scores for one in layers)
    assert cost.projections == sum(one.projections for one in layers) + 4 * 2 * 2 * 100 * 2 * 32 * 48
    assert cost.kv_bytes_per_token == sum(one.kv_bytes_per_token for one in layers)
    step = stack.step_cost(100, 3, 2)
    layers = [layer.step_cost(100, 3, 2) for layer in stack.attention]
    assert step.values == sum(one.values for one in layers)
    assert step.projections == sum(one.projections for one in layers) + 4 * 2 * 2 * 3 * 2 * 32 * 48
    assert stack.step_cost(0, 100, 2) == cost


def test_steps_of_a_fixed_sequence_beside_the_inputs_count_too() -> None:
    stack = ph.build_stack(["mha", ("fixed_sequence", {"length": 128})], dim=32, heads=4)
    own = [layer.step_cost(100, 3, 2) for layer in stack.attention]
    beside = stack.attention[0].step_cost(100, 3, 1)
    step = stack.step_cost(100, 3, 2)
    assert step.flops == sum(one.flops for one in own) + beside.flops
    assert step.kv_bytes_per_token == sum(one.kv_bytes_per_token for one in own)


def test_half_precision_autocast_and_one_graph() -> None:
    stack = ph.build_stack(["mha", "gqa"], dim=32, heads=4, mlp=16, norm="layer", dtype=torch.bfloat16)
    assert stack(X.bfloat16()).dtype == torch.bfloat16
    stack = ph.build_stack(["mha", "gqa"], dim=32, heads=4, mlp=16)
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(torch.isfinite(stack(X.float())).all())
    torch._dynamo.reset()
    compiled = torch.compile(stack, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X.float(), mask=ph.causal()), stack(X.float(), mask=ph.causal()))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: build(("mhaa",)), UnknownName, "no mechanism is called 'mhaa'; did you mean 'mha'"),
        (lambda: build(()), ConfigError, "layers must be configurations of mechanisms, at least one"),
        (lambda: build("mha"), ConfigError, r"layers must be names of mechanisms, such as \['mha', 'gqa'\]"),
        (lambda: build((3,)), ConfigError, r"a layer must be a name.*got 3 \(int\)"),
        (lambda: build((("gqa", 2),)), ConfigError, "a layer must be a name"),
        (lambda: build(("mha",), kv_heads=2), ConfigError, "mha has no option 'kv_heads'"),
        (lambda: build((("gqa", {"kv_heads": 3}),)), ConfigError, "kv_heads must divide heads=4"),
        (lambda: build(norm="batch"), ConfigError, "norm must be one of rms, layer; got 'batch'"),
        (lambda: build(mlp=0), ConfigError, "mlp must be an integer, at least 1"),
        (lambda: build(final_norm=1), ConfigError, "final_norm must be True or False"),
        (lambda: build(("mha", configure("mha", dim=8, heads=2))), ConfigError, "same dim; got 8, 32"),
        (lambda: StackConfig(()), ConfigError, "at least one"),
        (lambda: ph.nn.AttentionStack([torch.nn.Linear(2, 2)], 2), ConfigError, "must be attention modules"),
        (lambda: build()(X[..., :5]), ShapeError, r"x must have shape \(B, length, 32\)"),
        (lambda: build()(X, mask=[ph.causal()]), ConfigError, "one mask, or one for each of 4 layers; got 1"),
        (lambda: build()(X, cache=build(("mha",)).new_cache()), ConfigError, "cache must be what new_cache"),
        (lambda: build()(X, cache=build().attention[0].new_cache(2)), ConfigError, "cache must be what"),
    ],
)
def test_what_makes_no_sense_is_refused(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
