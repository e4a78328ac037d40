"""One query a head by the keys that were chosen for it: the step of decoding.

The blocks that any head of a group chose are gathered once for the group, and what a head did not choose is
hidden from it, so that a key is read once and not once a head. Where they are most of all blocks, keys are
read where they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyhead.attend.fused_cpu import HIDDEN, fused
from polyhead.attend.masks import And, Chosen, Mask, causal
from polyhead.attend.precision import wide

__all__ = ["attend_row"]

_CAUSAL = causal()
_MOST = 0.6  # of the blocks: gathering more, a copy, takes longer than reading all of them


def attend_row(
    q: Tensor, k: Tensor, v: Tensor, choice: Chosen, rest: Mask | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `(B, H, 1, D)` and log-sum-exp `(B, H, 1)`, without gradients.

    Args:
        q, k, v: `(B, H, 1, D)` and `(B, G, S, D)`, S at least the length of a block.
        choice: the blocks that each head reads.
        rest: what else hides keys.
        scale: factor of q·k.
    """
    batch, heads, _, width = q.shape
    kv_heads, keys, cols = k.shape[1], k.shape[2], choice.cols
    blocks, repeat = -(-keys // cols), heads // kv_heads
    rest = _without_causal(rest)
    table = _table(choice.index, blocks).expand(batch, heads, -1)
    grouped = table.unflatten(1, (kv_heads, repeat))
    either = grouped.any(2)  # (B, G, N)
    count = int(either.sum(-1).amax())
    if count == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=wide(q.dtype))
    gathered = count <= _MOST * blocks
    if gathered:
        # distinct blocks in any order, some of them not chosen where groups chose unequally many
        index = either.to(torch.uint8).topk(count, dim=-1, sorted=False).indices
        start = (index * cols).clamp(max=keys - cols)  # the last block reaches back for a whole one
        own_k, own_v = _windows(k, start, cols), _windows(v, start, cols)
        j = start[..., None] + torch.arange(cols, device=q.device)  # (B, G, n, C)
        hidden = ~grouped.gather(-1, index[:, :, None].expand(-1, -1, repeat, -1))[..., None]
        if keys % cols:
            hidden = hidden | (j < index[..., None] * cols)[:, :, None]
        hidden = hidden.expand(-1, -1, -1, -1, cols).flatten(3)
        j = j.flatten(2)[:, :, None]
    else:
        own_k, own_v = ((x if x.stride(3) == 1 else x.contiguous()).flatten(0, 1)[:, None] for x in (k, v))
        j = torch.arange(keys, device=q.device)
        hidden = ~grouped.repeat_interleave(cols, -1)[..., :keys]
    if rest is not None:
        b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
        h = torch.arange(heads, device=q.device).view(kv_heads, repeat, 1)
        i = torch.full((1, 1), keys - 1, device=q.device)
        hidden = hidden | ~rest.allowed(b, h, i, j)
    added = torch.zeros(hidden.shape, dtype=wide(q.dtype), device=q.device).masked_fill_(hidden, HIDDEN)
    out, lse = fused(
        q.reshape(batch * kv_heads, 1, repeat, width),
        own_k,
        own_v,
        attn_mask=added.flatten(0, 1)[:, None],
        scale=scale,
    )
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
    nothing = lse < HIDDEN / 2
    return out.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, -math.inf)


def _without_causal(mask: Mask | None) -> Mask | None:
    """A mask for the last query alone, which may look at all that lies before."""
    terms = mask.terms if isinstance(mask, And) else (mask,)
    left = tuple(term for term in terms if term is not None and term != _CAUSAL)
    return None if not left else left[0] if len(left) == 1 else And(left)


def _table(index: Tensor, blocks: int) -> Tensor:
    """Which blocks are listed in `(B, H, 1, K)`, bool `(B, H, blocks)`."""
    listed = index[:, :, 0]
    table = torch.zeros(*listed.shape[:2], blocks + 1, dtype=torch.bool, device=index.device)
    return table.scatter_(-1, torch.where(listed < 0, blocks, listed), True)[..., :blocks]


def _windows(x: Tensor, start: Tensor, cols: int) -> Tensor:
    """`cols` rows of `(B, G, S, D)` from each of the rows start `(B, G, n)` on: `(B·G, 1, n·cols, D)`."""
    width = x.shape[3]
    if x.stride(3) != 1 or x.stride(2) != width or any(x.stride(n) % width for n in (0, 1) if x.shape[n] > 1):
        x = x.contiguous()
    # every run of `cols` rows, overlapping, so that a block is one copy wherever it starts
    rows = sum((size - 1) * step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True)) // width + 1
    runs = x.as_strided((rows - cols + 1, cols, width), (width, width, 1))
    base = torch.arange(x.shape[0], device=x.device)[:, None] * (x.stride(0) // width)
    base = base + torch.arange(x.shape[1], device=x.device) * (x.stride(1) // width)
    found = runs.index_select(0, (base[..., None] + start).flatten())
    return found.view(x.shape[0] * x.shape[1], 1, -1, width)
