"""ALiBi at distances that half precisions cannot tell apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend.scores import alibi_slopes
from polyhead.attend.tile import Tile

HALVES = (torch.bfloat16, torch.float16)
FAR = 5000


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_slopes_in_half_precision_tell_far_distances_apart(dtype: torch.dtype) -> None:
    slopes = alibi_slopes(8).to(dtype)  # powers of two: exact in any precision
    distance = torch.arange(FAR, FAR + 200)
    assert len(distance.to(dtype).unique()) < 60  # what the half precision itself makes of them
    bias = ph.alibi(slopes).at(distance)
    assert bias.dtype == torch.float32
    assert torch.equal(bias.double(), -slopes.double()[:, None] * distance)
    assert bool((bias.diff() < 0).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_bias_of_a_far_tile_is_exact(dtype: torch.dtype) -> None:
    tile = Tile(1, 8, torch.arange(FAR + 100, FAR + 104), torch.arange(100), consecutive=True)
    bias = ph.alibi(alibi_slopes(8).to(dtype)).bias(tile, torch.float32)
    expected = -alibi_slopes(8).double()[:, None, None] * (tile.i - tile.j)
    assert torch.equal(bias.double().expand_as(expected), expected)


@pytest.mark.parametrize("backend", ["auto", "tiles", "reference"])
@pytest.mark.parametrize("slopes", [torch.float32, torch.bfloat16], ids=str)
def test_attention_to_far_keys_in_bfloat16(backend: str, slopes: torch.dtype) -> None:
    """All keys seen lie more than 5000 behind: ties among their biases would flatten the weights."""
    random = torch.Generator().manual_seed(0)
    keys = FAR + 300
    q = torch.randn(1, 8, 2, 16, generator=random).bfloat16()
    k, v = (torch.randn(1, 2, keys, 16, generator=random).bfloat16() for _ in range(2))
    mask = ph.causal() & ~ph.window(FAR)
    score = ph.alibi(alibi_slopes(8).to(slopes))

    def attention(*operands: Tensor, use: str) -> Tensor:
        return ph.attend(*operands, mask=mask, score=score, backend=use)

    got = attention(q, k, v, use=backend)
    exact = attention(q.double(), k.double(), v.double(), use="reference")
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=2**-9)
    # and it matters: with distances rounded to bfloat16 the answer is another one
    i, j = torch.arange(keys - 2, keys)[:, None], torch.arange(keys)
    rounded = -alibi_slopes(8).double()[:, None, None] * (i - j).bfloat16().double()
    logits = q.double() @ k.double().repeat_interleave(4, 1).mT / 4 + rounded
    flat = torch.softmax(logits.masked_fill(i - j <= FAR, -torch.inf), -1) @ v.double().repeat_interleave(
        4, 1
    )
    assert float((flat - exact).abs().max()) > 0.1
