"""The English texts that come with Polyhead: 13,000 tokens or more each, with nothing in common."""

from __future__ import annotations

from importlib import resources

from polyhead.errors import ConfigError

__all__ = ["held_out_text", "sample_text", "sentences"]

_LONGEST = 40  # words of a sentence


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

    Those with more than 40 words are cut after so many of them.

    Raises:
        ConfigError: there is none.
    """
    found: list[str] = []
    sentence: list[str] = []
    for word in text.split():
        sentence.append(word)
        if word[-1] in ".!?" or len(sentence) == _LONGEST:
            found.append(" ".join(sentence))
            sentence = []
    if sentence:
        found.append(" ".join(sentence))
    if not found:
        raise ConfigError("the text holds no words; give one with some sentences")
    return found
