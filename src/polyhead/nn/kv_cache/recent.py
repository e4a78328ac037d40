"""A cache that remembers the latest inputs besides its rows, for what looks back a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.checks import whole
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.kv_cache.base import Kept, KeyValueCache, beams

__all__ = ["RecentInputs"]

_SLACK = 16  # tokens that may be taken back


class RecentInputs(KeyValueCache):
    """Another cache, and the latest inputs of the module: those that the next token's rows are made of.

    Before the first token everything counts as padding, so the memory is of one size from the start. Up to
    16 tokens can be taken back, by `crop`.

    Args:
        rows: the cache of rows.
        batch: number of sequences B.
        width: of an input.
        reach: inputs before a token that its rows depend on.
        device, dtype: of the inputs; default those of the rows.
    """

    def __init__(
        self,
        rows: KeyValueCache,
        batch: int,
        width: int,
        reach: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.rows = rows
        self.reach = whole("RecentInputs: reach", reach, 0)
        room = self.reach + _SLACK
        device = rows.device if device is None else device
        dtype = rows.dtype if dtype is None else dtype
        self._inputs = torch.zeros(batch, room, width, device=device, dtype=dtype)
        self._real = torch.zeros(batch, room, dtype=torch.bool, device=device)
        self._known = room  # of these inputs, the latest that are what they were

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.rows.length

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def holds_context(self) -> bool:  # type: ignore[override]
        return self.rows.holds_context

    def remember(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inputs `(B, reach + L, width)` that end with x `(B, L, width)`, and which are real.

        Takes note of x for the next call. Inputs that are not real are zero.
        """
        room = self._inputs.shape[1]
        if x.shape[0] != self._inputs.shape[0] or x.shape[2] != self._inputs.shape[2]:
            raise ShapeError(
                f"RecentInputs holds inputs of shape ({self._inputs.shape[0]}, L, {self._inputs.shape[2]}); "
                f"got {tuple(x.shape)}; make it with new_cache(batch=...) of the module that it serves"
            )
        own = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        whole_x = torch.cat([self._inputs.to(x.dtype), x], dim=1)
        whole_real = torch.cat([self._real, own], dim=1)
        with torch.inference_mode(False):
            # a copy, so that what a long call brought is not held by a view of it
            held = whole_x[:, whole_x.shape[1] - room :].to(self._inputs.dtype)
            self._inputs = held.clone()
            self._real = whole_real[:, whole_real.shape[1] - room :].clone()
        self._known = min(room, self._known + x.shape[1])
        start = room - self.reach
        return whole_x[:, start:], whole_real[:, start:]

    def append(self, *rows: Tensor, padding: Tensor | None = None, positions: Tensor | None = None) -> Kept:
        return self.rows.append(*rows, padding=padding, positions=positions)

    def next_positions(self, count: int) -> Tensor | None:
        return self.rows.next_positions(count)

    def nbytes(self) -> int:
        own = (self._inputs, self._real)
        return self.rows.nbytes() + sum(t.numel() * t.element_size() for t in own)

    @staticmethod
    def state_bytes(width: int, reach: int, itemsize: int) -> int:
        """Bytes that the inputs of one sequence take."""
        return (reach + _SLACK) * (width * itemsize + 1)

    def reorder(self, beam_index: Tensor) -> None:
        index = beams(beam_index, len(self._inputs)).to(self._inputs.device)
        self.rows.reorder(index)
        self._inputs, self._real = self._inputs.index_select(0, index), self._real.index_select(0, index)

    def crop(self, length: int) -> None:
        back = self.length - whole("crop: length", length, 0)
        most = self._known - self.reach
        if back > most:
            raise ConfigError(
                f"crop: at most {most} tokens can be taken back, whose inputs are still there; got "
                f"length={length} of {self.length}; reset() begins anew"
            )
        self.rows.crop(length)
        if back > 0:
            self._known -= back
            for name in ("_inputs", "_real"):
                held = getattr(self, name)
                setattr(self, name, torch.cat([torch.zeros_like(held[:, :back]), held[:, :-back]], dim=1))

    def reset(self) -> None:
        self.rows.reset()
        self._inputs, self._real = torch.zeros_like(self._inputs).detach(), torch.zeros_like(self._real)
        self._known = self._inputs.shape[1]
