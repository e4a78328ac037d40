"""Operations a byte: whether a mechanism waits for arithmetic or for memory, in prefill and in decoding.

    import polyhead as ph

    print(ph.roofline(["mha", "grouped_query", "mla"], "h100-sxm", dim=4096, heads=32, length=8192))

Everything is counted from `cost` and `step_cost` of the module, nothing is run. A call of F operations that
moves M bytes takes at least max(F / peak, M / bandwidth) seconds. M is what has to move at the least: all
parameters once, inputs and outputs once, and every row of the cache once, written if it is new and read
otherwise. What a kernel does beyond that (keys read again for every block of queries, weights of attention
written out) is left out, so times are bounds from below; except where tokens choose heads or experts, and few
tokens read the weights of those alone.

The attention core, scores and values over the rows of the cache, has an intensity of its own. With t new
tokens, s bytes a number, H query heads and G key/value heads it is

    multi-head 2t/s        grouped 2t·(H/G)/s        latent, absorbed 2t·H·(2·dc + dr) / ((dc + dr)·s)

so 1, H/G and, for the sizes of DeepSeek-V3, 242 operations a byte in half precision, whatever the batch and
the length: nothing but sharing of rows between queries makes the core denser.

Paper 069: The New LLM Bottleneck: A Systems Perspective on Latent Attention and Mixture-of-Experts,
arXiv 2507.15465. Its counts for experts of a feed-forward layer are not part of an attention library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyhead.checks import given, place, several, whole
from polyhead.errors import ConfigError
from polyhead.mechanisms import PATTERNS, build, catalog
from polyhead.nn.contract import AttentionModule
from polyhead.nn.cost import Cost
from polyhead.nn.hardware import Hardware
from polyhead.nn.hardware import hardware as device_named

__all__ = ["Roofline", "Work", "roofline"]


@dataclass(frozen=True)
class Work:
    """One call of a module on a device.

    Attributes:
        name: of the mechanism.
        phase: "prefill" or "decode".
        flops: operations, a multiply and an add counted as two.
        core_flops: those of scores and values.
        weight_bytes: all parameters.
        cache_bytes: the rows of the cache, of all sequences.
        edge_bytes: inputs and outputs.
        batch: sequences.
        hardware: the device.
    """

    name: str
    phase: str
    flops: int
    core_flops: int
    weight_bytes: int
    cache_bytes: int
    edge_bytes: int
    batch: int
    hardware: Hardware

    @property
    def nbytes(self) -> int:
        """Bytes that have to move."""
        return self.weight_bytes + self.cache_bytes + self.edge_bytes

    @property
    def intensity(self) -> float:
        """Operations a byte of the whole call."""
        return self.flops / self.nbytes

    @property
    def core_intensity(self) -> float:
        """Operations a byte of scores and values over the rows of the cache; 0 where it holds none."""
        return self.core_flops / self.cache_bytes if self.cache_bytes else 0.0

    @property
    def seconds(self) -> float:
        """The least time that the call takes."""
        return self.hardware.seconds(self.flops, self.nbytes)

    @property
    def bound(self) -> str:
        """What it waits for: "compute" or "memory"."""
        return "compute" if self.intensity >= self.hardware.ridge else "memory"

    @property
    def ridge_batch(self) -> float | None:
        """Sequences with which the call would reach the ridge; None if no batch does."""
        each = (self.flops - self.hardware.ridge * (self.cache_bytes + self.edge_bytes)) / self.batch
        return self.hardware.ridge * self.weight_bytes / each if each > 0 else None


@dataclass(frozen=True)
class Roofline:
    """Calls on one device; prints as a table.

    Attributes:
        works: prefill and decode of every mechanism.
        hardware: the device.
        length: tokens of a prefill, and of the cache of a decoding step.
        queries: new tokens of a decoding step.
        batch: sequences.
        dtype: of weights, inputs and cache.
    """

    works: tuple[Work, ...]
    hardware: Hardware
    length: int
    queries: int
    batch: int
    dtype: torch.dtype

    def of(self, phase: str, name: str | None = None) -> Work:
        """The work of a phase, of the mechanism called `name` where there are several."""
        names = list(dict.fromkeys(work.name for work in self.works))
        if name is None and len(names) == 1:
            name = names[0]
        for work in self.works:
            if work.phase == phase and work.name == name:
                return work
        raise ConfigError(
            f"there is no {phase!r} of {name!r}; there are "
            + ", ".join(f"({w.phase!r}, {w.name!r})" for w in self.works)
        )

    def __str__(self) -> str:
        machine = self.hardware
        head = ("mechanism", "phase", "GFLOP", "MB", "FLOP/byte", "core", "least time", "waits for")
        rows = [
            (
                work.name,
                work.phase,
                f"{work.flops / 1e9:.4g}",
                f"{work.nbytes / 1e6:.4g}",
                f"{work.intensity:.4g}",
                f"{work.core_intensity:.4g}",
                _time(work.seconds),
                work.bound,
            )
            for work in self.works
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            f"{machine.name}: {machine.flops / 1e12:.4g} TFLOP/s, {machine.bandwidth / 1e12:.4g} TB/s, "
            f"ridge {machine.ridge:.4g} FLOP/byte; {self.batch} x {self.length} tokens, "
            f"{self.queries} new in a decoding step, {str(self.dtype).removeprefix('torch.')}"
        ]
        for row in (head, *rows):
            cells = [
                cell.rjust(width) if 2 <= place <= 6 else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def _time(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e9:.4g} ns"


def roofline(
    mechanism: str | AttentionModule | Sequence[str | AttentionModule],
    hardware: str | Hardware = "h100-sxm",
    *,
    length: int = 4096,
    batch: int = 1,
    queries: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    dim: int = 4096,
    heads: int = 32,
    **options: Any,
) -> Roofline:
    """Operations, bytes and least times of prefill and of a decoding step, counted.

    Args:
        mechanism: a mechanism of the catalogue by name, an attention module, or several of them.
        hardware: a device by name (`polyhead.nn.HARDWARE` lists them), or your own `polyhead.nn.Hardware`.
        length: tokens of the prefill, and of the cache that a decoding step reads, the new ones included.
        batch: sequences.
        queries: new tokens of a decoding step, more than one in speculative decoding.
        dtype: of weights, inputs and cache.
        dim, heads: sizes of what is named and not handed in.
        options: further options of it.

    Returns:
        A table: print it, or ask it for `of("decode", "mla")`. One that is not causal has no decoding.

    Raises:
        UnknownName: no such mechanism or device.
        ConfigError: a size or an option that is not allowed.
    """
    device = device_named(hardware)
    place("roofline", None, dtype)
    if dtype is None:
        raise ConfigError(
            "roofline: dtype must be a floating-point torch.dtype such as torch.bfloat16; got None"
        )
    for name, size in (("length", length), ("batch", batch), ("queries", queries)):
        whole(f"roofline: {name}", size, 1)
    if queries > length:
        raise ConfigError(f"roofline: queries must be at most length={length}; got {queries}")
    alone = isinstance(mechanism, str | AttentionModule)
    if not alone and not several(mechanism):
        raise ConfigError(
            f"mechanism must be a name, an attention module, or several; got {given(mechanism)}"
        )
    chosen: list[Any] = [mechanism] if alone else list(mechanism)  # type: ignore[arg-type]
    works = []
    for one in chosen:
        if isinstance(one, AttentionModule):
            if options:
                raise ConfigError(f"a module has its own options; leave {sorted(options)} out")
            name, module = _called(one), one
        else:
            name, module = one, build(one, dim=dim, heads=heads, device="meta", **options)
        calls = {"prefill": (length, module.cost(length, batch, dtype=dtype))}
        if "causal_self" in _supports(module):
            calls["decode"] = queries, module.step_cost(length - queries, queries, batch, dtype=dtype)
        works += [_work(name, phase, *call, batch, dtype, device, module) for phase, call in calls.items()]
    return Roofline(tuple(works), device, length, queries, batch, dtype)


def _work(
    name: str,
    phase: str,
    tokens: int,
    cost: Cost,
    batch: int,
    dtype: torch.dtype,
    device: Hardware,
    module: AttentionModule,
) -> Work:
    edges = 2 * batch * tokens * _width(module) * dtype.itemsize
    weights = cost.parameters * dtype.itemsize
    core = cost.scores + cost.values
    return Work(name, phase, cost.flops, core, weights, cost.cache_bytes, edges, batch, device)


def _width(module: AttentionModule) -> int:
    config: Any = module.config
    owner: Any = module if config is None else config
    return int(owner.dim if hasattr(owner, "dim") else owner.projection.dim)


def _entry(module: AttentionModule) -> Any:
    return next((entry for entry in catalog() if entry.config is type(module.config)), None)


def _called(module: AttentionModule) -> str:
    entry = _entry(module)
    return type(module).__name__ if entry is None else entry.name


def _supports(module: AttentionModule) -> frozenset[str]:
    entry = _entry(module)
    return PATTERNS if entry is None else entry.supports
