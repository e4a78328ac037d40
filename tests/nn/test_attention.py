from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from polyhead.attend.masks import densify
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn import (
    AuxiliaryLosses,
    MultiHeadAttention,
    OutputProjection,
    PartModule,
    Projection,
    alibi_position,
    auxiliary_losses,
    rope,
    sinusoidal,
)

F64 = {"dtype": torch.float64}


def half_split(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return ph.reference("rope")(x, positions, base=100.0)


# ---- against twins and independent yardsticks ----


@pytest.mark.parametrize("cross", [False, True])
def test_options_are_what_the_twin_says(cross: bool) -> None:
    torch.manual_seed(0)
    attn = ph.build(
        "mha", dim=24, heads=3, head_dim=6, value_dim=5, context_dim=10 if cross else None, bias=True,
        qk_norm=True, position=rope(100.0), score=ph.soft_cap(1.5), normalizer=ph.entmax(1.5), **F64,
    )  # fmt: skip
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    x = torch.randn(2, 7, 24, **F64)
    context = torch.randn(2, 9, 10, **F64) if cross else None
    from entmax import entmax15

    keys = 9 if cross else 7
    mask = densify(ph.causal(), queries=7, keys=keys)[0]
    expected = ph.reference("mha")(
        x, context, parameters=attn.state_dict(), heads=3, mask=mask, turn=half_split,
        normalize=lambda logits: entmax15(1.5 * torch.tanh(logits / 1.5), dim=-1),
    )  # fmt: skip
    close(attn(x, context, mask=ph.causal()), expected, 1e-7)


def test_plain_attention_is_torchs() -> None:
    attn = ph.build("mha", dim=24, heads=3, bias=True, **F64)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True, **F64)
    with torch.no_grad():
        parts = (attn.projection.query, attn.projection.key, attn.projection.value)
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        for p in (*parts, attn.output):
            p.bias.normal_()
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        theirs.out_proj.load_state_dict(attn.output.state_dict())
    x, context = torch.randn(2, 7, 24, **F64), torch.randn(2, 5, 24, **F64)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    ahead = torch.ones(7, 7, dtype=torch.bool).triu(1)
    close(attn(x, mask=ph.causal()), theirs(x, x, x, attn_mask=ahead)[0])
    found = attn(x, context, padding=real)
    close(found, theirs(x, context, context, key_padding_mask=~real)[0])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_of_transformers_gives_the_same(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    name = {"llama": "Llama", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0}, attn_implementation="eager",
    )  # fmt: skip
    module = getattr(transformers.models, family)
    modeling = getattr(module, f"modeling_{family}")
    layer = getattr(modeling, f"{name}Attention")(config, 0).double().eval()
    turns = getattr(modeling, f"{name}RotaryEmbedding")(config)
    attn = ph.build(
        "gqa", dim=32, heads=4, kv_heads=2, position=rope(100.0), qk_norm=family == "qwen3", **F64
    )
    with torch.no_grad():
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            getattr(attn.projection, ours).weight.copy_(getattr(layer, theirs).weight)
        attn.output.weight.copy_(layer.o_proj.weight)
        if family == "qwen3":
            layer.q_norm.weight.normal_()
            attn.projection.query_norm.weight.copy_(layer.q_norm.weight)
    x = torch.randn(2, 9, 32, **F64)
    hidden = torch.full((9, 9), -math.inf, **F64).triu(1)[None, None]
    table = turns(x, torch.arange(9)[None])
    expected = layer(x, position_embeddings=table, attention_mask=hidden)[0]
    close(attn(x, mask=ph.causal()), expected, 1e-5)


def test_value_width_may_differ_from_key_width() -> None:
    attn = ph.build("gqa", dim=16, heads=4, kv_heads=2, head_dim=6, value_dim=3, **F64)
    x = torch.randn(2, 5, 16, **F64)
    expected = ph.reference("grouped_query")(x, parameters=attn.state_dict(), heads=4, kv_heads=2)
    close(attn(x), expected)
    assert attn.new_cache(2, max_length=5).nbytes() == 2 * 5 * 2 * (6 + 3) * 8


# ---- positions ----


def test_positions_of_a_left_padded_batch_go_on_from_those_given() -> None:
    attn = ph.build("mha", dim=16, heads=2, position=sinusoidal(), **F64)
    x = torch.randn(1, 8, 16, **F64)
    expected = attn(x, mask=ph.causal())
    padded = torch.cat([torch.zeros(1, 3, 16, **F64), x], dim=1)
    real = torch.tensor([[False] * 3 + [True] * 8])
    positions = (real.cumsum(1) - 1).clamp(min=0)
    close(attn(padded, mask=ph.causal(), padding=real, positions=positions)[:, 3:], expected)
    cache = attn.new_cache(1)
    with torch.no_grad():
        first = attn(
            padded[:, :6], mask=ph.causal(), padding=real[:, :6], positions=positions[:, :6], cache=cache
        )
        rest = [attn(padded[:, n : n + 1], mask=ph.causal(), cache=cache) for n in range(6, 11)]
    close(torch.cat([first, *rest], dim=1)[:, 3:], expected)


@pytest.mark.parametrize("chunks", [[1] * 30, [11, *[1] * 19], [4, 20, 6]])
def test_alibi_and_rope_stay_right_when_tokens_have_fallen_out(chunks: list[int]) -> None:
    attn = ph.build("mha", dim=16, heads=2, position=rope(), score=ph.alibi(2), **F64)
    x = torch.randn(2, 30, 16, **F64)
    full = attn(x, mask=ph.causal() & (ph.window(4) | ph.sink(2)) & ph.dilated(9, 3))
    cache = attn.new_cache(2, window=5, sinks=2)
    with torch.no_grad():
        parts = [attn(p, mask=ph.causal() & ph.dilated(9, 3), cache=cache) for p in x.split(chunks, 1)]
    close(torch.cat(parts, dim=1), full)


def test_alibi_as_position_is_the_score() -> None:
    one = ph.build("mha", dim=16, heads=2, position=alibi_position(), **F64)
    two = ph.build("mha", dim=16, heads=2, score=ph.alibi(2), **F64)
    two.load_state_dict(one.state_dict(), strict=False)
    x = torch.randn(2, 9, 16, **F64)
    close(one(x, mask=ph.causal()), two(x, mask=ph.causal()))
    slopes = torch.tensor([2.0**-4, 2.0**-8], **F64)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    expected = ph.reference("mha")(
        x, parameters=one.state_dict(), heads=2, bias=-slopes[:, None, None] * distance
    )
    close(one(x), expected)


def test_masks_and_biases_of_queries_that_come_late_to_a_context() -> None:
    attn = ph.build("mha", dim=16, heads=2, position=rope(), score=ph.alibi(2), **F64)
    x, context = torch.randn(2, 5, 16, **F64), torch.randn(2, 9, 16, **F64)
    full = attn(x, context, mask=ph.window(2, 1))
    cache = attn.new_context_cache(context, queries=5)
    close(torch.cat([attn(p, mask=ph.window(2, 1), cache=cache) for p in x.split([2, 1, 2], 1)], 1), full)


# ---- descriptions in the module ----


def test_learned_tensors_of_parts_are_parameters() -> None:
    torch.manual_seed(0)
    attn = ph.build(
        "mha", dim=16, heads=2, **F64,
        score=ph.relative_bias(torch.randn(2, 7, requires_grad=True)),
        normalizer=ph.softmax(sink=torch.zeros(2, requires_grad=True)),
    )  # fmt: skip
    names = dict(attn.named_parameters())
    assert names["score.tensor0"].shape == (2, 7)
    assert names["score.tensor0"].dtype == torch.float64
    x = torch.randn(2, 9, 16, **F64)
    attn(x, mask=ph.causal()).square().sum().backward()
    for name in ("score.tensor0", "normalizer.tensor0"):
        assert names[name].grad is not None
        assert names[name].grad.abs().sum() > 0
    assert attn.cost(9).parameters == sum(p.numel() for p in attn.parameters())


def test_given_tensors_of_parts_keep_their_precision() -> None:
    attn = ph.build("mha", dim=24, heads=3, score=ph.alibi(3)).bfloat16()
    assert attn.score.tensor0.dtype == torch.float32
    assert torch.equal(attn.score().slopes, ph.alibi(3).slopes)
    assert attn.output.weight.dtype == torch.bfloat16


def test_a_part_in_a_module_is_a_copy() -> None:
    sink = torch.zeros(2, requires_grad=True)
    part = ph.softmax(sink=sink)
    one, two = PartModule(part), PartModule(part)
    with torch.no_grad():
        one.tensor0.add_(1)
    assert two().sink.sum() == 0
    assert sink.sum() == 0
    assert PartModule(ph.soft_cap(2.0))() == ph.soft_cap(2.0)


def test_a_mask_of_the_module_holds_in_every_call() -> None:
    attn = ph.build("mha", dim=16, heads=2, mask=ph.window(3), **F64)
    plain = ph.build("mha", dim=16, heads=2, **F64)
    plain.load_state_dict(attn.state_dict())
    x = torch.randn(2, 9, 16, **F64)
    close(attn(x), plain(x, mask=ph.window(3)))
    close(attn(x, mask=ph.sink(2)), plain(x, mask=ph.window(3) & ph.sink(2)))


