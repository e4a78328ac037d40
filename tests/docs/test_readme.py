"""The README's Python blocks run as they stand; those that load a model are run in `tests/real`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.S | re.M)
LIGHT = [block for block in BLOCKS if "hf.load" not in block]


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 3
    assert len(LIGHT) == 2


@pytest.mark.parametrize("block", LIGHT, ids=range(len(LIGHT)))
def test_the_examples_run(block: str) -> None:
    exec(compile(block, str(README), "exec"), {})


def test_what_it_points_to_is_there() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert targets
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing
