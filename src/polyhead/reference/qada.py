"""Near keys only, or all of them: query by query."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["qada"]


@twin("qada")
def qada(
    q: Tensor,
    k: Tensor,
    *,
    tau: float,
    first: int,
    nearest: int,
    cols: int,
    mean: Tensor | None = None,
    covariance: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """The share of the mass taken to be near `(B, H, L)`, and which keys are read, bool `(B, H, L, S)`.

    Near are the keys j <= i in a block of `cols` that holds one of the first keys or one of the nearest to i.
    With s = q·k / √D, A = Σ_near exp(s_j), and n other keys of the past with

        Â = n exp(q·μ / √D + qᵀΣq / 2D)

    where μ and Σ are given (`mean` (G, D), `covariance` (G, D, D)), or those of the near keys, the query
    reads the near keys alone if A / (A + Â) >= tau, else all. `exact`: Â is the true sum.
    """
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    shares = torch.ones(batch, heads, queries, dtype=torch.float64)
    read = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            for row in range(queries):
                i = keys - queries + row
                x = q[b, h, row].double() / math.sqrt(width)
                near: list[int] = []
                far: list[int] = []
                for j in range(i + 1):
                    block = range(j // cols * cols, (j // cols + 1) * cols)
                    own = block[0] < first or any(i - nearest < m <= i for m in block)
                    (near if own else far).append(j)
                if far:
                    own_keys = k[b, g, near].double()
                    mass = (own_keys @ x).exp().sum()
                    if exact:
                        other = (k[b, g, far].double() @ x).exp().sum()
                    else:
                        if mean is None or covariance is None:
                            mu = own_keys.mean(0)
                            sigma = (own_keys - mu).T @ (own_keys - mu) / len(near)
                        else:
                            mu, sigma = mean[g].double(), covariance[g].double()
                        other = len(far) * (x @ mu + x @ sigma @ x / 2).exp()
                    shares[b, h, row] = mass / (mass + other)
                read[b, h, row, near] = True
                if shares[b, h, row] < tau:
                    read[b, h, row, far] = True
    return shares, read
