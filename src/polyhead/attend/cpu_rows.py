"""Softmax attention of groups of rows on a CPU, by products of whole rows, and its backward.

    s_i = log2(e) · scale · q_i Kᵀ + added_i,   p_ij = 2^(s_ij - l_i),   out_i = Σ_j p_ij v_j

with l_i the binary logarithm of Σ_j 2^s_ij. The same as torch's fused kernel, in less time where
processors are as `onednn_is_quicker` has them: powers of two are quicker than MKL's exponentials, many groups
in one call of MKL's keep all cores busy, and large products go to oneDNN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from polyhead.attend.cpu_products import onednn_is_quicker, product

__all__ = ["backward", "forward", "pays", "suits", "width"]

_LOG2E = math.log2(math.e)
_PAIRS = 1 << 13  # fewer pairs of a group are not worth the calls,
_ROWS, _KEYS = 48, 128  # nor are few or short rows
_LARGE = 1 << 18  # pairs of a group from which one product at a time keeps all cores busy
_PART = 256  # rows of such a product: scores of thousands of keys then stay in the caches of a processor
_SCORES = 1 << 20  # scores of many groups that are held at a time, for the same reason
# oneDNN makes a program for every shape, which takes a millisecond and half a megabyte. So shapes are few:
# rows are filled up to a multiple of 64, keys to one of an eighth of the power of two below.
_MULTIPLE, _EIGHTH = 64, 8


def suits(rows: int, dtype: torch.dtype) -> bool:
    """Whether it may be quicker than torch's fused kernel, if the rows are long."""
    return rows >= _ROWS and dtype == torch.float32 and onednn_is_quicker()


def pays(rows: int, keys: int, dtype: torch.dtype) -> bool:
    """Whether it is quicker than torch's fused kernel; if it is, then for more keys too."""
    return keys >= _KEYS and rows * keys >= _PAIRS and suits(rows, dtype)


def width(keys: int) -> int:
    """How many keys are best multiplied for so many: who gathers keys may fill them up at once.

    So that groups with about as many keys can go together, and large ones need not be filled up here.
    """
    step = max(_MULTIPLE, (1 << (keys.bit_length() - 1)) // _EIGHTH)
    return -(-keys // step) * step


def forward(
    q: Float[Tensor, "m h r d"],
    k: Float[Tensor, "m h c d"],
    v: Float[Tensor, "m h c d"],
    added: Float[Tensor, "n g r l"] | None,
    scale: float,
    skipped: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "m h r d"], Float[Tensor, "m h r"]]:
    """Output and log-sum-exp.

    `added`, finite, is for the last l keys, of every group or, with n = 1, of all, and of every head or, with
    g = 1, of all. Of each group the first `skipped` keys do not count; None: all do.
    """
    call = _Call(q, k, added, skipped)
    queries, keys, values = call.rows(q) * (scale * _LOG2E), call.cols(k), call.cols(v)
    out = torch.empty_like(queries)
    tops, totals = (q.new_empty(*queries.shape[:2], 1) for _ in range(2))
    for at in call.parts():
        scores = call.scores(queries[at], keys, *at)
        weights = scores.sub_(torch.amax(scores, -1, keepdim=True, out=tops[at])).exp2_()
        torch.sum(weights, -1, keepdim=True, out=totals[at])
        _products(weights, call.filled(values[at[0]]).mT, out[at])
        del scores, weights  # or the next ones come to lie elsewhere, out of the caches
    lse = totals.log2().add_(tops).div_(_LOG2E)
    return call.unfold(out.div_(totals)), call.unfold(lse)[..., 0]


def backward(
    grad: Float[Tensor, "m h r d"],
    q: Float[Tensor, "m h r d"],
    k: Float[Tensor, "m h c d"],
    v: Float[Tensor, "m h c d"],
    out: Float[Tensor, "m h r d"],
    lse: Float[Tensor, "m h r"],
    added: Float[Tensor, "n g r l"] | None,
    scale: float,
    skipped: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "m h r d"], Float[Tensor, "m e c d"], Float[Tensor, "m e c d"]]:
    """Gradients for q, k and v, with the output and the log-sum-exp of whole rows:

        dv = Pᵀ g,   ds = P ∘ (g Vᵀ - Σ g · out),   dq = scale · ds K,   dk = scale · dsᵀ q

    Of keys that all heads share, one tensor expanded, those are the sums over heads, e = 1; or else e = h.
    """
    call = _Call(q, k, added, skipped)
    queries, keys, values = call.rows(q) * (scale * _LOG2E), call.cols(k), call.cols(v)
    up, logs = call.rows(grad), call.rows(lse[..., None] * _LOG2E)
    past = call.rows((grad * out).sum(-1, keepdim=True))
    dq = torch.empty_like(queries)
    # transposed: the products then read the weights in the order of memory
    dk, dv = (x.new_zeros(x.shape[0], x.shape[2], call.keys) for x in (keys, values))
    for at in call.parts():
        groups = at[0]
        own, others = call.filled(keys[groups]), call.filled(values[groups])
        weights = call.scores(queries[at], keys, *at).sub_(logs[at]).exp2_()
        dv[groups] += _products(up[at].mT, weights.mT)[..., call.fill :]
        down = _products(up[at], others).sub_(past[at]).mul_(weights)
        dq[at] = _products(down, own.mT)
        dk[groups] += _products(queries[at].mT, down.mT)[..., call.fill :]
        del weights, down
    return call.unfold(dq).mul_(scale), call.unfold_keys(dk).div_(_LOG2E), call.unfold_keys(dv)