def test_any_normaliser_serves() -> None:
    for normalizer in (ph.sigmoid(), ph.sparsemax(), ph.entmax(1.3), ph.softmax(sink=0.5)):
        attn = ph.build("gqa", dim=16, heads=4, normalizer=normalizer, **F64)
        x = torch.randn(2, 9, 16, **F64)
        full = attn(x, mask=ph.causal())
        cache = attn.new_cache(2)
        with torch.no_grad():
            parts = [attn(p, mask=ph.causal(), cache=cache) for p in x.split([4, 1, 4], dim=1)]
        close(torch.cat(parts, dim=1), full, 1e-10)
        assert ph.from_json(ph.to_json(attn.config)) == attn.config


def test_parts_can_be_put_together_by_hand() -> None:
    projection = Projection(16, 4, kv_heads=2, head_dim=6, dtype=torch.float64)
    output = OutputProjection(16, 4, 6, bias=True, dtype=torch.float64)
    attn = MultiHeadAttention(projection, output, position=rope(), scale=1.0)
    x = torch.randn(2, 5, 16, **F64)
    turned = ph.reference("mha")(
        x, parameters={**attn.state_dict(), **_tiled(attn)}, heads=4, scale=1.0, turn=ph.reference("rope")
    )
    close(attn(x), turned)


def _tiled(attn: MultiHeadAttention) -> dict[str, torch.Tensor]:
    """Key and value weights of grouped attention, repeated to one for every query head."""
    found = {}
    for name in ("key", "value"):
        weight = getattr(attn.projection, name).weight.detach()
        found[f"projection.{name}.weight"] = weight.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1)
    return found


# ---- initialisation, cost, losses, refusals ----


def test_weights_start_with_the_variance_of_their_inputs() -> None:
    torch.manual_seed(0)
    attn = ph.build("mqa", dim=256, heads=8, bias=True)
    for linear in (attn.projection.query, attn.projection.key, attn.projection.value, attn.output):
        assert linear.weight.var().item() == pytest.approx(1 / 256, rel=0.05)
        assert not linear.bias.any()


def test_cost_prints_and_adds_up() -> None:
    cost = ph.build("mha", dim=64, heads=4).cost(128, batch=2)
    assert cost.parameters == 4 * 64 * 64
    assert cost.projections == 2 * 2 * 128 * 4 * 64 * 64
    assert cost.scores == cost.values == 2 * 2 * 128 * 128 * 64
    assert cost.flops == cost.projections + cost.scores + cost.values
    assert cost.kv_bytes_per_token == 2 * 64 * 4
    assert cost.cache_bytes == 2 * 128 * 512
    assert "512 bytes per token" in str(cost)
    half = ph.build("mha", dim=64, heads=4).cost(128, dtype=torch.bfloat16)
    assert half.kv_bytes_per_token == 256


def test_auxiliary_losses_are_collected_by_path() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.losses = AuxiliaryLosses()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.losses.record("balance", x.square().mean())
            return x

    model = nn.Sequential(Router(), nn.Linear(3, 3), Router())
    assert auxiliary_losses(model) == {}
    x = torch.randn(2, 3, requires_grad=True)
    model(x)
    found = auxiliary_losses(model)
    assert list(found) == ["0.balance", "2.balance"]
    sum(found.values()).backward()
    assert x.grad is not None
    with pytest.raises(ShapeError, match="must be a scalar; got shape"):
        model[0].losses.record("balance", x)
    import copy

    assert auxiliary_losses(copy.deepcopy(model)) == {}
    assert model.state_dict().keys() == {"1.weight", "1.bias"}


