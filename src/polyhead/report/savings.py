"""What a smaller cache costs: KV heads kept in full from all of them down to none, and what comes of it.

Heads are chosen by how much they look facts up (`facts.looked_up`), on texts, kinds of facts, names and
numbers of their own. Every choice is tried on the same facts in other texts, and its perplexity on another
text. The smallest cache whose answers hold is tried once more, on facts and texts that nothing was decided
by, before it is recommended.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from polyhead.cache import per_head
from polyhead.errors import ConfigError
from polyhead.head_scores import HeadScores
from polyhead.report.data import Recommendation, Savings
from polyhead.report.effort import Effort, sizes
from polyhead.report.summary import python_lines, reason
from polyhead.report.trying import Outcome, Tester
from polyhead.tasks.reading import context_length

__all__ = ["Curve", "holds", "measure", "why_not"]


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
        f"With its whole cache the model finds {found} of {asked} hidden facts, too few to see what a "
        "smaller cache loses: no cache is recommended, and the curve of hidden facts says nothing."
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
        f"{e.decode_rounds} rounds, filled with random numbers (their content does not change the time). "
        "The whole cache is transformers' DynamicCache with the model's own attention. Random choices "
        "were not timed.",
    )


def _confirm_how(tester: Tester) -> str:
    e = tester.effort
    return (
        f"Measured on {e.facts * e.confirm_texts} facts in texts of {e.confirm_length:,} tokens and on "
        f"{e.scored:,} tokens of prose that neither chose the heads nor the size."
    )
