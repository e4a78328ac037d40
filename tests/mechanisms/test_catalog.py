"""Asking the catalogue: facets, filters, filters that make no sense, and pictures of the data flow."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.mechanisms import (
    CATALOGUE_SIZE,
    FACETS,
    PATTERNS,
    AttentionConfig,
    Facets,
    Flow,
    Registry,
    Step,
    flow_of,
)
from polyhead.mechanisms.files import COMMON, modules_of
from polyhead.nn import MultiHeadAttention

FACTS = {"title": "-", "family": "-", "summary": "-", "equation": "-"}


def names(**asked) -> list[str]:
    return [entry.name for entry in ph.catalog(**asked)]


@pytest.mark.parametrize("name", names())
def test_every_entry_has_a_value_on_every_axis(name: str) -> None:
    facets = ph.entry(name).facets
    for axis, allowed in FACETS.items():
        assert facets.values(axis), axis
        assert set(facets.values(axis)) <= allowed.keys(), axis


@pytest.mark.parametrize("axis", FACETS)
def test_the_values_of_an_axis_divide_the_catalogue(axis: str) -> None:
    found = [name for value in FACETS[axis] for name in names(**{axis: value})]
    assert set(found) == set(names())
    if axis != "sequences":
        assert len(found) == len(names())


def test_what_the_plain_mechanism_is() -> None:
    assert ph.entry("mha").facets == Facets(
        ("self", "distinctive"), "single", "global", "single", "scaled_dot", "softmax", "quadratic", "growing"
    )


def test_what_a_module_shows_by_itself() -> None:
    def seen(**options) -> Facets:
        return Facets().settled(
            ph.build("mha", dim=16, heads=2, device="meta", **options), frozenset({"cross"})
        )

    assert seen().sequences == ("distinctive",)
    assert seen(normalizer=ph.sigmoid()).distribution == "sigmoid"
    assert seen(normalizer=ph.sparsemax()).distribution == "sparsemax"
    assert seen(normalizer=ph.entmax(1.5)).distribution == "entmax"
    assert seen(normalizer=ph.entmax(torch.tensor([1.5, 2.0]))).distribution == "entmax"
    assert (
        Facets(distribution="hard").settled(ph.build("mha", dim=16, heads=2), PATTERNS).distribution == "hard"
    )


def test_facets_that_do_not_exist_are_refused_with_those_that_do() -> None:
    with pytest.raises(
        ConfigError, match="positions must be one of global, hard, local; got 'locl'.*'local'"
    ):
        Facets(positions="locl")
    with pytest.raises(ConfigError, match="sequences must be a tuple of some of self, distinctive, co"):
        Facets(sequences="self")
    with pytest.raises(ConfigError, match="sequences must be one of co, distinctive, self; got 'other'"):
        Facets(sequences=("self", "other"))
    with pytest.raises(ConfigError, match="one: facets must be Facets"):
        Registry().register("one", facets={"positions": "local"}, **FACTS)
    with pytest.raises(ConfigError, match="one: picture must be a Flow"):
        Registry().register("one", picture="x -> y", **FACTS)
    with pytest.raises(ConfigError, match="one: promises must be Promises"):
        Registry().register("one", promises={"any_mask": False}, **FACTS)


def test_an_entry_names_the_files_in_which_it_is_written() -> None:
    assert ph.entry("moh").files == (
        "mechanisms/moh.py",
        "nn/routed_heads.py",
        "nn/routed_output.py",
        "nn/head_routers.py",
    )
    assert ph.entry("mha").files == ("mechanisms/multi_head.py", "nn/attention.py")
    assert ph.entry("moba").files == ("mechanisms/moba.py",)


def test_files_that_are_common_to_mechanisms_are_those_that_more_than_eight_are_made_of() -> None:
    count = Counter(name for entry in ph.catalog() for name in modules_of(entry.example()))
    assert {name for name, many in count.items() if many > 8} == COMMON


def test_filters() -> None:
    sharing = names(family="sharing")
    assert {"grouped_query", "multi_query", "sparse_query"} <= set(sharing)
    assert "mha" not in sharing
    assert names(paper="74") == names(paper="074") == ["grouped_query"]
    assert names(paper="999") == []
    every = names(supports=["causal_cross", "self"])
    assert every == [e.name for e in ph.catalog() if {"causal_cross", "self"} <= e.supports]
    assert names(supports="cross") == [e.name for e in ph.catalog() if "cross" in e.supports]
    both = set(names(distribution=("softmax", "sigmoid")))
    assert both == set(names(distribution="softmax")) | set(names(distribution="sigmoid"))
    assert names(family="sharing", supports="cross", kv_bytes="<512", alignment="scaled_dot").count(
        "multi_query"
    )


def test_kv_bytes_are_those_of_the_reference_size() -> None:
    assert {k: CATALOGUE_SIZE[k] for k in ("dim", "heads", "dtype")} == {
        "dim": 512,
        "heads": 8,
        "dtype": torch.float16,
    }
    assert ph.entry("mha").cost.kv_bytes_per_token == 2 * 512 * 2
    assert "mha" in names(kv_bytes="=2048")
    assert "mha" in names(kv_bytes=" >= 2048 ")
    assert "mha" in names(kv_bytes="<=2048")
    assert "mha" not in names(kv_bytes="<2048")
    assert "mha" not in names(kv_bytes=">2048")
    small, large = set(names(kv_bytes="<300")), set(names(kv_bytes=">=300"))
    assert small
    assert large
    assert not small & large
    assert small | large == set(names())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"family": "sharin"},
            r"family must be one of .*sharing.*; got 'sharin' \(str\); did you mean 'sharing'",
        ),
        ({"family": ("plain", "sharing")}, "family must be one of .*plain"),
        (
            {"supports": "causal"},
            "supports must be one of causal_cross, causal_self, cross, self; got 'causal'",
        ),
        ({"supports": ()}, "supports must be one of"),
        ({"supports": 3}, r"supports must be one of .* got 3 \(int\)"),
        ({"paper": 74}, "paper must be the number of a paper, such as '074'; got 74"),
        ({"paper": "GQA"}, "paper must be the number of a paper"),
        (
            {"kv_bytes": "128"},
            "kv_bytes must be one of <, <=, >, >=, = and a number of bytes, such as '<512'",
        ),
        ({"kv_bytes": 128}, r"kv_bytes must be .* got 128 \(int\)"),
        ({"kv_bytes": "<few"}, "kv_bytes must be"),
        (
            {"alignment": "dots"},
            "alignment must be one of activated_general, .*; got 'dots'.*did you mean 'dot'",
        ),
        ({"cache": "big"}, "cache must be one of constant, growing, none; got 'big'"),
    ],
)
def test_a_filter_that_makes_no_sense_says_what_does(asked: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ph.catalog(**asked)


def lines(steps: tuple[Step, ...]) -> list[str]:
    return [str(step) for step in steps]


@pytest.mark.parametrize("name", names())
def test_every_entry_has_a_picture_that_ends_in_y(name: str) -> None:
    flow = ph.entry(name).flow
    assert flow.queries[0].name == "x"
    assert flow.joined[-1].name == "y"
    assert flow.keys or ph.entry(name).promises.tokenwise


def test_a_picture_shows_the_parts_that_a_module_has() -> None:
    module = ph.build(
        "grouped_query",
        dim=64,
        heads=8,
        kv_heads=2,
        qk_norm=True,
        position=ph.nn.rope(),
        score=(ph.soft_cap(30.0), ph.alibi(8)),
        normalizer=ph.entmax(1.5),
        mask=ph.window(7),
        device="meta",
    )
    flow = flow_of(module)
    assert lines(flow.queries)[0] == "x: (L, 64)"
    assert flow.queries[1].name == "projection"
    assert flow.queries[1].what.startswith(
        "query: 64 → 8 heads of 8\nquery_norm: HeadNorm (RMS normalisation"
    )
    assert re.match(r"position: Rope\(", str(flow.queries[2]))
    made = flow.keys[1].what.splitlines()
    assert made[:2] == ["key: 64 → 2 heads of 8", "value: 64 → 2 heads of 8"]
    assert lines(flow.keys)[-1] == "cache: 2 × 8 + 2 × 8 numbers a token"
    kinds = [step.name for step in flow.joined]
    assert kinds == ["scores", "score map", "score map", "mask", "normaliser", "values", "output", "y"]
    assert "k of head h // 4" in flow.joined[0].what
    assert "window(7)" in flow.joined[3].what
    assert "alpha=1.5" in flow.joined[4].what
    assert lines(flow.joined)[-2:] == ["output: 8 heads of 8 → 64", "y: (L, 64)"]
    assert not flow.others


class Gain(torch.nn.Module):
    """Scales the heads."""

    acts_on = "heads"


class WithParts(MultiHeadAttention):
    """Has a part that says where it stands, and a table that does not."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.gain = Gain()
        self.table = torch.nn.Parameter(torch.zeros(3, 4))

    def _mix(self, q, rows, **options):
        return super()._mix(q, rows, **options)


