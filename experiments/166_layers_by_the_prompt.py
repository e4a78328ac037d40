"""Layers of SmolLM2 that read everything or little by the prompt: routers against one pattern for all.

The small check of paper 166. Two kinds of prompts of 256 tokens: a text that goes on (the next 24 tokens are
predicted), and a text with a number in it that is asked for (the answer is predicted). A sparse layer reads 4
sinks and a window of 32. First, by how much the loss of each kind rises when one layer alone is sparse, on
two prompts of each kind. For recall the 9 layers that lose least are to be sparse (0.3), for texts that go
on 27 (0.9). The routers, one a layer, learn by cross-entropy what they are to say, from the pooled queries of
8 prompts of each kind read in full; they are not trained on the loss of the model. The static pattern has as
many sparse layers in the mean, 18, the same for all prompts: those that lose least in the mean of both kinds.
Both are tried on 8 other prompts of each kind, with the decision of the prompt for the tokens behind it.
"""

from __future__ import annotations

import torch
from _shared import main
from torch import Tensor

from polyhead.hf import LayerRouters, layer_routers, load, routed_layers
from polyhead.tasks import held_out_text, sample_text

PROMPT, TAIL = 256, 24
HOW = {"sink": 4, "window": 32, "size": 16}
LAYERS = 30
SHARES = {"recall": 0.3, "text": 0.9}
NAMES = ("Vienna", "Lagos", "Lima", "Oslo", "Cairo", "Quito", "Dakar", "Turin", "Perth", "Hanoi", "Tunis")

Prompt = tuple[Tensor, Tensor]


def encoded(text: str) -> list[int]:
    """Its tokens, and no others."""
    return list(TOKENIZER(text, add_special_tokens=False, verbose=False)["input_ids"])


def prompts(kind: str, ids: list[int], count: int, draw: torch.Generator) -> list[Prompt]:
    """Prompts, and the tokens that follow them."""
    found = []
    for _ in range(count):
        start = int(torch.randint(len(ids) - PROMPT - TAIL, (), generator=draw))
        if kind == "text":
            own = ids[start : start + PROMPT + TAIL]
            found.append((torch.tensor([own[:PROMPT]]), torch.tensor([own[PROMPT:]])))
            continue
        name = NAMES[int(torch.randint(len(NAMES), (), generator=draw))]
        number = int(torch.randint(10000, 99999, (), generator=draw))
        fact = encoded(f"\nThe special magic number for {name} is {number}.\n")
        asked = encoded(
            f"\nWhat is the special magic number for {name}? The special magic number for {name} is"
        )
        room = PROMPT - len(fact) - len(asked)
        depth = int(torch.randint(20, room - 60, (), generator=draw))
        own = ids[start : start + depth] + fact + ids[start + depth : start + room] + asked
        found.append((torch.tensor([own]), torch.tensor([encoded(f" {number}")])))
    return found


def loss(prompt: Prompt) -> tuple[float, float]:
    """Mean -log p of what follows, and whether all of it is what the model would say."""
    ids, tail = prompt
    out = MODEL(ids, use_cache=True, logits_to_keep=1)
    more = MODEL(tail[:, :-1], past_key_values=out.past_key_values).logits
    logits = torch.cat([out.logits, more], 1)[0].log_softmax(-1)
    said = logits.gather(-1, tail[0, :, None])
    return -float(said.mean()), float(bool((logits.argmax(-1) == tail[0]).all()))


def fixed(sparse: set[int]) -> LayerRouters:
    """Routers that make these layers sparse, whatever they read."""
    routers = layer_routers(MODEL)
    for layer in sparse:
        router = routers.of(layer)
        assert router is not None
        router.last.bias.copy_(torch.tensor([1.0, 0.0]))
    return routers


