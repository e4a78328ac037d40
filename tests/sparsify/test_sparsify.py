"""`polyhead sparsify` on a small model of one's own: what it measures, writes, keeps, and refuses."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache
from typer.testing import CliRunner

import polyhead as ph
from polyhead import hf
from polyhead.cli import app
from polyhead.errors import ConfigError, PolyheadError, UnknownName
from polyhead.folder import read
from polyhead.sparsify import job
from polyhead.sparsify.counting import keys_seen
from polyhead.sparsify.levels import Heard, listen, solve
from polyhead.sparsify.methods import METHODS, Method, find
from polyhead.sparsify.reading import Case, Counting, reading
from polyhead.sparsify.settings import Settings
from polyhead.sparsify.table import Comparison, Row
from polyhead.sparsify.timing import Round, Taken, measure
from polyhead.sparsify.trials import Found, Outcome, Trial
from report import small_models

QUIET = Console(quiet=True)
SIZE = {"lengths": (352, 448), "facts": 2, "rounds": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_models.llama(tmp_path_factory.mktemp("llama"), hidden_size=16, intermediate_size=16))


@pytest.fixture(scope="module")
def settings(model: str) -> Settings:
    return Settings(model, ("a_shape", "mean_keys"), shares=(0.3,), lengths=(352, 448), facts=2, missed=256)


@pytest.fixture(scope="module")
def loaded(model: str) -> Any:
    return hf.load(model)


@pytest.fixture(scope="module")
def folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sparsify") / "out"
    job.run(model, methods=("a_shape", "block_oracle"), shares=(0.3, 0.6), out=out, console=QUIET, **SIZE)
    return out


def drawn(heads: int, rows: int, cols: int, first: int = 30) -> ph.Mask:
    """Some blocks of 100 keys for 70 queries, -1 between them."""
    ranks = torch.rand(2, heads, -(-70 // rows), -(-100 // cols), generator=torch.Generator().manual_seed(0))
    index = ranks.argsort(-1)[..., :5]
    return ph.chosen(index.masked_fill(index % 3 == 0, -1), rows=rows, cols=cols, first=first)


@pytest.mark.parametrize(
    "mask",
    [
        *(None, ph.causal(), ph.causal() & ph.window(9), ph.sink(3)),
        *(ph.causal() & drawn(3, 16, 8), drawn(1, 1, 1) & ph.causal(), ph.causal() & drawn(1, 16, 8, 40)),
        *(drawn(3, 16, 8), ph.causal() & ph.window(20) & drawn(3, 16, 8)),
    ],
)
def test_keys_are_counted_as_they_are(mask: ph.Mask | None) -> None:
    found = keys_seen(mask, batch=2, heads=3, queries=70, keys=100)
    b, h = torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None]
    i, j = torch.arange(30, 100)[:, None], torch.arange(100)
    seen = torch.ones(70, 100, dtype=torch.bool) if mask is None else mask.allowed(b, h, i, j)
    assert torch.equal(found, seen.expand(2, 3, 70, 100).sum(-1).float())


IDS = torch.randint(2, 600, (1536,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def heard(loaded: Any) -> Heard:
    return listen(loaded.model, IDS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reads_more_at_a_higher_level_and_meets_a_share(name: str, heard: Heard) -> None:
    # less_is_more reads everything in one of the two layers
    low, high = (0.6, 0.8) if name == "less_is_more" else (0.25, 0.6)
    less, more = (solve(METHODS[name], share, heard) for share in (low, high))
    assert less[0] < more[0]
    # one head ranks for all, so that whole rows of blocks come and go together
    near = {"proxy_attn": 0.035, "vertical_slash": 0.025}.get(name, 0.02)
    assert less[1] == pytest.approx(low, abs=near)
    assert more[1] == pytest.approx(high, abs=near)


@pytest.mark.parametrize("name", ["mean_keys", "less_is_more", "long_heads"])
def test_the_share_at_a_level_is_what_the_model_reads_there(name: str, heard: Heard, loaded: Any) -> None:
    level, share = solve(METHODS[name], 0.6, heard)
    counting = Counting(METHODS[name].reader(level, heard.case), 2)
    with torch.no_grad(), reading(loaded.model, counting):
        loaded.model(IDS[None], use_cache=False)
    assert counting.read.sum() / sum(heard.seen) == pytest.approx(
        share, abs=1e-6 if name != "mean_keys" else 0.01
    )
    assert sum(heard.seen) == 2 * 4 * 1536 * 1537 / 2


def test_what_is_known_of_keys_is_kept_as_it_is_under_sparse(loaded: Any) -> None:
    from transformers import DynamicCache

    reader = METHODS["mean_keys"].reader(0.3, Case.of(loaded.model, 600))
    cache = DynamicCache(config=loaded.model.config)
    with torch.no_grad(), reading(loaded.model, reader):
        loaded.model(IDS[None, :600], past_key_values=cache)
        loaded.model(IDS[None, 600:601], past_key_values=cache)
    known = reader._selecting.kept._known
    assert len(known) == len(cache.layers)
    assert all(known[layer].summaries.nbytes() > 0 for layer in cache.layers)


def test_layers_that_are_not_kept_read_as_those_between_them(tmp_path: Path) -> None:
    deep = hf.load(
        str(small_models.llama(tmp_path, num_hidden_layers=8, hidden_size=16, intermediate_size=16))
    )
    ids = IDS[:448]
    every = listen(deep.model, ids)
    some = listen(deep.model, ids, held=3 * 448 * 6 * 4 * 4)  # of three layers
    assert [call.layer.index for call in every.calls] == list(range(8))
    assert [call.layer.index for call in some.calls] == [1, 4, 6]
    assert some.seen == every.seen
    # all layers of a_shape read alike, less_is_more reads everything in the first three
    for name in ("a_shape", "less_is_more"):
        followed = METHODS[name].reader(1.0, every.case).followed
        assert followed == (frozenset() if name == "a_shape" else {2})
        own = listen(deep.model, ids, held=3 * 448 * 6 * 4 * 4, followed=followed)
        assert solve(METHODS[name], 0.7, own) == pytest.approx(solve(METHODS[name], 0.7, every))
    assert len(listen(deep.model, ids, held=1).calls) == 1


def test_a_share_is_that_of_the_keys_that_are_read(loaded: Any, settings: Settings) -> None:
    trial = Trial(loaded.model, loaded.tokenizer, settings)
    dense = trial.run(None, None, lambda: None)
    tokens = 448 - 96
    assert dense.read[448] == 2 * 2 * 4 * tokens * (tokens + 1) / 2  # texts, layers, heads, causal pairs
    own = trial.run(METHODS["a_shape"], 0.1, lambda: None)
    assert own.read[448] < dense.read[448]
    assert dense.missed == 0 < own.missed <= own.missed_head <= 1
    assert len(own.found) == 2 * 2 * 2
    assert {f.alike for f in own.found} == {True, False}


def test_a_fact_is_found_when_every_token_of_the_answer_is_the_likeliest(
    loaded: Any, settings: Settings
) -> None:
    trial = Trial(loaded.model, loaded.tokenizer, settings)
    hidden, _ = trial._texts[352][0]
    one = hidden.asked[0]
    cache = DynamicCache(config=loaded.model.config)
    with torch.no_grad():
        loaded.model(torch.tensor([hidden.text]), past_key_values=cache)
        fed, said = list(one.tail[: -one.answer]), []
        own = DynamicCache(config=loaded.model.config)
        loaded.model(torch.tensor([hidden.text]), past_key_values=own)
        for _ in range(3):
            said.append(int(loaded.model(torch.tensor([fed]), past_key_values=own).logits[0, -1].argmax()))
            fed = [said[-1]]
        before = cache.get_seq_length()
        tail = one.tail[: -one.answer]
        assert trial._said((*tail, *said), 3, cache)
        assert not trial._said((*tail, *said[:2], (said[2] + 1) % 600), 3, cache)
        assert cache.get_seq_length() == before


def test_the_folder_is_complete(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    assert names == {
        *("settings.json", "levels.json", "trials", "times.json"),
        *("results.json", "results.csv", "pareto.svg", "sparsify.html", "README.md"),
    }
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["method"] for row in rows] == ["dense", *["a_shape"] * 2, *["block_oracle"] * 2]
    assert [row["prefill faster"] != "" for row in rows] == [True, True, True, False, False]
    assert all(math.isfinite(float(row["nats"])) for row in rows)
    data = json.loads((folder / "results.json").read_text())
    assert len(data["rows"][0]["rounds"]) == 1
    ElementTree.parse(folder / "pareto.svg")
    table = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5
    assert len({line.count("|") for line in table}) == 1


def test_the_page_stands_alone(folder: Path) -> None:
    page = (folder / "sparsify.html").read_text()
    assert "a_shape 0.3" in page
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


def test_it_goes_on_where_it_was_cut_off(folder: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(folder / "results.json")["rows"]
    levels = [one["level"] for one in read(folder / "levels.json") if one["method"] == "a_shape"]
    (folder / "trials" / f"a_shape.0.3.at.{levels[0]:.12g}.json").unlink()
    tried = []
    run = Trial.run

    def noted(self: Trial, method: Method | None, level: float | None, told: Any) -> Outcome:
        tried.append((method and method.name, level))
        return run(self, method, level, told)

    monkeypatch.setattr(Trial, "run", noted)
    monkeypatch.setattr(job, "solve", lambda *a: pytest.fail("shares were matched before"))
    monkeypatch.setattr(job, "measure", lambda *a, **k: pytest.fail("times were taken before"))
    job.run(model, methods=("a_shape", "block_oracle"), shares=(0.3, 0.6), out=folder, console=QUIET, **SIZE)
    assert len(tried) == 1
    assert tried[0][0] == "a_shape"
    monkeypatch.undo()
    more = job.run(model, methods=("a_shape",), shares=(0.3, 0.9), out=folder, console=QUIET, **SIZE)
    labels = [row["method"] and f"{row['method']} {row['share']}" for row in before]
    assert [row.label for row in more.rows] == ["dense", *labels[1:3], "a_shape 0.9", *labels[3:]]
    assert more.shares == [0.3, 0.6, 0.9]
    assert "<dd>0.3, 0.6, 0.9</dd>" in (folder / "sparsify.html").read_text()
    assert "1 round, with" in (folder / "README.md").read_text()
    job.run(model, methods=("a_shape", "block_oracle"), shares=(0.3, 0.6), out=folder, console=QUIET, **SIZE)
    rows = read(folder / "results.json")["rows"]
    assert rows.pop(3)["share"] == 0.9
    assert rows[1:] == before[1:]


def test_what_an_earlier_version_kept_is_used_at_its_level_only(
    folder: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = shutil.copytree(folder, tmp_path / "old")
    # other tests add shares to the folder
    levels, times = (
        [one for one in read(old / name) if one["share"] < 0.9] for name in ("levels.json", "times.json")
    )
    before = {(one["method"], one["share"]): one["level"] for one in levels}
    before["a_shape", 0.6] /= 2  # matched on other layers
    for file in (old / "trials").glob("*.at.*"):
        kept = json.loads(file.read_text())
        name, share = file.name.split(".at.")[0].split(".", 1)
        if (name, float(share)) in before:
            kept["level"] = before[name, float(share)]
            file.with_name(f"{name}.{share}.json").write_text(json.dumps(kept))
        file.unlink()
    (old / "levels.json").write_text(json.dumps([[*pair, level] for pair, level in before.items()]))
    old_times = [[one["method"], one["share"], one["rounds"]] for one in times]
    (old / "times.json").write_text(json.dumps(old_times))
    names = {file.name for file in (old / "trials").iterdir()}
    tried, timed = [], []
    run = Trial.run

    def noted(self: Trial, method: Method | None, level: float | None, told: Any) -> Outcome:
        tried.append((method and method.name, level))
        return run(self, method, level, told)

    monkeypatch.setattr(Trial, "run", noted)
    monkeypatch.setattr(job, "measure", lambda *a, **k: timed.append(a[1:]) or Taken(1.0, 1.0, None))
    job.run(model, methods=("a_shape", "block_oracle"), shares=(0.3, 0.6), out=old, console=QUIET, **SIZE)
    own = next(one["level"] for one in levels if (one["method"], one["share"]) == ("a_shape", 0.6))
    assert tried == [("a_shape", own)]
    assert timed == [(None, None), ("a_shape", own)]
    assert {file.name for file in (old / "trials").iterdir()} == {*names, f"a_shape.0.6.at.{own:.12g}.json"}
    assert [one for one in read(old / "levels.json") if isinstance(one, dict)] == levels
    assert {(one["method"], one["share"], one["level"]) for one in read(old / "times.json")} == {
        *((name, share, level) for (name, share), level in before.items() if name == "a_shape"),
        ("a_shape", 0.6, own),
    }


def test_the_dense_model_is_timed_before_every_other_method(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str | None] = []

    def measured(_: str, name: str | None, level: float | None, **size: int) -> Taken:
        timed.append(name)
        return Taken(float(len(timed)), 1.0, None)

    monkeypatch.setattr(job, "measure", measured)
    methods = ("a_shape", "mean_keys", "prism")
    small = SIZE | {"shares": (0.3,), "rounds": 2}
    found = job.run(model, methods=methods, out=tmp_path / "out", console=QUIET, **small)
    assert timed == 2 * [None, "a_shape", "mean_keys", None, "prism"]
    of = {row.method: [(one.own.prefill, one.dense.prefill) for one in row.rounds] for row in found.rows}
    assert of["mean_keys"] == [(3, 1), (8, 6)]
    assert of["prism"] == [(5, 4), (10, 9)]
    assert sorted(of[""]) == [(n, n) for n in (1, 4, 6, 9)]


def test_what_methods_of_files_gave_is_kept_by_what_the_files_say(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float | None] = []
    run = Trial.run

    def noted(self: Trial, method: Method | None, level: float | None, told: Any) -> Outcome:
        tried.append(method and method.make(0.5, Case(None, (), 100)).budget.share)
        return run(self, method, level, told)

    def written(folder: str, share: float, more: str = "") -> str:
        file = tmp_path / folder / "near.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            f"import polyhead as ph{more}\n"
            "from polyhead.sparsify.methods import Method\n"
            "def make(level, case):\n"
            f"    return ph.select(ph.mean_keys(), ph.keep_share({share} * level), rows=32, cols=32)\n"
            'METHOD = Method("near", "what is near", "", make)\n'
        )
        return str(file)

    monkeypatch.setattr(Trial, "run", noted)
    own = {"shares": (0.4,), "out": tmp_path / "out", "console": QUIET, **SIZE, "rounds": 0}
    a, b = written("a", 1.0), written("b", 0.5)
    found = job.run(model, methods=(a, b), **own)
    assert tried == [None, 0.5, 0.25]
    first, second = (row.method for row in found.rows[1:])
    assert first != second
    assert re.fullmatch(r"near\.[0-9a-f]{8}", first)
    tried.clear()
    written("a", 1.0, "  # a comment")
    job.run(model, methods=(a, b), **own)
    assert tried == []
    more = job.run(model, methods=(a,), **own | {"shares": (0.7,)})  # of b, which it does not name, no row
    assert [(row.method, row.share) for row in more.rows] == [("", 1.0), (first, 0.4), (first, 0.7)]
    tried.clear()
    written("a", 0.75)
    changed = job.run(model, methods=(a,), **own)
    assert tried == [0.375]
    assert changed.rows[1].method not in (first, second)
    with pytest.raises(ConfigError, match="two files of .* are the same"):
        job.run(model, methods=(b, written("c", 0.5)), **own)


def test_a_file_that_changes_on_the_way_is_told(model: str, tmp_path: Path, settings: Settings) -> None:
    file = tmp_path / "near.py"
    text = (
        "import polyhead as ph\nfrom polyhead.sparsify.methods import METHODS\nMETHOD = METHODS['a_shape']\n"
    )
    file.write_text(text)
    chosen = job.Chosen.of(replace(settings, methods=(str(file),)))
    (name,) = chosen.methods
    assert chosen.same(name) == str(file)
    file.write_text(text.replace("a_shape", "prism"))
    with pytest.raises(PolyheadError, match="has changed since the command began"):
        chosen.same(name)


def test_a_file_that_is_no_trial_is_told(folder: Path, model: str, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / "trials" / "dense.json").write_text('{"level": null}')
    with pytest.raises(PolyheadError, match=r"dense.json is not what came out of a trial .* remove it"):
        job.run(model, methods=("a_shape",), shares=(0.3,), out=copied, console=QUIET, **SIZE)


def test_a_method_of_ones_own(model: str, tmp_path: Path) -> None:
    file = tmp_path / "near.py"
    file.write_text(
        "import polyhead as ph\n"
        "from polyhead.sparsify.methods import Method\n"
        "def make(level, case):\n"
        "    return ph.a_shape(1, max(1, round(level * case.tokens)), rows=32, cols=32)\n"
        'METHOD = Method("near", "what is near", "", make)\n'
    )
    found = job.run(
        model,
        methods=(str(file),),
        shares=(0.5,),
        out=tmp_path / "out",
        console=QUIET,
        **SIZE | {"rounds": 0},
    )
    assert found.read(found.rows[1], 448) == pytest.approx(0.5, abs=0.05)
    (tmp_path / "none.py").write_text("METHOD = 3")
    (tmp_path / "broken.py").write_text("1 / 0")
    for name, message in (
        ("none.py", "must define METHOD"),
        ("broken.py", "cannot be run: ZeroDivisionError"),
        ("missing.py", "there is no file"),
    ):
        with pytest.raises(ConfigError, match=message):
            find(str(tmp_path / name))


def test_a_method_that_goes_by_past_queries_reads_on_in_several_ways(loaded: Any, settings: Settings) -> None:
    trial = Trial(loaded.model, loaded.tokenizer, settings)
    dense = trial.run(None, None, lambda: None)
    every = trial.run(METHODS["triangle_spans"], 1.0, lambda: None)
    assert every.read == dense.read
    assert every.found == dense.found
    assert every.nats == pytest.approx(dense.nats, abs=1e-4)
    some = trial.run(METHODS["triangle_spans"], 0.3, lambda: None)
    assert all(some.read[n] < dense.read[n] for n in dense.read)
    again = Trial(loaded.model, loaded.tokenizer, settings).run(METHODS["triangle_spans"], 0.3, lambda: None)
    assert again == some  # whatever was asked before


def test_a_method_with_positions_of_its_own_reads_on_where_the_text_ends(
    loaded: Any, settings: Settings
) -> None:
    trial = Trial(loaded.model, loaded.tokenizer, settings)
    dense = trial.run(None, None, lambda: None)
    every = trial.run(METHODS["long_heads"], 1.0, lambda: None)
    assert every.read == dense.read
    assert every.found == dense.found
    assert every.nats == pytest.approx(dense.nats, abs=1e-4)
    own = trial.run(METHODS["long_heads"], 0.25, lambda: None)
    tokens, length = 352, 16 * 6
    places = torch.arange(tokens)
    chunks = (places // 6).clamp(max=15) * 6 + places % 6 + 1
    assert own.read[448] == 2 * 2 * 4 * int(chunks.sum())
    assert length < tokens
    assert own.missed is own.missed_head is None
    assert Outcome.from_json(json.loads(json.dumps(own.to_json()))) == own


def test_of_all_methods_those_are_left_out_that_the_model_cannot_be_read_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(small_models.gpt2(tmp_path / "gpt2"))
    kept = {name: METHODS[name] for name in ("a_shape", "long_heads")}
    monkeypatch.setattr(job, "METHODS", kept)
    told = Console(record=True, width=200)
    small = SIZE | {"shares": (0.5,), "rounds": 0, "out": tmp_path / "out", "console": told}
    found = job.run(folder, **small)
    assert [row.label for row in found.rows] == ["dense", "a_shape 0.5"]
    assert "left out: long_heads: long_heads: the model's config names no rope" in told.export_text()
    with pytest.raises(ConfigError, match="names no rope_parameters"):
        job.run(folder, methods=("a_shape", "long_heads"), **small)


def outcome(right: str, nats: float = 1.0, read: float = 10.0) -> Outcome:
    found = tuple(Found(False, 448, n / len(right), c == "y", c == "y") for n, c in enumerate(right))
    return Outcome(None, {448: read}, found, nats, 0.0, 0.0)


def row(method: str, right: str, seconds: float | None, nats: float = 1.0) -> Row:
    rounds = () if seconds is None else (Round(Taken(seconds, seconds / 10, None), Taken(8.0, 0.8, None)),)
    return Row(method, 0.1 if method else 1.0, outcome(right, nats), rounds)


def test_the_best_is_the_fastest_that_keeps_what_dense_finds(settings: Settings) -> None:
    own = replace(settings, methods=("a_shape", "mean_keys", "prism"), lengths=(448,))
    methods = {name: find(name) for name in own.methods}
    dense = row("", "yyny", 8.0)

    def best(*rows: Row) -> str | None:
        found = Comparison(own, methods, (dense, *rows), "").best
        return found and found.method

    # a lost fact, and one that dense does not find
    assert best(row("a_shape", "yyyn", 1.0), row("prism", "yyyy", 4.0)) == "prism"
    assert best(row("a_shape", "yyny", 4.0), row("prism", "yyny", 2.0)) == "prism"
    assert best(row("a_shape", "yyny", 4.0), row("prism", "yyny", 2.0, nats=1.03)) == "a_shape"
    assert best(row("a_shape", "yyny", 9.0)) is None
    assert best(row("a_shape", "yyny", None)) is None
    made = Comparison(own, methods, (dense, row("prism", "yyyy", 4.0)), "")
    assert made.kept(made.rows[1]) == (3, 3)
    assert "prefill of 448 tokens 2.00 times as fast" in made.verdict()
    assert made.records()[1]["prefill faster"] == 2.0
    assert "3 facts leave open that up to 56% of others are lost" in made.verdict()
    blind = replace(made, rows=(row("", "nnnn", 8.0), row("prism", "yyyy", 4.0)))
    assert "The dense model finds no fact" in blind.verdict()
    assert "Times are medians of 1 round, with" in made.to_markdown()
    assert "Times" not in replace(made, rows=(dense, row("prism", "yyyy", None))).to_markdown()
    assert "be they others" not in made.verdict()
    made = Comparison(own, methods, (dense, row("prism", "yyyy", 4.0), row("a_shape", "nyyy", 2.0)), "")
    assert made.best is made.rows[1]
    assert "as many facts as dense, be they others: a_shape 0.1, 4.00 x" in made.verdict()
    fewer = replace(made, rows=(dense, row("prism", "yyyy", 4.0), row("a_shape", "nnyy", 2.0)))
    assert "be they others" not in fewer.verdict()


def run(model: str, *options: object) -> str:
    found = CliRunner().invoke(app, ["sparsify", model, *map(str, options)])
    assert found.exit_code != 0
    lines = [line for line in found.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, found.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "prisma"), "no method is called 'prisma'; did you mean 'prism'"),
        (("--shares", "much"), "--shares takes numbers, such as 0.1,0.25; got 'much'"),
        (("--shares", "1.0"), "shares must be below 1"),
        (("--shares", "0.2,0.2"), "shares must be some values, each once"),
        (("--lengths", "64"), "lengths must be at least 544, to hide 8 facts in"),
        (("--lengths", "4096"), "lengths: the model reads 512 tokens; got 4,096"),
        (("--facts", "9"), "facts"),
        ((), "lengths: the model reads 512 tokens, less than the least default"),
    ],
)
def test_bad_input_is_told_before_anything_is_tried(
    options: tuple[str, ...], message: str, model: str, tmp_path: Path
) -> None:
    assert message in run(model, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    folder = small_models.bert(tmp_path / "bert")
    assert "is no causal language model" in run(str(folder), "--out", tmp_path / "out")


def test_a_folder_under_other_settings_is_left_alone(folder: Path, model: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match="under other rules"):
        job.run(model, methods=("prism",), shares=(0.3,), out=folder, console=QUIET, **SIZE | {"facts": 1})
    assert sorted(folder.rglob("*")) == before


def test_without_transformers_it_says_what_to_install(model: str, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import polyhead.sparsify.trials\n"
        "from polyhead.cli import app\n"
        f"app(['sparsify', {model!r}, '--out', {str(tmp_path / 'out')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode
    assert "needs the package 'transformers'" in done.stderr.splitlines()[-1]
    assert "pip install 'polyhead[hf]'" in done.stderr


def test_errors_are_ours() -> None:
    with pytest.raises(UnknownName):
        find("nothing")
    with pytest.raises(PolyheadError, match="timing of prism failed"):
        measure("/nowhere", "prism", 0.5, length=8, steps=1)
