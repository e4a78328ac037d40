"""Blocks that are not read, stood for by their means."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.reference.registry import twin

__all__ = ["rectified"]


@twin("rectified")
def rectified(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    read: Tensor,
    *,
    rows: int,
    cols: int,
    apart: Tensor | None = None,
    real: Tensor | None = None,
    gated: bool = True,
) -> Tensor:
    """The output `(B, H, L, Dv)`.

    With means q̄_i, k̄_j, v̄_j of the blocks, and |x - x̄| in the mean δq_i, δk_j, block j has for block i

        mass  = n_j exp(q̄_i·k̄_j / √D)        if j is whole, and every query of block i sees its real keys
        mass  = Σ_k s_k exp(q̄_i·k / √D)       for others and those of `apart`; a share s_k of queries sees k
        P_ij  = mass_ij / Σ_j' mass_ij'
        E_i   = what is read, the others of the second line, and where |q̄_i·k̄_j| <= |δq_i·k̄_j| + |q̄_i·δk_j|
        out   = (Σ_E P_ij) · softmax over what is read + Σ_{j not in E} P_ij v̄_j

    Args:
        q, k, v: `(B, H, L, D)`, `(B, G, S, D)` and `(B, G, S, Dv)`.
        allowed: bool `(B, H, L, S)`, what the mask lets be seen.
        read: bool `(B, H, blocks of queries, blocks of keys)`.
        apart: bool, blocks of keys that are taken key by key.
        real: bool `(B, S)`, keys that are no padding.
        gated: False: E has no third part.
    """
    batch, heads, queries, width = q.shape
    keys, repeat = k.shape[2], heads // k.shape[1]
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        there = [True] * keys if real is None else real[b].tolist()
        for h in range(heads):
            x, y, z = q[b, h].double(), k[b, h // repeat].double(), v[b, h // repeat].double()
            for m in range(-(-queries // rows)):
                own = range(m * rows, min((m + 1) * rows, queries))
                mean = x[own].mean(0)
                away = (x[own] - mean).abs().mean(0)
                masses, means, stood = [], [], []
                for n in range(-(-keys // cols)):
                    block = [j for j in range(n * cols, min((n + 1) * cols, keys)) if there[j]]
                    seen = allowed[b, h][own][:, block].double()
                    if not seen.any():
                        masses.append(-math.inf)
                        means.append(torch.zeros_like(z[0]))
                        stood.append(False)
                        continue
                    centre = y[block].mean(0)
                    spread = (y[block] - centre).abs().mean(0)
                    short = (n + 1) * cols > keys
                    means.append(z[block].mean(0))
                    if short or not seen.all() or (apart is not None and bool(apart[n])):
                        logits = y[block] @ mean / math.sqrt(width)
                        masses.append(float((seen.mean(0) * logits.exp()).sum().log()))
                        stood.append(False)
                    else:
                        masses.append(float(mean @ centre) / math.sqrt(width) + math.log(len(block)))
                        error = abs(float(away @ centre)) + abs(float(mean @ spread))
                        sure = not gated or abs(float(mean @ centre)) > error
                        stood.append(sure and not bool(read[b, h, m, n]))
                weights = torch.tensor(masses, dtype=torch.float64).softmax(0).nan_to_num(0.0)
                rest = [n for n, one in enumerate(stood) if one]
                share = 1 - float(weights[rest].sum())
                other = sum((weights[n] * means[n] for n in rest), torch.zeros_like(z[0]))
                for r in own:
                    at = [
                        j
                        for j in range(keys)
                        if allowed[b, h, r, j] and read[b, h, m, j // cols] and there[j]
                    ]
                    if at:
                        weight = (y[at] @ x[r] / math.sqrt(width)).softmax(0)
                        out[b, h, r] = share * (weight @ z[at])
                    out[b, h, r] += other
    return out
