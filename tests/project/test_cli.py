"""The command line: what it prints, and how it ends when something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import polyhead
from polyhead import benchmarks, cli
from polyhead.errors import PolyheadError
from polyhead.papers import papers

runner = CliRunner()


def run(*arguments):
    return runner.invoke(cli.app, [str(argument) for argument in arguments])


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"polyhead {polyhead.__version__}\n"


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "polyhead", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("polyhead ")


# Commands that share a file with the one that it is named after.
PAIRS = {"show": "catalog", "tasks": "compare"}


def commands():
    return typer.main.get_command(cli.app).commands


def test_every_command_is_in_its_own_file():
    found = {name: command.callback.__module__ for name, command in commands().items()}
    assert found == {name: f"polyhead.cli.{PAIRS.get(name, name)}" for name in found}
    # ... and every file is imported: what is not a command's is what commands share
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert files - {"__init__", "group", "printing"} == {
        module.rpartition(".")[2] for module in found.values()
    }


def test_help_lists_the_commands_in_order():
    text = run("--help").stdout
    order = (
        "papers",
        "catalog",
        "show",
        "gallery",
        "compare",
        "tasks",
        "bench",
        "fetch",
        "report",
        "sparsify",
    )
    assert re.findall(r"^\W*([a-z]+) {2,}[A-Z]", text, flags=re.MULTILINE) == list(order)


def test_help_imports_nothing_that_works():
    # `import polyhead` itself brings the operator, and torch with it: an empty package in its place shows
    # what the command line adds
    code = """
import json, sys, types
polyhead = types.ModuleType("polyhead")
polyhead.__path__, polyhead.__version__ = [sys.argv[1]], "0"
sys.modules["polyhead"] = polyhead
from typer.testing import CliRunner
from polyhead.cli import app
loaded = {}
for name in json.loads(sys.argv[2]):
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0 and f"polyhead {name}" in result.stdout, result.output
    loaded[name] = sorted(sys.modules)
