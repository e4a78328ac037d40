"""The colours of the report, for light and dark surroundings.

The role colours stay apart for every kind of colour vision: under simulated protanopia, deuteranopia and
tritanopia no two of them come nearer than 0.1 in OKLab (a test holds them to it).
"""

from __future__ import annotations

__all__ = ["DARK", "LIGHT", "css_variables", "role_variable"]

_ROLES_LIGHT = {
    "sink": "#6f7075",
    "local": "#84c6fa",
    "previous token": "#3158a4",
    "induction": "#d46ed9",
    "retrieval": "#c44817",
    "broad": "#2da571",
    "mixed": "#d9d6ce",
}

_ROLES_DARK = {
    "sink": "#636465",
    "local": "#9bd4fd",
    "previous token": "#466ec7",
    "induction": "#d382d0",
    "retrieval": "#e27313",
    "broad": "#38a977",
    "mixed": "#3d4048",
}

# a ramp for measurements and pictures: paper for nothing, ink for much
_RAMP_LIGHT = ("#f4f2ea", "#d3e5da", "#8cc4c1", "#4395b4", "#2c5f9b", "#22336f", "#150f33")
_RAMP_DARK = ("#1a1f27", "#1d3b56", "#246a8d", "#3f9ba6", "#82c8ad", "#d3e9b5", "#fffbe3")


def role_variable(role: str) -> str:
    """The name of the CSS variable that holds a role's colour."""
    return "--role-" + role.replace(" ", "-")


def _variables(surfaces: dict[str, str], roles: dict[str, str], ramp: tuple[str, ...]) -> dict[str, str]:
    ramps = {f"--ramp-{i}": colour for i, colour in enumerate(ramp)}
    return surfaces | {role_variable(role): colour for role, colour in roles.items()} | ramps


LIGHT = _variables(
    {
        "--paper": "#fbfaf7",
        "--panel": "#ffffff",
        "--sunk": "#f1efe9",
        "--ink": "#1d1f24",
        "--soft": "#575b64",
        "--line": "#dedbd2",
        "--accent": "#b23c0d",
        "--other": "#2c5f9b",
        "--chance": "#7b7f88",
        "--look": "#1f87a8",
    },
    _ROLES_LIGHT,
    _RAMP_LIGHT,
)

DARK = _variables(
    {
        "--paper": "#14161a",
        "--panel": "#1b1e24",
        "--sunk": "#23272e",
        "--ink": "#eceae4",
        "--soft": "#a7abb3",
        "--line": "#353a43",
        "--accent": "#f28b3c",
        "--other": "#6ea6e8",
        "--chance": "#8d929b",
        "--look": "#45b3cf",
    },
    _ROLES_DARK,
    _RAMP_DARK,
)


def css_variables() -> str:
    """Rules that define every colour: light, and dark where the reader prefers it (but not on paper)."""

    def block(colours: dict[str, str]) -> str:
        return ":root{" + ";".join(f"{name}:{colour}" for name, colour in colours.items()) + "}"

    return f"{block(LIGHT)}\n@media screen and (prefers-color-scheme:dark){{{block(DARK)}}}"
