"""How much the output of a whole model would suffer if a head read only what a selector chooses.

With o_h the output of head h in the dense model and δ_h what a selector changes about it, an error e of the
model's output y, which is 0 and smallest at the dense one, is to second order

    e(head h sparse) ≈ ½ δ_hᵀ J_hᵀ H J_h δ_h,        J_h = ∂y/∂o_h,  H the Hessian of e at y
                     = ½ E_r[(∂(r·y)/∂ε_h)²],        o_h + ε_h δ_h at ε_h = 0,  E[r rᵀ] = H

so that one backward pass for a random r tells of all heads at once (Hutchinson's estimator).
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyhead.attend.selectors import Selector
from polyhead.checks import given, number, several, whole
from polyhead.errors import ConfigError
from polyhead.head_scores import HeadScores
from polyhead.heads.inputs import text_model
from polyhead.heads.output_errors import OutputError, hidden_distance, logit_divergence
from polyhead.hf import Call, LayerInfo, attach
from polyhead.hf.choices import Choices
from polyhead.hf.selecting import LayerSelectors, at_the_end, by_layer
from polyhead.tasks.reading import frozen, texts

__all__ = ["head_sensitivities", "head_sensitivity"]

Inputs = Mapping[str, Any]
Texts = str | Sequence[str] | Tensor | Inputs | Sequence[Inputs]


def head_sensitivity(
    model: nn.Module,
    tokenizer: Any = None,
    text: Texts | None = None,
    *,
    select: LayerSelectors,
    errors: Sequence[OutputError] | None = None,
    weights: Sequence[float] | None = None,
    probes: int = 2,
    length: int | None = None,
    seed: int = 0,
) -> HeadScores:
    """How sensitive a model is to the sparsity of each head: what `allocate_budget` and `shares` go by.

        HeSS_h = Σ_k λ_k s_kh / mean over heads of s_k,        s_k as of `head_sensitivities`, Σ_k λ_k = 1

    1 in the mean over heads; a head on which nothing depends has 0.

    "HeSS: Head Sensitivity Score for Sparsity Redistribution in VGGT" (paper 195, arXiv 2603.25336), which
    takes the errors of camera poses and of points of a vision model.

    Our readings: the paper's code is not out, and its summary names a second-order approximation of two
    errors on a small calibration set, and no formula. The quadratic form is that of Gauss and Newton, the
    perturbation what the selector does to the head; errors are divided by their mean over heads and
    averaged.

    Args:
        model: any model that `polyhead.attach` accepts; it is given back as it was.
        tokenizer, text, length: what the model reads, as for `polyhead.profile`: texts, token ids
            `(S,)` or `(N, S)`, a mapping of the model's inputs, or several such mappings. A mapping is read
            at once, the others one by one. None: the beginning of the sample text, 256 tokens.
        select: a selector, or selectors by layer, as for `polyhead.sparse`: what heads would read.
        errors: of the output. Default `(logit_divergence(), hidden_distance())`.
        weights: λ, one number an error, which are divided by their sum. Default: alike.
        probes: backward passes a text and error.
        seed: of the probes. Equal texts have equal probes, so that a text twice changes nothing.
    """
    errors = _errors(errors)
    parts = [1.0] * len(errors) if weights is None else list(weights) if several(weights) else []
    if len(parts) != len(errors):
        raise ConfigError(
            f"weights must be one number for each of {len(errors)} errors; got {given(weights)}"
        )
    parts = [number("weights", part, least=0) for part in parts]
    if not sum(parts):
        raise ConfigError("weights must not all be 0")
    each = head_sensitivities(
        model, tokenizer, text, select=select, errors=errors, probes=probes, length=length, seed=seed
    )
    means = [float(np.nanmean(one.flat)) or 1.0 for one in each]
    total = sum(
        (one * (part / sum(parts) / mean) for one, part, mean in zip(each, parts, means, strict=True)),
        start=each[0] * 0.0,
    )
    assert isinstance(total, HeadScores)
    return total.renamed(
        "sensitivity",
        meaning="by how much the output suffers if this head alone is sparse, 1 in the mean over heads",
        unit="",
        direction="higher: suffers more",
    )


def head_sensitivities(
    model: nn.Module,
    tokenizer: Any = None,
    text: Texts | None = None,
    *,
    select: LayerSelectors,
    errors: Sequence[OutputError] | None = None,
    probes: int = 2,
    length: int | None = None,
    seed: int = 0,
) -> tuple[HeadScores, ...]:
    """For each error what it is, to second order, if one head alone reads what a selector chooses.

        s_h = mean over texts and probes of ½ (∂(r·y)/∂ε_h)²

    in units of the error, each text alike. It is exact for small changes, in the mean over probes, whose
    number of draws decides how sure a number is: with n of them, texts times probes, a standard deviation of
    √(2/n) of it at most for outputs that move in one direction, less for others. It says nothing of what
    heads do together. A text costs a forward pass whose activations are kept, as for training, one sparse
    attention a layer besides, and a backward pass for every probe and error; no weights have gradients, and
    nothing is kept from text to text but one number a head. Layers above see the dense outputs of those
    below.

    Args:
        model, tokenizer, text, select, errors, probes, length, seed: as for `head_sensitivity`.

    Returns:
        One `HeadScores` an error; NaN in layers that did not run, 0 in those that have no selector.

    Raises:
        ConfigError: the selectors do not fit the model, the text is too short or too long, or the model's
            output has not what an error is about.
        UnsupportedModel: the model's attention cannot be looked into.
    """
    errors = _errors(errors)
    whole("head_sensitivities: probes", probes, 1)
    whole("head_sensitivities: seed", seed, 0)
    samples = _samples(model, tokenizer, text, length)
    device = next(model.parameters()).device
    with frozen(model), attach(model) as attachment, torch.enable_grad():
        layers = attachment.layers
        sums = _Sums(by_layer(select, layers), layers, len(errors))
        with attachment.handling(at_the_end(sums.take)):
            for inputs in samples:
                there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
                sums.read(model, there, errors, probes, seed)
    groups = tuple(layer.heads // layer.kv_heads for layer in layers)
    return tuple(
        HeadScores(
            sums.means(n),
            name=error.name or type(error).__name__,
            meaning=f"{error.name or type(error).__name__}, to second order, if this head alone is sparse",
            unit=error.unit,
            direction="higher: suffers more",
            kv_groups=groups,
        )
        for n, error in enumerate(errors)
    )


class _Sums:
    """Squares of derivatives, summed over texts, by error and layer."""

    def __init__(
        self, selectors: Sequence[Selector | None], layers: Sequence[LayerInfo], errors: int
    ) -> None:
        self.choices = Choices(selectors)
        self.squares = [
            [torch.zeros(layer.heads, dtype=torch.float64) for layer in layers] for _ in range(errors)
        ]
        self.items = torch.zeros(len(layers), dtype=torch.float64)
        self._steps: list[tuple[int, Tensor]] = []

    def take(self, call: Call) -> Tensor:
        """The attention handler: the dense output, and a step of 0 towards the sparse one."""
        dense = call.proceed()
        if self.choices.enter(call.layer) is None:
            return dense
        with torch.no_grad():
            change = self.choices.applied(call).proceed() - dense
            change = change if change.dtype == torch.float64 else change.float()
        step = change.new_zeros(*change.shape[:2], 1, 1).requires_grad_()
        self._steps.append((call.layer.index, step))
        return dense + (step * change).to(dense.dtype)

    def read(
        self, model: nn.Module, inputs: Inputs, errors: Sequence[OutputError], probes: int, seed: int
    ) -> None:
        """One forward pass, and a backward pass for every error and probe."""
        accepted = inspect.signature(model.forward).parameters
        more: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        # models that do not name it hand it on
        if "output_hidden_states" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            more["output_hidden_states"] = True
        self._steps = []
        output = model(**(more | dict(inputs)))
        if not self._steps:
            return
        layers, steps = zip(*self._steps, strict=True)
        draw = torch.Generator().manual_seed(_fingerprint(inputs, seed))
        left = probes * len(errors)
        for error, squares in zip(errors, self.squares, strict=True):
            y = error.seen(output)
            counts = _counts(y, inputs)
            items = len(y)
            for _ in range(probes):
                left -= 1
                noise = torch.randn(y.shape, generator=draw, dtype=y.dtype).to(y.device)
                r = error.probe(y.detach(), noise, counts)
                found = torch.autograd.grad(
                    (r * y).sum(), steps, retain_graph=left > 0, allow_unused=True, materialize_grads=True
                )
                for layer, one in zip(layers, found, strict=True):
                    own = one.detach().double().flatten(1).cpu()
                    # what a layer has more of than there are items, such as windows, belongs to them in order
                    own = own.unflatten(0, (items, -1)).sum(1) if len(own) % items == 0 else own.sum(0)[None]
                    squares[layer] += own.square().sum(0) / (2 * probes)
        for layer in set(layers):
            self.items[layer] += items
        self._steps = []

    def means(self, error: int) -> tuple[Any, ...]:
        """Per layer the means over texts `(H,)`; NaN for a layer that did not run."""
        found = []
        for selector, total, items in zip(
            self.choices.selectors, self.squares[error], self.items, strict=True
        ):
            found.append(np.zeros(len(total)) if selector is None else (total / items).numpy())
        return tuple(found)


def _errors(errors: Sequence[OutputError] | None) -> tuple[OutputError, ...]:
    if errors is None:
        return logit_divergence(), hidden_distance()
    if not several(errors) or not errors or not all(isinstance(one, OutputError) for one in errors):
        raise ConfigError(f"errors must be one or more such as logit_divergence(); got {given(errors)}")
    return tuple(errors)


def _samples(model: nn.Module, tokenizer: Any, text: Texts | None, length: int | None) -> list[Inputs]:
    if text is None:
        from polyhead.tasks import sample_text

        text, length = sample_text(), 256 if length is None else length
    maps = [text] if isinstance(text, Mapping) else text
    if several(maps) and len(maps) and all(isinstance(one, Mapping) for one in maps):
        if length is not None:
            raise ConfigError("length cuts texts; a mapping of the model's inputs is read as it is")
        return list(maps)
    text_model(model)  # which reads one sequence, or says that it does not
    return [{"input_ids": ids[None]} for ids in texts(model, tokenizer, text, length)]  # type: ignore[arg-type]


def _counts(y: Tensor, inputs: Inputs) -> Tensor:
    """The weight of each token in the mean over the real tokens of its item, `(B, L, 1)`."""
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = inputs.get(name)
        if isinstance(mask, Tensor) and mask.shape == y.shape[:2]:
            real = mask[..., None].to(y.dtype)
            return real / real.sum(1, keepdim=True).clamp(min=1)
    return torch.full((*y.shape[:2], 1), 1 / y.shape[1], dtype=y.dtype, device=y.device)


def _fingerprint(inputs: Inputs, seed: int) -> int:
    """A number of the inputs, equal where they are."""
    found = zlib.crc32(str(seed).encode())
    for name in sorted(inputs):
        value = inputs[name]
        if isinstance(value, Tensor):
            found = zlib.crc32(name.encode(), found)
            found = zlib.crc32(value.detach().cpu().double().numpy().tobytes(), found)
    return found
