"""Token-level masking: in training a few tokens are cut off, from their siblings or from themselves.

Every real token is selected with probability `rate`, for all heads of a call alike. With C the selected:

    siblings-masking, i in C:  i sees only i
    self-masking,     i in C:  i sees all but i
    not selected:              i sees all that are not in C (`hide`), or all

and in all of it only what the mask of the call lets it see. A row that would see nothing is left as the mask
of the call has it, such as the first row of a causal call when it is to look away from itself.

Drawing takes O(B·L²) operations on booleans to find such rows, in strips of rows; what is kept is O(B·L).
Cross-attention is left alone. The paper uses it in place of the dropout of weights.

Paper 099: TLM, Token-Level Masking for Transformers, arXiv 2310.18738. That selected tokens are hidden from
the others is what the published code does; the paper's text speaks of the selected tokens' own connections.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.masks import padding as real_keys
from polyhead.attend.masks.algebra import Bounds
from polyhead.checks import flag, number, whole
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.regularizers.base import Regularizer

__all__ = ["TokenMasking", "TokensCut", "token_masking"]

_MODES = ("both", "siblings", "self")
_FREE, _SIBLINGS, _SELF = 0, 1, 2
_STRIP = 128  # rows that are looked at together


class TokensCut(Mask):
    """What is left to see once tokens are cut off.

    Attributes:
        kinds: `(B, L)`, 0 for a token that is not selected, 1 cut off from its siblings, 2 from itself.
        hide: whether selected tokens are hidden from those that are not selected.
        left: bool `(B, H or 1, L)`, rows that see all; None for none.
    """

    kinds: Tensor
    hide: bool = True
    left: Tensor | None = None

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kinds = self.kinds.to(j.device)
        last = kinds.shape[1] - 1
        i, j = i.clamp(0, last), j.clamp(max=last)
        own = kinds[b, i]
        others = kinds[b, j] == _FREE if self.hide else torch.ones_like(j, dtype=torch.bool)
        seen = torch.where(own == _SIBLINGS, i == j, torch.where(own == _SELF, i != j, others))
        if self.left is None:
            return seen
        left = self.left.to(j.device)
        return seen | left[b, h if left.shape[1] > 1 else torch.zeros_like(h), i]

    def bounds(self, b: Tensor, h: Tensor, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Bounds:
        some = torch.ones((), dtype=torch.bool, device=j0.device)
        return some, ~some

    def check(self, *, batch: int, heads: int, queries: int, keys: int, offset: int) -> None:
        if self.kinds.shape != (batch, keys):
            raise ShapeError(
                f"tokens were drawn for {tuple(self.kinds.shape)}; "
                f"the call has {batch} items of {keys} tokens"
            )


class TokenMasking(Regularizer):
    """A few tokens are cut off in training, from their siblings or from themselves, for all heads alike.

    Paper 099, arXiv 2310.18738. A row that would see nothing is left as the mask of the call has it.

    Attributes:
        rate: probability with which a token is selected, 0 to 1. Default 0.05.
        mode: "siblings": a selected token sees only itself; "self": all but itself; "both", the default: a
            fair coin for each of them.
        hide: whether selected tokens are hidden from those that are not selected. Default True.

    Raises:
        ConfigError: a value is not allowed.
    """

    rate: float = 0.05
    mode: str = "both"
    hide: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", number("token_masking: rate", self.rate, least=0, most=1))
        if self.mode not in _MODES:
            raise ConfigError(f"token_masking: mode must be one of {', '.join(_MODES)}; got {self.mode!r}")
        flag("token_masking: hide", self.hide)

    def draw(
        self,
        batch: int,
        length: int,
        *,
        padding: Bool[Tensor, "B L"] | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> TokensCut:
        """Select tokens.

        Args:
            batch, length: B and L.
            padding: bool `(B, L)`, True at real tokens; others are never selected.
            device: of the numbers.
            generator: where they come from; default torch's own.
        """
        size = (whole("batch", batch, 0), whole("length", length, 0))
        chosen = torch.rand(size, device=device, generator=generator) < self.rate
        if padding is not None:
            chosen = chosen & padding
        coin = torch.rand(size, device=device, generator=generator) < 0.5
        siblings = {"both": coin, "siblings": torch.ones_like(coin), "self": torch.zeros_like(coin)}[
            self.mode
        ]
        kinds = torch.where(chosen, torch.where(siblings, _SIBLINGS, _SELF), _FREE)
        return TokensCut(kinds, self.hide)

    def narrow(self, mask: Mask | None, **call: Any) -> Mask | None:
        if not self.rate or not call["length"]:
            return mask
        padding = call["padding"]
        drawn = self.draw(call["batch"], call["length"], padding=padding, device=call["device"])
        before = mask
        if padding is not None:
            real = real_keys(padding)
            before = real if mask is None else mask & real
        left = _empty_rows(drawn, before, **call)
        drawn = TokensCut(drawn.kinds, self.hide, left)
        return drawn if mask is None else mask & drawn


def _empty_rows(
    drawn: TokensCut, mask: Mask | None, *, batch: int, heads: int, length: int, device: Any, padding: Any
) -> Tensor:
    """Rows `(B, H or 1, L)` that would see nothing of what the mask lets them see."""
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(heads, device=device)[:, None, None]
    j = torch.arange(length, device=device)
    found = []
    for first in range(0, length, _STRIP):
        i = torch.arange(first, min(first + _STRIP, length), device=device)[:, None]
        seen = drawn.allowed(b, h, i, j)
        if mask is not None:
            seen = seen & mask.allowed(b, h, i, j)
        found.append(~seen.any(-1).expand(batch, seen.shape[1] if seen.ndim > 3 else 1, len(i)))
    return torch.cat(found, dim=-1)


def token_masking(rate: float = 0.05, *, mode: str = "both", hide: bool = True) -> TokenMasking:
    """Cut tokens off in training.

    Args:
        rate: probability with which a token is selected.
        mode: "siblings", "self", or "both": a fair coin for each selected token.
        hide: whether selected tokens are hidden from those that are not selected.
    """
    return TokenMasking(rate, mode, hide)