@pytest.mark.parametrize("held", [False, True])
def test_a_subclass_with_losses_says_so_and_records_them(held: bool) -> None:
    class Norms(MultiHeadAttention):
        leaves_losses = True

        def _account(self, q: torch.Tensor, real: torch.Tensor | None) -> None:
            if self.training:
                self.auxiliary.record("norms", q.square().mean())

    module, x = Norms(Projection(16, 2)), torch.randn(1, 3, 16)
    call = {"cache": module.new_context_cache(x)} if held else {}
    module(x, **call)
    assert list(auxiliary_losses(module)) == ["norms"]
    module.eval()(x, **call)  # the losses of the call before are forgotten without its doing
    assert auxiliary_losses(module) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dim": 30, "heads": 4},
            "heads must divide dim .* got heads=4 and dim=30; allowed are 1, 2, 3, 5, 6",
        ),
        ({"dim": 32, "heads": "4"}, "heads must be an integer, at least 1; got '4'"),
        ({"dim": 32, "heads": 4, "head_dim": 0}, "head_dim must be an integer, at least 1; got 0"),
        ({"dim": 32, "heads": 4, "bias": 1}, "bias must be True or False; got 1"),
        (
            {"dim": 32, "heads": 4, "dropout": 1.0},
            "dropout must be a finite number at least 0 and below 1, got 1.0",
        ),
        (
            {"dim": 32, "heads": 4, "dropout": "x"},
            "dropout must be a finite number at least 0 and below 1, got 'x'",
        ),
        ({"dim": 32, "heads": 4, "position": "rope"}, "position must be a Position; got 'rope'"),
        ({"dim": 32, "heads": 4, "normalizer": None, "mask": 3}, "mask must be a Mask; got 3"),
        ({"dim": 32, "heads": 4, "score": 3.0}, "score must be a Score"),
    ],
)
def test_a_bad_configuration_fails_when_it_is_made(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ph.build("mha", **options)


def test_kv_heads_that_do_not_divide() -> None:
    with pytest.raises(
        ConfigError, match="kv_heads must divide heads=4 or be a multiple of it; got kv_heads=3"
    ):
        Projection(32, 4, kv_heads=3)


def test_inputs_that_do_not_fit() -> None:
    attn = ph.build("mha", dim=16, heads=2, context_dim=8)
    x = torch.randn(2, 5, 16)
    with pytest.raises(ShapeError, match=r"context must have shape \(B, length, 8\); got \(2, 5, 16\)"):
        attn(x, x)
    with pytest.raises(ShapeError, match=r"padding must be a bool tensor \(2, 5\), True at real tokens of x"):
        ph.build("mha", dim=16, heads=2)(x, padding=torch.ones(2, 5))
    for position in (rope(), None):
        for wrong in (torch.arange(4), torch.zeros(7, 3, dtype=torch.long), torch.rand(5), [0, 1, 2, 3, 4]):
            with pytest.raises(ShapeError, match=r"positions must be an integer tensor \(5,\) or \(2, 5\)"):
                ph.build("mha", dim=16, heads=2, position=position)(x, positions=wrong)
    with pytest.raises(ShapeError, match=r"x must be torch.float32, as the module's weights are"):
        ph.build("mha", dim=16, heads=2)(x.double())


@pytest.mark.parametrize("how", [{}, {"max_length": 11}, {"window": 12}], ids=["grows", "fixed", "window"])
@pytest.mark.parametrize(
    "wrong",
    [
        ph.causal,
        ph.documents(torch.zeros(1, 5, dtype=torch.long)),
        ph.padding(torch.ones(1, 3, dtype=torch.bool)),
        ph.per_head([ph.causal()] * 3),
    ],
    ids=["no mask", "documents", "padding", "heads"],
)
def test_a_call_that_is_refused_leaves_the_cache_as_it_was(how: dict, wrong: Any) -> None:
    attn = ph.build("mha", dim=16, heads=2, position=rope()).eval()
    x = torch.randn(1, 11, 16)
    cache = attn.new_cache(1, **how)
    attn(x[:, :10], mask=ph.causal(), cache=cache)
    with pytest.raises(ph.errors.PolyheadError):
        attn(x[:, 10:], mask=wrong, cache=cache)
    assert cache.length == 10
    close(attn(x[:, 10:], mask=ph.causal(), cache=cache), attn(x, mask=ph.causal())[:, 10:], 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"score": ph.alibi(4), "position": rope()},
        {"normalizer": ph.softmax(sink=torch.zeros(4, requires_grad=True))},
        {"mask": ph.window(5), "position": sinusoidal()},
        {"qk_norm": True, "value_dim": 4, "normalizer": ph.entmax(1.5)},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_compile_to_one_graph(options: dict) -> None:
    attn = ph.build("gqa", dim=32, heads=4, **options)
    x = torch.randn(2, 17, 32)
    torch._dynamo.reset()
    compiled = torch.compile(attn, backend="eager", fullgraph=True)
    for call in ({"mask": ph.causal()}, {"mask": ph.causal() & (ph.window(3) | ph.sink(1))}):
        found, expected = (module(x, **call) for module in (compiled, attn))
        close(found, expected, 1e-5)
        (one,), (two,) = (
            torch.autograd.grad(y.sin().sum(), attn.projection.query.weight) for y in (found, expected)
        )
        close(one, two, 1e-4)
    torch._dynamo.reset()
