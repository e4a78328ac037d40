"""Which heads come first: ranks, and what they are measured on."""

import dataclasses
import itertools

import numpy as np
import pytest

from polyhead.head_scores import HeadScores
from polyhead.report import choosing, facts
from polyhead.report.effort import Effort
from polyhead.tasks import sample_text
from report import small_models

PAIRS = [(layer, head) for layer in range(2) for head in range(3)]


def scores(*values, **words):
    return HeadScores(tuple(np.array(row, float) for row in values), **{"level": "kv", **words})


def test_the_better_rank_counts_and_of_equals_the_first_score():
    retrieval = scores([6, 5, 4], [3, 2, 1])
    gradients = scores([0, -1, -2], [3, 4, 5])
    # ranks by the gradient: (1, 2), (1, 1), (1, 0), (0, 0), ...
    assert choosing.by_both(retrieval, gradients, PAIRS) == (
        (0, 0),
        (1, 2),
        (0, 1),
        (1, 1),
        (0, 2),
        (1, 0),
    )
    assert choosing.by_both(retrieval, retrieval, PAIRS) == tuple(PAIRS)
    assert choosing.by_both(gradients, gradients, PAIRS) == choosing.by_one(gradients, PAIRS)


def test_a_head_of_no_score_comes_last_after_negative_ones():
    assert choosing.by_one(scores([np.nan, -5.0, 1.0]), PAIRS[:3]) == ((0, 2), (0, 1), (0, 0))


def test_kv_heads_count_as_the_highest_of_their_readers():
    found = scores([0.0, 0.3, 0.2, 0.2, 0.1, 0.1], level="query", kv_groups=2)
    assert choosing.by_one(found, PAIRS[:3]) == ((0, 0), (0, 1), (0, 2))


@pytest.fixture(scope="module")
def tokenizer():
    return small_models.tokenizer()


def test_heads_are_chosen_by_other_facts_in_other_parts_of_the_sample_text(tokenizer):
    effort = dataclasses.replace(Effort(), length=700, window=96, facts=4)
    made = choosing.texts(tokenizer, effort)
    assert len(made) == effort.choosing_texts == 3
    said = [one.statement for hidden in made for one in hidden.asked]
    assert len(set(said)) == 12
    begins = [kind.begin.split(" {name}")[0] for kind in facts.CHOOSING.kinds]
    assert all(any(begin in one for begin in begins) for one in said)
    assert made == choosing.texts(tokenizer, effort)
    assert made != choosing.texts(tokenizer, dataclasses.replace(effort, seeds=(1,)))
    prose = sample_text()
    starts = [prose.index(tokenizer.decode(hidden.text[-60:])) for hidden in made]
    assert all(a < b for a, b in itertools.pairwise(starts))
