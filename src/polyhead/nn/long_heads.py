"""Heads that choose chunks of the past, and read them as if they stood next to each other.

"LongHeads: Multi-Head Attention is Secretly a Long Context Processor" (paper 062, arXiv 2402.10685).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.attend import attend
from polyhead.attend.masks import causal, chosen
from polyhead.attend.selectors.budgets import ordered
from polyhead.checks import given, whole
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.merged_softmax import merged
from polyhead.nn.positions import Rope

__all__ = ["attend_to_chunks", "chunk_keys", "chunks_of", "keys_of_chunks"]

_HELD = 1 << 22  # scores of chunks that are held at a time


def chunks_of(window: int, length: int) -> int:
    """How many chunks of `window` keys a query reads at positions below `length`.

    Raises:
        ConfigError: a number is none, or they are fewer than 3: the first, the last and the own one.
    """
    whole("window", window, 1)
    whole("length", length, 1)
    if length % window or length < 3 * window:
        raise ConfigError(
            f"length must be a multiple of window and at least three of it: the first chunk, the one before "
            f"and the query's own are always read; got length {length} and window {window}"
        )
    return length // window


def keys_of_chunks(places: Tensor, *, window: int, length: int) -> Tensor:
    """How many keys a query at each place of a text reads, in the chunks of `attend_to_chunks`."""
    most = chunks_of(window, length)
    chunks = (places.div(window, rounding_mode="floor")).clamp(max=most - 1)
    return chunks * window + places % window + 1


@torch.no_grad()
def chunk_keys(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G L D"],
    v: Float[Tensor, "B G L D"],
    *,
    position: Rope,
    window: int,
    scale: float | None = None,
) -> Float[Tensor, "B H N D"]:
    """One key for each complete chunk of `window` tokens, for every query head.

        f = mean over the rows of softmax(scale · q kᵀ) v       within the chunk, in both directions
        c = softmax(scale · f kᵀ) k                              the key of the chunk

    with q and k turned by their places in the chunk.

    Args:
        q, k, v: of whole chunks from the first token of one on, not yet turned; what is left over at the end
            counts for nothing. Values must be as wide as keys.
        position: how they are turned.
        window: tokens of a chunk.
        scale: factor of q·k. Default 1/sqrt(D).
    """
    batch, heads, tokens, width = q.shape
    if v.shape[-1] != width:
        raise ShapeError(
            f"chunk keys ask keys by a mean of values: both must be equally wide; got {width} and "
            f"{v.shape[-1]}"
        )
    count = tokens // window
    if not count:
        return q.new_empty(batch, heads, 0, width)
    table = _table(position, torch.arange(window, device=q.device), width, window)

    def parts(x: Tensor) -> Tensor:  # (B · N, H or G, w, D)
        return x[:, :, : count * window].unflatten(2, (count, window)).transpose(1, 2).flatten(0, 1)

    q, k, v = position.turn(parts(q), table), position.turn(parts(k), table), parts(v)
    asked = attend(q, k, v, scale=scale).mean(2, keepdim=True)
    return attend(asked, k, k, scale=scale)[:, :, 0].unflatten(0, (batch, count)).transpose(1, 2)


def attend_to_chunks(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    chunks: Float[Tensor, "B H N D"],
    *,
    position: Rope,
    window: int,
    length: int,
    scale: float | None = None,
) -> Float[Tensor, "B H L D"]:
    """Causal attention in which every query of every head reads `length / window` chunks, moved together.

        s[t, g]  = q_t · c_g                                          neither turned nor scaled
        G(t)     = the first chunk, the one before, the own one, and those of the best s, in order
        place of key j, in the chunk of rank r of G(t)      r·w + j mod w
        place of query t                                    (|G(t)| - 1)·w + t mod w

    and softmax attention over the keys of G(t) up to t, turned by these places. A query that sees no more
    chunks than it may read has its true places, and plain attention. No place is `length` or more.

    A key is turned by its place in its chunk alone, a query once for every rank: so keys are turned once, and
    the ranks are calls of `attend` whose parts of the softmax are merged.

    Args:
        q, k, v: not yet turned; queries are the last L of the S tokens.
        chunks: `chunk_keys` of the complete chunks, N = ⌊S / window⌋ of them.
        position: how queries and keys are turned.
        window: w, tokens of a chunk.
        length: a multiple of w, at least 3w; no more than the model was trained on.
        scale: factor of q·k. Default 1/sqrt(D).
    """
    most = chunks_of(window, length)
    tokens, width, first = k.shape[2], q.shape[-1], k.shape[2] - q.shape[2]
    if first < 0 or chunks.shape[2] != tokens // window:
        raise ShapeError(
            f"{tokens} keys have {tokens // window} complete chunks of {window}, and at most as many "
            f"queries; got {chunks.shape[2]} chunk keys and {q.shape[2]} queries"
        )
    at = torch.arange(first, tokens, device=q.device)
    own, inside = at.div(window, rounding_mode="floor"), at % window
    taken = _best(q, chunks, own, most)
    ranks = (own + 1).clamp(max=most)
    places = torch.arange(tokens, device=q.device) % window
    keys = position.turn(k, _table(position, places, width, length))
    out = sums = None
    for rank in range(taken.shape[-1]):
        # behind the last rank of a query stands no chunk: its place there is not asked for
        place = (ranks - 1 - rank).clamp(min=0) * window + inside
        asked = position.turn(q, _table(position, place, width, length))
        mask = causal() & chosen(taken[..., rank : rank + 1], rows=1, cols=window, first=first)
        part, lse = attend(asked, keys, v, mask=mask, scale=scale, return_lse=True)
        if out is None or sums is None:
            out, sums = part, lse
        else:
            out, sums = merged((out, part), (sums, lse)), torch.logaddexp(sums, lse)
    assert out is not None
    return out


@torch.no_grad()
def _best(q: Tensor, chunks: Tensor, own: Tensor, most: int) -> Tensor:
    """The chunks of every query, ascending, then -1 where there are fewer: `(B, H, L, most or fewer)`."""
    count = int(own[-1]) + 1
    most = min(most, count)
    keys = torch.nn.functional.pad(chunks, (0, 0, 0, count - chunks.shape[2])).mT  # the own one may be open
    place = torch.arange(count, device=q.device)

    def band(queries: Tensor, own: Tensor) -> Tensor:
        scores = queries @ keys
        visible = (place <= own[:, None]).expand_as(scores)
        forced = visible & ((place == 0) | (place >= own[:, None] - 1))
        found = ordered(scores, visible, forced)[..., :most]
        found = found.masked_fill(~visible.gather(-1, found), count).sort(-1).values
        return found.masked_fill(found == count, -1)

    step = max(1, _HELD // max(1, q.shape[0] * q.shape[1] * count))
    return torch.cat([band(*both) for both in zip(q.split(step, 2), own.split(step), strict=True)], dim=2)


def _table(position: Rope, places: Tensor, width: int, length: int) -> Tensor:
    if not isinstance(position, Rope):
        raise ConfigError(f"position must be a rotary one such as rope(); got {given(position)}")
    return position.turned(places, width, length)
