"""The main job on small models: what it writes, and how it ends when something is wrong."""

import dataclasses
import html
import io
import itertools
import json
import os

import pytest
import torch
import transformers as t
import typer
from rich.console import Console
from typer.testing import CliRunner

from hf.tiny import SIZES
from polyhead import cli, hf
from polyhead.errors import ConfigError
from polyhead.report import ReportData, job, savings, write
from polyhead.report.data import Point
from polyhead.report.effort import Effort, sizes
from polyhead.report.page import build_page
from polyhead.report.summary import markdown, points_table, python_lines, ranked_lines
from polyhead.report.trying import PARTS, Choice, Outcome, Trial, cache_bytes
from report import small_models

runner = CliRunner()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return small_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return small_models.bert(tmp_path_factory.mktemp("bert"))


def report(model, *options, code=0):
    """Run the command; what it printed, or the one line that it ended with."""
    result = runner.invoke(cli.app, ["report", str(model), "--quick", *map(str, options)])
    assert result.exit_code == code, result.output
    if code:
        lines = [line for line in result.stderr.splitlines() if line.startswith(("error:", "interrupted"))]
        assert len(lines) == 1, result.stderr
        assert "Traceback" not in result.output
        return lines[0]
    return result.stdout


def read(folder):
    return ReportData.from_json((folder / "report.json").read_text(encoding="utf-8"))


OPTIONS = ("--window", 96, "--sink", 2, "--length", 300)


def test_a_folder_of_ones_own(llama, tmp_path):
    said = report(llama, "--out", tmp_path / "a", *OPTIONS)
    data = read(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == sorted(write.FILES)
    assert data.model.architecture == "LlamaForCausalLM"
    assert (data.model.heads, data.model.kv_heads) == ((4, 4), (2, 2))
    assert len(data.text.tokens) == 300
    assert {"sink", "entropy", "retrieval", "gate_gradient"} <= {m.name for m in data.measurements}
    # told for every query head that reads the KV head
    for row in data.measurement("gate_gradient").values:
        assert row[0] == row[1] != row[2] == row[3]
    # a random model finds nothing: that is said, and nothing is recommended
    assert data.recommendation is None
    assert "With its whole cache the model finds 0 of 4 hidden facts" in data.notes[0]
    assert "too few to see what a smaller cache loses" in " ".join(said.split())
    # four KV heads: shares that come to the same number of heads are tried once
    *points, alone, drawn = data.savings.points
    assert (alone.policy, alone.heads_kept, alone.needles) == ("retrieval alone", 1, 4)
    assert (drawn.policy, drawn.heads_kept, len(drawn.heads)) == ("random", 1, 1)
    assert [(p.policy, p.heads_kept) for p in points] == [
        ("both scores", 4),
        ("both scores", 2),
        ("both scores", 1),
        ("both scores", 0),
    ]
    for point in points:
        assert point.needles == 4
        assert (point.needles_whole, point.needles_kept) == (0, 0)
        assert point.perplexity > 1
        assert point.decode_tokens_per_second > 0
        assert len(point.heads) == point.heads_kept
    held = [dict(p.cache_bytes)[512] for p in points]
    assert held == sorted(held, reverse=True)
    assert held[-1] < 0.25 * held[0]


def test_the_same_seed_gives_the_same_report(llama, tmp_path):
    found = []
    for name in ("a", "b"):
        report(llama, "--out", tmp_path / name, *OPTIONS)
        data = json.loads((tmp_path / name / "report.json").read_text())
        del data["run"]
        for point in (data["savings"]["baseline"], *data["savings"]["points"]):
            del point["decode_tokens_per_second"]
        found.append(data)
    assert found[0] == found[1]


def test_an_encoder_has_roles_and_nothing_to_save(bert, tmp_path):
    said = report(bert, "--out", tmp_path / "e", "--length", 200)
    data = read(tmp_path / "e")
    assert data.model.is_encoder
    assert data.savings is None
    assert data.recommendation is None
    assert "retrieval" not in {m.name for m in data.measurements}
    assert "nothing to save" in " ".join(said.split())
    assert not (tmp_path / "e" / "savings.svg").exists()


def test_without_savings_and_with_a_text_of_ones_own(llama, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("A text of one's own: ä, 日本, 😀. " * 40, encoding="utf-8")
    said = report(llama, "--out", tmp_path / "r", "--text", text, "--length", 128, "--no-savings")
    data = read(tmp_path / "r")
    assert data.savings is None
    assert data.measurement("gate_gradient") is None  # asked only to choose heads for caches
    assert data.text.name == "own.txt"
    assert "reading the first 128 of" in said
    assert (
        data.run.command
        == f"polyhead report {llama} --text {text} --length 128 --out {tmp_path / 'r'} --quick --no-savings"
    )


def test_a_window_that_the_model_cannot_show(llama, tmp_path):
    report(llama, "--out", tmp_path / "r", "--length", 100, "--window", 300)
    data = read(tmp_path / "r")
    assert data.savings is None
    assert "The model reads 512 tokens, too few to see what a window of 300 leaves out" in data.notes[0]


# -- what is wrong with a call -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--text", "{tmp}/none.txt"], "there is no file"),
        (["--text", "{tmp}/empty.txt"], "is empty; give a text of some sentences"),
        (["--text", "{tmp}/tiny.txt"], "needs at least 32"),
        (["--text", "{tmp}/binary.bin"], "is not UTF-8 text"),
        (["--text", "{tmp}/long.txt"], "the model can read 512; use its beginning with --length 512"),
        (["--text", "{tmp}"], "cannot be read"),
        (
            ["--length", "4096"],
            "length must be at least 32 and at most 512, which the model can read; got 4096",
        ),
        (["--length", "3"], "length must be at least 32"),
        (["--text", "{tmp}/short.txt", "--length", "500"], "--length asks for 500; give a longer text"),
        (["--out", "{tmp}/tiny.txt"], "is a file, not a folder; choose another folder"),
        (["--out", "{tmp}/tiny.txt/deep"], "is a file, not a folder"),
        (["--out", "{tmp}"], "holds other files (binary.bin, empty.txt"),
        (["--fractions", "0.5,2"], "fractions must lie in 0..1, got 2.0"),
        (["--losses", "1"], "losses must be a share of the facts from 0 to below 1, such as 0.05; got 1.0"),
        (["--fractions", "half"], "--fractions takes numbers between 0 and 1"),
    ],
)
def test_bad_input_ends_with_one_line(llama, tmp_path, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "tiny.txt").write_text("Two words.")
    (tmp_path / "short.txt").write_text("Some forty words. " * 15)
    (tmp_path / "long.txt").write_text("Words of a long text, one after another. " * 200)
    (tmp_path / "binary.bin").write_bytes(b"\x80\x81\xff" * 20)
    before = sorted(os.listdir(tmp_path))
    line = report(llama, *(o.format(tmp=tmp_path) for o in options), code=2)
    assert expected in line
    assert sorted(os.listdir(tmp_path)) == before


