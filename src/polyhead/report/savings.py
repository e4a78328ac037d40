"""What a smaller cache costs: KV heads kept in full from all of them down to none, and what comes of it.

Heads are chosen by two scores that are measured on the sample text (`polyhead.report.choosing`). Every choice
is tried on the same facts, of other kinds, with other names, in other texts, and on the perplexity of a text
of its own. Which cache is recommended is decided by these facts and by fresh ones, and told by a third
part of the facts, which decided nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

from polyhead.cache.per_head import per_head
from polyhead.errors import ConfigError, UnsupportedModel
from polyhead.head_scores import HeadScores
from polyhead.report.choosing import by_both, by_one
from polyhead.report.data import Recommendation, Savings
from polyhead.report.effort import Effort, shares, sizes
from polyhead.report.summary import python_lines, ranked_lines, reason, verdict
from polyhead.report.trying import Choice, Outcome, Trial
from polyhead.report.words import plural
from polyhead.tasks.reading import context_length

__all__ = ["Curve", "Decision", "holds", "keeps", "measure", "why_not"]

WHOLE = Choice("full", None)
BOTH, ALONE = "both scores", "retrieval alone"  # how heads are chosen, besides at random


@dataclass(frozen=True)
class Curve:
    """The curve, what is recommended (None: nothing), what there is to say, and a score that chose heads."""

    savings: Savings
    recommendation: Recommendation | None
    notes: tuple[str, ...]
    gradients: HeadScores


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
    except (ConfigError, UnsupportedModel) as error:
        return f"The model cannot use a per-head cache: {error}."
    cache.detach()
    return ""


def measure(trial: Trial, retrieval: HeadScores, gradients: HeadScores, source: str) -> Curve:
    """The whole curve and the recommendation.

    Args:
        trial: the model, and what its caches are tried on.
        retrieval, gradients: the two scores that heads are chosen by (`choosing.by_both`). Choices by the
            first one alone are tried beside them.
        source: how the user named the model.
    """
    e, total = trial.effort, len(trial.all_heads)
    order = by_both(retrieval, gradients, trial.all_heads)
    tried = [Choice(BOTH, order[:count]) for count in sizes(e, total)]
    other = by_one(retrieval, trial.all_heads)
    beside = [Choice(ALONE, other[:count]) for count in shares(e.alone_fractions, total)]
    beside += [one for count in shares(e.random_fractions, total) for one in _at_random(trial, count)]
    whole, *rest = trial.outcomes([WHOLE, *tried, *beside])
    chosen, compared = rest[: len(tried)], rest[len(tried) :]

    capable = sum(whole.answers) >= len(whole.answers) / 2
    decision = _decide(trial, whole, chosen) if capable else Decision()

    timed = trial.speeds([None, order, *(o.point.heads for o in chosen)])
    baseline = replace(whole.point, decode_tokens_per_second=timed[0])
    full = replace(
        whole.point,
        policy=BOTH,
        decode_tokens_per_second=timed[1],
        cache_bytes=tuple((n, trial.bytes(partial(trial.small, order), n)) for n in e.lengths),
        heads=tuple(sorted(order)),
    )
    points = [full] + [
        replace(o.point, decode_tokens_per_second=speed) for o, speed in zip(chosen, timed[2:], strict=True)
    ]
    savings = Savings(
        baseline,
        (*points, *(o.point for o in compared)),
        *_hows(trial),
        verdict=decision.verdict,
        python=ranked_lines(source, order, _preferred(chosen), e.sink, e.window) if capable else "",
    )

    advice = None
    if decision.before is not None and decision.after is not None:
        before, after = decision.before, decision.after
        speed = {p.heads_kept: p.decode_tokens_per_second for p in points}
        advice = Recommendation(
            before=replace(before.point, decode_tokens_per_second=timed[0]),
            after=replace(after.point, decode_tokens_per_second=speed[after.point.heads_kept]),
            why=reason(e, before.point, after.point),
            python=python_lines(source, after.point.heads, total, e.sink, e.window),
            how=_confirm_how(trial, decision.rejected),
            chance=tuple(one.point for one in decision.chance),
        )
    return Curve(savings, advice, () if capable else (_incapable(whole),), gradients)


def keeps(effort: Effort, after: Outcome) -> bool:
    """Whether hardly a fact is lost of those that the whole cache finds, counted fact by fact."""
    found, kept = after.point.needles_whole, after.point.needles_kept
    return found is not None and kept is not None and kept >= (1 - effort.losses) * found - 1e-9


def holds(effort: Effort, before: Outcome, after: Outcome) -> bool:
    """Whether the answers hold: facts are kept, and perplexity stays within the tolerance."""
    old, new = before.point.perplexity, after.point.perplexity
    steady = old is not None and new is not None and new <= (1 + effort.tolerance) * old
    return steady and keeps(effort, after)


@dataclass(frozen=True)
class Decision:
    """The cache that is recommended, as found on the facts that it is told by; or why there is none.

    Attributes:
        before, after: the whole cache and the recommended one; None: nothing is recommended.
        chance: as many heads chosen at random.
        rejected: how many smaller caches held on the curve and not on fresh facts.
        verdict: why nothing is recommended.
    """

    before: Outcome | None = None
    after: Outcome | None = None
    chance: tuple[Outcome, ...] = ()
    rejected: int = 0
    verdict: str = ""


def _decide(trial: Trial, whole: Outcome, chosen: Sequence[Outcome]) -> Decision:
    """The smallest cache that holds, as all larger ones do, on the curve, on fresh facts, and once more.

    Caches are looked at from the largest to the smallest, up to the first that fails: a small one that is
    lucky after a larger one has failed is not taken. What has been decided is tried on a third part of the
    facts, which alone the recommendation is told by; if it fails there, nothing is recommended.
    """
    e = trial.effort
    chosen = [one for one in chosen if one.point.heads_kept]
    if not chosen:
        return Decision(verdict=verdict(e, None, None, ""))
    candidates = list(takewhile(lambda one: holds(e, whole, one), chosen))
    if not candidates:
        return Decision(verdict=verdict(e, whole.point, chosen[0].point, "the largest cache tried"))
    choices = [Choice(BOTH, one.point.heads) for one in candidates]
    fresh, *again = trial.outcomes([WHOLE, *choices], "fresh")
    held = [
        choice for choice, _ in takewhile(lambda pair: keeps(e, pair[1]), zip(choices, again, strict=True))
    ]
    if not held:
        what = "the largest cache tried, which held on the curve, but on fresh facts"
        return Decision(verdict=verdict(e, fresh.point, again[0].point, what))
    last = held[-1]
    assert last.heads is not None
    before, after, *chance = trial.outcomes([WHOLE, last, *_at_random(trial, len(last.heads))], "told")
    if not holds(e, before, after):
        what = "which held on the curve and on fresh facts, but on a third part of the facts"
        return Decision(verdict=verdict(e, before.point, after.point, what))
    return Decision(before, after, tuple(chance), len(candidates) - len(held))


def _preferred(chosen: Sequence[Outcome]) -> int:
    """The size that keeps most facts on the curve, the smallest of these."""
    sized = [one for one in chosen if one.point.heads_kept] or list(chosen)
    return min(sized, key=lambda one: (-(one.point.needles_kept or 0), one.point.heads_kept)).point.heads_kept


def _at_random(trial: Trial, count: int) -> list[Choice]:
    """As many heads chosen at random, with each seed."""
    heads = trial.all_heads
    drawn = [(seed, random.Random(f"{seed} {count}").sample(heads, count)) for seed in trial.effort.seeds]
    return [Choice("random", tuple(some), seed) for seed, some in drawn]


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
        f"Hidden facts: {per_text}{drawn}, before the last {e.window} tokens; an answer counts as found "
        "when greedy decoding gives exactly the number. Kept: of the facts that the whole cache finds, those "
        "found with this cache too, and the 95 % interval of their share. A text is read with whole "
        "attention (prefill='dense'); question and answer see what the cache then holds. Both scores, by "
        "which heads are chosen: a head's place is the better one of its ranks by retrieval (attention to a "
        f"needle) and by gate gradient (what the answers to {e.facts * e.choosing_texts} facts in "
        f"{plural(e.choosing_texts, 'text')} lose, to first order, when it gives up the context). They are "
        "measured on other texts, with facts of other kinds and other names.",
        f"Perplexity: {e.scored:,} tokens of {trial.prose_name}, each predicted from what its cache would "
        "hold if tokens came one by one.",
        f"Decoding: median of single tokens at {e.decode_length:,} tokens of context, caches in turn for "
        f"{e.decode_rounds} rounds, filled with random numbers (their content does not change the time). "
        "The whole cache is transformers' DynamicCache with the model's own attention. Only choices by "
        "both scores were timed.",
    )


def _confirm_how(trial: Trial, rejected: int) -> str:
    e = trial.effort
    n = e.facts * e.confirm_texts
    failed = (
        f" Here {plural(rejected, 'smaller cache')} that held on the curve failed there." if rejected else ""
    )
    return (
        f"Sizes were tried from the largest to the smallest, on the curve's facts and on {n} fresh ones, up "
        f"to the first that failed.{failed} The numbers here come from a third part: {n} facts in texts "
        f"of {e.length:,} tokens and {e.scored:,} tokens of prose, which had no part in that."
    )
