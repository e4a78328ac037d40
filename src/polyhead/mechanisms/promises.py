"""What a mechanism promises, where it is not what most promise: the conformance suite holds it to that."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Promises"]


@dataclass(frozen=True, kw_only=True)
class Promises:
    """How far the contract of mechanisms goes for one of them; by default all of it.

    Attributes:
        routed: whether the inputs decide how many rows each of its parts computes. `cost` then counts the
            rows that are chosen; parts that work together are padded to the one with the most.
        tokenwise: whether every output depends on its own token alone: a mask then changes nothing, there
            are no scores and values, and a cache keeps nothing.
        straight_through: whether it has steps, such as signs, whose gradient is by definition that of
            another function: its gradients are then those of its twin, not those of finite differences.
        piecewise_constant: whether its output moves in steps alone, as that of signs of everything does: a
            token moves it by some changes and not by others, and rounding inputs may move it by a step.
        least_heads: fewer heads are refused, because the idea has no meaning there.
        any_mask: whether it takes any mask; else `causal()` alone or none, because tokens share weights in
            groups that a mask would cut, and a cache that forgets tokens is refused.
        taught: beginnings of the names of parameters that no gradient of the output reaches, because they
            learn by the auxiliary losses alone.
    """

    routed: bool = False
    tokenwise: bool = False
    straight_through: bool = False
    piecewise_constant: bool = False
    least_heads: int = 1
    any_mask: bool = True
    taught: tuple[str, ...] = ()