print(json.dumps(loaded))
"""
    arguments = [str(Path(polyhead.__file__).parent), json.dumps(sorted(commands()))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    light = {"polyhead", "polyhead.cli", "polyhead.console", "polyhead.errors"}
    for name, loaded in json.loads(done.stdout).items():
        assert not {"torch", "numpy", "transformers", "plotly", "pandas", "jinja2"} & set(loaded), name
        own = {module for module in loaded if module.partition(".")[0] == "polyhead"}
        assert {module for module in own if not module.startswith("polyhead.cli.")} == light, name


def test_papers_lists_every_paper():
    result = run("papers")
    assert result.exit_code == 0
    for one in papers():
        assert one.number in result.stdout
    assert f"{len(papers())} papers" in result.stdout


def test_papers_json_and_filters():
    rows = json.loads(run("papers", "--json").stdout)
    assert len(rows) == len(papers())
    built = json.loads(run("papers", "--json", "--built").stdout)
    missing = json.loads(run("papers", "--json", "--missing").stdout)
    assert all(row["built_in"] for row in built)
    assert not any(row["built_in"] for row in missing)
    assert {row["number"] for row in built + missing} == {row["number"] for row in rows}
    assert json.loads(run("papers", "--json", "--not-built").stdout) == missing
    pooling = json.loads(run("papers", "--json", "--theme", "POOLING").stdout)
    assert pooling
    assert {row["theme"] for row in pooling} == {"pooling"}


def test_papers_unknown_theme_names_the_themes():
    result = run("papers", "--theme", "cooking")
    assert result.exit_code == 2
    assert "no theme contains 'cooking'; the themes are: " in result.stderr
    assert "pooling" in result.stderr


def test_catalog_and_show_agree_with_the_registry():
    from polyhead.mechanisms import registry

    rows = json.loads(run("catalog", "--json").stdout)
    assert [row["name"] for row in rows] == [entry.name for entry in registry.catalog()]
    table = run("catalog").stdout
    for row in rows:
        assert row["name"] in table
        result = run("show", row["name"])
        assert result.exit_code == 0, result.output
        facts = (
            "equation",
            "data flow",
            # a layer that maps tokens by themselves has steps of its own in the picture
            registry.entry(row["name"]).flow.joined[0].name
            if registry.entry(row["name"]).promises.tokenwise
            else "normaliser",
            "supports",
            "cost",
            "parameters",
            "float16",
            "options",
        )
        for fact in (*facts, "naive twin", "paper", "ph.build", *row["files"], row["twin_file"]):
            assert fact in result.stdout, (row["name"], fact)
        shown = json.loads(run("show", row["name"], "--json").stdout)
        assert shown["cost"]["parameters"] > 0
        for alias in row["aliases"]:
            assert json.loads(run("show", alias, "--json").stdout)["name"] == row["name"]


def test_show_prints_the_source_of_the_naive_twin():
    assert "def grouped_query(" not in run("show", "gqa").stdout
    assert "def grouped_query(" in run("show", "gqa", "--source").stdout
    assert "def grouped_query(" in json.loads(run("show", "gqa", "--source", "--json").stdout)["twin_source"]


def test_catalog_filters():
    from polyhead.mechanisms import catalog

    def found(*arguments):
        return [row["name"] for row in json.loads(run("catalog", "--json", *arguments).stdout)]

    assert found("--family", "sharing") == [entry.name for entry in catalog(family="sharing")]
    assert found("--paper", "GQA") == found("--paper", "74") == ["grouped_query"]
    wanted = catalog(supports=("causal_cross", "self"), kv_bytes="<512")
    assert found("--supports", "causal_cross, self", "--kv-bytes", "<512") == [entry.name for entry in wanted]
    assert found("--alignment", "scaled_dot,dot") == [
        e.name for e in catalog(alignment=("scaled_dot", "dot"))
    ]
    result = run("catalog", "--kv-bytes", "<512")
    total = len(catalog())
    assert (
        f"{len(catalog(kv_bytes='<512'))} of {total} mechanisms; KV bytes are those of a token at"
        in result.stdout
    )
    assert "dim=512, heads=8, length=4096, float16" in result.stdout
    assert f"0 of {total} mechanisms" in run("catalog", "--kv-bytes", "<0").stdout


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--family", "sharin", "did you mean 'sharing'?"),
        (
            "--supports",
            "causal",
            "supports must be one of causal_cross, causal_self, cross, self; got 'causal'",
        ),
        ("--kv-bytes", "few", "kv_bytes must be one of <, <=, >, >=, = and a number of bytes"),
        ("--paper", "multi_qery", "no paper is called 'multi_qery'; did you mean 'multi_query'"),
        ("--positions", "nearby", "positions must be one of global, hard, local; got 'nearby'"),
    ],
)
def test_a_bad_filter_names_what_is_allowed(option, value, message):
    result = run("catalog", option, value)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr


def test_catalog_lists_the_facets():
    from polyhead.mechanisms import FACETS

    printed = run("catalog", "--facets").stdout
    for name, values in FACETS.items():
        assert name in printed
        assert all(value in printed for value in values)
    assert json.loads(run("catalog", "--facets", "--json").stdout) == FACETS


def test_gallery_writes_pages(tmp_path):
    result = run("gallery", "--out", tmp_path / "made")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "made" / "index.md").is_file()
    assert "0 files written and 0 removed" in run("gallery", "--out", tmp_path / "made").stdout


def test_show_unknown_name():
    result = run("show", "multi_qery")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "'multi_qery'" in result.stderr
    assert "multi_query" in result.stderr


def test_show_with_sizes_that_do_not_fit():
    result = run("show", "multi_query", "--heads", "0")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "heads" in result.stderr


def test_an_error_is_one_line_without_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise PolyheadError("the [red]model[/red] is not there; " + "look again, " * 40)

    monkeypatch.setattr(sys.modules["polyhead.papers"], "papers", fail)
    result = run("papers")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: the [red]model[/red] is not there")
    assert "Traceback" not in result.output


def test_ctrl_c_ends_with_130(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["polyhead.papers"], "papers", interrupted)
    result = run("papers")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


def test_a_mistake_of_our_own_is_not_hidden(monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["polyhead.papers"], "papers", broken)
    assert isinstance(run("papers").exception, ZeroDivisionError)


def test_signs_that_the_output_cannot_say_are_no_error():
    def said(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "polyhead", *arguments],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        ).stdout

    assert "?" in said("show", "mha")
    # data loses nothing
    assert json.loads(said("catalog", "--json")) == json.loads(run("catalog", "--json").stdout)


def test_a_closed_pipe_is_no_error():
    code = "from polyhead.cli import app; app(prog_name='polyhead')"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "papers", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_reaches_a_running_program(tmp_path):
    checkout(tmp_path, forever='"""Waits."""\nimport time\nprint("begun", flush=True)\ntime.sleep(60)\n')
    code = """
