"""What the paper of EL-attention says must hold: multi-head attention, with its input as its cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyhead as ph
from conformance.contract import ragged
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName
from polyhead.mechanisms.el_attention import el_attention

F64 = {"dtype": torch.float64}
X = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(0), **F64)
C = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1), **F64)


def built(name: str = "mha", **config: Any) -> Any:
    torch.manual_seed(0)
    module = ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p))
    return module


def close(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def answers(module: nn.Module, **given: Any) -> list[Tensor]:
    x, context = X.clone().requires_grad_(), given.pop("context", None)
    out = module(x, context, **given)
    return [out, *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("scheme", ["absorbed", "expanded"])
@pytest.mark.parametrize(("bias", "kv_heads"), [(True, 2), (False, 1)])
def test_every_order_keeps_the_contract(scheme: str, bias: bool, kv_heads: int) -> None:
    # that check asks for normalised keys too, which are refused where they would be absorbed
    without = "equals_twin" if scheme == "absorbed" else ""
    options = {"scheme": scheme, "bias": bias, "kv_heads": kv_heads}
    assert broken_rules("el_attention", without=without, **options) == {}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "part",
    [
        {},
        {"normalizer": ph.sigmoid()},
        {"normalizer": ph.entmax(1.5)},
        {"normalizer": ph.softmax(sink=torch.ones(4))},
        {"score": ph.soft_cap(1.0)},
        {"position": ph.nn.alibi_position()},
        {"position": ph.nn.sinusoidal()},
        {"weight_map": ph.head_mix(torch.rand(4, 4, generator=torch.Generator().manual_seed(2), **F64))},
        {"head_dim": 5, "value_dim": 6},
    ],
    ids=["plain", "sigmoid", "entmax", "sink", "soft cap", "alibi", "sinusoidal", "mixed heads", "widths"],
)
@pytest.mark.parametrize(
    "given",
    [
        {"mask": ph.causal()},
        {
            "mask": ph.causal() & ph.documents(torch.tensor([-1, *[0] * 10])),
            "padding": ragged(3, 11, left=True),
        },
        {"context": C, "padding": ragged(3, 7, left=False)},
    ],
    ids=["causal", "a row that sees nothing", "cross"],
)
def test_it_is_multi_head_attention_without_loss(
    bias: bool, part: dict[str, Any], given: dict[str, Any]
) -> None:
    plain = built(bias=bias, **part)
    module = built("el_attention", bias=bias, scheme="absorbed", **part)
    module.load_state_dict(plain.state_dict())
    for found, expected in zip(answers(module, **given), answers(plain, **given), strict=True):
        close(found, expected)


def test_the_output_does_not_depend_on_the_bias_of_keys() -> None:
    module = built("el_attention", bias=True, scheme="absorbed")
    before = module(X, mask=ph.causal())
    with torch.no_grad():
        module.projection.key.bias.add_(3.0)
    close(module(X, mask=ph.causal()), before)


def test_maps_of_attention_are_those_of_multi_head_attention() -> None:
    plain, module = built(), built("el_attention")
    module.load_state_dict(plain.state_dict())
    q = plain.projection.queries(X)
    k, v = plain.projection.keys_values(X)
    (rows,) = module._rows(X, 0)
    wide = module.projection.absorb_key(q)
    seen: list[list[Tensor]] = [[], []]

    class Keep:
        needs_logits = False

        def __init__(self, found: list[Tensor]) -> None:
            self.found = found

        def visit(self, tile: Any, logits: Tensor, weights: Tensor) -> None:
            self.found.append(weights.clone())

    ph.observe(q, k, v, [Keep(seen[0])], mask=ph.causal())
    ph.observe(wide, rows, rows, [Keep(seen[1])], mask=ph.causal(), scale=8**-0.5)
    for found, expected in zip(*seen, strict=True):
        close(found, expected)


def test_a_cache_holds_the_inputs_and_no_more() -> None:
    for heads in (1, 4, 8):
        module, plain = built("el_attention", heads=heads), built("mha", heads=heads)
        cache, other = module.new_cache(3, max_length=11), plain.new_cache(3, max_length=11)
        assert cache.nbytes() == module.cost(11, batch=3).cache_bytes == 3 * 11 * 32 * 8
        assert 2 * cache.nbytes() == other.nbytes()
        module(X, mask=ph.causal(), cache=cache)
        close(cache._tokens.streams[0][:, 0], X, 0)
    assert built("el_attention", bias=True).cost(1).kv_bytes_per_token == 33 * 8


def test_layers_and_beams_read_one_context() -> None:
    layers = [built("el_attention", scheme="absorbed"), built("el_attention", bias=False)]
    caches = [layer.new_context_cache(C) for layer in layers]
    assert {cache.read(0).rows[0].data_ptr() for cache in caches} == {C.data_ptr()}
    beams = X[:, :5]  # of each of the three contexts, five
    shared = layers[0](beams, C)
    alone = layers[0](beams.reshape(15, 1, 32), C.repeat_interleave(5, dim=0))
    close(shared.reshape(15, 1, 32), alone)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mha", {"bias": True}),
        ("grouped_query", {"kv_heads": 2, "score": ph.soft_cap(2.0)}),
        ("multi_query", {"position": ph.nn.sinusoidal(), "normalizer": ph.softmax(sink=torch.ones(4))}),
    ],
)
def test_a_module_is_taken_over_with_its_parameters(name: str, options: dict[str, Any]) -> None:
    plain = built(name, **options).eval()
    module = el_attention(plain, scheme="absorbed")
    assert {id(p) for p in module.parameters()} == {id(p) for p in plain.parameters()}
    assert not module.training
    assert module.state_dict().keys() == plain.state_dict().keys()
    full = plain(X, mask=ph.causal())
    cache = module.new_cache(3)
    with torch.no_grad():
        parts = [module(x, mask=ph.causal(), cache=cache) for x in X.split([6, 1, 1, 3], dim=1)]
    close(torch.cat(parts, dim=1), full)


def test_a_step_multiplies_more_than_with_keys_and_values() -> None:
    module, plain = built("el_attention"), built()
    ours, theirs = module.step_cost(4095), plain.step_cost(4095)
    assert ours.scores + ours.values == 4 * 4096 * 4 * 32  # 4·S·H·d
    assert theirs.scores + theirs.values == 4 * 4096 * 32  # 4·S·H·D
    assert ours.projections == theirs.projections  # 2·d·D of a head, for the query instead of the key
    assert module.plan(1, 4095).scheme == "absorbed"
    assert module.plan(64).scheme == "expanded"


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="turns keys cannot be moved past their map; got Rope"):
        built("el_attention", position=ph.nn.rope())
    with pytest.raises(ConfigError, match="normalised .* cannot be absorbed"):
        built("el_attention", qk_norm=True, scheme="absorbed")
    with pytest.raises(UnknownName, match="did you mean 'absorbed'"):
        built("el_attention", scheme="absorbd")
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4; got kv_heads=8"):
        built("el_attention", kv_heads=8)
    with pytest.raises(ConfigError, match="turns keys"):
        el_attention(built(position=ph.nn.rope()))
    with pytest.raises(ConfigError, match="module normalises its keys"):
        el_attention(built(qk_norm=True))
    with pytest.raises(
        ConfigError, match="must be multi-head, grouped-query or multi-query attention; got Lat"
    ):
        el_attention(built("mla"))
    with pytest.raises(UnknownName, match="scheme of EL-attention"):
        el_attention(built(), scheme="fast")
