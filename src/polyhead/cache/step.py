"""What one forward pass asks of a cache, read from the mask of its calls once for all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from polyhead.attend.masks import And, Mask, Padding, padding, span, terms_of
from polyhead.errors import ConfigError
from polyhead.hf.written import Allowed

__all__ = ["Step", "Steps"]


@dataclass(frozen=True, eq=False)
class Step:
    """L new tokens after S - L earlier ones, under one mask.

    Attributes:
        mask: who may look at whom, over all S tokens.
        keys, queries: S and L.
        plain: whether the mask is no more than causal, a window and the padding `real`.
        reach: tokens that the mask's own window lets a query see, itself included; None: all.
        real: which tokens of each batch item are real, `(B, S)`; None: all are.
    """

    mask: Mask | None
    keys: int
    queries: int
    plain: bool
    reach: int | None
    real: Tensor | None

    @cached_property
    def new(self) -> Tensor | None:
        """Which of the new tokens are real, `(B, L)`; None: all are."""
        if self.real is None:
            return None
        new = self.real[:, self.keys - self.queries :]
        return None if bool(new.all()) else new

    @cached_property
    def ranks(self) -> Tensor | None:
        """The place of every token among its batch item's real ones, `(B, S)`; None: its index."""
        return None if self.real is None else self.real.long().cumsum(1) - 1

    @cached_property
    def starts(self) -> Tensor | None:
        """The first real token of each batch item, `(B,)`, if all its padding is on the left."""
        if self.real is None:
            return None
        start = self.keys - self.real.sum(1)
        token = torch.arange(self.keys, device=self.real.device)
        return start if bool((self.real == (token >= start[:, None])).all()) else None

    @cached_property
    def padding(self) -> Mask | None:
        """The padding alone."""
        return None if self.real is None else padding(self.real)


class Steps:
    """The steps of a cache, and what is known of its tokens.

    Attributes:
        real: which of the tokens so far are real, `(B, S)`; None: all are.
        seen: S, of the last step.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self.real: Tensor | None = None
        self.seen = 0
        self._known: list[Step] = []

    def begin(self, tokens: int, real: Tensor | None) -> None:
        """Go on from tokens that were read elsewhere, of which the `real` ones, `(B, S)`, are no padding."""
        self.reset()
        self.real, self.seen = real, tokens

    def of(self, mask: Mask | None, batch: int, keys: int, queries: int) -> Step:
        """The step of a call; the layers of a forward pass, which share their mask, share it too."""
        for step in self._known:
            if step.mask is mask and step.keys == keys and step.queries == queries:
                return step
        if keys != self.seen or (self._known and self._known[0].queries != queries):
            self._known = []
        step = self._read(mask, batch, keys, queries)
        self._known.append(step)
        self.seen = keys
        return step

    def crop(self, length: int) -> None:
        """Go back to the first `length` tokens."""
        self.real = None if self.real is None or not length else self.real[:, :length]
        self.seen, self._known = length, []

    def change(self, select: Callable[[Tensor], Tensor]) -> None:
        """Put `select(tensor)` in the place of every tensor, all of which start with the batch."""
        self.real = None if self.real is None else select(self.real)
        self._known = []

    def padding(self, keys: int, queries: int) -> Tensor | None:
        """Which of the tokens S-L..S-1 are real, as far as is known."""
        if self.real is None or self.real.shape[1] < keys:
            return None
        return self.real[:, keys - queries : keys]

    def _read(self, mask: Mask | None, batch: int, keys: int, queries: int) -> Step:
        terms = terms_of(mask)
        shape = [term for term in terms if not isinstance(term, Padding)]
        paddings = [term.mask for term in terms if isinstance(term, Padding)]
        real = _joined(paddings)
        for term in shape:
            if real is None and isinstance(term, Allowed) and term.table.shape[3] == keys:
                # written out pair by pair: a new token that nobody sees, itself included, is padding
                new = term.table[..., keys - queries :].any(1).any(1)
                real = self._extended(new, keys, queries)
        real = self._settle(None if real is None else real.expand(batch, -1), keys, queries)
        found = span(And(tuple(shape))) if shape else (None, None)
        plain = found is not None and (found[1] == 0 or (found[1] is None and queries == 1))
        if plain and found is not None and found[0] is not None and found[0] < 0:
            plain = False
        if paddings and (real is None or not _same(paddings, real)):
            plain = False
        reach = found[0] + 1 if plain and found is not None and found[0] is not None else None
        return Step(mask, keys, queries, plain, reach, real)

    def _extended(self, new: Tensor, keys: int, queries: int) -> Tensor | None:
        if self.real is None:
            if bool(new.all()):
                return None
            before = new.new_ones(new.shape[0], keys - queries)
        else:
            before = self.real[:, : keys - queries]
        return torch.cat([before, new.to(before.device).expand(len(before), -1)], dim=1)

    def _settle(self, real: Tensor | None, keys: int, queries: int) -> Tensor | None:
        """What is real in this forward pass, after what was said before."""
        if self._known:  # another layer of the same forward pass has settled it
            return self.real
        earlier = keys - queries
        if earlier and self.real is not None:
            if real is None or not torch.equal(real[:, :earlier], self.real[:, :earlier]):
                raise ConfigError(
                    f"attention_mask no longer says which of the {earlier} tokens in the cache were padding "
                    "as it did when they came; pass the whole attention_mask, earlier tokens included, at "
                    "every forward pass"
                )
        elif earlier and real is not None and not bool(real[:, :earlier].all()):
            raise ConfigError(
                f"attention_mask hides some of the {earlier} tokens in the cache, which were real when they "
                "came; a cache whose heads forget cannot take that back: pass the same attention_mask from "
                "the start"
            )
        self.real = real
        return real


def _joined(paddings: list[Tensor]) -> Tensor | None:
    real = None
    for one in paddings:
        real = one if real is None else real & one
    return real


def _same(paddings: list[Tensor], real: Tensor) -> bool:
    return all(one is real or torch.equal(one.expand_as(real), real) for one in paddings)
