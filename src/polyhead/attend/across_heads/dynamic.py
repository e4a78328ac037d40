"""Mixes of the heads that depend on the query's token and on the key's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyhead.attend.across_heads.base import AcrossHeads
from polyhead.attend.tile import Tile
from polyhead.checks import floating, given
from polyhead.description import Part
from polyhead.errors import ConfigError, ShapeError

__all__ = ["DynamicHeadMix", "TokenMix", "dynamic_head_mix"]

_Place = tuple[slice, slice, slice | Tensor]

_SMALL = 1 << 14  # so few numbers are mapped sooner by a few long operations than by many for a head each


class TokenMix(Part):
    """What n tokens add to the numbers x of their pairs: `sum_r (x · read_r) write_r + gate * x`.

    Attributes:
        read, write: `(B, H, n, R)`, R vectors over the heads for every token.
        gate: `(B, H, n)`; None: no gates.
    """

    read: Tensor
    write: Tensor
    gate: Tensor | None = None

    def __post_init__(self) -> None:
        floating("read", self.read, 4, "(B, H, n, R)")
        floating("write", self.write, 4, "(B, H, n, R)")
        if self.read.shape != self.write.shape:
            raise ConfigError(
                f"read and write must have one shape (B, H, n, R), got {tuple(self.read.shape)} and "
                f"{tuple(self.write.shape)}"
            )
        if self.gate is not None:
            floating("gate", self.gate, 3, "(B, H, n)")
            if self.gate.shape != self.read.shape[:3]:
                raise ConfigError(
                    f"gate must have shape (B, H, n) {tuple(self.read.shape[:3])}, got {given(self.gate)}"
                )

    def of(self, name: str, place: _Place, shape: tuple[int, ...], like: Tensor) -> TokenMix:
        """The share of some tokens, or a `ShapeError` if it has not the shape (b, h, n)."""
        found = self.map_tensors(lambda t: t[place].to(like))
        if found.read.shape[:3] != shape:
            raise ShapeError(
                f"{name} of the mix of heads holds {tuple(self.read.shape[:3])} (B, H, tokens), which does "
                f"not fit the call: a tile asked for {shape} and got {tuple(found.read.shape[:3])}"
            )
        return found


class DynamicHeadMix(AcrossHeads):
    """y_ij = x_ij + base x_ij + what token i adds + what token j adds. See `dynamic_head_mix`."""

    base: Tensor | None = None
    queries: TokenMix | None = None
    keys: TokenMix | None = None

    def __post_init__(self) -> None:
        heads = []
        if self.base is not None:
            floating("base", self.base, 2, "(H, H)")
            heads += list(self.base.shape)
        for name in ("queries", "keys"):
            side = getattr(self, name)
            if side is not None:
                if not isinstance(side, TokenMix):
                    raise ConfigError(f"{name} must be a TokenMix, got {given(side)}")
                heads.append(side.read.shape[1])
        if not heads:
            raise ConfigError("a dynamic mix of heads needs base, queries or keys; all are None")
        if len(set(heads)) > 1:
            raise ConfigError(f"base (H, H), queries and keys must be of one number of heads, got {heads}")

    def _sides(self, x: Tensor, tile: Tile) -> tuple[TokenMix | None, TokenMix | None]:
        """What the tile's queries and its keys add, in the dtype of `x`."""
        self.check_heads(self._heads, tile)
        queries, keys = self.queries, self.keys
        batch, heads, rows, cols = x.shape
        place = (tile.batch_slice, tile.head_slice)
        if queries is not None:
            queries = queries.of("queries", (*place, tile.row_slice), (batch, heads, rows), x)
        if keys is not None:
            keys = keys.of("keys", (*place, tile.key_index), (batch, heads, cols), x)
        return queries, keys

    def _matrices(self, x: Tensor, side: TokenMix | None) -> Tensor:
        """What rows are multiplied by: `(b, r, H, H)`, or `(1, 1, H, H)` where it is one for all."""
        heads = x.shape[1]
        made = torch.eye(heads, dtype=x.dtype, device=x.device)[None, None]
        if self.base is not None:
            made = made + self.base.to(x)
        if side is not None:
            read, write = (t.transpose(1, 2) for t in (side.read, side.write))  # b r H R
            made = made + (write[:, :, :, None] * read[:, :, None]).sum(-1)
            if side.gate is not None:
                made = made + torch.diag_embed(side.gate.transpose(1, 2))
        return made

    def apply(self, x: Tensor, tile: Tile) -> Tensor:
        queries, keys = self._sides(x, tile)
        matrices = self._matrices(x, queries)
        rows = x.transpose(1, 2)  # b r H c
        made = (matrices.expand(*rows.shape[:2], -1, -1) @ rows).transpose(1, 2)
        if keys is None:
            return made.contiguous()
        for read, write in zip(keys.read.unbind(-1), keys.write.unbind(-1), strict=True):
            made = made + (x * read[:, :, None]).sum(1, keepdim=True) * write[:, :, None]
        return made if keys.gate is None else made + x * keys.gate[:, :, None]

    def mapped(self, x: Tensor, tile: Tile, out: Tensor) -> Tensor:
        if x.numel() <= _SMALL:
            return out.copy_(self.apply(x, tile))
        queries, keys = self._sides(x, tile)
        self._by_rows(self._matrices(x, queries), x, out)
        if keys is None:
            return out
        for b in range(x.shape[0]):
            read, write, gate = _by_token(keys, b)
            for n in range(read.shape[0]):
                _spread(write[n], _gather(read[n], x[b]), out[b])
            if gate is not None:
                for h in range(x.shape[1]):
                    out[b, h].addcmul_(x[b, h], gate[h])
        return out

    def _by_rows(self, matrices: Tensor, x: Tensor, out: Tensor) -> None:
        """Multiply the numbers of every row `(H, c)` by its matrix."""
        for b in range(x.shape[0]):
            matrix = matrices[b % matrices.shape[0]]
            if matrix.shape[0] == 1:
                torch.mm(matrix[0], x[b].flatten(1), out=out[b].flatten(1))
            else:
                torch.bmm(matrix, x[b].transpose(0, 1), out=out[b].transpose(0, 1))

    def vjp(
        self, x: Tensor, grad: Tensor, tile: Tile, out: Tensor, totals: Sequence[Tensor | None]
    ) -> Tensor:
        queries, keys = self._sides(x, tile)
        wanted = dict(zip(map(id, self.tensors()), totals, strict=True))
        self._by_rows(self._matrices(x, queries).transpose(2, 3), grad, out)
        if any(wanted.get(id(t)) is not None for t in _tensors(self.base, self.queries)):
            self._rows_vjp(x, grad, tile, queries, wanted)
        if keys is not None:
            self._keys_vjp(x, grad, tile, out, keys, wanted)
        return out

    def _rows_vjp(
        self, x: Tensor, grad: Tensor, tile: Tile, side: TokenMix | None, wanted: dict[int, Tensor | None]
    ) -> None:
        """Add the gradients of the matrices' parts to the totals."""
        if side is None:
            for one, up in zip(x, grad, strict=True):
                _add(wanted, self.base, (), up.flatten(1) @ one.flatten(1).T)
            return
        assert self.queries is not None
        made = [torch.bmm(up.transpose(0, 1), one.permute(1, 2, 0)) for one, up in zip(x, grad, strict=True)]
        matrices = torch.stack(made)  # b r H H
        place = (tile.batch_slice, tile.head_slice, tile.row_slice)
        _add(wanted, self.base, (), matrices.sum((0, 1)))
        read, write = (t.transpose(1, 2) for t in (side.read, side.write))  # b r H R
        _add(wanted, self.queries.write, place, (matrices @ read).transpose(1, 2))
        _add(wanted, self.queries.read, place, (matrices.mT @ write).transpose(1, 2))
        _add(wanted, self.queries.gate, place, matrices.diagonal(dim1=2, dim2=3).transpose(1, 2))

    def _keys_vjp(
        self,
        x: Tensor,
        grad: Tensor,
        tile: Tile,
        out: Tensor,
        side: TokenMix,
        wanted: dict[int, Tensor | None],
    ) -> None:
        """Add what the keys' tokens add to the gradient to `out`, and their gradients to the totals."""
        assert self.keys is not None
        trained = any(wanted.get(id(t)) is not None for t in self.keys.tensors())
        for b in range(x.shape[0]):
            read, write, gate = _by_token(side, b)
            item = tile.batch_start + b
            place = (slice(item, item + 1), tile.head_slice, tile.key_index)
            for_read, for_write = torch.empty_like(read), torch.empty_like(write)
            for n in range(read.shape[0]):
                down = _gather(write[n], grad[b])
                _spread(read[n], down, out[b])
                if trained:
                    _columns(x[b], down, for_read[n])
                    _columns(grad[b], _gather(read[n], x[b]), for_write[n])
            if gate is not None:
                for h in range(x.shape[1]):
                    out[b, h].addcmul_(grad[b, h], gate[h])
            if trained:
                _add(wanted, self.keys.read, place, for_read.permute(1, 2, 0)[None])
                _add(wanted, self.keys.write, place, for_write.permute(1, 2, 0)[None])
                if gate is not None:
                    _add(wanted, self.keys.gate, place, _columns(x[b], grad[b], torch.empty_like(gate))[None])

    @property
    def _heads(self) -> int:
        return self.tensors()[0].shape[0 if self.base is not None else 1]

    def flops(self, pairs: int) -> int:
        return 2 * pairs * self._heads**2


