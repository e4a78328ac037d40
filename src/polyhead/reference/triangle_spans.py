"""Spans found by triangles of the local map, and retrieved by one vector each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["detect_spans", "triangle_score", "triangle_spans"]


@twin("triangle_score")
def triangle_score(attention: Tensor, x: int, y: int, threshold: float = 0.0) -> float:
    """Σ_{i=x..y-1} Σ_{j=x..i} (A[i, j] - θ)."""
    return sum(float(attention[i, j]) - threshold for i in range(x, y) for j in range(x, i + 1))


@twin("detect_spans")
def detect_spans(
    attention: Tensor,
    threshold: float = 0.0,
    *,
    shortest: int = 2,
    longest: int | None = None,
    overlap: float = 0.3,
) -> list[tuple[int, int, float]]:
    """(start, stop, score) of the spans above 0, best first, none sharing too much with a better one."""
    n = len(attention)
    all_spans = [(x, y) for x in range(n) for y in range(x + shortest, min(n, x + (longest or n)) + 1)]
    scored = [(x, y, triangle_score(attention, x, y, threshold)) for x, y in all_spans]
    found: list[tuple[int, int, float]] = []
    for x, y, score in sorted(scored, key=lambda one: -round(one[2], 12)):
        if score <= 1e-15:
            continue
        ious = []
        for a, b, _ in found:
            shared = max(0, min(y, b) - max(x, a))
            ious.append(shared / (y - x + b - a - shared))
        if all(iou <= overlap for iou in ious):
            found.append((x, y, score))
    return found


def _cover(spans: list[tuple[int, int, float]], n: int, longest: int | None) -> list[tuple[int, int]]:
    owners = [next((s for s in spans if s[0] <= t < s[1]), None) for t in range(n)]  # best first
    found, start = [], 0
    for t in range(1, n + 1):
        full = owners[start] is None and longest is not None and t - start == longest
        if t == n or owners[t] is not owners[start] or full:
            found.append((start, t))
            start = t
    return found


@twin("triangle_spans")
def triangle_spans(
    q: Tensor,
    k: Tensor,
    *,
    budget: int,
    window: int,
    first: int = 4,
    chunk: int = 64,
    threshold: float | None = None,
    longest: int | None = None,
    overlap: float = 0.3,
    votes: bool = True,
    say: Tensor | None = None,
    rows: int = 64,
    real: Tensor | None = None,
) -> Tensor:
    """Which keys the tokens of whole texts read, for all heads: bool `(B, L, L)`. real: bool `(B, L)`."""
    (batch, heads, length, width), c = q.shape, chunk
    k = k.double().repeat_interleave(heads // k.shape[1], 1)
    q, scale = q.double(), 1 / math.sqrt(width)
    read = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        ok = torch.ones(length, dtype=torch.bool) if real is None else real[b]
        attention = torch.zeros(length, length, dtype=torch.float64)
        for i in range(length):
            seen = [j for j in range(max(0, (i // c - 1) * c), i + 1) if ok[j]]
            if seen:
                attention[i, seen] = ((q[b, :, i, None] * k[b][:, seen]).sum(-1) * scale).softmax(-1).mean(0)
        known: list[dict[str, Any]] = []
        for start in range(0, length - 2 * c + 1, c):
            own = attention[start : start + c, start : start + c]
            pairs = [(i, j) for i in range(c) for j in range(i + 1) if ok[start + j]]
            theta = threshold
            if theta is None:
                theta = sum(float(own[i, j]) for i, j in pairs) / max(1, len(pairs))
            found = detect_spans(own, theta, longest=longest, overlap=overlap)
            for x, y in _cover(found, c, longest):
                w = torch.zeros(y - x, dtype=torch.float64)
                for j in range(x, y):
                    later = range(start + y, start + 2 * c)
                    w[j - x] = (
                        sum(float(attention[i, start + j]) for i in later) if votes else float(ok[start + j])
                    )
                w = w / w.sum() if float(w.sum()) else w
                vector = (w[:, None] * torch.where(ok[:, None], k[b], 0)[:, start + x : start + y]).sum(1)
                known.append({"start": start + x, "stop": start + y, "vector": vector})
        for s in range(0, length, rows):
            last = min(s + rows, length)
            before = max(0, s - window)
            mean = q[b, :, s:last].mean(1)
            spans = []
            for one in known:
                tokens = range(max(first, one["start"]), min(before, one["stop"]))
                if len(tokens):
                    spans.append((tokens, (mean * one["vector"]).sum(-1) * scale))
            chosen: list[int] = []
            if spans:
                shares = torch.stack([score for _, score in spans], -1).softmax(-1)  # (H, n)
                vote = (shares if say is None else shares * say.double()[:, None]).sum(0)
                for n in sorted(range(len(spans)), key=lambda n: -float(vote[n])):
                    chosen += spans[n][0]
            for i in range(s, last):
                keys = {*range(min(first, before)), *chosen[:budget], *range(before, i + 1)}
                read[b, i, sorted(keys)] = True
        read[b] &= ok
    return read
