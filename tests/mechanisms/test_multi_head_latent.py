"""What the papers of latent attention say must hold: one latent a token, and orders that all agree."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import polyhead as ph
from conformance import contract
from conformance.contract import Case, failing, ragged
from polyhead.errors import ConfigError, UnknownName
from polyhead.nn import rope
from polyhead.nn.hardware import Hardware
from polyhead.nn.latent_plan import SCHEMES, LatentSizes

F64 = {"dtype": torch.float64}
X = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(0), **F64)
C = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1), **F64)
# widths that all differ, a latent of the queries, groups in the up-projections
ODD = {"query_latent_dim": 20, "kv_heads": 2, "value_dim": 6, "latent_dim": 18, "rope_dim": 4}
V3 = LatentSizes(7168, 7168, 128, 128, 1536, 512, 64, 128, 128, True)


def built(seed: int = 0, name: str = "multi_head_latent", **config: Any) -> Any:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


def close(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@dataclasses.dataclass(frozen=True)
class With(Case):
    """The mechanism with options."""

    options: tuple[tuple[str, Any], ...] = ()

    def build(self, **given: Any) -> nn.Module:
        return super().build(**dict(self.options) | given)


QUICK = (
    contract.equals_twin_masked,
    contract.decode_padded,
    contract.decode_window,
    contract.decode_cross,
    contract.padding,
)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["part", "whole"])
def test_every_order_keeps_the_contract(scheme: str, whole: bool) -> None:
    options = ODD | {"scheme": scheme}
    # the first call that keeps a product also makes it, which the cost of a call does not count
    checks = [c for c in contract.CHECKS if c.__name__ != "cost" or scheme != "absorbed_reuse"]
    case = With(ph.entry("mla"), options=tuple(options.items()))
    assert failing(case, checks if whole else QUICK) == {}


# ---- the orders ----


def answers(module: nn.Module, **given: Any) -> list[Tensor]:
    x, context = X.clone().requires_grad_(), given.pop("context", None)
    out = module(x, context, **given)
    return [out, *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("options", [{}, ODD], ids=["default", "odd"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"mask": ph.causal()},
        {"mask": ph.causal() & (ph.window(3) | ph.sink(1)), "padding": ragged(3, 11, left=True)},
        {"padding": ragged(3, 11, left=False)},
        {"context": C},
        {"context": C, "mask": ph.causal(), "padding": ragged(3, 7, left=True)},
        {"positions": torch.arange(11) * 3 + 5},
    ],
    ids=["self", "causal", "window", "padded", "cross", "causal cross", "positions"],
)
def test_all_orders_give_the_same_answer_and_gradients(
    options: dict[str, Any], given: dict[str, Any]
) -> None:
    expected = answers(built(scheme="expanded", **options), **given)
    for scheme in (*SCHEMES[1:], "auto"):
        for found, one in zip(answers(built(scheme=scheme, **options), **given), expected, strict=True):
            close(found, one)


@pytest.mark.parametrize(
    "part",
    [
        {"score": ph.soft_cap(2.0)},
        {"normalizer": ph.entmax(1.5)},
        {"normalizer": ph.sigmoid()},
        {"position": ph.nn.alibi_position()},
        {"position": ph.nn.sinusoidal()},
        {"normalizer": ph.softmax(sink=torch.ones(4))},
        {"weight_map": ph.head_mix(torch.rand(4, 4, generator=torch.Generator().manual_seed(2), **F64))},
    ],
    ids=["score", "entmax", "sigmoid", "alibi", "sinusoidal", "sink", "mixed heads"],
)
def test_so_they_do_with_other_parts(part: dict[str, Any]) -> None:
    expected = answers(built(scheme="expanded", **part), mask=ph.causal())
    for scheme in SCHEMES[1:]:
        for found, one in zip(answers(built(scheme=scheme, **part), mask=ph.causal()), expected, strict=True):
            close(found, one)


def test_decoding_in_one_order_goes_on_from_a_prefill_in_another() -> None:
    full = built(scheme="expanded", **ODD)(X, mask=ph.causal())
    for first in SCHEMES:
        for second in SCHEMES:
            before, after = built(scheme=first, **ODD), built(scheme=second, **ODD)
            cache = before.new_cache(3)
            with torch.no_grad():
                parts = [before(X[:, :6], mask=ph.causal(), cache=cache)]
                parts += [after(x, mask=ph.causal(), cache=cache) for x in X[:, 6:].split(1, dim=1)]
            close(torch.cat(parts, dim=1), full)


def test_a_kept_product_follows_its_weights() -> None:
    module, plain = built(scheme="absorbed_reuse"), built(scheme="expanded")
    with torch.no_grad():
        close(module(X), plain(X))
        kept = module._folded[1]
        close(module(X[:, :1]), plain(X[:, :1]))
        assert module._folded[1] is kept, "it is made once"
        for each in (module, plain):
            each.projection.key.weight.mul_(1.5)
        close(module(X), plain(X))
        for each in (module, plain):
            each.load_state_dict(built(seed=3).state_dict())
        close(module(X), plain(X))


# ---- reductions and the cache ----


def test_whole_width_latents_of_the_inputs_are_multi_head_attention() -> None:
    module = built(latent_dim=32, rope_dim=0, position=ph.nn.no_position())
    plain = built(name="mha")
    context = nn.functional.rms_norm(C, (32,), eps=1e-12)  # of root mean square 1, so that the norm is idle
    with torch.no_grad():
        module.projection.latent.weight.copy_(torch.eye(32))
        module.projection.latent_norm.eps = 0.0
    state = module.state_dict()
    names = ("projection.query.weight", "projection.key.weight", "projection.value.weight", "output.weight")
    plain.load_state_dict({name: state[name] for name in names})
    close(module(X, context), plain(X, context))


def test_the_rotary_key_is_one_for_all_heads_and_alone_turned() -> None:
    module = built(scheme="expanded")
    (row,) = module._rows(X, 0)
    k, _ = module.projection.expand(row)
    assert k.shape == (3, 4, 11, 12)
    close(k[:, 0, :, 8:], k[:, 3, :, 8:], 0)
    (later,) = module._rows(X, 5)
    close(later[..., :32], row[..., :32], 0)
    assert (later[..., 32:] - row[..., 32:]).abs().max() > 0.1


def test_bytes_of_the_cache_do_not_depend_on_the_heads() -> None:
    held = set()
    for heads in (1, 4, 8):
        module = built(heads=heads, head_dim=8, latent_dim=16, rope_dim=4)
        cache = module.new_cache(3, max_length=11)
        module(X, mask=ph.causal(), cache=cache)
        held.add((cache.nbytes(), module.cost(11, batch=3).cache_bytes, module.cost(1).kv_bytes_per_token))
    assert held == {(3 * 11 * 20 * 8, 3 * 11 * 20 * 8, 20 * 8)}


def test_parameters_are_those_of_the_formula() -> None:
    d, heads, p, dc, dn, dr, dv = 32, 4, 20, 18, 8, 4, 6
    module = built(**ODD | {"kv_heads": 4})
    expected = (
        d * p + p * heads * (dn + dr) + d * (dc + dr) + dc * heads * (dn + dv) + heads * dv * d + p + dc
    )
    assert module.cost(1).parameters == expected == sum(p.numel() for p in module.parameters())


def test_half_of_a_head_is_rotary_when_nothing_is_said() -> None:
    config = ph.build("mla", dim=512, heads=8).config
    assert (config.head_dim, config.value_dim, config.latent_dim, config.rope_dim) == (64, 64, 256, 32)


def test_only_differences_of_positions_count() -> None:
    module = built()
    close(module(X, positions=torch.arange(11) + 1000), module(X))
    assert (module(X, positions=torch.arange(11) * 2) - module(X)).abs().max() > 1e-3


# ---- what the orders cost, paper 109 ----


def dense(batch: int, queries: int, cached: int, scheme: str, **options: Any) -> tuple[int, Any]:
    """Operations of a step as torch counts them, and as the module says."""
    torch.manual_seed(0)
    module = ph.build("mla", dim=32, heads=4, scheme=scheme, **options)
    x = torch.randn(batch, cached + queries, 32)
    cache = module.new_cache(batch)
    with torch.no_grad():
        module(x[:, :1])  # keeps what is kept
        if cached:
            module(x[:, :cached], cache=cache)
        counter = FlopCounterMode(display=False)
        with counter:
            module(x[:, cached:], cache=cache)
    return counter.get_total_flops(), module


@pytest.mark.parametrize("scheme", [*SCHEMES, "auto"])
@pytest.mark.parametrize("options", [{}, ODD], ids=["default", "odd"])
@pytest.mark.parametrize(("batch", "queries", "cached"), [(1, 1, 300), (3, 2, 40), (2, 5, 0), (2, 40, 9)])
def test_operations_are_those_that_torch_counts(
    batch: int, queries: int, cached: int, scheme: str, options: dict[str, Any]
) -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted, module = dense(batch, queries, cached, scheme, **options)
    assert module.step_cost(cached, queries, batch).flops == counted
    plan = module.plan(queries, cached, batch)
    assert plan[scheme if scheme in SCHEMES else module._chosen(queries, cached + queries)].flops == counted


def test_expanded_is_for_many_queries_and_absorbed_for_few() -> None:
    assert V3.cheaper(1, 8192) == "absorbed"
    assert V3.cheaper(8192, 8192) == "expanded"
    crossing = next(t for t in range(1, 1000) if V3.cheaper(t, 10**9) == "expanded")
    assert crossing == 171 == -(-512 * 256 // (2 * 512 - 256))  # T* rounded up
    assert built().plan(1, cached=4096).scheme == "absorbed"
    assert built().plan(512).scheme == "expanded"


def test_auto_is_the_cheaper_of_the_two_in_the_plan() -> None:
    module = built(**ODD)
    for queries, cached in ((1, 0), (1, 100), (4, 4), (9, 0), (30, 3), (64, 64)):
        plan = module.plan(queries, cached)
        two = min(("expanded", "absorbed"), key=lambda s: plan[s].flops)
        chosen = module._chosen(queries, cached + queries)
        assert plan[chosen].flops == plan[two].flops
        assert module.step_cost(cached, queries).flops == plan[two].flops


def test_bytes_of_a_plan_are_weights_inputs_and_latents() -> None:
    one, many = (V3.cost("absorbed", 1, 4096, 1, batch, 2) for batch in (1, 8))
    assert many.nbytes - one.nbytes == 7 * (2 * 7168 + 4096 * (512 + 64)) * 2
    reuse = V3.cost("absorbed_reuse", 1, 4096, 1, 1, 2)
    # 100.7 M numbers of the kept product against 27.3 M of the two maps
    assert (reuse.nbytes - one.nbytes) // 2 == 128 * 1536 * 512 - 128 * 128 * (1536 + 512)


def test_a_remade_product_is_made_once_for_a_batch() -> None:
    extra = [
        V3.cost("absorbed_recompute", 1, 512, 1, batch, 2).flops
        - V3.cost("absorbed_reuse", 1, 512, 1, batch, 2).flops
        for batch in (1, 16)
    ]
    assert extra == [2 * 128 * 1536 * 128 * 512] * 2


def test_hardware_can_change_the_plan() -> None:
    starved, slow = Hardware("starved", 1e15, 1e9), Hardware("slow", 1e9, 1e15)
    assert V3.plan(256, 8192, itemsize=2, device=slow).scheme == "expanded"
    assert V3.plan(256, 8192, itemsize=2, device=starved).scheme == "absorbed"  # no keys are written
    sizes = dataclasses.replace(V3, key=512)  # the two maps cost more than their product
    assert sizes.plan(1, 64, itemsize=2).scheme == "absorbed_reuse"
    assert V3.plan(1, 64, itemsize=2).scheme == "absorbed"
    plan = V3.plan(1, 4095, itemsize=2, device="h100-sxm")
    assert plan.scheme == "absorbed"
    text = str(plan)
    assert all(scheme in text for scheme in SCHEMES)
    assert "h100-sxm" in text
    assert plan["absorbed"].seconds == pytest.approx(plan["absorbed"].nbytes / 3.35e12)


# ---- refusals ----


def test_refusals() -> None:
    with pytest.raises(UnknownName, match="did you mean 'absorbed'"):
        built(scheme="absorbd")
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4; got kv_heads=3"):
        built(kv_heads=3)
    with pytest.raises(ConfigError, match="the rotated width must be even and at least 2; got 3"):
        built(rope_dim=3)
    with pytest.raises(ConfigError, match="latent_dim must be an integer, at least 1; got 0"):
        built(latent_dim=0)
    with pytest.raises(ConfigError, match="rope_dim must be at least 0; got -2"):
        built(rope_dim=-2, position=rope())
    with pytest.raises(ConfigError, match="heads must divide dim when head_dim is not given"):
        built(dim=30)
    with pytest.raises(UnknownName, match="no device is called 'h100'"):
        built().plan(1, hardware="h100")
