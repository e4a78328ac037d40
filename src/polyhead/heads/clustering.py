"""Heads with like maps: average linkage by cosine distance, k-means from it, and the bend of the error.

Agarwal et al., "CHAI: Clustered Head Attention for Efficient LLM Inference" (paper 066, arXiv 2403.08058).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["average_linkage", "cosine_distances", "error_of", "first_flat", "medoids"]


def cosine_distances(x: Tensor) -> Tensor:
    """1 - cosine of every pair of rows `(H, n)`: `(H, H)`. A row of zeros is at 1 from all others."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return (1 - unit @ unit.mT).clamp(min=0).fill_diagonal_(0.0)


def average_linkage(distances: Tensor, count: int) -> Tensor:
    """Labels `(H,)` of `count` clusters, numbered by their smallest member.

    The two clusters with the smallest mean distance between their members are joined until `count` are left;
    of equal ones, those with the smallest members.
    """
    heads = len(distances)
    labels = torch.arange(heads)
    between = distances.double().cpu().clone()
    size = torch.ones(heads, dtype=torch.float64)
    between.fill_diagonal_(torch.inf)
    for _ in range(heads - count):
        # clusters go by their smallest member, so that the first of equal ones is the one that is wanted
        a, b = divmod(int(between.argmin()), heads)
        a, b = min(a, b), max(a, b)
        joined = (size[a] * between[a] + size[b] * between[b]) / (size[a] + size[b])
        between[a], between[:, a] = joined, joined
        between[a, a] = torch.inf
        between[b], between[:, b] = torch.inf, torch.inf
        size[a] += size[b]
        labels[labels == b] = a
    return labels.unique(return_inverse=True)[1]


def medoids(distances: Tensor, labels: Tensor) -> Tensor:
    """Of every cluster the member nearest to the others in the mean, `(C,)`; of equal ones the first."""
    found = []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().view(-1)
        own = distances.cpu()[members][:, members].sum(1)
        found.append(int(members[int(own.argmin())]))
    return torch.tensor(found)


def error_of(x: Tensor, count: int, steps: int = 50) -> float:
    """The sum of squared distances to the centres of `count` clusters of rows `(H, n)`, by k-means.

    It starts from average linkage, so that nothing is drawn.
    """
    x = x.double()
    labels = average_linkage(cosine_distances(x), count)
    for _ in range(steps):
        one = torch.nn.functional.one_hot(labels, count).double()
        centres = one.mT @ x / one.sum(0).clamp(min=1)[:, None]
        away = torch.cdist(x, centres).masked_fill(one.sum(0) == 0, torch.inf)
        nearer = away.argmin(1)
        if torch.equal(nearer, labels):
            break
        labels = nearer
    return float((x - centres[labels]).square().sum())


def first_flat(errors: Tensor, drop: float) -> int:
    """The smallest number of clusters after which one more saves less than `drop` of the error of one.

    errors: `(H,)`, of 1..H clusters.
    """
    lowest = errors.double().cummin(0).values
    saved = (lowest[:-1] - lowest[1:]) / lowest[0].clamp(min=1e-300)
    flat = (saved < drop).nonzero().view(-1)
    return int(flat[0]) + 1 if len(flat) else len(errors)
