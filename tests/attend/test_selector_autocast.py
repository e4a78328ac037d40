"""Autocast rounds what a call is given, and no score that ranks it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend import attend
from polyhead.attend.selectors import Selector, choose

SIZE = {"rows": 4, "cols": 4}
PLAIN = ph.select(ph.mean_keys(), ph.keep_blocks(2), **SIZE)
SELECTORS: dict[str, Selector] = {
    "mean_keys": PLAIN,
    "key_bounds": ph.select(ph.key_bounds(), ph.keep_mass(0.5), **SIZE),
    "sampled_mass": ph.select(ph.sampled_mass(2), ph.keep_blocks(2), **SIZE),
    "mean_mass": ph.select(ph.shared(ph.mean_mass(2, 2), by="max"), ph.keep_mass(0.5), **SIZE),
    "sampled_mass, odd": ph.select(ph.sampled_mass(3, 3, 2.0), ph.keep_mass(0.5), **SIZE),
    "keep_last_mass": ph.select(ph.mean_keys(), ph.keep_last_mass(0.5), **SIZE),
    "proxy_attn": ph.proxy_attn(0.5, least=1, **SIZE),
    "prism": ph.prism(0.5, **SIZE),
    "vertical_slash": ph.vertical_slash(3, 3, first=1, nearest=1, **SIZE),
    "token_indexer": ph.token_indexer(5, ph.mean_indexer(2)),
    "hisa": ph.hisa(5, 2, 4, ph.mean_indexer(2)),
    "dhsa": ph.dhsa(5, local=4, last=2, rows=4),
    "unified_keys": ph.unified_keys(5, 0.3, 1),
    "qada": ph.qada(0.5, nearest=4, cols=4),
    "guarded": ph.guarded(PLAIN, 0.3),
}


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, h, 60, 16, generator=draw).to(dtype).float() for h in (4, 2, 2))
    return q, k, v


MASKS = [ph.causal(), ph.causal() & ph.padding(torch.arange(60) >= torch.tensor([[9], [0]]))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS, ids=["causal", "padded"])
@pytest.mark.parametrize("name", SELECTORS)
def test_a_choice_is_that_without_autocast(name: str, mask: ph.Mask, dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype)
    expected = choose(SELECTORS[name], q, k, mask, 0.25)
    with torch.autocast("cpu", dtype):
        found = choose(SELECTORS[name], q, k, mask, 0.25)
        out = attend(q, k, v, mask=mask, select=SELECTORS[name])
    assert torch.equal(found.index, expected.index)
    narrow = (x.to(dtype) for x in (q, k, v))
    assert torch.equal(out, attend(*narrow, mask=mask, select=SELECTORS[name]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_output_is_corrected_without_autocast(dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype)
    for mask in (None, *MASKS):
        with torch.autocast("cpu", dtype):
            found = attend(q, k, v, mask=mask, select=ph.rectified(PLAIN))
        narrow = (x.to(dtype) for x in (q, k, v))
        assert torch.equal(found, attend(*narrow, mask=mask, select=ph.rectified(PLAIN)))


def test_a_text_that_is_followed_is_read_without_autocast() -> None:
    q, k, _ = tensors(torch.float32)
    own = ph.triangle_spans(8, 8, first=1, chunk=4, rows=4)
    followed, expected = own.begin(), own.begin()
    with torch.autocast("cpu", torch.bfloat16):
        followed.see(q[:, :, :52], k[:, :, :52], ph.causal(), 0.25)
    expected.see(q[:, :, :52], k[:, :, :52], ph.causal(), 0.25)
    for at in range(52, 60):
        step = q[:, :, at : at + 1], k[:, :, : at + 1], ph.causal(), 0.25
        with torch.autocast("cpu", torch.bfloat16):
            found = choose(followed, *step)
        assert torch.equal(found.index, choose(expected, *step).index)
