from __future__ import annotations

import ast
import inspect

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, UnknownName
from polyhead.mechanisms import PATTERNS, AttentionConfig, MechanismConfig, Registry


def test_the_catalogue_has_the_mechanisms_by_name_and_prints_them() -> None:
    names = [entry.name for entry in ph.catalog()]
    assert {"mha", "grouped_query", "multi_query", "sparse_query"} <= set(names)
    assert names == sorted(names)
    text = str(ph.catalog())
    assert "grouped_query (paper 074, sharing; causal_cross, causal_self, cross, self)" in text
    assert len(text.splitlines()) == len(names)


def test_an_alias_finds_the_entry() -> None:
    assert ph.entry("gqa") is ph.entry("grouped_query")
    assert ph.entry("multi_head").name == "mha"
    assert ph.entry("mqa").file == "mechanisms/multi_query.py"
    assert ph.entry("sqa").supports == PATTERNS
    assert isinstance(ph.build("mqa", dim=8, heads=2).config, MechanismConfig)


def test_what_is_not_known_is_refused_with_what_is_near() -> None:
    with pytest.raises(
        UnknownName, match="no mechanism is called 'grouped_qery'; did you mean 'grouped_query'"
    ):
        ph.build("grouped_qery", dim=8, heads=2)
    with pytest.raises(ConfigError, match="grouped_query has no option 'kv_head'; did you mean 'kv_heads'"):
        ph.build("gqa", dim=8, heads=2, kv_head=1)
    with pytest.raises(ConfigError, match="mha needs heads; its options are dim, heads"):
        ph.build("mha", dim=8)
    with pytest.raises(
        UnknownName, match="no naive twin is called 'grouped_qery'; did you mean 'grouped_query'"
    ):
        ph.reference("grouped_qery")


def test_device_and_dtype() -> None:
    assert ph.build("mha", dim=8, heads=2, dtype=torch.bfloat16).output.weight.dtype == torch.bfloat16
    assert ph.build("mha", dim=8, heads=2, device="meta").output.weight.is_meta


def test_a_configuration_takes_no_memory_and_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ph.entry("mha").config(1_000_000, 1000)  # a terabyte of weights, were they made
    assert torch.equal(torch.rand(3), expected)


def test_a_registry_refuses_two_of_a_name_and_patterns_that_it_does_not_know() -> None:
    facts = {"title": "-", "family": "-", "summary": "-", "equation": "-"}
    registry = Registry()

    class TestMechanism(AttentionConfig):
        """For this test."""

    registry.register("one", aliases=("uno",), **facts)(TestMechanism)
    with pytest.raises(ConfigError, match="two mechanisms are called 'uno'; the other is 'one'"):
        registry.register("two", aliases=("uno",), **facts)(TestMechanism)
    assert [entry.name for entry in registry.catalog()] == ["one"]
    with pytest.raises(ConfigError, match="supports must be a set of some of"):
        registry.register("three", supports=frozenset({"sideways"}), **facts)


def test_configurations_compare_and_show_what_they_settled_on() -> None:
    config = ph.build("gqa", dim=64, heads=8).config
    assert config.kv_heads == 2
    assert config == ph.entry("gqa").config(64, 8, kv_heads=2)
    assert config != ph.entry("gqa").config(64, 8, kv_heads=4)
    assert len({config, ph.entry("gqa").config(64, 8)}) == 1
    for text in ("GroupedQuery(dim=64, heads=8", "kv_heads=2"):
        assert text in repr(config)


def test_every_mechanism_has_its_twin() -> None:
    from polyhead.reference import references

    assert {entry.name for entry in ph.catalog()} <= set(references())


@pytest.mark.parametrize("name", ["context", "mask", "padding"])
def test_a_twin_takes_no_argument_that_it_does_not_read(name: str) -> None:
    for entry in ph.catalog():
        (function,) = ast.parse(inspect.getsource(ph.reference(entry.name))).body
        assert isinstance(function, ast.FunctionDef)
        taken = {arg.arg for arg in (*function.args.args, *function.args.kwonlyargs)}
        read = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        assert name not in taken or name in read, entry.name
