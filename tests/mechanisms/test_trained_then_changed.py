"""A small vision transformer is trained with plain attention, and then its attention is another one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.league import Sizes
from polyhead.league.model import Model, layer_of
from polyhead.league.tasks.digits import DigitsTask
from polyhead.league.training import evaluate
from polyhead.mechanisms.key_driven_gqa import key_driven
from polyhead.mechanisms.weighted_grouped_query import merged, weighted

TASK, SIZES = DigitsTask(), Sizes(dim=48, heads=6, layers=2, mlp=96)


def learn(model: Model, first: int, steps: int, rate: float) -> None:
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for number in range(first, first + steps):
        made.zero_grad()
        model.loss(TASK.batch("train", number, 32, 0)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        made.step()


def accuracy(model: Model) -> float:
    return evaluate(model, "validation", 360)


def changed(model: Model, change: Callable[[ph.nn.MultiHeadAttention], nn.Module]) -> Model:
    found = copy.deepcopy(model)
    for layer in found.stack.layers:
        layer.attention = change(layer.attention)
    return found


@pytest.fixture(scope="module")
def trained() -> Model:
    torch.manual_seed(0)
    model = Model(TASK, SIZES, [layer_of(TASK, "mha", {}, SIZES.dim, SIZES.heads)])
    learn(model, 0, 300, 3e-3)
    return model.eval()


@pytest.fixture(scope="module")
def trained_on(trained: Model) -> Model:
    """The same without any change, trained on as the changed ones are."""
    model = copy.deepcopy(trained)
    learn(model, 300, 100, 1e-3)
    return model


def test_signs_of_queries_and_keys_cost_accuracy_that_tuning_brings_back_in_part(
    trained: Model, trained_on: Model
) -> None:
    """Paper 178."""
    whole, on = accuracy(trained), accuracy(trained_on)
    outputs = []
    for options in ({}, {"grid": (4, 4)}):  # without and with a bias for every offset

        def signs(plain: nn.Module, options: dict[str, object] = options) -> nn.Module:
            made = ph.build("binary_attention", dim=48, heads=6, **options)
            _, unexpected = made.load_state_dict(plain.state_dict(), strict=False)
            assert not unexpected
            return made

        model = changed(trained, signs)
        before = accuracy(model)
        assert before < whole - 0.2
        learn(model, 300, 100, 1e-3)
        # most comes back; it is not what plain attention reaches in as many steps
        assert before + 0.2 < accuracy(model) < on - 0.05
        with torch.no_grad():
            outputs.append(model(TASK.batch("validation", 0, 360, 0)))
    assert not torch.equal(*outputs)


def test_giving_query_heads_to_other_keys_breaks_a_converted_model(trained: Model, trained_on: Model) -> None:
    """Paper 154: six key heads become three, their means; only in even groups do pairs stay as they were."""
    even = changed(trained, lambda plain: merged(weighted(plain, 3)))
    moved = changed(trained, lambda plain: key_driven(plain, 3))
    before = accuracy(even)
    assert accuracy(moved) == before  # it starts with even groups
    for layer, counts in zip(moved.stack.layers, ((1, 2, 3), (3, 2, 1)), strict=True):
        layer.attention.allocate(counts)
    assert accuracy(moved) < before - 0.05 < accuracy(trained) - 0.4
    for model in (even, moved):
        learn(model, 300, 100, 1e-3)
    # behind it, uneven groups are still worse than even ones, and those than all heads
    assert accuracy(moved) < accuracy(even) < accuracy(trained_on)
