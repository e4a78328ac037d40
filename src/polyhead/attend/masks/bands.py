"""Recognising windows: masks that come down to a band around the diagonal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from polyhead.attend.masks.algebra import And, Mask, all_of, pieces, terms_of
from polyhead.attend.masks.intervals import FAR, Intervals
from polyhead.attend.masks.positional import Sink, Window
from polyhead.checks import given
from polyhead.errors import ConfigError

__all__ = ["Band", "band", "span"]


@dataclass(frozen=True)
class Band:
    """A window around each query, the first keys besides, and what else a pair must keep to.

    Query i sees key j if (i - left <= j <= i + right, or j < sinks and j <= i + right), and `rest` allows it.
    """

    left: int
    right: int
    sinks: int
    rest: Mask | None

    def mask(self) -> Mask:
        """The same as a mask."""
        band: Mask = Window(self.left, self.right)
        if self.sinks:
            band = Window(None, self.right) & (band | Sink(self.sinks))
        return band if self.rest is None else band & self.rest


def span(mask: Mask) -> tuple[int | None, int | None] | None:
    """`(left, right)` if the mask is exactly i - left <= j <= i + right, else None.

    None within the pair is an unbounded side: `causal()` gives `(None, 0)`. A side is negative where the
    query's own key lies outside: `~causal()` gives `(-1, None)`.
    """
    parts = pieces(_mask("span", mask))
    if parts is None or any(part.distances != parts[0].distances for part in parts):
        return None
    return _ends(parts[0].distances)


def band(mask: Mask) -> Band | None:
    """The mask as a window bounded on both sides with sinks, and the rest; None if it is no such thing.

    However it is spelled: `causal() & (window(255) | sink(4)) & padding(p)` and
    `(sink(4) & causal() | window(255)) & padding(p)` give the same band.
    """
    terms = terms_of(_mask("band", mask))
    shape = [term for term in terms if _is_shape(term)]
    others = [term for term in terms if not any(term is s for s in shape)]
    parts = pieces(And(tuple(shape))) if shape else None
    if parts is None or len(parts) > 2:
        return None
    left, right = _ends(parts[-1].distances) or (None, None)
    if left is None or right is None or left < 0 or right < 0:
        return None
    if len(parts) == 2 and parts[0].distances != Intervals.of(None, right):
        return None
    return Band(left, right, parts[0].high + 1 if len(parts) == 2 else 0, all_of(others))


def _mask(owner: str, mask: Mask) -> Mask:
    if not isinstance(mask, Mask):
        raise ConfigError(f"{owner}: mask must be a mask such as causal(); got {given(mask)}")
    return mask


def _is_shape(mask: Mask) -> bool:
    return not any(isinstance(n, Tensor) for n in mask.thresholds()) and pieces(mask) is not None


def _ends(distances: Intervals) -> tuple[int | None, int | None] | None:
    if len(distances.parts) != 1:
        return None
    ((low, high),) = distances.parts
    return (None if low <= -FAR else -low), (None if high >= FAR else high)