def test_a_part_that_is_not_known_stands_where_it_says_or_among_the_others() -> None:
    flow = flow_of(WithParts(ph.nn.Projection(16, 2)))
    kinds = [step.name for step in flow.joined]
    assert kinds.index("gain") == kinds.index("values") + 1
    assert str(flow.joined[kinds.index("gain")]) == "gain: Gain (Scales the heads)"
    table, own = lines(flow.others)
    assert table == "table: learned, 3 × 4"
    assert own.startswith("WithParts (Has a part")
    assert own.endswith("in its own way, how its heads attend")


def test_an_entry_may_draw_its_picture_itself() -> None:
    registry = Registry()
    picture = Flow((Step("x"),), (Step("c"),), (Step("y"),))

    class DrawnByHand(AttentionConfig):
        """For this test."""

        def build(self, *, device=None, dtype=None):
            return self.assemble(heads=self.heads, kv_heads=1, device=device, dtype=dtype)

    registry.register("drawn", picture=picture, facets=Facets(positions="local"), **FACTS)(DrawnByHand)
    entry = registry.entry("drawn")
    assert entry.flow is picture
    assert entry.facets.positions == "local"


def test_a_picture_shows_weight_maps_and_parts_that_know_their_place() -> None:
    flow = ph.entry("talking_heads").flow
    kinds = [step.name for step in flow.joined]
    assert kinds.index("scores") < kinds.index("logit_mixing") < kinds.index("normaliser")
    assert kinds.index("normaliser") < kinds.index("weight_mixing") < kinds.index("values")
    assert "latent" in ph.entry("multi_head_latent").flow.keys[1].what
    assert "auxiliary" not in str(ph.entry("moh").flow)
