"""Descriptions: values that compare by content, hash, and go through JSON and pickle."""

from __future__ import annotations

import copy
import json
import math
import pickle
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead import nn
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


def through_json(value: object) -> object:
    return from_json(json.loads(json.dumps(to_json(value), allow_nan=False)))


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 0.1, -0.0, 1e308, 5e-324])
def test_every_float_goes_through_strict_json(number: float) -> None:
    found = through_json(Leaf(number)).value  # type: ignore[attr-defined]
    assert isinstance(found, float)
    assert struct.pack("d", found) == struct.pack("d", number) or (math.isnan(found) and math.isnan(number))


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (0, 5), (5, 0, 2)])
def test_every_tensor_goes_through_strict_json(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(1)
    tensor = (torch.randn(shape, generator=random, dtype=torch.float64) * 9).to(dtype)
    if dtype.is_floating_point and tensor.numel():
        for k, number in enumerate((math.inf, -math.inf, math.nan)[: tensor.numel()]):
            tensor.view(-1)[k] = number
    found = through_json(Leaf(1.0, tensor)).table  # type: ignore[attr-defined]
    assert (found.dtype, found.shape) == (dtype, shape)
    torch.testing.assert_close(found, tensor, rtol=0, atol=0, equal_nan=True)


def test_how_what_is_not_finite_is_spelled() -> None:
    assert to_json(Leaf(-math.inf, torch.tensor([[math.nan, 1.0]]))) == {
        "part": f"{__name__}:Leaf",
        "value": {"number": "-inf"},
        "table": {"tensor": [["nan", 1.0]], "dtype": "float32"},
    }


def test_numbers_of_numpy_become_plain() -> None:
    assert json.dumps(to_json(Leaf(np.float32(1.5)))) == json.dumps(to_json(Leaf(1.5)))  # type: ignore[arg-type]
    assert json.dumps(to_json((np.int64(3), torch.bfloat16))) == '[3, {"dtype": "bfloat16"}]'
    assert from_json(to_json(torch.bfloat16)) is torch.bfloat16


def test_a_function_that_works_after_json() -> None:
    q = torch.randn(1, 2, 7, 4, generator=torch.Generator().manual_seed(0))
    mask = ph.causal() & ph.where(masks_of_this_test().diagonal)
    again = through_json(mask)
    assert again == mask
    assert torch.equal(ph.attend(q, q, q, mask=again), ph.attend(q, q, q, mask=mask))  # type: ignore[call-overload]


def masks_of_this_test() -> types.ModuleType:
    """A module as users have one: importable, with a function, a class, and something it imported."""
    module = types.ModuleType("polyhead_test_rules")
    exec(
        "import functools\nfrom os import system\nfrom json import dumps\n"
        "def diagonal(b, h, i, j):\n    return (i - j) % 3 == 0\n"
        "class Rule:\n    def __call__(self, b, h, i, j):\n        return i >= j\n"
        "    @staticmethod\n    def plain(b, h, i, j):\n        return i >= j\n"
        "rule = Rule()\nhalf = functools.partial(diagonal)\n",
        module.__dict__,
    )
    return sys.modules.setdefault("polyhead_test_rules", module)


def test_functions_that_cannot_go_through_json() -> None:
    rules = masks_of_this_test()
    assert from_json(to_json(rules.Rule.plain)) is rules.Rule.plain
    for function, message in (
        (rules.rule, "has no name to import it by"),
        (rules.half, "has no name to import it by"),
        (rules.Rule, "is a type; only plain Python functions"),
        (len, "'builtins:len' is a builtin_function_or_method"),
        (lambda: None, "define it at the top level of a module"),
    ):
        with pytest.raises(ConfigError, match=message):
            to_json(function)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"part": "Window"}, "Window needs 'left'; its fields are left, right"),
        (
            {"part": "Window", "left": 1, "width": 2},
            "Window has no field 'width'; its fields are left, right",
        ),
        ({"part": "Window", "left": "a"}, r"window: left must be an integer, at least 0; got 'a' \(str\)"),
        ({"part": "SoftCap", "cap": {"number": "nan"}}, "cap must be a finite number above 0, got nan"),
        ({"number": "Infinity"}, "number must be one of 'inf', '-inf', 'nan'; got 'Infinity'"),
        ({"dtype": "nn"}, "dtype must be the name of one of torch's, such as 'float32'; got 'nn'"),
        ({"dtype": 3}, "dtype must be the name"),
        ({"tensor": [1.0]}, "needs the key 'dtype'"),
        ({"tensor": [1.0], "dtype": "float32", "device": "cpu"}, r"has no key \['device'\]"),
        ({"tensor": [[1.0], [1.0, 2.0]], "dtype": "float32"}, "not a tensor in JSON: .*expected sequence"),
        ({"tensor": ["Infinity"], "dtype": "float32"}, "number must be one of"),
        ({"tensor": [None], "dtype": "float32"}, "nested lists of numbers; got None inside"),
        ({"tensor": [], "shape": [3], "dtype": "float32"}, "not a tensor in JSON: .*invalid"),
        ({"tensor": [1], "dtype": "int64", "requires_grad": True}, "not a tensor in JSON: .*floating"),
        (
            {"function": "os:system"},
            "'os:system' is a builtin_function_or_method; only plain Python functions",
        ),
        ({"function": "builtins:eval"}, "only plain Python functions go through JSON, not classes, builtins"),
        ({"function": "subprocess:Popen"}, "'subprocess:Popen' is a type; only plain Python functions"),
        ({"function": "polyhead_test_rules:dumps"}, "is defined in 'json'; name the module that defines it"),
        ({"function": "polyhead_test_rules:missing"}, "there is no 'missing' in polyhead_test_rules"),
        (
            {"function": "no_such_module_at_all:f"},
            "'no_such_module_at_all' cannot be imported: ModuleNotFound",
        ),
        ({"function": ".relative:f"}, "cannot be imported: TypeError"),
        ({"function": "no_colon"}, "function must be spelled 'module:name'; got 'no_colon'"),
        ({"function": ":f"}, "function must be spelled 'module:name'"),
        ({"function": 3}, r"function must be spelled 'module:name'; got 3 \(int\)"),
        ({1: 2}, r"not a description: a JSON object with the keys \['1'\]"),
        ({"part": "Window", "left": {1, 2}}, r"not JSON data: \{1, 2\} \(set\)"),
    ],
)
def test_data_that_is_no_description(data: object, message: str) -> None:
    masks_of_this_test()
    with pytest.raises(ConfigError, match=message):
        from_json(data)