def _products(
    a: Float[Tensor, "g r k"], b: Float[Tensor, "g c k"], into: Tensor | None = None
) -> Float[Tensor, "g r c"]:
    """a bᵀ of every group; that of a single one by oneDNN."""
    if len(a) > 1:
        return torch.bmm(a, b.mT) if into is None else torch.bmm(a, b.mT, out=into)
    found = product(a[0].contiguous(), b[0])[None]
    return found if into is None else into.copy_(found)


@dataclass
class _Call:
    """A call as M groups `(M, R, d)` by `(M, c, d)`: heads that share their keys are rows, others groups."""

    q: Tensor
    k: Tensor
    added: Tensor | None
    skipped: Tensor | None

    def __post_init__(self) -> None:
        self.items, self.heads, self.count = self.q.shape[:3]
        self.keys = self.k.shape[2]
        self.shared = self.heads == 1 or self.k.stride(1) == 0
        self.groups = self.items if self.shared else self.items * self.heads
        length = self.count * self.heads if self.shared else self.count
        self.single = self.groups == 1 or length * self.keys >= _LARGE
        self.length = length
        self.filled_length = -(-length // _MULTIPLE) * _MULTIPLE if self.single else length
        self.fill = width(self.keys) - self.keys if self.single else 0
        self.table = None if self.added is None else self._table(self.added)
        if self.skipped is not None:
            self.skipped = self.skipped if self.shared else self.skipped.repeat_interleave(self.heads)

    def _table(self, added: Tensor) -> Tensor:
        """`(M or 1, R, l)`."""
        if self.shared:
            return added.expand(-1, self.heads, -1, -1).flatten(1, 2)
        if len(added) == added.shape[1] == 1:
            return added[0]
        return added.expand(self.items, self.heads, -1, -1).flatten(0, 1)

    def rows(self, x: Tensor) -> Tensor:
        """`(m, h, r, ·)` as `(M, R, ·)`, with zeros behind the rows where they are filled up."""
        x = x.reshape(self.groups, self.length, x.shape[-1])
        missing = self.filled_length - self.length
        return F.pad(x, (0, 0, 0, missing)) if missing else x

    def cols(self, x: Tensor) -> Tensor:
        """`(m, h, c, ·)` as `(M, c, ·)`."""
        return x[:, 0] if self.shared else x.flatten(0, 1)

    def filled(self, x: Tensor) -> Tensor:
        """`(g, c, ·)` with zeros before the keys."""
        return F.pad(x, (0, 0, self.fill, 0)) if self.fill else x

    def unfold(self, x: Tensor) -> Tensor:
        """What `rows` gave, as it was."""
        return x[:, : self.length].reshape(self.items, self.heads, self.count, x.shape[-1])

    def unfold_keys(self, x: Tensor) -> Tensor:
        """`(M, ·, c)` as `(m, h or 1, c, ·)`."""
        return x.mT.unflatten(0, (self.items, -1))

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Groups, and rows of them, that are taken together."""
        if self.single:
            for group in range(self.groups):
                for start in range(0, self.filled_length, _PART):
                    yield slice(group, group + 1), slice(start, start + _PART)
        else:
            each = max(
                2, _SCORES // (self.length * self.keys) // 2 * 2
            )  # even: a processor has pairs of cores
            for start in range(0, self.groups, each):
                yield slice(start, start + each), slice(None)

    def scores(self, rows: Tensor, keys: Tensor, groups: slice, part: slice) -> Float[Tensor, "g r c"]:
        """-inf at the places of no key."""
        scores = _products(rows, self.filled(keys[groups]))
        if self.skipped is None:
            scores[..., : self.fill] = -math.inf
        else:
            skipped = self.skipped[groups] + self.fill
            most = int(skipped.amax())
            nothing = torch.arange(most, device=skipped.device) < skipped[:, None, None]
            scores[..., :most].masked_fill_(nothing, -math.inf)
        if self.table is not None:
            table = self.table[groups if len(self.table) > 1 else slice(None), part]
            scores[:, : table.shape[1], scores.shape[2] - table.shape[2] :].add_(table, alpha=_LOG2E)
        return scores
