"""Values that depend on how far a key stands from the query, without a tensor of all pairs and features.

    Σ_j w_ij e_{clip(j - i, -r, r)} = Σ_n (sum of w_ij over the keys with clip(j - i, -r, r) = n) e_n

The weights are summed by distance, and the 2 r + 1 sums of a query multiply the table e. Distances are
clipped as by Shaw et al., "Self-Attention with Relative Position Representations", arXiv 1803.02155.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["by_distance", "table_flops", "tabled"]


def by_distance(
    weights: Float[Tensor, "*b L S"], keys: Int[Tensor, " S"], reach: int
) -> Float[Tensor, "*b L n"]:
    """The weights of every query, summed over the keys at each clipped distance, n = 2 reach + 1.

    Args:
        weights: w.
        keys: where the keys stand, ascending, counted from the first query; queries follow each other.
        reach: r, at least 1.

    Returns:
        From keys r and more behind the query to those r and more ahead of it.
    """
    *lead, queries, count = weights.shape
    if not count:
        return weights.new_zeros(*lead, queries, 2 * reach + 1)
    rows = torch.arange(queries, device=keys.device)[:, None]
    # nearer than r there is one key at a distance, or none: nothing is added up
    near = rows + torch.arange(1 - reach, reach, device=keys.device)  # L 2r-1
    at = torch.searchsorted(keys, near).clamp(max=count - 1)
    inner = weights.gather(-1, at.expand(*lead, -1, -1)) * (keys[at] == near)
    away = keys - rows  # L S
    ends = [(weights * far).sum(-1, keepdim=True) for far in (away <= -reach, away >= reach)]
    return torch.cat([ends[0], inner, ends[1]], dim=-1)


def tabled(
    sums: Float[Tensor, "B H L n"], table: Float[Tensor, "n d"], to_values: nn.Linear, groups: int
) -> Float[Tensor, "B H L Dv"]:
    """Σ_n sums_n (table_n W_g + b_g), where head h takes the g-th part of the map, g = h // (H / groups).

    Few queries mix the table and map what they get, many take the mapped table: what needs less.
    """
    batch, heads, queries, size = sums.shape
    group = heads // groups
    weight = to_values.weight.unflatten(0, (groups, -1)).mT  # G d Dv
    mixing, mapping = _orders(batch * queries, heads, table.shape, weight.shape)
    rows = sums.reshape(batch, groups, group * queries, size)
    if mixing < mapping:
        y = rows @ table.to(sums.dtype) @ weight.to(sums.dtype)
    else:
        y = rows @ (table @ weight).to(sums.dtype)
    if to_values.bias is not None:
        bias = to_values.bias.unflatten(0, (groups, 1, -1))
        y = y + rows.sum(-1, keepdim=True) * bias.to(sums.dtype)
    return y.view(batch, heads, queries, y.shape[-1])


def table_flops(rows: int, heads: int, table: Tensor, to_values: nn.Linear, groups: int) -> int:
    """Operations of `tabled` for so many queries in all items."""
    outputs, width = to_values.weight.shape
    return min(_orders(rows, heads, table.shape, (groups, width, outputs // groups)))


def _orders(rows: int, heads: int, table: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, int]:
    """Operations where the table is mixed first, and where it is mapped first."""
    (size, width), (groups, _, value_dim) = table, weight
    mixing = rows * heads * width * (size + value_dim)
    mapping = size * width * groups * value_dim + rows * heads * size * value_dim
    return 2 * mixing, 2 * mapping
