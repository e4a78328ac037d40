"""Heads that talk as Triton kernels, against the dense form in float64.

Not collected by itself: `test_triton_heads.py` runs it in a process of its own, on a CPU in Triton's
interpreter (TRITON_INTERPRET=1, which has to be set before triton is imported), on a GPU as it is.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import polyhead as ph
from polyhead.attend.backends import triton_heads

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
NAMES = ("out", "lse", "dq", "dk", "dv", "dbefore", "dafter")


@pytest.fixture(autouse=True)
def _any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_heads, "_no_device", lambda device: "")


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(DEVICE, dtype).requires_grad_()


def operands(
    heads: int = 4, kv_heads: int = 2, queries: int = 37, keys: int = 50, width: int = 16, v_width: int = 16,
    dtype: torch.dtype = torch.float32, batch: int = 2,
) -> list[Tensor]:  # fmt: skip
    shapes = ((heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, v_width))
    made = [random(batch, *shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes)]
    return [*made, random(heads, heads, seed=3), random(heads, heads, seed=4)]


def answers(backend: str, tensors: list[Tensor], before: int | None, after: int | None, mask: object) -> list:
    """Output, log-sum-exp and the gradients of all tensors, through both."""
    out, lse = ph.attend(
        *tensors[:3], mask=mask, backend=backend, return_lse=True,
        score=None if before is None else ph.head_mix(tensors[before]),
        weight_map=None if after is None else ph.head_mix(tensors[after]),
    )  # fmt: skip
    up, up_lse = (
        torch.arange(x.numel(), dtype=torch.float64, device=DEVICE).view(x.shape) for x in (out, lse)
    )
    some = torch.where(lse == -torch.inf, 0.0, lse)
    loss = (out.double() * up.sin()).sum() + (some.double() * up_lse.cos()).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, tensors, allow_unused=True)]


def check(
    tensors: list[Tensor], *, before: int | None = 3, after: int | None = 4, mask: object = None,
    tolerance: float = 1e-5,
) -> None:  # fmt: skip
    """The same as the dense form, to a share of the largest number there."""
    got = answers("triton_heads", tensors, before, after, mask)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    want = answers("reference", exact, before, after, mask)
    for name, a, b in zip(NAMES, got, want, strict=True):
        if b is None:
            assert a is None, name
            continue
        nothing = b == -torch.inf
        assert torch.equal(a == -torch.inf, nothing), name
        a, b = a.double().masked_fill(nothing, 0.0), b.masked_fill(nothing, 0.0)
        assert (a - b).abs().max() <= tolerance * b.abs().max(), (name, (a - b).abs().max() / b.abs().max())


REAL = torch.rand(2, 50, generator=torch.Generator().manual_seed(3)) > 0.4
MASKS = {
    "causal": ph.causal(),
    "window": ph.window(9),
    "both sides": ph.window(5, 7),
    "the future": ~ph.causal(),
    "padding": ph.padding(REAL.to(DEVICE)),
    "all three": ph.window(20) & ph.padding(REAL.to(DEVICE)) & ph.causal(),
    "an item without keys": ph.padding(torch.tensor([[False], [True]], device=DEVICE).expand(2, 50)),
    "one padding for all": ph.causal() & ph.padding(REAL[:1].to(DEVICE)),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    check(operands(), mask=MASKS[mask])


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (12, 4), (16, 16), (16, 4), (4, 1), (8, 8)]
)
def test_heads(heads: int, kv_heads: int) -> None:
    check(operands(heads, kv_heads, 33, 33), mask=ph.causal())


@pytest.mark.parametrize(("width", "v_width"), [(24, 40), (128, 20), (16, 65)])
def test_widths(width: int, v_width: int) -> None:
    check(operands(heads=2, kv_heads=1, width=width, v_width=v_width, batch=1))


def test_columns_are_divided_among_programs() -> None:
    check(operands(heads=16, kv_heads=8, queries=20, keys=20, width=100, v_width=70, batch=1))


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (64, 32), (20, 90), (40, 17), (17, 1)])
def test_lengths(queries: int, keys: int) -> None:
    check(operands(queries=queries, keys=keys), mask=ph.causal())


@pytest.mark.parametrize(("before", "after"), [(3, None), (None, 4), (3, 3)])
def test_matrices(before: int | None, after: int | None) -> None:
    check(operands(), before=before, after=after, mask=ph.causal())


# the interpreter cuts bfloat16 off where a GPU rounds
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("mask", ["causal", "all three"])
def test_half_precision(dtype: torch.dtype, tolerance: float, mask: str) -> None:
    check(operands(dtype=dtype, width=32), mask=MASKS[mask], tolerance=tolerance)


def test_rows_of_weights_sum_to_those_of_the_matrix() -> None:
    q, k, v, before, after = operands(width=32)
    out = ph.attend(
        q, k, torch.ones_like(v), score=ph.head_mix(before), weight_map=ph.head_mix(after),
        mask=ph.causal(), backend="triton_heads",
    )  # fmt: skip
    torch.testing.assert_close(out, after.sum(1)[None, :, None, None].expand_as(out), rtol=1e-4, atol=1e-5)


def test_identities_change_nothing() -> None:
    q, k, v, *_ = operands()
    eye = torch.eye(4, device=DEVICE)
    got = ph.attend(
        q, k, v, score=ph.head_mix(eye), weight_map=ph.head_mix(eye), mask=ph.causal(), backend="triton_heads"
    )
    torch.testing.assert_close(got, ph.attend(q, k, v, mask=ph.causal()), rtol=1e-4, atol=1e-5)


def test_what_stands_in_the_padding_is_never_read() -> None:
    tensors = operands()
    mask = ph.padding(REAL.to(DEVICE))
    clean = answers("triton_heads", tensors, 3, 4, mask)
    with torch.no_grad():
        for x in tensors[1:3]:
            x[~REAL[:, None].expand(2, 2, 50)] = float("nan")
    for a, b in zip(clean, answers("triton_heads", tensors, 3, 4, mask), strict=True):
        assert torch.equal(a, b)


def test_strided_tensors() -> None:
    tensors = operands(heads=4, kv_heads=4, queries=20, keys=20)
    want = answers("triton_heads", tensors, 3, 4, ph.causal())
    turned = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in tensors[:3]]
    for a, b in zip(want, answers("triton_heads", [*turned, *tensors[3:]], 3, 4, ph.causal()), strict=True):
        assert torch.equal(a, b)


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.nbytes = max(self.nbytes, out.untyped_storage().nbytes())
        return out


def test_nothing_of_the_size_of_the_weights_is_held() -> None:
    q, k, v, before, after = operands(heads=2, kv_heads=2, queries=144, keys=144, batch=1)
    with _Largest() as largest:
        out = ph.attend(
            q, k, v, score=ph.head_mix(before), weight_map=ph.head_mix(after), backend="triton_heads"
        )
        out.sum().backward()
    assert q.grad is not None
    assert 0 < largest.nbytes <= q.nbytes < 144 * 144
