"""Spans of the past that are found in the map of attention, and retrieved by one vector each.

The text is cut into chunks of c tokens. Of every chunk, the local map A of its own keys and those of the
chunk before is worked out, mean over heads, and `detect_spans` and `cover` cut the chunk into spans by its
triangle. A span has one index vector for every key/value head,

    I = Σ_j w_j k_j / Σ_j w_j        w_j = Σ_i A[i, j]  over the tokens i behind the span, to the end of the
                                     next chunk (`votes=True`); or w_j = 1

Queries of a block, from token s on, read the first tokens, the `window` tokens before s, their own block up
to themselves, and the best spans of what lies between, up to `budget` tokens:

    score_h(span) = scale · mean_i q_i,h · I_h        vote(span) = Σ_h say_h softmax_over_spans(score_h)

one choice for all heads of a layer.

"Ltri-LLM: Streaming Long Context Inference for LLMs with Training-Free Dynamic Triangular Attention Pattern"
(paper 082, arXiv 2412.04757). No code of the authors was found.

Our readings: the map is that of two chunks, and θ its mean over the pairs of the chunk's own triangle, so
that a chunk as a whole scores nothing; spans end with their chunk. Winners are made disjoint. A head votes by
its softmax over spans, so that heads with clear wishes have more say, and `say` can give retrieval heads
more. The last span that fits the budget in part is cut. Spans that were retrieved before have no preference
(the paper keeps such). Positions are true: nothing is clipped to the trained range, as a selector moves no
keys; so it reads less, but makes no model read further than it can.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.precision import exact, wide
from polyhead.attend.selectors.around import Around
from polyhead.attend.selectors.choice import grid_of
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.selector import Listing, Selector
from polyhead.attend.selectors.triangles import cover, detect_spans
from polyhead.attend.selectors.visible import seen_pairs
from polyhead.checks import flag, number, whole
from polyhead.errors import ConfigError, ShapeError

__all__ = ["SpanIndex", "TriangleSpans", "triangle_spans"]

_HELD = 1 << 22  # scores that are held at a time


class TriangleSpans(Listing):
    """Spans found by triangles. See `triangle_spans`."""

    budget: int
    window: int = 1024
    first: int = 4
    chunk: int = 64
    threshold: float | None = None
    longest: int | None = None
    overlap: float = 0.3
    votes: bool = True
    say: Tensor | None = None
    rows: int = 64
    every: int = 1

    def __post_init__(self) -> None:
        for name, least in (("budget", 1), ("first", 0), ("chunk", 2), ("rows", 1), ("every", 1)):
            whole(f"triangle_spans: {name}", getattr(self, name), least)
        whole("triangle_spans: window", self.window, 1)
        if self.window < 2 * self.chunk:
            raise ConfigError(
                "triangle_spans: window must hold at least two chunks, as a span is known when the next "
                f"chunk has been read; got window {self.window} and chunk {self.chunk}"
            )
        if self.threshold is not None:
            own = number("triangle_spans: threshold", self.threshold, least=0)
            object.__setattr__(self, "threshold", own)
        if self.longest is not None:
            whole("triangle_spans: longest", self.longest, 2)
        object.__setattr__(self, "overlap", number("triangle_spans: overlap", self.overlap, least=0, most=1))
        flag("triangle_spans: votes", self.votes)
        say = self.say
        if say is not None and (
            not isinstance(say, Tensor)
            or say.ndim != 1
            or not say.is_floating_point()
            or bool((say < 0).any())
        ):
            raise ConfigError(
                "triangle_spans: say must be a tensor (H,) of numbers that are not below 0, or None"
            )

    @property
    def cols(self) -> int:
        return 1

    @property
    def remembers(self) -> bool:
        return True

    def check(self, heads: int) -> None:
        if self.say is not None and len(self.say) != heads:
            raise ShapeError(f"triangle_spans: say has {len(self.say)} numbers for {heads} heads")

    def flops(self, grid: Grid, width: int) -> int:
        return 4 * grid.batch * grid.heads * grid.queries * self.chunk * width  # of the local maps

    def begin(self) -> Selector:
        return _Reading(self, SpanIndex(self))

    def places(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        return SpanIndex(self).read(q, k, mask, grid)


class _Reading(Listing, Around):
    """`triangle_spans` within a text that is read call by call."""

    selector: TriangleSpans
    index: SpanIndex

    def begin(self) -> Selector:
        return self.selector.begin()

    def see(self, q: Tensor, k: Tensor, mask: Mask | None, scale: float) -> None:
        with exact(q.device):
            self.index.add(q.detach(), k.detach(), mask, grid_of(self, q, k, mask, scale))

    def places(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        return self.index.read(q, k, mask, grid)


class SpanIndex:
    """The spans of a text that is read from its start, of one layer.

    Attributes:
        starts, stops: `(B, n)`, the spans of complete chunks in order; where a text has fewer than others of
            the batch, stop is start.
        vectors: `(B, G, n', D)`, index vectors of the first n' of them, those whose next chunk is complete.
        tokens: read so far.
    """

    def __init__(self, selector: TriangleSpans) -> None:
        self.selector = selector
        self.starts = self.stops = torch.zeros(0, 0, dtype=torch.int64)
        self.vectors = torch.zeros(0)
        self.tokens = 0
        self._open: tuple[Tensor, Tensor] | None = None  # queries of the chunk at hand, and what they may see
        self._last: tuple[Tensor, Tensor] | None = None  # owners and votes of the tokens of the last chunk
        self._kept: tuple[int, Tensor] | None = (
            None  # of single queries: from which token, what was retrieved
        )
        self._steps = 0

    def read(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        """Take in a call, and list the keys that its blocks of queries read: `(B, 1, M, K)`."""
        own = self.selector
        self.add(q, k, mask, grid)
        s = torch.arange(grid.row_blocks, device=q.device) * grid.rows + grid.offset
        before = (s - own.window).clamp(min=0)
        if grid.queries == 1 and self._kept is not None and 0 < self._steps < own.every:
            far = self._kept[1]
            before = before.new_tensor([self._kept[0]])
            self._steps += 1
        else:
            band = max(1, _HELD // max(1, grid.batch * grid.heads * self.starts.shape[1]))
            far = torch.cat(
                [
                    self.retrieve(grid.mean_queries(q, at, min(at + band, grid.row_blocks)), before, at, grid)
                    for at in range(0, grid.row_blocks, band)
                ],
                1,
            )
            self._kept, self._steps = ((int(before[0]), far), 1) if grid.queries == 1 else (None, 0)
        width = own.window + max(grid.rows, own.every if grid.queries == 1 else 1)
        near = before[:, None] + torch.arange(width, device=q.device)
        last = (s + grid.rows - 1).clamp(max=grid.keys - 1)[:, None]
        near = near.masked_fill(near > last, -1)
        sinks = torch.arange(own.first, device=q.device).expand(len(s), -1)
        sinks = sinks.masked_fill(sinks >= before[:, None], -1)
        fixed = torch.cat([sinks, near], 1).expand(grid.batch, -1, -1)
        return torch.cat([fixed, far], 2)[:, None]

    def add(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> None:
        """Take in the queries `(B, H, L, D)` of the last tokens of the keys `(B, G, S, D)`.

        Raises:
            ConfigError: they do not go on from what was read.
        """
        if self.tokens != grid.offset or (self._open is not None and len(self._open[0]) != grid.batch):
            known = len(self._open[0]) if self._open is not None else grid.batch
            raise ConfigError(
                f"triangle_spans: a call goes on behind {grid.offset} tokens of {grid.batch} sequences, and "
                f"{self.tokens} of {known} were read: spans are found by the queries of the past. Read a "
                "text from its start within ph.sparse(model, ...), or in one call; layers with a sliding "
                "window of their own, or with other keys than the queries' tokens, need None"
            )
        c = self.selector.chunk
        i = torch.arange(grid.offset, grid.keys, device=q.device)[:, None]
        j = (i // c - 1) * c + torch.arange(2 * c, device=q.device)
        seen = seen_pairs(mask, grid, 0, grid.queries, j.clamp(0, grid.keys - 1))
        seen = (seen & (j >= 0) & (j <= i)).expand(grid.batch, grid.heads, -1, -1)
        if self._open is not None:
            q, seen = torch.cat([self._open[0], q], 2), torch.cat([self._open[1], seen], 2)
        self.tokens = grid.keys
        done = q.shape[2] // c * c
        start = grid.keys - q.shape[2]
        for at in range(0, done, c):
            self._chunk(q[:, :, at : at + c], k, seen[:, :, at : at + c], start + at, grid)
        self._open = q[:, :, done:].clone(), seen[:, :, done:].clone()

    def _chunk(self, q: Tensor, k: Tensor, seen: Tensor, start: int, grid: Grid) -> None:
        """Find the spans of a complete chunk, which begins at `start`, and the vectors of the one before."""
        own, c = self.selector, self.selector.chunk
        dtype = wide(q.dtype)
        near = slice(max(0, start - c), start + c)
        keys = k[:, :, near].to(dtype)
        if grid.real is not None:
            keys = torch.where(grid.real[:, None, near, None], keys, 0.0)
        keys = F.pad(keys, (0, 0, 2 * c - keys.shape[2], 0))
        logits = q.to(dtype).unflatten(1, (grid.kv_heads, -1)) @ keys.mT[:, :, None] * grid.scale
        logits = logits.flatten(1, 2).masked_fill(~seen, -torch.inf)
        map_ = logits.softmax(-1).nan_to_num(0.0).mean(1)  # (B, c, 2c)
        if self._last is not None:
            owner, votes = self._last
            votes = votes + map_[..., :c].sum(1) if own.votes else votes
            self._vectors(owner, votes, keys[:, :, :c], dtype)
        local = map_[..., c:]
        pairs = seen[..., c:].any(1).sum((1, 2)).clamp(min=1)
        theta = (
            local.sum((1, 2)) / pairs if own.threshold is None else local.new_full((len(q),), own.threshold)
        )
        spans = []
        for one, threshold in zip(local.cpu(), theta.tolist(), strict=True):
            best = detect_spans(one, threshold, longest=own.longest, overlap=own.overlap)
            spans.append(cover(best, c, own.longest))
        count = max(map(len, spans))
        table = torch.tensor([[s[:2] for s in row] + [(c, c)] * (count - len(row)) for row in spans])
        table = table.to(q.device)
        places = torch.arange(c, device=q.device)
        owner = ((places >= table[:, :, :1]) & (places < table[:, :, 1:])).to(dtype)  # (B, n, c)
        if own.votes:
            stop = (owner * table[:, :, 1:]).sum(1)
            votes = (local * (places[:, None] >= stop[:, None])).sum(1)
        else:  # one for each token that is not hidden
            votes = seen[:, :, :, c:].any(1).diagonal(dim1=1, dim2=2).to(dtype)
        self._last = owner, votes
        starts, stops = table.unbind(-1)
        if not self.starts.shape[1]:
            self.starts, self.stops = starts + start, stops + start
        else:
            self.starts = torch.cat([self.starts, starts + start], 1)
            self.stops = torch.cat([self.stops, stops + start], 1)

    def _vectors(self, owner: Tensor, votes: Tensor, keys: Tensor, dtype: torch.dtype) -> None:
        """The index vectors of the spans of a chunk, with all votes for its tokens."""
        weights = owner * votes[:, None]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        found = weights[:, None] @ keys
        self.vectors = found if not self.vectors.numel() else torch.cat([self.vectors, found], 2)

    def retrieve(self, queries: Tensor, before: Tensor, at: int, grid: Grid) -> Tensor:
        """The tokens of the spans that blocks of queries retrieve, -1 for none: `(B, m, budget)`.

        Args:
            queries: mean queries `(B, H, m, D)` of the blocks from `at` on.
            before: by block, the first token that is read anyway.
            at: number of the first of these blocks.
            grid: of the call.
        """
        own = self.selector
        batch, blocks = queries.shape[0], queries.shape[2]
        most = min(own.budget, grid.keys)
        known = self.vectors.shape[2] if self.vectors.numel() else 0
        if not known:
            return torch.full((batch, blocks, 0), -1, device=queries.device)
        end = before[at : at + blocks, None]
        starts = self.starts[:, None, :known].clamp(min=own.first).expand(-1, blocks, -1)
        lengths = (torch.minimum(self.stops[:, None, :known], end) - starts).clamp(min=0)
        scores = queries.to(self.vectors.dtype) @ grid.spread(self.vectors).mT * grid.scale
        scores = scores.masked_fill((lengths == 0)[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        if own.say is not None:
            scores = scores * own.say.to(scores)[:, None, None]
        votes = scores.sum(1).masked_fill(lengths == 0, -1.0)
        order = votes.sort(dim=-1, descending=True, stable=True).indices
        lengths, starts = lengths.gather(-1, order), starts.gather(-1, order)
        ends = lengths.cumsum(-1)
        slot = torch.arange(most, device=queries.device).expand(batch, blocks, -1).contiguous()
        span = torch.searchsorted(ends, slot, right=True)
        there = span < known
        span = span.clamp(max=known - 1)
        token = starts.gather(-1, span) + slot - (ends - lengths).gather(-1, span)
        return token.masked_fill(~there, -1)


def triangle_spans(
    budget: int,
    window: int = 1024,
    *,
    first: int = 4,
    chunk: int = 64,
    threshold: float | None = None,
    longest: int | None = None,
    overlap: float = 0.3,
    votes: bool = True,
    say: Tensor | None = None,
    rows: int = 64,
    every: int = 1,
) -> Selector:
    """Spans whose tokens look at each other, retrieved by the block of queries; the first and nearest tokens.

    Ltri-LLM (paper 082, arXiv 2412.04757); the module has the equations. It is for causal attention, and
    knows the past by its queries: in `ph.sparse` a text is followed from its start through prefill and
    decoding; elsewhere it takes a whole text in one call. A beam search that reorders its cache is not
    followed.

    With `rows=1` nothing that comes later has a part in what a token reads, and steps of decoding read what
    the whole call does. The cost is that of two chunks of keys for each query and of one vector a span; spans
    are sorted out on the CPU, chunk by chunk.

    Args:
        budget: tokens of spans that a block of queries reads, besides the others.
        window: tokens before a block of queries that it reads, at least two chunks.
        first: tokens at the start that are read.
        chunk: tokens in which spans are found.
        threshold: θ; None: the mean weight of the chunk's triangle.
        longest: tokens of a span; None: a chunk.
        overlap: see `detect_spans`.
        votes: whether the tokens that follow weigh the keys of a span, as in the paper; False: all alike, the
            mean key, which did better in SmolLM2 (docs/results/checks).
        say: `(H,)`, how much each head has to say, such as scores of retrieval heads; None: all alike.
        rows: queries that retrieve together.
        every: steps of decoding for which spans are kept, in `ph.sparse`.
    """
    return TriangleSpans(budget, window, first, chunk, threshold, longest, overlap, votes, say, rows, every)
