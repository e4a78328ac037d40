"""Sizes that meet a budget, for every mechanism of the catalogue."""

from __future__ import annotations

import re

import pytest
import torch

import polyhead as ph
from flops import counting
from polyhead.errors import ConfigError, UnknownName, UnsupportedPattern
from polyhead.league import Sizes, contender, plan
from polyhead.league.budget import Counted, Fitted, fit, target_of
from polyhead.league.tasks import Task, find

CAUSAL = [e.name for e in ph.catalog() if "causal_self" in e.supports]
PLAIN = [e.name for e in ph.catalog() if "self" in e.supports]
RECALL, RELATIONAL = find("recall"), find("relational")


def fitted(task: Task, name: str, budget: str, limit: int | None = None) -> tuple[Fitted, Counted]:
    target = target_of(task, task.sizes, budget, limit)
    return fit(task, contender(name), task.sizes, budget, target), target


@pytest.mark.parametrize("budget", ["params", "flops"])
@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_mechanism_meets_the_budget(name: str, budget: str) -> None:
    found, target = fitted(RECALL, name, budget)
    assert abs(getattr(found.counted, budget) / getattr(target, budget) - 1) <= 0.01
    model = found.model(RECALL)
    assert sum(p.numel() for p in model.parameters()) == found.counted.params


@pytest.mark.parametrize("name", PLAIN)
def test_every_mechanism_that_looks_both_ways_meets_the_budget(name: str) -> None:
    found, target = fitted(RELATIONAL, name, "params")
    assert abs(found.counted.params / target.params - 1) <= 0.01
    batch = RELATIONAL.batch("train", 0, 4, 0)
    assert found.model(RELATIONAL)(batch).shape == (4, 2)


@pytest.mark.parametrize(
    "name",
    [
        "mha",
        "grouped_query:kv_heads=2",
        "multi_query",
        "sparse_query",
        "moh",
        "dynamically_composable",
        "talking_heads",
    ],
)
def test_the_cache_is_met_exactly(name: str) -> None:
    found, target = fitted(RECALL, name, "kv")
    assert found.counted.kv == target.kv
    model = found.model(RECALL)
    small, large = (model.stack.new_cache(1, max_length=count).nbytes() for count in (32, 64))
    assert large - small == 32 * target.kv  # what the tensors of real caches take


def test_fewer_key_value_heads_get_wider_ones_for_the_same_cache() -> None:
    found, _ = fitted(RECALL, "grouped_query:kv_heads=1", "kv")
    assert found.layers[0].options["head_dim"] == 64
    assert found.sizes.dim < RECALL.sizes.dim  # in a narrower model, where they leave something for the MLPs


@pytest.mark.parametrize(
    ("name", "options", "off"),
    [
        (
            "el_attention",
            {"head_dim": 10},
            0.01,
        ),  # its cache goes by the width of the model
        (
            "efficient_attention",
            {"head_dim": 32},
            0.35,
        ),  # heads of its own width alone
        ("multi_head_latent", {"head_dim": 32}, 1.6),  # 3.45 at the width of the league
        ("multi_query", {"head_dim": 64}, 0.01),
        ("moh", {"head_dim": 16}, 0.01),
    ],
)
def test_a_cache_is_met_with_parameters_as_near_as_they_can_be(
    name: str, options: dict[str, int], off: float
) -> None:
    found, target = fitted(RECALL, name, "kv")
    assert found.counted.kv == target.kv
    assert abs(found.counted.params / target.params - 1) <= off
    assert found.layers[0].options.items() >= options.items()


def test_the_width_of_the_league_is_kept_where_parameters_are_near_enough() -> None:
    found, target = fitted(RECALL, "self_gate", "kv")
    assert found.sizes.dim == RECALL.sizes.dim
    assert 0.01 < abs(found.counted.params / target.params - 1) <= 0.1


@pytest.mark.parametrize(
    ("task", "name"), [(RELATIONAL, "mha"), (RECALL, "mha"), (RECALL, "hierarchical_self_attention")]
)
def test_operations_are_those_that_torch_counts(task: Task, name: str) -> None:

    found, target = fitted(task, name, "flops")
    assert name != "mha" or found.counted == target
    model, batch = found.model(task).eval(), task.batch("train", 0, 1, 0)
    with counting() as counter, torch.no_grad():
        model(batch)
    left_out = 0 if batch.asked is None else int((~batch.asked).sum())  # tokens that are not read out
    read_out = 2 * found.sizes.dim * task.outputs
    assert counter.get_total_flops() == found.counted.flops - left_out * read_out


