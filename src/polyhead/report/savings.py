"""What a smaller cache costs: KV heads kept in full from all of them down to none, and what comes of it.

Heads are chosen by how much they look facts up (`facts.looked_up`), on texts, kinds of facts, names and
numbers of their own. Every choice is tried on the same facts in other texts, and its perplexity on another
text. The smallest cache whose answers hold is tried once more, on facts and texts that nothing was decided
by, before it is recommended.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from polyhead.cache import per_head
from polyhead.errors import ConfigError
from polyhead.head_scores import Heads, HeadScores
from polyhead.report import facts
from polyhead.report.data import Point, Recommendation, Savings
from polyhead.report.summary import python_lines, reason
from polyhead.tasks import held_out_text, perplexity, sample_text
from polyhead.tasks.reading import context_length, encode, evaluating

__all__ = ["FRACTIONS", "Curve", "Effort", "Outcome", "Tester", "cache_bytes", "measure", "why_not"]

FRACTIONS = (0.5, 0.33, 0.25, 0.2, 0.15, 0.1, 0.05, 0.0)

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much is tried. The defaults take a model of 135 M parameters some minutes on two cores.

    Attributes:
        fractions: shares of KV heads that keep the whole context.
        random_fractions: those of them at which random choices are tried too, besides the recommended one.
        seeds: seeds of the random choices; the first one also draws facts.
        sink, window: what the other heads keep.
        length: tokens of a text with hidden facts.
        facts: facts in one text.
        texts: texts that the chosen heads are tried on; random choices are tried on the first `random_texts`.
        choosing: texts that heads are chosen by.
        scored: tokens of the text whose perplexity is measured.
        confirm_length, confirm_texts: of the texts that the recommendation is confirmed on.
        lengths: context lengths whose cache bytes are told.
        decode_length: context length at which decoding is timed.
        decode_rounds: how often each cache is timed, in turn.
        tolerance: by which share perplexity may rise.
        losses: share of facts that may be lost.
    """

    fractions: tuple[float, ...] = FRACTIONS
    random_fractions: tuple[float, ...] = (0.5, 0.1)
    seeds: tuple[int, ...] = (0, 1, 2)
    sink: int = 4
    window: int = 256
    length: int = 1024
    facts: int = 8
    texts: int = 3
    random_texts: int = 2
    choosing: int = 3
    scored: int = 1024
    confirm_length: int = 2048
    confirm_texts: int = 2
    lengths: tuple[int, ...] = (2048, 8192)
    decode_length: int = 8192
    decode_rounds: int = 3
    tolerance: float = 0.05
    losses: float = 0.05

    def __post_init__(self) -> None:
        for f in self.fractions:
            if not 0 <= f <= 1:
                raise ConfigError(f"fractions must lie in 0..1, got {f}")
        if not self.fractions or not self.seeds:
            raise ConfigError("fractions and seeds must hold at least one value each")
        if self.sink < 0 or self.window < 1:
            raise ConfigError(f"sink must be at least 0 and window at least 1, got {self.sink} and {self.window}")

    def fitting(self, context: int | None) -> Effort:
        """The same for a model that reads no more than `context` tokens."""
        if context is None:
            return self
        spare = 80  # for the question and the answer
        return replace(
            self,
            length=min(self.length, context - spare),
            confirm_length=min(self.confirm_length, context - spare),
            scored=min(self.scored, context),
            lengths=tuple(n for n in self.lengths if n <= context) or (context,),
            decode_length=min(self.decode_length, context - 16),
        )


QUICK = Effort(
    fractions=(0.5, 0.2, 0.0),
    random_fractions=(),
    seeds=(0,),
    texts=1,
    random_texts=1,
    choosing=1,
    facts=4,
    scored=384,
    confirm_texts=1,
    decode_rounds=1,
)
"""Enough to see that everything runs; too little to believe the numbers."""


@dataclass(frozen=True)
class Outcome:
    """A point of the curve, with the answer to each fact."""

    point: Point
    answers: tuple[bool, ...]


@dataclass(frozen=True)
class Curve:
    """The curve, by what its heads were chosen, and what is recommended (None: nothing, for `notes`)."""

    savings: Savings
    chosen_by: HeadScores
    recommendation: Recommendation | None
    notes: tuple[str, ...]


