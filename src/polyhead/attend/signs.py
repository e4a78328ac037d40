"""Queries and keys of which only the signs differ: their products as integers.

With q_i = μ_i s_i and k_j = ν_j t_j, s and t of -1 and +1,

    q_i · k_j = μ_i ν_j (s_i · t_j),   s_i · t_j = D - 2 popcount(bits(s_i) xor bits(t_j))

s · t is multiplied as int8 with sums in int32, so that it is exact. On a CPU with int8 dot products that is
faster than popcounts over packed words, which plain torch can only do in several passes over memory
(`benchmarks/binary_scores.py` measures both).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from polyhead.attend.precision import wide
from polyhead.attend.refusals import inside_transform
from polyhead.attend.strip_work import Operands, StripWork, read
from polyhead.attend.strips import Frame, Strip
from polyhead.description import Part

__all__ = ["SignOperands", "integers_pay", "of_one_magnitude", "signs_of"]


def of_one_magnitude(x: Tensor) -> bool:
    """Whether the numbers of every row `(..., D)` differ in their signs alone."""
    size = x.abs()
    return bool((size == size[..., :1]).all())


def signs_of(x: Tensor) -> Tensor:
    """+1 where x ≥ 0 and -1 elsewhere, int8."""
    return (x >= 0).to(torch.int8).mul_(2).sub_(1)


@dataclass
class SignOperands(Operands):
    """q and k as int8 signs, and the magnitudes of their rows: (N, rep, L, 1) and (N, S, 1)."""

    query_size: Tensor
    key_size: Tensor
    scale: float = 1.0

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> SignOperands:
        dtype = wide(q.dtype)
        batch, heads, queries, width = q.shape
        kv_heads, keys = k.shape[1:3]
        n, repeat = batch * kv_heads, heads // kv_heads
        return cls(
            signs_of(q).reshape(n, repeat, queries, width),
            signs_of(k).reshape(n, keys, width),
            v.to(dtype).reshape(n, keys, v.shape[-1]),
            Frame(batch, heads, kv_heads, queries, keys, q.device),
            q[..., :1].abs().to(dtype).reshape(n, repeat, queries, 1),
            k[..., :1].abs().to(dtype).reshape(n, keys, 1),
        )

    def queries(self, strip: Strip, scale: float) -> Tensor:
        self.scale = scale  # goes into the magnitudes
        q = self.q[self.pairs(strip), :, strip.r0 : strip.r1]
        return q.reshape(q.shape[0], -1, q.shape[-1])

    def scores(self, part: StripWork) -> Tensor:
        strip, (n, rows, _), keys = part.strip, part.q.shape, part.k.shape[1]
        out = self.buffer("scores", part.shape)
        flat = out.view(n, rows, keys)
        # the int32 sums fit into a buffer of floats of the same size
        whole = self.buffer("integers", (rows, keys)).view(torch.int32)
        mu = self.query_size[part.pairs, :, strip.r0 : strip.r1].reshape(n, rows, 1) * self.scale
        nu = read(self.key_size, part.pairs, strip).transpose(1, 2)
        for one in range(n):
            torch._int_mm(part.q[one], part.k[one].T, out=whole)
            # copied first: a product of integers and floats would take fresh memory for that
            flat[one].copy_(whole).mul_(mu[one]).mul_(nu[one])
        return out


_ROWS = 64  # queries from which on packing strips of integers costs less than it saves


def integers_pay(q: Tensor, k: Tensor, v: Tensor, *parts: Part | None) -> bool:
    """Whether the backend `signs` is to be asked for rows of one magnitude: it can run, and is faster.

    Args:
        q, k, v: `(B, H, L, D)`, `(B, G, S, D)`, `(B, G, S, Dv)`.
        parts: what else holds tensors that may require a gradient.
    """
    tensors = (q, k, v, *(t for part in parts if part is not None for t in part.tensors()))
    return (
        not torch.compiler.is_compiling()
        and q.device.type == "cpu"
        and q.dtype != torch.float64
        and q.shape[2] >= _ROWS
        and k.shape[2] >= _ROWS
        and q.shape[3] >= 32
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not inside_transform()
        and _has_integer_products()
    )


@cache
def _has_integer_products() -> bool:
    """Whether this CPU multiplies int8 by instructions made for that."""
    able = getattr(torch.cpu, "_is_vnni_supported", None)
    return torch.backends.mkldnn.is_available() and able is not None and bool(able())
