"""HyperAttention in SmolLM2: what prose costs when the last layers read like keys and a sample of the others.

The small check of paper 160. The model reads 1,536 tokens; what is measured is the loss of the last 1,024.
The last 0, 5, 10, 20 and all 30 layers run as `hyper_attention` with blocks of 64 keys, 64 drawn keys, and
exact below 256 queries; with all of them besides without the sample, and with hashes of one bit, which
make blocks nearly those of the text. Of the dense model: alpha of every layer, the number of tokens times the
largest squared norm of a column of its weights (512 tokens, mean over heads), on which the paper's bound
depends. A seed draws the text and what is sampled.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from _shared import main
from torch import Tensor

import polyhead as ph
from polyhead.attend.function import weights_of
from polyhead.hf import Call, attach, load
from polyhead.tasks import held_out_text

LENGTH, COUNTED, LAYERS, SHORT = 1536, 1024, 30, 512
SIZES = {"block": 64, "samples": 64, "least": 256}

model, tokenizer = load("smollm2")


def nats(ids: Tensor, last: int, sizes: Mapping[str, int]) -> float:
    """Loss of the tokens that count, the last layers estimated."""

    def handler(call: Call) -> Tensor:
        if call.layer.index < LAYERS - last:
            return call.proceed()
        assert isinstance(call.k, Tensor)
        assert isinstance(call.v, Tensor)
        return ph.hyper_attention(call.q, call.k, call.v, causal=True, scale=call.scale, **sizes)

    with attach(model, handler=handler):
        logits = model(ids, use_cache=False, logits_to_keep=COUNTED + 1).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits.float(), ids[0, -COUNTED:]))


def alphas(ids: Tensor) -> list[float]:
    """alpha of every layer."""
    found: list[float] = []

    def look(call: Call) -> Tensor:
        assert isinstance(call.k, Tensor)
        weights = weights_of(call.q, call.k, mask=call.mask, scale=call.scale)[0]
        found.append(float((weights.square().sum(1).amax(-1) * weights.shape[1]).mean()))
        return call.proceed()

    with attach(model, handler=look):
        model(ids[:, :SHORT], use_cache=False, logits_to_keep=1)
    return found


@torch.no_grad()
def run(seed: int) -> dict[str, float]:
    """One text."""
    torch.manual_seed(seed)
    prose = torch.tensor(tokenizer(held_out_text(), verbose=False)["input_ids"])
    start = int(torch.randint(len(prose) - LENGTH, ()))
    ids = prose[None, start : start + LENGTH]
    numbers = {f"last {last} layers": nats(ids, last, SIZES) for last in (0, 5, 10, 20, 30)}
    numbers["all, no sample"] = nats(ids, LAYERS, SIZES | {"samples": 0})
    numbers["all, one bit"] = nats(ids, LAYERS, SIZES | {"bits": 1})
    own = torch.tensor(alphas(ids))
    numbers["alpha over tokens, least of the layers"] = float(own.min()) / SHORT
    numbers["alpha over tokens, median of the layers"] = float(own.median()) / SHORT
    numbers["alpha over tokens, most of the layers"] = float(own.max()) / SHORT
    return numbers


if __name__ == "__main__":
    main(
        __doc__,
        run,
        {
            f"last {last} layers less none": (f"last {last} layers", "last 0 layers")
            for last in (5, 10, 20, 30)
        }
        | {
            "all, no sample, less all": ("all, no sample", "last 30 layers"),
            "all, one bit, less all": ("all, one bit", "last 30 layers"),
        },
    )
