"""What dropped tokens leave behind: their number and the mean of their keys and values.

One compensation token stands for all N dropped ones: its key and value are their means, and log N is added to
its logit. Where the dropped keys are all the same, and the values too, nothing is lost for any query.

Paper: RazorAttention: Efficient KV Cache Compression Through Retrieval Heads, arXiv 2407.15891.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyhead.attend.scores import Score
from polyhead.attend.tile import Tile
from polyhead.cache.step import Step

__all__ = ["Dropped", "merged", "running_means"]


class Dropped:
    """Sums of the keys `(B, G, D)` and values `(B, G, Dv)` of dropped tokens, at least in float32.

    Attributes:
        count: how many were dropped, one number or `(B,)`.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.count: int | Tensor = 0

    def tensors(self) -> list[Tensor]:
        """Everything that is allocated."""
        return [t for t in (self.keys, self.values) if t is not None]

    def add(self, k: Tensor, v: Tensor, which: Tensor | None = None) -> None:
        """Drop the rows `(B, G, n, ·)`, or those of each batch item for which `which` `(B, n)` is True."""
        keys, values = _sum(k, which), _sum(v, which)
        if self.keys is None or self.values is None:
            with torch.inference_mode(False):
                self.keys, self.values = torch.zeros_like(keys), torch.zeros_like(values)
        self.keys += keys
        self.values += values
        self.count = self.count + (k.shape[2] if which is None else which.sum(1))

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean key `(B, G, D)` and value of what was dropped; zeros where nothing was."""
        keys, values = self.tensors()
        if isinstance(self.count, Tensor):
            count = self.count.clamp(min=1).view(-1, 1, 1).to(keys)
            return keys / count, values / count
        return keys / max(self.count, 1), values / max(self.count, 1)

    def log_count(self, device: torch.device) -> Tensor:
        """log N, `(1,)` or `(B,)`; -inf where nothing was dropped."""
        return torch.as_tensor(self.count, dtype=torch.float32, device=device).log().view(-1)

    def copy(self) -> Dropped:
        """A copy that later drops leave alone."""
        other = Dropped()
        other.count = self.count
        if self.keys is not None and self.values is not None:
            other.keys, other.values = self.keys.clone(), self.values.clone()
        return other

    def item(self, n: int) -> Dropped:
        """What was dropped of batch item n."""
        other = Dropped()
        other.count = int(self.count[n]) if isinstance(self.count, Tensor) else self.count
        if self.keys is not None and self.values is not None:
            other.keys, other.values = self.keys[n : n + 1], self.values[n : n + 1]
        return other

    def change(self, select: Callable[[Tensor], Tensor]) -> None:
        """Put `select(tensor)` in the place of every tensor."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = select(self.keys), select(self.values)
        if isinstance(self.count, Tensor):
            self.count = select(self.count)


def _sum(rows: Tensor, which: Tensor | None) -> Tensor:
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if which is None:
        return rows.sum(2)
    # rows that were never written may hold anything, also NaN
    return rows.masked_fill(~which[:, None, :, None], 0.0).sum(2)


def merged(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k_mean: Tensor,
    v_mean: Tensor,
    log_count: Tensor,
    scale: float,
    score: Score | None = None,
) -> Tensor:
    """Attention with one token more for each query: a mean key and value that count N times.

        o' = (e^lse o + N e^c v̄) / (e^lse + N e^c),   c = score(scale · q·k̄)

    Args:
        out, lse: attention over the other keys, `(B, H, L, Dv)` and `(B, H, L)`.
        q: queries `(B, H, L, D)`.
        k_mean, v_mean: `(B, G, L or 1, D)` and `(B, G, L or 1, Dv)`.
        log_count: log N, `(B or 1, L or 1)`; -inf: there is no such token.
        scale, score: of the call; the score may look at the logit alone.
    """
    batch, heads, queries, width = q.shape
    kv_heads = k_mean.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, queries, width).to(k_mean.dtype)
    logit = (grouped * k_mean[:, :, None]).sum(-1).mul_(scale).view(batch, heads, queries)
    if score is not None:
        nowhere = torch.zeros(1, dtype=torch.int64, device=q.device)
        logit = score.apply(logit[..., None], Tile(batch, heads, nowhere, nowhere))[..., 0]
    logit = logit + log_count[:, None, :]
    total = torch.logaddexp(lse.to(logit.dtype), logit)
    total = torch.where(total == -torch.inf, 0.0, total)
    own = (lse - total).exp()[..., None]
    mean = (logit - total).exp()[..., None]
    values = v_mean[:, :, None].expand(-1, -1, heads // kv_heads, -1, -1).flatten(1, 2)
    return (own * out + mean * values).to(out.dtype)


def running_means(
    k: Tensor, v: Tensor, tokens: Tensor, step: Step, sink: int, window: int, before: Dropped | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of L queries, the mean key and value of the tokens that it does not see, and log their number.

    Args:
        k, v: the keys that were held and the new ones, `(B, G, n, ·)`.
        tokens: which tokens these are, `(B or 1, n)`, -1: none.
        step: what the forward pass asks.
        sink, window: what a query sees.
        before: what was dropped before the new tokens came.

    Returns:
        `(B, G, L, D)`, `(B, G, L, Dv)` and `(B or 1, L)`.
    """
    if step.ranks is None:
        place = torch.arange(step.keys - step.queries, step.keys, device=k.device)
        return _running_means(k, v, tokens[0], place, sink, window, before)
    items = []
    for n in range(len(k)):
        own = tokens[min(n, len(tokens) - 1)]
        rank = torch.where(own >= 0, step.ranks[n, own.clamp(min=0)], -1)
        if step.real is not None:
            rank = torch.where(step.real[n, own.clamp(min=0)], rank, -1)
        rank, order = rank.sort()
        there = order[rank >= 0]
        at = slice(n, n + 1)
        items.append(
            _running_means(
                k[at, :, there],
                v[at, :, there],
                rank[rank >= 0],
                step.ranks[n, step.keys - step.queries :],
                sink,
                window,
                None if before is None else before.item(n),
            )
        )
    keys, values, counts = zip(*items, strict=True)
    return torch.cat(keys), torch.cat(values), torch.cat(counts)


def _running_means(
    k: Tensor, v: Tensor, rank: Tensor, queries: Tensor, sink: int, window: int, before: Dropped | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`running_means` where key j has the ascending `rank[j]`, and the ranks after the sinks have no gap."""
    after = rank >= sink
    k, v, rank = k[:, :, after], v[:, :, after], rank[after]
    first = rank[0] if len(rank) else queries.new_tensor(sink)
    gone = (queries - window + 1 - first).clamp(0, len(rank))  # how many of the keys a query has left behind
    count = gone if before is None else gone + before.count
    dtype = torch.promote_types(k.dtype, torch.float32)

    def means(rows: Tensor, earlier: Tensor | None) -> Tensor:
        sums = torch.nn.functional.pad(rows.to(dtype).cumsum(2), (0, 0, 1, 0))
        if earlier is not None:
            sums = sums + earlier[:, :, None]
        return sums.index_select(2, gone) / count.clamp(min=1).view(-1, 1)

    return (
        means(k, None if before is None else before.keys),
        means(v, None if before is None else before.values),
        count.to(dtype).log()[None],
    )
