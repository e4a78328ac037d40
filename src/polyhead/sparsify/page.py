"""The comparison as a page that opens from a disk."""

from __future__ import annotations

from collections.abc import Iterator

from polyhead.report.drawing import colour
from polyhead.report.standalone import asset, standalone
from polyhead.sparsify.plots import drawings, place
from polyhead.sparsify.table import Comparison

__all__ = ["build_page"]


def build_page(comparison: Comparison) -> str:
    """The text of `sparsify.html`.

    Raises:
        MissingExtra: without jinja2.
    """
    settings = comparison.settings
    return standalone(
        asset("polyhead.sparsify", "template.html"),
        css=asset("polyhead.report", "light.css"),
        script=asset("polyhead.report", "light.js"),
        settings=settings,
        shares=comparison.shares,
        rounds=comparison.rounds,
        machine=comparison.machine,
        verdict=comparison.verdict(),
        heads=comparison.heads,
        rows=list(_rows(comparison)),
        drawings=drawings(comparison),
        lengths=list(_by_length(comparison)),
        depths=list(_by_depth(comparison)),
        methods=[(name, own.summary, own.paper) for name, own in comparison.methods.items()],
    )


def _rows(comparison: Comparison) -> Iterator[dict[str, object]]:
    for row in comparison.rows:
        number = place(comparison, row)
        yield {
            "place": number,
            "colour": colour(number).split()[0],
            "cells": comparison.cells(row),
            "best": row is comparison.best,
        }


def _by_length(comparison: Comparison) -> Iterator[list[str]]:
    """Facts that are found, of those unlike each other and of those alike, by length."""
    for row in comparison.rows:
        cells = [row.label]
        for length in comparison.settings.lengths:
            for alike in (False, True):
                own = [f.right for f in row.outcome.found if f.length == length and f.alike == alike]
                cells.append(f"{sum(own)}/{len(own)}")
        yield cells


def _by_depth(comparison: Comparison) -> Iterator[list[str]]:
    """Facts that are found, by quarters of the text, over all lengths."""
    for row in comparison.rows:
        cells = [row.label]
        for quarter in range(4):
            own = [f.right for f in row.outcome.found if min(3, int(4 * f.depth)) == quarter]
            cells.append(f"{sum(own)}/{len(own)}")
        yield cells
