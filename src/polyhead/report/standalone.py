"""A page that stands alone: one HTML file that opens from a disk and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

from polyhead import __version__
from polyhead.report.drawing import LINES_CSS
from polyhead.report.page import require_jinja
from polyhead.report.palette import css_variables
from polyhead.report.svg import SHAPES_CSS

__all__ = ["asset", "standalone"]


def asset(package: str, name: str) -> str:
    """The text of a file in the `assets` of a package."""
    return (resources.files(package) / "assets" / name).read_text(encoding="utf-8")


def standalone(template: str, *, css: str = "", script: str = "", **values: Any) -> str:
    """A filled template, with the project's style, and a script that no other can take the place of.

    Args:
        template: jinja2's, which extends `frame.html` by the blocks `title` and `body`.
        css: style beyond the project's own.
        script: what the page runs.
        values: what the template says.

    Raises:
        MissingExtra: without jinja2.
    """
    require_jinja()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"frame.html": asset("polyhead.report", "frame.html")}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    script = "\n" + script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (css_variables(), asset("polyhead.report", "style.css"), SHAPES_CSS, LINES_CSS, css)
    page = environment.from_string(template).render(
        **values, version=__version__, css="\n".join(style), script=script, script_hash=f"sha256-{digest}"
    )
    return page.encode("utf-8", "replace").decode()
