"""Convolutions over neighbouring pairs: the same from both engines, over many strips, in O(L) memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend import strips
from polyhead.attend.strips import Frame
from polyhead.errors import BackendRefused, ShapeError

F64 = torch.float64


def random(*shape: int, seed: int) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return made.requires_grad_()


FIRST, SECOND, MIX = random(4, 6, 11, seed=5), random(4, 4, 3, seed=6), random(4, 4, seed=7)
MASKS = {
    "none": None,
    "causal": ph.causal(),
    "window and sinks": ph.causal() & (ph.window(30) | ph.sink(3)),
    "per head": ph.per_head([ph.causal(), ph.window(3), ph.causal() & ph.sink(0), ph.window(8) | ph.sink(1)]),
    "documents": ph.causal() & ph.documents(torch.arange(200) // 70),
    "padding": ph.causal() & ph.padding(torch.rand(2, 200, generator=torch.Generator().manual_seed(3)) > 0.4),
}
CALLS = {
    "logits": {"score": ph.pair_convolution(FIRST, 2)},
    "weights": {"weight_map": ph.pair_convolution(SECOND)},
    "among others": {
        "score": (ph.alibi(4), ph.pair_convolution(FIRST), ph.head_mix(MIX), ph.soft_cap(3.0)),
        "weight_map": (ph.pair_convolution(SECOND), ph.head_mix(MIX)),
    },
    "twice": {
        "score": (ph.pair_convolution(SECOND), ph.pair_convolution(FIRST)),
        "normalizer": ph.entmax(1.5),
    },
}


def answers(tensors: list[Tensor], backend: str, **call: object) -> list[Tensor]:
    out = ph.attend(*tensors, backend=backend, **call)
    leaves = [*tensors, FIRST, SECOND, MIX]
    up = torch.arange(out.numel(), dtype=F64).view(out.shape).sin()
    grads = torch.autograd.grad((out * up).sum(), leaves, allow_unused=True)
    return [out.detach(), *(torch.zeros(()) if g is None else g for g in grads)]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_strips_give_what_the_dense_form_gives(
    mask: ph.Mask | None, call: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "_ELEMENTS", {"cpu": 1 << 14})  # strips of some 24 rows
    q, k, v = random(2, 4, 150, 8, seed=0), random(2, 2, 200, 8, seed=1), random(2, 2, 200, 5, seed=2)
    want = answers([q, k, v], "reference", mask=mask, **call)
    for got, expected in zip(answers([q, k, v], "tiles", mask=mask, **call), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 2), (40, 7), (5, 90)])
def test_odd_sizes(queries: int, keys: int) -> None:
    tensors = [random(1, 4, n, 8, seed=n) for n in (queries, keys, keys)]
    want = answers(tensors, "reference", **CALLS["among others"])
    for got, expected in zip(answers(tensors, "tiles", **CALLS["among others"]), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_consumers_and_log_sums_see_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "_ELEMENTS", {"cpu": 1 << 14})
    q, k, v = (random(1, 4, 300, 8, seed=n) for n in range(3))
    call = {
        "mask": ph.causal(),
        "score": ph.pair_convolution(FIRST),
        "weight_map": ph.pair_convolution(SECOND),
    }

    class Sums:
        needs_logits = True
        total = torch.zeros(1, 4, 300, 300, dtype=F64)

        def visit(self, tile: ph.Tile, logits: Tensor, weights: Tensor) -> None:
            assert logits.shape == weights.shape
            self.total[:, tile.head_slice, tile.row_slice, tile.key_index] += weights

    seen = Sums()
    out = ph.observe(q, k, v, [seen], **call)
    whole = ph.attend(q, k, v, backend="reference", return_lse=True, **call)
    torch.testing.assert_close(seen.total @ v, out)
    torch.testing.assert_close((out, ph.attend(q, k, v, return_lse=True, **call)[1]), whole)


def test_a_strip_holds_the_rows_before_and_the_keys_that_these_see() -> None:
    frame = Frame(1, 1, 1, 700, 700, torch.device("cpu"))
    done = 0
    for strip in strips.strips(frame, ph.causal() & ph.window(9), rows_back=10):
        assert strip.r0 + strip.lead == done
        assert strip.lead == min(10, done)
        first = max(0, strip.r0 - 9)
        assert strip.runs[0].start <= first
        done = strip.r1
    assert done == 700


def test_dropout_is_the_same_there_and_back() -> None:
    q, k, v = (random(1, 4, 200, 8, seed=n) for n in range(3))
    call = {
        "mask": ph.causal(),
        "weight_map": ph.pair_convolution(SECOND),
        "dropout": 0.3,
        "backend": "tiles",
    }

    def drawn(v: Tensor) -> Tensor:
        torch.manual_seed(0)
        return ph.attend(q, k, v, **call)

    up = torch.randn(1, 4, 200, 8, dtype=F64)
    (flow,) = torch.autograd.grad(drawn(v), v, up)
    torch.testing.assert_close((flow * v).sum(), (drawn(v) * up).sum())


def test_refusals() -> None:
    q = torch.randn(1, 3, 5, 8)
    with pytest.raises(ShapeError, match="kernel holds kernels for 4 heads, but the call has 3 query heads"):
        ph.attend(q, q, q, score=ph.pair_convolution(torch.ones(4, 1, 1)))
    with pytest.raises(BackendRefused, match="it has no score maps"):
        ph.attend(q, q, q, score=ph.pair_convolution(torch.ones(3, 1, 1)), backend="sdpa")
