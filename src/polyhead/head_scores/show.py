"""Head scores as a table and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyhead.errors import MissingExtra

if TYPE_CHECKING:
    from polyhead.head_scores.scores import HeadScores

__all__ = ["figure", "frame"]


def frame(scores: HeadScores) -> Any:
    """A pandas DataFrame with the columns layer, head and the name of the score."""
    try:
        import pandas
    except ImportError as error:
        raise MissingExtra("pandas", "report", "HeadScores.to_frame()") from error
    layers, heads = zip(*scores.pairs, strict=True) if len(scores) else ((), ())
    return pandas.DataFrame({"layer": layers, "head": heads, scores.name: scores.flat})


def figure(scores: HeadScores) -> Any:
    """A plotly Figure: layers by heads, coloured by value."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise MissingExtra("plotly", "report", "HeadScores.plot()") from error
    width = max(scores.widths, default=0)
    grid = [[*layer, *[None] * (width - len(layer))] for layer in scores.values]
    kind = "head" if scores.level == "query" else "key/value head"
    hover = f"layer %{{y}}, {kind} %{{x}}: %{{z:.4g}} {scores.unit}<extra></extra>"
    heat = go.Heatmap(
        z=grid, colorscale="Viridis", colorbar={"title": scores.unit or scores.name}, hovertemplate=hover
    )
    made = go.Figure(heat)
    made.update_layout(title=f"{scores.name}: {scores.meaning}" if scores.meaning else scores.name)
    made.update_xaxes(title=kind, dtick=1)
    made.update_yaxes(title="layer", autorange="reversed")
    return made
