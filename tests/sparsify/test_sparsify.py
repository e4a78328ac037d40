"""`polyhead sparsify` on a small model of one's own: what it measures, writes, keeps, and refuses."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
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
from polyhead.sparsify.levels import listen, solve
from polyhead.sparsify.methods import METHODS, Method, find
from polyhead.sparsify.reading import keys_seen
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


@pytest.mark.parametrize("mask", [None, ph.causal(), ph.causal() & ph.window(9), ph.sink(3)])
def test_keys_are_counted_as_they_are(mask: ph.Mask | None) -> None:
    found = keys_seen(mask, batch=2, heads=3, queries=70, keys=100)
    b, h = torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None]
    i, j = torch.arange(30, 100)[:, None], torch.arange(100)
    seen = torch.ones(70, 100, dtype=torch.bool) if mask is None else mask.allowed(b, h, i, j)
    assert torch.equal(found, seen.expand(2, 3, 70, 100).sum(-1).float())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reads_more_at_a_higher_level_and_meets_a_share(name: str, loaded: Any) -> None:
    ids = torch.randint(2, 600, (1536,), generator=torch.Generator().manual_seed(0))
    layers, asked = listen(loaded.model, ids)
    assert [one.layer.index for one in asked] == [0, 1]
    less, more = (solve(METHODS[name], share, layers, asked) for share in (0.25, 0.6))
    assert less[0] < more[0]
    assert less[1] == pytest.approx(0.25, abs=0.05)
    assert more[1] == pytest.approx(0.6, abs=0.05)


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
    before = read(folder / "results.json")
    (folder / "trials" / "a_shape.0.3.json").unlink()
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
    assert [row.label for row in more.rows] == ["dense", "a_shape 0.3", "a_shape 0.9"]
    job.run(model, methods=("a_shape", "block_oracle"), shares=(0.3, 0.6), out=folder, console=QUIET, **SIZE)
    assert read(folder / "results.json") == before


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
        "def make(level, tokens):\n"
        "    return ph.a_shape(1, max(1, round(level * tokens)), rows=32, cols=32)\n"
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


def outcome(right: str, nats: float = 1.0, read: float = 10.0) -> Outcome:
    found = tuple(Found(False, 448, n / len(right), c == "y", c == "y") for n, c in enumerate(right))
    return Outcome(None, {448: read}, found, nats, 0.0, 0.0)


def row(method: str, right: str, seconds: float | None, nats: float = 1.0) -> Row:
    rounds = () if seconds is None else (Round(Taken(seconds, seconds / 10, None), Taken(8.0, 0.8, None)),)
    return Row(method, 0.1 if method else 1.0, outcome(right, nats), rounds)


def test_the_best_is_the_fastest_that_keeps_what_dense_finds(settings: Settings) -> None:
    own = replace(settings, methods=("a_shape", "mean_keys", "prism"), lengths=(448,))
    dense = row("", "yyny", 8.0)

    def best(*rows: Row) -> str | None:
        found = Comparison(own, (dense, *rows), "").best
        return found and found.method

    # a lost fact, and one that dense does not find
    assert best(row("a_shape", "yyyn", 1.0), row("prism", "yyyy", 4.0)) == "prism"
    assert best(row("a_shape", "yyny", 4.0), row("prism", "yyny", 2.0)) == "prism"
    assert best(row("a_shape", "yyny", 4.0), row("prism", "yyny", 2.0, nats=1.03)) == "a_shape"
    assert best(row("a_shape", "yyny", 9.0)) is None
    assert best(row("a_shape", "yyny", None)) is None
    made = Comparison(own, (dense, row("prism", "yyyy", 4.0)), "")
    assert made.kept(made.rows[1]) == (3, 3)
    assert "prefill of 448 tokens 2.00 times as fast" in made.verdict()
    assert made.records()[1]["prefill faster"] == 2.0


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


def test_errors_are_ours() -> None:
    with pytest.raises(UnknownName):
        find("nothing")
    with pytest.raises(PolyheadError, match="timing of prism failed"):
        measure("/nowhere", "prism", 0.5, length=8, steps=1)
