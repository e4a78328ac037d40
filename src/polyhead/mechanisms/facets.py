"""What kind of attention a mechanism is, along the axes of a survey: what the catalogue can be asked for.

Attention is a weighted sum of values, Σ_i p(a(k_i, q)) v_i, with an alignment a and a distribution p. The
axes and the names of their values are those of paper 048, An Attentive Survey of Attention Models, arXiv
1904.02874; `complexity` and `cache` are added here. What the survey does not name is "other".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from polyhead.attend.normalizers import Entmax, Sigmoid, Softmax
from polyhead.checks import given, several
from polyhead.description import Part
from polyhead.errors import ConfigError
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.contract import AttentionModule

__all__ = ["FACETS", "Facets", "one_of"]

FACETS: dict[str, dict[str, str]] = {
    "sequences": {
        "self": "queries and keys come from one sequence",
        "distinctive": "queries and keys may come from two sequences",
        "co": "several sequences attend to each other jointly",
    },
    "levels": {
        "single": "attention over tokens",
        "multi": "attention over tokens and over groups of them, such as words and sentences",
    },
    "positions": {
        "global": "every position that the mask allows has a weight",
        "local": "only positions near the query or near a predicted one",
        "hard": "only positions that are chosen for their content",
    },
    "representations": {
        "single": "one weight for a pair of tokens and head",
        "multi": "weights over several versions of the input",
        "multi_dimensional": "one weight for every feature",
    },
    "alignment": {
        "scaled_dot": "q·k / √D, or with another constant factor",
        "dot": "q·k",
        "similarity": "a similarity such as the cosine, or a distance",
        "general": "qᵀ W k",
        "biased_general": "kᵀ (W q + b)",
        "activated_general": "act(qᵀ W k + b)",
        "kernel": "φ(q)·φ(k)",
        "concat": "wᵀ act(W [q; k] + b)",
        "additive": "wᵀ act(W₁ q + W₂ k + b)",
        "deep": "a network over both",
        "location": "from the query or the positions alone, whatever the key is",
        "feature": "wᵀ act(W₁ φ₁(K) + W₂ φ₂(K) + b)",
        "other": "none of these",
    },
    "distribution": {
        "softmax": "softmax",
        "sigmoid": "each weight by itself, in (0, 1)",
        "sparsemax": "Euclidean projection to the simplex",
        "entmax": "α-entmax",
        "hard": "all of the weight on one position",
        "sampled": "positions are drawn",
        "other": "none of these",
    },
    "complexity": {
        "superquadratic": "scores and values take more than O(L²) operations, as pairs of tokens do",
        "quadratic": "O(L²)",
        "subquadratic": "fewer than that, and more than O(L)",
        "linear": "O(L)",
    },
    "cache": {
        "growing": "decoding keeps something for every token",
        "constant": "decoding keeps a state of one size",
        "none": "decoding keeps nothing",
    },
}  # fmt: skip


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """`value`, or a `ConfigError` that lists what is allowed."""
    known = sorted(allowed)
    if not isinstance(value, str) or value not in known:
        near = get_close_matches(value, known, n=1, cutoff=0.6) if isinstance(value, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(known)}; got {given(value)}{hint}")
    return value


class Facets(Part):
    """One value on every axis, several for `sequences`.

    None stands for what the mechanism shows by itself: `sequences` by the patterns that it supports,
    `alignment` and `distribution` by the parts of its module, `complexity` and `cache` by how its cost grows
    with the length. `FACETS` says what each value means.
    """

    sequences: tuple[str, ...] | None = None
    levels: str = "single"
    positions: str = "global"
    representations: str = "single"
    alignment: str | None = None
    distribution: str | None = None
    complexity: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        for name, value in self.items().items():
            if value is None:
                continue
            if name == "sequences" and (not several(value) or not value):
                raise ConfigError(
                    f"sequences must be a tuple of some of {', '.join(FACETS[name])}; got {value!r}"
                )
            for one in value if name == "sequences" else (value,):
                one_of(name, one, FACETS[name])

    def items(self) -> dict[str, Any]:
        """Name and value of every axis."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def values(self, name: str) -> tuple[str, ...]:
        """The values on an axis, as a tuple also where there is one."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,)

    def settled(self, module: AttentionModule, supports: frozenset[str]) -> Facets:
        """With every None replaced by what `module` and the patterns that it supports show."""
        seen: dict[str, Any] = {
            "sequences": _sequences(supports),
            "alignment": "scaled_dot" if isinstance(module, MultiHeadAttention) else "other",
            "distribution": _distribution(module),
            "complexity": _complexity(module),
            "cache": _cache(module),
        }
        return Facets(
            **{name: seen[name] if value is None else value for name, value in self.items().items()}
        )


_LENGTH = 1 << 20  # long enough for what grows slower to be out of sight


def _sequences(supports: frozenset[str]) -> tuple[str, ...]:
    own = any(pattern.endswith("self") for pattern in supports)
    other = any(pattern.endswith("cross") for pattern in supports)
    return ("self",) * own + ("distinctive",) * other


def _distribution(module: AttentionModule) -> str:
    if not isinstance(module, MultiHeadAttention):
        return "other"
    part = Softmax() if module.normalizer is None else module.normalizer.spec
    if isinstance(part, Entmax):
        return "sparsemax" if part.alpha == 2.0 else "entmax"
    kinds = {Softmax: "softmax", Sigmoid: "sigmoid"}
    return next((said for kind, said in kinds.items() if isinstance(part, kind)), "other")


def _complexity(module: AttentionModule) -> str:
    short, long = module.cost(_LENGTH), module.cost(2 * _LENGTH)
    growth = (long.scores + long.values) / max(1, short.scores + short.values)
    if growth > 4.5:
        return "superquadratic"
    return "quadratic" if growth > 3.5 else "linear" if growth < 2.01 else "subquadratic"


def _cache(module: AttentionModule) -> str:
    short, long = module.cost(_LENGTH).cache_bytes, module.cost(2 * _LENGTH).cache_bytes
    return "none" if not long else "growing" if long > short else "constant"
