"""`attend`: all backends give the same answers and gradients; odd input is served or refused in words."""

from __future__ import annotations

import itertools
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import polyhead as ph
from polyhead.attend import Tile, strips
from polyhead.attend.backends import banded
from polyhead.attend.normalizers import Normalizer
from polyhead.errors import BackendRefused, ConfigError, DenseFallback, ShapeError

STREAMING = ("banded", "tiles")


def operands(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 37,
    keys: int = 37,
    width: int = 8,
    value_width: int = 8,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, value_width))
    made = (torch.randn(batch, *s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    q, k, v = (x.requires_grad_(grad) for x in made)
    return q, k, v


def weigh(out: Tensor) -> Tensor:
    """A scalar whose gradient differs from place to place."""
    return (out * torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()).sum()


def run(backend: str, tensors: tuple[Tensor, ...], **call: object) -> list[Tensor]:
    """Output and all gradients of a call."""
    q, k, v = tensors[:3]
    out = ph.attend(q, k, v, backend=backend, **call)  # type: ignore[call-overload]
    wanted = [t for t in tensors if t.requires_grad]
    grads = torch.autograd.grad(weigh(out), wanted, allow_unused=True)
    return [out.detach(), *(torch.zeros(()) if g is None else g for g in grads)]


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def padding_of(batch: int, keys: int) -> Tensor:
    real = torch.rand(batch, keys, generator=torch.Generator().manual_seed(3)) > 0.3
    real[0] = False  # an item without a single real key
    return real


MASKS = {
    "none": lambda b, s: None,
    "causal": lambda b, s: ph.causal(),
    "window": lambda b, s: ph.causal() & ph.window(9),
    "both sides": lambda b, s: ph.window(5, 4),
    "window and sinks": lambda b, s: ph.causal() & (ph.window(9) | ph.sink(3)),
    "window with padding": lambda b, s: ph.window(9) & ph.padding(padding_of(b, s)),
    "documents": lambda b, s: ph.causal() & ph.documents(torch.arange(s) // 50),
    "window in documents": lambda b, s: ph.window(9) & ph.documents(torch.arange(s) // 50),
    "padding": lambda b, s: ph.padding(padding_of(b, s)),
    "causal padding": lambda b, s: ph.causal() & ph.padding(padding_of(b, s)),
    "per head": lambda b, s: ph.per_head(
        [ph.causal(), ph.window(3), ph.causal() & ph.sink(2), ph.causal() & (ph.window(8) | ph.sink(1))]
    ),
    "nothing": lambda b, s: ph.sink(0),
    "holes": lambda b, s: ph.causal() & ~ph.window(70) | ph.window(2),
}


def scores(heads: int) -> dict[str, tuple[object, tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(5)
    t5 = torch.randn(32, heads, generator=generator, dtype=torch.float64).requires_grad_()
    table = torch.randn(heads, 21, generator=generator, dtype=torch.float64).requires_grad_()
    temperature = torch.rand(heads, generator=generator, dtype=torch.float64).add(0.5).requires_grad_()
    return {
        "none": (None, ()),
        "alibi": (ph.alibi(heads), ()),
        "t5": (ph.t5_bias(t5), (t5,)),
        "relative": (ph.relative_bias(table), (table,)),
        "cap": (ph.soft_cap(2.0), ()),
        "chain": ((ph.t5_bias(t5), ph.soft_cap(3.0), ph.temperature(temperature)), (t5, temperature)),
        "function": (ph.score_function(lambda s, b, h, i, j: s * (1 + h) - 0.1 * (i - j).abs()), ()),
    }


def normalizers(heads: int) -> dict[str, tuple[Normalizer, tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(6)
    sink = torch.randn(heads, generator=generator, dtype=torch.float64).requires_grad_()
    alpha = torch.rand(heads, generator=generator, dtype=torch.float64).mul(0.8).add(1.1).requires_grad_()
    return {
        "softmax": (ph.softmax(), ()),
        "sink": (ph.softmax(sink=sink), (sink,)),
        "sigmoid": (ph.sigmoid(bias=-1.0), ()),
        "top_k": (ph.top_k(5), ()),
        "sparsemax": (ph.sparsemax(), ()),
        "entmax": (ph.entmax(alpha), (alpha,)),
    }


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", [(2, 4, 2, 37, 300), (2, 4, 1, 130, 130), (1, 4, 4, 40, 9)], ids=str)
def test_backends_agree_on_masks(mask: str, sizes: tuple[int, ...]) -> None:
    batch, heads, kv_heads, queries, keys = sizes
    tensors = operands(batch, heads, kv_heads, queries, keys, value_width=6, grad=True)
    call = {"mask": MASKS[mask](batch, keys)}
    close(run("tiles", tensors, **call), run("reference", tensors, **call))


@pytest.mark.parametrize("score", scores(4))
@pytest.mark.parametrize("normalizer", normalizers(4))
@pytest.mark.parametrize("mask", ["causal", "holes", "per head"])
def test_tiles_equal_the_dense_form(score: str, normalizer: str, mask: str) -> None:
    (s, own), (n, also) = scores(4)[score], normalizers(4)[normalizer]
    tensors = (*operands(2, 4, 2, 50, 90, grad=True), *own, *also)
    call = {"score": s, "normalizer": n, "mask": MASKS[mask](2, 90)}
    close(run("tiles", tensors, **call), run("reference", tensors, **call))


@pytest.mark.parametrize("score", ["none", "alibi", "t5"])
@pytest.mark.parametrize("normalizer", ["softmax", "sink", "entmax"])
@pytest.mark.parametrize("mask", ["window", "both sides", "window with padding", "window in documents"])
@pytest.mark.parametrize("lengths", [(300, 300), (333, 400), (257, 200)], ids=str)
def test_bands_equal_the_dense_form(score: str, normalizer: str, mask: str, lengths: tuple[int, int]) -> None:
    (s, own), (n, also) = scores(4)[score], normalizers(4)[normalizer]
    tensors = (*operands(2, 4, 2, *lengths, value_width=6, grad=True), *own, *also)
    call = {"score": s, "normalizer": n, "mask": MASKS[mask](2, lengths[1])}
    close(run("banded", tensors, **call), run("reference", tensors, **call))


@pytest.mark.parametrize("sinks", [1, 3, 40])
def test_bands_with_sinks(sinks: int) -> None:
    tensors = operands(2, 4, 2, 300, 310, grad=True)
    mask = ph.causal() & (ph.window(9) | ph.sink(sinks))
    close(run("banded", tensors, mask=mask), run("reference", tensors, mask=mask))


def test_strips_of_some_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows: a strip then holds some rows and some heads of one item only."""
    monkeypatch.setattr(strips, "_ELEMENTS", {"cpu": 1 << 10})
    monkeypatch.setattr(banded, "_ELEMENTS", {"cpu": 1 << 10})
    for score, normalizer in itertools.product(("none", "chain", "alibi"), ("softmax", "sink", "entmax")):
        (s, own), (n, also) = scores(6)[score], normalizers(6)[normalizer]
        tensors = (*operands(2, 6, 3, 70, 140, grad=True), *own, *also)
        call = {"score": s, "normalizer": n, "mask": ph.causal() & ph.window(20)}
        want = run("reference", tensors, **call)
        close(run("tiles", tensors, **call), want)
        if score != "chain":
            close(run("banded", tensors, **call), want)


def test_gradcheck() -> None:
    q, k, v = operands(1, 2, 1, 5, 7, width=3, value_width=2, grad=True)
    t5 = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, t5: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        return ph.attend(
            q,
            k,
            v,
            mask=ph.causal(),
            score=(ph.t5_bias(t5), ph.soft_cap(2.0)),
            normalizer=ph.softmax(sink=sink),
            return_lse=True,
            backend="tiles",
        )

    # the log-sum-exp is returned in float32, too coarse for finite differences: made float64 by the output
    out, lse = call(q, k, v, t5, sink)
    assert torch.autograd.gradcheck(lambda *x: call(*x)[0], (q, k, v, t5, sink))
    expected = torch.autograd.grad(dense_lse(q, k, t5, sink).sin().sum(), (q, k, t5, sink), retain_graph=True)
    got = torch.autograd.grad(lse.sin().sum(), (q, k, t5, sink))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert out.dtype == torch.float64


def dense_lse(q: Tensor, k: Tensor, t5: Tensor, sink: Tensor) -> Tensor:
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
    tile = Tile(1, q.shape[1], torch.arange(2, 7), torch.arange(7))
    s = ph.soft_cap(2.0).apply(ph.t5_bias(t5).apply(s, tile), tile)
    s = s.masked_fill(torch.arange(7) > torch.arange(2, 7)[:, None], float("-inf"))
    return torch.logaddexp(s.logsumexp(-1), sink.view(-1, 1))


@pytest.mark.parametrize("backend", ["auto", "tiles", "reference"])
def test_log_sum_exp(backend: str) -> None:
    q, k, v = operands(queries=20, keys=30)
    out, lse = ph.attend(q, k, v, mask=ph.causal(), return_lse=True, backend=backend)
    s = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    s = s.masked_fill(~torch.ones(20, 30, dtype=torch.bool).tril(10), float("-inf"))
    torch.testing.assert_close(lse, s.logsumexp(-1))
    torch.testing.assert_close(out, ph.attend(q, k, v, mask=ph.causal()))
    nothing = ph.attend(q, k, v, mask=ph.sink(0), return_lse=True, backend=backend)[1]
    assert bool((nothing == float("-inf")).all())


@pytest.mark.parametrize("queries", [1, 63, 127, 1000])
@pytest.mark.parametrize("width", [40, 96])
def test_causal_is_torchs_lower_right(queries: int, width: int) -> None:
    q, k, v = operands(1, 4, 1, queries, 1000, width=width, value_width=width, dtype=torch.float32)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k.expand_as(k.expand(1, 4, 1000, width)), v.expand(1, 4, 1000, width),
        attn_mask=causal_lower_right(queries, 1000),
    )  # fmt: skip
    torch.testing.assert_close(ph.attend(q, k, v, mask=ph.causal()), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", *STREAMING, "reference"])
def test_rows_that_see_nothing_give_zeros(backend: str) -> None:
    q, k, v = operands(2, 2, 2, 200, 150, grad=True)
    mask = ph.window(5) & ph.padding(padding_of(2, 150))
    out = ph.attend(q, k, v, mask=mask, backend=backend)
    assert bool((out[0] == 0).all())  # the item without real keys
    assert bool((out[1, :, :50] == 0).all())  # queries before the first key
    out.sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))
    assert bool((k.grad[0] == 0).all())


@pytest.mark.parametrize("backend", ["auto", "tiles", "reference"])
@pytest.mark.parametrize("mask", [None, ph.causal()], ids=str)
@pytest.mark.parametrize(
    "sizes", [(0, 4, 2, 5, 5), (2, 4, 2, 0, 5), (2, 4, 2, 5, 0), (2, 4, 2, 1, 1), (2, 4, 2, 7, 3)], ids=str
)
def test_empty_and_small(backend: str, mask: object, sizes: tuple[int, ...]) -> None:
    q, k, v = operands(*sizes, grad=True)
    out = ph.attend(q, k, v, mask=mask, backend=backend)  # type: ignore[call-overload]
    assert out.shape == q.shape
    assert bool(out.isfinite().all())
    out.sum().backward()
    if sizes[4] == 0:
        assert bool((out == 0).all())


@pytest.mark.parametrize("backend", ["auto", "tiles", "reference"])
@pytest.mark.parametrize("mask", [None, ph.causal(), ph.window(3) | ph.sink(2)], ids=str)
def test_without_features_all_keys_that_are_seen_weigh_alike(backend: str, mask: ph.Mask | None) -> None:
    q, k, v = operands(width=0, grad=True)
    out = ph.attend(q, k, v, mask=mask, backend=backend)
    zeros = (torch.zeros(*x.shape[:3], 1, dtype=x.dtype) for x in (q, k))
    torch.testing.assert_close(out, ph.attend(*zeros, v, mask=mask, backend="reference"))
    out.sum().backward()
    assert (q.grad.shape, k.grad.shape) == (q.shape, k.shape)


def test_memory_that_was_never_written_does_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = real_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    real_empty, real_new = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *a, **k: real_new(self, *a, **k).fill_(float("nan"))
    )
    for mask, backend in ((ph.window(9), "banded"), (ph.causal() & ~ph.window(20), "tiles")):
        tensors = operands(2, 4, 2, 257, 300, grad=True)
        assert all(bool(x.isfinite().all()) for x in run(backend, tensors, mask=mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    tolerance = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for mask, backend in ((ph.causal(), "auto"), (ph.window(9), "banded"), (ph.causal(), "tiles")):
        exact = operands(1, 4, 2, 200, 200)
        rounded = tuple(x.to(dtype) for x in exact)
        out = ph.attend(*rounded, mask=mask, backend=backend)
        want = ph.attend(*(x.double() for x in rounded), mask=mask, backend="reference")
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


def test_autocast() -> None:
    q, k, v = operands(dtype=torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for mask in (ph.causal(), ph.window(3), ph.per_head([ph.causal()] * 4)):
            out = ph.attend(q, k, v, mask=mask)
            assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_dropout_drops_and_is_repeatable() -> None:
    q, k, v = operands(2, 4, 2, 100, 100, grad=True)
    ones = torch.ones_like(v)
    torch.manual_seed(1)
    first = ph.attend(q, k, ones, dropout=0.5)
    torch.manual_seed(1)
    again = ph.attend(q, k, ones, dropout=0.5)
    other = ph.attend(q, k, ones, dropout=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # rows sum to one before, and to one on average after
    assert abs(first.mean().item() - 1.0) < 0.02
    assert first.std().item() > 0.05

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(7)
        return ph.attend(q, k, v, dropout=0.3, backend="tiles")

    assert torch.autograd.gradcheck(call, operands(1, 2, 1, 4, 5, width=3, value_width=2, grad=True))


def test_explain_names_every_backend_and_force_refuses_with_the_reason() -> None:
    q, k, v = operands(queries=300, keys=300, dtype=torch.float32)
    plan = ph.explain(q, k, v, mask=ph.causal())
    assert plan.backend == "sdpa"
    assert set(plan.refused) == {
        "chosen",
        "by_head",
        "grouped",
        "staircase",
        "banded",
        "neighborhood",
        "triton_heads",
        "tiles",
        "flex",
        "signs",
        "reference",
    }
    assert ph.explain(q, k, v, mask=ph.window(9)).backend == "banded"
    assert ph.explain(q, k, v, mask=ph.window(9), score=ph.soft_cap(3.0)).backend == "tiles"
    capped = {"mask": ph.causal(), "score": ph.soft_cap(3.0)}
    reason = ph.explain(q, k, v, **capped).refused["sdpa"]
    with pytest.raises(BackendRefused, match=re.escape(reason)):
        ph.attend(q, k, v, backend="sdpa", **capped)
    with pytest.raises(BackendRefused, match="not a window"):
        ph.attend(q, k, v, mask=ph.causal(), backend="banded")
    with pytest.raises(ConfigError, match="'auto' or one of 'sdpa'"):
        ph.attend(q, k, v, backend="cuda")
    assert "tiles" in str(ph.explain(q, k, v, **capped))


def test_strict_refuses_dense_memory() -> None:
    q, k, v = operands(queries=300, keys=300, dtype=torch.float32)
    with ph.strict():
        ph.attend(q, k, v, mask=ph.per_head([ph.causal()] * 4))
        with pytest.raises(DenseFallback, match="reference"):
            ph.attend(q, k, v, backend="reference")
        with pytest.raises(DenseFallback, match=r"torch\.func"):
            torch.func.vmap(lambda x: ph.attend(x, k, v, mask=ph.window(9)))(q[None])
    ph.attend(q, k, v, backend="reference")


def test_functional_transforms_are_served_densely() -> None:
    q, k, v = operands(1, 4, 2, 40, 40)
    many = torch.stack([q, 2 * q])
    got = torch.func.vmap(lambda x: ph.attend(x, k, v, mask=ph.window(9)))(many)
    want = torch.stack([ph.attend(x, k, v, mask=ph.window(9)) for x in many])
    torch.testing.assert_close(got, want)


class Rows:
    needs_logits = True

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.weights, self.logits = (
            torch.zeros(shape, dtype=torch.float64),
            torch.full(shape, float("-inf"), dtype=torch.float64),
        )

    def visit(self, tile: Tile, logits: Tensor | None, weights: Tensor) -> None:
        place = (tile.batch_slice, tile.head_slice, tile.row_slice)
        self.weights[place][..., tile.cols] = weights
        assert logits is not None
        self.logits[place][..., tile.cols] = logits


def test_observe_shows_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "_ELEMENTS", {"cpu": 1 << 11})
    q, k, v = operands(2, 4, 2, 70, 90)
    mask = ph.causal() & (ph.window(8) | ph.sink(2))
    rows = Rows((2, 4, 70, 90))
    out = ph.observe(q, k, v, [rows], mask=mask, score=ph.alibi(4))
    torch.testing.assert_close(out, ph.attend(q, k, v, mask=mask, score=ph.alibi(4), backend="reference"))
    torch.testing.assert_close(rows.weights @ v.repeat_interleave(2, 1), out)
    torch.testing.assert_close(rows.logits.softmax(-1), rows.weights)


def test_messages() -> None:
    q, k, v = operands()
    for bad, message in (
        (lambda: ph.attend(q[0], k, v), r"q must have four dimensions \(B, H, L, D\), got \(4, 37, 8\)"),
        (lambda: ph.attend(q, k[:, :, :, :4], v), "agree in head dim D"),
        (lambda: ph.attend(q, k[:1], v[:1]), "agree in batch"),
        (lambda: ph.attend(q, k, v[:, :, :3]), "agree in batch, heads and length"),
        (lambda: ph.attend(q[:, :3], k, v), "3 query heads must be a multiple of the 2 key/value heads"),
        (lambda: ph.attend(q, k.float(), v), "one dtype; q has torch.float64, k has torch.float32"),
        (lambda: ph.attend(q.long(), k, v), "q must hold floating-point numbers"),
    ):
        with pytest.raises(ShapeError, match=message):
            bad()
    for bad, message in (
        (lambda: ph.attend(q, k, v, mask=torch.ones(37, 37) > 0), r"use padding\(tensor\)"),  # type: ignore[call-overload]
        (lambda: ph.attend(q, k, v, dropout=1.5), "dropout must be at least 0 and below 1, got 1.5"),
        (lambda: ph.attend(q, k, v, normalizer="softmax"), r"normalizer must be one such as softmax\(\)"),  # type: ignore[call-overload]
        (lambda: ph.attend(q, k, v, score=3), "score must be a Score or a sequence of them, got 3"),  # type: ignore[call-overload]
    ):
        with pytest.raises(ConfigError, match=message):
            bad()
    with pytest.raises(BackendRefused, match="softmax only"):
        ph.attend(q, k, v, normalizer=ph.sigmoid(), return_lse=True)


@pytest.mark.parametrize("backend", [*STREAMING, "reference"])
def test_autocast_costs_no_precision(backend: str) -> None:
    """What autocast decides is the dtype of the operands: the arithmetic stays in float32."""
    q, k, v = operands(2, 4, 2, 300, 300, dtype=torch.float32)
    want = ph.attend(*(x.bfloat16() for x in (q, k, v)), mask=ph.window(9), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        got = ph.attend(*leaves, mask=ph.window(9), backend=backend)
        assert torch.equal(got, want)
        inside = torch.autograd.grad(got.float().sum(), leaves, retain_graph=True)
    outside = torch.autograd.grad(got.float().sum(), leaves)
    if backend != "reference":  # torch's own backward follows autocast where it is called
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_many_more_queries_than_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "_ELEMENTS", {"cpu": 1 << 10})
    tensors = operands(1, 4, 2, 2000, 90, grad=True)
    close(run("banded", tensors, mask=ph.window(3)), run("reference", tensors, mask=ph.window(3)))


def test_a_normalizer_of_other_heads_is_refused() -> None:
    q, k, v = operands(1, 4, 2, 300, 300)
    for backend in ("auto", *STREAMING, "reference"):
        with pytest.raises(ShapeError, match="holds values for 2 heads, but the call has 4 query heads"):
            ph.attend(q, k, v, mask=ph.window(9), normalizer=ph.softmax(sink=torch.zeros(2)), backend=backend)


def test_a_score_that_hides_whole_rows_or_returns_a_tensor_of_its_own() -> None:
    q, k, v = operands(1, 2, 2, 8, 8, grad=True)
    hide = ph.score_function(lambda s, b, h, i, j: torch.where(i < 2, float("-inf"), s))
    close(run("tiles", (q, k, v), score=hide), run("reference", (q, k, v), score=hide))
    mine = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    given = ph.score_function(lambda s, b, h, i, j: mine)
    with torch.no_grad():
        ph.attend(q, k, v, mask=ph.causal(), score=given, backend="tiles")
    assert bool((mine == 0).all())


def test_log_sum_exp_of_rows_that_see_only_the_sink() -> None:
    q, k, v = operands(1, 4, 2, 300, 200)
    grads = []
    for backend in ("tiles", "reference"):
        sink = torch.arange(4.0, dtype=torch.float64).requires_grad_()
        call = {"mask": ph.window(9), "normalizer": ph.softmax(sink=sink), "return_lse": True}
        lse = ph.attend(q, k, v, backend=backend, **call)[1]  # type: ignore[call-overload]
        assert bool((lse[0, :, 0] == sink).all())
        grads.append(torch.autograd.grad(lse.sin().sum(), sink)[0])
    torch.testing.assert_close(*grads)


def test_second_derivatives() -> None:
    q, k, v = operands(1, 2, 1, 4, 5, width=3, value_width=2, grad=True)
    for normalizer in (ph.softmax(), ph.softmax(sink=0.3), ph.sigmoid(bias=-1.0)):

        def call(*x: Tensor, normalizer: Normalizer = normalizer) -> Tensor:
            return ph.attend(*x, mask=ph.causal(), normalizer=normalizer, backend="reference")

        assert torch.autograd.gradgradcheck(call, (q, k, v))
    out = ph.attend(q, k, v, mask=ph.causal(), backend="tiles")
    with pytest.raises(ph.PolyheadError, match="use backend='reference'"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_wrong_numbers_and_kinds_are_named() -> None:
    q, k, v = operands()
    for call, message in (
        ({"scale": torch.ones(())}, "a learned one goes into score=temperature"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"scale": "a"}, "scale must be a finite number, got 'a'"),
        ({"dropout": "0.1"}, "dropout must be at least 0 and below 1, got '0.1'"),
        ({"mask": ph.causal}, "got the function causal; call it"),
        ({"normalizer": ph.softmax}, "got the function softmax; call it"),
    ):
        with pytest.raises(ConfigError, match=message):
            ph.attend(q, k, v, **call)  # type: ignore[call-overload]
    with pytest.raises(ShapeError, match="q must be a tensor, got .*list"):
        ph.attend([1.0], k, v)  # type: ignore[call-overload]
    with pytest.raises(ShapeError, match="must return the new scores"):
        ph.attend(q, k, v, score=ph.score_function(lambda s, b, h, i, j: None), backend="tiles")  # type: ignore[arg-type,return-value]


def test_what_is_no_description_is_named() -> None:
    q, k, v = operands()
    weights = torch.ones(3)
    for call, message in (
        (
            {"score": weights},
            r"score must be a Score or a sequence of them, got a tensor \(3,\) of torch.float32",
        ),
        (
            {"score": lambda s, b, h, i, j: s},
            r"wrap a function f\(score, b, h, i, j\) in score_function\(f\)",
        ),
        ({"score": ph.alibi}, "got the function alibi; call it"),
        ({"score": "a"}, r"score must be a Score or a sequence of them, got 'a' \(str\)"),
        ({"dropout": weights}, r"dropout must be at least 0 and below 1, got a tensor \(3,\)"),
        ({"dropout": True}, "dropout must be at least 0 and below 1, got True"),
        ({"scale": 10**400}, "scale must be a finite number, got 1000"),
        ({"return_lse": weights}, r"return_lse must be True or False; got a tensor \(3,\)"),
        ({"return_lse": 1}, r"return_lse must be True or False; got 1 \(int\)"),
        ({"backend": 3}, r"backend must be 'auto' or one of .*; got 3 \(int\)"),
        ({"backend": ["tiles"]}, r"backend must be 'auto' or one of .*; got \['tiles'\] \(list\)"),
    ):
        for use in (ph.attend, ph.explain):
            with pytest.raises(ConfigError, match=message):
                use(q, k, v, **call)  # type: ignore[call-overload]


@pytest.mark.parametrize("backend", ["tiles", "reference"])
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda b, h, i, j: (i >= j).float(), "must return a bool tensor; got torch.float32"),
        (lambda b, h, i, j: True, "must return a bool tensor; got bool"),
        (lambda b, h, i, j: None, "must return a bool tensor; got NoneType"),
        (lambda b, h, i, j: (i >= j)[:, :-1], r"returned shape .* it must return one truth for each"),
        (lambda b, h, i, j: (i >= j).expand(1, 1, 1, *(i >= j).shape), r"returned shape \(1, 1, 1, "),
    ],
    ids=["float", "bool", "None", "short", "five dimensions"],
)
def test_a_mask_function_that_answers_wrong(backend: str, answer: Any, message: str) -> None:
    q, k, v = operands()
    with pytest.raises(ph.PolyheadError, match=message):
        ph.attend(q, k, v, mask=ph.where(answer), backend=backend)


@pytest.mark.parametrize("backend", ["tiles", "reference"])
def test_a_score_function_that_answers_wrong(backend: str) -> None:
    q, k, v = operands()
    with pytest.raises(ShapeError, match="returned torch.bool; it must return floating-point scores"):
        ph.attend(q, k, v, score=ph.score_function(lambda s, b, h, i, j: s > 0), backend=backend)


class Counting:
    """A consumer as users write one."""

    needs_logits = False

    def __init__(self) -> None:
        self.rows = 0

    def visit(self, tile: ph.Tile, logits: Tensor | None, weights: Tensor) -> None:
        self.rows += weights.shape[2]


class Blind:
    needs_logits = False


class Undecided:
    def visit(self, tile: ph.Tile, logits: Tensor | None, weights: Tensor) -> None:
        """Nothing."""


def test_consumers_are_checked() -> None:
    q, k, v = operands()
    good: ph.Consumer = Counting()
    ph.observe(q, k, v, [good])
    assert good.rows == q.shape[2]  # type: ignore[attr-defined]
    for consumers, message in (
        (good, "consumers must be a sequence of consumers, got .*Counting.*; put it into a list"),
        (None, "consumers must be a sequence of consumers, got None"),
        ("ab", "consumers must be a sequence of consumers, got 'ab'"),
        ([Counting], r"must have a method visit\(tile, logits, weights\) and an attribute needs_logits"),
        ([Blind()], r"must have a method visit\(tile, logits, weights\) and an attribute needs_logits"),
        ([Undecided()], "consumer Undecided must have an attribute needs_logits, .*; got None"),
    ):
        with pytest.raises(ConfigError, match=message):
            ph.observe(q, k, v, consumers)  # type: ignore[arg-type]


def test_plans_compare_and_hash() -> None:
    q, k, v = operands()
    one, same = ph.explain(q, k, v), ph.explain(q, k, v)
    other = ph.explain(q, k, v, mask=ph.causal() & ph.window(2))
    assert one == same
    assert len({one, same, other}) == 2
    assert pickle.loads(pickle.dumps(one)) in {one}


@pytest.mark.parametrize("backend", ["auto", *STREAMING])
def test_any_layout_of_the_operands(backend: str) -> None:
    mask = None if backend == "auto" else ph.window(9)
    for change in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x[:1].expand_as(x),
    ):
        q, k, v = (change(x) for x in operands(2, 4, 2, 200, 200))
        got = ph.attend(q, k, v, mask=mask, backend=backend)
        torch.testing.assert_close(got, ph.attend(q, k, v, mask=mask, backend="reference"))


def test_learned_tensors_in_low_precision_are_summed_in_float32() -> None:
    q, k, v = operands(1, 2, 2, 600, 600, dtype=torch.float32)
    table = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = table.bfloat16().to(dtype).requires_grad_()
        x = [t.to(torch.float32 if dtype == torch.bfloat16 else dtype) for t in (q, k, v)]
        out = ph.attend(*x, mask=ph.causal(), score=ph.relative_bias(leaf), backend="tiles")
        grads.append(torch.autograd.grad(weigh(out), leaf)[0].double())
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2 * float(grads[1].abs().max()))


PEAK = """
import torch, polyhead as ph
def used():  # ru_maxrss would start with what the parent process held
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
def run(n):
    q, k, v = (torch.randn(1, h, n, 16, requires_grad=True) for h in (4, 2, 2))
    ph.attend(q, k, v, {call}).sum().backward()
run(256); before = used(); run({length}); print(used() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    "call",
    ["mask=ph.causal(), score=ph.alibi(4)", "mask=ph.causal() & (ph.window(99) | ph.sink(4))"],
    ids=["tiles", "banded"],
)
def test_memory_is_linear(call: str) -> None:
    """The scores of 12000 tokens would be 2.3 GB; what is needed is a few copies of the operands."""
    code = PEAK.format(call=call, length=12000)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150
