"""Talking heads with gradient, 4096 tokens, 8 heads of 64, against the dense form by einsum.

The gate: the same output and gradients, those of both matrices among them. The dense form holds logits and
weights as tensors 8 x 4096 x 4096. Peak memory is that of a process of its own for each.
"""

import sys

import torch
from _against_dense import against_dense
from _harness import arguments, begin, save

import polyhead as ph

HEADS, LENGTH, WIDTH = 8, 4096, 64


def operands(device, length):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, HEADS, length, WIDTH, generator=generator) for _ in range(3)]
    made += [torch.eye(HEADS) + 0.3 * torch.randn(HEADS, HEADS, generator=generator) for _ in range(2)]
    return [x.to(device).requires_grad_() for x in made]


def dense(causal):
    def call(q, k, v, before, after):
        logits = torch.einsum("bhid,bhjd->bhij", q, k) * WIDTH**-0.5
        logits = torch.einsum("hg,bgij->bhij", before, logits)
        if causal:
            i = torch.arange(q.shape[2], device=q.device)
            logits = logits.masked_fill(i > i[:, None], float("-inf"))
        weights = torch.einsum("hg,bgij->bhij", after, logits.softmax(-1))
        return torch.einsum("bhij,bhjd->bhid", weights, v)

    return call


def polyhead(causal):
    mask = ph.causal() if causal else None
    return lambda q, k, v, before, after: ph.attend(
        q, k, v, mask=mask, score=ph.head_mix(before), weight_map=ph.head_mix(after)
    )


CALLS = {"dense": dense, "polyhead": polyhead}


def main() -> None:
    options = begin(arguments(__doc__, repeats=5))
    # the aims are for causal calls
    save(options, against_dense(options, sys.modules[__name__], length=LENGTH, forward=5.0, backward=3.0))


if __name__ == "__main__":
    main()
