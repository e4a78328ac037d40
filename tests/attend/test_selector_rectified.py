"""What a selector leaves out, stood for by means."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend.masks import Chosen, densify
from polyhead.attend.selectors import Rectified, Selector, choose
from polyhead.attend.selectors.lists import listed
from polyhead.errors import ConfigError, ShapeError

OWN = ph.window(0)

# batch, heads, key/value heads, queries, keys, rows, cols
SHAPES = [
    (2, 4, 2, 50, 50, 8, 4),
    (1, 2, 1, 37, 61, 8, 8),
    (1, 4, 4, 64, 64, 1, 8),
    (2, 2, 2, 1, 70, 16, 8),
    (1, 2, 1, 60, 53, 4, 8),
]


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int = 8) -> list[Tensor]:
    """Keys drift, so that blocks of them have means to speak of."""
    draw = torch.Generator().manual_seed(queries + keys)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    x = [torch.randn(batch, h, n, width, generator=draw, dtype=torch.float64) for h, n in sizes]
    for one in x:
        one[...] = (
            0.3 * one
            + torch.randn(*one.shape[:2], -(-one.shape[2] // 8), width, generator=draw).repeat_interleave(
                8, 2
            )[:, :, : one.shape[2]]
        )
    return x


def some(rows: int, cols: int, blocks: int = 2, always: ph.Mask | None = OWN) -> Selector:
    return ph.select(ph.mean_keys(), ph.keep_blocks(blocks), rows=rows, cols=cols, always=always)


def twin(
    own: Selector, x: list[Tensor], mask: ph.Mask | None, apart: Tensor | None = None, **more: Any
) -> Tensor:
    q, k, v = x
    assert isinstance(own, Rectified)
    found = choose(own, q, k, mask, q.shape[-1] ** -0.5)
    size = {"batch": q.shape[0], "heads": q.shape[1], "queries": q.shape[2], "keys": k.shape[2]}
    allowed = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
    allowed = allowed if mask is None else densify(mask, **size)
    allowed = allowed.expand(*q.shape[:3], k.shape[2])
    read = listed(found.index, -(-k.shape[2] // own.cols))
    return ph.reference("rectified")(
        q, k, v, allowed, read, rows=own.rows, cols=own.cols, apart=apart, **more
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", [None, ph.causal(), ph.causal() & ph.window(20)], ids=str)
def test_equals_its_twin(shape: tuple[int, ...], mask: ph.Mask | None) -> None:
    *sizes, rows, cols = shape
    x = tensors(*sizes)
    moved = 0.0
    for gate, gated in ((None, True), (ph.open_gate(), False)):
        own = ph.rectified(some(rows, cols), gate=gate)
        found = ph.attend(*x, mask=mask, select=own)
        torch.testing.assert_close(found, twin(own, x, mask, gated=gated))
        moved = max(moved, float((found - ph.attend(*x, mask=mask, select=some(rows, cols))).abs().max()))
    assert moved > 0.05


def test_keys_of_apart_are_taken_one_by_one() -> None:
    x = tensors(1, 4, 2, 50, 50)
    own = ph.rectified(some(8, 4), gate=ph.open_gate(), apart=ph.sink(6) | ~ph.sink(40))
    apart = torch.tensor([n < 2 or n >= 10 for n in range(13)])
    for mask in (None, ph.causal()):
        found = ph.attend(*x, mask=mask, select=own)
        torch.testing.assert_close(found, twin(own, x, mask, apart, gated=False))
        plain = ph.rectified(some(8, 4), gate=ph.open_gate())
        assert (found - ph.attend(*x, mask=mask, select=plain)).abs().max() > 0.01


def test_padding_counts_in_no_mean() -> None:
    q, k, v = tensors(2, 4, 2, 50, 50)
    real = torch.arange(50) >= torch.tensor([[0], [14]])
    mask = ph.causal() & ph.padding(real)
    own = ph.rectified(some(8, 4), gate=ph.open_gate())
    found = ph.attend(q, k, v, mask=mask, select=own)
    expected = twin(own, [q, k, v], mask, real=real, gated=False)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, :, 16:], expected[1, :, 16:])
    for x in (k, v):
        x[1, :, :14] = 50.0
    torch.testing.assert_close(ph.attend(q, k, v, mask=mask, select=own)[1, :, 16:], found[1, :, 16:])


@pytest.mark.parametrize("mask", [None, ph.causal()], ids=str)
def test_everything_read_is_full_attention(mask: ph.Mask | None) -> None:
    for *sizes, rows, cols in SHAPES[:4]:
        x = tensors(*sizes)
        own = ph.rectified(ph.select(ph.mean_keys(), ph.keep_share(1.0), rows=rows, cols=cols))
        torch.testing.assert_close(ph.attend(*x, mask=mask, select=own), ph.attend(*x, mask=mask))


def test_weights_sum_to_one() -> None:
    for *sizes, rows, cols in SHAPES:
        q, k, v = tensors(*sizes)
        mask = None if sizes[3] > sizes[4] else ph.causal()
        for gate in (ph.gain_gate(), ph.open_gate()):
            own = ph.rectified(some(rows, cols), gate=gate)
            ones = ph.attend(q, k, torch.ones_like(v), mask=mask, select=own)
            torch.testing.assert_close(ones, torch.ones_like(ones))


def blockwise(length: int, size: int, x: Tensor) -> Tensor:
    return x[:, :, : length // size].repeat_interleave(size, 2)


def test_blocks_of_equal_tokens_need_not_be_read() -> None:
    """The means are exact, and the gate sees it: any choice gives full attention."""
    q, k, v = (blockwise(48, 8, x) for x in tensors(1, 4, 2, 48, 48))
    for mask, rows in ((None, 8), (ph.causal(), 1)):
        for blocks in (1, 3):
            own = ph.rectified(some(rows, 8, blocks))
            full = ph.attend(q, k, v, mask=mask)
            torch.testing.assert_close(ph.attend(q, k, v, mask=mask, select=own), full)
            assert (ph.attend(q, k, v, mask=mask, select=some(rows, 8, blocks)) - full).abs().max() > 0.1


def test_a_shut_gate_is_the_selector_alone() -> None:
    """Rough keys with the mean 0 have products of means that say nothing."""
    q, k, v = (torch.randn(1, 2, 64, 8, dtype=torch.float64) for _ in range(3))
    k = k - k.unflatten(2, (-1, 8)).mean(3).repeat_interleave(8, 2)
    x = (q, k, v)
    shut = ph.attend(*x, select=ph.rectified(some(8, 8)))
    torch.testing.assert_close(shut, ph.attend(*x, select=some(8, 8)))
    opened = ph.attend(*x, select=ph.rectified(some(8, 8), gate=ph.open_gate()))
    assert (opened - shut).abs().max() > 0.01


def test_steps_are_what_the_whole_call_is_and_later_tokens_have_no_part() -> None:
    q, k, v = tensors(1, 4, 2, 45, 45)
    own = ph.rectified(some(1, 8), gate=ph.open_gate())
    whole = ph.attend(q, k, v, mask=ph.causal(), select=own)
    steps = [
        ph.attend(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], mask=ph.causal(), select=own)
        for n in range(1, 46)
    ]
    torch.testing.assert_close(torch.cat(steps, 2), whole)
    together = ph.rectified(some(8, 8), gate=ph.open_gate())
    before = ph.attend(q, k, v, mask=ph.causal(), select=together)
    later = v.clone()  # values are what an output is made of, whatever the block of queries knows
    later[:, :, 20:] = 1e6
    after = ph.attend(q, k, later, mask=ph.causal(), select=together)
    assert torch.equal(after[:, :, :20], before[:, :, :20])


def test_bands_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tensors(2, 4, 2, 90, 90)
    own = ph.rectified(some(4, 8), apart=ph.sink(1))
    whole = ph.attend(*x, mask=ph.causal(), select=own)
    monkeypatch.setattr(import_module("polyhead.attend.selectors.rectified"), "_HELD", 500)
    torch.testing.assert_close(ph.attend(*x, mask=ph.causal(), select=own), whole)


def test_it_goes_around_any_selector() -> None:
    x = tensors(1, 4, 2, 64, 64)
    full = ph.attend(*x, mask=ph.causal())
    for inner in (
        some(8, 8) | ph.a_shape(1, 8, rows=8, cols=8),
        ph.a_shape(1, 8, rows=8, cols=8),
        ph.guarded(some(8, 8), 0.95),
        ph.spans(torch.tensor([4.0, 8, 12, 16]), first=8, rows=8, cols=8),
        ph.proxy_attn(0.3, least=8, rows=8, cols=8, stride=2),
    ):
        own = ph.rectified(inner, gate=ph.open_gate())
        torch.testing.assert_close(
            ph.attend(*x, mask=ph.causal(), select=own), twin(own, x, ph.causal(), gated=False)
        )
        plain, better = (ph.attend(*x, mask=ph.causal(), select=one) for one in (inner, own))
        assert (better - full).norm() < (plain - full).norm()
    own = ph.rectified(some(8, 8))
    for wrong, words in (
        (lambda: own | some(8, 8), r"rectified\(a \| b\)"),
        (lambda: ph.guarded(own), r"rectified\(guarded\(a\)\)"),
        (lambda: ph.rectified(own), "corrects nothing"),
        (lambda: ph.rectified(ph.follow(1)), "chooses by itself"),
    ):
        with pytest.raises(ConfigError, match=words):
            wrong()


def test_gradients_flow_through_the_means() -> None:
    x = [one.requires_grad_() for one in tensors(1, 2, 1, 12, 12, 4)]
    own = ph.rectified(some(4, 4, 1), gate=ph.open_gate())
    assert torch.autograd.gradcheck(lambda *y: ph.attend(*y, mask=ph.causal(), select=own), x)
    real = torch.arange(12) >= torch.tensor([[5]])  # the first block of queries sees nothing
    mask = ph.causal() & ph.padding(real)
    ph.attend(*x, mask=mask, select=own)[:, :, 5:].sum().backward()
    assert all(bool(one.grad.isfinite().all()) for one in x if one.grad is not None)


def test_half_precision_and_a_compiled_step() -> None:
    x = [one.float() for one in tensors(1, 4, 2, 64, 64)]
    own = ph.rectified(some(8, 8))
    expected = ph.attend(*x, mask=ph.causal(), select=own)
    half = ph.attend(*(one.bfloat16() for one in x), mask=ph.causal(), select=own)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 0.1
    step = torch.compile(lambda *y: ph.attend(*y, mask=ph.causal(), select=own), backend="eager")
    torch.testing.assert_close(step(*x), expected)


def test_in_a_module() -> None:
    torch.manual_seed(0)
    plain, own = (
        ph.build("grouped_query", dim=32, heads=4, kv_heads=2, select=one).double().eval()
        for one in (some(1, 4), ph.rectified(some(1, 4), gate=ph.open_gate()))
    )
    own.load_state_dict(plain.state_dict())
    x = torch.randn(2, 23, 32, dtype=torch.float64)
    whole = own(x, mask=ph.causal())
    assert (whole - plain(x, mask=ph.causal())).abs().max() > 1e-3
    cache = own.new_cache(2)
    steps = [own(one, mask=ph.causal(), cache=cache) for one in x.split([9, *[1] * 14], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    assert own.cost(2, 23).flops > plain.cost(2, 23).flops


def test_it_is_a_value_and_wrong_input_is_said() -> None:
    x = tensors(1, 4, 2, 40, 40)
    own = ph.rectified(some(8, 8), gate=ph.open_gate(), apart=ph.sink(1))
    assert ph.from_json(ph.to_json(own)) == own
    assert isinstance(choose(own, x[0], x[1], None, 1.0), Chosen)
    for more in (
        {"score": ph.alibi(4)},
        {"normalizer": ph.sparsemax()},
        {"dropout": 0.1},
        {"return_lse": True},
    ):
        with pytest.raises(ConfigError, match=f"rectified corrects .* takes no {next(iter(more))}"):
            ph.attend(*x, select=own, **more)
    with pytest.raises(ConfigError, match="use the selector that is corrected"):
        ph.observe(*x, [], select=own)
    with pytest.raises(ConfigError, match=r"gate must be one such as gain_gate\(\)"):
        ph.rectified(some(8, 8), gate=0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="apart must be a mask"):
        ph.rectified(some(8, 8), apart=4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="selector must be one that chooses"):
        ph.rectified(ph.mean_keys())  # type: ignore[arg-type]
    heads = ph.select(ph.mean_keys(), ph.keep_share(torch.tensor([0.1, 0.2])), rows=8, cols=8)
    with pytest.raises(ShapeError, match="holds 2 numbers, but the call has 4 heads"):
        ph.attend(*x, select=ph.rectified(heads))
