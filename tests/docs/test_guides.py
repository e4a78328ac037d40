"""Every example of the guides is run, and gives what stands there."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

GUIDES = sorted((Path(__file__).parents[2] / "docs" / "guide").glob("*.md"))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_examples(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8").replace("```python\n", "").replace("\n\n```\n", "\n\n")
    examples = doctest.DocTestParser().get_doctest(text, {}, guide.name, str(guide), 0)
    flags = doctest.IGNORE_EXCEPTION_DETAIL | doctest.ELLIPSIS
    assert doctest.DocTestRunner(verbose=False, optionflags=flags).run(examples).failed == 0
