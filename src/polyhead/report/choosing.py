"""Which KV heads keep the whole context first: the order in which a report tries them.

Two scores, both measured on the sample text, with kinds and names of facts that no cache is tried on:

- `retrieval`, of the profile: attention to a needle while it is told. It finds the heads that fetch facts.
- `gate_gradient` (`polyhead.cache.duo.gate_gradients`): what the answers to hidden facts lose, to first
  order, when a KV head gives up the whole context. It can also find heads that hardly look at a fact.

A head's place is the better one of its two ranks; of equals, the one with more retrieval goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polyhead.cache.duo import gate_gradients
from polyhead.head_scores import HeadScores
from polyhead.report import facts
from polyhead.report.effort import Effort
from polyhead.tasks import sample_text
from polyhead.tasks.reading import context_length, encode

__all__ = ["Order", "by_both", "by_one", "gradients", "texts"]

Order = tuple[tuple[int, int], ...]


def texts(tokenizer: Any, effort: Effort) -> list[facts.Hidden]:
    """Parts of the sample text, one after the other, with facts of `facts.CHOOSING`."""
    source = encode(tokenizer, sample_text()).tolist()
    spare = max(0, len(source) - effort.length)
    step = min(effort.length, spare // max(1, effort.choosing_texts - 1))
    found = []
    for k in range(effort.choosing_texts):
        ids = [source[(k * step + i) % len(source)] for i in range(effort.length)]
        seed = 1000 * effort.seeds[0] + 100 + k
        how = {"length": effort.length, "count": effort.facts, "unseen": effort.window}
        found.append(facts.hide(tokenizer, ids, facts.CHOOSING, seed=seed, **how))
    return found


def gradients(
    model: Any, tokenizer: Any, effort: Effort, progress: Callable[[int], None] | None = None
) -> HeadScores:
    """The score `gate_gradient` of every KV head, for the sinks and the window of the caches to be tried."""
    asked = map(facts.questions, texts(tokenizer, effort.fitting(context_length(model))))
    return gate_gradients(model, asked, sink=effort.sink, window=effort.window, progress=progress)


def by_one(scores: HeadScores, heads: Sequence[tuple[int, int]]) -> Order:
    """KV heads, those with the highest scores first; one without a score comes last.

    Of scores of query heads, the highest of those that read a KV head counts.
    """
    by_kv = scores if scores.level == "kv" else scores.by_kv_head("max")
    return tuple(sorted(heads, key=lambda pair: (-np.nan_to_num(by_kv[pair], nan=-np.inf), pair)))


def by_both(first: HeadScores, second: HeadScores, heads: Sequence[tuple[int, int]]) -> Order:
    """KV heads by the better one of their ranks; of equals, by the first score."""
    one, other = ({pair: k for k, pair in enumerate(by_one(scores, heads))} for scores in (first, second))
    return tuple(sorted(heads, key=lambda pair: (min(one[pair], other[pair]), one[pair])))
