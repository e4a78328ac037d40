"""Attention in a latent whose rows depend on the tokens just before."""

from __future__ import annotations

from torch import Tensor

from polyhead.nn.compressed_projection import CompressedProjection
from polyhead.nn.kv_cache import KeyValueCache
from polyhead.nn.look_back import LookBackAttention

__all__ = ["CompressedAttention"]


class CompressedAttention(LookBackAttention):
    """`MultiHeadAttention` whose projection is a `CompressedProjection`."""

    projection: CompressedProjection  # type: ignore[assignment]
    called = "compressed_convolutional"
    within = "makes queries and keys of the same tokens"

    @property
    def reach(self) -> int:
        return self.projection.reach

    def _project(
        self,
        x: Tensor,
        source: Tensor,
        where: int | Tensor,
        places: int | Tensor,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        begun = cache is not None and self.reach > 0
        if cache is not None and begun:
            x, _ = self._remembered(x, cache)
        q, k, v = self.projection(x, begun)
        return self.position.turn(q, where), (self.position.turn(k, places), v)
