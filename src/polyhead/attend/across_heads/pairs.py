"""Logits of a head made of the products of every query head with every key head, by a small network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyhead.attend.across_heads.base import AcrossHeads
from polyhead.attend.tile import Tile
from polyhead.checks import flag, floating, given, number
from polyhead.errors import ConfigError, ShapeError

__all__ = ["HeadPairs", "head_pairs"]

# Numbers that are held of some columns of a strip, in float32 2 MiB for a CPU: measured best.
_HELD = {"cpu": 1 << 19, "cuda": 1 << 25}
_NETWORK = {
    "inner": (3, "(H, h, G)"),
    "inner_bias": (2, "(H, h)"),
    "last": (2, "(H, m), or (H, H·h) without the layers between"),
    "joint": (2, "(H, h)"),
    "joint_bias": (1, "(H,)"),
    "across": (2, "(m, H)"),
    "across_bias": (1, "(m,)"),
}


class _Work(NamedTuple):
    """Some columns of a batch item's strip: n = r·c pairs."""

    columns: slice
    products: Tensor  # G H·r c
    hidden: Tensor  # H h n
    joint: Tensor | None  # H n
    across: Tensor | None  # m n


class HeadPairs(AcrossHeads):
    """See `head_pairs`."""

    queries: Tensor
    keys: Tensor
    scale: float
    inner: Tensor
    inner_bias: Tensor
    last: Tensor
    joint: Tensor | None = None
    joint_bias: Tensor | None = None
    across: Tensor | None = None
    across_bias: Tensor | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        floating("queries", self.queries, 4, "(B, H, L, D)")
        floating("keys", self.keys, 4, "(B, G, S, D)")
        object.__setattr__(self, "scale", number("scale", self.scale))
        flag("residual", self.residual)
        between = [name for name in ("joint", "joint_bias", "across", "across_bias") if self._has(name)]
        if len(between) not in (0, 4):
            raise ConfigError(f"joint, joint_bias, across and across_bias go together; got {between} alone")
        for name, (axes, said) in _NETWORK.items():
            if self._has(name):
                floating(name, getattr(self, name), axes, said)
        heads, hidden, groups = self.inner.shape
        middle = heads * hidden if self.across is None else self.across.shape[0]
        wanted = {
            "queries": (None, heads, None, None),
            "keys": (None, groups, None, None),
            "inner_bias": (heads, hidden),
            "last": (heads, middle),
            "joint": (heads, hidden),
            "joint_bias": (heads,),
            "across": (middle, heads),
            "across_bias": (middle,),
        }
        for name, shape in wanted.items():
            if self._has(name):
                found = getattr(self, name).shape
                if any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
                    sizes = ", ".join("·" if size is None else str(size) for size in shape)
                    raise ConfigError(
                        f"{name} must have the shape ({sizes}) beside inner (H, h, G) = "
                        f"{tuple(self.inner.shape)}; got {given(getattr(self, name))}"
                    )

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    def _check(self, x: Tensor, tile: Tile) -> None:
        self.check_heads(self.inner.shape[0], tile)
        if self.queries.shape[3] != self.keys.shape[3] or self.queries.shape[0] != self.keys.shape[0]:
            raise ShapeError(
                f"queries and keys of head_pairs must agree in batch and width; got "
                f"{given(self.queries)} and {given(self.keys)}"
            )

    def apply(self, x: Tensor, tile: Tile) -> Tensor:
        self._check(x, tile)
        place = (tile.batch_slice, slice(None))
        q = self.queries[(*place, tile.row_slice)].to(x) * self.scale
        k = self.keys[(*place, tile.key_index)].to(x)
        products = torch.einsum("bard,bgcd->bagrc", q, k)
        hidden = torch.einsum("aug,bagrc->baurc", self.inner.to(x), products)
        hidden = (hidden + self.inner_bias.to(x)[..., None, None]).relu()
        if self.joint is None or self.joint_bias is None or self.across is None or self.across_bias is None:
            y = torch.einsum("am,bmrc->barc", self.last.to(x), hidden.flatten(1, 2))
            return x + y if self.residual else y
        joint = torch.einsum("au,baurc->barc", self.joint.to(x), hidden)
        joint = joint + self.joint_bias.to(x)[:, None, None]
        across = torch.einsum("ma,barc->bmrc", self.across.to(x), joint)
        across = (across + self.across_bias.to(x)[:, None, None]).relu()
        y = torch.einsum("am,bmrc->barc", self.last.to(x), across)
        return x + y if self.residual else y

    def _operands(self, x: Tensor, tile: Tile, b: int) -> tuple[Tensor, Tensor]:
        """Scaled queries (H·r, D) and keys (G, c, D) of an item of the tile."""
        q = self.queries[tile.batch_start + b, :, tile.row_slice].to(x).flatten(0, 1) * self.scale
        return q, self.keys[tile.batch_start + b][:, tile.key_index].to(x)

    def _work(self, x: Tensor, q: Tensor, k: Tensor, network: dict[str, Tensor]) -> Iterator[_Work]:
        """The strip's columns, a few at a time, so that what is made of them stays in the cache."""
        rows, columns = x.shape[2:]
        inner, heads = network["inner"], x.shape[1]
        hidden, groups = inner.shape[1:]
        across = network.get("across")
        middle = 0 if across is None else len(across) + heads
        held = _HELD.get(x.device.type, 1 << 19)
        step = min(columns, max(16, held // (rows * (heads * (groups + hidden) + middle))))
        q = q.expand(groups, -1, -1)
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            products = torch.bmm(q, k[:, start:stop].mT)  # G H·r c
            by_head = products.view(groups, heads, -1).transpose(0, 1)  # H G n
            made = torch.baddbmm(network["inner_bias"][..., None], inner, by_head).relu_()
            if across is None:
                yield _Work(slice(start, stop), products, made, None, None)
                continue
            joint = torch.baddbmm(network["joint_bias"][:, None, None], network["joint"][:, None], made)[:, 0]
            mixed = torch.addmm(network["across_bias"][:, None], across, joint).relu_()
            yield _Work(slice(start, stop), products, made, joint, mixed)

    def _network(self, x: Tensor) -> dict[str, Tensor]:
        return {name: getattr(self, name).to(x) for name in _NETWORK if self._has(name)}

    def mapped(self, x: Tensor, tile: Tile, out: Tensor) -> Tensor:
        self._check(x, tile)
        network = self._network(x)
        for b in range(x.shape[0]):
            for work in self._work(x[b : b + 1], *self._operands(x, tile, b), network):
                source = work.hidden.flatten(0, 1) if work.across is None else work.across
                target = out[b, :, :, work.columns]
                y = torch.mm(network["last"], source).view(target.shape)
                if self.residual:
                    torch.add(x[b, :, :, work.columns], y, out=target)
                else:
                    target.copy_(y)
        return out

    def vjp(
        self, x: Tensor, grad: Tensor, tile: Tile, out: Tensor, totals: Sequence[Tensor | None]
    ) -> Tensor:
        names = [name for name in ("queries", "keys", *_FIELDS) if self._has(name)]
        total = dict(zip(names, totals, strict=True))
        network = self._network(x)
        for b in range(x.shape[0]):
            q, k = self._operands(x, tile, b)
            dq, dk = torch.zeros_like(q), torch.empty_like(k)
            for work in self._work(x[b : b + 1], q, k, network):
                up = grad[b, :, :, work.columns].flatten(1)  # H n
                dp = self._back(work, up, network, total)
                keys = k[:, work.columns]
                for g in range(len(k)):
                    dq.addmm_(dp[g], keys[g])
                dk[:, work.columns] = torch.bmm(dp.mT, q.expand(len(k), -1, -1))
            item = tile.batch_start + b
            for_queries, for_keys = total["queries"], total["keys"]
            if for_queries is not None:
                for_queries[item, :, tile.row_slice] += dq.mul_(self.scale).view(x.shape[1], x.shape[2], -1)
            if for_keys is not None:
                for_keys[item][:, tile.key_index] += dk
        return out.copy_(grad) if self.residual else out.zero_()

    def _back(
        self, work: _Work, up: Tensor, network: dict[str, Tensor], total: dict[str, Tensor | None]
    ) -> Tensor:
        """The gradient of the products (G, H·r, c); those of the network are added to the totals."""

        def add(name: str, grad: Tensor) -> None:
            held = total.get(name)
            if held is not None:
                held.add_(grad)

        heads = len(work.hidden)
        if work.joint is None or work.across is None:
            add("last", up @ work.hidden.flatten(0, 1).T)
            down = torch.mm(network["last"].T, up).view(work.hidden.shape)
        else:
            add("last", up @ work.across.T)
            across = torch.mm(network["last"].T, up).mul_(work.across.sign_())
            add("across_bias", across.sum(1))
            add("across", across @ work.joint.T)
            joint = torch.mm(network["across"].T, across)  # H n
            add("joint_bias", joint.sum(1))
            add("joint", torch.bmm(joint[:, None], work.hidden.mT)[:, 0])
            down = network["joint"][..., None] * joint[:, None]
        down = down.mul_(work.hidden.sign_())  # H h n
        add("inner_bias", down.sum(-1))
        groups = len(work.products)
        by_head = work.products.view(groups, heads, -1).transpose(0, 1)  # H G n
        add("inner", torch.bmm(down, by_head.mT))
        by_head.copy_(torch.bmm(network["inner"].mT, down))
        return work.products

    def flops(self, pairs: int) -> int:
        heads, hidden, groups = self.inner.shape
        between = 0 if self.across is None else heads * hidden + self.across.numel()
        return 2 * pairs * (heads * groups * (self.keys.shape[3] + hidden) + between + self.last.numel())


_FIELDS = ("inner", "inner_bias", "last", "joint", "joint_bias", "across", "across_bias")


def head_pairs(
    queries: Tensor,
    keys: Tensor,
    *,
    inner: Tensor,
    inner_bias: Tensor,
    last: Tensor,
    joint: Tensor | None = None,
    joint_bias: Tensor | None = None,
    across: Tensor | None = None,
    across_bias: Tensor | None = None,
    scale: float | None = None,
    residual: bool = False,
) -> HeadPairs:
    """Logits out of all products s_ag = scale · q_a·k_g of a pair, query head a with key head g:

        z_a = relu(inner_a s_a + inner_bias_a),   y = last [z_1; ...; z_H],   or with layers between
        u_a = joint_a · z_a + joint_bias_a,       y = last relu(across u + across_bias)

    The logits that come in are added with `residual`, and else forgotten. The products are made for a few
    rows and columns at a time, and made again for the gradient: memory is O(L).

    Li et al., "EIT: Enhanced Interactive Transformer", arXiv 2212.10197.

    Args:
        queries: `(B, H, L, D)`, of the call.
        keys: `(B, G, S, D)`, of the call.
        inner, inner_bias: `(H, h, G)` and `(H, h)`.
        last: `(H, m)`; `(H, H·h)` without layers between.
        joint, joint_bias: `(H, h)` and `(H,)`.
        across, across_bias: `(m, H)` and `(m,)`.
        scale: default 1/√D.
        residual: add what comes in.
    """
    floating("queries", queries, 4, "(B, H, L, D)")
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    return HeadPairs(
        queries, keys, scale, inner, inner_bias, last, joint, joint_bias, across, across_bias, residual
    )
