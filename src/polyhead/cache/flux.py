"""Flux Attention: train routers that make whole layers read little, and keep no more than they read.

    routers = ph.hf.layer_routers(model)
    penalty = flux.train(model, routers, samples, targets={"retrieval": 0.45, "code": 1.0})
    with ph.hf.routed_layers(model, routers) as routing:
        out = model(prompt, use_cache=True)
        cache = flux.pruned(routing, out.past_key_values)
        model.generate(longer_prompt, past_key_values=cache)

`ph.hf.routed_layers` has what a router reads and what a sparse layer sees. The model is frozen; the routers
are trained on

    loss = mean of -log p of the counted tokens + penalty,         S = 1 - Σ_layers H z / Σ_layers H

with z drawn at a temperature that falls (`polyhead.nn.layer_router`), full and sparse attention mixed by it
in every layer, and the penalty of the sparsity S of each kind of task, whose weights ascend
(`TargetPenalty`). AdamW with betas (0.9, 0.95), for routers and weights alike.

"Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference" (paper 166, arXiv 2604.07394).
The published trainer can train the projections of queries, keys and values along; here the model stays as it
is, as the abstract says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from polyhead.cache.gating import decoder
from polyhead.cache.per_head import cached_layers, per_head
from polyhead.checks import number, whole
from polyhead.errors import ConfigError, ShapeError
from polyhead.hf.layer_routing import LayerRouters, LayerRouting, routed_layers
from polyhead.nn.layer_router import TargetPenalty, router_temperature
from polyhead.tasks.reading import frozen

if TYPE_CHECKING:
    from polyhead.cache.transformers_cache import PerHeadCache

__all__ = ["Task", "pruned", "train"]


class Task(NamedTuple):
    """Something to read, and what kind of task it is.

    Attributes:
        ids: token ids `(B, S)`.
        counted: bool `(B, S)`, the tokens that the model has to predict; none is the first of its row.
        kinds: one a row, each with a target.
    """

    ids: Tensor
    counted: Tensor
    kinds: Sequence[str]


def train(
    model: nn.Module,
    routers: LayerRouters,
    samples: Iterable[Task],
    *,
    targets: Mapping[str, float],
    steps: int = 300,
    sink: int = 128,
    window: int = 2048,
    size: int = 100,
    lr: float = 5e-4,
    penalty_lr: float = 1e-3,
    decay: float = 0.1,
    progress: Callable[[int, int, float, float], None] | None = None,
) -> TargetPenalty:
    """Train the routers, in place.

    Decisions are drawn from torch's global generator. The paper takes 300 steps of 48 texts of 64k tokens.

    Args:
        model: a transformers decoder with a language-model head; frozen meanwhile, and given back as it was.
        routers: `layer_routers(model)`.
        samples: one a step.
        targets: sparsity by kind of task, see `TargetPenalty`.
        steps: how many.
        sink, window, size: see `routed_layers`.
        lr, penalty_lr: rates of the routers and of the weights of the penalty.
        decay: weight decay of both.
        progress: called as progress(step, steps, loss without penalty, mean sparsity) after each step.

    Returns:
        The penalty, with the weights that it has come to.

    Raises:
        ConfigError: a value is not allowed, the routers do not fit, or there are fewer samples than steps.
        UnsupportedModel: the model is no decoder, or its attention cannot be replaced.
    """
    whole("flux.train: steps", steps, 1)
    lr = number("flux.train: lr", lr, above=0)
    penalty_lr = number("flux.train: penalty_lr", penalty_lr, above=0)
    decay = number("flux.train: decay", decay, least=0)
    decoder(model, "routers of layers")
    device = next(model.parameters()).device
    penalty = TargetPenalty(targets, device=device)
    optimizer = torch.optim.AdamW(
        [{"params": routers.parameters(), "lr": lr}, {"params": penalty.parameters(), "lr": penalty_lr}],
        betas=(0.9, 0.95),
        weight_decay=decay,
    )
    source = iter(samples)
    how: dict[str, Any] = {"sink": sink, "window": window, "size": size, "temperature": 1.0}
    with frozen(model), torch.enable_grad(), routed_layers(model, routers, **how) as routing:
        for step in range(steps):
            one = next(source, None)
            if one is None:
                raise ConfigError(f"samples ended after {step} of {steps} steps")
            routing.temperature = router_temperature(step, steps)
            loss = _loss(model, one, device)
            sparsity = routing.sparsity()
            optimizer.zero_grad()
            (loss + penalty(sparsity, one.kinds)).backward()
            optimizer.step()
            if progress is not None:
                progress(step + 1, steps, loss.item(), sparsity.mean().item())
    return penalty


def _loss(model: nn.Module, one: Task, device: torch.device) -> Tensor:
    """Mean of -log p of the counted tokens."""
    if (
        one.counted.shape != one.ids.shape
        or one.counted.dtype != torch.bool
        or len(one.kinds) != len(one.ids)
    ):
        raise ShapeError(
            f"counted must be bool of the shape of ids, {tuple(one.ids.shape)}, with a kind a row; got "
            f"{one.counted.dtype} {tuple(one.counted.shape)} and {len(one.kinds)} kinds"
        )
    if bool(one.counted[:, 0].any()) or not bool(one.counted.any()):
        raise ConfigError("some tokens must be counted, and not the first of a text, which nothing predicts")
    ids, counted = one.ids.to(device), one.counted.to(device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][counted[:, 1:]]
    return nn.functional.cross_entropy(logits.float(), ids[:, 1:][counted[:, 1:]])


def pruned(routing: LayerRouting, past: Any) -> PerHeadCache:
    """A cache that goes on from `past`, and keeps no more than the layers read that were routed to little.

    They keep the first `sink` tokens and the last `window`, the others everything; a layer that any sequence
    of the batch reads in full is kept in full. What follows, within the same block, is as with `past`.

    Args:
        routing: of the block in which `past` was filled.
        past: a cache that holds every token, such as a `DynamicCache`; it is left as it is.

    Returns:
        A `PerHeadCache`, see `polyhead.cache.per_head`.

    Raises:
        ConfigError: nothing has been decided, or `past` does not hold every token.
    """
    if not routing.decisions:
        raise ConfigError("flux.pruned: nothing has been decided yet; read the prompt within routed_layers")
    full = []
    for layer in cached_layers(list(routing.layers), routing.model):
        z = routing.decisions.get(layer.index)
        full.append((z is None or bool((z > 0).any()),) * layer.kv_heads)
    real, tokens = routing.real, past.get_seq_length()
    if real is not None and real.shape[1] < tokens:  # what came behind the prompt is no padding
        real = torch.cat([real, real.new_ones(len(real), tokens - real.shape[1])], 1)
    found = per_head(routing.model, full=full, sink=routing.sink, window=routing.window)
    try:
        found.take_over(past, real)
    except BaseException:
        found.detach()
        raise
    return found
