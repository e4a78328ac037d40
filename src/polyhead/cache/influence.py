"""What a loss would lose, to first order, by every block of attention: one backward pass a sample.

For a row of weights A of a head, and g = ∂loss/∂A, removing the entry j and scaling the others up to take its
place changes the loss by about

    E[t, j] = -A[t, j] · (g[t, j] - Σ_m g[t, m] A[t, m]) / (1 - A[t, j])

and by -A · g where nothing else is in the row. E is summed over blocks of queries by blocks of keys.

No gradient of L × S weights is asked for: an output o_t = Σ_j A[t, j] v_j has g[t, j] = ∂loss/∂o_t · v_j, so
that the gradient of the outputs, which comes layer by layer as the backward pass goes on, is enough. A and g
are made again from queries, keys and values, a few rows at a time, and what is kept is one number a block.

Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression" (paper 107, arXiv
2406.14909).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.attend import Tile
from polyhead.cache.duo import Sample
from polyhead.cache.gating import decoder
from polyhead.checks import given, whole
from polyhead.errors import ConfigError, ShapeError, UnsupportedModel
from polyhead.hf import Call, attach
from polyhead.tasks.reading import frozen

__all__ = ["Influence", "influence", "loss_of"]


@dataclass(frozen=True, eq=False)
class Influence:
    """What a loss would lose by every block of attention, at one length.

    Attributes:
        length: tokens of the samples.
        block: queries and keys of a block.
        layers: for each attention layer the mean over samples, `(H, N, N)` in float64: blocks of queries by
            blocks of keys. Positive: the loss rises without the block. None in layers without causal
            self-attention.
        kv_groups: query heads of a key/value head, by layer.
    """

    length: int
    block: int
    layers: tuple[Tensor | None, ...]
    kv_groups: tuple[int, ...]


def influence(model: nn.Module, samples: Iterable[Sample | Tensor], *, block: int = 64) -> list[Influence]:
    """The influence of all blocks of attention on the loss of samples, for each length that samples have.

    The loss is the mean cross-entropy of the next token where a sample counts. The paper lets the dense model
    answer long questions and counts its answers: `model.generate` writes them. A sample costs a forward and a
    backward pass with activations kept; of the attention, a few rows of weights are held at a time.

    Args:
        model: a transformers decoder with a language-model head; its weights are frozen meanwhile, and it is
            given back as it was.
        samples: token ids `(S,)` or `(B, S)`, all of which count, or `Sample(ids, counted)` of
            `polyhead.cache.duo`, such as `passkeys(...)` makes, where those positions count whose next token
            is part of an answer. Each row of a batch is a sample of its own. No padding.
        block: queries and keys of a block.

    Returns:
        One `Influence` for each length, shortest first.

    Raises:
        UnsupportedModel: the model is no decoder, or its attention cannot be looked into.
        ConfigError, ShapeError: there is no sample, or one does not fit.
    """
    whole("influence: block", block, 1)
    body = decoder(model, "influence")
    device = next(model.parameters()).device
    found: dict[int, _Sums] = {}
    with frozen(model), attach(model) as attachment, torch.enable_grad():
        if not any(layer.kind == "decoder" for layer in attachment.layers):
            raise UnsupportedModel(f"{type(body).__name__} has no causal self-attention to look into")
        groups = tuple(layer.heads // layer.kv_heads for layer in attachment.layers)
        for one in samples:
            ids, counted = (x.to(device) for x in checked(one))
            sums = found.setdefault(ids.shape[1], _Sums(block))
            sums.samples += len(ids)
            with attachment.handling(sums.handle):
                loss_of(body, ids, counted).sum().backward()
    if not found:
        raise ConfigError("influence needs at least one sample; samples is empty")
    return [
        Influence(
            length,
            block,
            tuple(
                None if n not in sums.layers else sums.layers[n] / sums.samples for n in range(len(groups))
            ),
            groups,
        )
        for length, sums in sorted(found.items())
    ]


def checked(sample: Sample | Tensor) -> tuple[Tensor, Tensor]:
    """Ids `(B, S)` and where they count, bool of the same shape; an error if they do not fit."""
    if isinstance(sample, Tensor):
        ids = sample if sample.ndim == 2 else sample[None]
        counted = torch.ones(ids.shape, dtype=torch.bool)
        counted[..., -1:] = False
    elif isinstance(sample, tuple) and len(sample) == 2:
        ids, counted = sample
    else:
        raise ConfigError(f"a sample must be token ids (S,), (B, S) or a Sample; got {given(sample)}")
    if ids.ndim != 2 or ids.shape[1] < 2 or ids.is_floating_point():
        raise ShapeError(f"ids must be integers (B, S) with S at least 2; got {given(ids)}")
    if counted.shape != ids.shape or counted.dtype != torch.bool:
        raise ShapeError(
            f"counted must be bool of the shape of ids, {tuple(ids.shape)}; got {given(counted)}"
        )
    if not bool(counted.any(1).all()) or bool(counted[:, -1].any()):
        raise ConfigError(
            "every sample must count somewhere, and not at its last token, which has no next one"
        )
    return ids, counted


def loss_of(model: nn.Module, ids: Tensor, counted: Tensor) -> Tensor:
    """Mean cross-entropy of the next token where it counts, `(B,)`."""
    places = counted.any(0).nonzero().view(-1)
    accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept: dict[str, Any] = {"logits_to_keep": places} if accepts else {}
    logits = getattr(model(input_ids=ids, use_cache=False, **kept), "logits", None)
    if logits is None:
        raise ConfigError(
            f"a language-model head is needed to tell a loss; {type(model).__name__} gives no logits"
        )
    said = logits if accepts else logits[:, places]
    said = said if said.dtype == torch.float64 else said.float()
    each = F.cross_entropy(said.mT, ids[:, places + 1], reduction="none")
    counts = counted[:, places]
    return (each * counts).sum(1) / counts.sum(1)


class _Sums:
    """Sums over samples of one length, by layer."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.samples = 0
        self.layers: dict[int, Tensor] = {}

    def handle(self, call: Call) -> Tensor:
        """The attention handler: when the gradient of the output is there, its layer is summed up."""
        out = call.proceed()
        if call.layer.kind != "decoder":
            return out
        if not out.requires_grad:  # the first layer of frozen weights: the graph begins here
            out = out.detach().requires_grad_()
        kept = call.replace(q=call.q.detach(), k=call.k.detach(), v=call.v.detach(), below=())
        held = out.detach()

        @torch.no_grad()
        def arrived(grad: Tensor) -> None:
            length = kept.q.shape[2]
            blocks = -(-length // self.block)
            total = self.layers.get(kept.layer.index)
            if total is None:
                total = torch.zeros(kept.layer.heads, blocks, blocks, dtype=torch.float64)
                self.layers[kept.layer.index] = total
            sinks = getattr(kept.normalizer, "sink", None) is not None
            assert isinstance(kept.v, Tensor)
            pool = _Pool(grad, held, kept.v, self.block, blocks, sinks)
            kept.observe([pool])
            total += pool.total.cpu()

        out.register_hook(arrived)
        return out


class _Pool:
    """Takes the weights of a call strip by strip, and sums their influence over blocks."""

    needs_logits = False

    def __init__(self, grad: Tensor, out: Tensor, v: Tensor, block: int, blocks: int, sinks: bool) -> None:
        wide = torch.promote_types(grad.dtype, torch.float32)
        self.grad, self.v = grad.to(wide), v.to(wide)
        self.block, self.blocks, self.sinks = block, blocks, sinks
        self.repeat = out.shape[1] // v.shape[1]
        self.total = torch.zeros(out.shape[1], blocks, blocks, dtype=torch.float64, device=out.device)

    def visit(self, tile: Tile, logits: Tensor | None, weights: Tensor) -> None:
        items = slice(tile.batch_start, tile.batch_start + tile.batch)
        heads = slice(tile.head_start, tile.head_start + tile.heads)
        rows = slice(tile.row_start, tile.row_start + len(tile.rows))
        of_kv = torch.arange(tile.head_start, tile.head_start + tile.heads, device=weights.device)
        values = self.v[items][:, of_kv // self.repeat][
            :, :, tile.cols if tile.columns is None else tile.columns
        ]
        g = self.grad[items, heads, rows] @ values.mT
        found = entries(weights.to(g.dtype), g, self.sinks).sum(0).double()
        by_col = found.new_zeros(*found.shape[:2], self.blocks)
        by_col.index_add_(2, tile.cols // self.block, found)
        self.total[heads].index_add_(1, tile.rows // self.block, by_col)


def entries(weights: Tensor, g: Tensor, sinks: bool) -> Tensor:
    """E of all entries of rows `(..., c)` of weights, given their gradients.

    Where one weight holds more than half of its row, 1 - A and the mean over the others are summed without
    it: as differences nothing would be left of them in float32.
    """
    products = weights * g
    mean = products.sum(-1, keepdim=True)
    top, at = weights.max(-1, keepdim=True)
    beside = torch.ones_like(weights, dtype=torch.bool).scatter_(-1, at, False)
    left = (weights * beside).sum(-1, keepdim=True)
    if sinks:  # what the sink takes is in the row, too, and adds nothing to the output
        left = left + (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
    others = torch.where(left > 0, (products * beside).sum(-1, keepdim=True) / left, 0.0)
    found = weights * (mean - g) / (1 - weights).clamp(min=0.25)
    by_top = top * (others - g.gather(-1, at))
    return found.scatter(-1, at, torch.where(top > 0.5, by_top, found.gather(-1, at)))
