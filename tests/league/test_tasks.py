"""The tasks of the league: repeatable questions with right answers, by solvers written in plain Python."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyhead.errors import ConfigError, UnknownName
from polyhead.league import plan
from polyhead.league.folder import Folder
from polyhead.league.tasks import TASKS, Batch, Task, changed, find, with_data
from polyhead.league.tasks import corpus as tokens_of
from polyhead.league.tasks.base import Recipe, Sizes
from polyhead.league.tasks.corpus import corpus
from polyhead.league.tasks.listops import ListOpsTask, value_of
from polyhead.league.tasks.text import TextTask


class MeanOfLists(ListOpsTask):
    """Lists whose value is read from the mean of their tokens."""

    @property
    def read_from(self) -> str:
        return "mean"


SPLITS = [(name, split) for name in TASKS for split in ("train", *find(name).splits)]


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_questions_are_well_formed_and_repeatable(name: str, split: str) -> None:
    task = find(name)
    first, again = (task.batch(split, 3, 8, 1) for _ in range(2))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets.nan_to_num(7.5), again.targets.nan_to_num(7.5))
    assert not torch.equal(first.inputs, task.batch(split, 4, 8, 1).inputs)
    length = first.inputs.shape[1]
    if split in ("train", "validation"):
        assert length == task.length
    if task.vocabulary is not None:
        assert first.inputs.dtype == torch.int64
        assert first.inputs.min() >= 0
        assert first.inputs.max() < task.vocabulary
    else:
        assert first.inputs.shape == (8, length, task.width)
    if task.answer == "numbers":
        assert first.targets.shape == (8, length, task.outputs)
        assert torch.isfinite(first.answers()).all()
    else:
        assert first.targets.shape == ((8,) if task.answer == "label" else (8, length))
        assert first.answers().min() >= 0
        assert first.answers().max() < task.outputs
    assert len(first.answers()) >= 8


@pytest.mark.parametrize("name", TASKS)
def test_training_depends_on_the_seed_and_other_questions_do_not_come_from_it(name: str) -> None:
    task = find(name)
    assert not torch.equal(task.batch("train", 0, 8, 0).inputs, task.batch("train", 0, 8, 1).inputs)
    assert not torch.equal(task.batch("train", 0, 8, 0).inputs, task.batch("validation", 0, 8, 0).inputs)


def recall(batch: Batch, task: Task) -> None:
    for row, asked in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        shown = len(row) // 3 * 2
        known = dict(zip(row[:shown:2], row[1:shown:2], strict=True))
        assert len(known) == len(row) // 3
        assert [known[key] - 32 for key in row[shown:]] == asked[shown:]
        assert set(asked[:shown]) == {-100}


def needle(batch: Batch, task: Task) -> None:
    for row, asked in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        end = len(row) - 4
        known = dict(divmod(symbol, 16) for symbol in row[:end] if symbol < 128)
        assert len(known) == 4
        assert [known[symbol - 128] for symbol in row[end:]] == asked[end:]
        assert set(asked[:end]) == {-100}


def copy(batch: Batch, task: Task) -> None:
    for row, asked in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        n = row.index(16)
        assert row[n + 1 :] == row[: n - 1]
        assert asked == [-100] * n + row[:n]


def induction(batch: Batch, task: Task) -> None:
    for row, asked in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        for n, answer in enumerate(asked):
            before = [m for m in range(n) if row[m] == row[n]]
            # the last symbol of the word, the first time, is followed by what stood at the very start
            expected = row[before[-1] + 1] if before else -100
            if not before and answer != -100:
                assert answer == row[0]
            else:
                assert answer == expected


def polynomial(batch: Batch, task: Task) -> None:
    codes = batch.inputs[0, :, :24]
    for tokens, asked in zip(batch.inputs, batch.targets, strict=True):
        to = [int((codes - token[24:48]).square().sum(-1).argmin()) for token in tokens]
        x = tokens[:, -1].tolist()
        for n in range(len(x)):
            total, there = 0.0, n
            for _ in range(5):
                total, there = total + x[there], to[there]
            assert math.isclose(asked[n, 0], total / math.sqrt(5), abs_tol=1e-5)


def cpm3(batch: Batch, task: Task) -> None:
    row, asked = batch.inputs[0].tolist(), batch.targets[0, :, 0]
    counts = [sum((x + 2 * a + 3 * b) % 7 == 0 for a in row for b in row) for x in row]
    # the same up to a shift and a factor
    own = torch.tensor(counts, dtype=torch.float32)
    assert torch.allclose((own - own.mean()) / own.std(), (asked - asked.mean()) / asked.std(), atol=1e-4)


def nearest(batch: Batch, task: Task) -> None:
    for tokens, asked in zip(batch.inputs, batch.targets, strict=True):
        assert tokens[:, -1].tolist() == [0.0] * (len(tokens) - 1) + [1.0]
        points, query = tokens[:-1, :-1], tokens[-1, :-1]
        best = max(range(len(points)), key=lambda n: float(points[n] @ query))
        assert torch.equal(asked[-1], points[best])
        assert asked[:-1].isnan().all()
    right, weights = task.measure(batch.answers(), batch)
    assert right.tolist() == [1.0] * len(batch.inputs) == weights.tolist()
    assert task.measure(-batch.answers(), batch)[0].sum() == 0


def regression(batch: Batch, task: Task) -> None:
    x, y = batch.inputs[:, ::2, :-1].double(), batch.targets[:, ::2].double()
    assert torch.equal(batch.inputs[:, 1::2, -1], batch.targets[:, ::2][:, :-1, 0])
    assert batch.targets[:, 1::2].isnan().all()
    found = torch.linalg.lstsq(x, y).solution
    assert (x @ found - y).square().mean() < 0.1**2 * 1.2
    outputs = batch.answers().clone()
    outputs.view(len(x), -1)[:, -1] += 2
    assert task.measure(outputs, batch)[0].tolist() == pytest.approx([4.0] * len(x))


def relational(batch: Batch, task: Task) -> None:
    for (a, b, c, d), label in zip(batch.inputs, batch.targets.tolist(), strict=True):
        assert label == int(torch.equal(a, b) == torch.equal(c, d))


def listops(batch: Batch, task: Task) -> None:
    def value(row: list[int]) -> int:
        symbol = row.pop(0)
        if symbol < 10:
            return symbol
        found = []
        while row[0] != 14:
            found.append(value(row))
        row.pop(0)
        return value_of(("MAX", "MIN", "MED", "SM")[symbol - 10], found)

    assert batch.padding is not None
    for row, real, label in zip(batch.inputs, batch.padding, batch.targets.tolist(), strict=True):
        assert value(row[real].tolist()) == label


def text(batch: Batch, task: Task) -> None:
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    found = corpus(1024, None)
    bits, size = task.measure(torch.zeros(batch.answers().numel(), 1024), batch)
    assert torch.allclose(bits, torch.full_like(bits, 10.0))
    assert torch.equal(size, found.sizes[batch.targets.flatten()])


def digits(batch: Batch, task: Task) -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    known = {
        tuple(picture.ravel().tolist()): int(label)
        for picture, label in zip(raw.images, raw.target, strict=True)
    }
    pictures = (batch.inputs.view(-1, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 64) + 1) * 8
    found = [known.get(tuple(picture.tolist())) for picture in pictures]
    labels = batch.targets.tolist()
    assert all(own in (None, label) for own, label in zip(found, labels, strict=True))  # None: it was moved


SOLVERS: dict[str, Callable[[Batch, Task], None]] = {
    solver.__name__: solver
    for solver in (
        *(recall, needle, copy, induction, polynomial, cpm3),
        *(nearest, regression, relational, listops, text, digits),
    )
}


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_answers_are_right(name: str, split: str) -> None:
    SOLVERS[name](find(name).batch(split, 0, 16, 0), find(name))


@pytest.mark.parametrize("name", TASKS)
def test_yardsticks_are_reached_by_what_they_say(name: str) -> None:
    found = find(name).yardsticks()
    assert found
    assert all(math.isfinite(score) and score >= 0 for score in found.values())
    if name == "regression":
        assert found["ridge regression"] < 0.03 < found["nothing learned"]
    if name == "cpm3":
        assert found["nothing learned"] == pytest.approx(1, abs=0.1)


def test_digits_hold_out_pictures_that_are_never_trained_on() -> None:
    task = find("digits")
    asked = [task.batch("validation", n, 64, 0) for n in range(task.batches("validation", 64))]
    pictures = torch.cat([batch.inputs for batch in asked]).flatten(1)
    assert len(pictures) == 360
    trained = torch.cat([task.batch("train", n, 64, 0).inputs for n in range(40)]).flatten(1)
    same = (torch.cdist(pictures.double(), trained.double()) < 1e-6).any()
    assert not same


def test_objects_of_the_game_are_new_where_they_should_be() -> None:
    task = find("relational")

    def objects(split: str) -> set[tuple[float, ...]]:
        return {tuple(one) for one in task.batch(split, 0, 512, 0).inputs.flatten(0, 1).tolist()}

    assert objects("train") & objects("validation")
    assert not objects("train") & objects("new objects")


def test_a_lower_median_and_a_sum() -> None:
    assert value_of("MED", [9, 1, 4, 7]) == 4
    assert value_of("SM", [9, 8]) == 7
    assert value_of("MAX", [3, 9, 1]) == 9
    assert value_of("MIN", [3, 9, 1]) == 1


# ---- sizes, files and refusals ----


@pytest.mark.parametrize("name", [name for name, kind in TASKS.items() if kind.grows])
def test_tasks_grow(name: str) -> None:
    task = find(name)
    larger = task.scaled(2)
    assert larger != task
    assert larger.batch("train", 0, 2, 0).inputs.shape[1] >= task.length
    assert task.scaled(1) is task


def test_what_does_not_grow_says_so() -> None:
    with pytest.raises(ConfigError, match="scale must be 1: the size of digits is that of its data"):
        find("digits").scaled(2)
    with pytest.raises(ConfigError, match="scale must be a finite number above 0"):
        find("recall").scaled(-1)


def test_names_are_suggested() -> None:
    with pytest.raises(UnknownName, match="no task is called 'recal'; did you mean 'recall'"):
        find("recal")
    with pytest.raises(ConfigError, match="task must be a name"):
        find(3)  # type: ignore[arg-type]


TASK = """
import torch
from polyhead.league import Batch, Task
from polyhead.league.seeds import generator


