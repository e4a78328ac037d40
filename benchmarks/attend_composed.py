"""Dynamically composed heads with gradient, 4096 tokens, 8 heads of 64, against the dense form by einsum.

The gate: the same output and gradients, those of everything that the tokens choose among them. The dense form
evaluates the low ranks (2) as such, and holds logits and weights as tensors 8 x 4096 x 4096. Peak memory is
that of a process of its own for each. Causal only: the dense form takes half a minute with gradient.
"""

import sys

import torch
from _against_dense import against_dense
from _harness import arguments, begin, save

import polyhead as ph
from polyhead.attend.across_heads import TokenMix, dynamic_head_mix

HEADS, LENGTH, WIDTH, RANK = 8, 4096, 64, 2


def operands(device, length):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(1, HEADS, length, *shape, generator=generator)

    made = [draw(WIDTH) for _ in range(3)]
    for _ in range(2):  # the logits, the weights
        made.append(0.1 * torch.randn(HEADS, HEADS, generator=generator))
        for _ in range(2):  # of queries, of keys
            made += [0.3 * draw(RANK), 0.3 * draw(RANK), 0.3 * draw()]
    return [x.to(device).requires_grad_() for x in made]


def _composed(x, base, q_read, q_write, q_gate, k_read, k_write, k_gate):
    low = torch.einsum("bgij,bgir->brij", x, q_read)
    made = x + torch.einsum("hg,bgij->bhij", base, x) + torch.einsum("brij,bhir->bhij", low, q_write)
    low = torch.einsum("bgij,bgjr->brij", x, k_read)
    made = made + torch.einsum("brij,bhjr->bhij", low, k_write)
    return made + x * q_gate[..., None] + x * k_gate[:, :, None]


def dense(causal):
    def call(q, k, v, *said):
        logits = _composed(torch.einsum("bhid,bhjd->bhij", q, k) * WIDTH**-0.5, *said[:7])
        if causal:
            i = torch.arange(q.shape[2], device=q.device)
            logits = logits.masked_fill(i > i[:, None], float("-inf"))
        return torch.einsum("bhij,bhjd->bhid", _composed(logits.softmax(-1), *said[7:]), v)

    return call


def _mix(base, *said):
    return dynamic_head_mix(base=base, queries=TokenMix(*said[:3]), keys=TokenMix(*said[3:]))


def polyhead(causal):
    mask = ph.causal() if causal else None
    return lambda q, k, v, *said: ph.attend(
        q, k, v, mask=mask, score=_mix(*said[:7]), weight_map=_mix(*said[7:])
    )


CALLS = {"dense": dense, "polyhead": polyhead}


def main() -> None:
    options = begin(arguments(__doc__, repeats=3))
    # the aims are for causal calls
    save(
        options,
        against_dense(
            options, sys.modules[__name__], length=LENGTH, forward=5.0, backward=3.0, masks=(True,)
        ),
    )


if __name__ == "__main__":
    main()
