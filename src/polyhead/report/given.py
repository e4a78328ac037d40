"""What the main job is given, checked before the work starts: sizes, folder, text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from polyhead.errors import ConfigError
from polyhead.report.effort import QUICK, Effort
from polyhead.report.write import FILES, check_folder

__all__ = ["LENGTH", "effort_of", "read_text", "tokens_of", "usable_folder"]

LENGTH = 2048
"""How many tokens of a text are read unless the user says so."""

_LEAST = 32  # tokens of a text: fewer say nothing about heads


def effort_of(
    seeds: int,
    seed: int,
    fractions: Sequence[float] | None,
    sink: int,
    window: int,
    quick: bool,
    losses: float = 0.05,
) -> Effort:
    """How much is tried, from the options of the command."""
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}")
    base = QUICK if quick else Effort()
    chosen = tuple(range(seed, seed + (1 if quick else seeds)))
    found = replace(base, seeds=chosen, sink=sink, window=window, losses=losses)
    return replace(found, fractions=tuple(fractions)) if fractions is not None else found


def usable_folder(out: str | os.PathLike[str]) -> Path:
    """The folder, if it may be written to and nothing but a report is in it."""
    folder = check_folder(out)
    if folder.is_dir():
        found = sorted(p.name for p in folder.iterdir())
        if found and not any((folder / name).is_file() for name in FILES):
            raise ConfigError(
                f"out: the folder {out} holds other files ({', '.join(found[:3])}) "
                "and no report; choose an empty or a new one"
            )
    return folder


def read_text(text: str | os.PathLike[str] | None) -> str:
    """The text of a file, or the packaged sample."""
    from polyhead.tasks import sample_text

    if text is None:
        return sample_text()
    path = Path(text).expanduser()
    try:
        found = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"text: there is no file {str(text)!r}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"text: {str(text)!r} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except OSError as error:
        raise ConfigError(f"text: {str(text)!r} cannot be read: {error.strerror}") from None
    if not found.strip():
        raise ConfigError(f"text: {str(text)!r} is empty; give a text of some sentences")
    return found


def tokens_of(
    model: Any,
    tokenizer: Any,
    source: str,
    text: str | os.PathLike[str] | None,
    length: int | None,
    console: Console,
) -> tuple[torch.Tensor, list[int] | None]:
    """The tokens that heads are looked at on, and those of the user's text that are left after them."""
    from polyhead.tasks.reading import context_length, encode

    if tokenizer is None:
        raise ConfigError("the model came without a tokenizer, so it cannot read a text")
    limit = context_length(model)
    ids = encode(tokenizer, source)
    name = "the packaged sample" if text is None else f"the text {str(text)!r}"
    if len(ids) < _LEAST:
        raise ConfigError(f"{name} has {len(ids)} tokens; to see what heads do it needs at least {_LEAST}")
    if length is not None:
        if not _LEAST <= length <= (limit or length):
            at_most = f" and at most {limit}, which the model can read" if limit else ""
            raise ConfigError(f"length must be at least {_LEAST}{at_most}; got {length}")
        if length > len(ids):
            raise ConfigError(f"{name} has {len(ids)} tokens, --length asks for {length}; give a longer text")
        count = length
    elif text is not None and limit is not None and len(ids) > limit:
        raise ConfigError(
            f"{name} has {len(ids):,} tokens and the model can read {limit:,}; "
            f"use its beginning with --length {min(LENGTH, limit)} (at most {limit})"
        )
    else:
        count = min(LENGTH, len(ids), limit or LENGTH)
    if text is not None and count < len(ids):
        console.print(
            f"reading the first {count:,} of {len(ids):,} tokens of {name} (--length changes this)",
            markup=False,
        )
    return ids[:count], None if text is None else ids[count:].tolist()
