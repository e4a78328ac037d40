"""Contenders as a line of text."""

from __future__ import annotations

from typing import Any

import pytest

import polyhead as ph
from polyhead.errors import ConfigError, PolyheadError, UnknownName
from polyhead.league import Contender, contender


@pytest.mark.parametrize(
    ("text", "names", "options"),
    [
        ("mha", ("mha",), ((),)),
        ("gqa", ("grouped_query",), ((),)),
        ("moh:top_k=2,qk_norm=True", ("moh",), ((("top_k", 2), ("qk_norm", True)),)),
        ("mha:dropout=0.1", ("mha",), ((("dropout", 0.1),),)),
        ("moh:router=query_norm", ("moh",), ((("router", "query_norm"),),)),
        ("moh:router='query_norm'", ("moh",), ((("router", "query_norm"),),)),
        ("mha:mask=window(16)", ("mha",), ((("mask", ph.window(16)),),)),
        ("mha:mask=window(16, 2) | sink(4)", ("mha",), ((("mask", ph.window(16, 2) | ph.sink(4)),),)),
        (
            "mha:normalizer=entmax(1.5),dropout=0.1",
            ("mha",),
            ((("normalizer", ph.entmax(1.5)), ("dropout", 0.1)),),
        ),
        ("decoupled_head:key_map=(0, 1, 1, 0)", ("decoupled_head",), ((("key_map", (0, 1, 1, 0)),),)),
        ("mha + grouped_query:kv_heads=1", ("mha", "grouped_query"), ((), (("kv_heads", 1),))),
    ],
)
def test_reading(text: str, names: tuple[str, ...], options: tuple) -> None:
    found = contender(text)
    assert found == Contender(text, names, options)
    assert ph.from_json(ph.to_json(found)) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("x", (), ()), r"x: names must be of mechanisms, at least one; got \(\)"),
        (("x", "mha", ((),)), "x: names must be of mechanisms, at least one; got 'mha'"),
        (("x", ("mha",), ()), r"x: options must be pairs for each of the 1 mechanism\(s\), .* got \(\)"),
        (("x", ("mha", "moh"), ((),)), r"x: options must be pairs for each of the 2 mechanism\(s\)"),
        ((5, ("mha",), ((),)), "label must be a text; got 5"),
    ],
)
def test_a_contender_that_is_none(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Contender(*given)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("mho", UnknownName, "did you mean"),
        ("", ConfigError, "name of a mechanism"),
        ("mha:", ConfigError, "must follow the colon"),
        ("mha:top_k", ConfigError, "options are name=value"),
        ("mha:mask=windw(3)", UnknownName, "did you mean 'window'"),
        ("mha:mask=window(", ConfigError, "cannot be read"),
        ("mha:mask=window(1, 2, 3, 4)", ConfigError, "window"),
        ("mha:dropout=(1 + x)", ConfigError, "cannot be read as a value"),
        ("mha:mask=3 | 'a'", ConfigError, "join masks"),
        ("mha:heads=2,heads=4", ConfigError, "heads is given more than once"),
        ("mha:dropout={[]: 1}", ConfigError, "cannot be read as a value"),
        ("mha:dropout=" + "-" * 9000 + "1", ConfigError, "cannot be read"),
        ("mha:mask=window(-1)", PolyheadError, "window"),
        ("mha:mask=__import__('os')", UnknownName, "no description is called"),
    ],
)
def test_refusals(text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        contender(text)