def _tensors(base: Tensor | None, side: TokenMix | None) -> tuple[Tensor, ...]:
    return (*(() if base is None else (base,)), *(() if side is None else side.tensors()))


def _by_token(side: TokenMix, b: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """read and write `(R, H, n)` and gate `(H, n)` of an item, a row of memory for every vector and head."""
    read, write = (t[b].permute(2, 0, 1).contiguous() for t in (side.read, side.write))
    return read, write, None if side.gate is None else side.gate[b].contiguous()


def _gather(read: Tensor, x: Tensor) -> Tensor:
    """sum_h read[h, j] x[h, i, j], `(r, c)`."""
    total = x[0] * read[0]
    for h in range(1, x.shape[0]):
        total.addcmul_(x[h], read[h])
    return total


def _spread(write: Tensor, numbers: Tensor, out: Tensor) -> None:
    """out[h, i, j] += write[h, j] numbers[i, j]."""
    for h in range(out.shape[0]):
        out[h].addcmul_(numbers, write[h])


def _columns(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """sum_i a[h, i, j] b[i, j] (or b[h, i, j]), `(H, c)`."""
    for h in range(a.shape[0]):
        torch.sum(a[h] * (b if b.ndim == 2 else b[h]), 0, out=out[h])
    return out


def _add(
    wanted: dict[int, Tensor | None], leaf: Tensor | None, place: tuple[slice | Tensor, ...], grad: Tensor
) -> None:
    """Add to the total of a leaf, where one is wanted, at `place`."""
    total = None if leaf is None else wanted.get(id(leaf))
    if total is not None:
        total[place] += grad.to(total.dtype)


def dynamic_head_mix(
    *, base: Tensor | None = None, queries: TokenMix | None = None, keys: TokenMix | None = None
) -> DynamicHeadMix:
    """Mix the heads of every pair by a matrix that its tokens i and j choose, in five parallel branches:

        y_h = x_h + sum_g base[h, g] x_g
              + sum_r (x · queries.read_ir) queries.write_ir[h] + queries.gate_i[h] x_h
              + sum_r (x · keys.read_jr) keys.write_jr[h] + keys.gate_j[h] x_h

    As a score and as a weight map it makes dynamically composable attention: Xiao et al., "Improving
    Transformers with Dynamically Composable Multi-Head Attention", arXiv 2405.08553. Cost: 2·H² operations
    a pair for base and queries, 4·R·H + 2·H for the keys.

    Args:
        base: `(H, H)`, the same for all pairs.
        queries: `(B, H, L, ...)`, one for every query row of the call.
        keys: `(B, H, S, ...)`, one for every key of the call.
    """
    return DynamicHeadMix(base, queries, keys)
