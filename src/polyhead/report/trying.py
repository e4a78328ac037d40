"""Trying caches: which facts are found again, perplexity, bytes, decoding speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch

from polyhead.cache.per_head import per_head
from polyhead.head_scores import Heads
from polyhead.hf import attach
from polyhead.report import facts
from polyhead.report.data import Point
from polyhead.report.effort import Effort
from polyhead.tasks import held_out_text, perplexity
from polyhead.tasks.reading import context_length, encode, evaluating

__all__ = ["Advance", "Choice", "Outcome", "Trial", "cache_bytes"]

Advance = Callable[[str], None]
Make = Callable[[], Any]
Prefill = Literal["dense", "masked"]


@dataclass(frozen=True)
class Choice:
    """KV heads to keep in full, pairs (layer, head); None: transformers' own cache. `policy` chose them."""

    policy: str
    heads: tuple[tuple[int, int], ...] | None
    seed: int | None = None


@dataclass(frozen=True)
class Outcome:
    """A point of the curve, with the answer to each fact."""

    point: Point
    answers: tuple[bool, ...]


class Trial:
    """A model and what its caches are tried on.

    Args:
        model, tokenizer: a decoder.
        effort: how much is tried.
        held_out: token ids of a text for perplexity; default: the packaged held-out text.
        advance: called with a word whenever a part of the work is done.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        effort: Effort,
        held_out: Sequence[int] | None = None,
        advance: Advance | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.effort = effort.fitting(context_length(model))
        self._held_out = held_out
        self._advance: Advance = advance or (lambda _: None)

    def report_to(self, advance: Advance) -> None:
        """Call `advance` with a word whenever a part of the work is done."""
        self._advance = advance

    # -- what is tried on --------------------------------------------------------------------------------

    @cached_property
    def _test_ids(self) -> list[int]:
        return encode(self.tokenizer, held_out_text()).tolist()

    def _texts(self, count: int, length: int, start: int, seed: int) -> list[facts.Hidden]:
        """Texts with facts, from token `start` of the held-out text on, one after the other."""
        e, source = self.effort, self._test_ids
        found = []
        for k in range(count):
            at = start + k * length
            ids = [source[(at + i) % len(source)] for i in range(length)]
            found.append(
                facts.hide(
                    self.tokenizer,
                    ids,
                    facts.STOCK,
                    length=length,
                    count=e.facts,
                    unseen=e.window,
                    seed=1000 * e.seeds[0] + seed + k,
                )
            )
        return found

    @cached_property
    def trying(self) -> list[facts.Hidden]:
        """What every choice is tried on."""
        e = self.effort
        return self._texts(e.texts, e.length, 0, 200)

    @cached_property
    def confirming(self) -> list[facts.Hidden]:
        """What nothing is decided by."""
        e = self.effort
        start = e.texts * e.length + 2 * e.scored
        return self._texts(e.confirm_texts, e.confirm_length, start, 300)

    def _prose(self, part: int) -> torch.Tensor:
        """The text for perplexity: part 0 for the curve, part 1 for confirming it."""
        e = self.effort
        given = self._held_out
        if given is not None and len(given) >= (part + 1) * e.scored:
            ids = given[part * e.scored : (part + 1) * e.scored]
        else:
            start = e.texts * e.length + part * e.scored
            ids = [self._test_ids[(start + i) % len(self._test_ids)] for i in range(e.scored)]
        return torch.tensor(ids)

    @property
    def prose_name(self) -> str:
        """Where the text for perplexity comes from."""
        given = self._held_out is not None and len(self._held_out) >= self.effort.scored
        return "the rest of the text" if given else "a text of its own"

    # -- caches -----------------------------------------------------------------------------------------

    @cached_property
    def layers(self) -> list[tuple[int, int]]:
        """The layers with a cache and their KV heads: pairs (layer, heads)."""
        with attach(self.model) as attachment:
            infos = [i for i in attachment.layers if i.kind == "decoder" and i.cache_index is not None]
        return [(info.index, info.kv_heads) for info in infos]

    @property
    def all_heads(self) -> list[tuple[int, int]]:
        """Every KV head, (layer, head)."""
        return [(layer, head) for layer, count in self.layers for head in range(count)]

    def whole(self) -> Any:
        """transformers' own cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def small(self, heads: Sequence[tuple[int, int]], prefill: Prefill = "dense") -> Any:
        """A cache with these KV heads in full.

        By default a text is read with whole attention, layer by layer, before the other heads forget it. With
        "masked" every token sees only what the cache would hold if tokens came one by one.
        """
        pairs = Heads(tuple(heads), level="kv")
        e = self.effort
        return per_head(self.model, full=pairs, sink=e.sink, window=e.window, prefill=prefill)

    def _maker(self, heads: Sequence[tuple[int, int]] | None, prefill: Prefill = "dense") -> Make:
        return self.whole if heads is None else partial(self.small, heads, prefill)

    def _decode(self, cache: Any, token: torch.Tensor) -> int:
        """One step of greedy decoding: the id of the next token."""
        return int(self.model(token, past_key_values=cache, use_cache=True).logits[0, -1].argmax())

    # -- trying -----------------------------------------------------------------------------------------

    @cached_property
    def reads_once(self) -> bool:
        """Whether one reading of a text serves all choices of heads.

        A text is read with whole attention, so that the keys and values that come of it are the same for every
        choice; a choice only decides which of them are kept. That holds where all layers keep every row they
        are given: not for those with a sliding window or a state of another kind.
        """
        from transformers.cache_utils import DynamicLayer

        from polyhead.cache.layer import PerHeadLayer

        whole = getattr(self.whole(), "layers", [])
        with _used(self._maker(())) as cache:
            ours = getattr(cache, "layers", [])
            return (
                len(whole) == len(ours) > 0
                and all(type(layer) is DynamicLayer for layer in whole)
                and all(isinstance(layer, PerHeadLayer) and layer.info.window is None for layer in ours)
            )

    def answers(self, texts: Sequence[facts.Hidden], choices: Sequence[Choice]) -> list[tuple[bool, ...]]:
        """Which facts are found again with each choice; all choices at one text before the next is read."""
        found: list[list[bool]] = [[] for _ in choices]
        with evaluating(self.model):
            for number, hidden in enumerate(texts):
                rows = self._read(hidden) if self.reads_once else None
                for choice, into in zip(choices, found, strict=True):
                    if choice.policy == "random" and number >= self.effort.random_texts:
                        continue
                    with _used(self._maker(choice.heads)) as cache:
                        if rows is None:
                            facts.read(self.model, hidden, cache)
                        else:
                            _put(cache, rows)
                        into += facts.ask(self.model, hidden, cache)
                    self._advance("hidden facts")
        return [tuple(one) for one in found]

    def _read(self, hidden: facts.Hidden) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The keys and values of a text, for each layer."""
        cache = self.whole()
        facts.read(self.model, hidden, cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def perplexity(self, make: Make, part: int) -> float:
        """Perplexity of the held-out text."""
        with _used(make) as cache:
            found = perplexity(self.model, self.tokenizer, self._prose(part), chunk=512, cache=cache)
        self._advance("perplexity")
        return found.value

    def outcomes(self, choices: Sequence[Choice], *, fresh: bool = False) -> list[Outcome]:
        """Try choices of heads, each text with all of them; `fresh` on what is kept for confirming."""
        texts = self.confirming if fresh else self.trying
        return [
            Outcome(self._point(choice, answers, int(fresh)), answers)
            for choice, answers in zip(choices, self.answers(texts, choices), strict=True)
        ]

    def _point(self, choice: Choice, answers: Sequence[bool], part: int) -> Point:
        total = len(self.all_heads)
        count = total if choice.heads is None else len(choice.heads)
        make = self._maker(choice.heads)
        return Point(
            policy=choice.policy,
            kv_fraction=count / total,
            heads_kept=count,
            seed=choice.seed,
            needle_accuracy=sum(answers) / len(answers),
            needles=len(answers),
            perplexity=self.perplexity(self._maker(choice.heads, "masked"), part),
            cache_bytes=tuple((n, self.bytes(make, n)) for n in self.effort.lengths),
            heads=tuple(sorted(choice.heads)) if choice.heads is not None else (),
        )

    # -- bytes and speed --------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> list[tuple[int, int, int, torch.dtype]]:
        """For each layer of the cache: KV heads, widths of keys and values, dtype; as the model fills it."""
        cache = self.whole()
        with evaluating(self.model):
            self.model(
                torch.tensor([[0, 0]], device=self.model.device), past_key_values=cache, use_cache=True
            )
        return [(x.keys.shape[1], x.keys.shape[3], x.values.shape[3], x.keys.dtype) for x in cache.layers]

    def _fill(self, cache: Any, tokens: int, device: Any) -> None:
        """Put `tokens` tokens into a cache without running the model."""
        made: dict[Any, torch.Tensor] = {}
        rows = []
        for heads, wide, value, dtype in self._rows:
            for width in {wide, value}:
                if (heads, width) not in made:
                    made[heads, width] = torch.randn(1, heads, tokens, width, dtype=dtype, device=device)
            rows.append((made[heads, wide], made[heads, value]))
        _put(cache, rows)
        if hasattr(cache, "nbytes"):
            cache.crop(0)  # takes nothing back, but has the layers take in what has come

    def bytes(self, make: Make, tokens: int) -> int:
        """What a cache holds after so many tokens, by its own account; memory set aside included."""

        with _used(make) as cache:
            self._fill(cache, tokens, "meta")
            return cache_bytes(cache)

    def speeds(self, choices: Sequence[Sequence[tuple[int, int]] | None], steps: int = 4) -> list[float]:
        """Tokens decoded per second with each choice of heads, in rounds: disturbances hit all alike."""
        token = torch.tensor([[0]], device=self.model.device)
        seconds: list[list[float]] = [[] for _ in choices]

        with evaluating(self.model):
            for _ in range(self.effort.decode_rounds):
                for heads, into in zip(choices, seconds, strict=True):
                    with _used(self._maker(heads)) as cache:
                        self._fill(cache, self.effort.decode_length, self.model.device)
                        self._decode(cache, token)  # the first step makes room
                        for _ in range(steps):
                            start = time.perf_counter()
                            self._decode(cache, token)
                            into.append(time.perf_counter() - start)
                    self._advance("timing decoding")
        return [1 / statistics.median(s) for s in seconds]


@contextmanager
def _used(make: Make) -> Iterator[Any]:
    """A cache that lets the model go when it is done with."""
    cache = make()
    try:
        yield cache
    finally:
        if hasattr(cache, "detach"):
            cache.detach()


def _put(cache: Any, rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Have a cache take keys and values, layer by layer, as if the model had read their tokens."""
    for layer, (k, v) in enumerate(rows):
        cache.update(k, v, layer)


def cache_bytes(cache: Any) -> int:
    """Bytes that a transformers cache, or one of ours, holds."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    return sum(t.numel() * t.element_size() for x in cache.layers for t in (x.keys, x.values))
