"""Windows along the sequence: blocks of queries read only the band of keys around them.

All blocks have the same shape, so one batched product serves many of them, over overlapping views of the
keys that are never copied. Sinks, the first keys that every query may see besides its window, are a second,
narrow product. Forward and backward cost O(L · window).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.buffers import Buffers
from polyhead.attend.masks import Band, band
from polyhead.attend.normalizers import Normalizer
from polyhead.attend.plan import Request
from polyhead.attend.precision import wide
from polyhead.attend.problem import Problem
from polyhead.attend.refusals import ONE_STEP, beyond_softmax, inside_transform
from polyhead.attend.scores import Positional
from polyhead.attend.stream import OwnGradients, of_heads, stream, trainable
from polyhead.attend.tile import Tile

__all__ = ["Banded"]

_ROWS = 32  # queries of a block: few, since a block reads as many keys more than its window
_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}


class Banded:
    """A window around each query, with sinks, padding and documents."""

    name = "banded"
    dense = False
    opt_in = ""

    def refuse(self, request: Request) -> str:
        problem = request.problem
        if problem.mask is None:
            return "no mask limits the call to a band"
        found = band(problem.mask)
        if found is None:
            return f"{problem.mask} is not a window around each query"
        reason = beyond_softmax(request, score=True, normalizer=True)
        if reason:
            return reason
        if problem.score is not None and not isinstance(problem.score, Positional):
            return f"its blocks share one bias by distance; {problem.score} depends on more"
        if problem.score is not None and found.sinks:
            return "a bias by distance differs from block to block at the sinks"
        if 0 in (*request.q.shape, *request.k.shape):
            return "it does not define attention over nothing"
        if inside_transform():
            return ONE_STEP
        queries, keys = request.q.shape[2], request.k.shape[2]
        width = _ROWS + found.left + found.right + found.sinks
        if queries < 2 * _ROWS or 2 * width > keys:
            return f"a block would read {width} of {keys} keys for {queries} queries, which saves too little"
        return ""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        return stream(self, request.q, request.k, request.v, request.problem, seed=0, want_lse=False)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, seed: int, want_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        x = _Blocks.of(q, k, v, problem)
        base, sinks = x.base(x.bias()), x.sinks
        out = x.q.new_empty(*x.q.shape[:3], v.shape[-1])
        for n, t0, t1 in x.chunks():
            weights = x.weights(n, t0, t1, x.of_heads(base, n)).view(t1 - t0, x.q.shape[2], -1)
            torch.bmm(weights[..., sinks:], x.windows(x.v, n, t0, t1), out=out[n, t0:t1])
            if sinks:
                out[n, t0:t1] += weights[..., :sinks] @ x.v[n, :sinks]
        return x.unfold(out, q), None

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        problem: Problem,
        grad: Tensor,
        grad_lse: Tensor | None,
        *,
        seed: int,
    ) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
        x = _Blocks.of(q, k, v, problem, aligned=True)
        with torch.enable_grad():
            bias = x.bias()
        base, sinks, rows = x.base(bias), x.sinks, x.q.shape[2]
        up = x.fold(grad.to(x.q.dtype))
        dq = torch.empty_like(x.q)
        # room before the first key and behind the last band
        front = max(0, -x.start(0))
        room = front + max(x.start(x.q.shape[1] - 1) + x.span, x.keys)
        of_keys = _Turned(x)
        dk = x.k.new_zeros(x.k.shape[0], room, x.k.shape[2])
        dv = x.v.new_zeros(x.v.shape[0], room, x.v.shape[2])
        dbias = None if bias is None or not bias.requires_grad else torch.zeros_like(bias)
        own = OwnGradients(problem)
        for n, t0, t1 in x.chunks():
            weights = x.weights(n, t0, t1, x.of_heads(base, n))
            flat, g = weights.view(t1 - t0, rows, -1), up[n, t0:t1]
            gw = x.buffer("gradient", tuple(flat.shape))
            torch.bmm(g, x.windows(x.v, n, t0, t1).transpose(1, 2), out=gw[..., sinks:])
            if sinks:
                gw[..., :sinks] = g @ x.v[n, :sinks].T
            of_keys.add(dv[n, front + x.start(t0) :], weights[..., sinks:], up[n], t0)
            if sinks:
                dv[n, front : front + sinks] += _over_blocks(flat[..., :sinks], g)
            gs, gt = x.normalizer(n).vjp(weights, gw.view(weights.shape))
            for leaf, d in zip(problem.normalizer.tensors(), gt, strict=True):
                own.add(leaf, d, x.heads(n))
            if dbias is not None:
                part = gs[..., sinks:].sum(0)
                target = x.of_heads(dbias, n)
                target += part.sum_to_size(target.shape)
            gs = gs.view(t1 - t0, rows, -1)
            torch.bmm(gs[..., sinks:], x.windows(x.k, n, t0, t1), out=dq[n, t0:t1])
            of_keys.add(dk[n, front + x.start(t0) :], gs.view(weights.shape)[..., sinks:], x.q[n], t0)
            if sinks:
                dq[n, t0:t1] += gs[..., :sinks] @ x.k[n, :sinks]
                dk[n, front : front + sinks] += _over_blocks(gs[..., :sinks], x.q[n, t0:t1])
        if bias is not None and dbias is not None:
            trained = trainable(problem.score)
            for leaf, d in zip(trained, torch.autograd.grad(bias, trained, dbias), strict=True):
                own.add(leaf, d)
        real = slice(front, front + x.keys)
        return (
            x.unfold(dq.mul_(problem.scale), q),
            dk[:, real].mul(problem.scale).view(k.shape).to(k.dtype),
            dv[:, real].reshape(v.shape).to(v.dtype),
            own.done(),
        )


@dataclass
class _Blocks:
    """The operands cut into blocks: N = B·G pairs, T blocks of R queries, K keys in each band."""

    q: Tensor  # (N, T, rep·R, D)
    k: Tensor  # (N, S, D)
    v: Tensor  # (N, S, Dv)
    shape: Band
    problem: Problem
    kv_heads: int
    repeat: int
    queries: int
    rows: int
    left: int  # how far a band reaches before its first query, and behind its last
    right: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, aligned: bool = False) -> _Blocks:
        """`aligned`: bands reach to multiples of R."""
        assert problem.mask is not None
        shape = band(problem.mask)
        assert shape is not None
        dtype = wide(q.dtype)
        batch, heads, queries, _ = q.shape
        kv_heads, keys = k.shape[1], k.shape[2]
        step = _ROWS if aligned else 1
        left, right = (-(-reach // step) * step for reach in (shape.left, shape.right))
        x = cls(q, k, v, shape, problem, kv_heads, heads // kv_heads, queries, _ROWS, left, right)
        x.k, x.v = (t.to(dtype).reshape(batch * kv_heads, keys, -1) for t in (k, v))
        x.q = x.fold(q.to(dtype))
        return x

    @cached_property
    def buffer(self) -> Buffers:
        """Memory for some blocks, the same for all."""
        return Buffers(self.q)

    def fold(self, x: Tensor) -> Tensor:
        """(B, H, L, ·) as (N, T, rep·R, ·), the last block filled up with zeros."""
        count = -(-self.queries // self.rows)
        x = x.reshape(-1, self.repeat, self.queries, x.shape[-1])
        x = F.pad(x, (0, 0, 0, count * self.rows - self.queries)) if count * self.rows > self.queries else x
        x = x.view(x.shape[0], self.repeat, count, self.rows, -1).transpose(1, 2)
        return x.reshape(x.shape[0], count, self.repeat * self.rows, -1)

    def unfold(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `fold`, in the batch, heads and dtype of `like`."""
        n, count = x.shape[:2]
        x = x.view(n, count, self.repeat, self.rows, -1).transpose(1, 2)
        x = x.reshape(*like.shape[:2], count * self.rows, x.shape[-1])
        return x[:, :, : self.queries].to(like.dtype)

    @property
    def keys(self) -> int:
        """Number of keys, S."""
        return self.k.shape[1]

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.keys - self.queries

    @property
    def span(self) -> int:
        """Keys in a block's band, K."""
        return self.rows + self.left + self.right

    @property
    def sinks(self) -> int:
        """Keys in the product of the sinks."""
        return min(self.shape.sinks, self.keys)

    def start(self, t: int) -> int:
        """Position of the first key in block t's band; below 0 at the beginning of the sequence."""
        return self.offset + t * self.rows - self.left

    def windows(self, x: Tensor, n: int, t0: int, t1: int) -> Tensor:
        """The bands (t, K, ·) of blocks t0..t1-1 as an overlapping view; zeros beyond the ends."""
        first, last = self.start(t0), self.start(t1 - 1) + self.span
        part = x[n, max(first, 0) : max(last, 0)]
        if first < 0 or last > self.keys:
            before = min(max(0, -first), last - first)
            part = F.pad(part, (0, 0, before, last - first - before - part.shape[0]))
        step, width = part.stride(0), part.shape[-1]
        return part.as_strided((t1 - t0, self.span, width), (self.rows * step, step, part.stride(1)))

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Pairs (n, t0, t1): blocks whose scores together stay in the cache."""
        count = self.q.shape[1]
        budget = _ELEMENTS.get(self.q.device.type, 1 << 20)
        step = max(1, budget // (self.repeat * self.rows * (self.span + self.sinks)))
        for n in range(self.q.shape[0]):
            for t0 in range(0, count, step):
                yield n, t0, min(t0 + step, count)

    def heads(self, n: int) -> slice:
        """The query heads of pair n."""
        g = n % self.kv_heads
        return slice(g * self.repeat, (g + 1) * self.repeat)

    def normalizer(self, n: int) -> Normalizer:
        """The normaliser for the heads of pair n: its per-head tensors sliced."""
        return of_heads(self.problem.normalizer, self.heads(n), self.kv_heads * self.repeat)

    def bias(self) -> Tensor | None:
        """The score's bias (H, R, K) inside a band, the same for every block; with gradient."""
        if self.problem.score is None:
            return None
        device = self.q.device
        tile = Tile(
            batch=1,
            heads=self.kv_heads * self.repeat,
            rows=torch.arange(self.rows, device=device) + self.left,
            cols=torch.arange(self.span, device=device),
            consecutive=True,
        )
        return self.problem.score.bias(tile, self.q.dtype)

    def base(self, bias: Tensor | None) -> Tensor:
        """What is added to every block's scores: the bias, -inf outside the window; (H or 1, R, K)."""
        r = torch.arange(self.rows, device=self.q.device)[:, None]
        c = torch.arange(self.span, device=self.q.device) - self.left
        outside = (c < r - self.shape.left) | (c > r + self.shape.right)
        start = self.q.new_zeros(1, self.rows, self.span) if bias is None else bias.detach()
        return start.masked_fill(outside, float("-inf"))

    def of_heads(self, base: Tensor, n: int) -> Tensor:
        """The share of pair n in something (H or 1, R, K)."""
        return base if base.shape[0] == 1 else base[self.heads(n)]

    def edges(self, t0: int, t1: int) -> list[slice]:
        """Those of blocks t0..t1-1, counted from t0, whose band or rows reach beyond the ends."""
        count = t1 - t0
        low = min(count, max(0, -(self.start(t0) // self.rows)))
        past = self.start(t1 - 1) + self.span - self.keys
        high = min(count - low, max(0, -(-past // self.rows)))
        if high == 0 and low < count and t1 * self.rows > self.queries:
            high = 1
        return [part for part in (slice(0, low), slice(count - high, count)) if part.stop > part.start]

    def weights(self, n: int, t0: int, t1: int, base: Tensor) -> Tensor:
        """Weights (t, rep, R, sinks + K) of some blocks, zero in rows that may look at nothing.

        `base` is what is added to the scores of a band, for this pair's heads: (rep or 1, R, K).
        """
        count, device, minus = t1 - t0, self.q.device, float("-inf")
        q, shape = self.q[n, t0:t1], (count, self.repeat, self.rows)
        near = torch.baddbmm(
            base.expand(self.repeat, -1, -1).reshape(1, -1, self.span),
            q,
            self.windows(self.k, n, t0, t1).transpose(1, 2),
            alpha=self.problem.scale,
            out=self.buffer("scores", (count, self.repeat * self.rows, self.span)),
        ).view(*shape, self.span)
        i = (
            torch.arange(t0 * self.rows, t1 * self.rows, device=device).view(count, 1, self.rows, 1)
            + self.offset
        )
        j = i[:, :, :1] - self.left + torch.arange(self.span, device=device)
        edges = self.edges(t0, t1)
        for part in edges:
            near[part].masked_fill_((j[part] < 0) | (j[part] >= self.keys), minus)
        scores = near
        if self.sinks:
            at = torch.arange(self.sinks, device=device)
            far = (q.reshape(-1, q.shape[-1]) @ self.k[n, : self.sinks].T).mul_(self.problem.scale)
            far = far.view(*shape, self.sinks)
            if self.start(t0) < self.sinks:
                far.masked_fill_(at >= i - self.shape.left, minus)  # the band has these, or they lie ahead
            scores = torch.cat([far, near], dim=-1)
            j = torch.cat([at.expand(count, 1, 1, -1), j], dim=-1)
        dead: list[tuple[slice, Tensor]] = []
        if self.shape.rest is not None:
            b = torch.full((1, 1, 1, 1), n // self.kv_heads, device=device)
            h = torch.arange(self.heads(n).start, self.heads(n).stop, device=device).view(-1, 1, 1)
            i, j = i.clamp(max=self.keys - 1), j.clamp(0, self.keys - 1)
            scores.masked_fill_(~self.shape.rest.allowed(b, h, i, j), minus)
            edges = [slice(0, count)]
        for part in edges:
            dead.append((part, (scores[part] == minus).all(-1, keepdim=True)))
        weights = self.normalizer(n).weights(scores)
        for part, nothing in dead:
            weights[part].masked_fill_(nothing, 0.0)
        return weights


def _over_blocks(a: Tensor, b: Tensor) -> Tensor:
    """sum over blocks and rows of aᵀ b: (t, r, s), (t, r, d) -> (s, d)."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


class _Turned:
    """Weights seen from the keys: for each block of R keys, all the rows whose band holds it.

    Bands reach to multiples of R, so a block of keys lies, whole, in the bands of M = K / R blocks of
    queries. Blocks (R, K) are laid down R numbers apart: the weight of row i and key c then stands at K i + c
    in any block, and the K × R weights of a block of keys are a plain matrix, which overlaps its neighbours'.
    """

    def __init__(self, x: _Blocks) -> None:
        self.x, self.around = x, x.span // x.rows - 1  # blocks of zeros at either end
        self.stride = x.rows * (x.span + 1)
        self.held = x.q.new_zeros(0)

    def add(self, total: Tensor, weights: Tensor, rows: Tensor, t0: int) -> None:
        """total[c] += sum over heads and rows i of weights[i, c] rows[i].

        Args:
            total: (keys, D), from the first key of block t0's band on.
            weights: (t, rep, R, K), of blocks t0 and following.
            rows: (T, rep·R, D), of all blocks.
        """
        x, around, count = self.x, self.around, weights.shape[0]
        seen, width = count + around, rows.shape[-1]
        size = (count + 2 * around) * self.stride
        if self.held.numel() < size:
            self.held = x.q.new_zeros(size)
        self.held[(count + around) * self.stride : size] = 0
        into = self.held.as_strided((count, x.rows, x.span), (self.stride, x.span, 1), around * self.stride)
        matrices = self.held.as_strided((seen, x.rows, x.span), (self.stride, 1, x.span), around * x.rows)
        for head in range(x.repeat):
            into.copy_(weights[:, head])
            own = rows.view(rows.shape[0], x.repeat, x.rows, width)[t0 : t0 + count, head]
            near = F.pad(own.reshape(-1, width), (0, 0, around * x.rows, around * x.rows))
            bands = near.as_strided((seen, x.span, width), (x.rows * width, width, 1))
            total[: seen * x.rows] += torch.bmm(matrices, bands).view(-1, width)
