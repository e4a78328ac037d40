"""Whole leagues: here, in processes, on Ray; kept in a folder, killed and gone on with."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, PolyheadError
from polyhead.league import Outcome, Recipe, Sizes, Standings, plan
from polyhead.league.budget import target_of
from polyhead.league.compare import play
from polyhead.league.folder import Folder
from polyhead.league.interval import mean_and_half_width
from polyhead.league.running import Run, run_all
from polyhead.league.standings import spell
from polyhead.league.tasks.declared import BESIDE_SCORES
from polyhead.league.tasks.recall import RecallTask
from polyhead.league.worker import order

SMALL: dict[str, Any] = {
    "task": "recall",
    "sizes": Sizes(dim=16, heads=2, layers=1, mlp=16),
    "recipe": Recipe(steps=6, batch=4, looks=3),
    "seeds": 2,
}


def numbers(standings: Standings) -> Any:
    """Everything but times and memory."""
    data = standings.to_json()
    for one in data["contenders"]:
        for run in one["runs"].values():
            for name in ("tokens_per_second", "peak_bytes", "seconds"):
                del run[name]
    return data


@pytest.fixture(scope="module")
def here() -> Standings:
    return ph.compare(["mha", "moh"], **SMALL)


def test_a_league_here(here: Standings) -> None:
    assert [row.label for row in here.rows] == ["mha", "moh"]
    assert {row.rank for row in here.rows} == {1, 2}
    assert all(row.count("finished") == 2 for row in here.rows)
    assert "moh" in here.to_csv()
    json.dumps(here.to_json(), allow_nan=False)
    frame = here.to_frame()
    assert list(frame["contender"]) == [row.label for row in here.ranked]


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_numbers(here: Standings, without: Any) -> None:
    with without():
        found = ph.compare(["mha", "moh"], **SMALL)
        assert not torch.is_grad_enabled()
    assert numbers(found) == numbers(here)


def test_another_default_dtype_is_refused() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(
            ConfigError, match=r"default dtype is torch.float64, and leagues are of torch.float32"
        ):
            ph.compare(["mha"], **SMALL)
    finally:
        torch.set_default_dtype(torch.float32)


class Mine(RecallTask):
    name = "mine"


def test_a_task_that_other_processes_do_not_know_is_refused(tmp_path: Path) -> None:
    own = SMALL | {"task": Mine(), "seeds": 1}
    assert ph.compare(["mha"], **own).rows[0].count("finished") == 1
    for jobs in (1, "ray") if importlib.util.find_spec("ray") else (1,):
        with pytest.raises(ConfigError, match="Mine is known in this process alone, and jobs=.* are others"):
            ph.compare(["mha"], jobs=jobs, out=tmp_path / "league", **own)
    assert not list(tmp_path.iterdir())


def test_processes_give_the_same_numbers(here: Standings) -> None:
    assert numbers(ph.compare(["mha", "moh"], jobs=2, **SMALL)) == numbers(here)


def test_peak_memory_is_told_by_runs_in_processes_of_their_own_alone(here: Standings) -> None:
    assert all(outcome.peak_bytes is None for row in here.rows for outcome in row.outcomes.values())
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells how much memory a process has held at most")
    found = ph.compare(["mha"], jobs=1, **SMALL).rows[0]
    assert all(outcome.peak_bytes for outcome in found.outcomes.values())


def test_a_ray_cluster_gives_the_same_numbers(here: Standings, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'polyhead[ray]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = ph.compare(["mha", "moh"], jobs="ray", **SMALL)
    assert numbers(found) == numbers(here)
    if Path("/proc/self/clear_refs").exists():  # each in a process of its own: none takes what another freed
        peaks = [outcome.peak_bytes or 0 for row in found.rows for outcome in row.outcomes.values()]
        assert min(peaks) > max(peaks) / 2, peaks


def test_a_run_that_no_machine_of_a_ray_cluster_can_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'polyhead[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"a run takes 1000 CPU\(s\), .* and 0 GPU\(s\); no machine"):
        ph.compare(["mha"], jobs="ray", threads=1000, **SMALL)
    assert not ray.is_initialized()


def test_a_folder_keeps_runs_and_more_join(here: Standings, tmp_path: Path) -> None:
    out = tmp_path / "league"
    ph.compare(["mha"], out=out, **SMALL | {"seeds": 1})
    kept = {file: file.stat().st_mtime_ns for file in out.rglob("seed-*.json")}
    assert len(kept) == 1
    assert numbers(ph.compare(["mha", "moh"], out=out, **SMALL)) == numbers(here)
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    assert len(list(out.rglob("seed-*.json"))) == 4
    assert not list(out.rglob("*.pt"))
    assert not list(out.rglob("*.part"))


def test_a_folder_of_another_league_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "league"
    ph.compare(["mha"], out=out, **SMALL | {"seeds": 1})
    before = sorted((file, file.read_bytes()) for file in out.rglob("*") if file.is_file())
    with pytest.raises(ConfigError, match=r"under other rules \(recipe was .*steps=6.* and is .*steps=7"):
        ph.compare(["mha"], out=out, steps=7, **SMALL)
    with pytest.raises(ConfigError, match="under other rules .task was"):
        ph.compare(["mha"], out=out, **SMALL | {"task": "copy"})
    assert sorted((file, file.read_bytes()) for file in out.rglob("*") if file.is_file()) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files and no league"):
        ph.compare(["mha"], out=other, **SMALL)
    assert [file.name for file in other.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="is a file; choose a folder"):
        ph.compare(["mha"], out=other / "thesis.txt", **SMALL)
    (out / "league.json").write_text("{")
    with pytest.raises(PolyheadError, match="cannot be read"):
        ph.compare(["mha"], out=out, **SMALL)


def test_what_a_kill_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".league.json.4711.part").write_text('{"part": "Ru')  # the very first file, cut short
    settled = plan(["mha"], **SMALL | {"seeds": 1})
    folder = Folder(tmp_path, settled.rules)
    checkpoint = folder.checkpoint(settled.contenders[0].contender, 0)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.with_suffix(".4711.part").write_bytes(b"PK")
    assert play(settled, folder).rows[0].count("finished") == 1
    assert [file.suffix for file in checkpoint.parent.iterdir()] == [".json"]


@pytest.mark.parametrize("text", ["{}", "null", '{"status": "finished", "steps": 3, "scores": 5}'])
def test_a_file_that_is_no_outcome_says_what_to_do(text: str, tmp_path: Path) -> None:
    settled = plan(["mha"], **SMALL | {"seeds": 1})
    folder = Folder(tmp_path, settled.rules)
    file = folder.checkpoint(settled.contenders[0].contender, 0).with_suffix(".json")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(PolyheadError, match=r"seed-0.json is not how a run ended .* remove it"):
        play(settled, folder)


@pytest.mark.parametrize(
    "edited",
    [
        {"status": "won"},
        {"scores": {}},
        {"scores": {"validation": 0.5}},
        {"scores": {"validation": "x", "longer": 1}},
        {"curve": 5},
        {"curve": [{"step": "x", "loss": 1, "score": 1}]},
        {"steps": "x"},
        {"seconds": None},
        {"peak_bytes": "much"},
        {"tokens_per_second": "fast"},
    ],
)
def test_an_outcome_that_was_edited_says_what_to_do(edited: dict[str, Any], tmp_path: Path) -> None:
    settled = plan(["mha"], **SMALL | {"seeds": 1})
    folder = Folder(tmp_path, settled.rules)
    one = settled.contenders[0].contender
    folder.keep(one, 0, outcome(0.5))
    assert folder.outcome(one, 0).scores == {"validation": 0.5, "longer": 0.25}  # type: ignore[union-attr]
    file = next(tmp_path.rglob("seed-0.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | edited))
    with pytest.raises(
        PolyheadError, match=r"seed-0.json is not how a run ended .* remove it, and the run is"
    ):
        folder.outcome(one, 0)


@pytest.mark.parametrize("out", [5, "a\0b", "/tmp/" + "x" * 5000, "~nobody-at-all/x", "/dev/null/x"])
def test_an_out_that_is_no_folder_ends_in_a_line(out: Any) -> None:
    with pytest.raises(ConfigError, match="^out"):
        ph.compare(["mha"], out=out, **SMALL)


def test_a_disk_that_fails_ends_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    settled = plan(["mha"], **SMALL | {"seeds": 1})
    folder = Folder(tmp_path, settled.rules)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PolyheadError, match=r"\.pt cannot be written: No space left on device"):
        play(settled, folder)
    with pytest.raises(PolyheadError, match=r"cannot be written: .*; what was finished before is kept"):
        folder.keep(settled.contenders[0].contender, 0, outcome(0.5))
    with pytest.raises(ConfigError, match="out: cannot write to"):
        ph.compare(["mha"], out=tmp_path / "other", **SMALL)


def test_a_progress_that_cannot_be_told_is_found_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="progress must be callable as f"):
        ph.compare(["mha"], progress=lambda label: None, **SMALL)  # type: ignore[arg-type,misc]


@pytest.mark.parametrize("jobs", [0, -1, "rays", 1.5, True])
def test_jobs_are_checked_before_anything_runs(jobs: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='jobs must be a positive integer, or "ray"'):
        ph.compare(["mha"], out=tmp_path / "league", jobs=jobs, **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_worker_that_fails_is_reported_and_tried_again(tmp_path: Path) -> None:
    settled = plan(["mha", "moh"], **SMALL)
    folder = Folder(tmp_path, settled.rules)
    broken = folder.checkpoint(settled.contenders[1].contender, 0)
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"nonsense")
    standings = play(settled, folder, jobs=2)
    failed = standings.rows[1].outcomes[0]
    assert failed.status == "failed"
    assert "this checkpoint cannot be read" in failed.note
    assert standings.rows[0].rank == 1
    broken.unlink()
    again = play(settled, folder, jobs=2)
    assert again.rows[1].count("finished") == 2


def test_a_worker_that_cannot_begin_is_reported() -> None:
    order = {
        "rules": {"threads": 1},
        "contender": None,
        "seed": 0,
        "checkpoint": None,
        "task_file": "absent.py",
    }
    ((key, outcome),) = run_all([Run((0, 0), order)], 1, lambda *_: None)
    assert key == (0, 0)
    assert outcome.status == "failed"
    assert "absent.py" in outcome.note


def test_what_stands_between_the_answers_of_a_worker_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('hello')\nprint('5')\nprint('{}')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = ph.compare(["mha"], jobs=1, **SMALL | {"seeds": 1})
    assert found.rows[0].count("finished") == 1


def test_modules_in_the_folder_of_the_caller_are_not_those_of_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise RuntimeError('mine')")
    monkeypatch.chdir(tmp_path)
    found = ph.compare(["mha"], jobs=1, **SMALL | {"seeds": 1})
    assert found.rows[0].outcomes[0].note == ""
    assert found.rows[0].count("finished") == 1


def test_no_worker_stays_behind_whatever_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            begun.append(self)

    def stop(label: str, seed: int, what: object) -> None:
        if isinstance(what, Outcome):
            raise KeyError(label)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    settled = plan(["mha", "moh"], **SMALL | {"recipe": Recipe(steps=100_000, batch=4), "seeds": 1})
    short = plan(["mha"], **SMALL | {"seeds": 1})
    orders = [
        Run((n, 0), order(one.rules, one.contenders[n].contender, 0, None, None))
        for n, one in enumerate((short, settled))
    ]
    monkeypatch.setitem(play.__globals__, "run_all", lambda *_: run_all(orders, 2, lambda *_: None))
    with pytest.raises(KeyError) as raised:
        play(settled, progress=stop)
    assert [process.poll() is None for process in begun] == [False, False]
    assert raised.traceback  # which holds the frames


COMMAND = [
    *(
        sys.executable,
        "-m",
        "polyhead",
        "compare",
        "mha",
        "grouped_query",
        "--task",
        "recall",
        "--seeds",
        "2",
    ),
    *("--dim", "16", "--heads", "2", "--layers", "1", "--batch", "8", "--jobs", "2"),
]


def test_killed_at_any_moment_it_ends_with_the_same_numbers(tmp_path: Path) -> None:
    """SIGKILL for the command, some times over; the workers notice and go too."""
    command = [*COMMAND, "--steps", "300"]

    def results(out: Path) -> Any:
        data = json.loads((out / "results.json").read_text())
        for one in data["contenders"]:
            for run in one["runs"].values():
                for name in ("tokens_per_second", "peak_bytes", "seconds"):
                    del run[name]
        return data

    quiet, out = tmp_path / "quiet", tmp_path / "killed"
    subprocess.run([*command, "--out", str(quiet)], check=True, capture_output=True)
    for kill in range(3):
        process = subprocess.Popen(
            [*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = {file: file.stat().st_mtime_ns for file in out.rglob("*.pt")}
        deadline = time.monotonic() + 60

        def moved(held: dict[Path, int] = before) -> bool:
            found = {file: file.stat().st_mtime_ns for file in out.rglob("*.pt") if file.exists()}
            return any(held.get(file) != when for file, when in found.items())

        while not moved() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.07 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.5)  # for the workers to go
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    assert results(out) == results(quiet)


def test_interrupted_it_says_so_and_keeps_what_is_done(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--steps", "100000", "--out", str(tmp_path / "league")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "league" / "league.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said


# ---- standings ----


def outcome(score: float, status: str = "finished") -> Outcome:
    return Outcome(status, 6, {"validation": score, "longer": score / 2})


def standings(scores: dict[str, list[Outcome]], task: str = "recall") -> Standings:
    settled = plan(list(scores), **SMALL | {"task": task})
    outcomes = {(n, seed): one for n, runs in enumerate(scores.values()) for seed, one in enumerate(runs)}
    seeds = max(map(len, scores.values()))
    rules = settled.rules
    target = target_of(rules.task, rules.sizes, rules.budget, rules.limit)
    return Standings(rules, target, settled.contenders, outcomes, seeds)


def test_the_interval_is_that_of_student() -> None:
    mean, half = mean_and_half_width([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert mean_and_half_width([]) == pytest.approx((math.nan, math.nan), nan_ok=True)
    assert math.isnan(mean_and_half_width([1.0])[1])
    assert all(math.isnan(v) for v in mean_and_half_width([1.0, math.nan]))
    assert all(math.isnan(v) for v in mean_and_half_width([math.inf, -math.inf]))
    from scipy.stats import t

    for count in (2, 5, 31, 32, 80):
        values = [float(n) for n in range(count)]
        spread = (sum((v - sum(values) / count) ** 2 for v in values) / (count - 1)) ** 0.5
        expected = t.ppf(0.975, count - 1) * spread / count**0.5
        assert mean_and_half_width(values)[1] == pytest.approx(expected, rel=2e-3)


def test_ranks_and_paired_differences() -> None:
    found = standings(
        {
            "mha": [outcome(0.5), outcome(0.7)],
            "moh": [outcome(0.6), outcome(0.8)],
            "grouped_query": [outcome(0.9), outcome(math.nan, "diverged")],
            "multi_query": [outcome(math.nan, "failed"), outcome(math.nan, "failed")],
        }
    )
    assert [row.label for row in found.ranked] == ["moh", "mha", "grouped_query", "multi_query"]
    assert [row.rank for row in found.ranked] == [1, 2, 3, None]
    mean, half = found.difference(found.rows[1])
    assert mean == pytest.approx(0.1)
    assert half == pytest.approx(0, abs=1e-9)
    assert found.rows[2].count("diverged") == 1
    assert "1 of 2, 1 diverged" in str(found)
    assert json.dumps(found.to_json(), allow_nan=False)


def test_the_columns_beside_scores_are_those_that_no_split_may_be_called() -> None:
    found = standings({"mha": [outcome(1)]})
    splits = {f"{split}{sign}" for split in found.rules.task.splits for sign in ("", " ±")}
    assert set(found.to_frame().columns) == splits | set(BESIDE_SCORES)


def test_yardsticks_are_plain_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    settled = plan(["mha"], **SMALL | {"seeds": 1})
    rules = settled.rules
    monkeypatch.setattr(type(rules.task), "yardsticks", lambda self: {"a guess": torch.tensor(0.5)})
    found = Standings(rules, target_of(rules.task, rules.sizes), settled.contenders, {}, 1)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["yardsticks"] == {"a guess": 0.5}


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [
        (0.5, math.nan, "0.5000"),
        (0.5, 0.034, "0.5000 ±0.0340"),
        (0.0, 0.0, "0.0000 ±0.0000"),
        (0.0, math.nan, "0.0000"),
        (-0.0002, 0.0015, "-0.0002 ±0.0015"),  # four places say enough of what is uncertain
        (1.5e-9, 6.353e-9, "1.5e-09 ±6.353e-09"),
        (0.00096681, 0.00053529, "0.0009668 ±0.0005353"),
        (1e37, math.nan, "1e+37"),
        (123456.0, 2.0, "1.235e+05 ±2"),
        (math.nan, math.nan, ""),
    ],
)
def test_scores_of_any_size_are_spelled(mean: float, half: float, said: str) -> None:
    assert spell(mean, half) == said
    if mean > 0:
        assert spell(mean, half, sign=True) == f"+{said}"


def test_equal_scores_share_a_rank() -> None:
    found = standings({"mha": [outcome(1)], "moh": [outcome(1)], "multi_query": [outcome(0.5)]})
    assert [row.rank for row in found.ranked] == [1, 1, 3]


def test_a_finished_run_without_a_score_is_seen_and_comes_last() -> None:
    found = standings({"mha": [outcome(0.5)] * 2, "moh": [outcome(0.9), outcome(math.nan)]})
    assert [row.label for row in found.ranked] == ["mha", "moh"]
    assert all(math.isnan(v) for v in found.difference(found.rows[1]))
    assert json.dumps(found.to_json(), allow_nan=False)
    assert ",,," in found.to_csv()


def test_lower_is_better_where_it_is() -> None:
    found = standings({"mha": [outcome(0.5)], "moh": [outcome(0.4)]}, "regression")
    assert [row.label for row in found.ranked] == ["moh", "mha"]


def test_standings_are_printed_as_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    label = "mha:mask=causal() & window(3)"
    found = standings({label: [outcome(0.5), outcome(0.7)], "moh:top_k=1": [outcome(0.6), outcome(0.8)]})
    head, first, second = str(found).splitlines()
    assert "accuracy ↑" in head
    assert first.startswith("1  moh:top_k=1")
    assert label in second
    assert "0.7000 ±1.2706" in first
    assert "\x1b" not in str(found)  # no colours


def test_beside_an_exact_cache_the_table_says_how_far_parameters_are_off() -> None:
    settled = plan(["mha", "multi_head_latent"], "recall", budget="kv")
    rules = settled.rules
    target = target_of(rules.task, rules.sizes, rules.budget, rules.limit)
    said = str(Standings(rules, target, settled.contenders, {}, 1))
    assert "182,088 (+151.4%)" in said
    assert "1,024 (=)" in said


def test_two_commands_do_not_train_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "league"
    settled = plan(["mha"], "recall", steps=2, seeds=1, sizes=Sizes(dim=16, heads=2, layers=1))
    first, second = Folder(folder, settled.rules), Folder(folder, settled.rules)
    with first.held(), pytest.raises(PolyheadError, match="another command is at work in"):
        play(settled, second)
    standings = play(settled, second)
    assert standings.rows[0].count("finished") == 1
    assert not (folder / ".lock").exists()
    with first.held():
        play(settled, second)  # nothing left to train, so nothing in the way


def test_runs_say_what_they_were_made_with(tmp_path: Path) -> None:
    settled = plan(["mha"], "recall", steps=2, seeds=2, sizes=Sizes(dim=16, heads=2, layers=1))
    folder = Folder(tmp_path / "league", settled.rules)
    (here,) = play(settled, folder).made_with
    assert here.startswith(f"polyhead {ph.__version__}, torch {torch.__version__}, python ")
    file = next(folder.path.rglob("seed-1.json"))
    held = json.loads(file.read_text())
    earlier = here.partition(", ")[2]  # of a league of before it named Polyhead: its runs are not made again
    file.write_text(json.dumps(held | {"made_with": earlier}))
    standings = play(settled, folder)
    assert standings.made_with == (here, earlier)
    assert standings.rows[0].count("finished") == 2
    assert json.loads(file.read_text())["made_with"] == earlier
    del held["made_with"]  # a league of before it was kept
    file.write_text(json.dumps(held))
    assert play(settled, folder).made_with == (here,)
