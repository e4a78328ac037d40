"""The English texts that come with Polyhead: 13,000 tokens or more each, with nothing in common."""

from __future__ import annotations

from importlib import resources

from polyhead.errors import ConfigError

__all__ = ["held_out_text", "sample_text", "sentences"]


def sample_text() -> str:
    """Plain English prose (of the Python language's documentation): for measuring, and for choosing by it."""
    return _read("sample.txt")


def held_out_text() -> str:
    """Prose of the same kind on other topics: for testing what was chosen on `sample_text`."""
    return _read("held_out.txt")


def _read(name: str) -> str:
    return resources.files("polyhead").joinpath("data", name).read_text(encoding="utf-8")


def sentences(text: str) -> list[str]:
    """The sentences of a text: cut after a full stop, question or exclamation mark and white space.

    Raises:
        ConfigError: there is none.
    """
    found: list[str] = []
    start = 0
    words = " ".join(text.split())
    for k in range(len(words) - 1):
        if words[k] in ".!?" and words[k + 1] == " ":
            found.append(words[start : k + 1])
            start = k + 2
    if words[start:]:
        found.append(words[start:])
    if not found:
        raise ConfigError("the text holds no words; give one with some sentences")
    return found
