"""Enhanced interactive attention with gradient, 4096 tokens, 4 heads of 64, against the dense form.

The gate: the same output and gradients, those of the network among them. The dense form holds the products of
all pairs of heads, 16 x 4096 x 4096, and every layer of the network as a tensor. Peak memory is that of a
process of its own for each.
"""

import sys

import torch
from _against_dense import against_dense
from _harness import arguments, begin, save

import polyhead as ph
from polyhead.attend.across_heads import head_pairs

HEADS, LENGTH, WIDTH, INNER, ACROSS = 4, 4096, 64, 8, 16
FORWARD, TRAINED = 5.0, 3.0  # aims
NAMES = ("inner", "inner_bias", "last", "joint", "joint_bias", "across", "across_bias")


def operands(device, length):
    torch.manual_seed(0)
    made = [torch.randn(1, HEADS, length, WIDTH) for _ in range(3)]
    sizes = ((HEADS, INNER, HEADS), (HEADS, INNER), (HEADS, ACROSS), (HEADS, INNER), (HEADS,))
    made += [0.5 * torch.randn(size) for size in (*sizes, (ACROSS, HEADS), (ACROSS,))]
    return [t.to(device).requires_grad_() for t in made]


def dense(causal):
    """The definition over all pairs, with a matrix product for every layer."""

    def call(q, k, v, inner, inner_bias, last, joint, joint_bias, across, across_bias):
        length = q.shape[2]
        s = (q[0][:, None] * WIDTH**-0.5) @ k[0][None].mT  # H G L L
        z = torch.baddbmm(inner_bias[..., None], inner, s.flatten(2)).relu()  # H h L·L
        u = torch.baddbmm(joint_bias[:, None, None], joint[:, None], z)[:, 0]
        z = torch.addmm(across_bias[:, None], across, u).relu()
        logits = (last @ z).view(1, HEADS, length, length)
        if causal:
            i = torch.arange(length, device=q.device)
            logits = logits.masked_fill_(i > i[:, None], float("-inf"))
        return logits.softmax(-1) @ v

    return call


def polyhead(causal):
    mask = ph.causal() if causal else None

    def call(q, k, v, *network):
        score = head_pairs(q, k, **dict(zip(NAMES, network, strict=True)))
        return ph.attend(q[..., :1] * 0, k[..., :1] * 0, v, mask=mask, score=score)

    return call


CALLS = {"dense": dense, "polyhead": polyhead}


def main() -> None:
    options = begin(arguments(__doc__, repeats=2))
    results = against_dense(
        options,
        sys.modules[__name__],
        length=LENGTH,
        forward=FORWARD,
        backward=TRAINED,
        masks=(True,),
    )
    save(options, results)


if __name__ == "__main__":
    main()
