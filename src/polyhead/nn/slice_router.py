"""A router among equal slices of an attention block: every token goes to the k most probable."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from polyhead.nn.routing import Choice, Router, RouterLinear, load_balance, top_k

__all__ = ["SliceRouter"]


class SliceRouter(Router):
    """Every token chooses k of N slices; a slice is a number of neighbouring heads.

        p = softmax(W x + b);   w_i = p_i N for the k largest with `weigh`, else 1 for them; 0 for the others

    Args:
        dim: width of the inputs d.
        slices: N.
        k: slices that a token chooses.
        heads: heads of a slice.
        weigh: whether the gates are the probabilities.
        balance: weight of N Σ_i f_i P_i / k, 1 where the load is even.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        slices: int,
        k: int,
        *,
        heads: int = 1,
        weigh: bool = True,
        balance: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.slices, self.k, self.heads, self.weigh, self.balance = slices, k, heads, weigh, balance
        self.always, self.per_token = 0, heads * k
        self.gate = RouterLinear(dim, slices, bias=True, device=device, dtype=dtype)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Choice:
        """The gates `(B, L, H)`, and which slices are chosen and how probable they are, both `(B, L, N)`."""
        p = self.gate(x).softmax(-1)
        chosen = top_k(p, self.k)
        gates = p * chosen * self.slices if self.weigh else chosen.to(p.dtype)
        return Choice(gates.repeat_interleave(self.heads, dim=-1), chosen, p)

    def losses(self, choice: Choice, real: Tensor | None) -> dict[str, Tensor]:
        if not self.balance:
            return {}
        return {"balance": self.balance * load_balance(choice.scores, choice.active, real) / self.k}

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.gate.in_features * self.slices

    def extra_repr(self) -> str:
        return f"slices={self.slices}, k={self.k}, heads={self.heads}, weigh={self.weigh}"
