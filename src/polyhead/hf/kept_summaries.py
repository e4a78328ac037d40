"""What selectors keep of the keys in transformers' caches, from one forward pass to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn

from polyhead.attend.selectors import Summaries, unchanged

__all__ = ["KeptSummaries"]


@dataclass
class _Known:
    """A layer of a cache: the keys that it held when it was last seen, and what was kept of them."""

    summaries: Summaries = field(default_factory=Summaries)
    keys: ReferenceType[Tensor] | None = None
    state: int | None = None

    def left(self, keys: Tensor) -> None:
        self.keys, self.state = ref(keys), unchanged(keys)

    def look(self, keys: Tensor | None) -> None:
        """Keep what still holds of `keys`, which the layer holds now."""
        before = None if self.keys is None else self.keys()
        if before is None or keys is None or self.state is None or unchanged(keys) != self.state:
            self.summaries.clear()
        elif keys is not before:
            # a crop leaves a view of the first keys; other changes leave tensors of their own
            batch, heads, _, width = before.shape
            same = keys._base is before and (keys.shape[:2], keys.shape[3]) == ((batch, heads), width)
            if same and keys.data_ptr() == before.data_ptr() and keys.stride() == before.stride():
                self.summaries.crop(keys.shape[2])
            else:
                self.summaries.clear()


class KeptSummaries:
    """The summaries of every layer of every cache that a model is called with.

    An attention function is handed keys, not the cache that they come from. So every attention module tells
    before it runs (`before`) with which cache it is called, and what `DynamicLayer` holds then is compared
    with what was left there: the same tensor not written to, or the first part of it. `update` then puts the
    new keys behind it, and if the tensor that comes to the attention function is the one that the cache holds
    (`of`), all but the new keys are known. Other kinds of layers, that write in place or forget, are not
    followed, nor are tensors of inference mode: there everything is worked out in every step.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
        self._entered: dict[int, ReferenceType[Any]] = {}

    def before(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attention layer `index` is called with these arguments."""
        self._entered.pop(index, None)
        held = _cache_layer(module, (*args, *kwargs.values()))
        if held is None:
            return
        known = self._known.get(held)
        if known is None:
            known = self._known[held] = _Known()
        known.look(held.keys)
        self._entered[index] = ref(held)

    def of(self, index: int, keys: Any) -> Summaries | None:
        """The summaries of the keys that attention layer `index` asks with; None: they are not known."""
        entered = self._entered.pop(index, None)
        held = None if entered is None else entered()
        if held is None or held.keys is not keys:
            return None
        known = self._known[held]
        known.left(keys)
        known.summaries.of(keys)
        return known.summaries


def _cache_layer(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """The `DynamicLayer` that a module is called with, if it is one and no more."""
    from transformers.cache_utils import Cache, DynamicLayer

    index = getattr(module, "layer_idx", None)
    caches = [one for one in arguments if isinstance(one, Cache)]
    if len(caches) != 1 or not isinstance(index, int):
        return None
    layers = getattr(caches[0], "layers", ())
    # a cache grows a layer at its first update
    found = layers[index] if index < len(layers) else None
    return found if type(found) is DynamicLayer else None
