"""What a choice of keys leaves out: the mass that was not read, and how far the output may be off for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.attend.across_pairs import check_single_pairs
from polyhead.attend.choosing import resolved
from polyhead.attend.function import attend
from polyhead.attend.masks import Mask, Window, terms_of
from polyhead.attend.normalizers import softmax
from polyhead.attend.request import request_of
from polyhead.attend.scores import Score
from polyhead.attend.selectors import Selector
from polyhead.checks import given
from polyhead.errors import ConfigError

__all__ = ["Missed", "certified", "missed_mass"]

_SOFTMAX = softmax()


@dataclass(frozen=True)
class Missed:
    """What every query of every head did not read.

    Attributes:
        mass: `(B, H, L)`, the share of the softmax's mass on visible keys that were not read, 0 to 1.
        bound: `(B, H, L)`, the output of the query is at most so far (Euclidean norm) from that of all keys.
        output: `(B, H, L, Dv)`, from the keys that were read.
    """

    mass: Tensor
    bound: Tensor
    output: Tensor


@torch.no_grad()
def missed_mass(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    *,
    mask: Mask | None = None,
    read: Mask | None = None,
    select: Selector | None = None,
    score: Score | Sequence[Score] | None = None,
    scale: float | None = None,
) -> Missed:
    """The mass of attention that a choice of keys does not read, in O(L) memory and two passes.

    With m_i the share of row i's softmax over the keys that `mask` lets be seen which falls on keys that are
    not read, o_i the output over all of them and r_i that over the keys which are read,

        m_i = 1 - exp(l^read_i - l_i),   o_i - r_i = m_i (u_i - r_i)
        ‖o_i - r_i‖ ≤ m_i (‖r_i‖ + max_j ‖v_j‖)

    where l are log-sum-exps, u_i is the mean of the values that were missed, and j runs over the keys (under
    `causal()` over those up to i). The bound is at most 2 m_i max_j ‖v_j‖. It holds up to rounding.

    Args:
        q, k, v, mask, score, scale: as in `attend`.
        read: of the keys that `mask` lets be seen, those that are read, as a mask: what a cache has kept,
            such as `sink(4) | window(255)`, or a choice.
        select: or the selector that chooses them.

    Returns:
        Mass and bound in float32 or float64. A row that reads nothing of what it could see has mass 1; one
        that may see nothing has 0.

    Raises:
        ConfigError: neither or both of `read` and `select` are given, or score maps a pair by others, as
            `pair_convolution` does; or what `attend` raises.
    """
    if (read is None) == (select is None):
        raise ConfigError(
            "missed_mass: give read, a mask of the keys that are read, or select, a selector; one of them"
        )
    if read is not None and not isinstance(read, Mask):
        raise ConfigError(f"missed_mass: read must be a mask such as window(255); got {given(read)}")
    request = request_of(q, k, v, mask, None, score, _SOFTMAX, None, scale, 0.0, True)
    q, k, v, scale, score = request.q, request.k, request.v, request.problem.scale, request.problem.score
    check_single_pairs("missed_mass", score)
    if read is None:
        seen = resolved(q, k, mask, select, scale, score)
    else:
        seen = read if mask is None else mask & read
    part, own = attend(q, k, v, mask=seen, score=score, scale=scale, return_lse=True)
    _, whole = attend(q, k, v, mask=mask, score=score, scale=scale, return_lse=True)
    return certified(part, own, whole, v, mask)


def certified(part: Tensor, own: Tensor, whole: Tensor, v: Tensor, mask: Mask | None) -> Missed:
    """What was missed, from the output of what was read and the log-sum-exps of that and of all.

    Args:
        part, own: output `(B, H, L, Dv)` and log-sum-exps `(B, H, L)` of the keys that were read. Those of a
            softmax with a sink count it in: it is a key with value 0 that is always read.
        whole: log-sum-exps of all keys that `mask` lets be seen, `(B, H, L)`.
        v: `(B, G, S, Dv)`.
    """
    mass = -torch.expm1(own.clamp(max=whole) - whole)
    mass = torch.where(whole.isneginf(), 0.0, mass)
    sizes = v.to(own.dtype).norm(dim=-1)
    queries, keys = part.shape[2], v.shape[2]
    if _sees_none_later(mask) and keys >= queries:
        largest = sizes.cummax(-1).values[..., keys - queries :]
    else:
        largest = sizes.amax(-1, keepdim=True) if keys else sizes.new_zeros(*sizes.shape[:2], 1)
    largest = largest.repeat_interleave(part.shape[1] // v.shape[1], 1)
    return Missed(mass, mass * (part.to(own.dtype).norm(dim=-1) + largest), part)


def _sees_none_later(mask: Mask | None) -> bool:
    return any(type(term) is Window and term.right == 0 for term in terms_of(mask))
