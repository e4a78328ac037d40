"""What a machine says of itself: for pages that name where they were made, and for kernels that go by it."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["processor", "vendor"]


def processor() -> str:
    """What the processor calls itself, or else what platform knows of it."""
    return _said("model name") or platform.processor() or platform.machine()


def vendor() -> str:
    """Who made the processor, as it says itself, such as "GenuineIntel"; empty where that cannot be found."""
    return _said("vendor_id")


def _said(key: str) -> str:
    """Of the first core, as Linux tells it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