@pytest.mark.parametrize("name", [None, 3, ["Window"], {"part": "Window"}])
def test_a_part_is_named_by_a_string(name: object) -> None:
    with pytest.raises(UnknownName, match="no part is called .*; known: .*Window"):
        from_json({"part": name})


def test_parts_of_rooms_not_imported_yet_are_found() -> None:
    data = [to_json(nn.rope(fraction=0.5)), to_json(ph.build("grouped_query", dim=8, heads=2).config)]
    program = f"import polyhead, json; print(polyhead.from_json(json.loads({json.dumps(json.dumps(data))})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Rope(" in done.stdout
    assert "GroupedQuery(" in done.stdout


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(2, dtype=torch.complex64), r"a tensor \(2,\) of torch.complex64"),
        (torch.zeros(2, device="meta"), "a tensor on the device meta"),
        (torch.eye(2).to_sparse(), r"a tensor \(2, 2\) of torch.float32"),
    ],
)
def test_tensors_that_json_cannot_carry(tensor: Tensor, said: str) -> None:
    with pytest.raises(ConfigError, match=f"{said} cannot go through JSON; it takes dense tensors of real"):
        to_json(Leaf(1.0, tensor))


def test_to_keeps_integers() -> None:
    moved = tree().to(dtype=torch.float64)
    assert moved.left.table.dtype == torch.float64  # type: ignore[attr-defined]
    assert moved.right[1].table.dtype == torch.int64  # type: ignore[attr-defined]


def test_parts_are_frozen() -> None:
    with pytest.raises(AttributeError):
        tree().left = Leaf(1.0)  # type: ignore[misc]


def test_parts_from_elsewhere_may_be_called_as_those_of_the_library() -> None:
    mine = type("Window", (Part,), {"__module__": "elsewhere", "__annotations__": {"left": int}})
    assert to_json(mine(3)) == {"part": "elsewhere:Window", "left": 3}  # type: ignore[call-arg]
    assert through_json(mine(3)) == mine(3)  # type: ignore[call-arg]
    assert through_json(ph.window(3)) == ph.window(3)
    assert mine(3) != ph.window(3)  # type: ignore[call-arg]


def test_messages() -> None:
    with pytest.raises(ConfigError, match="cannot be called 'kind'"):

        class Kinded(Part):
            kind: str  # type: ignore[misc]

    with pytest.raises(ConfigError, match="cannot be called 'part'"):

        class Parted(Part):
            part: Part

    with pytest.raises(ConfigError, match="a part called Window in polyhead"):
        type("Window", (Part,), {"__module__": "polyhead.elsewhere", "__annotations__": {}})
    with pytest.raises(UnknownName, match="did you mean 'Window'"):
        from_json({"part": "Windoww"})
    with pytest.raises(ConfigError, match="define it at the top level of a module"):
        to_json(ph.where(lambda b, h, i, j: i == j))
    with pytest.raises(ConfigError, match="not a description"):
        from_json({"shape": 3})
    with pytest.raises(ConfigError, match="cannot go through JSON"):
        to_json({1})