def why_not(model: Any, tokenizer: Any, effort: Effort) -> str:
    """Why no savings curve can be measured for this model; empty if it can."""
    if tokenizer is None:
        return "The model came without a tokenizer, so no facts could be hidden in a text."
    if not hasattr(model, "lm_head") and model.get_output_embeddings() is None:
        return "The model has no language-model head, so it cannot be asked for facts."
    context = context_length(model)
    if context is not None and effort.fitting(context).length < effort.window + 160:
        return (
            f"The model reads {context} tokens, too few to see what a window of {effort.window} leaves out; "
            "give a smaller --window."
        )
    try:
        cache = per_head(model, full="none", sink=effort.sink, window=effort.window)
    except (ConfigError, TypeError) as error:
        return f"The model cannot use a per-head cache: {error}."
    cache.detach()
    return ""


class Tester:
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

    def _texts(
        self, source: list[int], stock: facts.Stock, count: int, length: int, start: int, seed: int
    ) -> list[facts.Hidden]:
        """Texts with facts, from token `start` of the source on, one after the other."""
        e = self.effort
        found = []
        for k in range(count):
            at = start + k * length
            ids = [source[(at + i) % len(source)] for i in range(length)]
            found.append(
                facts.hide(
                    self.tokenizer,
                    ids,
                    stock,
                    length=length,
                    count=e.facts,
                    unseen=e.window,
                    seed=1000 * e.seeds[0] + seed + k,
                )
            )
        return found

    @cached_property
    def choosing(self) -> list[facts.Hidden]:
        """What heads are chosen by: the end of the sample text, of which a profile reads the beginning."""
        e = self.effort
        source = encode(self.tokenizer, sample_text()).tolist()
        start = max(0, len(source) - e.choosing * e.length)
        return self._texts(source, facts.FOR_CHOOSING, e.choosing, e.length, start, 100)

    @cached_property
    def trying(self) -> list[facts.Hidden]:
        """What every choice is tried on."""
        e = self.effort
        return self._texts(self._test_ids, facts.FOR_TRYING, e.texts, e.length, 0, 200)

    @cached_property
    def confirming(self) -> list[facts.Hidden]:
        """What nothing is decided by."""
        e = self.effort
        start = e.texts * e.length + 2 * e.scored
        return self._texts(self._test_ids, facts.FOR_TRYING, e.confirm_texts, e.confirm_length, start, 300)

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
        cache = per_head(self.model, full="none")
        cache.detach()
        from polyhead.hf import attach

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

    def small(self, heads: Sequence[tuple[int, int]]) -> Any:
        """A cache with these KV heads in full."""
        pairs = Heads(tuple(heads), level="kv")
        return per_head(self.model, full=pairs, sink=self.effort.sink, window=self.effort.window)

    # -- trying -----------------------------------------------------------------------------------------

    def choose(self) -> HeadScores:
        """The score that heads are chosen by, for each KV head the highest of its query heads."""
        with evaluating(self.model):
            scores = facts.looked_up(
                self.model, self.choosing, self.whole, lambda _: self._advance("choosing heads")
            )
        return scores

    def answers(self, texts: Sequence[facts.Hidden], make: Callable[[], Any], what: str) -> tuple[bool, ...]:
        """Which facts are found again."""
        found: list[bool] = []
        with evaluating(self.model):
            for hidden in texts:
                found += self._with(make, lambda cache, h=hidden: facts.answered(self.model, h, cache))
                self._advance(what)
        return tuple(found)

    def perplexity(self, make: Callable[[], Any], part: int, what: str) -> float:
        """Perplexity of the held-out text."""
        value = self._with(
            make,
            lambda cache: perplexity(self.model, self.tokenizer, self._prose(part), chunk=512, cache=cache).value,
        )
        self._advance(what)
        return value

    def _with(self, make: Callable[[], Any], use: Callable[[Any], Any]) -> Any:
        cache = make()
        try:
            return use(cache)
        finally:
            if hasattr(cache, "detach"):
                cache.detach()

    def outcome(
        self,
        policy: str,
        heads: Sequence[tuple[int, int]] | None,
        *,
        seed: int | None = None,
        fresh: bool = False,
    ) -> Outcome:
        """Try a choice of heads (None: transformers' own cache), on what it is tried on or what is kept fresh."""
        total = len(self.all_heads)
        count = total if heads is None else len(heads)
        make = self.whole if heads is None else lambda: self.small(heads)
        what = f"{policy}, {count} of {total} KV heads"
        texts = self.confirming if fresh else self.trying
        if policy == "random":
            texts = texts[: self.effort.random_texts]
        answers = self.answers(texts, make, what)
        point = Point(
            policy=policy,
            kv_fraction=count / total,
            heads_kept=count,
            seed=seed,
            needle_accuracy=sum(answers) / len(answers),
            needles=len(answers),
            perplexity=self.perplexity(make, int(fresh), what),
            cache_bytes=tuple((n, self.bytes(make, n)) for n in self.effort.lengths),
            heads=tuple(sorted(heads)) if heads is not None else (),
        )
        return Outcome(point, answers)

    # -- bytes and speed --------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> list[tuple[int, int, int, torch.dtype]]:
        """For each layer of the cache: KV heads, widths of keys and values, dtype; as the model fills it."""
        cache = self.whole()
        with evaluating(self.model):
            self.model(torch.tensor([[0, 0]], device=self.model.device), past_key_values=cache, use_cache=True)
        return [(x.keys.shape[1], x.keys.shape[3], x.values.shape[3], x.keys.dtype) for x in cache.layers]

    def _fill(self, cache: Any, tokens: int, device: Any) -> None:
        """Put `tokens` tokens into a cache without running the model."""
        made: dict[Any, torch.Tensor] = {}
        for layer, (heads, wide, value, dtype) in enumerate(self._rows):
            for width in {wide, value}:
                if (heads, width) not in made:
                    made[heads, width] = torch.randn(1, heads, tokens, width, dtype=dtype, device=device)
            cache.update(made[heads, wide], made[heads, value], layer)
        if hasattr(cache, "nbytes"):
            cache.crop(0)  # takes nothing back, but has the layers take in what has come

    def bytes(self, make: Callable[[], Any], tokens: int) -> int:
        """What a cache holds after so many tokens, by its own account; memory set aside included."""

        def count(cache: Any) -> int:
            self._fill(cache, tokens, "meta")
            return cache_bytes(cache)

        return self._with(make, count)

    def speeds(self, choices: Sequence[Sequence[tuple[int, int]] | None], steps: int = 4) -> list[float]:
        """Tokens decoded per second with each choice of heads, in rounds, so that disturbances hit all alike."""
        token = torch.tensor([[0]], device=self.model.device)
        seconds: list[list[float]] = [[] for _ in choices]

        def run(cache: Any, into: list[float]) -> None:
            self._fill(cache, self.effort.decode_length, self.model.device)
            for step in range(steps + 1):
                start = time.perf_counter()
                int(self.model(token, past_key_values=cache, use_cache=True).logits[0, -1].argmax())
                if step:  # the first one makes room
                    into.append(time.perf_counter() - start)

        with evaluating(self.model):
            for _ in range(self.effort.decode_rounds):
                for heads, into in zip(choices, seconds, strict=True):
                    make = self.whole if heads is None else lambda h=heads: self.small(h)
                    self._with(make, lambda cache, into=into: run(cache, into))
                    self._advance("timing decoding")
        return [1 / statistics.median(s) for s in seconds]