def test_a_number_in_place_of_plain_attention() -> None:
    found, _ = fitted(RECALL, "mha", "params", 100_000)
    assert abs(found.counted.params - 100_000) <= 1000


@pytest.mark.parametrize(
    ("name", "budget", "limit", "message"),
    [
        ("mha", "params", 100, r"mha: no size has 100 parameters within 1 %; the nearest has [\d,]+"),
        ("mha", "kv", 7, "no size has 7 bytes of KV cache a token exactly"),
        ("mha", "flops", 10**15, "no size has"),
    ],
)
def test_a_budget_that_no_size_meets(name: str, budget: str, limit: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fitted(RECALL, name, budget, limit)


def test_refusals() -> None:
    with pytest.raises(UnknownName, match="no budget is called 'parms'; did you mean 'params'"):
        plan(["mha"], "recall", budget="parms")
    with pytest.raises(
        UnsupportedPattern, match="super_attention does not support causal_self, which the task recall"
    ):
        plan(["super_attention"], "recall")
    with pytest.raises(ConfigError, match="grouped_query has no option 'kv_head'; did you mean 'kv_heads'"):
        plan(["grouped_query:kv_head=2"], "recall")
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4"):
        plan(["grouped_query:kv_heads=3"], "recall")
    with pytest.raises(ConfigError, match="dim is solved for"):
        plan(["mha:dim=32"], "recall")
    with pytest.raises(ConfigError, match="mha is named more than once"):
        plan(["mha", "moh", "mha"], "recall")
    with pytest.raises(ConfigError, match="contenders must be names of mechanisms"):
        plan([], "recall")
    with pytest.raises(ConfigError, match="budget: params must be at least 1"):
        plan(["mha"], "recall", limit=0)
    with pytest.raises(ConfigError, match="seeds must be at least 1"):
        plan(["mha"], "recall", seeds=0)
    for device in ("tpuu", "meta", "mps"):
        with pytest.raises(ConfigError, match="device must be cpu or cuda"):
            plan(["mha"], "recall", device=device)
    for option in ("device=cpu", "dtype=float32", "name=moh"):
        with pytest.raises(ConfigError, match="is no option of a contender; leave it out"):
            plan([f"mha:{option}"], "recall")
    with pytest.raises(ConfigError, match="in an order; got"):
        plan({"mha", "moh"}, "recall")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="threads must be at most 1024"):
        plan(["mha"], "recall", threads=10**12)


@pytest.mark.parametrize(
    ("one", "other"),
    [("gqa", "grouped_query"), ("mha", "mha:heads=4"), ("mha:dropout=0.0", "mha"), ("mha+mha", "mha")],
)
def test_one_model_under_two_names_is_refused(one: str, other: str) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"{one} and {other} are one mechanism with the same options")
    ):
        plan([one, "moh", other], "recall")


def test_contenders_may_come_one_by_one() -> None:
    settled = plan((name for name in ("mha", "moh")), "recall")  # type: ignore[arg-type]
    assert [one.contender.label for one in settled.contenders] == ["mha", "moh"]


def test_layers_take_turns() -> None:
    settled = plan(["mha+grouped_query:kv_heads=1"], "recall", sizes=Sizes(64, 4, 3))
    model = settled.contenders[0].model(RECALL)
    assert [type(layer.config).__name__ for layer in model.stack.attention] == [
        "MultiHead",
        "GroupedQuery",
        "MultiHead",
    ]


def test_mechanisms_that_would_not_come_into_a_layer_are_refused() -> None:
    assert plan(["mha+moh"], "recall").contenders
    with pytest.raises(ConfigError, match=r"^mha\+moh\+taylor2: 3 mechanisms take turns in 2 layer"):
        plan(["mha+moh+taylor2"], "recall")


def test_heads_may_differ_from_the_league() -> None:
    (found,) = plan(["mha:heads=8"], "recall").contenders
    assert found.model(RECALL).stack.attention[0].config.heads == 8  # type: ignore[union-attr]


def test_positions_are_what_a_mechanism_takes() -> None:
    def positions(task: str, name: str) -> str:
        return plan([name], task).contenders[0].layers[0].positions

    assert positions("recall", "mha") == "alibi"
    assert positions("recall", "tensor_attention") == "rotary"
    assert positions("copy", "mha") == "rotary"
    assert positions("copy", "mha:position=no_position()") == "own"
    assert positions("copy", "gaussian_adaptive") == "sinusoidal"
    assert positions("relational", "mha") == "learned"
    assert positions("nearest", "mha") == "none"
