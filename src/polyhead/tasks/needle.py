"""Needles in a haystack: facts hidden in a text, and whether a model finds them again.

    cases = needle(sample_text(), tokenizer, lengths=(512, 1024), depths=(0.1, 0.5, 0.9), seed=1)
    score(model, tokenizer, cases).accuracy
    score(model, tokenizer, cases, lambda: ph.cache.per_head(model, full=heads)).accuracy

A needle says "The secret number of Ada is 48213." The question asks for it, and the answer is begun with
"The secret number of Ada is": what remains to be said is the number, which stands nowhere else. Names,
numbers, places in the text and the text's beginning are drawn from the seed; `NAMES` are for choosing by,
`HELD_OUT_NAMES` for testing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyhead.errors import ConfigError
from polyhead.tasks.generate import greedy
from polyhead.tasks.texts import sentences

__all__ = [
    "HELD_OUT_NAMES",
    "NAMES",
    "NeedleCase",
    "NeedleResult",
    "NeedleScore",
    "is_right",
    "needle",
    "score",
]

_CHOOSING = "Ada Boris Clara David Elena Felix Greta Hugo Irene Jonas Karen Louis Maria Nora Oscar Paula"
_TESTING = (
    "Albert Bella Conrad Dora Edgar Fiona George Helen Isaac Julia Kevin Laura Martin Nancy Oliver Peter"
)
NAMES = tuple(_CHOOSING.split())
HELD_OUT_NAMES = tuple(_TESTING.split())

_FACT = "The secret number of {key} is"
_QUESTION = "What is the secret number of {key}?"
_DIGITS = "123456789"


@dataclass(frozen=True)
class NeedleCase:
    """A text with a fact in it and a question about the fact.

    Attributes:
        ids: token ids of the whole prompt, up to where the model has to give the answer.
        needle: the needle's tokens in `ids`, from the first to one past the last.
        value: those of the number in the needle.
        question: where in `ids` the question begins: what follows the text.
        answer: the number, as it is to be said.
        answer_ids: its token ids, as the model would go on after `ids`.
        key: whose number is asked for.
        length: the length that was asked for; `ids` has at most so many tokens.
        depth: where the needle is in the text, 0: at the beginning, 1: at the end.
    """

    ids: tuple[int, ...]
    needle: tuple[int, int]
    value: tuple[int, int]
    question: int
    answer: str
    answer_ids: tuple[int, ...]
    key: str
    length: int
    depth: float


@dataclass(frozen=True)
class NeedleResult:
    """What a model made of one case.

    Attributes:
        case: what it was asked.
        text: what it answered.
        right: whether that is right: see `is_right`.
    """

    case: NeedleCase
    text: str
    right: bool


@dataclass(frozen=True)
class NeedleScore:
    """How a model answered; `accuracy` is the share of right answers, NaN without any.

    Attributes:
        results: one for each case.
    """

    results: tuple[NeedleResult, ...]

    @property
    def accuracy(self) -> float:
        return sum(r.right for r in self.results) / len(self.results) if self.results else float("nan")

    def __repr__(self) -> str:
        right = sum(r.right for r in self.results)
        return f"NeedleScore(accuracy={self.accuracy:.3g}, {right} of {len(self.results)} right)"


def needle(
    text: str,
    tokenizer: Any,
    *,
    lengths: Sequence[int] = (1024,),
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    seed: int = 0,
    n: int = 1,
    needles: int = 1,
    keys: Sequence[str] = NAMES,
) -> list[NeedleCase]:
    """Hide facts in a text.

    Args:
        text: the haystack; some of its sentences in a row, from a random one on, are used.
        tokenizer: the model's, a fast one. Its chat template is used if it has one.
        lengths: numbers of tokens of a prompt, question included; prompts are up to a sentence shorter.
        depths: where the needle goes, 0 to 1; it stands between two sentences.
        seed: decides names, numbers, the text's beginning and where the other needles stand.
        n: number of cases for each length and depth.
        needles: number of facts in a text, of different people; one of them is asked for.
        keys: names to draw from.

    Returns:
        `len(lengths) * len(depths) * n` cases.

    Raises:
        ConfigError: a value is out of range, or a length has no room for needle and question.
    """
    if not getattr(tokenizer, "is_fast", False):
        kind = type(tokenizer).__name__
        raise ConfigError(f"needle() needs a fast tokenizer, which knows where its tokens stand; got {kind}")
    if not lengths or not depths or n < 1:
        raise ConfigError(f"lengths, depths and n must give at least one case, got {lengths}, {depths}, {n}")
    if any(not 0 <= d <= 1 for d in depths):
        raise ConfigError(f"depths must lie in 0..1, got {tuple(depths)}")
    if not 1 <= needles <= len(set(keys)):
        raise ConfigError(
            f"needles must be between 1 and the number of keys, {len(set(keys))}; got {needles}"
        )
    hay = sentences(text)
    sizes = [len(ids) for ids in tokenizer([" " + s for s in hay], add_special_tokens=False)["input_ids"]]
    rng = random.Random(seed)
    return [
        _case(hay, sizes, tokenizer, length, depth, needles, keys, rng)
        for length in lengths
        for depth in depths
        for _ in range(n)
    ]


def _case(
    hay: list[str],
    sizes: list[int],
    tokenizer: Any,
    length: int,
    depth: float,
    needles: int,
    keys: Sequence[str],
    rng: random.Random,
) -> NeedleCase:
    people = rng.sample(sorted(set(keys)), needles)
    numbers = ["".join(rng.sample(_DIGITS, 5)) for _ in people]
    while len(set(numbers)) < needles:
        numbers = ["".join(rng.sample(_DIGITS, 5)) for _ in people]
    facts = [f"{_FACT.format(key=k)} {v}." for k, v in zip(people, numbers, strict=True)]
    begin = rng.randrange(len(hay))
    others = [rng.random() for _ in facts[1:]]
    room = length - len(_prompt(tokenizer, " ".join(facts), people[0])[0])
    count = used = 0
    while used + sizes[(begin + count) % len(hay)] <= room:
        used += sizes[(begin + count) % len(hay)]
        count += 1
    while True:  # tokens of a sentence are not quite additive: take away until it fits
        body = [hay[(begin + k) % len(hay)] for k in range(count)]
        places = sorted(
            ((round(d * count), fact) for d, fact in zip((depth, *others), facts, strict=True)), reverse=True
        )
        for place, fact in places:
            body.insert(place, fact)
        case = _written(tokenizer, " ".join(body), facts[0], people[0], numbers[0], length, depth)
        if len(case.ids) <= length:
            return case
        if count == 0:
            raise ConfigError(
                f"a length of {length} tokens has no room for {needles} needles and the question, "
                f"which take {len(case.ids)}"
            )
        count -= 1


def _prompt(tokenizer: Any, body: str, key: str) -> tuple[list[int], list[tuple[int, int]], str]:
    """Token ids, character spans and string of a whole prompt."""
    question, begun = _QUESTION.format(key=key), _FACT.format(key=key)
    message = f"{body}\n\n{question}"
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": message}]
        string = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + begun
        special = False  # the template writes them
    else:
        string, special = f"{message}\n{begun}", True
    found = tokenizer(string, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids, spans = list(found["input_ids"]), [tuple(s) for s in found["offset_mapping"]]
    while (
        special and ids and spans[-1] == (0, 0)
    ):  # what the tokenizer puts after a text would end the answer
        ids.pop()
        spans.pop()
    return ids, spans, string


def _written(
    tokenizer: Any, body: str, fact: str, key: str, number: str, length: int, depth: float
) -> NeedleCase:
    ids, spans, string = _prompt(tokenizer, body, key)
    at = string.index(fact)
    value = at + len(fact) - 1 - len(number)
    question = string.rindex(f"\n\n{_QUESTION.format(key=key)}")
    whole = tokenizer(string + " " + number, add_special_tokens=False)["input_ids"]
    begun = tokenizer(string, add_special_tokens=False)["input_ids"]
    return NeedleCase(
        ids=tuple(ids),
        needle=_tokens(spans, at, at + len(fact)),
        value=_tokens(spans, value, value + len(number)),
        question=_tokens(spans, question, len(string))[0],
        answer=number,
        answer_ids=tuple(whole[len(begun) :]),
        key=key,
        length=length,
        depth=depth,
    )


def _tokens(spans: list[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """The tokens that share a character with start..stop-1."""
    inside = [k for k, (a, b) in enumerate(spans) if a < stop and b > start]
    return inside[0], inside[-1] + 1


def is_right(text: str, answer: str) -> bool:
    """Whether a model's text is the answer: its first run of digits is the number, neither more nor less."""
    found = re.search(r"\d+", text)
    return found is not None and found.group() == answer


def score(
    model: nn.Module,
    tokenizer: Any,
    cases: Sequence[NeedleCase],
    cache_factory: Callable[[], Any] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> NeedleScore:
    """Have the model answer every case, greedily, one by one; see `is_right` for what counts.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        cases: what `needle` made.
        cache_factory: makes a fresh transformers `Cache` for each case. Default: the model's own.
        progress: called as progress(done, total).
    """
    results = []
    for done, case in enumerate(cases):
        cache = None if cache_factory is None else cache_factory()
        ids = torch.tensor([case.ids], dtype=torch.int64)
        # two tokens more than the answer has, to see whether the number goes on
        said = greedy(model, ids, steps=len(case.answer_ids) + 2, cache=cache)
        text = tokenizer.decode(said[0], skip_special_tokens=True)
        release = getattr(cache, "detach", None)  # a cache that acts through the model's attention
        if release is not None:
            release()
        results.append(NeedleResult(case, text, is_right(text, case.answer)))
        if progress is not None:
            progress(done + 1, len(cases))
    return NeedleScore(tuple(results))