def taught(examples: dict[str, list[Prompt]], sparse: dict[str, set[int]]) -> tuple[LayerRouters, float]:
    """Routers that have learned which layers are sparse for which kind, and how well."""
    routers = layer_routers(MODEL)
    pooled: dict[int, list[Tensor]] = {layer: [] for layer in range(LAYERS)}
    with routed_layers(MODEL, routers, **HOW) as routing:
        for kind in SHARES:
            for ids, _ in examples[kind]:
                MODEL(ids, use_cache=False, logits_to_keep=1)
                for layer in range(LAYERS):
                    pooled[layer].append(routing.pooled[layer])
    right = 0.0
    with torch.enable_grad():
        for layer in range(LAYERS):
            router = routers.of(layer)
            assert router is not None
            said = torch.tensor([int(layer not in sparse[k]) for k in SHARES for _ in examples[k]])
            steps = torch.optim.AdamW(router.parameters(), lr=3e-3)
            for _ in range(300):
                steps.zero_grad()
                torch.nn.functional.cross_entropy(router(torch.cat(pooled[layer])), said).backward()
                steps.step()
            right += float((router(torch.cat(pooled[layer])).argmax(-1) == said).float().mean()) / LAYERS
    return routers, right


@torch.no_grad()
def run(seed: int) -> dict[str, float]:
    """Other prompts for every seed."""
    draw = torch.Generator().manual_seed(seed)
    learn, held = encoded(sample_text()), encoded(held_out_text())
    rise = {}
    for kind in SHARES:
        own = prompts(kind, learn, 2, draw)
        before = [loss(prompt)[0] for prompt in own]
        rise[kind] = torch.zeros(LAYERS)
        for layer in range(LAYERS):
            with routed_layers(MODEL, fixed({layer}), **HOW):
                rise[kind][layer] = sum(loss(p)[0] - b for p, b in zip(own, before, strict=True)) / len(own)
    sparse = {
        kind: set(rise[kind].argsort()[: round(share * LAYERS)].tolist()) for kind, share in SHARES.items()
    }
    mean = round(sum(SHARES.values()) / 2 * LAYERS)
    static = set((rise["recall"] + rise["text"]).argsort()[:mean].tolist())
    ranks = torch.stack([rise[kind].argsort().argsort().float() for kind in SHARES])
    routers, learned = taught({kind: prompts(kind, learn, 8, draw) for kind in SHARES}, sparse)
    arms = {
        "full": fixed(set()),
        "routed": routers,
        "static": fixed(static),
        "all sparse": fixed(set(range(LAYERS))),
    }
    numbers = {
        "rise of one layer, recall": float(rise["recall"].mean()),
        "rise of one layer, text": float(rise["text"].mean()),
        "rank correlation of the rises": float(torch.corrcoef(ranks)[0, 1]),
        "decisions as taught, of prompts learned from": learned,
        "largest rise, recall": float(rise["recall"].max()),
        "layer of the largest rise, recall": float(rise["recall"].argmax()),
    }
    tried = {kind: prompts(kind, held, 8, draw) for kind in SHARES}
    right = 0
    for name, own in arms.items():
        for kind in SHARES:
            with routed_layers(MODEL, own, **HOW) as routing:
                found, shares = [], []
                for prompt in tried[kind]:
                    found.append(loss(prompt))
                    shares.append(float(routing.sparsity()))
                    if name == "routed":
                        right += sum(
                            bool(z) == (layer not in sparse[kind]) for layer, z in routing.decisions.items()
                        )
            numbers[f"{name}, {kind}: nats"] = sum(a for a, _ in found) / len(found)
            numbers[f"{name}, {kind}: sparsity"] = sum(shares) / len(shares)
            if kind == "recall":
                numbers[f"{name}, recall: right"] = sum(b for _, b in found) / len(found)
    numbers["decisions as taught"] = right / (len(SHARES) * 8 * LAYERS)
    return numbers


if __name__ == "__main__":
    MODEL, TOKENIZER = load("smollm2")
    main(
        __doc__,
        run,
        {
            f"routed less static, {kind}: {what}": (f"routed, {kind}: {what}", f"static, {kind}: {what}")
            for kind, what in (("recall", "nats"), ("recall", "right"), ("text", "nats"))
        },
        seeds=3,
    )
