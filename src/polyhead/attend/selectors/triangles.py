"""Spans of a text whose tokens look at each other: bright triangles of a causal map of attention.

A span from x to y-1 scores by how much its tokens look at it, above a threshold θ,

    S[x, y] = Σ_{x <= i < y} Σ_{x <= j <= i} (A[i, j] - θ),

and by prefix sums of A - θ over the lower triangle, T[a, b] = Σ_{i < a, j < b}, it is T[y, y] - T[y, x].
Spans that score above 0 are taken best first, those left out that share too much with a better one. `cover`
makes them disjoint.

"Ltri-LLM: Streaming Long Context Inference for LLMs with Training-Free Dynamic Triangular Attention Pattern"
(paper 082, arXiv 2412.04757). `triangle_spans` retrieves such spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from polyhead.checks import number, whole
from polyhead.errors import ShapeError

__all__ = ["Span", "cover", "detect_spans", "triangle_scores"]


class Span(NamedTuple):
    """The tokens from `start` to `stop` - 1, and what they score."""

    start: int
    stop: int
    score: float


def triangle_scores(attention: Tensor, threshold: float | Tensor = 0.0) -> Tensor:
    """S[x, y] of all spans of causal maps `(..., n, n)`: `(..., n, n + 1)`, 0 for y <= x.

    What stands above the diagonal does not count, and θ is not taken off there.
    """
    if attention.ndim < 2 or attention.shape[-1] != attention.shape[-2]:
        raise ShapeError(f"triangle_scores takes maps (..., n, n); got {tuple(attention.shape)}")
    sums = F.pad((attention - threshold).tril().cumsum(-1).cumsum(-2), (1, 0, 1, 0))
    own = sums.diagonal(dim1=-2, dim2=-1)
    return (own[..., None, :] - sums.mT[..., :-1, :]).triu(1)


def detect_spans(
    attention: Tensor,
    threshold: float = 0.0,
    *,
    shortest: int = 2,
    longest: int | None = None,
    overlap: float = 0.3,
) -> list[Span]:
    """The spans of a causal map `(n, n)` that no better one overlaps too much, best first.

    Greedy suppression: the best span is taken, those whose intersection over union with it is above `overlap`
    are left out, and so on. Of equals the one that begins first is taken, then the shorter one.

    The lower θ is between the weights within spans and outside of them, the more neighbours merge: the sum of
    two spans beats either where θ times the pairs between them is less than the score of the lesser.

    Args:
        attention: weights, of which those above the diagonal do not count.
        threshold: θ.
        shortest, longest: tokens of a span; None: n.
        overlap: 0 to 1.
    """
    if attention.ndim != 2:
        raise ShapeError(f"detect_spans takes one map (n, n); got {tuple(attention.shape)}")
    n = attention.shape[0]
    whole("detect_spans: shortest", shortest, 1)
    longest = n if longest is None else whole("detect_spans: longest", longest, shortest)
    overlap = number("detect_spans: overlap", overlap, least=0, most=1)
    scores = triangle_scores(attention.detach().double().cpu(), threshold).numpy()
    start, stop = np.nonzero(scores > 0)
    length = stop - start
    kept = (length >= shortest) & (length <= longest)
    start, stop = start[kept], stop[kept]
    score = scores[start, stop]
    order = np.argsort(-score, kind="stable")
    start, stop, score = start[order], stop[order], score[order]
    found = []
    while len(start):
        found.append(Span(int(start[0]), int(stop[0]), float(score[0])))
        shared = np.maximum(np.minimum(stop, stop[0]) - np.maximum(start, start[0]), 0)
        union = (stop - start) + (stop[0] - start[0]) - shared
        left = shared / union <= overlap
        left[0] = False
        start, stop, score = start[left], stop[left], score[left]
    return found


def cover(spans: Sequence[Span], length: int, longest: int | None = None) -> list[Span]:
    """Disjoint spans, in order, that hold every token of `length`.

    A token belongs to the best span that holds it; what is left of a span on either side of a better one
    makes spans of its own, with its score. Tokens of no span make spans of score 0, of at most `longest`
    tokens.
    """
    owner = np.full(length, len(spans))
    for place in sorted(range(len(spans)), key=lambda n: spans[n].score):
        owner[spans[place].start : spans[place].stop] = place
    edges = [0, *(np.nonzero(np.diff(owner))[0] + 1).tolist(), length]
    found = []
    for start, stop in pairwise(edges):
        if start == stop:
            continue
        if owner[start] < len(spans):
            found.append(Span(start, stop, spans[owner[start]].score))
            continue
        step = longest or stop - start
        found += [Span(at, min(at + step, stop), 0.0) for at in range(start, stop, step)]
    return found
