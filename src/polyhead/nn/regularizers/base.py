"""What a regularizer of attention may do, and where."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.checks import given, several
from polyhead.description import Part
from polyhead.errors import ConfigError

__all__ = ["Regularizer", "check_regularizers"]


class Regularizer(Part):
    """Something that acts on attention in training only; it has no parameters, and evaluation is as without.

    It acts at one or more of three places, and each defaults to doing nothing. What is drawn is drawn anew in
    every call of every module, from torch's random numbers of the device.

    Attributes:
        reads_weights: whether it has losses of the weights; all of them are then held, O(H·L·S) memory.
    """

    reads_weights: ClassVar[bool] = False

    def narrow(
        self,
        mask: Mask | None,
        *,
        batch: int,
        heads: int,
        length: int,
        padding: Tensor | None,
        device: torch.device,
    ) -> Mask | None:
        """The mask of a call of self-attention without a cache, made narrower.

        Args:
            mask: who may look at whom so far, padding not counted; None: all.
            batch, heads, length: B, H, L of the call.
            padding: bool `(B, L)`, True at real tokens; None when all are.
            device: of the call.
        """
        return mask

    def on_heads(self, heads: Float[Tensor, "B H L Dv"]) -> Float[Tensor, "B H L Dv"]:
        """The outputs of the heads, before they are projected back."""
        return heads

    def losses(
        self,
        weights: Float[Tensor, "B H L S"],
        *,
        queries: Bool[Tensor, "B L"] | None = None,
        keys: Bool[Tensor, "B S"] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of the weights before dropout, scalars by name, for `auxiliary_losses`.

        Args:
            weights: zero where the mask forbids a pair, and at keys that are padding.
            queries, keys: True at real tokens; None when all are, or when it is not known.
        """
        return {}


def check_regularizers(value: Any) -> tuple[Regularizer, ...]:
    """One regularizer or several as a tuple, or a `ConfigError`."""
    found = (value,) if isinstance(value, Regularizer) else value
    if not several(found) or not all(isinstance(one, Regularizer) for one in found):
        raise ConfigError(
            "regularizers must be parts such as drop_head(0.1) or token_masking(0.05), one or several; "
            f"got {given(value)}"
        )
    return tuple(found)
