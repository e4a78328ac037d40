"""Descriptions: values that compare by content, hash, and go through JSON and pickle."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend.spelling import Spelling, read, spell
from polyhead.description import Part, Slot, from_json, to_json
from polyhead.errors import ConfigError, UnknownName


class Leaf(Part):
    value: float
    table: Tensor | None = None


class Tree(Part):
    left: Part
    right: tuple[Part, ...] = ()


def tree() -> Tree:
    return Tree(Leaf(1.5, torch.arange(3.0)), (Leaf(2.0), Leaf(3.0, torch.ones(2, dtype=torch.long))))


def test_compares_by_content() -> None:
    assert tree() == tree()
    assert hash(tree()) == hash(tree())
    assert tree() != Tree(Leaf(1.5, torch.arange(3.0) + 1), tree().right)
    assert Leaf(1.0) != Tree(Leaf(1.0))
    assert Leaf(1.0, torch.ones(2)) != Leaf(1.0, torch.ones(3))
    assert len({tree(), tree()}) == 1


@pytest.mark.parametrize("part", [tree(), ph.causal() & (ph.window(3) | ph.sink(1)), ph.entmax(1.5)], ids=str)
def test_round_trips(part: Part) -> None:
    assert from_json(json.loads(json.dumps(to_json(part)))) == part
    assert pickle.loads(pickle.dumps(part)) == part
    assert copy.deepcopy(part) == part
    spec, tensors = part.flatten()
    assert spec.unflatten(tensors) == part
    found = Spelling()
    assert read(spell(part, found), found.tensors, found.ints, found.floats) == part
    assert tuple(map(id, found.tensors)) == tuple(map(id, part.tensors()))


def test_flatten_leaves_slots_in_order() -> None:
    spec, tensors = tree().flatten()
    assert spec.left.table == Slot(0, (3,), torch.float32)  # type: ignore[attr-defined]
    assert [t.tolist() for t in tensors] == [[0.0, 1.0, 2.0], [1, 1]]
    assert hash(spec) == hash(tree().flatten()[0])


def test_json_remembers_what_is_learned() -> None:
    learned = ph.softmax(sink=torch.zeros(2, requires_grad=True))
    sink = from_json(to_json(learned)).sink
    assert sink.requires_grad
    assert sink.is_leaf
    assert not from_json(to_json(ph.softmax(sink=torch.zeros(2)))).sink.requires_grad


def test_to_keeps_integers() -> None:
    moved = tree().to(dtype=torch.float64)
    assert moved.left.table.dtype == torch.float64  # type: ignore[attr-defined]
    assert moved.right[1].table.dtype == torch.int64  # type: ignore[attr-defined]


def test_parts_are_frozen() -> None:
    with pytest.raises(AttributeError):
        tree().left = Leaf(1.0)  # type: ignore[misc]


def test_messages() -> None:
    with pytest.raises(ConfigError, match="cannot be called 'kind'"):

        class Kinded(Part):
            kind: str  # type: ignore[misc]

    with pytest.raises(ConfigError, match="a part called Window in polyhead"):
        type("Window", (Part,), {"__module__": __name__, "__annotations__": {}})
    with pytest.raises(UnknownName, match="did you mean 'Window'"):
        from_json({"part": "Windoww"})
    with pytest.raises(ConfigError, match="define it at the top level of a module"):
        to_json(ph.where(lambda b, h, i, j: i == j))
    with pytest.raises(ConfigError, match="not a description"):
        from_json({"shape": 3})
    with pytest.raises(ConfigError, match="cannot go through JSON"):
        to_json({1})
