"""Gaussian mixture keys: every position offers M keys, and a query weighs it by its density among them.

    A_ij = Σ_r π_r exp(E^r_ij) / Σ_j' Σ_r π_r exp(E^r_ij'),   E^r_ij = -|q_i - k^r_j|² / (2 σ_r²)
    head_i = Σ_j A_ij v_j

The keys of the components are the one key moved, k^r_j = k_j - μ_r (`keys="shifted"`), or projected each by
itself (`keys="separate"`). One component with keys of one length is softmax attention.

|q - k|² = |q|² - 2 q·k + |k|², so a component is a softmax attention with one coordinate more, and to mix
their outputs by the sums that they were divided by is exact: M calls of whatever backend is fastest, no L × S
memory, masks and biases as ever. Moving keys by -μ is moving the query by μ: shifted keys are cached once.

Cost: M times the scores and values of grouped-query attention with heads of D + 1; H·M parameters more and
M·H·D (shifted) or (M - 1)·d·G·D (separate); a cache of G·(D + 1 + Dv) or G·(M·(D + 1) + Dv) numbers a token.
The paper's point is that half the heads then do.

Paper 086: Improving Transformers with Probabilistic Attention Keys, arXiv 2110.08678. As in its code σ_0² is
√D, the others √D/3, μ_0 starts at zero and the others with deviation 1/2, π is learned, starts at 1/2 and is
held in [0, 1] without summing to 1. Ours: π is one number a head and component, at any length; position
encodings turn queries and keys before μ moves them; score maps act on E, dropout on each component. The
hard form (the best component alone), π from responsibilities and the linear form are not here.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from polyhead.checks import number, several, whole
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms.config import GroupedConfig
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.registry import register
from polyhead.nn.mixture_keys import MixtureKeys, MixtureProjection

__all__ = ["GaussianMixtureKeys"]

_KEYS = ("shifted", "separate")


@register(
    "gaussian_mixture_keys",
    aliases=("mgk",),
    paper="086",
    title="Improving Transformers with Probabilistic Attention Keys",
    family="scores",
    summary="every position offers several keys; its weight is the density of the query in their mixture",
    equation="A_ij ∝ Σ_r π_r exp(-|q_i - k^r_j|² / (2 σ_r²)),  k^r = k - μ_r;  head_i = Σ_j A_ij v_j",
    facets=Facets(alignment="similarity"),
)
class GaussianMixtureKeys(GroupedConfig):
    """Gaussian mixture keys.

    Attributes:
        components: M.
        keys: "shifted" or "separate".
        variances: σ_r², one for each component; default √D and √D/3 for all others.
    """

    components: int = 2
    keys: str = "shifted"
    variances: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        count = whole("components", self.components, 1)
        if not isinstance(self.keys, str) or self.keys not in _KEYS:
            raise unknown_name("keys of Gaussian mixtures", self.keys, _KEYS)
        if self.variances is not None:
            if not several(self.variances) or len(self.variances) != count:
                raise ConfigError(f"variances must be {count} numbers or None; got {self.variances!r}")
            held = tuple(number("variances", one, above=0) for one in self.variances)
            object.__setattr__(self, "variances", held)
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> MixtureKeys:
        """The module."""
        separate = self.components if self.keys == "separate" else 1

        def module(projection: MixtureProjection, *args: Any, **options: Any) -> MixtureKeys:
            root = math.sqrt(projection.head_dim)
            variances = self.variances or (root, *[root / 3] * (self.components - 1))
            return MixtureKeys(projection, *args, variances=variances, **options)

        return self.assemble(
            heads=self.heads,
            kv_heads=self.kv_heads,
            device=device,
            dtype=dtype,
            projection=partial(MixtureProjection, components=separate),
            module=module,
        )
