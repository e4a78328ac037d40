"""The backend `triton_heads`: when the planner takes it, and its kernels in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import polyhead as ph
from polyhead.attend.across_heads import dynamic_head_mix
from polyhead.attend.backends import triton_heads
from polyhead.attend.triton_heads.sizes import Near, near
from polyhead.errors import BackendRefused, ShapeError

INSIDE = Path(__file__).with_name("triton_heads_interpreted.py")
SIZES = "widths or columns or lengths"
GROUPS = ("test_masks", "test_heads", SIZES, f"not (test_masks or test_heads or {SIZES})")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'polyhead[triton]'"
)
MATRIX = ph.head_mix(torch.eye(4))
BOTH = {"score": MATRIX, "weight_map": MATRIX}


def call(heads=4, kv_heads=2, queries=20, keys=30, width=16, v_width=16, dtype=torch.float32):
    return (
        torch.zeros(2, heads, queries, width, dtype=dtype),
        torch.zeros(2, kv_heads, keys, width, dtype=dtype),
        torch.zeros(2, kv_heads, keys, v_width, dtype=dtype),
    )


@needs_triton
@pytest.mark.parametrize("group", GROUPS)
def test_kernels_in_the_interpreter(group: str) -> None:
    run(group, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@needs_triton
def test_kernels_on_a_gpu() -> None:
    run("", TRITON_INTERPRET="0")


def run(group: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", str(INSIDE)]
    done = subprocess.run(
        [*command, "-k", group], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that runs the kernels."""
    monkeypatch.setattr(triton_heads, "_no_device", lambda device: "")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("maps", [BOTH, {"score": MATRIX}, {"weight_map": MATRIX}])
@pytest.mark.parametrize(
    "mask", [None, ph.causal(), ph.window(3, 4), ph.causal() & ph.padding(torch.ones(2, 30) > 0)]
)
def test_the_planner_takes_it_for_heads_that_talk(maps, mask) -> None:
    plan = ph.explain(*call(), mask=mask, **maps)
    assert plan.backend == "triton_heads"
    assert not plan.dense
    assert plan.refused["tiles"] == "could run it, but triton_heads is faster"


REFUSED = {
    "no head_mix": (call(), {}, "the call has no head_mix"),
    "another score": (call(), {"score": (ph.alibi(4), MATRIX)}, "by one head_mix each, not by"),
    "a mix by tokens": (call(), {"score": dynamic_head_mix(base=torch.eye(4))}, "not by DynamicHeadMix"),
    "sink": (call(), BOTH | {"normalizer": ph.softmax(sink=0.0)}, r"plain softmax, not by"),
    "entmax": (call(), BOTH | {"normalizer": ph.entmax(1.5)}, r"plain softmax, not by"),
    "dropout": (call(), BOTH | {"dropout": 0.5}, "no dropout"),
    "sinks": (call(), BOTH | {"mask": ph.causal() & (ph.window(3) | ph.sink(2))}, "not a window around each"),
    "per head": (call(), BOTH | {"mask": ph.per_head([ph.causal()] * 3 + [ph.window(1)])}, "not a window"),
    "float64": (call(dtype=torch.float64), BOTH, "its kernels have no float64"),
    "one query": (call(queries=1), BOTH, "at least 16 queries; the call has 1"),
    "nothing": (call(keys=0), BOTH, "attention over nothing"),
    "narrow": (call(width=8), BOTH, "head widths of 16 to 128; q and k have 8"),
    "wide": (call(v_width=256), BOTH, "head widths of 16 to 128; v have 256"),
    "many heads": (call(32, 8), {"score": ph.head_mix(torch.eye(32))}, "at most 16 .* the call has 8 x 4"),
    "one key head": (
        call(8, 1),
        {"score": ph.head_mix(torch.eye(8))},
        "at most 4 query heads .* the call has 8",
    ),
    "odd groups": (call(9, 3), {"score": ph.head_mix(torch.eye(9))}, ""),
    "odd groups, too many": (call(15, 3), {"score": ph.head_mix(torch.eye(15))}, "the call has 3 x 5"),
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_run_is_refused_with_the_reason(case: str) -> None:
    tensors, options, reason = REFUSED[case]
    if not reason:
        assert ph.explain(*tensors, **options).backend == "triton_heads"
        return
    with pytest.raises(BackendRefused, match=reason):
        ph.attend(*tensors, backend="triton_heads", **options)
    assert ph.explain(*tensors, **options).backend != "triton_heads"


@pytest.mark.usefixtures("device")
def test_a_matrix_of_other_heads_is_an_error() -> None:
    with pytest.raises(ShapeError, match="mixes 3 heads, but the call has 4"):
        ph.attend(*call(), score=ph.head_mix(torch.eye(3)))


@pytest.mark.usefixtures("device")
def test_transforms_cannot_look_into_it() -> None:
    q, k, v = call()
    assert ph.explain(q, k, v, **BOTH).backend == "triton_heads"

    def refused(q):
        with pytest.raises(BackendRefused, match="triton_heads.*torch.func"):
            ph.attend(q, k, v, backend="triton_heads", **BOTH)
        return q

    torch.func.vmap(refused)(q[None])


def test_elsewhere_the_reason_is_the_device() -> None:
    plan = ph.explain(*call(), **BOTH)
    assert plan.backend == "tiles"
    assert plan.refused["triton_heads"] == "its kernels run on CUDA devices; the call is on cpu"


@pytest.mark.parametrize(
    ("installed", "cuda", "capability", "reason"),
    [
        (False, "13.0", (9, 0), "triton is not installed: pip install 'polyhead[triton]'"),
        (True, None, (9, 0), "compute capability 8.0 or newer"),
        (True, "13.0", (7, 5), "compute capability 8.0 or newer"),
        (True, "13.0", (8, 0), ""),
    ],
)
def test_what_a_device_has_to_have(monkeypatch, installed, cuda, capability, reason) -> None:
    monkeypatch.setattr(triton_heads, "_installed", lambda: installed)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = triton_heads._no_device(SimpleNamespace(type="cuda"))
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_mask_as_a_window_and_a_padding() -> None:
    real = torch.rand(2, 30) > 0.5
    assert near(None) == Near()
    assert near(ph.causal()) == Near(None, 0)
    assert near((ph.causal() & ph.window(9)) & (ph.window(3) | ph.window(5))) == Near(5, 0)
    assert near(~ph.causal()) == Near(-1, None)
    assert near(ph.causal() | ph.sink(2)) is None
    assert near(ph.padding(real) | ph.causal()) is None
    both = near(ph.padding(real) & ph.window(2, 2) & ph.padding(~real))
    assert both is not None
    assert (both.left, both.right) == (2, 2)
    assert both.real is not None
    assert not both.real.any()
