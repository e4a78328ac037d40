"""DropHead: whole heads are dropped in training.

    ξ_h ~ Bernoulli(1 - p) for every head,   head_h ← γ ξ_h head_h,   γ = H / Σ_h ξ_h

The factor γ keeps the size of the sum of the heads' contributions as it is without dropping. The paper's
rate follows a schedule in the shape of a V: see `v_schedule`.

Paper: Scheduled DropHead, A Regularization Method for Transformer Models, arXiv 2004.13342. Ours: every item
of a batch draws for itself; where all heads of an item would be dropped, none is.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.checks import flag, number, whole
from polyhead.errors import ConfigError
from polyhead.nn.regularizers.base import Regularizer

__all__ = ["DropHead", "drop_head", "v_schedule"]


class DropHead(Regularizer):
    """Heads are set to zero in training: head_h ← γ ξ_h head_h, ξ_h ~ Bernoulli(1 - rate).

    Attributes:
        rate: probability with which a head is dropped, in [0, 1).
        rescale: whether γ is H / heads left, the default; else 1.
        whole_batch: whether one draw holds for all items of a batch. Default: every item has its own.

    Raises:
        ConfigError: a value is not allowed.
    """

    rate: float
    rescale: bool = True
    whole_batch: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", number("drop_head: rate", self.rate, least=0, below=1))
        flag("drop_head: rescale", self.rescale)
        flag("drop_head: whole_batch", self.whole_batch)

    def draw(self, batch: int, heads: int, device: torch.device | str | None = None) -> Float[Tensor, "B H"]:
        """The factor of every head, `(B, H)` in float32: zero or γ."""
        rows = 1 if self.whole_batch else batch
        kept = torch.rand(rows, heads, device=device) >= self.rate
        kept = kept | ~kept.any(1, keepdim=True)
        factors = kept.float()
        if self.rescale:
            factors = factors * (heads / factors.sum(1, keepdim=True))
        return factors.expand(batch, heads)

    def on_heads(self, heads: Float[Tensor, "B H L Dv"]) -> Float[Tensor, "B H L Dv"]:
        if not self.rate:
            return heads
        factors = self.draw(heads.shape[0], heads.shape[1], heads.device).to(heads.dtype)
        # not by multiplication alone: a dropped head is gone, be it infinite
        dropped = (factors == 0)[..., None, None]
        return (heads * factors[..., None, None]).masked_fill(dropped, 0.0)


def drop_head(rate: float, *, rescale: bool = True, whole_batch: bool = False) -> DropHead:
    """Drop whole heads in training.

    Args:
        rate: probability p with which a head is dropped, in [0, 1).
        rescale: multiply the heads that are left by H / heads left.
        whole_batch: draw once for all items of a batch.
    """
    return DropHead(rate, rescale, whole_batch)


def v_schedule(step: int, steps: int, rate: float, *, warmup: float = 0.3, end: float | None = None) -> float:
    """The rate of a step under the schedule of the paper: down to 0 in the warm-up, and up again.

    p(t) = rate · (1 - t / W) for t < W = warmup · steps, then end · (t - W) / (steps - W).

    Args:
        step: t, from 0; beyond the last step the rate stays.
        steps: of the whole training.
        rate: at the first step.
        warmup: share of the steps in which the rate falls, in [0, 1).
        end: rate at the last step. Default `rate`.
    """
    step, steps = min(whole("step", step, 0), steps), whole("steps", steps, 1)
    rate = number("rate", rate, least=0, below=1)
    end = rate if end is None else number("end", end, least=0, below=1)
    turn = number("warmup", warmup, least=0, below=1) * steps
    if turn >= steps:
        raise ConfigError(f"warmup must leave a step of {steps}; got {warmup}")
    return rate * (1 - step / turn) if step < turn else end * (step - turn) / (steps - turn)
