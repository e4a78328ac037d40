"""Attention that is exact within blocks of like keys, and estimated from a sample elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

import polyhead as ph
from attend.operands import tensors
from hf.tiny import SIZES, make, tokens
from polyhead.attend import attend
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.hyper_attention import angular_buckets

SHAPES = [(2, 4, 2, 37, 37), (1, 2, 2, 23, 51), (1, 4, 1, 64, 64)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def replayed(q: Tensor, k: Tensor, bits: int, samples: int) -> tuple[Tensor, Callable[[int], Tensor]]:
    """What `hyper_attention` draws from `generator()`."""
    own = generator()
    planes = torch.randn(q.shape[3], bits, generator=own)
    return planes, lambda keys: torch.randint(keys, (*k.shape[:2], samples), generator=own)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize(
    ("bits", "block", "samples", "least"), [(3, 4, 6, 5), (5, 7, 3, 9), (1, 16, 40, 1), (7, 3, 1, 12)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_its_twin(
    shape: tuple[int, ...], bits: int, block: int, samples: int, least: int, causal: bool
) -> None:
    q, k, v = tensors(*shape)
    own: dict[str, Any] = {"causal": causal, "block": block, "least": least}
    planes, draw = replayed(q, k, bits, samples)
    expected, counts = ph.reference("hyper_attention")(q, k, v, planes=planes, draw=draw, **own)
    found = ph.hyper_attention(q, k, v, bits=bits, samples=samples, generator=generator(), **own)
    torch.testing.assert_close(found, expected)
    assert (counts > 1).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_short_calls_and_single_blocks_are_exact(shape: tuple[int, ...]) -> None:
    x = tensors(*shape)
    for mask in (None, ph.causal()):
        expected, lse = attend(*x, mask=mask, return_lse=True)
        own = {"causal": mask is not None, "return_lse": True}
        for sizes in ({"least": 65}, {"least": 1, "block": 64, "samples": 3}):
            y, total = ph.hyper_attention(*x, **own, **sizes)  # type: ignore[call-overload]
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(total, lse)


def test_without_a_sample_it_is_blocks_of_the_sorted_order() -> None:
    q, k, v = tensors(1, 1, 1, 40, 40)
    found = ph.hyper_attention(q, k, v, bits=4, block=8, samples=0, least=1, generator=generator())
    planes = torch.randn(8, 4, generator=generator())
    by_query, by_key = (angular_buckets(x[0, 0], planes).argsort(stable=True) for x in (q, k))
    expected = torch.empty_like(v)
    for n in range(0, 40, 8):
        i, j = by_query[n : n + 8], by_key[n : n + 8]
        expected[0, 0, i] = (q[0, 0, i] @ k[0, 0, j].mT * 8**-0.5).softmax(-1) @ v[0, 0, j]
    torch.testing.assert_close(found, expected)


def test_neighbouring_buckets_differ_in_one_sign() -> None:
    for bits in (1, 3, 7, 16):
        signs = torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1
        bucket = angular_buckets(signs * 2.0 - 1, torch.eye(bits))
        assert torch.equal(bucket.sort().values, torch.arange(2**bits))
        assert ((signs[bucket.argsort()].diff(dim=0) != 0).sum(-1) == 1).all()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_the_sum_of_a_row_is_right_in_the_mean(causal: bool) -> None:
    x = tensors(1, 2, 1, 48, 48)
    mask = ph.causal() if causal else None
    _, lse = attend(*x, mask=mask, return_lse=True)
    # items of a call have hyperplanes in common, under which each draws keys of its own: a mean of 1 whatever
    # the planes are, and no covariance
    several = [one.expand(50, -1, -1, -1) for one in x]
    draws, own = generator(5), {"causal": causal, "bits": 3, "block": 4, "samples": 8, "least": 6}
    ratios = []
    for _ in range(12):
        _, found = ph.hyper_attention(*several, generator=draws, return_lse=True, **own)  # type: ignore[call-overload]
        ratios.append((found - lse).exp())
    ratio = torch.cat(ratios)
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert float(error.max()) < 0.05
    assert bool(((ratio.mean(0) - 1).abs() <= 4.5 * error + 1e-9).all())
    assert float(error.max()) > 1e-3


def test_weights_of_a_row_sum_to_one() -> None:
    q, k, v = tensors(2, 4, 2, 50, 50)
    for causal in (True, False):
        y = ph.hyper_attention(q, k, torch.ones_like(v), causal=causal, bits=3, block=4, samples=5, least=4)
        torch.testing.assert_close(y, torch.ones_like(y))


def test_later_tokens_have_no_part() -> None:
    x = tensors(1, 4, 2, 50, 50)
    own = {"causal": True, "bits": 3, "block": 4, "samples": 5, "least": 4}
    for seed in range(3):
        before = ph.hyper_attention(*x, generator=generator(seed), **own)  # type: ignore[call-overload]
        for cut in (11, 25, 38):
            changed = [torch.cat([one[:, :, :cut], -3 * one[:, :, cut:]], 2) for one in x]
            after = ph.hyper_attention(*changed, generator=generator(seed), **own)  # type: ignore[call-overload]
            torch.testing.assert_close(after[:, :, :cut], before[:, :, :cut])


def test_planted_neighbours_are_found() -> None:
    """Every query has one key that is like it: hashing finds it, a sample alone or blocks by lot do not."""
    draw = generator(2)
    k = torch.randn(1, 2, 512, 32, generator=draw, dtype=torch.float64)
    v = torch.randn(1, 2, 512, 32, generator=draw, dtype=torch.float64)
    order = torch.randperm(512, generator=draw)
    q = 2.5 * k[:, :, order] + 0.05 * torch.randn(1, 2, 512, 32, generator=draw, dtype=torch.float64)
    dense = attend(q, k, v)

    def error(y: Tensor) -> float:
        return float(
            torch.linalg.matrix_norm(y - dense, 2).mean() / torch.linalg.matrix_norm(dense, 2).mean()
        )

    full = error(ph.hyper_attention(q, k, v, block=32, samples=32, least=1, generator=generator()))
    like = error(ph.hyper_attention(q, k, v, block=32, samples=0, least=1, generator=generator()))
    places = torch.randint(512, (64,), generator=draw)
    sampled = error(attend(q, k[:, :, places], v[:, :, places]))
    shuffled = torch.randperm(512, generator=draw)
    lot = torch.empty_like(q)
    for n in range(0, 512, 64):
        some = shuffled[n : n + 64]
        other = torch.randperm(512, generator=draw)[:64]
        lot[:, :, some] = attend(q[:, :, some], k[:, :, other], v[:, :, other])
    assert max(full, like) < 0.75 * min(sampled, error(lot))


def test_gradients_are_those_of_the_keys_that_are_read() -> None:
    x = [one.requires_grad_() for one in tensors(1, 2, 1, 14, 14, 4)]

    def run(*x: Tensor) -> Tensor:
        own = {"causal": True, "bits": 2, "block": 2, "samples": 3, "least": 3}
        return ph.hyper_attention(*x, generator=generator(), **own)  # type: ignore[call-overload, no-any-return]

    assert torch.autograd.gradcheck(run, x)


def test_in_a_pretrained_model_layers_can_be_estimated() -> None:
    model = make(t.LlamaForCausalLM, t.LlamaConfig(**SIZES))
    ids = tokens(2, 40)

    def logits(**own: Any) -> Tensor:
        def handler(call: ph.hf.Call) -> Tensor:
            assert isinstance(call.k, Tensor)
            assert isinstance(call.v, Tensor)
            return ph.hyper_attention(call.q, call.k, call.v, causal=True, scale=call.scale, **own)

        with torch.no_grad(), ph.attach(model, handler=handler):
            return model(ids, use_cache=False).logits

    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits(), expected, rtol=1e-3, atol=1e-4)
    few, many = (
        float((logits(least=4, block=4, samples=n, generator=generator()) - expected).norm())
        for n in (2, 400)
    )
    assert 0.001 < many < few


def test_half_precision_is_near() -> None:
    x = [one.to(torch.bfloat16) for one in tensors(1, 2, 1, 64, 64)]
    own = {"causal": True, "bits": 3, "block": 8, "samples": 8, "least": 8}
    found = ph.hyper_attention(*x, generator=generator(), **own)  # type: ignore[call-overload]
    wide = ph.hyper_attention(*(one.float() for one in x), generator=generator(), **own)  # type: ignore[call-overload]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wide, rtol=0.02, atol=0.03)


def test_wrong_input_is_said() -> None:
    q, k, v = tensors(1, 2, 1, 20, 10)
    with pytest.raises(ShapeError, match="the last of the 10 keys; got 20 queries"):
        ph.hyper_attention(q, k, v, causal=True)
    for name, value, low in (("bits", 0, 1), ("block", 0, 1), ("samples", -1, 0), ("least", 0, 1)):
        with pytest.raises(ConfigError, match=f"hyper_attention: {name} must be at least {low}; got {value}"):
            ph.hyper_attention(q, k, v, **{name: value})  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="bits must be at most 16; got 17"):
        ph.hyper_attention(q, k, v, bits=17)
    with pytest.raises(ConfigError, match="causal must be True or False"):
        ph.hyper_attention(q, k, v, causal=ph.causal())  # type: ignore[call-overload]
