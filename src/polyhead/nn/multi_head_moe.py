"""Multi-head mixture of experts: every head of a token goes to experts of its own choice."""

from __future__ import annotations

from torch import Tensor

from polyhead.nn.auxiliary import AuxiliaryLosses
from polyhead.nn.expert_router import ExpertRouter
from polyhead.nn.experts import Experts
from polyhead.nn.left_to_python import LeftToPython
from polyhead.nn.projections import FanInLinear
from polyhead.nn.routing import Choice, RouterLinear
from polyhead.nn.tokenwise import TokenwiseModule

__all__ = ["MultiHeadExperts"]


class MultiHeadExperts(TokenwiseModule):
    """Split a token into sub-tokens, send each to experts, merge.

        [x¹, ..., x^h] = W_head x;   o^s = Σ_{j chosen} g_j f_j(x^s);   y = W_merge [o¹, ..., o^h] + shared(x)

    Args:
        dim: width d.
        heads: sub-tokens h of a token.
        experts: the experts, of width d / h.
        router: chooses among them.
        head, merge: the maps before and after; None: the identity.
        shared: an expert that every token has, in one piece; None: none.
        inner_residual: whether x^s is added to o^s.
    """

    mechanism = "multi_head_moe"

    def __init__(
        self,
        dim: int,
        heads: int,
        experts: Experts,
        router: ExpertRouter,
        *,
        head: RouterLinear | None,
        merge: FanInLinear | None,
        shared: Experts | None = None,
        inner_residual: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.inner_residual = dim, heads, inner_residual
        self.head, self.router, self.experts, self.merge, self.shared = head, router, experts, merge, shared
        self.auxiliary = AuxiliaryLosses()

    def choice(self, x: Tensor) -> Choice:
        """The gates `(B, L·h, N)` of the sub-tokens of inputs `(B, L, d)`, token by token, and the choice."""
        return self.router(self._split(x))

    def _split(self, x: Tensor) -> Tensor:
        made = x if self.head is None else self.head(x)
        return made.reshape(len(x), x.shape[1] * self.heads, self.dim // self.heads)

    @LeftToPython  # how many rows an expert has is not known before the call
    def of_tokens(self, x: Tensor, real: Tensor | None) -> Tensor:
        parts = self._split(x)  # B L·h w
        choice = self.router(parts)
        self.auxiliary.forget()
        if self.training:
            counted = None if real is None else real.repeat_interleave(self.heads, dim=1)
            for name, loss in self.router.losses(choice, counted).items():
                self.auxiliary.record(name, loss)
        rows = parts.flatten(0, 1).to(x.dtype)
        made = self.experts(rows, choice.active.flatten(0, 1), choice.gates.flatten(0, 1))
        if self.inner_residual:
            made = made + rows
        made = made.to(x.dtype).view(x.shape)
        y = made if self.merge is None else self.merge(made)
        if self.shared is None:
            return y
        return y + self.shared.alone(x)

    def flops(self, tokens: int) -> int:
        """Operations for so many tokens: of the experts, those that are chosen count."""
        maps = (self.head is not None) + (self.merge is not None)
        work = 2 * tokens * maps * self.dim**2 + self.router.flops(tokens * self.heads)
        work += self.experts.flops(tokens * self.heads * self.router.k)
        work += 0 if self.shared is None else self.shared.flops(tokens)
        return work

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, inner_residual={self.inner_residual}"
