"""What a smaller cache costs: KV heads kept in full from all of them down to none, and what comes of it.

Heads are chosen by a score, such as the profile's `retrieval`: attention to needles in the sample text. Every
choice is tried on the same facts, of other kinds, with other names, in other texts, and on the perplexity of
a text of its own. The smallest cache whose answers hold is tried once more, on facts and texts that nothing
was decided by, before it is recommended.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from polyhead.cache.per_head import per_head
from polyhead.errors import ConfigError
from polyhead.head_scores import HeadScores
from polyhead.report.data import Recommendation, Savings
from polyhead.report.effort import Effort, sizes
from polyhead.report.summary import python_lines, reason
from polyhead.report.trying import Choice, Outcome, Trial
from polyhead.report.words import plural
from polyhead.tasks.reading import context_length

__all__ = ["Curve", "holds", "measure", "why_not"]


@dataclass(frozen=True)
class Curve:
    """The curve, what is recommended (None: nothing), and what there is to say about them."""

    savings: Savings
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


def measure(trial: Trial, scores: HeadScores, source: str) -> Curve:
    """The whole curve and the recommendation.

    Args:
        trial: the model, and what its caches are tried on.
        scores: what heads are chosen by; a KV head counts as the highest of the query heads that read it.
        source: how the user named the model.
    """
    e, total = trial.effort, len(trial.all_heads)
    order = _order(scores, trial.all_heads)

    tried = [Choice("retrieval", order[:count]) for count in sizes(e, total)]
    whole, *chosen = trial.outcomes([Choice("full", None), *tried])
    capable = sum(whole.answers) >= len(whole.answers) / 2
    notes = [] if capable else [_incapable(whole)]

    confirmed = None
    if capable:
        confirmed = _confirm(trial, whole, [o for o in chosen if o.point.heads_kept])
    wanted = [round(f * total) for f in e.random_fractions]
    if confirmed is not None:
        wanted.append(confirmed[1].point.heads_kept)
    counts = sorted(({*wanted} & set(sizes(e, total))) - {0}, reverse=True)
    drawn = trial.outcomes(
        [Choice("random", _drawn(trial.all_heads, count, seed), seed) for count in counts for seed in e.seeds]
    )

    timed = trial.speeds([None, order, *(o.point.heads for o in chosen)])
    baseline = replace(whole.point, decode_tokens_per_second=timed[0])
    full = replace(
        whole.point,
        policy="retrieval",
        decode_tokens_per_second=timed[1],
        cache_bytes=tuple((n, trial.bytes(partial(trial.small, order), n)) for n in e.lengths),
        heads=tuple(sorted(order)),
    )
    points = [full] + [
        replace(o.point, decode_tokens_per_second=speed) for o, speed in zip(chosen, timed[2:], strict=True)
    ]
    savings = Savings(baseline, (*points, *(o.point for o in drawn)), *_hows(trial))

    advice = None
    if confirmed is not None:
        before, after, rejected = confirmed
        speed = {p.heads_kept: p.decode_tokens_per_second for p in points}
        advice = Recommendation(
            before=replace(before.point, decode_tokens_per_second=timed[0]),
            after=replace(after.point, decode_tokens_per_second=speed[after.point.heads_kept]),
            why=reason(e, before.answers, after.answers, before.point, after.point),
            python=python_lines(source, after.point.heads, total, e.sink, e.window),
            how=_confirm_how(trial, rejected),
        )
    elif capable:
        notes.append("No smaller cache that was tried keeps its answers: keep the whole cache.")
    return Curve(savings, advice, tuple(notes))


def _order(scores: HeadScores, heads: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """KV heads with a cache, those with the highest scores first."""
    by_kv = scores.by_kv_head("max")
    return tuple(sorted(heads, key=lambda pair: (-np.nan_to_num(by_kv[pair], nan=-1.0), pair)))


def holds(effort: Effort, before: Outcome, after: Outcome) -> bool:
    """Whether the answers hold: hardly a fact lost on balance, and perplexity within the tolerance."""
    lost = sum(before.answers) - sum(after.answers)
    allowed = max(1, int(effort.losses * len(before.answers)))
    old, new = before.point.perplexity, after.point.perplexity
    return lost <= allowed and old is not None and new is not None and new <= (1 + effort.tolerance) * old


def _confirm(trial: Trial, whole: Outcome, chosen: Sequence[Outcome]) -> tuple[Outcome, Outcome, int] | None:
    """The smallest cache that holds, as all larger ones do, on the curve and again on fresh texts.

    Returns the whole cache and the smaller one, both as found on the fresh texts, and how many smaller ones
    held on the curve and failed there.
    """
    candidates: list[Outcome] = []
    for one in chosen:  # from many heads to few
        if not holds(trial.effort, whole, one):
            break
        candidates.append(one)
    if not candidates:
        return None
    smallest_first = [Choice("retrieval", one.point.heads) for one in reversed(candidates)]
    before, *again = trial.outcomes([Choice("full", None), *smallest_first], fresh=True)
    for rejected, after in enumerate(again):
        if holds(trial.effort, before, after):
            return before, after, rejected
    return None


def _drawn(heads: Sequence[tuple[int, int]], count: int, seed: int) -> tuple[tuple[int, int], ...]:
    return tuple(random.Random(f"{seed} {count}").sample(list(heads), count))


def _incapable(whole: Outcome) -> str:
    found, asked = sum(whole.answers), len(whole.answers)
    return (
        f"With its whole cache the model finds {found} of {asked} hidden facts, too few to see what a "
        "smaller cache loses: no cache is recommended, and the curve of hidden facts says nothing."
    )


def _hows(trial: Trial) -> tuple[str, str, str]:
    e = trial.effort
    per_text = f"{e.facts} facts of different kinds in each of {e.texts} texts of {e.length:,} tokens"
    drawn = f" ({e.random_texts} for random choices)" if e.random_texts != e.texts else ""
    return (
        f"Hidden facts: {per_text}{drawn}, before the last {e.window} tokens; an answer counts when greedy "
        "decoding gives exactly the number. A text is read with whole attention (prefill='dense'); question "
        "and answer see what the cache then holds. Heads are chosen by their retrieval score, measured on "
        "other texts with facts of another kind and other names.",
        f"Perplexity: {e.scored:,} tokens of {trial.prose_name}, each predicted from what its cache would "
        "hold if tokens came one by one.",
        f"Decoding: median of single tokens at {e.decode_length:,} tokens of context, caches in turn for "
        f"{e.decode_rounds} rounds, filled with random numbers (their content does not change the time). "
        "The whole cache is transformers' DynamicCache with the model's own attention. Random choices "
        "were not timed.",
    )


def _confirm_how(trial: Trial, rejected: int) -> str:
    e = trial.effort
    failed = f" Here {plural(rejected, 'smaller cache')} failed that held on the curve." if rejected else ""
    return (
        f"Measured on {e.facts * e.confirm_texts} facts in texts of {e.confirm_length:,} tokens and on "
        f"{e.scored:,} tokens of prose, none of which chose the heads or drew the curve.{failed}"
    )