def test_no_such_model(tmp_path):
    assert "there is no file or folder" in report(tmp_path / "nothing", "--out", tmp_path / "o", code=2)
    (tmp_path / "bare").mkdir()
    assert "no config.json" in report(tmp_path / "bare", "--out", tmp_path / "o", code=2)
    assert not (tmp_path / "o").exists()


def test_a_model_that_cannot_be_looked_into(tmp_path, monkeypatch):
    folder = small_models.gptj(tmp_path / "gptj")
    line = report(folder, "--out", tmp_path / "o", code=2)
    assert "GPTJForCausalLM (model type 'gptj') does not go through" in line
    assert not (tmp_path / "o").exists()


def test_a_folder_that_cannot_be_written_is_found_before_the_work(llama, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(write.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(hf, "load", lambda *_, **__: pytest.fail("loaded before looking at the folder"))
    assert "cannot write to" in report(llama, "--out", tmp_path / "o", code=2)


@pytest.mark.parametrize("stage", ["_load", "_profile", "_savings", "assemble", "write_report"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_what_was_there(llama, tmp_path, monkeypatch, stage, error):
    out = tmp_path / "r"
    report(llama, "--out", out, "--length", 64, "--no-savings")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    if stage == "write_report":
        replaced = []

        def fail(a, b):
            replaced.append(b)
            raise error

        monkeypatch.setattr(write.os, "replace", fail)
    else:
        monkeypatch.setattr(job, stage, _raising(error))
    options = ("--out", out, "--length", 96, "--window", 96)
    if error is KeyboardInterrupt:
        assert report(llama, *options, code=130) == "interrupted"
    elif stage == "write_report":
        assert "No space left on device" in report(llama, *options, code=2)
    else:
        with pytest.raises(OSError, match="No space"):
            job.run(str(llama), out=out, length=96, window=96, quick=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["r"]


def _raising(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_report_may_be_written_over_an_earlier_one(llama, tmp_path):
    for length in (64, 100):
        report(llama, "--out", tmp_path / "r", "--length", length, "--no-savings")
        assert len(read(tmp_path / "r").text.tokens) == length


# -- caches --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trial(llama):
    model, tokenizer = hf.load(llama)
    effort = dataclasses.replace(Effort(), window=96, facts=4, texts=1, random_texts=1, scored=300)
    return Trial(model, tokenizer, effort)


@pytest.mark.parametrize("tokens", [50, 98, 99, 300])
def test_bytes_are_those_of_a_cache_that_has_read_so_much(trial, tokens):
    ids = torch.arange(tokens)[None] % 600
    for make in (trial.whole, lambda: trial.small([(0, 1)]), lambda: trial.small([])):
        cache = make()
        with torch.no_grad():
            trial.model(ids, past_key_values=cache, use_cache=True)
        held = cache_bytes(cache)
        assert held > 0
        if hasattr(cache, "detach"):
            assert held == cache.nbytes()
            cache.detach()
        assert trial.bytes(make, tokens) == held


def test_a_cache_with_all_heads_answers_as_the_whole_one(trial):
    everything = trial.all_heads
    assert everything == [(0, 0), (0, 1), (1, 0), (1, 1)]
    whole, same = trial.outcomes([Choice("full", None), Choice("retrieval", tuple(everything))])
    assert whole.answers == same.answers
    assert whole.point.perplexity == pytest.approx(same.point.perplexity, rel=1e-5)


def test_what_is_confirmed_on_was_not_tried_on(trial):
    said = [{one.statement for hidden in trial.texts(part) for one in hidden.asked} for part in PARTS]
    assert not said[0] & said[1]
    assert not said[2] & (said[0] | said[1])
    assert not torch.equal(trial._prose("curve"), trial._prose("told"))


def test_each_part_has_prose_of_its_own(trial):
    """Where the texts come from; the tokens of the source are told by their number."""
    source = Trial(trial.model, trial.tokenizer, dataclasses.replace(trial.effort, texts=4, facts=1))
    source.__dict__["_test_ids"] = list(range(1000, 1000 + 3 * 1200 + 600))
    ranges = []
    for part in PARTS:
        tokens = [i for hidden in source.texts(part) for i in hidden.text if i >= 1000]
        ranges.append((min(tokens), max(tokens)))
        assert len(source.texts(part)) == (4 if part == "curve" else trial.effort.confirm_texts)
    ranges += [(int(x[0]), int(x[-1])) for x in (source._prose("curve"), source._prose("told"))]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
    assert ranges[-1][1] == 1000 + 3 * 1200 + 600 - 1


def test_a_held_out_text_is_used_if_it_is_long_enough(trial):
    given = Trial(trial.model, trial.tokenizer, trial.effort, held_out=list(range(500)))
    assert given._prose("curve").tolist() == list(range(300))
    assert given.prose_name == "the rest of the text"
    short = Trial(trial.model, trial.tokenizer, trial.effort, held_out=list(range(200)))
    assert torch.equal(short._prose("curve"), trial._prose("curve"))


def test_sizes_for_few_heads():
    assert sizes(Effort(), 90) == [81, 68, 45, 30, 22, 18, 14, 9, 4, 0]
    assert sizes(Effort(), 4) == [3, 2, 1, 0]
    assert sizes(Effort(), 1) == [0]


# -- what is recommended -------------------------------------------------------------------------------


ASKED = 40


def outcome(heads, answers, perplexity=10.0, whole=(True,) * ASKED, policy="both scores"):
    """What came of so many of 10 heads; `answers` as they are, or how many of the first are right."""
    if isinstance(answers, int):
        answers = (True,) * answers + (False,) * (ASKED - answers)
    point = Point(
        policy,
        heads / 10,
        heads,
        None,
        sum(answers) / len(answers),
        len(answers),
        perplexity,
        heads=tuple((0, h) for h in range(heads)),
        needles_whole=sum(whole[: len(answers)]),
        needles_kept=sum(w and a for w, a in zip(whole, answers, strict=False)),
    )
    return Outcome(point, tuple(answers))


def test_answers_hold_within_the_tolerances():
    whole = outcome(10, 40)
    assert savings.holds(Effort(), whole, outcome(5, 38, 10.4))
    assert not savings.holds(Effort(), whole, outcome(5, 37, 10.0))
    assert not savings.holds(Effort(), whole, outcome(5, 40, 10.6))
    assert not savings.holds(Effort(), whole, outcome(5, 40, None))  # an infinite perplexity is not told
    assert savings.holds(Effort(losses=0.1), whole, outcome(5, 36))
    assert savings.holds(Effort(losses=0.0), whole, outcome(5, 40))
    assert not savings.holds(Effort(losses=0.0), whole, outcome(5, 39))


def test_facts_are_counted_one_by_one_and_not_on_balance():
    found = (True,) * 30 + (False,) * 10
    other = (False,) * 5 + (True,) * 30 + (False,) * 5  # as many, five of them others
    assert savings.keeps(Effort(), outcome(5, found, whole=found))
    after = outcome(5, other, whole=found)
    assert (after.point.needles_kept, after.point.needles_whole) == (25, 30)
    assert not savings.keeps(Effort(), after)


def test_losses_that_say_nothing_are_refused():
    for wrong in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="losses must be a share of the facts from 0 to below 1"):
            Effort(losses=wrong)


class Parts:
    """Stands for a `Trial` on fresh texts: how many facts each size finds on each part."""

    effort = Effort(seeds=(0, 1))
    all_heads = tuple((0, h) for h in range(10))

    def __init__(self, fresh, told, told_perplexity=10.0):
        self.right = {"fresh": fresh, "told": told}
        self.told_perplexity = told_perplexity
        self.asked = []

    def outcomes(self, choices, part):
        whole, *smaller = choices
        assert whole.heads is None
        self.asked.append((part, [len(c.heads) for c in smaller if c.policy == "both scores"]))
        perplexity = self.told_perplexity if part == "told" else None
        found = []
        for one in smaller:
            right = 3 if one.policy == "random" else self.right[part][len(one.heads)]
            found.append(outcome(len(one.heads), right, perplexity, policy=one.policy))
        return [outcome(10, ASKED, None if perplexity is None else 10.0), *found]


def decided(curve, fresh, told, **how):
    parts = Parts(fresh, told, **how)
    chosen = [outcome(heads, right) for heads, right in curve.items()]
    return savings._decide(parts, outcome(10, ASKED), chosen), parts.asked


@pytest.mark.parametrize(
    ("curve", "fresh", "told", "expected", "rejected"),
    [
        # the smallest that holds, as all larger ones do
        ({5: 40, 3: 40, 2: 39, 1: 20}, {5: 40, 3: 40, 2: 39}, {2: 38}, 2, 0),
        # a lucky smaller one after one that failed is not taken, neither on the curve nor on fresh facts
        ({5: 40, 3: 20, 2: 40, 1: 20}, {5: 40}, {5: 40}, 5, 0),
        ({5: 40, 3: 40, 2: 40, 1: 40}, {5: 39, 3: 38, 2: 30, 1: 40}, {3: 40}, 3, 2),
        # nothing is taken where the largest fails
        ({5: 12, 3: 40}, {}, {}, None, 0),
        ({5: 40, 3: 40}, {5: 37, 3: 40}, {}, None, 0),
        # the facts that tell it may refuse it, and then none is looked for among the others
        ({5: 40, 3: 40}, {5: 40, 3: 40}, {3: 37}, None, 0),
    ],
)
def test_the_smallest_cache_that_holds_everywhere(curve, fresh, told, expected, rejected):
    found, asked = decided(curve, fresh, told)
    assert (found.after and found.after.point.heads_kept) == expected
    assert found.rejected == rejected
    assert bool(found.verdict) == (expected is None)
    assert [part for part, _ in asked].count("told") <= 1
    if expected is not None:
        # its numbers are those of the third part, as are those of as many heads at random
        assert found.after.point.needles_kept == told[expected]
        assert asked[-1] == ("told", [expected])
        assert [one.point.needles_kept for one in found.chance] == [3, 3]
        assert {one.point.heads_kept for one in found.chance} == {expected}


def test_why_nothing_is_recommended_is_said():
    found, _ = decided({5: 12, 3: 40}, {}, {})
    assert "5 KV heads in full, the largest cache tried, keep 12 of the 40" in found.verdict
    assert "at least 95\u00a0% of the facts" in found.verdict
    found, _ = decided({5: 40, 3: 40}, {5: 30, 3: 40}, {})
    assert (
        "held on the curve, but on fresh facts, keep 30 of the 40 that the whole cache finds" in found.verdict
    )
    found, _ = decided({5: 40}, {5: 40}, {5: 20})
    assert "on a third part of the facts, keep 20 of the 40" in found.verdict
    found, _ = decided({5: 40}, {5: 40}, {5: 40}, told_perplexity=12.0)
    assert "perplexity goes from 10 to 12" in found.verdict
    found, _ = decided({0: 40}, {}, {})
    assert "none that keeps any KV head in full was tried" in found.verdict


def test_why_a_model_has_no_curve(monkeypatch):
    sizes = SIZES | {"max_position_embeddings": 1024}
    encoder, tokenizer, effort = t.BertForMaskedLM(t.BertConfig(**sizes)), object(), Effort(window=96)
    assert savings.why_not(encoder, tokenizer, effort) == (
        "The model cannot use a per-head cache: BertForMaskedLM has no layer of causal self-attention that "
        "keeps a cache; per-head caches are for models that generate."
    )
    decoder = t.LlamaForCausalLM(t.LlamaConfig(**sizes))
    assert savings.why_not(decoder, tokenizer, effort) == ""

    def mistaken(*args, **options):
        raise TypeError("unsupported operand")

    monkeypatch.setattr(savings, "per_head", mistaken)
    with pytest.raises(TypeError, match="unsupported operand"):
        savings.why_not(decoder, tokenizer, effort)


def test_the_size_that_keeps_most_is_proposed():
    assert savings._preferred([outcome(9, 30), outcome(5, 30), outcome(3, 29), outcome(0, 40)]) == 5
    assert savings._preferred([outcome(0, 0)]) == 0


def test_the_lines_run_as_printed(llama, capsys):
    lines = python_lines(str(llama), [(0, 1), (1, 0)], 4, 2, 8)
    exec(compile(lines, "lines", "exec"), {})
    assert "PerHeadCache(2 of 4 KV heads in full, the rest 2 + 8 tokens" in capsys.readouterr().out
    lines = ranked_lines(str(llama), [(0, 1), (1, 0), (0, 0), (1, 1)], 3, 2, 8)
    exec(compile(lines, "lines", "exec"), {})
    assert "PerHeadCache(3 of 4 KV heads in full, the rest 2 + 8 tokens" in capsys.readouterr().out
    many = python_lines("m", [(layer, head) for layer in range(40) for head in range(4)], 320, 4, 256)
    compile(many, "lines", "exec")
    assert max(map(len, many.splitlines())) <= 100


def test_findings_as_markdown(decoder, encoder):
    told = markdown(decoder)
    rows = [line for line in told.splitlines() if line.startswith("| ")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2].startswith("| 12 (100\u00a0%) | – (whole cache) | 40 of 40 |")
    assert any("random, 3 seeds | " in row and " of 120 | " in row for row in rows)
    assert "**Recommended.** The smallest cache" in told
    assert "```python\nimport polyhead as ph" in told
    assert "| " not in markdown(encoder)


def without_advice(decoder):
    lines = ranked_lines("m", [(0, 1), (1, 0)], 1, 4, 256)
    told = dataclasses.replace(
        decoder.savings, verdict="No smaller cache is recommended: so it is.", python=lines
    )
    return dataclasses.replace(decoder, savings=told, recommendation=None)


def test_without_a_recommendation_a_row_can_be_used(decoder, tmp_path):
    """In Markdown, on the page, in the data and in the terminal."""
    data = without_advice(decoder)
    lines = data.savings.python
    told = markdown(data)
    assert "No smaller cache is recommended: so it is." in told
    assert "**To use a row of the table**, give its number of KV heads in full:" in told
    assert f"```python\n{lines}```" in told
    assert "**Recommended.**" not in told
    page = build_page(data)
    assert '<h2 id="advice-title">No recommendation</h2>' in page
    assert "To use a row of the table, give its number of KV heads in full." in page
    assert html.escape(lines, quote=False).replace('"', "&#34;").replace("'", "&#39;") in page
    assert page.count('id="python"') == page.count('id="copy"') == page.count('id="advice"') == 1
    assert ReportData.from_json(data.to_json()) == data
    buffer = io.StringIO()
    job._tell(data, write.Written(tmp_path / "report.html", ()), Console(file=buffer, width=120))
    assert "To use a row of the table, give its number of KV heads in full:" in buffer.getvalue()
    assert lines in buffer.getvalue()


def test_the_table_has_a_line_for_each_size(decoder):
    savings_told = decoder.savings
    points = [dataclasses.replace(p, needles_whole=36, needles_kept=27) for p in savings_told.points]
    table = points_table(dataclasses.replace(savings_told, points=tuple(points)))
    kept = list(table.columns[3].cells)
    assert kept[0] == "–"  # the whole cache's own
    assert kept[1:3] == ["27 of 36", "27 of 36"]
    assert "81 of 108" in kept  # three seeds
    assert list(table.columns[4].cells)[1] == "59 – 86\u00a0%"


def test_the_command_knows_its_options():
    command = typer.main.get_command(cli.app).commands["report"]
    names = {name for option in command.params for name in option.opts}
    assert {
        "--text",
        "--out",
        "--length",
        "--seeds",
        "--fractions",
        "--sink",
        "--window",
        "--losses",
        "--quick",
        "--no-savings",
    } <= names
