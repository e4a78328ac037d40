"""A score means something: what cannot see what is asked, provably knows nothing of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyhead.league import Batch, Sizes, plan
from polyhead.league.tasks import Task, find

# what every asked token must look at, and a mechanism that cannot
BLIND = {
    "recall": "mha:mask=window(0)",
    "needle": "mha:mask=window(16)",
    "induction": "mha:mask=window(0)",
    "polynomial": "mha:mask=window(0)",
    "cpm3": "mha:mask=window(0)",
    "nearest": "mha:mask=window(0)",
    "regression": "mha:mask=window(0)",
    "text": "mha:mask=window(0)",
}


# tasks that ask something of every token, and the token whose answer is looked at
ONE = {"polynomial": 0, "cpm3": 0, "text": -1}


def moved(task: Task, batch: Batch) -> Tensor:
    """The inputs with everything changed that tells the answers, but for the tokens that are asked."""
    inputs = batch.inputs.clone()
    if task.name == "needle":
        values = inputs < 8 * 16
        values[:, -1 - 2 * 16 :] = False  # what the last token reaches through two windows
        inputs[values] = inputs[values] // 16 * 16 + (inputs[values] + 1) % 16
        return inputs
    asked = batch.asked
    assert asked is not None
    if task.name in ONE:  # all tokens are asked: all but one change
        asked = torch.zeros_like(asked)
        asked[:, ONE[task.name]] = True
    other = task.batch("train", 99, len(inputs), 5).inputs
    return torch.where(asked.view(*asked.shape, *[1] * (inputs.ndim - 2)), inputs, other)


@pytest.mark.parametrize("name", BLIND)
def test_a_mechanism_that_cannot_see_the_answer_says_the_same_whatever_it_is(name: str) -> None:
    task = find(name)
    torch.manual_seed(0)
    settled = plan([BLIND[name], "mha"], task, sizes=Sizes(dim=32, heads=2, layers=2, mlp=64))
    batch = task.batch("train", 0, 8, 0)
    other = Batch(moved(task, batch), batch.targets)
    changed = {}
    for one in settled.contenders:
        model = one.model(task).eval()
        with torch.no_grad():
            difference = (model(batch) - model(other)).abs().amax(-1)
        if name in ONE:
            difference = difference.view(8, -1)[:, ONE[name]]
        if name == "needle":
            difference = difference.view(8, -1)[:, -1]
        changed[one.contender.label] = float(difference.max())
    assert changed["mha"] > 1e-4
    assert changed[BLIND[name]] < 1e-6


@pytest.mark.parametrize("name", ["relational", "digits", "listops"])
def test_without_mixing_a_label_is_the_same_whatever_is_asked(name: str) -> None:
    """The class token that a label is read from sees itself alone: the score is that of one fixed answer."""
    task = find(name)
    torch.manual_seed(0)
    settled = plan(["mha:mask=window(0)", "mha"], task, sizes=Sizes(dim=32, heads=2, layers=2, mlp=64))
    batch = task.batch("validation", 0, 64, 0)
    blind, seeing = (one.model(task).eval() for one in settled.contenders)
    with torch.no_grad():
        assert (blind(batch) - blind(batch)[:1]).abs().max() < 1e-6
        assert (seeing(batch) - seeing(batch)[:1]).abs().max() > 1e-4
        score = (blind(batch).argmax(-1) == batch.targets).float().mean()
    assert score <= batch.targets.bincount().max() / 64


def test_without_mixing_text_is_a_table_of_pairs_of_tokens() -> None:
    yardsticks = find("text").yardsticks()
    assert yardsticks["pairs of tokens"] < yardsticks["token frequencies"]


def test_a_window_that_ends_before_the_word_does_knows_nothing_of_its_first_symbol() -> None:
    task = find("copy")
    model = plan(["mha:mask=window(8)"], task, sizes=Sizes(dim=32, heads=2, layers=2, mlp=64)).contenders[0]
    batch = task.batch("train", 0, 8, 0)
    other = batch.inputs.clone()
    other[:, :8] = (other[:, :8] + 1) % 16  # two layers of eight tokens reach back to the ninth
    built = model.model(task).eval()
    with torch.no_grad():
        found = built(batch) - built(Batch(other, batch.targets))
    assert float(found.view(8, 24, -1)[:, 0].abs().max()) < 1e-6


def test_the_league_of_paper_010_has_mechanisms_that_mix_nothing() -> None:
    """`token_mlp` is attention without other tokens: it cannot do better than a guess at recall."""
    task = find("recall")
    model = (
        plan(["token_mlp"], task, sizes=Sizes(dim=32, heads=2, layers=2, mlp=64)).contenders[0].model(task)
    )
    batch = task.batch("train", 0, 8, 0)
    with torch.no_grad():
        found = model.eval()(batch) - model(Batch(moved(task, batch), batch.targets))
    assert float(found.abs().max()) < 1e-6
