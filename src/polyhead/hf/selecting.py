"""`sparse`: a pretrained model whose attention reads what a selector chooses, in prefill and in decoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from polyhead.attend.selectors import Follow, Selector
from polyhead.checks import flag, given, several
from polyhead.errors import ConfigError, ShapeError
from polyhead.hf.attachment import Attachment, attach
from polyhead.hf.call import Call, Handler, LayerInfo
from polyhead.hf.choices import Choices
from polyhead.hf.kept_summaries import KeptSummaries

__all__ = ["LayerSelectors", "Selecting", "at_the_end", "by_layer", "densely", "sparse"]

LayerSelectors = Selector | Mapping[int, Selector | None] | Sequence[Selector | None]

_SUCH = "a selector such as select(mean_keys(), keep_share(0.1))"


class Selecting:
    """The handler of `sparse`: it adds a layer's choice of blocks to the mask, and corrects for the rest."""

    def __init__(self, selectors: Sequence[Selector | None], prefill: bool, decode: bool) -> None:
        self.choices = Choices(selectors)
        self.kept = KeptSummaries()
        self.prefill = prefill
        self.decode = decode

    def copy(self) -> Selecting:
        """The same in the middle of a text, which can go on in several ways."""
        other = Selecting(self.choices.selectors, self.prefill, self.decode)
        other.choices = self.choices.copy()
        return other

    def __call__(self, call: Call) -> Tensor:
        return self.chosen(call).proceed()

    def chosen(self, call: Call) -> Call:
        """The call, as its layer reads what is chosen."""
        call = densely(call)
        selector = self.choices.enter(call.layer)
        summaries = self.kept.of(call.layer.index, call.k)
        if selector is None:
            return call
        if not (self.decode if call.q.shape[2] == 1 else self.prefill):
            self.choices.see(call)
            return call
        return self.choices.applied(call, summaries)


def densely(call: Call) -> Call:
    """The call without what other `sparse` blocks would choose further down: the innermost one decides."""
    below = tuple(entry for entry in call.below if not isinstance(entry[0], Selecting))
    return call.replace(below=below)


def at_the_end(handler: Handler) -> Handler:
    """A handler that lets a call go on densely, and gives `handler` what reaches the end of all others."""

    def handle(call: Call) -> Tensor:
        call = densely(call)
        return call.replace(below=((handler, call.layer), *call.below)).proceed()

    return handle


def by_layer(selector: LayerSelectors, layers: Sequence[LayerInfo]) -> list[Selector | None]:
    """One selector, or None for a dense layer, for each attention layer of a model.

    Raises:
        ConfigError: something is no selector, or names a layer that is not there.
        ShapeError: a selector holds numbers for another number of heads than its layer has.
    """
    last = len(layers) - 1
    if isinstance(selector, Selector):
        found: list[Selector | None] = [selector] * len(layers)
    elif isinstance(selector, Mapping):
        found = [None] * len(layers)
        for key, value in selector.items():
            if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key <= last:
                raise ConfigError(f"selector: the model's attention layers are 0..{last}; got {given(key)}")
            found[key] = value
    elif several(selector):
        found = list(selector)
        if len(found) != len(layers):
            raise ConfigError(
                f"selector: the model has {len(layers)} attention layers, but {len(found)} are given; give "
                "one selector a layer (None: dense), or a mapping {layer: selector}"
            )
    else:
        raise ConfigError(
            f"selector must be {_SUCH}, or such by layer, a mapping or sequence; got {given(selector)}"
        )
    for layer, one in zip(layers, found, strict=True):
        if one is None:
            continue
        if not isinstance(one, Selector):
            raise ConfigError(f"selector of layer {layer.index} must be {_SUCH}, or None; got {given(one)}")
        if isinstance(one, Follow):
            _followable(layer.index, one.layer, found)
        try:
            one.check(layer.heads)
        except ShapeError as error:
            raise ShapeError(f"selector of layer {layer.index}, {layer.name!r}: {error}") from error
    return found


def _followable(layer: int, other: int, selectors: Sequence[Selector | None]) -> None:
    """Raise a `ConfigError` unless the other layer comes earlier and chooses for itself."""
    if other >= layer:
        raise ConfigError(f"selector of layer {layer}: follow({other}) must name an earlier layer")
    if selectors[other] is None or isinstance(selectors[other], Follow):
        does = "reads everything" if selectors[other] is None else "follows itself"
        raise ConfigError(
            f"selector of layer {layer}: follow({other}) must name a layer that chooses, but layer {other} "
            f"{does}; give it a selector, or lead(selector)"
        )


@contextmanager
def sparse(
    model: nn.Module, selector: LayerSelectors, *, prefill: bool = True, decode: bool = True
) -> Iterator[Attachment]:
    """Within the block, the model's attention reads only the blocks of keys that a selector chooses.

        own = ph.select(ph.key_bounds(), ph.keep_share(0.1), always=ph.sink(1) | ph.window(63))
        with ph.sparse(model, own):
            model.generate(**inputs)

    Every attention layer runs as `attend(q, k, v, select=selector, ...)` with the mask (sliding window,
    padding), score (soft cap, position bias), sinks and scale that it has anyway: of what its mask lets be
    seen, the chosen blocks are read. Queries and keys are ranked as the layer hands them over, rotary
    positions included, without its score. A call on no more keys than one block holds reads them all. Blocks
    are counted from the first key that is held.

    Positions are not changed. On contexts longer than the model was made for, it does what it does without
    selectors: rotary positions go on, a table of learned positions ends with an IndexError.

    Handlers (`attach`) that are put on top within the block come first, those below get the choice as a part
    of the mask; so `profile` within the block measures what the sparse model reads. Of several nested
    `sparse` the innermost one decides alone, for every layer, also where it says None.

    Args:
        model: any model that `attach` accepts. It is as it was after the block, also after an error.
        selector: for all attention layers, those of encoders and to encoders among them; or layer -> selector
            as a mapping, where layers that are left out are dense, or as a sequence with one entry a
            layer, None for dense ones. Layers are counted as in `attach(model).layers`. A layer may `follow`
            an earlier one: it reads what that one chose in the same forward pass.
        prefill: whether calls with more than one query choose; False: they are dense.
        decode: whether calls with a single query, the steps of decoding, choose too; False: they are dense.

    Yields:
        The `Attachment`.

    Raises:
        ConfigError: the selectors do not fit the model; or, in a forward pass, the keys are in a cache that
            holds no tensors, such as `ph.cache.per_head`, or a layer follows one that chose among other keys,
            or did not run before it.
        ShapeError: a budget holds numbers for another number of heads than a layer has.
        UnsupportedModel: the model's attention cannot be replaced.
        MissingExtra: transformers is not installed.
    """
    flag("prefill", prefill)
    flag("decode", decode)
    with attach(model) as attachment:
        choosing = Selecting(by_layer(selector, attachment.layers), prefill, decode)
        with attachment.handling(choosing), attachment.watching(choosing.kept.before):
            yield attachment
