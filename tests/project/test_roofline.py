"""Operations a byte of prefill and decoding, against the formulas of paper 069 and what torch counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import polyhead as ph
from polyhead.errors import ConfigError, UnknownName
from polyhead.nn import HARDWARE, Hardware

V3 = {
    "dim": 7168,
    "heads": 128,
    "head_dim": 128,
    "latent_dim": 512,
    "rope_dim": 64,
    "query_latent_dim": 1536,
    "scheme": "absorbed",
}


def decode(name: str, **options: Any) -> Any:
    return ph.roofline(name, "h100-sxm", **options).of("decode")


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("length", [128, 8192])
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mha", {"dim": 512, "heads": 8}, 1.0),
        ("mha", {"dim": 2048, "heads": 32}, 1.0),
        ("grouped_query", {"dim": 576, "heads": 9, "kv_heads": 3}, 3.0),  # SmolLM2-135M
        ("grouped_query", {"dim": 4096, "heads": 32, "kv_heads": 8}, 4.0),  # Llama 3 8B
        ("multi_query", {"dim": 512, "heads": 8}, 8.0),
        ("mla", V3, 241.8),
        ("mla", V3 | {"heads": 1}, 241.8 / 128),
    ],
)
def test_intensity_of_the_core_in_half_precision(
    name: str, options: dict[str, Any], expected: float, batch: int, length: int
) -> None:
    work = decode(name, length=length, batch=batch, **options)
    assert work.core_intensity == pytest.approx(expected, rel=2e-4)


def test_it_grows_with_new_tokens_and_falls_with_bytes() -> None:
    assert decode("mha", queries=4).core_intensity == pytest.approx(4.0)
    assert decode("mha", dtype=torch.float32).core_intensity == pytest.approx(0.5)


@pytest.mark.parametrize("name", [entry.name for entry in ph.catalog()])
def test_every_mechanism_has_a_roofline(name: str) -> None:
    table = ph.roofline(name, "a100-80gb-sxm", dim=64, heads=4, length=64, batch=2)
    assert {"prefill"} <= {work.phase for work in table.works} <= {"prefill", "decode"}
    assert ("decode" in {w.phase for w in table.works}) == ("causal_self" in ph.entry(name).supports)
    for work in table.works:
        assert math.isfinite(work.intensity)
        assert 0 <= work.core_flops <= work.flops
        assert work.core_flops < work.flops or not work.flops  # a layer may have no matrix products at all
        assert min(work.weight_bytes, work.seconds) > 0
        of_pairs = (work.core_flops, work.cache_bytes, work.core_intensity)
        assert max(of_pairs) == 0 if ph.entry(name).promises.tokenwise else min(of_pairs) > 0
    assert name in str(table)


@pytest.mark.parametrize("name", ["mha", "grouped_query", "multi_query", "sparse_query", "mla"])
def test_operations_of_a_step_are_those_that_torch_counts(name: str) -> None:
    module = ph.build(name, dim=64, heads=4)
    cache = module.new_cache(2)
    x = torch.randn(2, 33, 64)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        module(x[:, :31], mask=ph.causal(), cache=cache)
        with FlopCounterMode(display=False) as counter:
            module(x[:, 31:], mask=ph.causal(), cache=cache)
    work = ph.roofline(module, "l4", length=33, batch=2, queries=2).of("decode")
    assert work.flops == counter.get_total_flops()
    assert work.core_flops < work.flops


def test_bytes_are_weights_cache_and_edges() -> None:
    work = decode("mha", dim=64, heads=4, length=100, batch=3)
    assert work.weight_bytes == 4 * 64 * 64 * 2
    assert work.cache_bytes == 3 * 100 * 2 * 64 * 2
    assert work.edge_bytes == 3 * 2 * 64 * 2
    assert work.nbytes == work.weight_bytes + work.cache_bytes + work.edge_bytes


def test_time_is_continuous_at_the_ridge_and_bound_by_the_slower() -> None:
    device = Hardware("mine", 1e12, 1e10)
    assert device.ridge == 100
    below, at, above = (device.seconds(n * 1e6, 1e6) for n in (99.999, 100, 100.001))
    assert below == at == pytest.approx(above, rel=1e-4)
    assert device.seconds(1e9, 1e6) == 1e-3
    slow, fast = (ph.roofline("mha", Hardware("x", f, 1e12)).of("decode") for f in (1e9, 1e18))
    assert (slow.bound, fast.bound) == ("compute", "memory")
    assert slow.seconds == slow.flops / 1e9
    assert fast.seconds == fast.nbytes / 1e12


def test_the_batch_that_reaches_the_ridge_does() -> None:
    alone = decode("mla", length=256, **V3)
    assert alone.bound == "memory"
    assert alone.ridge_batch is not None
    for change, bound in ((0.9, "memory"), (1.1, "compute")):
        assert decode("mla", length=256, batch=int(alone.ridge_batch * change), **V3).bound == bound
    assert decode("mha", length=8192).ridge_batch is None  # reading its cache never reaches it


def test_prefill_is_bound_by_arithmetic_and_decoding_by_memory() -> None:
    table = ph.roofline(["mha", "mla"], length=8192)
    assert [(w.name, w.phase, w.bound) for w in table.works] == [
        ("mha", "prefill", "compute"),
        ("mha", "decode", "memory"),
        ("mla", "prefill", "compute"),
        ("mla", "decode", "memory"),
    ]
    assert table.of("decode", "mla").seconds < table.of("decode", "mha").seconds
    text = str(table)
    assert "h100-sxm: 989.4 TFLOP/s, 3.35 TB/s, ridge 295.3 FLOP/byte; 1 x 8192 tokens" in text
    assert len(text.splitlines()) == 6


def test_a_module_put_together_by_hand() -> None:
    module = ph.nn.MultiHeadAttention(ph.nn.Projection(64, 4))
    work = ph.roofline(module, length=128).of("decode")
    assert work.name == "MultiHeadAttention"
    assert work.flops == ph.roofline("mha", length=128, dim=64, heads=4).of("decode").flops


def test_devices_say_what_they_are() -> None:
    assert HARDWARE["h100-sxm"].ridge == pytest.approx(295, abs=1)
    assert all(name == device.name and 20 < device.ridge < 1000 for name, device in HARDWARE.items())


def test_refusals() -> None:
    with pytest.raises(UnknownName, match="no device is called 'h100-sxn'; did you mean 'h100-sxm'"):
        ph.roofline("mha", "h100-sxn")
    with pytest.raises(UnknownName, match="no mechanism is called"):
        ph.roofline("mhaa")
    with pytest.raises(ConfigError, match="bandwidth must be a finite number above 0"):
        Hardware("x", 1e12, 0)
    with pytest.raises(ConfigError, match="queries must be at most length=8; got 9"):
        ph.roofline("mha", length=8, queries=9)
    with pytest.raises(ConfigError, match="a module has its own options; leave"):
        ph.roofline(ph.build("mha", dim=8, heads=1), bias=True)
    with pytest.raises(ConfigError, match="mechanism must be a name, an attention module, or several"):
        ph.roofline(3)
    with pytest.raises(ConfigError, match="there is no 'decode' of 'mla'; there are"):
        ph.roofline("mha").of("decode", "mla")
    with pytest.raises(ConfigError, match="length must be at least 1"):
        ph.roofline("mha", length=0)
