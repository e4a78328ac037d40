"""Spans found by triangles in SmolLM2: a number in a text of 1,900 tokens, read by spans, pieces and windows.

The small check of paper 082. A text with a number in it is read, then a question with its answer in one
call; every layer reads 4 first tokens, the 256 before a block of 64 queries and 256 tokens of spans, which
are found in chunks of 64 by triangles, or are pieces of 32 tokens, each with the vector that later tokens
vote for or with its mean key. Besides: the first tokens and a window alone, of 256 and of 512 tokens.
Measured are the log-probability of the answer, a token; in which share of the layers the call of the
question reads the whole number; and of all that lies before the window of that call, the share that is
read. Of the dense model's maps it is asked whether spans begin where sentences and lines do: the share of
such tokens among those at which a span begins within its chunk, over their share of all tokens within
chunks, mean over layers.
"""

from __future__ import annotations

import torch
from _shared import main
from torch import Tensor

import polyhead as ph
from polyhead.attend.masks import densify
from polyhead.attend.selectors import Selector
from polyhead.hf import Call, attach, load
from polyhead.tasks import held_out_text

TOKENS, CHUNK, WINDOW, BUDGET = 1900, 64, 256, 256
TEXTS = 1
NAMES = ("Vienna", "Lagos", "Lima", "Oslo", "Cairo", "Quito", "Dakar", "Turin", "Perth", "Hanoi", "Tunis")


def spans(votes: bool, pieces: bool) -> Selector:
    """By triangles, or all of 32 tokens: no weight is above 1."""
    how = {"threshold": 1.0, "longest": 32} if pieces else {}
    return ph.triangle_spans(BUDGET, WINDOW, chunk=CHUNK, votes=votes, rows=64, **how)


ARMS: dict[str, Selector | None] = {
    "dense": None,
    "triangles, votes": spans(True, False),
    "triangles, means": spans(False, False),
    "pieces, votes": spans(True, True),
    "pieces, means": spans(False, True),
    "window 256": ph.fixed(ph.sink(4) | ph.window(256 + 63), rows=64, cols=1),
    "window 512": ph.fixed(ph.sink(4) | ph.window(512 + 63), rows=64, cols=1),
}


def encoded(text: str) -> list[int]:
    """Its tokens, and no others."""
    return list(TOKENIZER(text, add_special_tokens=False, verbose=False)["input_ids"])


class Watch:
    """In which share of the layers the question reads a place, and how much of what lies far back."""

    def __init__(self, place: slice) -> None:
        self.place, self.hits, self.shares = place, [], []

    def __call__(self, call: Call) -> Tensor:
        queries = call.q.shape[2]
        if queries < 200 and call.mask is not None:
            sizes = {"batch": 1, "heads": call.layer.heads, "queries": queries, "keys": TOKENS + queries}
            read = densify(call.mask, **sizes)[0, 0, -1]
            self.hits.append(float(bool(read[self.place].all())))
            self.shares.append(float(read[4 : TOKENS - WINDOW].float().mean()))
        return call.proceed()


class Borders:
    """How often spans begin where sentences and lines do, over chance."""

    def __init__(self, ids: Tensor) -> None:
        words = [TOKENIZER.decode([one]) for one in ids.tolist()]
        ends = ["\n" in word or word.rstrip().endswith((".", "!", "?", ":")) for word in words]
        self.begins = torch.tensor([False, *ends[:-1]])
        self.lifts: list[float] = []
        self.lengths: list[float] = []

    def __call__(self, call: Call) -> Tensor:
        if call.q.shape[2] == TOKENS:
            own = spans(True, False).begin()
            own.see(call.q, call.k, call.mask, call.scale)  # type: ignore[arg-type]
            index = own.index  # type: ignore[attr-defined]
            starts = index.starts[0]
            self.lengths.append(float((index.stops[0] - starts).float().mean()))
            within = torch.arange(len(starts) and int(index.stops.max()))
            chance = self.begins[within[within % CHUNK > 0]].float().mean()
            self.lifts.append(float(self.begins[starts[starts % CHUNK > 0]].float().mean() / chance))
        return call.proceed()


@torch.no_grad()
def run(seed: int) -> dict[str, float]:
    """Other texts for every seed."""
    draw = torch.Generator().manual_seed(seed)

    def up_to(end: int) -> int:
        return int(torch.randint(end, (), generator=draw))

    hay = encoded(held_out_text())
    numbers: dict[str, float] = {}

    def count(name: str, value: float) -> None:
        numbers[name] = numbers.get(name, 0.0) + value / TEXTS

    for _ in range(TEXTS):
        name, number = NAMES[up_to(len(NAMES))], 10000 + up_to(90000)
        before = encoded(f"\nThe special magic number for {name} is")
        answer = encoded(f" {number}")
        fact = [*before, *answer, *encoded(".\n")]
        start, depth = up_to(len(hay) - TOKENS), 100 + up_to(1200)
        own = hay[start : start + TOKENS - len(fact)]
        text = torch.tensor([own[:depth] + fact + own[depth:]])
        place = slice(depth + len(before), depth + len(before) + len(answer))
        asked = encoded(
            f"\nWhat is the special magic number for {name}? The special magic number for {name} is"
        )
        tail = torch.tensor([asked + answer[:-1]])
        for arm, selector in ARMS.items():
            watch = Borders(text[0]) if selector is None else Watch(place)
            with attach(MODEL, handler=watch), ph.sparse(MODEL, {} if selector is None else selector):
                past = MODEL(text, use_cache=True, logits_to_keep=1).past_key_values
                out = MODEL(tail, past_key_values=past).logits[0, -len(answer) :].log_softmax(-1)
            said = out.gather(-1, torch.tensor(answer)[:, None])
            count(f"{arm}: log p", float(said.mean()))
            count(f"{arm}: right", float(bool((out.argmax(-1) == torch.tensor(answer)).all())))
            if isinstance(watch, Watch):
                count(f"{arm}: number read", sum(watch.hits) / len(watch.hits))
                count(f"{arm}: far tokens read", sum(watch.shares) / len(watch.shares))
            else:
                count("tokens of a span", sum(watch.lengths) / len(watch.lengths))
                count("spans begin with sentences, over chance", sum(watch.lifts) / len(watch.lifts))
    return numbers


if __name__ == "__main__":
    MODEL, TOKENIZER = load("smollm2")
    main(
        __doc__,
        run,
        {
            f"{a} less {b}: {what}": (f"{a}: {what}", f"{b}: {what}")
            for a, b in (
                ("triangles, votes", "pieces, votes"),
                ("triangles, means", "pieces, means"),
                ("triangles, votes", "triangles, means"),
                ("triangles, votes", "window 512"),
            )
            for what in ("log p", "number read")
        },
    )
