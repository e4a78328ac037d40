"""Every example of the guides is run, and gives what stands there.

Blocks of `python` run as they are; those of `pycon` run with SmolLM2, where that can be had.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import polyhead as ph
from polyhead.errors import PolyheadError
from report.synthetic import report
from tasks.tokens import llama

GUIDES = sorted((Path(__file__).parents[2] / "docs" / "guide").glob("*.md"))
WITH_MODEL = [g for g in GUIDES if "```pycon" in g.read_text(encoding="utf-8")]
PYCON = re.compile(r"^```pycon\n(.*?)^```$", re.S | re.M)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def failures(guide: Path, text: str) -> int:
    examples = doctest.DocTestParser().get_doctest(text, {}, guide.name, str(guide), 0)
    return doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(examples).failed


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_examples(guide: Path) -> None:
    text = PYCON.sub("", guide.read_text(encoding="utf-8"))
    assert failures(guide, text.replace("```python\n", "").replace("\n\n```\n", "\n\n")) == 0


@pytest.mark.real
@pytest.mark.parametrize("guide", WITH_MODEL, ids=lambda path: path.stem)
def test_examples_with_smollm2(guide: Path) -> None:
    try:
        ph.hf.load("smollm2")
    except PolyheadError as error:
        pytest.skip(f"the demo model cannot be had: {error}")
    assert failures(guide, "\n".join(PYCON.findall(guide.read_text(encoding="utf-8")))) == 0


def test_heads_out_of_a_report(tmp_path, monkeypatch) -> None:
    guide = next(g for g in GUIDES if g.stem == "caches").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```$", guide, re.S | re.M) if "ReportData" in b)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report").mkdir()
    data = report(layers=2, heads=4, kv_heads=2, tokens=32)
    (tmp_path / "report" / "report.json").write_text(data.to_json(), encoding="utf-8")
    names = {"ph": ph, "model": llama()}
    exec(compile(block, "caches.md", "exec"), names)
    assert data.recommendation is not None
    kept = {(k, h) for k, row in enumerate(names["cache"].full) for h, whole in enumerate(row) if whole}
    assert kept == set(data.recommendation.after.heads) != set()
