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

__all__ = ["PARTS", "Advance", "Choice", "Outcome", "Part", "Trial", "cache_bytes"]

Advance = Callable[[str], None]
Make = Callable[[], Any]
Prefill = Literal["dense", "masked"]
Part = Literal["curve", "fresh", "told"]

PARTS: tuple[Part, ...] = ("curve", "fresh", "told")
"""What draws the curve; what confirms a choice; what the recommendation is told by."""

_STEPS = 4  # steps of decoding that are timed in each round


@dataclass(frozen=True)
class Choice:
    """KV heads to keep in full, pairs (layer, head); None: transformers' own cache. `policy` chose them."""

    policy: str
    heads: tuple[tuple[int, int], ...] | None
    seed: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a choice, with the answer to each fact."""

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
        self._hidden: dict[Part, list[facts.Hidden]] = {}

    def report_to(self, advance: Advance) -> None:
        """Call `advance` with a word whenever a part of the work is done."""
        self._advance = advance

    # -- what is tried on --------------------------------------------------------------------------------

    @cached_property
    def _test_ids(self) -> list[int]:
        return encode(self.tokenizer, held_out_text()).tolist()

    def texts(self, part: Part) -> list[facts.Hidden]:
        """Texts with facts. Each part has facts of its own, in a third of the held-out text of its own.

        Where a third is too short to have its texts one after the other, the prose of neighbours overlaps.
        """
        if part in self._hidden:
            return self._hidden[part]
        e, source = self.effort, self._test_ids
        place = PARTS.index(part)
        count = e.texts if part == "curve" else e.confirm_texts
        third = max(0, len(source) - 2 * e.scored) // len(PARTS)
        step = max(0, min(e.length, (third - e.length) // max(1, count - 1)))
        found = []
        for k in range(count):
            at = place * third + k * step
            ids = [source[(at + i) % len(source)] for i in range(e.length)]
            seed = 1000 * e.seeds[0] + 100 * (place + 2) + k
            how = {"length": e.length, "count": e.facts, "unseen": e.window}
            found.append(facts.hide(self.tokenizer, ids, facts.STOCK, seed=seed, **how))
        self._hidden[part] = found
        return found

    def _prose(self, part: Part) -> torch.Tensor:
        """The text for perplexity, of the curve or of what the recommendation is told by."""
        e, second = self.effort, int(part != "curve")
        given = self._held_out
        if given is not None and len(given) >= (second + 1) * e.scored:
            return torch.tensor(given[second * e.scored : (second + 1) * e.scored])
        source = self._test_ids
        start = len(source) - (2 - second) * e.scored
        return torch.tensor([source[(start + i) % len(source)] for i in range(e.scored)])

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

        A text is read with whole attention, so that the keys and values that come of it are the same for
        every choice, which only decides which of them are kept. That holds where the whole cache keeps every
        row that it is given: not in layers with a sliding window or a state of another kind.
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

    def perplexity(self, make: Make, part: Part) -> float:
        """Perplexity of the held-out text."""
        with _used(make) as cache:
            found = perplexity(self.model, self.tokenizer, self._prose(part), chunk=512, cache=cache)
        self._advance("perplexity")
        return found.value

    def outcomes(self, choices: Sequence[Choice], part: Part = "curve") -> list[Outcome]:
        """Try choices of heads on a part of the facts. The first choice is the whole cache.

        Perplexity is not measured again on "fresh", nor for random choices beyond the curve.
        """
        answers = self.answers(self.texts(part), choices)
        return [
            Outcome(self._point(choice, given, answers[0], part), given)
            for choice, given in zip(choices, answers, strict=True)
        ]

    def _point(self, choice: Choice, answers: Sequence[bool], whole: Sequence[bool], part: Part) -> Point:
        total = len(self.all_heads)
        count = total if choice.heads is None else len(choice.heads)
        make = self._maker(choice.heads)
        scored = part == "curve" or (part == "told" and choice.policy != "random")
        return Point(
            policy=choice.policy,
            kv_fraction=count / total,
            heads_kept=count,
            seed=choice.seed,
            needle_accuracy=sum(answers) / len(answers),
            needles=len(answers),
            needles_whole=sum(whole[: len(answers)]),
            needles_kept=sum(w and a for w, a in zip(whole, answers, strict=False)),
            perplexity=self.perplexity(self._maker(choice.heads, "masked"), part) if scored else None,
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

    def speeds(self, choices: Sequence[Sequence[tuple[int, int]] | None]) -> list[float]:
        """Tokens decoded per second with each choice of heads, in rounds: disturbances hit all alike."""
        token = torch.tensor([[0]], device=self.model.device)
        seconds: list[list[float]] = [[] for _ in choices]

        with evaluating(self.model):
            for _ in range(self.effort.decode_rounds):
                for heads, into in zip(choices, seconds, strict=True):
                    with _used(self._maker(heads)) as cache:
                        self._fill(cache, self.effort.decode_length, self.model.device)
                        self._decode(cache, token)  # the first step makes room
                        for _ in range(_STEPS):
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
