"""Unread blocks stood for by their means: how near the output is to full attention, what a model loses.

The small check of paper 072. First the relative error of the output against full attention, without masks,
blocks of queries and keys by their mean product, a tenth, a quarter or half of them read: for random
sequences with a smooth (0.99) or a rough (0.5) course from token to token, 8 heads of 64 features, 1,024
tokens in blocks of 64; for queries, keys and values of MiniLM, 256 tokens in blocks of 16, all layers; and
of SmolLM2 in layers 4, 12, 20 and 28, 1,024 tokens in blocks of 64, where nothing hides the future. Ways:
what is read alone; its output times the share that it is told to have (IPAR); besides, means for what the
gate trusts (IPAR, GAPR), or for everything that is not read (always).

Then SmolLM2 as it is, causal: nats of the last 256 of 768 tokens of prose, and of the answers to passkeys,
with blocks of 64 queries by 32 keys, the first and the nearest among them; rectified with the gate, with
those always read told key by key (apart), and always. A seed draws sequences and stretches of text.
"""

from __future__ import annotations

from typing import Any

import torch
from _samples import prose_and_passkeys
from _shared import main
from torch import Tensor

import polyhead as ph
from polyhead.attend.selectors import Rectified, Selector, choose
from polyhead.cache import duo
from polyhead.cache.influence import loss_of
from polyhead.hf import Call, attach
from polyhead.tasks import held_out_text, sample_text

SHARES = (0.1, 0.25, 0.5)
LENGTH, LAST, LAYERS = 768, 256, (4, 12, 20, 28)

model, tokenizer = ph.hf.load("smollm2")
encoder, words = ph.hf.load("minilm")


def course(memory: float) -> Tensor:
    """Random sequences `(1, 8, 1024, 64)` in which a token is so much like the one before it."""
    steps = torch.randn(1, 8, 1024, 64)
    rows = [steps[:, :, 0]]
    for n in range(1, 1024):
        rows.append(memory * rows[-1] + (1 - memory**2) ** 0.5 * steps[:, :, n])
    return torch.stack(rows, 2)


@torch.no_grad()
def heard(of: Any, ids: Tensor, layers: tuple[int, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of layers while a model reads."""
    found = []

    def listen(call: Call) -> Tensor:
        if call.layer.index in layers:
            assert isinstance(call.k, Tensor)
            assert isinstance(call.v, Tensor)
            found.append((call.q.clone(), call.k.clone(), call.v.clone()))
        return call.proceed()

    with attach(of, handler=listen):
        getattr(of, "base_model", of)(ids)
    return found


@torch.no_grad()
def errors(x: tuple[Tensor, Tensor, Tensor], share: float, size: int) -> dict[str, float]:
    """By each way the relative error of the output, all heads together."""
    q, k, v = x
    full = ph.attend(q, k, v)
    inner = ph.select(ph.mean_keys(), ph.keep_share(share), rows=size, cols=size)
    plain = ph.attend(q, k, v, select=inner)
    gated, always = (ph.rectified(inner, gate=gate) for gate in (ph.gain_gate(), ph.open_gate()))
    assert isinstance(always, Rectified)
    scale = q.shape[-1] ** -0.5
    told, _ = always.estimate(q, k, v, None, choose(inner, q, k, None, scale), scale)
    ways = {
        "read alone": plain,
        "IPAR": told.repeat_interleave(size, 2)[:, :, : q.shape[2], None] * plain,
        "IPAR, GAPR": ph.attend(q, k, v, select=gated),
        "always": ph.attend(q, k, v, select=always),
    }
    return {way: float((out - full).norm() / full.norm()) for way, out in ways.items()}


def own(share: float) -> dict[str, Selector]:
    """Selectors for a causal model."""
    near = ph.sink(1) | ph.window(31)
    inner = ph.select(ph.mean_keys(), ph.keep_share(share), rows=64, cols=32, always=near)
    return {
        "read alone": inner,
        "IPAR, GAPR": ph.rectified(inner),
        "IPAR, GAPR, apart": ph.rectified(inner, apart=near),
        "always": ph.rectified(inner, gate=ph.open_gate()),
        "always, apart": ph.rectified(inner, gate=ph.open_gate(), apart=near),
    }


@torch.no_grad()
def nats(sample: duo.Sample, selector: Any) -> float:
    """Loss of the sample where it counts."""
    with ph.sparse(model, selector):
        return float(loss_of(model, *sample))


def run(seed: int) -> dict[str, float]:
    """One draw of everything."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    prose = torch.tensor(tokenizer(held_out_text(), verbose=False)["input_ids"])
    start = int(torch.randint(len(prose) - 1024, (), generator=draw))
    text = torch.tensor(words(sample_text(), verbose=False)["input_ids"])
    begin = int(torch.randint(len(text) - 256, (), generator=draw))
    given = {
        "smooth": ([tuple(course(0.99) for _ in range(3))], 64),
        "rough": ([tuple(course(0.5) for _ in range(3))], 64),
        "MiniLM": (heard(encoder, text[None, begin : begin + 256], tuple(range(6))), 16),
        "SmolLM2": (heard(model, prose[None, start : start + 1024], LAYERS), 64),
    }
    numbers: dict[str, float] = {}
    for what, (several, size) in given.items():
        for share in SHARES:
            found = [errors(x, share, size) for x in several]
            for way in found[0]:
                numbers[f"{what}, {share:.0%}, {way}"] = sum(one[way] for one in found) / len(found)
    asked = prose_and_passkeys(tokenizer, prose[start:], length=LENGTH, last=LAST, seed=seed)
    for what, one in asked.items():
        numbers[f"{what}, dense"] = nats(one, [None] * 30)
        for share in SHARES[:2]:
            for way, selector in own(share).items():
                numbers[f"{what}, {share:.0%}, {way}"] = nats(one, selector)
    return numbers


if __name__ == "__main__":
    pairs = {
        f"{what}, {share:.0%}: {way} less read alone": (
            f"{what}, {share:.0%}, {way}",
            f"{what}, {share:.0%}, read alone",
        )
        for what in ("smooth", "rough", "MiniLM", "SmolLM2", "prose", "passkeys")
        for share in (SHARES if what[0] not in "p" else SHARES[:2])
        for way in ("IPAR, GAPR", "always")
    }
    main(__doc__, run, pairs)
