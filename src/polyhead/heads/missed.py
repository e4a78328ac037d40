"""`missed_mass` of a pretrained model: how much of every head's attention a selector would not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyhead.attend import attend
from polyhead.attend.certificate import certified
from polyhead.attend.selectors import Selector
from polyhead.errors import ConfigError, ShapeError
from polyhead.head_scores import HeadScores
from polyhead.heads.inputs import Given, Reader, Source, Text
from polyhead.hf import Call, LayerInfo, attach
from polyhead.hf.choices import Choices
from polyhead.hf.handles import keys_of
from polyhead.hf.selecting import LayerSelectors, at_the_end, by_layer
from polyhead.tasks.reading import evaluating, texts

__all__ = ["HeadsMissed", "missed_mass"]


@dataclass(frozen=True, eq=False)
class HeadsMissed:
    """What a selector would miss of every head of a model.

    Attributes:
        mass: the share of the attention on visible keys that are not read, mean over the queries, 0 to 1.
        bound: the output of a head is at most so far (Euclidean norm) from that of all keys; mean over the
            queries, for each of which it holds.
    """

    mass: HeadScores
    bound: HeadScores


def missed_mass(
    model: nn.Module,
    tokenizer: Any = None,
    text: str | Sequence[str] | Tensor | Mapping[str, Any] | None = None,
    *,
    select: LayerSelectors,
    length: int | None = None,
) -> HeadsMissed:
    """What a selector would miss of every head, measured while the dense model reads a text once.

    In every layer the selector chooses from the dense model's own queries and keys, it is measured for every
    query what the choice leaves out (as by `polyhead.missed_mass`), and the model goes on with the dense
    output. So a number is about its layer alone: layers above do not see the errors of those below. Each
    layer attends twice, densely and to what is chosen. Nothing of size L × S is held, nor anything for each
    token beyond the layer at hand.

    Args:
        model: any model that `polyhead.attach` accepts; it is given back as it was.
        tokenizer, text, length: what the model reads, as for `polyhead.profile`. Queries that the model's
            inputs mark as padding, or that may look at nothing, do not count.
        select: a selector, or selectors by layer, as for `polyhead.sparse`; dense layers miss nothing.

    Raises:
        ConfigError: the selectors do not fit the model, or the text is too short, or longer than the model
            can read (a mapping of inputs is read as it is).
        UnsupportedModel: the model's attention cannot be looked into.
    """
    if text is None:
        from polyhead.tasks import sample_text

        text = sample_text()
    source: Source
    if isinstance(text, Mapping):
        if length is not None:
            raise ConfigError("length cuts texts; a mapping of the model's inputs is read as it is")
        source = Given(tuple(text), tuple(text.values()))
    else:
        source = Text(texts(model, tokenizer, text, length))
    with evaluating(model), attach(model) as attachment:
        layers = attachment.layers
        measuring = _Measuring(by_layer(select, layers), layers)
        with attachment.handling(at_the_end(measuring.measure)):
            source.read(Reader(model, tokenizer, 0, measuring.watched))
    groups = tuple(layer.heads // layer.kv_heads for layer in layers)
    mass = HeadScores(
        measuring.means(measuring.mass),
        name="missed_mass",
        meaning="share of the attention on visible keys that the selector does not read, mean over queries",
        unit="share",
        direction="higher: more is missed",
        kv_groups=groups,
    )
    bound = HeadScores(
        measuring.means(measuring.bound),
        name="missed_bound",
        meaning="bound of how far what is missed moves the output of the head, mean over queries",
        direction="higher: more may be lost",
        kv_groups=groups,
    )
    return HeadsMissed(mass, bound)


class _Measuring:
    """Sums over queries, layer by layer."""

    def __init__(self, selectors: Sequence[Selector | None], layers: Sequence[LayerInfo]) -> None:
        self.choices = Choices(selectors)
        self.mass = [torch.zeros(layer.heads, dtype=torch.float64) for layer in layers]
        self.bound = [torch.zeros(layer.heads, dtype=torch.float64) for layer in layers]
        self.rows = [torch.zeros(layer.heads, dtype=torch.float64) for layer in layers]
        self._padding: dict[str, Tensor | None] = {}

    def means(self, sums: Sequence[Tensor]) -> tuple[Any, ...]:
        """Per layer the means `(H,)`; NaN for a layer that did not run, 0 for one that reads everything."""
        found = []
        for selector, total, rows in zip(self.choices.selectors, sums, self.rows, strict=True):
            found.append(np.zeros(len(rows)) if selector is None else (total / rows).numpy())
        return tuple(found)

    @contextmanager
    def watched(
        self, ids: Tensor | None = None, padding: Tensor | None = None, query_padding: Tensor | None = None
    ) -> Iterator[None]:
        """Within the block, queries at which the padding is 0 do not count."""
        self._padding = {"encoder": padding, "decoder": query_padding, "cross": query_padding}
        try:
            yield
        finally:
            self._padding = {}

    def measure(self, call: Call) -> Tensor:
        """The attention handler: the dense output, of which it is told what the choice leaves out."""
        if self.choices.enter(call.layer) is None:
            return call.proceed()
        k, v = keys_of(call), call.v
        assert isinstance(v, Tensor)
        how: dict[str, Any] = {"score": call.score, "normalizer": call.normalizer, "scale": call.scale}
        dense, whole = attend(call.q, k, v, mask=call.mask, return_lse=True, **how)
        read = self.choices.mask(call)
        part, own = attend(call.q, k, v, mask=read, return_lse=True, **how)
        missed = certified(part, own, whole, v, call.mask)
        counts = ~whole.isneginf() & self._real(call)
        index = call.layer.index
        for sums, values in ((self.mass, missed.mass), (self.bound, missed.bound)):
            sums[index] += torch.where(counts, values, 0.0).double().sum((0, 2)).cpu()
        self.rows[index] += counts.double().sum((0, 2)).cpu()
        return dense

    def _real(self, call: Call) -> Tensor:
        """Which queries are real tokens, bool `(B|1, 1, L|1)`."""
        padding = self._padding.get(call.layer.kind)
        queries = call.q.shape[2]
        if padding is None:
            return torch.ones(1, 1, 1, dtype=torch.bool, device=call.q.device)
        length = queries if call.layer.kind == "cross" else call.start + call.k.shape[2]
        if padding.shape != (call.q.shape[0], length):
            raise ShapeError(
                f"padding is {tuple(padding.shape)}, True at real tokens; this attention expects "
                f"({call.q.shape[0]}, {length})"
            )
        return padding[:, None, length - queries :].bool()