def cache_bytes(cache: Any) -> int:
    """Bytes that a transformers cache, or one of ours, holds."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    return sum(t.numel() * t.element_size() for x in cache.layers for t in (x.keys, x.values))


def sizes(effort: Effort, total: int) -> list[int]:
    """The numbers of KV heads that are tried, from many to none: no number twice, all of them not among them."""
    return sorted({round(f * total) for f in effort.fractions} - {total}, reverse=True)


def steps(effort: Effort, total: int) -> int:
    """How often `advance` is called at most, for a progress bar."""
    tried = len(sizes(effort, total))
    drawn = (len(effort.random_fractions) + 1) * len(effort.seeds)
    one, other = effort.texts + 1, effort.random_texts + 1
    confirm = 2 * (effort.confirm_texts + 1)
    return effort.choosing + (tried + 1) * one + drawn * other + confirm + (tried + 2) * effort.decode_rounds


def measure(tester: Tester, source: str) -> Curve:
    """The whole curve and the recommendation; `source` is how the user named the model."""
    e, total = tester.effort, len(tester.all_heads)
    scores = tester.choose()
    order = scores.by_kv_head("max").top(total).pairs
    order = tuple(pair for pair in order if pair in set(tester.all_heads))

    whole = tester.outcome("full", None)
    chosen = [tester.outcome("retrieval", order[:count]) for count in sizes(e, total)]
    capable = sum(whole.answers) >= len(whole.answers) / 2
    notes = [] if capable else [_incapable(whole)]

    confirmed = None
    if capable:
        confirmed = _confirm(tester, whole, [o for o in chosen if o.point.heads_kept])
    wanted = [round(f * total) for f in e.random_fractions]
    if confirmed is not None:
        wanted.append(confirmed[1].point.heads_kept)
    counts = sorted(({*wanted} & set(sizes(e, total))) - {0}, reverse=True)
    drawn = [
        tester.outcome("random", _drawn(tester.all_heads, count, seed), seed=seed)
        for count in counts
        for seed in e.seeds
    ]

    everything = tester.small(order)
    everything.detach()
    timed = tester.speeds([None, order, *(o.point.heads for o in chosen)])
    baseline = replace(whole.point, decode_tokens_per_second=timed[0])
    full = replace(
        whole.point,
        policy="retrieval",
        decode_tokens_per_second=timed[1],
        cache_bytes=tuple((n, tester.bytes(lambda: tester.small(order), n)) for n in e.lengths),
        heads=tuple(sorted(order)),
    )
    points = [full] + [
        replace(o.point, decode_tokens_per_second=speed) for o, speed in zip(chosen, timed[2:], strict=True)
    ]
    savings = Savings(baseline, (*points, *(o.point for o in drawn)), *_hows(tester))

    advice = None
    if confirmed is not None:
        before, after = confirmed
        speed = {p.heads_kept: p.decode_tokens_per_second for p in points}
        advice = Recommendation(
            before=replace(before.point, decode_tokens_per_second=timed[0]),
            after=replace(after.point, decode_tokens_per_second=speed[after.point.heads_kept]),
            why=reason(e, before.answers, after.answers, before.point, after.point),
            python=python_lines(source, after.point.heads, total, e.sink, e.window),
            how=_confirm_how(tester),
        )
    elif capable:
        notes.append("No smaller cache that was tried keeps its answers: keep the whole cache.")
    return Curve(savings, scores, advice, tuple(notes))


def holds(effort: Effort, before: Outcome, after: Outcome) -> bool:
    """Whether the answers hold: hardly a fact lost on balance, and perplexity within the tolerance."""
    lost = sum(before.answers) - sum(after.answers)
    allowed = max(1, int(effort.losses * len(before.answers)))
    old, new = before.point.perplexity, after.point.perplexity
    return lost <= allowed and old is not None and new is not None and new <= (1 + effort.tolerance) * old


def _confirm(tester: Tester, whole: Outcome, chosen: Sequence[Outcome]) -> tuple[Outcome, Outcome] | None:
    """The smallest cache that holds, as all larger ones do, on the curve and again on fresh texts.

    Returns the whole cache and the smaller one, both as found on the fresh texts.
    """
    candidates: list[Outcome] = []
    for one in chosen:  # from many heads to few
        if not holds(tester.effort, whole, one):
            break
        candidates.append(one)
    if not candidates:
        return None
    before = tester.outcome("full", None, fresh=True)
    for one in reversed(candidates):
        after = tester.outcome("retrieval", one.point.heads, fresh=True)
        if holds(tester.effort, before, after):
            return before, after
    return None


def _drawn(heads: Sequence[tuple[int, int]], count: int, seed: int) -> list[tuple[int, int]]:
    return random.Random(f"{seed} {count}").sample(list(heads), count)


def _incapable(whole: Outcome) -> str:
    found, asked = sum(whole.answers), len(whole.answers)
    return (
        f"With its whole cache the model finds {found} of {asked} hidden facts, too few to see what a smaller "
        "cache loses: no cache is recommended, and the curve of hidden facts says nothing."
    )


def _hows(tester: Tester) -> tuple[str, str, str]:
    e = tester.effort
    per_text = f"{e.facts} facts of different kinds in each of {e.texts} texts of {e.length:,} tokens"
    drawn = f" ({e.random_texts} for random choices)" if e.random_texts != e.texts else ""
    return (
        f"Hidden facts: {per_text}{drawn}, before the last {e.window} tokens; an answer counts when greedy "
        "decoding gives exactly the number. Heads are chosen by the attention that answers give to their "
        f"facts in {e.choosing} texts with other facts, kinds and names.",
        f"Perplexity: {e.scored:,} tokens of {tester.prose_name}, the first token on, each predicted from "
        "what its cache holds.",
        f"Decoding: median of single tokens at {e.decode_length:,} tokens of context, caches in turn for "
        f"{e.decode_rounds} rounds, filled with random numbers (their content does not change the time). The "
        "whole cache is transformers' DynamicCache with the model's own attention. Random choices were not timed.",
    )


def _confirm_how(tester: Tester) -> str:
    e = tester.effort
    return (
        f"Measured on {e.facts * e.confirm_texts} facts in texts of {e.confirm_length:,} tokens and on "
        f"{e.scored:,} tokens of prose that neither chose the heads nor the size."
    )
