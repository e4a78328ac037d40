"""A machine as the roofline model sees it: so many operations and so many bytes a second."""

from __future__ import annotations

from polyhead.checks import given, number
from polyhead.description import Part
from polyhead.errors import ConfigError, unknown_name

__all__ = ["HARDWARE", "Hardware", "hardware"]


class Hardware(Part):
    """A device with a peak of arithmetic and one of memory.

    A piece of work of F operations that moves M bytes takes at least max(F / flops, M / bandwidth) seconds.
    The two are equal at the ridge, flops / bandwidth operations a byte: work of less intensity waits for
    memory.

    Attributes:
        name: what tables call it.
        flops: floating-point operations a second, a multiply and an add counted as two, of dense matrix
            products in the dtype that one computes in.
        bandwidth: bytes a second between the memory and the device.
    """

    name: str
    flops: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"Hardware: name must be a text that is not empty; got {given(self.name)}")
        for field in ("flops", "bandwidth"):
            value = number(f"Hardware: {field}", getattr(self, field), above=0)
            object.__setattr__(self, field, value)

    @property
    def ridge(self) -> float:
        """Operations a byte at which arithmetic and memory take the same time."""
        return self.flops / self.bandwidth

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time for so many operations and bytes; continuous at the ridge."""
        return max(flops / self.flops, nbytes / self.bandwidth)


# Dense peaks in bfloat16, without sparsity, and bandwidths of memory, as the vendors' data sheets give them.
HARDWARE: dict[str, Hardware] = {
    one.name: one
    for one in (
        Hardware("a100-80gb-sxm", 312e12, 2.039e12),
        Hardware("h100-sxm", 989.4e12, 3.35e12),
        Hardware("h200-sxm", 989.4e12, 4.8e12),
        Hardware("l4", 121e12, 0.3e12),
        Hardware("mi300x", 1307.4e12, 5.3e12),
        Hardware("tpu-v5e", 197e12, 0.819e12),
    )
}


def hardware(which: str | Hardware) -> Hardware:
    """A device by name, or the one that is given.

    Raises:
        UnknownName: no device is called so; `HARDWARE` lists those that are, and
            `Hardware(name, flops, bandwidth)` describes another.
    """
    if isinstance(which, Hardware):
        return which
    if not isinstance(which, str) or which not in HARDWARE:
        raise unknown_name("device", which, HARDWARE)
    return HARDWARE[which]
