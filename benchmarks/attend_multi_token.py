"""Multi-token attention with gradient, 4096 tokens, 8 heads of 64, against the dense form by conv2d.

The gate: the same output and gradients, those of both kernels and both mixtures of heads among them. The
dense form holds logits and weights as tensors 8 x 4096 x 4096, and pads and convolves them as such. Peak
memory is that of a process of its own for each. Causal only: it takes 20 s with gradient. One
repeat takes most of a minute.
"""

import sys

import torch
import torch.nn.functional as F
from _against_dense import against_dense
from _harness import arguments, begin, save

import polyhead as ph

HEADS, LENGTH, WIDTH, QUERIES, KEYS = 8, 4096, 64, 6, 11


def operands(device, length):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, HEADS, length, WIDTH, generator=generator) for _ in range(3)]
    for _ in range(2):  # the logits, the weights
        kernel = 0.05 * torch.randn(HEADS, QUERIES, KEYS, generator=generator)
        kernel[:, 0, KEYS // 2] += 1
        made += [kernel, torch.eye(HEADS) + 0.1 * torch.randn(HEADS, HEADS, generator=generator)]
    return [x.to(device).requires_grad_() for x in made]


def _around(x, kernel):
    padded = F.pad(x, (KEYS // 2, KEYS // 2, QUERIES - 1, 0))
    return F.conv2d(padded, kernel.flip(1)[:, None], groups=HEADS)


def dense(causal):
    def call(q, k, v, before, mix, after, mix_after):
        i = torch.arange(q.shape[2], device=q.device)
        hidden = (i > i[:, None]) & causal
        logits = torch.einsum("bhid,bhjd->bhij", q, k) * WIDTH**-0.5
        logits = torch.einsum("hg,bgij->bhij", mix, _around(logits.masked_fill(hidden, 0), before))
        weights = _around(logits.masked_fill(hidden, float("-inf")).softmax(-1), after).masked_fill(hidden, 0)
        return torch.einsum("bhij,bhjd->bhid", torch.einsum("hg,bgij->bhij", mix_after, weights), v)

    return call


def polyhead(causal):
    mask = ph.causal() if causal else None
    return lambda q, k, v, before, mix, after, mix_after: ph.attend(
        q,
        k,
        v,
        mask=mask,
        score=(ph.pair_convolution(before), ph.head_mix(mix)),
        weight_map=(ph.pair_convolution(after), ph.head_mix(mix_after)),
    )


CALLS = {"dense": dense, "polyhead": polyhead}


def main() -> None:
    options = begin(arguments(__doc__, repeats=1))
    # the aims are for causal calls
    save(
        options,
        against_dense(
            options, sys.modules[__name__], length=LENGTH, forward=5.0, backward=3.0, masks=(True,)
        ),
    )


if __name__ == "__main__":
    main()
