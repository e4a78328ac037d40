"""Multi-window attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of, joined, real
from polyhead.reference.registry import twin

__all__ = ["multi_window_attention"]


@twin("multi_window_attention")
def multi_window_attention(
    x: Tensor,
    *,
    parameters: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    windows: tuple[int, ...],
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """head_i = attend(q_i, the keys of i's window of w_h tokens), with the bias r_h[j - i + w_h - 1].

    Args:
        x: `(B, L, d)`.
        parameters: the module's state; `score.tensor0` holds r_h head after head.
        heads, kv_heads: H and G, g = h // (H / G).
        windows: w_h; 0: everything, without a bias.
        mask, padding: bool; see `reference`.
    """
    source, length = real(x, padding), x.shape[1]
    q = heads_of(source, parameters, "query", heads)
    k = heads_of(source, parameters, "key", kv_heads)
    v = heads_of(source, parameters, "value", kv_heads)
    read = torch.zeros(heads, length, length, dtype=torch.bool)
    bias = torch.zeros(heads, length, length, dtype=torch.float64)
    first = 0
    for h, w in enumerate(windows):
        for i in range(length):
            for j in range(length):
                read[h, i, j] = w == 0 or i // w == j // w
                if w and read[h, i, j]:
                    bias[h, i, j] = parameters["score.tensor0"][first + j - i + w - 1]
        first += max(0, 2 * w - 1)
    if padding is not None:
        read = read & padding[:, None, None]
    return joined(attend(q, k, v, mask=read if mask is None else read & mask, bias=bias), parameters)