class Parity(Task):
    name = "parity"
    summary = "whether the sum so far is odd"
    bits: int = 8
    vocabulary = 2
    outputs = 2

    @property
    def length(self):
        return self.bits

    def batch(self, split, number, size, seed):
        inputs = torch.randint(2, (size, self.bits), generator=generator(split, number, seed))
        return Batch(inputs, inputs.cumsum(-1) % 2)
"""


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "parity.py"
    file.write_text(TASK)
    task = find(str(file))
    assert task.name == "parity"
    assert task.batch("train", 0, 4, 0).inputs.shape == (4, 8)
    file.write_text("x = 1")
    with pytest.raises(ConfigError, match="must define one subclass of polyhead.league.Task; it defines 0"):
        find(str(file))
    file.write_text("1 / 0")
    with pytest.raises(ConfigError, match="cannot be run: ZeroDivisionError"):
        find(str(file))
    with pytest.raises(ConfigError, match="there is no file"):
        find(str(tmp_path / "absent.py"))


def test_a_text_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path / "kept"))
    file = tmp_path / "own.txt"
    file.write_text("\n\n".join(f"Paragraph {n}: " + "words that go on and on. " * 20 for n in range(200)))
    task = with_data("text", file)
    assert isinstance(task, TextTask)
    assert task.batch("train", 0, 2, 0).inputs.shape == (2, 128)
    assert list((tmp_path / "kept" / "texts").glob("*.npz"))
    with pytest.raises(ConfigError, match="numbers do not compare"):
        TextTask(digest=task.digest)
    for content, message in (("", "holds 0 characters"), ("short", "holds 5 characters")):
        other = tmp_path / f"{len(content)}.txt"
        other.write_text(content)
        with pytest.raises(ConfigError, match=message):
            with_data("text", other)
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        with_data("text", tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="the task recall makes its own questions"):
        with_data("recall", file)


def test_a_text_that_has_changed_is_another_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path / "kept"))
    file = tmp_path / "own.txt"
    first, second = (
        "\n\n".join(f"Part {n + more}: " + "words that go on and on. " * 20 for n in range(100, 200))
        for more in (0, 317)  # equally long
    )
    file.write_text(first)
    task = TextTask(file=str(file), tokenizer=300)
    asked = task.batch("validation", 0, 4, 0).inputs
    file.write_text(first)  # touched, and the same
    os.utime(file, ns=(1, 1))
    assert torch.equal(task.batch("validation", 0, 4, 0).inputs, asked)
    file.write_text(second)
    other = TextTask(file=str(file), tokenizer=300)
    assert other.digest != task.digest
    assert not torch.equal(other.batch("validation", 0, 4, 0).inputs, asked)
    with pytest.raises(ConfigError, match=f"and not {task.digest}: numbers do not compare"):
        task.batch("validation", 0, 4, 0)


def test_the_held_out_documents_are_not_in_the_training_text() -> None:
    found = corpus(1024, None)
    train = set(map(tuple, found.train.unfold(0, 32, 1)[::7].tolist()))
    held_out = list(map(tuple, found.held_out.unfold(0, 32, 32).tolist()))
    shared = sum(piece in train for piece in held_out) / len(held_out)
    assert shared < 0.1  # some docstrings say the same for several functions


def test_documentation_is_read_once_and_again_where_a_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "library"
    library.mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * 7 + n * n) % 97}" for n in range(60))
        (library / f"module{number}.py").write_text(f'"""{words}"""\n')
    (library / "test").mkdir()
    (library / "test" / "module.py").write_text("broken (")
    monkeypatch.setattr(tokens_of.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path / "cache"))

    def digest() -> str:
        tokens_of._made.cache_clear()
        return corpus(300, None).digest

    try:
        first = digest()
        with monkeypatch.context() as reading:
            reading.setattr(tokens_of, "_documentation", lambda files: pytest.fail("it was read again"))
            assert digest() == first
        (library / "module0.py").write_text('"""' + "other words " * 40 + '"""')
        assert digest() != first
    finally:
        tokens_of._made.cache_clear()


def test_changed_sizes_keep_the_shape_of_the_model() -> None:
    assert changed(Sizes(64, 4, 2, 128), dim=128) == Sizes(128, 4, 2, 256)
    assert changed(Recipe(), rate=None, batch=8) == Recipe(batch=8)
    with pytest.raises(ConfigError, match="heads must be at least 1"):
        changed(Sizes(), heads=0)


def test_the_rate_rises_and_falls() -> None:
    recipe = Recipe(steps=100, rate=1.0, warmup=0.1)
    rates = [recipe.rate_at(n) for n in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (n + 1) for n in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert 100 in recipe.looks_at()
    assert len(recipe.looks_at()) == 20
    assert Recipe(steps=3).looks_at() == {1, 2, 3}


def test_a_paragraph_that_comes_twice_is_not_learned_from_and_held_out(tmp_path: Path) -> None:
    file = tmp_path / "again.txt"
    file.write_text("\n\n".join(["the same line of a song, sung again and again " * 20] * 100))
    with pytest.raises(ConfigError, match="in 1 different paragraphs"):
        with_data("text", file)


NEW = "from polyhead.league import Batch, Task\nimport torch\nclass Own(Task):\n"
WHAT = "    name = 'own'\n    summary = 'of my own'\n    length = 4\n    outputs = 2\n    vocabulary = 2\n"
ASK = "    def batch(self, split, number, size, seed):\n        return "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise SystemExit(3)", "cannot be run: SystemExit: 3"),
        ("def (", "cannot be run: SyntaxError"),
        ("x = '\0'", "cannot be run"),
        (NEW + "    pass", "no attribute 'name'"),
        (NEW + "    name = 'own'\n    n: int", "every field needs a default"),
        (NEW + "    name = 'own'\n    summary = 'mine'\n    vocabulary = 2", "a task must say its outputs"),
        (NEW + WHAT.replace("vocabulary", "words"), "neither a vocabulary nor a width"),
        (NEW + WHAT, "a task must have a method batch"),
        (NEW + WHAT + ASK + "5", "it does not work: AttributeError"),
        (NEW + WHAT + ASK + "Batch(torch.zeros(size, 5).long(), torch.zeros(size).long())", "of length 4"),
        (NEW + WHAT + ASK + "Batch(torch.full((size, 4), 9), torch.zeros(size, 4).long())", "IndexError"),
        (NEW + WHAT + ASK + "Batch(torch.zeros(size, 4).long(), torch.full((size, 4), 7))", "out of bounds"),
        (
            NEW + WHAT + "    answer = 'word'\n" + ASK + "Batch(torch.zeros(size, 4), 0)",
            "answer must be one of",
        ),
        (
            NEW + WHAT + ASK + "Batch(torch.zeros(size, 4).long(), torch.zeros(size).long())",
            r"its answer is 'symbols', so the targets .* of length 4 are \(2, 4\); they are \(2,\)",
        ),
    ],
)
def test_a_file_that_does_not_work_is_found_before_anything_is_trained(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        plan(["mha"], file)


WORKS = NEW + WHAT + ASK + "Batch(torch.zeros(size, 4).long(), torch.zeros(size, 4).long())\n"
MEASURE = "    def measure(self, outputs, batch):\n        return "
LOSS = "    def loss(self, outputs, batch):\n        return "
BATCHES = "    def batches(self, split, size):\n        return "
YARDSTICKS = "    def yardsticks(self):\n        return "


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("    better = 'smaller'", "better must be one of higher, lower; got 'smaller'"),
        ("    positions = 'rotari'", "positions must be one of rotary, alibi, learned, none; got 'rotari'"),
        ("    read_from = 'end'", "read_from must be one of token, mean; got 'end'"),
        ("    causal = 'no'", "causal must be True or False; got 'no'"),
        ("    metric = None", "metric must be a text; got None"),
        ("    summary = 5", "summary must be a text; got 5"),
        ("    name = None", "name must be a text; got None"),
        ("    recipe = None", "recipe must be a Recipe; got None"),
        ("    sizes = {'dim': 16}", "sizes must be a Sizes; got {'dim': 16}"),
        (
            "    grows = ('bits',)\n    tokens: int = 4",
            "grows names 'bits', which must be a field, .*; its fields are tokens",
        ),
        ("    grows = ('tokens',)\n    tokens: str = 'a'", "grows names 'tokens', .* a number; it is 'a'"),
        ("    tokens: int = 4\n    grows = 'tokens'", "grows must be a tuple of fields; got 'tokens'"),
        (
            "    splits = ('test',)",
            "splits must be a tuple of texts with 'validation' among them; got .'test'",
        ),
        ("    splits = 'validation'", "splits must be a tuple of texts"),
        ("    splits = ()", "splits must be a tuple of texts"),
        ("    splits = ('validation', 'rank')", "the split 'rank' would be a second column"),
        ("    splits = ('validation', 'difference ±')", "the split 'difference ±' would be a second column"),
        ("    splits = ('validation', 'validation ±')", "the split 'validation ±' would be a second column"),
        ("    splits = ('validation', 'validation')", "the split 'validation' would be a second column"),
        (
            YARDSTICKS + "{'a guess': 'half'}",
            "yardsticks must be numbers by name; got 'half' .* for 'a guess'",
        ),
        (YARDSTICKS + "{'a guess': None}", "yardsticks must be numbers by name; got None"),
        (YARDSTICKS + "{3: 0.5}", "yardsticks must be numbers by name; got 0.5 .* for 3"),
        (MEASURE + "0.5, 1.0", r"measure must give two tensors \(n,\), points and weights .* got 0.5"),
        (MEASURE + "outputs.argmax(-1).float()", r"measure must give two tensors .* got a tensor \(8,\)"),
        (MEASURE + "outputs, outputs", "measure must give two tensors"),
        (MEASURE + "outputs[:, 0], outputs[:1, 0]", "measure must give two tensors"),
        (BATCHES + "0", "batches of 'validation' must be at least 1; got 0"),
        (BATCHES + "2.5", "batches of 'validation' must be an integer"),
        (LOSS + "1.0", "loss must be one number, a tensor with a gradient; got 1.0"),
        (LOSS + "outputs.sum().detach()", r"loss must be .* got a tensor \(\) .* without one"),
        (LOSS + "outputs.sum(-1)", r"loss must be one number, .* got a tensor \(8,\)"),
        (
            "    def __post_init__(self):\n        raise ValueError('boom')",
            "it cannot be made: ValueError: boom",
        ),
        ("    def __post_init__(self):\n        self.x = 3", "it cannot be made: FrozenInstanceError"),
    ],
)
def test_what_a_task_says_and_gives_is_held_against_what_a_league_can_work_with(
    more: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "own.py"
    file.write_text(WORKS + more, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        plan(["mha"], file, scale=2 if "grows" in more else 1)


def test_a_task_that_works_is_let_through(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(WORKS + YARDSTICKS + "{'a guess': torch.tensor(0.5), 'unknown': float('nan')}")
    with torch.no_grad():  # its gradient is looked at all the same
        settled = plan(["mha"], file)
    assert settled.rules.task.name == "own"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            "mha:mask=neighborhood((6, 8), 3)",
            "the questions of 'longer': neighborhood: the grid 6×8 has 48 places",
        ),
        ("fixed_sequence:length=60", "the questions of 'longer': the fixed sequence has 60 tokens"),
        ("fixed_sequence:length=20", "the questions of 'train': the fixed sequence has 20 tokens"),
    ],
)
def test_a_contender_that_cannot_do_a_split_is_found_before_anything_is_trained(
    label: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{label}: it cannot take {message}")):
        plan(["mha", label], "copy", sizes=Sizes(dim=16, heads=2, layers=1))


def test_questions_are_tried_out_without_a_trace() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plan(["mha"], "copy")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_that_says_something_else_is_another_task(tmp_path: Path) -> None:
    text = NEW + WHAT + ASK + "Batch(torch.zeros(size, 4).long(), torch.zeros(size, 4).long())\n"
    file, league = tmp_path / "own.py", tmp_path / "league"
    file.write_text(text)
    Folder(league, plan(["mha"], str(file)).rules)
    file.write_text("# a comment\n" + text)
    Folder(league, plan(["mha"], file).rules)
    file.write_text(text.replace("torch.zeros(size, 4)", "torch.ones(size, 4)"))
    with pytest.raises(ConfigError, match="under other rules .task was"):
        Folder(league, plan(["mha"], file).rules)


def test_a_file_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        NEW + WHAT + ASK + "Batch(torch.zeros(size, 4).long(), torch.zeros(size, 4).long())\n"
    )
    assert plan(["mha"], "own.py").task_file == str(tmp_path / "own.py")


def test_a_label_is_read_from_a_class_token_or_from_the_mean_of_real_tokens() -> None:
    small = Sizes(dim=16, heads=2, layers=1, mlp=16)
    own = find("relational")
    mean = replace(own, read="mean")  # type: ignore[call-arg]
    for task in (own, mean):
        (one,) = plan(["mha"], task, sizes=small).contenders
        model = one.model(task)
        assert (model.label is not None) == (task.read_from == "token")
        assert model(task.batch("train", 0, 4, 0)).shape == (4, 2)
        assert one.counted.params == sum(p.numel() for p in model.parameters())
    with pytest.raises(UnknownName, match="did you mean 'mean'"):
        replace(own, read="means")  # type: ignore[call-arg]
    # padding has no part in either
    batch = find("listops").batch("train", 0, 8, 0)
    assert batch.padding is not None
    other = Batch(batch.inputs.masked_fill(~batch.padding, 5), batch.targets, batch.padding)
    for task in (find("listops"), MeanOfLists()):
        (one,) = plan(["mha"], task, sizes=small).contenders
        model = one.model(task).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(batch), model(other))
