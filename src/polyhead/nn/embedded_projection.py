"""One shared query, key and value, turned into heads by an embedding of each head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polyhead.errors import unknown_name
from polyhead.nn.projections import Projection, at_least_one, head_width

__all__ = ["EmbeddedProjection"]


class EmbeddedProjection(Projection):
    """Head h has the shared q, k and v scaled by 1 + e_h (`"mul"`), or with e_h added (`"add"`).

    Nothing is made for every key and head unless keys are turned by their positions afterwards:

    - mul: (q ⊙ (1 + e_hQ)) · (k ⊙ (1 + e_hK)) = (q ⊙ (1 + e_hQ) ⊙ (1 + e_hK)) · k, so that all heads read the
      shared keys and values; the outputs of the heads are scaled by 1 + e_hV.
    - add: with q_h = q + e_hQ, q_h · (k + e_hK) = [q_h, q_h · e_hK] · [k, 1]: shared keys, one wider.
      Likewise Σ_j w_j (v_j + e_hV) = Σ_j w_j v_j + e_hV Σ_j w_j, from shared values [v, 1].

    Args:
        dim, heads: as of `Projection`.
        mode: `"mul"` or `"add"`.
        turned: whether keys are turned afterwards; they are then H heads, and the values still one.
        head_dim, value_dim, options: as of `Projection`; `qk_norm` normalises the shared queries and keys.

    Attributes:
        query_embedding, key_embedding, value_embedding: `(H, D)`, `(H, D)`, `(H, Dv)`; drawn with standard
            deviation 0.02.
        extra: columns that queries, keys and values are wider by, `(key columns, value columns)`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mode: str = "mul",
        turned: bool = False,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        **options: Any,
    ) -> None:
        at_least_one("EmbeddedProjection", dim=dim, heads=heads)
        if mode not in ("add", "mul"):
            raise unknown_name("mode of head embeddings", mode, ("add", "mul"))
        super().__init__(dim, 1, kv_heads=1, head_dim=head_width(dim, heads, head_dim), **options)
        self.mode = mode
        self.heads = self.query_heads = heads
        self.kv_heads = heads if turned else 1
        # what is wider by a column: queries and keys, values
        self.extra = (int(mode == "add" and not turned), int(mode == "add"))
        drawn = [
            nn.init.normal_(self.key.weight.new_empty(heads, width), std=0.02)
            for width in (self.head_dim, self.head_dim, self.value_dim)
        ]
        self.query_embedding, self.key_embedding, self.value_embedding = map(nn.Parameter, drawn)

    @property
    def streams(self) -> tuple[tuple[int, int], ...]:
        return (self.kv_heads, self.head_dim + self.extra[0]), (1, self.value_dim + self.extra[1])

    def _embedded(self, z: Tensor, embedding: Tensor) -> Tensor:
        """`(B, 1, n, width)` to `(B, H, n, width)`."""
        embedding = embedding[:, None].to(z.dtype)
        return z + embedding if self.mode == "add" else z * (1 + embedding)

    def queries(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "B H L D"]:
        q = self.query(x)[:, None]  # B 1 L D
        if self.query_norm is not None:
            q = self.query_norm(q)
        q = self._embedded(q, self.query_embedding)  # B H L D
        if self.kv_heads > 1:
            return q
        if self.extra[0]:
            constant = q @ self.key_embedding[:, :, None].to(q.dtype)  # B H L 1
            return torch.cat([q, constant], dim=-1)
        return self._embedded(q, self.key_embedding)

    def keys_values(
        self, context: Float[Tensor, "B S dc"]
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B 1 S Dv"]]:
        k, v = self.key(context)[:, None], self.value(context)[:, None]  # B 1 S width
        if self.key_norm is not None:
            k = self.key_norm(k)
        if self.kv_heads > 1:
            k = self._embedded(k, self.key_embedding)
        keys, values = self.extra
        return F.pad(k, (0, keys), value=1.0), F.pad(v, (0, values), value=1.0)

    def outputs(self, y: Float[Tensor, "B H L Dv"]) -> Float[Tensor, "B H L Dv"]:
        """The heads' outputs with their value embeddings, from those on the shared values."""
        if not self.extra[1]:
            return self._embedded(y, self.value_embedding)
        return y[..., :-1] + y[..., -1:] * self.value_embedding[:, None].to(y.dtype)

    def flops(self, queries: int, keys: int) -> int:
        constant = 2 * queries * self.heads * self.head_dim * self.extra[0]
        width = self.head_dim + self.value_dim
        return 2 * (queries * self.dim * self.head_dim + keys * self.context_dim * width) + constant
