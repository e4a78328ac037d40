"""DuoAttention: find the heads that need the whole context, by training one gate for each KV head.

    samples = duo.passkeys(tokenizer, text, length=512)
    scores = duo.gates(model, samples, steps=60)
    cache = per_head(model, full=scores.top(0.5), sink=4, window=256)

A gate mixes full attention with what a head sees that keeps sinks and a recent window only
(`polyhead.cache.gating`),

    o_h = α_h · Full_h + (1 - α_h) · Short_h,    Short_h sees j <= i iff j < sink or i - j < window,

and all gates together are trained to leave the model's last hidden states as they were, at the tokens
whose answer lies far back, while Σ α is kept small. The model's own weights are frozen. A second forward
pass without gates gives Full_h and the hidden states to keep, as in the published code. `gate_gradients` does
without training: it asks what the first step would be, and of the answers themselves.

Paper: DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads,
arXiv 2410.10819.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyhead.cache.gate_gradients import Questions, gate_gradients
from polyhead.cache.gating import Gates, decoder
from polyhead.errors import ConfigError
from polyhead.head_scores import HeadScores
from polyhead.hf import Attachment, Call, attach
from polyhead.tasks.reading import frozen

__all__ = ["Questions", "Sample", "gate_gradients", "gates", "passkeys"]

_WORDS = (
    "amber anchor basket candle copper desert ember fabric garden hammer island jacket kernel ladder marble "
    "needle orange pepper quartz ribbon saddle timber urchin velvet walnut yellow zephyr"
)
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth"


class Sample(NamedTuple):
    """Something to read.

    Attributes:
        ids: token ids `(B, S)`.
        counted: bool `(B, S)`: where the hidden states have to stay as they were.
    """

    ids: Tensor
    counted: Tensor


def passkeys(
    tokenizer: Any,
    text: str,
    *,
    length: int = 512,
    count: int = 4,
    words: int = 8,
    seed: int = 0,
) -> Iterator[Sample]:
    """Without end: stretches of `text` with passkeys at random depths, asked for at the end.

    The tokens that count are those from which a token of an answer is predicted.

    Args:
        tokenizer: of the model.
        text: what the passkeys are hidden in; each sample begins somewhere else in it.
        length: tokens of a sample. The paper trains on 1,000 to 32,000.
        count: passkeys in a sample, at most 10, as in the paper.
        words: words of a passkey. The paper has 32.
        seed: of all that is drawn.

    Raises:
        ConfigError: `text` or `length` is too short.
    """
    ordinals, vocabulary = _ORDINALS.split(), _WORDS.split()
    if not 1 <= count <= len(ordinals):
        raise ConfigError(f"count must be between 1 and {len(ordinals)} passkeys; got {count}")
    generator = torch.Generator().manual_seed(seed)
    hay = _encoded(tokenizer, text)
    begin = [] if getattr(tokenizer, "bos_token_id", None) is None else [int(tokenizer.bos_token_id)]

    def draw(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    def sample() -> Sample:
        keys = [" ".join(vocabulary[draw(len(vocabulary))] for _ in range(words)) for _ in range(count)]
        hidden = [
            _encoded(tokenizer, f"\nRemember the {ordinals[n]} passkey to the vault:")
            + _encoded(tokenizer, f" {key}.\n")
            for n, key in enumerate(keys)
        ]
        asked = []
        for n, key in enumerate(keys):
            asked.append(
                (_encoded(tokenizer, f"\nWhat is the {ordinals[n]} passkey to the vault? It is:"), False)
            )
            asked.append((_encoded(tokenizer, f" {key}"), True))
            asked.append((_encoded(tokenizer, "."), False))
        room = length - len(begin) - sum(map(len, hidden)) - sum(len(ids) for ids, _ in asked)
        if room < 1 or len(hay) < room:
            raise ConfigError(
                f"{count} passkeys of {words} words leave {room} of {length} tokens for the text, which has "
                f"{len(hay)}; use a longer text or length, or fewer or shorter passkeys"
            )
        start = draw(len(hay) - room + 1)
        depths = sorted(draw(room + 1) for _ in range(count))
        ids, last = list(begin), 0
        for depth, needle in zip(depths, hidden, strict=True):
            ids += hay[start + last : start + depth] + needle
            last = depth
        ids += hay[start + last : start + room]
        predicts: list[int] = []
        for part, counts in asked:
            if counts:
                predicts += range(len(ids) - 1, len(ids) + len(part) - 1)
            ids += part
        counted = torch.zeros(1, len(ids), dtype=torch.bool)
        counted[0, predicts] = True
        return Sample(torch.tensor([ids]), counted)

    while True:
        yield sample()


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def gates(
    model: nn.Module,
    samples: Iterable[Sample],
    *,
    steps: int = 60,
    sink: int = 8,
    window: int = 64,
    lr: float = 0.02,
    penalty: float = 0.05,
    initial: float = 1.0,
    progress: Callable[[int, int, float, float], None] | None = None,
) -> HeadScores:
    """Train the gates; high ones belong to heads that need the whole context.

    The loss is the mean over counted tokens of mean_d (h_full - h_mixed)², plus `penalty` times the mean
    gate. AdamW without weight decay; the rate goes up over the first fifth of the steps and down over the
    last, not below a tenth. Gates start at `initial` and are kept in [0, 1]. Nothing is drawn here.

    Args:
        model: a transformers decoder; its weights are frozen meanwhile, and it is given back as it was.
        samples: what to read, one a step, such as `passkeys(...)`.
        steps: how many; the paper has 2000.
        sink, window: what a head without the context sees; the paper trains with 64 and 256. The window has
            to be much shorter than the samples.
        lr: the rate.
        penalty: weight of the mean gate.
        initial: where gates start.
        progress: called as progress(step, steps, distance, mean gate) after each step.

    Returns:
        For each KV head its gate; NaN in layers without causal self-attention.

    Raises:
        UnsupportedModel: the model is no decoder, or its attention cannot be replaced.
        ConfigError: a value is not allowed, or there are fewer samples than steps.
    """
    if steps < 1 or sink < 0 or window < 1 or lr <= 0 or penalty < 0 or not 0.0 <= initial <= 1.0:
        raise ConfigError(
            "gates needs steps >= 1, sink >= 0, window >= 1, lr > 0, penalty >= 0 and initial in [0, 1]; got "
            f"{steps}, {sink}, {window}, {lr}, {penalty} and {initial}"
        )
    whole = decoder(model, "gates")
    device = next(model.parameters()).device
    with frozen(model), attach(model) as attachment:
        two = _TwoWays(whole.base_model, attachment, sink, window, initial, device)
        optimizer = torch.optim.AdamW(two.alphas.values(), lr=lr, weight_decay=0.0)
        ramp = max(1, steps // 5)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: min(1.0, max((n + 1) / ramp, 0.1), max((steps - n) / ramp, 0.1))
        )
        source = iter(samples)
        for step in range(steps):
            found = next(source, None)
            if found is None:
                raise ConfigError(f"samples ended after {step} of {steps} steps")
            distance = two.distance(found.ids.to(device), found.counted.to(device))
            mean = torch.cat(list(two.alphas.values())).abs().mean()
            optimizer.zero_grad()
            (distance + penalty * mean).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for alpha in two.alphas.values():
                    alpha.clamp_(0.0, 1.0)
            if progress is not None:
                progress(step + 1, steps, distance.item(), mean.item())
        values = two.gates.by_layer(two.alphas)
    return HeadScores(
        values,
        name="duo_gate",
        meaning="weight of full attention that is left when sinks and a window take over what they can",
        direction="higher: needs the whole context",
        level="kv",
    )


class _TwoWays:
    """A model run with full attention, and with every head mixed by its gate."""

    def __init__(
        self,
        body: nn.Module,
        attachment: Attachment,
        sink: int,
        window: int,
        initial: float,
        device: torch.device,
    ) -> None:
        self.body, self.attachment = body, attachment
        like = torch.zeros((), device=device)
        self.gates = Gates(attachment, sink, window, initial, like, type(body).__name__)
        self.alphas = self.gates.alphas
        self.outputs: dict[int, Tensor] = {}

    def full(self, call: Call) -> Tensor:
        """Handler: full attention, remembered."""
        output = call.proceed()
        if call.layer.index in self.alphas:
            self.outputs[call.layer.index] = output
        return output

    def mixed(self, call: Call) -> Tensor:
        """Handler: what was remembered, mixed with attention to sinks and the window."""
        if call.layer.index not in self.alphas:
            return call.proceed()
        return self.gates.mix(call, self.outputs.pop(call.layer.index))

    def hidden(self, ids: Tensor, handler: Callable[[Call], Tensor]) -> Tensor:
        """The last hidden states `(B, S, d)`."""
        with self.attachment.handling(handler):
            return self.body(input_ids=ids, use_cache=False).last_hidden_state

    def distance(self, ids: Tensor, counted: Tensor) -> Tensor:
        """How far the gates move the hidden states at the counted tokens."""
        if counted.shape != ids.shape or counted.dtype != torch.bool or not bool(counted.any()):
            raise ConfigError(
                f"counted must be bool of the shape of ids, {tuple(ids.shape)}, and true somewhere; got "
                f"{counted.dtype} {tuple(counted.shape)}"
            )
        with torch.no_grad():
            expected = self.hidden(ids, self.full)[counted].float()
        with torch.enable_grad():
            found = self.hidden(ids, self.mixed)[counted].float()
        return (found - expected).square().mean()
