"""A profile alone as a page: the report without the savings curve."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from polyhead.errors import ConfigError
from polyhead.report import data as d
from polyhead.report.assemble import assemble, machine
from polyhead.report.page import build_page, require_jinja

__all__ = ["write_profile"]


def write_profile(profile: Any, model: Any, tokenizer: Any, path: str | os.PathLike[str]) -> None:
    """Write a profile as one HTML file that opens offline; the file is there whole or not at all.

    Raises:
        ConfigError: the profile is not one of tokens, or the file cannot be written.
        MissingExtra: jinja2 is not installed.
    """
    require_jinja()
    if not profile.ids or tokenizer is None:
        raise ConfigError(
            "a page shows the tokens that the heads look at: profile a text with its tokenizer to get one"
        )
    target = Path(path)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise ConfigError(f"path must name a file in a folder that exists; got {str(path)!r}")
    from polyhead import __version__

    name = getattr(model, "name_or_path", "") or type(model).__name__
    report = assemble(name, model, tokenizer, profile, torch.tensor(profile.ids), "the text given")
    about = d.Run(
        version=__version__,
        command=f"profile.to_html({str(path)!r})",
        date=datetime.now().strftime("%Y-%m-%d %H:%M"),
        machine=machine(),
    )
    page = build_page(replace(report, run=about))
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"path {str(path)!r} cannot be written: {error.strerror or error}") from error
