"""Facts hidden in a text and asked for one by one: what a cache is tried on.

A needle in a haystack, several at a time. Facts of different kinds stand at different depths of one text;
each is asked for in a continuation of its own, which starts from a copy of the same cache. The text, which is
long, is thus read once (`read`) for all its facts (`ask`). The answer is compared token by token with what
the model would say greedily: all its tokens are fed at once, and each must be the likeliest one after those
before it, which is the case if and only if greedy decoding from there gives just this answer.

Caches are tried on facts of `STOCK`. It has no name and no kind in common with what heads are chosen by:
facts of `CHOOSING`, and the needles of a profile (`polyhead.tasks.NAMES`, "the secret number of").
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyhead.cache.duo import Questions
from polyhead.errors import ConfigError
from polyhead.tasks import NAMES

__all__ = [
    "CHOOSING",
    "STOCK",
    "Asked",
    "Hidden",
    "Kind",
    "Stock",
    "answered",
    "ask",
    "hide",
    "questions",
    "read",
]


@dataclass(frozen=True)
class Kind:
    """A way to state a fact and to ask for it: "`begin` 48213`end`." `{name}` is filled in.

    The answer begins as the statement does.
    """

    begin: str
    end: str
    question: str


@dataclass(frozen=True)
class Stock:
    """What facts are made of."""

    kinds: tuple[Kind, ...]
    names: tuple[str, ...]


_CITIES = "Vienna Lagos Lima Oslo Cairo Quito Dakar Turin Perth Hanoi Tunis Kyoto"

STOCK = Stock(
    (
        Kind("The special magic number for {name} is", "", "What is the special magic number for {name}?"),
        Kind("The phone extension of {name} is", "", "What is the phone extension of {name}?"),
        Kind(
            "The password of the archive in {name} is", "", "What is the password of the archive in {name}?"
        ),
        Kind(
            "The museum in {name} keeps", " paintings", "How many paintings does the museum in {name} keep?"
        ),
        Kind("The postal code of {name} is", "", "What is the postal code of {name}?"),
        Kind(
            "The bridge near {name} has weight limit",
            "",
            "What weight limit does the bridge near {name} have?",
        ),
        Kind("The ticket to {name} costs", " crowns", "How many crowns does the ticket to {name} cost?"),
        Kind("The library of {name} owns", " books", "How many books does the library of {name} own?"),
    ),
    tuple(_CITIES.split()),
)
"""What caches are tried on."""

CHOOSING = Stock(
    (
        Kind("The choir of {name} has sung", " songs", "How many songs has the choir of {name} sung?"),
        Kind("The locker of {name} opens with", "", "What does the locker of {name} open with?"),
        Kind("The tower of {name} has", " steps", "How many steps does the tower of {name} have?"),
        Kind("The year in which {name} was founded is", "", "In which year was {name} founded?"),
        Kind("The account of {name} holds", " dollars", "How many dollars does the account of {name} hold?"),
        Kind("The farm of {name} sold", " apples", "How many apples did the farm of {name} sell?"),
        Kind("The license plate of {name} reads", "", "What does the license plate of {name} read?"),
        Kind("The distance to {name} is", " miles", "How many miles is the distance to {name}?"),
    ),
    NAMES,
)
"""What heads are chosen by."""


@dataclass(frozen=True)
class Asked:
    """One fact that is asked for.

    Attributes:
        statement: the fact, as it stands in the text.
        tail: tokens of the question and the answer, which follow the text.
        answer: how many of them, the last ones, are the answer that is looked for.
        place: first token of the fact in the text, and the one after its last.
    """

    statement: str
    tail: tuple[int, ...]
    answer: int
    place: tuple[int, int]


@dataclass(frozen=True)
class Hidden:
    """Token ids of a text, and the facts in it."""

    text: tuple[int, ...]
    asked: tuple[Asked, ...]


def hide(
    tokenizer: Any, source: Sequence[int], stock: Stock, *, length: int, count: int, unseen: int, seed: int
) -> Hidden:
    """Hide `count` facts in a text.

    Args:
        tokenizer: of the model; its chat template is used if it has one.
        source: token ids of a text, of which the beginning is used.
        stock: what the facts are made of.
        length: tokens of the text with the facts.
        count: number of facts, of as many kinds.
        unseen: tokens at the end of the text that hold no fact: what a head with this window, or a smaller
            one, sees when the question comes cannot help it.
        seed: for kinds, names, values and depths. Each fact has its own part of the text, in which its place
            is drawn.

    Raises:
        ConfigError: the source is too short, or the length leaves no room for the facts.
    """
    draw = random.Random(seed)
    kinds = draw.sample(stock.kinds, count)
    names = draw.sample(stock.names, count)
    values = draw.sample(range(10_000, 100_000), count)
    head, foot = _frame(tokenizer)
    facts = [
        f"{kind.begin} {value}{kind.end}.".format(name=name)
        for kind, name, value in zip(kinds, names, values, strict=True)
    ]
    stated = [_ids(tokenizer, " " + fact) for fact in facts]
    before = tokenizer(head, add_special_tokens=False)["input_ids"] if isinstance(head, str) else head
    room = length - len(before) - sum(map(len, stated))
    last = room - unseen
    if last < 8 * count:
        raise ConfigError(
            f"a text of {length} tokens has no room for {count} facts before its last {unseen} tokens; "
            "use a smaller window"
        )
    if len(source) < room:
        raise ConfigError(f"the text has {len(source)} tokens, {room} are needed to hide facts in")
    text, at, places = list(before), 0, []
    for k, cut in enumerate(_cuts(tokenizer, source, last, count, draw)):
        text += source[at:cut]
        places.append((len(text), len(text) + len(stated[k])))
        text += stated[k]
        at = cut
    text += source[at:room]
    asked = []
    for kind, name, value, fact, place in zip(kinds, names, values, facts, places, strict=True):
        lead = foot.format(question=kind.question.format(name=name)) + kind.begin.format(name=name)
        tail, answer = _answer(tokenizer, lead, f" {value}")
        asked.append(Asked(fact, tail, answer, place))
    return Hidden(tuple(text), tuple(asked))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _frame(tokenizer: Any) -> tuple[Any, str]:
    """What stands before the text, and between text and answer, with `{question}` in it."""
    mark = "\u2402"
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": f"{mark}\n\n{{question}}"}]
        told = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        head, found, foot = told.partition(mark)
        if found and foot.count("{") == 1:
            return head, foot
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    first = next((k for k, i in enumerate(ids) if i not in special), 0)
    return ids[:first], "\n\nQuestion: {question}\nAnswer: "


def _cuts(tokenizer: Any, source: Sequence[int], last: int, count: int, draw: random.Random) -> list[int]:
    """A place in each of `count` equal parts of the first `last` tokens, after a sentence where one ends."""
    cuts = []
    for k in range(count):
        start, stop = max(1, last * k // count), last * (k + 1) // count
        ends = [
            i
            for i in range(start, stop)
            if tokenizer.decode([source[i - 1]]).rstrip(" ").endswith((".", "\n"))
        ]
        cuts.append(draw.choice(ends or list(range(start, stop))))
    return cuts


def _answer(tokenizer: Any, lead: str, value: str) -> tuple[tuple[int, ...], int]:
    """The tokens of `lead + value`, and how many of them, at the end, `value` decides."""
    whole, without = _ids(tokenizer, lead + value), _ids(tokenizer, lead)
    same = 0
    while same < min(len(whole), len(without)) and whole[same] == without[same]:
        same += 1
    return tuple(whole), len(whole) - same


def answered(model: Any, hidden: Hidden, cache: Any) -> list[bool]:
    """Which of the facts the model finds again, with a fresh cache."""
    read(model, hidden, cache)
    return ask(model, hidden, cache)


def read(model: Any, hidden: Hidden, cache: Any) -> None:
    """Fill a fresh cache with the text."""
    text = torch.tensor([hidden.text], device=model.device)
    _body(model)(text, past_key_values=cache, use_cache=True)


def ask(model: Any, hidden: Hidden, cache: Any) -> list[bool]:
    """Which of the facts the model finds again, with a cache that holds the text; it is used up."""
    cache.batch_repeat_interleave(len(hidden.asked))
    rows, wanted = _rows(hidden, model.device)
    accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = sorted({p for at in wanted for p in at}) if accepts else list(range(rows.shape[1]))
    only = {"logits_to_keep": torch.tensor(kept, device=rows.device)} if accepts else {}
    said = model(rows, past_key_values=cache, **only).logits.argmax(-1)
    column = {p: k for k, p in enumerate(kept)}
    return [
        all(int(said[k, column[p]]) == one.tail[p + 1] for p in at)
        for k, (one, at) in enumerate(zip(hidden.asked, wanted, strict=True))
    ]


def questions(hidden: Hidden) -> Questions:
    """The text and its facts as `polyhead.cache.duo.gate_gradients` takes them."""
    rows, wanted = _rows(hidden, "cpu")
    answer = torch.zeros_like(rows, dtype=torch.bool)
    for k, at in enumerate(wanted):
        answer[k, [p + 1 for p in at]] = True
    return Questions(torch.tensor(hidden.text), rows, answer)


def _body(model: Any) -> Any:
    """The model without what turns its last layer into logits, which reading a text does not need."""
    return getattr(model, "base_model", model)


def _rows(hidden: Hidden, device: Any) -> tuple[Tensor, list[list[int]]]:
    """The tails as rows `(facts, n)`, and for each the positions whose logits predict the answer.

    Rows are filled up at the end, where nothing that is asked for can see it.
    """
    width = max(len(one.tail) for one in hidden.asked)
    rows = torch.tensor([one.tail + (one.tail[-1],) * (width - len(one.tail)) for one in hidden.asked])
    wanted = [list(range(len(one.tail) - one.answer - 1, len(one.tail) - 1)) for one in hidden.asked]
    return rows.to(device), wanted
