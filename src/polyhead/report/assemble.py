"""From what was measured to the data of a report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from polyhead.machine import processor
from polyhead.report import data as d
from polyhead.report import savings as curve
from polyhead.report import words
from polyhead.report.packing import lookup_queries, pack_lookups, pack_pictures, picture_side

__all__ = ["assemble", "machine"]

_LOOKUPS = 4  # most attended positions that are kept for each token


def assemble(
    name: str,
    model: Any,
    tokenizer: Any,
    profile: Any,
    ids: torch.Tensor,
    text: str | os.PathLike[str] | None,
    measured: curve.Curve | None = None,
    notes: Sequence[str] = (),
    extra: Sequence[Any] = (),
) -> d.ReportData:
    """All that the page shows, but for when and where it was measured; `extra` are scores of KV heads."""
    causal = not profile.is_encoder
    heads = sum(layer.heads for layer in profile.layers)
    pictures = profile.pictures(picture_side(heads, causal=causal, tokens=len(ids)))
    queries = lookup_queries(heads, len(ids), k=_LOOKUPS)
    looks = profile.lookups(queries.tolist(), k=_LOOKUPS)
    return d.ReportData(
        model=d.Model(
            name=Path(name).name or name,
            architecture=type(model).__name__,
            parameters=sum(p.numel() for p in model.parameters()),
            head_dim=profile.layers[0].head_dim,
            heads=tuple(layer.heads for layer in profile.layers),
            kv_heads=tuple(layer.kv_heads for layer in profile.layers),
            is_encoder=profile.is_encoder,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        ),
        text=_text(tokenizer, profile, ids, text),
        run=d.Run("", "", "", ""),
        measurements=(
            *(_measurement(s) for s in profile.values()),
            *(_of_readers(s, profile.layers) for s in extra),
        ),
        roles=_roles(profile),
        pictures=pack_pictures(pictures.mass, causal=causal),
        lookups=pack_lookups(queries, looks.positions, looks.weights),
        savings=measured.savings if measured else None,
        recommendation=measured.recommendation if measured else None,
        notes=tuple(notes),
    )


def _text(tokenizer: Any, profile: Any, ids: torch.Tensor, text: str | os.PathLike[str] | None) -> d.Text:
    tokens = tuple(tokenizer.decode([i]) for i in ids.tolist())
    received: tuple[float, ...] = ()
    if profile.received:
        rows = torch.cat([torch.as_tensor(r) for r in profile.received])
        received = tuple(rows.nanmean(0).nan_to_num(0.0).tolist())
    # a sink of the text is one in at least a tenth of the layers
    counts: dict[int, int] = {}
    for layer in profile.sinks:
        for position in layer:
            counts[position] = counts.get(position, 0) + 1
    sinks = tuple(sorted(p for p, n in counts.items() if 10 * n >= len(profile.layers)))
    name = "the packaged English sample" if text is None else Path(text).name
    return d.Text(name, tokens, sinks, received)


def _measurement(scores: Any) -> d.Measurement:
    from polyhead.heads import MEASUREMENTS

    known = MEASUREMENTS.get(scores.name)
    title = known.title if known is not None else scores.name
    title = title[:1].upper() + title[1:]
    values = tuple(tuple(float(v) for v in layer) for layer in scores.values)
    return d.Measurement(scores.name, title, scores.meaning, scores.unit, scores.direction, values)


def _of_readers(scores: Any, layers: Sequence[Any]) -> d.Measurement:
    """A score of KV heads, told for every query head that reads them."""
    values = tuple(
        tuple(float(v) for v in row for _ in range(layer.heads // layer.kv_heads))
        for row, layer in zip(scores.values, layers, strict=True)
    )
    title = scores.name.replace("_", " ").capitalize() + " of its KV head"
    return d.Measurement(scores.name, title, scores.meaning, scores.unit, scores.direction, values)


def _roles(profile: Any) -> d.Roles:
    found = profile.roles
    rules = tuple(
        d.RoleRule(
            rule.role,
            rule.text[:1].upper() + rule.text[1:] + ".",
            (d.Condition(rule.measurement, ">=", rule.threshold),) if rule.measurement else (),
        )
        for rule in found.rules
    )
    return d.Roles(rules, found.by_layer)


def machine() -> str:
    """The processor, how many of its threads are used, and the versions that count."""
    import transformers

    threads = words.plural(torch.get_num_threads(), "thread")
    return f"{processor()}, {threads}, torch {torch.__version__}, transformers {transformers.__version__}"
