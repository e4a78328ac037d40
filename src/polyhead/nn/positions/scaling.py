"""Frequencies of rotary embeddings, and the ways to stretch them to longer contexts.

Written ω_m = base^(-2m/D') for m = 0..D'/2-1 with D' the rotated width; each scaling changes ω and may
scale cosines and sines by a factor. The names are those of transformers' `rope_type`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyhead.checks import flag, given, number
from polyhead.description import Part
from polyhead.errors import ConfigError, unknown_name

__all__ = [
    "DynamicNtk",
    "LinearScaling",
    "Llama3Scaling",
    "LongRope",
    "ProportionalScaling",
    "RopeScaling",
    "Yarn",
    "scaling_from_parameters",
]


def _positive(scaling: RopeScaling, *names: str) -> None:
    """Raise a `ConfigError` for a field that is not above 0; None passes where it is the default."""
    for name in names:
        value = getattr(scaling, name)
        if value is not None or getattr(type(scaling), name, 0) is not None:
            number(f"{type(scaling).__name__}: {name}", value, above=0)


def _row(base: float, width: int) -> Tensor:
    return base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)


class RopeScaling(Part):
    """No scaling: ω_m = base^(-2m/D')."""

    stretching: ClassVar[bool] = False  # whether the frequencies depend on the length of the sequence

    def width(self, head_dim: int, fraction: float) -> int:
        """The rotated width D'."""
        return int(head_dim * fraction)

    def frequencies(self, base: float, head_dim: int, fraction: float, length: int) -> tuple[Tensor, float]:
        """The frequencies, float64 `(D'/2,)`, for a sequence of `length`, and the factor on cos and sin."""
        return _row(base, self.width(head_dim, fraction)), 1.0

    def stretches(self, length: int) -> object:
        """A value that changes when the frequencies change with `length`."""
        return None


class LinearScaling(RopeScaling):
    """Position interpolation: ω / factor. Paper: arXiv 2306.15595.

    Attributes:
        factor: the ratio of the new length to that of training, above 0.

    Raises:
        ConfigError: `factor` is not above 0.
    """

    factor: float

    def __post_init__(self) -> None:
        _positive(self, "factor")

    def frequencies(self, base: float, head_dim: int, fraction: float, length: int) -> tuple[Tensor, float]:
        return _row(base, self.width(head_dim, fraction)) / self.factor, 1.0


class DynamicNtk(RopeScaling):
    """A larger base once the sequence outgrows training: base·(factor·n/N − (factor − 1))^(D'/(D'−2)).

    Keys that a cache holds were turned by the base of their time: decoding past N is not the same as one full
    forward pass.

    Attributes:
        factor: how much larger the base gets with the length, above 0.
        max_length: N, the length of training in tokens, above 0; n is the sequence's where that is longer.

    Raises:
        ConfigError: a value is not above 0; or, where a module takes it, D' is 2.
    """

    stretching: ClassVar[bool] = True
    factor: float
    max_length: int

    def __post_init__(self) -> None:
        _positive(self, "factor", "max_length")

    def frequencies(self, base: float, head_dim: int, fraction: float, length: int) -> tuple[Tensor, float]:
        width = self.width(head_dim, fraction)
        if width <= 2:
            raise ConfigError(f"DynamicNtk: the rotated width must be greater than 2; got {width}")
        ratio = max(length, self.max_length) / self.max_length
        return _row(base * (self.factor * ratio - (self.factor - 1)) ** (width / (width - 2)), width), 1.0

    def stretches(self, length: int) -> object:
        return max(length, self.max_length)


class Yarn(RopeScaling):
    """Interpolate slow frequencies, keep fast ones, ramp between; and sharpen attention.

    With r(m) = N·ω_m/2π turns over the trained length N, the ramp in m goes from the m with `beta_fast` turns
    (kept: ω) to the m with `beta_slow` turns (interpolated: ω/factor). Paper: arXiv 2309.00071.

    Attributes:
        factor: the ratio of the new length to N, above 0.
        original_length: N, in tokens, above 0.
        beta_fast, beta_slow: turns at the ends of the ramp, above 0. Default 32 and 1.
        attention_factor: factor of cos and sin; default 0.1·ln(factor) + 1, 1 for a factor up to 1.
        mscale, mscale_all_dim: of DeepSeek, at least 0; both above 0, they make that default
            (0.1·mscale·ln(factor) + 1) / (0.1·mscale_all_dim·ln(factor) + 1).
        truncate: whether the ends of the ramp are rounded outwards to whole m. Default True.

    Raises:
        ConfigError: a value is not allowed.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _positive(self, "factor", "original_length", "beta_fast", "beta_slow", "attention_factor")
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                number(f"Yarn: {name}", getattr(self, name), least=0)
        flag("Yarn: truncate", self.truncate)

    def _sharpening(self) -> float:
        def scale(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1 if self.factor > 1 else 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)

    def frequencies(self, base: float, head_dim: int, fraction: float, length: int) -> tuple[Tensor, float]:
        width = self.width(head_dim, fraction)
        # the (real-valued) m at which a pair makes so many turns over the trained length
        low, high = (
            width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        steps = torch.arange(width // 2, dtype=torch.float64)
        slow = ((steps - low) / max(high - low, 1e-3)).clamp(0, 1)
        kept = _row(base, width)
        return kept * (1 - slow) + kept / self.factor * slow, self._sharpening()


class LongRope(RopeScaling):
    """A searched divisor for every pair: `short_factor` up to the trained length, `long_factor` beyond.

    ω'_m = ω_m / d_m with d the `short_factor` for up to N tokens, the `long_factor` for more. Keys in a cache
    keep the divisors under which they came: decoding past the trained length differs from one full forward,
    as in transformers. Paper: arXiv 2402.13753.

    Attributes:
        short_factor, long_factor: the divisors d, one number above 0 for each of the D'/2 pairs.
        original_length: N, the length of training in tokens.
        factor: the ratio of the new length to N, for the default of `attention_factor`. Default 1.
        attention_factor: factor of cos and sin; default √(1 + ln(factor)/ln(N)), 1 for a factor up to 1.

    Raises:
        ConfigError: a value is not allowed; or, where a module takes it, there are not D'/2 divisors.
    """

    stretching: ClassVar[bool] = True
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    factor: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _positive(self, "original_length", "factor", "attention_factor")
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            values = values.tolist() if isinstance(values, Tensor) else values
            if not isinstance(values, tuple | list):
                raise ConfigError(f"LongRope: {name} must be a list of numbers; got {given(values)}")
            checked = [number(f"LongRope: {name}[{m}]", value, above=0) for m, value in enumerate(values)]
            object.__setattr__(self, name, tuple(checked))

    def frequencies(self, base: float, head_dim: int, fraction: float, length: int) -> tuple[Tensor, float]:
        width = self.width(head_dim, fraction)
        name = "long_factor" if length > self.original_length else "short_factor"
        divisors = torch.tensor(getattr(self, name), dtype=torch.float64)
        if len(divisors) != width // 2:
            raise ConfigError(
                f"LongRope: {name} needs one number for each of the {width // 2} pairs; got {len(divisors)}"
            )
        factor = self.attention_factor
        if factor is None:
            more = math.log(self.factor) / math.log(self.original_length) if self.factor > 1 else 0.0
            factor = math.sqrt(1 + more)
        return _row(base, width) / divisors, factor

    def stretches(self, length: int) -> object:
        return length > self.original_length


class Llama3Scaling(RopeScaling):
    """Llama 3.1: long waves are divided, short ones kept, and between them it goes from one to the other.

        ω'_m = s_m ω_m + (1 - s_m) ω_m / factor,   s_m = (N ω_m/2π - low) / (high - low), cut to 0..1

    N ω_m/2π is N over the wavelength of pair m: the turns that it makes over the trained length.

    Attributes:
        factor: by which the frequencies of long waves are divided, above 0.
        original_length: N, the length of training in tokens. Default 8192.
        low_freq_factor: low, above 0: waves longer than N/low are divided. Default 1.
        high_freq_factor: high, above low: waves shorter than N/high are kept. Default 4.

    Raises:
        ConfigError: a value is not allowed.
    """

    factor: float
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _positive(self, "factor", "original_length", "low_freq_factor", "high_freq_factor")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                "Llama3Scaling: 0 < low_freq_factor < high_freq_factor is needed; "
                f"got {self.low_freq_factor!r} and {self.high_freq_factor!r}"
            )

    def frequencies(self, base: float, head_dim: int, fraction: float, length: int) -> tuple[Tensor, float]:
        omega = _row(base, self.width(head_dim, fraction))
        turns = self.original_length * omega / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return omega * kept + omega / self.factor * (1 - kept), 1.0


class ProportionalScaling(RopeScaling):
    """Frequencies spread over the whole head, the slow ones left at zero.

    ω_m = base^(-2m/D)/factor for the first ⌊fraction·D/2⌋ pairs and 0 for the others, paired over the whole
    head width D: a fraction of 0.25 keeps the fastest quarter of the pairs of full RoPE.

    Attributes:
        factor: by which the frequencies are divided, above 0. Default 1.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "factor")

    def width(self, head_dim: int, fraction: float) -> int:
        return head_dim

    def frequencies(self, base: float, head_dim: int, fraction: float, length: int) -> tuple[Tensor, float]:
        omega = _row(base, head_dim) / self.factor
        omega[int(fraction * head_dim // 2) :] = 0.0
        return omega, 1.0


def scaling_from_parameters(parameters: Mapping[str, Any], max_length: int | None) -> RopeScaling:
    """The scaling that transformers' `rope_parameters` name; see `rope_from_parameters`."""
    named = [parameters.get(name) for name in ("rope_type", "type")]
    kind = next((name for name in named if name is not None), "default")
    if max_length is not None:
        number("max_position_embeddings", max_length, above=0)

    def need(name: str, otherwise: Any = None) -> Any:
        value = parameters.get(name)
        value = otherwise if value is None else value
        if value is None:
            raise ConfigError(f"rope_type {kind!r} needs {name}; the parameters name {sorted(parameters)}")
        return value

    def ratio() -> Any:
        """The factor; where a config leaves it out, it is the ratio of the lengths."""
        trained = number(
            "original_max_position_embeddings", need("original_max_position_embeddings"), above=0
        )
        return need("factor", max_length / trained if max_length else None)

    def given(*names: str) -> dict[str, Any]:
        return {name: parameters[name] for name in names if parameters.get(name) is not None}

    makers: dict[str, Callable[[], RopeScaling]] = {
        "default": RopeScaling,
        "linear": lambda: LinearScaling(need("factor")),
        "dynamic": lambda: DynamicNtk(need("factor"), need("max_position_embeddings", max_length)),
        "yarn": lambda: Yarn(
            ratio(),
            need("original_max_position_embeddings"),
            **given("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
        ),
        "longrope": lambda: LongRope(
            need("short_factor"),
            need("long_factor"),
            need("original_max_position_embeddings"),
            ratio(),
            **given("attention_factor"),
        ),
        "llama3": lambda: Llama3Scaling(
            need("factor"),
            need("original_max_position_embeddings", max_length),
            need("low_freq_factor"),
            need("high_freq_factor"),
        ),
        "proportional": lambda: ProportionalScaling(need("factor", 1.0)),
    }
    if not isinstance(kind, str) or kind not in makers:
        raise unknown_name("rope_type", kind, makers)
    return makers[kind]()
