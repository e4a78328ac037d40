"""Errors of a model's output against that of the dense model, and probes of their curvature.

At the dense output y an error e is 0 and smallest, so that its Hessian H decides: e(y + d) ≈ ½ dᵀHd. Random
vectors r with E[r rᵀ] = H give dᵀHd = E[(r·d)²], and r·d needs one derivative.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from polyhead.description import Part
from polyhead.errors import ConfigError

__all__ = ["HiddenDistance", "LogitDivergence", "OutputError", "hidden_distance", "logit_divergence"]


class OutputError(Part):
    """How far an output of a model is from that of the dense model.

    Attributes:
        name: a short name.
        unit: of the error.
    """

    name: ClassVar[str] = ""
    unit: ClassVar[str] = ""

    def seen(self, output: Any) -> Tensor:
        """What the error is about, `(B, L, n)`, of the model's output."""
        raise NotImplementedError

    def probe(self, y: Tensor, noise: Tensor, counts: Tensor) -> Tensor:
        """A vector r of the shape of y with E[r rᵀ] = the Hessian of the error at y, item by item.

        Args:
            y: what is seen of the dense model.
            noise: standard normal numbers of the same shape.
            counts: the weight of each token in the mean of its item, `(B, L, 1)`.
        """
        raise NotImplementedError

    def between(self, y: Tensor, dense: Tensor, counts: Tensor) -> Tensor:
        """The error of each item, `(B,)`, where y is seen in place of `dense`."""
        raise NotImplementedError


class LogitDivergence(OutputError):
    """KL(dense ‖ other) of the distributions that the logits give, mean over tokens.

    Its Hessian at the logits of a token is diag(p) - p pᵀ, that of r = √p ⊙ z - p (√p·z).
    """

    name: ClassVar[str] = "logit_divergence"
    unit: ClassVar[str] = "nats"

    def seen(self, output: Any) -> Tensor:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"logit_divergence needs logits, which {type(output).__name__} has not; give other errors, "
                "such as hidden_distance()"
            )
        logits = logits if logits.ndim == 3 else logits[:, None]  # a class for the whole item
        return logits if logits.dtype == torch.float64 else logits.float()

    def probe(self, y: Tensor, noise: Tensor, counts: Tensor) -> Tensor:
        p = y.softmax(-1)
        root = p.sqrt() * noise
        return (root - p * root.sum(-1, keepdim=True)) * counts.sqrt()

    def between(self, y: Tensor, dense: Tensor, counts: Tensor) -> Tensor:
        own, other = dense.log_softmax(-1), y.log_softmax(-1)
        return ((own.exp() * (own - other)).sum(-1, keepdim=True) * counts).sum((1, 2))


class HiddenDistance(OutputError):
    """The squared distance of the last hidden states, mean over tokens and features."""

    name: ClassVar[str] = "hidden_distance"

    def seen(self, output: Any) -> Tensor:
        for name in ("last_hidden_state", "hidden_states", "decoder_hidden_states"):
            found = getattr(output, name, None)
            if found is not None:
                last = found if isinstance(found, Tensor) else found[-1]
                return last if last.dtype == torch.float64 else last.float()
        raise ConfigError(
            f"hidden_distance needs hidden states, which {type(output).__name__} has not; give other errors, "
            "such as logit_divergence()"
        )

    def probe(self, y: Tensor, noise: Tensor, counts: Tensor) -> Tensor:
        return noise * (2 / y.shape[-1] * counts).sqrt()

    def between(self, y: Tensor, dense: Tensor, counts: Tensor) -> Tensor:
        return ((y - dense).square().mean(-1, keepdim=True) * counts).sum((1, 2))


def logit_divergence() -> OutputError:
    """KL divergence of the model's predictions from those of the dense model, in nats, mean over tokens."""
    return LogitDivergence()


def hidden_distance() -> OutputError:
    """Mean squared distance of the last hidden states from those of the dense model."""
    return HiddenDistance()
