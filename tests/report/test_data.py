import dataclasses
import json
import math

import numpy as np
import pytest

from polyhead.errors import ConfigError
from polyhead.report import codec
from polyhead.report.data import (
    Condition,
    Lookups,
    Measurement,
    Model,
    Point,
    ReportData,
    RoleRule,
    Roles,
    Text,
)


@pytest.mark.parametrize("which", ["decoder", "encoder", "nasty"])
def test_json_gives_back_the_same_report(which, request):
    data = request.getfixturevalue(which)
    text = data.to_json()
    assert text.isascii()
    assert ReportData.from_json(text) == data
    assert ReportData.from_json(text).to_json() == text


def test_what_was_not_measured_is_null():
    m = Measurement("x", "X", "", "", "", ((math.nan, math.inf, None, 1 / 3),))
    assert m.values == ((None, None, None, 0.333333),)
    assert Point("full", 1.0, 4, perplexity=math.nan).perplexity is None


def test_numbers_may_come_from_numpy():
    point = Point("full", np.float32(0.5), np.int64(4), needle_accuracy=np.float64(0.25))
    assert json.loads(codec.dumps(codec.plain(point)))["heads_kept"] == 4


def test_layers_may_differ_in_width(decoder):
    model = Model("m", "A", 1, 8, (2, 4), (1, 4), False, "float32")
    assert (model.layers, model.total_heads, model.total_kv_heads, model.starts) == (2, 6, 5, (0, 2))
    roles = Roles((), (("sink",) * 2, ("mixed",) * 4))
    measurement = Measurement("x", "X", "", "", "", ((0.0, 1.0), (2.0, 3.0, 4.0, 5.0)))
    report = ReportData(model, Text("t", ("a",)), decoder.run, (measurement,), roles)
    assert report.roles.counts()["mixed"] == 4
    assert measurement.flat() == [0, 1, 2, 3, 4, 5]
    assert ReportData.from_json(report.to_json()) == report


def changed(data, **changes):
    return dataclasses.replace(data, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"measurements": d.measurements * 2}, "measurements must have different names"),
        (
            lambda d: {
                "measurements": (
                    dataclasses.replace(d.measurements[0], values=((0.0,),)),
                    *d.measurements[1:],
                )
            },
            "measurement 'sink' has heads by layer (1,), the model (6, 6, 6, 6, 6, 6)",
        ),
        (lambda d: {"roles": Roles((), (("sink",),))}, "roles.heads has heads by layer (1,)"),
        (lambda d: {"roles": Roles((), (("dancer",) * 6,) * 6)}, "got ['dancer']"),
        (
            lambda d: {
                "roles": Roles((RoleRule("sink", "", (Condition("depth", ">=", 1.0),)),), d.roles.heads)
            },
            "rule 'sink' asks for 'depth'",
        ),
        (lambda d: {"lookups": Lookups(4, (3, 2), d.lookups.packed)}, "lookups.queries must ascend"),
        (lambda d: {"format": "polyhead-report/9"}, "format must be 'polyhead-report/1'"),
    ],
)
def test_a_report_that_does_not_fit_together_is_refused(decoder, change, message):
    with pytest.raises(ConfigError) as error:
        changed(decoder, **change(decoder))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Model("m", "A", 1, 8, (3,), (2,), False, "f"), "layer 0 has 3 query heads and 2 KV heads"),
        (lambda: Model("m", "A", 1, 8, (), (), False, "f"), "at least one layer"),
        (lambda: Model("m", "A", 1, 8, (2, 2), (2,), False, "f"), "heads has 2 layers and kv_heads 1"),
        (lambda: Text("t", ()), "tokens must hold 1 to 65536 tokens, got 0"),
        (lambda: Text("t", ("a",), sinks=(1,)), "sinks must lie in 0..0, got (1,)"),
        (lambda: Text("t", ("a", "b"), received=(1.0,)), "received holds 1 values for 2 tokens"),
        (lambda: Condition("x", ">", 1.0), "relation must be '>=' or '<=', got '>'"),
        (lambda: RoleRule("dancer", ""), "role must be one of sink, local"),
        (lambda: Point("full", 1.2, 4), "kv_fraction must lie in 0..1, got 1.2"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: d["model"].pop("dtype"),
            "report.model lacks the fields",
        ),
        (lambda d: d["model"].update(shoe_size=42), "report.model has the unknown fields ['shoe_size']"),
        (lambda d: d["model"].update(heads="nine"), "report.model.heads must be a list, got str"),
        (lambda d: d["text"]["tokens"].append(3), "must be of type str, got int 3"),
        (lambda d: d.update(run=None), "report.run must be an object, got NoneType"),
        (lambda d: d.update(format="other"), "not a report in the format"),
        (lambda d: d["savings"]["baseline"].update(cache_bytes=[[1]]), "must hold 2 items, got 1"),
    ],
)
def test_a_file_that_is_no_report_is_refused_with_the_place(decoder, spoil, message):
    value = json.loads(decoder.to_json())
    spoil(value)
    with pytest.raises(ConfigError) as error:
        ReportData.from_json(json.dumps(value))
    assert message in str(error.value)


def test_text_that_is_no_json_is_refused():
    with pytest.raises(ConfigError, match="not a report"):
        ReportData.from_json("{")
    with pytest.raises(ConfigError, match="got 'list'"):
        ReportData.from_json("[]")