import pathlib
from polyhead import benchmarks, cli
benchmarks._folder = lambda: pathlib.Path("benchmarks")
cli.app(["bench", "forever", "--save", "kept"], prog_name="polyhead")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a job in the background is born with the signal ignored, and hands that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "begun" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in err
    assert not (tmp_path / "kept").exists()


def checkout(root, **scripts):
    """A checkout with these benchmarks."""
    (root / "benchmarks").mkdir()
    (root / "pyproject.toml").touch()
    for name, source in scripts.items():
        (root / "benchmarks" / f"{name}.py").write_text(textwrap.dedent(source))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    checkout(
        tmp_path,
        good='"""Measures good things.\n\nMore."""\nimport sys\nprint("ratio 2.0", *sys.argv[1:])\n',
        bad='"""Fails."""\nprint("so far")\nraise SystemExit(3)\n',
        _shared="def helper(): ...\n",
    )
    monkeypatch.setattr(benchmarks, "_folder", lambda: tmp_path / "benchmarks")
    return tmp_path


def test_bench_lists_scripts_but_no_helpers(bench):
    result = run("bench", "--list")
    assert "Measures good things." in result.stdout
    assert "bad" in result.stdout
    assert "_shared" not in result.stdout


def test_bench_runs_and_keeps_what_was_printed(bench, capfd):
    result = run("bench", "good", "--save", bench / "kept", "--device", "cuda")
    assert result.exit_code == 0, result.output
    assert (bench / "kept" / "good.txt").read_text() == "ratio 2.0 --device cuda\n"


def test_bench_that_fails_keeps_nothing(bench):
    result = run("bench", "bad", "--save", bench / "kept")
    assert result.exit_code == 2
    assert "so far" in result.stdout
    assert "benchmark 'bad' failed with exit code 3" in result.stderr
    assert not (bench / "kept").exists()


def test_bench_unknown_name(bench):
    result = run("bench", "goot")
    assert result.exit_code == 2
    assert "no benchmark is called 'goot'; did you mean 'good'?" in result.stderr


def test_bench_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks, "__file__", str(tmp_path / "a" / "b" / "c" / "benchmarks.py"))
    monkeypatch.chdir(tmp_path)
    result = run("bench")
    assert result.exit_code == 2
    assert "run `polyhead bench` from a checkout" in result.stderr


def test_fetch_unknown_model():
    result = run("fetch", "gpt5")
    assert result.exit_code == 2
    assert "no demo model is called 'gpt5'" in result.stderr


def test_report_hands_its_options_over(monkeypatch, tmp_path):
    from polyhead.report import job

    seen = {}
    monkeypatch.setattr(job, "run", lambda model, **options: seen.update(model=model, **options))
    result = run("report", "smollm2", "--text", tmp_path / "a.txt", "--out", tmp_path, "--seeds", 2)
    assert result.exit_code == 0, result.output
    assert seen["model"] == "smollm2"
    assert seen["text"] == tmp_path / "a.txt"
    assert seen["out"] == tmp_path
    assert seen["seeds"] == 2
