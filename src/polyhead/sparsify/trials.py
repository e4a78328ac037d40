"""What a model still does when it reads less: facts that it finds again, perplexity, and what it misses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from polyhead.errors import MissingExtra
from polyhead.heads import missed_mass
from polyhead.report.facts import STOCK, Hidden, Stock, hide, read
from polyhead.sparsify.methods import Method
from polyhead.sparsify.reading import Case, Counting, Dense, Reader, reading
from polyhead.sparsify.settings import ROOM, UNSEEN, Settings
from polyhead.tasks import held_out_text, perplexity, sample_text
from polyhead.tasks.reading import encode, evaluating

__all__ = ["ALIKE", "Found", "Outcome", "Trial"]

_FEW = 32  # tokens, for a glance

ALIKE = Stock(STOCK.kinds[:1] * len(STOCK.kinds), STOCK.names)
"""Facts of one kind, about different names: to find one is to tell it from the others."""


@dataclass(frozen=True)
class Found:
    """One fact that was asked for.

    Attributes:
        alike: whether the text held others of its kind.
        length: tokens of the text.
        depth: where in it the fact stood, 0 to 1.
        right: whether the model gave it, the text read under the method, question and answer densely.
        throughout: whether it gave it with question and answer under the method too.
    """

    alike: bool
    length: int
    depth: float
    right: bool
    throughout: bool


@dataclass(frozen=True)
class Outcome:
    """What came out for one method at one share, or for the model as it is.

    Attributes:
        level: of the method; None for the model as it is.
        read: keys that all queries, heads and layers read of the texts with facts, by their length.
        found: every fact.
        nats: mean negative log-likelihood of a token of a text of the longest length.
        missed: share of the attention that is not read, mean over queries and heads; None for a method that
            reads at other positions, where the dense model's attention is no measure.
        missed_head: that of the head that misses most.
    """

    level: float | None
    read: dict[int, float]
    found: tuple[Found, ...]
    nats: float
    missed: float | None
    missed_head: float | None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """From what `to_json` gave."""
        read = {int(length): keys for length, keys in data["read"].items()}
        return cls(**data | {"read": read, "found": tuple(Found(**one) for one in data["found"])})


class Trial:
    """A model, and what selectors are tried on.

    Args:
        model, tokenizer: a decoder.
        settings: how much is tried.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._layers = Case.of(model, 1).layers
        self.source = encode(tokenizer, sample_text()).tolist()
        self.prose = encode(tokenizer, held_out_text())
        self._texts = {length: list(self._hide(length)) for length in settings.lengths}

    @property
    def steps(self) -> int:
        """Parts of the work of one trial, as `run` tells them."""
        s = self.settings
        return 2 * s.texts * len(s.lengths) + 2

    def text(self, length: int) -> torch.Tensor:
        """So many tokens of the text that facts are hidden in."""
        return torch.tensor([self.source[n % len(self.source)] for n in range(length)])

    def run(self, method: Method | None, level: float | None, told: Callable[[], None]) -> Outcome:
        """Try one method at one level; without, the model as it is."""
        s = self.settings
        found: list[Found] = []
        read = dict.fromkeys(s.lengths, 0.0)
        for length in s.lengths:
            for hidden, alike in self._texts[length]:
                reader = self.reader(method, level, len(hidden.text))
                cache, keys = self._filled(hidden, reader)
                read[length] += keys
                right = throughout = self._ask(hidden, cache, Dense())
                if method is not None:
                    throughout = self._ask(hidden, cache, reader)
                for one, *good in zip(hidden.asked, right, throughout, strict=True):
                    found.append(Found(alike, length, one.place[0] / len(hidden.text), *good))
                told()
        nats = self._nats(method, level)
        told()
        missed, worst = self._missed(method, level)
        told()
        return Outcome(level, read, tuple(found), nats, missed, worst)

    def _hide(self, length: int) -> Iterator[tuple[Hidden, bool]]:
        s = self.settings
        for n in range(s.texts):
            for alike, stock in ((False, STOCK), (True, ALIKE)):
                seed = 1000 * s.seed + 2 * n + alike
                start = (2 * n + alike) * length % len(self.source)
                source = [self.source[(start + i) % len(self.source)] for i in range(length)]
                size = {"length": length - ROOM, "count": s.facts, "unseen": UNSEEN}
                yield hide(self.tokenizer, source, stock, seed=seed, **size), alike

    def glance(self, method: Method) -> None:
        """Read a few tokens at half the level.

        Raises:
            PolyheadError: the method asks for what the model does not have.
        """
        text = self.text(_FEW)
        with evaluating(self.model), reading(self.model, self.reader(method, 0.5, _FEW)):
            self.model(text[None].to(self.model.device), use_cache=False)

    def reader(self, method: Method | None, level: float | None, tokens: int) -> Reader:
        """How the model reads a text of so many tokens under a method; without one, densely."""
        if method is None or level is None:
            return Dense()
        return method.reader(level, Case(self.model, self._layers, tokens))

    def _filled(self, hidden: Hidden, reader: Reader) -> tuple[Any, float]:
        """A cache with the text, and how many keys were read on the way there."""
        cache, counting = _cache(self.model), Counting(reader, len(self._layers))
        with evaluating(self.model), reading(self.model, counting):
            read(self.model, hidden, cache)
        return cache, float(counting.read.sum())

    def _ask(self, hidden: Hidden, cache: Any, reader: Reader) -> list[bool]:
        """Which facts are found, with a cache that holds the text, which the reader has read."""
        found = []
        with evaluating(self.model):
            for one in hidden.asked:
                with reading(self.model, reader.copy()):
                    found.append(self._said(one.tail, one.answer, cache))
        return found

    def _said(self, tail: Sequence[int], answer: int, cache: Any) -> bool:
        """Whether the model goes on with the answer, greedily and step by step."""
        own = copy.deepcopy(cache)
        fed, wanted = list(tail[:-answer]), list(tail[-answer:])
        for token in wanted:
            ids = torch.tensor([fed], device=self.model.device)
            logits = self.model(ids, past_key_values=own, use_cache=True).logits[0, -1]
            if int(logits.argmax()) != token:
                return False
            fed = [token]
        return True

    def _nats(self, method: Method | None, level: float | None) -> float:
        tokens = min(self.settings.longest, len(self.prose))
        with reading(self.model, self.reader(method, level, tokens)):
            return perplexity(self.model, self.tokenizer, self.prose, length=tokens, chunk=1024).nats

    def _missed(self, method: Method | None, level: float | None) -> tuple[float | None, float | None]:
        if method is None:
            return 0.0, 0.0
        tokens = min(self.settings.missed, self.settings.longest, len(self.prose))
        own = self.reader(method, level, tokens).selectors
        if own is None:
            return None, None
        found = missed_mass(self.model, self.tokenizer, self.prose, select=own, length=tokens).mass.flat
        return float(found.mean()), float(found.max())


def _cache(model: Any) -> Any:
    try:
        from transformers import DynamicCache
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "trying selectors on a pretrained model") from error
    return DynamicCache(config=model.config)
