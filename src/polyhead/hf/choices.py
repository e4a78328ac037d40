"""What the layers of a model choose in a forward pass, so that one may follow another."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from torch import Tensor

from polyhead.attend.choosing import check_correctable, choice
from polyhead.attend.masks import Chosen, Mask
from polyhead.attend.selectors import Correcting, Follow, Lead, Selector, Summaries
from polyhead.errors import ConfigError
from polyhead.hf.call import Call, LayerInfo
from polyhead.hf.handles import keys_of

__all__ = ["Choices"]


class Choices:
    """What the layers of a model chose in the forward pass at hand.

    A pass ends where a layer is called that does not stand behind the last one: what was chosen before is
    forgotten then, so that no layer follows a choice of another pass.
    """

    def __init__(self, selectors: Sequence[Selector | None]) -> None:
        self.selectors = tuple(selectors)
        self._followed = {one.layer for one in selectors if isinstance(one, Follow)}
        self._made: dict[int, tuple[tuple[int, ...], Chosen | None]] = {}
        self._last = -1
        self._reading: dict[int, Selector] = {}

    def enter(self, layer: LayerInfo) -> Selector | None:
        """The selector of a layer that is called; every call of every layer has to be told."""
        if layer.index <= self._last:
            self._made.clear()
        self._last = layer.index
        return self.selectors[layer.index]

    def copy(self) -> Choices:
        """The same in the middle of a text, which can go on in several ways."""
        other = Choices(self.selectors)
        other._reading = deepcopy(self._reading)
        return other

    def see(self, call: Call) -> None:
        """Take notice of a call that chooses nothing, where later ones have to know of it."""
        selector = self.selectors[call.layer.index]
        own = selector.selector if isinstance(selector, Lead) else selector
        if own is not None and own.remembers:
            keys = keys_of(call)
            self._own(call, own, keys).see(call.q, keys, call.mask, call.scale)

    def _own(self, call: Call, selector: Selector, keys: Tensor) -> Selector:
        """The selector, or what it has become since the text began."""
        if not selector.remembers:
            return selector
        if keys.shape[2] == call.q.shape[2] and not call.start:
            self._reading[call.layer.index] = selector.begin()
        return self._reading.get(call.layer.index, selector)

    def applied(self, call: Call, summaries: Summaries | None = None) -> Call:
        """A call of the layer that was entered, as it reads what its selector chooses.

        `summaries` are what is kept of its keys, if somebody keeps them.

        Raises:
            ConfigError: as `choice`; or the output would be corrected behind something else than softmax.
        """
        found = self.choice(call, summaries)
        if found is None:
            return call
        made = call.replace(mask=_both(call.mask, found))
        selector = self.selectors[call.layer.index]
        if not isinstance(selector, Correcting):
            return made
        try:
            check_correctable(selector, call.score, call.normalizer, None, call.dropout)
        except ConfigError as error:
            raise ConfigError(f"layer {call.layer.name!r}: {error}") from error
        k, v = keys_of(call), call.v
        assert isinstance(v, Tensor)  # as the keys are

        def corrected(lower: Call) -> Tensor:
            return selector.correct(lower.proceed(), call.q, k, v, call.mask, found, call.scale)

        return made.replace(below=(*made.below, (corrected, call.layer)))

    def mask(self, call: Call) -> Mask | None:
        """The mask of a call of the layer that was entered, with what its selector chooses.

        Raises:
            ConfigError: as `choice`.
        """
        return _both(call.mask, self.choice(call))

    def choice(self, call: Call, summaries: Summaries | None = None) -> Chosen | None:
        """What the selector of the layer that was entered chooses; None where it reads everything.

        Raises:
            ConfigError: it follows a layer that has chosen nothing in this pass, or among other keys.
        """
        index = call.layer.index
        selector, keys = self.selectors[index], keys_of(call)
        shape = (call.q.shape[0], call.q.shape[2], keys.shape[2], call.start)
        if isinstance(selector, Follow):
            made, found = self._made.get(selector.layer, (None, None))
            if made is None:
                raise ConfigError(
                    f"layer {index} follows layer {selector.layer}, which has chosen nothing in this forward "
                    "pass: layers must run in order, each pass from its start"
                )
            if made != shape:
                raise ConfigError(
                    f"layer {index} follows layer {selector.layer}, but its call is another (sequences, "
                    f"queries, keys, tokens dropped before): {shape}, not {made}; follow a layer with the "
                    "same keys"
                )
        else:
            own = selector.selector if isinstance(selector, Lead) else selector
            found = None
            # of one block the best one would be read
            if own is not None and (keys.shape[2] > own.cols or own.remembers):
                own = self._own(call, own, keys)
                found = choice(
                    call.q, keys, call.mask, own, call.scale, summaries, call.score, call.normalizer
                )
            if index in self._followed:
                self._made[index] = shape, found
            if isinstance(selector, Lead):
                return None
        return found


def _both(mask: Mask | None, found: Chosen | None) -> Mask | None:
    return found if mask is None else mask if found is None else mask & found
