"""The most memory that a piece of work took."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

__all__ = ["Peak"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Begins to watch when it is made.

    On CUDA the allocator counts. On a CPU the process is watched, by what Linux keeps of its resident
    memory; elsewhere nothing is known. Memory that the process had freed before and takes again does not
    show: for numbers to compare, watch one piece of work in a process.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.before: int | None = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        try:
            _RESET.write_text("5")
            self.before = _kilobytes("VmRSS")
        except OSError:
            self.before = None

    def most(self, earlier: int | None = None) -> int | None:
        """Bytes at the most so far, beyond those before; at least `earlier`, of the same work before."""
        if self.before is None:
            return earlier
        if self.device.type == "cuda":
            found = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            found = _kilobytes("VmHWM") - self.before
        return max(found, earlier or 0, 0)


def _kilobytes(field: str) -> int:
    """A field of the status of this process, in bytes."""
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
