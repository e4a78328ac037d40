"""What a query sees: how many keys, and the mean of their values, attention with uniform weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.attend.function import attend
from polyhead.attend.masks import Mask, Padding, is_causal, terms_of
from polyhead.attend.precision import exact, wide

__all__ = ["visible_count", "visible_mean"]


def visible_mean(
    v: Float[Tensor, "B G S Dv"], queries: int, mask: Mask | None, heads: int | None = None
) -> Float[Tensor, "B H L Dv"]:
    """mean over visible j of v_j for every query, zeros where it sees nothing.

    Without a mask, under a causal one, with padding or with both, these are sums and running sums, O(S·Dv);
    any other mask takes attention with equal logits.

    Args:
        v: values.
        queries: number of queries L; they are the last positions, as in `attend`.
        mask: who may look at whom.
        heads: query heads H; query head h reads h // (H / G). Default G.

    Returns:
        `(B, H, L, Dv)`, or with 1 instead of L where all queries see the same, and with G instead of H where
        heads that share values see the same.
    """
    batch, groups, keys, _ = v.shape
    terms = terms_of(mask)
    causal = any(is_causal(term) for term in terms)
    real = [term.mask for term in terms if isinstance(term, Padding)]
    if all(is_causal(term) or isinstance(term, Padding) for term in terms):
        with exact(v.device):
            return _sums(v, queries, causal, real).to(v.dtype)
    q = v.new_zeros(batch, groups if heads is None else heads, queries, 1)
    return attend(q, v.new_zeros(batch, groups, keys, 1), v, mask=mask)


def visible_count(like: Tensor, queries: int, keys: int, mask: Mask | None) -> Float[Tensor, "b h l 1"]:
    """The number of keys that every query sees, of the dtype that `like` is computed in.

    Costs as `visible_mean` does: counts and running counts, or under other masks attention one channel wide.

    Args:
        like: `(B, H, n, D)`, of the batch, the heads and the device of the call.
        queries: L; they are the last positions, as in `attend`.
        keys: S.
        mask: who may look at whom.

    Returns:
        `(B, H, L, 1)`, with 1 for a size in which the counts are all the same.
    """
    dtype = wide(like.dtype)
    terms = terms_of(mask)
    if not all(is_causal(term) or isinstance(term, Padding) for term in terms):
        q = like.new_zeros(*like.shape[:2], queries, 1, dtype=dtype)
        k = like.new_zeros(like.shape[0], 1, keys, 1, dtype=dtype)
        return attend(q, k, k, mask=mask, return_lse=True)[1].exp().round()[..., None]
    seen = torch.ones(1, keys, dtype=torch.bool, device=like.device)
    for term in terms:
        if isinstance(term, Padding):
            seen = seen & term.mask.to(like.device)
    counts = seen.to(dtype)[:, None, :, None]
    if not any(map(is_causal, terms)):
        return counts.sum(2, keepdim=True)
    counts = counts.cumsum(2)
    if queries <= keys:
        return counts[:, :, keys - queries :]
    return torch.nn.functional.pad(counts, (0, 0, queries - keys, 0))


def _sums(v: Tensor, queries: int, causal: bool, real: list[Tensor]) -> Tensor:
    keys = v.shape[2]
    seen = torch.ones(1, keys, dtype=torch.bool, device=v.device)
    for one in real:
        seen = seen & one.to(v.device)
    wanted = wide(v.dtype)
    v = v.to(wanted)
    if real:
        v = v * seen[:, None, :, None]
    counts = seen.to(wanted)[:, None, :, None]
    if not causal:
        return v.sum(2, keepdim=True) / counts.sum(2, keepdim=True).clamp(min=1)
    means = v.cumsum(2) / counts.cumsum(2).clamp(min=1)  # B G S Dv
    if queries <= keys:
        return means[:, :, keys - queries :]
    return torch.nn.functional.pad(means, (0, 0, queries - keys, 0))  # the first stand before all keys
