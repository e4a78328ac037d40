"""Whatever the parts, the masks, the padding and the chunks: decoding is the full forward pass."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.attend.masks import Mask
from polyhead.nn import alibi_position, no_position, rope, sinusoidal

F64 = {"dtype": torch.float64}
LENGTH = 24

positions = st.sampled_from(
    [no_position(), sinusoidal(), rope(), rope(fraction=0.5, interleaved=True), alibi_position()]
)
masks = st.sampled_from(
    [
        ph.causal(),
        ph.window(5),
        ph.causal() & (ph.window(3) | ph.sink(2)),
        ph.causal() & ph.blocks(7),
        ph.causal() & ~ph.dilated(4, 3),
        ph.causal() & ph.documents(torch.tensor([0] * 9 + [-1] + [1] * 14)),
        ph.per_head([ph.causal(), ph.window(2), ph.window(0), ph.causal() & ph.strided(3)]),
    ]
)
normalizers = st.sampled_from([ph.softmax(), ph.softmax(sink=0.3), ph.sigmoid(), ph.entmax(1.5)])
chunks = st.lists(st.integers(1, 9), min_size=1, max_size=LENGTH).map(
    lambda sizes: [n for n in _to_length(sizes) if n]
)


def _to_length(sizes: list[int]) -> list[int]:
    found, left = [], LENGTH
    for size in sizes:
        found.append(min(size, left))
        left -= found[-1]
    return found + [1] * left


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    position=positions,
    mask=masks,
    normalizer=normalizers,
    sizes=chunks,
    window=st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(0, 4))),
    left=st.integers(0, 5),
    kv_heads=st.sampled_from([1, 2, 4]),
    own_positions=st.booleans(),
)
def test_decoding_is_the_full_pass(
    position: ph.nn.Position,
    mask: Mask,
    normalizer: object,
    sizes: list[int],
    window: tuple[int, int] | None,
    left: int,
    kv_heads: int,
    own_positions: bool,
) -> None:
    torch.manual_seed(0)
    attn = ph.build(
        "grouped_query", dim=16, heads=4, kv_heads=kv_heads, position=position, normalizer=normalizer, **F64
    )
    x = torch.randn(2, LENGTH, 16, **F64)
    real = torch.arange(LENGTH) >= torch.tensor([[left], [0]])
    places = (real.cumsum(1) - 1).clamp(min=0) if own_positions else None
    visible = mask
    if window is not None:
        visible = mask & ph.causal() & (ph.window(window[0] - 1) | ph.sink(window[1]))
    with torch.no_grad():
        full = attn(x, mask=visible, padding=real, positions=places)
        cache = attn.new_cache(2, **({} if window is None else {"window": window[0], "sinks": window[1]}))
        parts, seen = [], 0
        for part in x.split(sizes, dim=1):
            own = slice(seen, seen + part.shape[1])
            # positions are said until the padding is over, and counted on by the cache after that
            told = None if places is None or (seen > left and seen > 0) else places[:, own]
            parts.append(attn(part, mask=mask, padding=real[:, own], positions=told, cache=cache))
            seen = own.stop
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], full[real], rtol=0, atol=1e-10)
