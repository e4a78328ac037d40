"""Which heads fetch facts out of the context: by attention mass on a needle, and by copying from it.

Both are measured on needles (`polyhead.tasks.needle`): a sentence hidden in a text, and a question that only
it can answer.

`retrieval_mass` is the cheap one: the answer is given, one forward pass a case. `copy_scores` is the
retrieval score of Wu et al.: the model answers by itself, and a head scores when it looks at the very token
that is said. In both the text is read with fast attention; only the rows that matter are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.head_scores import HeadScores
from polyhead.heads.inputs import Reader, Source, text_model
from polyhead.heads.measurement import RowMean, register
from polyhead.heads.rows import Rows, View
from polyhead.heads.watch import watch
from polyhead.tasks.generate import forward, greedy, left_padded
from polyhead.tasks.needle import NeedleCase, is_right, needle
from polyhead.tasks.reading import context_length, evaluating
from polyhead.tasks.texts import sample_text

__all__ = ["CopyScores", "Needles", "RetrievalMass", "copy_scores", "retrieval_mass", "retrieval_score"]


class Needles(Source):
    """Needles in the sample text, with their answers given.

    Attributes:
        length: tokens of a case. Default 512.
        depths: where the needles are; one case each.
    """

    title = "needles"

    length: int = 512
    depths: tuple[float, ...] = (0.1, 0.4, 0.7)

    @property
    def passes(self) -> int:
        return len(self.depths)

    def suits(self, model: nn.Module, tokenizer: Any, kinds: frozenset[str]) -> str:
        if kinds != {"decoder"} or not hasattr(model, "generate"):
            return "it is measured on questions, which only a causal language model can answer"
        if not getattr(tokenizer, "is_fast", False):
            return "it is measured on needles in a text, which need the model's (fast) tokenizer"
        limit = context_length(model)
        if limit is not None and limit < self.length:
            return f"it is measured on {self.length} tokens, and the model reads {limit}"
        return ""

    def read(self, reader: Reader) -> None:
        cases = needle(
            sample_text(), reader.tokenizer, lengths=(self.length,), depths=self.depths, seed=reader.seed
        )
        for case in cases:
            read_answered(reader, [case])


def read_answered(reader: Reader, cases: Sequence[NeedleCase]) -> None:
    """Have the model read some cases at once with their answers; watched from the question on.

    Marks: "needle" and "value", where they lie; "answer", the rows that an answer token is predicted from.
    """
    from transformers import DynamicCache

    body = text_model(reader.model)
    ids, padding = left_padded([c.ids + c.answer_ids[:-1] for c in cases], pad=0)
    ids = ids.to(reader.device)
    padding = None if padding is None else padding.to(reader.device)
    size = ids.shape[1]
    shifts = [size - len(c.ids) - len(c.answer_ids) + 1 for c in cases]
    tail = max(size - shift - c.question for c, shift in zip(cases, shifts, strict=True))
    marks = {
        "needle": [(c.needle[0] + s, c.needle[1] + s) for c, s in zip(cases, shifts, strict=True)],
        "value": [(c.value[0] + s, c.value[1] + s) for c, s in zip(cases, shifts, strict=True)],
        "answer": [(len(c.ids) - 1 + s, size) for c, s in zip(cases, shifts, strict=True)],
    }
    cache = DynamicCache(config=body.config)
    before = None if padding is None else padding[:, :-tail]
    forward(body, ids[:, :-tail], before, past_key_values=cache, use_cache=True)
    spans = {name: torch.tensor(span, device=reader.device) for name, span in marks.items()}
    with reader.watched(ids=ids, padding=padding, marks=spans):
        forward(body, ids[:, -tail:], padding, past_key_values=cache, use_cache=True)


@register
class RetrievalMass(RowMean):
    """mean_i sum_{j in needle} w_ij over the rows i that an answer token is predicted from, the answer given.

    Over needles in the sample text, each question answered by the number in its needle; w is the head's
    attention, so the score lies in [0, 1].
    """

    name = "retrieval"
    title = "retrieval (attention to the needle)"
    meaning = "mean attention to a fact hidden in a text, from the places where the model has to tell it"
    unit = "share"
    direction = "higher: fetches facts out of the context"
    paper = (
        "Wu et al. 2024, Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv 2404.15574"
    )
    kinds = frozenset({"decoder"})

    source: Needles = Needles()

    def of(self, rows: Rows) -> Tensor:
        on_needle = rows.within(rows.j, "needle").to(rows.weights.dtype)
        return torch.einsum("bhrc,bc->bhr", rows.weights, on_needle)

    def where(self, rows: Rows) -> Tensor:
        return rows.counted & rows.within(rows.i, "answer").unsqueeze(1)


def retrieval_mass(
    model: nn.Module,
    cases: Sequence[NeedleCase],
    *,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> HeadScores:
    """`RetrievalMass` on needles of one's own: mean attention to the needle from where the answer is told.

    Args:
        model: a causal language model of transformers.
        cases: what `polyhead.tasks.needle` made for its tokenizer.
        batch: cases read at once, padded on the left.
        progress: called as progress(done, total) in cases.
    """
    _some(cases, batch)
    measurement = RetrievalMass()
    with evaluating(model), watch(model) as watcher:
        gauges = [measurement.gauge(layer.heads) for layer in watcher.layers]
        reader = Reader(model, None, 0, lambda **told: watcher.on([[g] for g in gauges], **told))
        for start in range(0, len(cases), batch):
            read_answered(reader, cases[start : start + batch])
            if progress is not None:
                progress(min(start + batch, len(cases)), len(cases))
        layers = watcher.layers
    return HeadScores(
        tuple(g.result().cpu().numpy() for g in gauges),
        name=measurement.name,
        meaning=measurement.describe(),
        unit=measurement.unit,
        direction=measurement.direction,
        kv_groups=tuple(layer.heads // layer.kv_heads for layer in layers),
    )


@dataclass(frozen=True, eq=False)
class CopyScores:
    """What `copy_scores` found.

    Attributes:
        score: mean over the kept runs of the share of the answer's tokens that a head copied.
        frequency: share of the kept runs in which a head copied any.
        kept: number of runs that were answered right, which alone count.
        runs: number of all runs.
    """

    score: HeadScores
    frequency: HeadScores
    kept: int
    runs: int


def retrieval_score(
    model: nn.Module,
    tokenizer: Any,
    cases: Sequence[NeedleCase],
    *,
    top: int = 1,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> HeadScores:
    """Which share of the answer each head copies from where it looks: the score of `copy_scores`.

    Args:
        model, tokenizer, cases, top, batch, progress: as of `copy_scores`, defaults included.

    Returns:
        By layer and head a share, 0 to 1; NaN if no case was answered right.

    Raises:
        ConfigError: there are no cases, or `top` or `batch` is below 1.
    """
    return copy_scores(model, tokenizer, cases, top=top, batch=batch, progress=progress).score


def copy_scores(
    model: nn.Module,
    tokenizer: Any,
    cases: Sequence[NeedleCase],
    *,
    top: int = 1,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> CopyScores:
    """Retrieval score of Wu et al. 2024, arXiv 2404.15574: which share of the answer a head copies.

    The model answers greedily. At each step, the token w being said, a head copies w when one of the `top`
    positions that it looks at most lies in the needle and holds w. With g the set of tokens that it copied
    and k the set of the answer's tokens, its score in the run is |g & k| / |k|; the score is the mean over
    the runs that were answered right (`polyhead.tasks.is_right`), NaN without any. The paper's code counts
    twice what is copied twice; sets do not.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        cases: what `polyhead.tasks.needle` made for it.
        top: number of positions. Default 1, as in the paper.
        batch: cases read at once, padded on the left.
        progress: called as progress(done, total) in cases.

    Raises:
        ConfigError: there are no cases, or `top` or `batch` is below 1.
    """
    _some(cases, batch)
    if top < 1:
        raise ConfigError(f"top must be at least 1, got {top}")
    with evaluating(model), watch(model) as watcher:
        layers = watcher.layers
        gauges = [_Places(top) for _ in layers]
        sums = [torch.zeros(layer.heads, dtype=torch.float64) for layer in layers]
        active = [torch.zeros(layer.heads, dtype=torch.float64) for layer in layers]
        kept = 0
        for start in range(0, len(cases), batch):
            some = cases[start : start + batch]
            ids, padding = left_padded([c.ids for c in some], pad=0)
            for gauge in gauges:
                gauge.steps.clear()
            said = greedy(
                model,
                ids,
                steps=max(len(c.answer_ids) for c in some) + 2,
                padding=padding,
                around=watcher.on([[g] for g in gauges]),
            )
            for b, case in enumerate(some):
                if not is_right(tokenizer.decode(said[b], skip_special_tokens=True), case.answer):
                    continue
                kept += 1
                for layer, gauge in enumerate(gauges):
                    share = _copied(gauge.steps, said[b].cpu(), b, ids.shape[1] - len(case.ids), case)
                    sums[layer] += share
                    active[layer] += share > 0
            if progress is not None:
                progress(min(start + batch, len(cases)), len(cases))
    groups = tuple(layer.heads // layer.kv_heads for layer in layers)
    score = HeadScores(
        tuple((s / kept).numpy() for s in sums),
        "retrieval_score",
        "share of a hidden fact's tokens that the head copies while the model tells it",
        "share",
        "higher: copies facts out of the context",
        kv_groups=groups,
    )
    frequency = score.renamed(
        "retrieval_frequency",
        values=tuple((a / kept).numpy() for a in active),
        meaning="share of the right answers in which the head copies something of the fact",
    )
    return CopyScores(score, frequency, kept, len(cases))


def _copied(steps: Sequence[Tensor], said: Tensor, b: int, shift: int, case: NeedleCase) -> Tensor:
    """|g & k| / |k| of each head in one run, from the positions looked at, `(B, H, top)` for each step."""
    answer = set(case.answer_ids) & set(case.ids[case.needle[0] : case.needle[1]])
    tokens = torch.tensor(case.ids)
    share = torch.zeros(steps[0].shape[1], dtype=torch.float64)
    for word in sorted(answer):
        copied = torch.zeros(steps[0].shape[1], dtype=torch.bool)
        for step, places in enumerate(steps[: len(said)]):
            if int(said[step]) != word:
                continue
            at = places[b] - shift
            inside = (at >= case.needle[0]) & (at < case.needle[1])
            copied |= (inside & (tokens[at.clamp(0, len(tokens) - 1)] == word)).any(-1)
        share += copied.double() / len(answer)
    return share


class _Places:
    """Keeps the most attended positions of each decoding step, `(B, H, top)`, counted in tokens."""

    needs_logits = False

    def __init__(self, top: int) -> None:
        self.top = top
        self.steps: list[Tensor] = []

    def begin(self, view: View) -> None:
        self.view = view
        self.found = torch.full((view.batch, view.heads, self.top), -1, dtype=torch.int64, device=view.device)

    def take(self, rows: Rows) -> None:
        k = min(self.top, len(rows.j))
        places = rows.j[rows.weights[:, :, -1].topk(k, dim=-1).indices] + self.view.start
        self.found[rows.tile.batch_slice, rows.tile.head_slice, :k] = places

    def end(self, output: Tensor) -> None:
        self.steps.append(self.found.cpu())

    def result(self) -> Tensor:
        raise NotImplementedError


def _some(cases: Sequence[NeedleCase], batch: int) -> None:
    if not cases:
        raise ConfigError("retrieval is measured on needles; cases is empty")
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, got {batch}")
