"""Exact entmax of rows, 8 x 1024 x 1024 float32, against the entmax package.

The gate: weights and gradients of both agree to 1e-6 before anything is timed. Both are called out of place
on the same scores, which are rows of attention logits: standard normal times a scale (a larger one is
sparser), and half of them hidden by a causal mask in the last case.
"""

import math

import torch
from _harness import aim, arguments, begin, interleave, report, save
from entmax import entmax15, entmax_bisect, sparsemax

from polyhead.attend import entmax as rows

SHAPE = (8, 1024, 1024)
AIM = 8.0


def gate(scores: torch.Tensor) -> None:
    """Both give the same weights and gradients."""
    some = scores[:2, ::16]
    up = torch.randn_like(some)
    for name, mine, theirs in (
        ("entmax15", rows.entmax15, entmax15),
        ("sparsemax", rows.sparsemax, sparsemax),
        ("alpha 1.3", lambda z: rows.entmax(z, 1.3), lambda z: entmax_bisect(z, 1.3)),
    ):
        a, b = some.clone().requires_grad_(), some.double().requires_grad_()
        wa, wb = mine(a), theirs(b)
        wa.backward(up)
        wb.backward(up.double())
        for what, x, y in (("weights", wa, wb), ("gradients", a.grad, b.grad)):
            # a weight within rounding of the border of the support changes its row's gradient
            apart = (x.detach().double() - y.detach()).abs().amax(-1)
            apart = apart[((wa > 0) == (wb > 0)).all(-1)] if what == "gradients" else apart
            limit = 1e-6 if what == "weights" else 2e-5
            if not apart.max() <= limit:
                raise SystemExit(f"{name}: {what} differ by {apart.max():.1e}; nothing is timed")


def main() -> None:
    options = begin(arguments(__doc__, repeats=7))
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SHAPE, generator=generator).to(options.device)
    future = torch.ones(SHAPE[1:], dtype=torch.bool, device=options.device).triu(1)
    gate(normal)
    gate(3 * normal)
    results = []

    def compare(title, calls, yardstick, least=None):
        times = interleave(calls, options.repeats, device=options.device)
        result = report(title, times, yardstick)
        results.append(result)
        if least is not None:
            aim("polyhead", result["ratio"]["polyhead"], least)

    for title, z in (
        ("entmax 1.5, scale 1", normal),
        ("entmax 1.5, scale 3", 3 * normal),
        ("entmax 1.5, scale 1, causal", normal.masked_fill(future, -math.inf)),
    ):
        calls = {
            "entmax package": lambda z=z: entmax15(z, dim=-1),
            "polyhead": lambda z=z: rows.entmax15(z),
            "(torch softmax)": lambda z=z: torch.softmax(z, -1),
        }
        compare(title, calls, "entmax package", AIM)

    leaf = normal.clone().requires_grad_()
    up = torch.randn(SHAPE, generator=generator).to(options.device)

    def trained(function):
        return lambda: torch.autograd.grad(function(leaf), leaf, up)

    compare(
        "entmax 1.5, forward and backward",
        {
            "entmax package": trained(lambda z: entmax15(z, dim=-1)),
            "polyhead": trained(rows.entmax15),
            "(torch softmax)": trained(lambda z: torch.softmax(z, -1)),
        },
        "entmax package",
        AIM,
    )
    compare(
        "sparsemax",
        {"entmax package": lambda: sparsemax(normal, dim=-1), "polyhead": lambda: rows.sparsemax(normal)},
        "entmax package",
    )
    alpha = torch.linspace(1.1, 1.9, 8, device=options.device).view(8, 1, 1)
    compare(
        "one alpha a head, 1.1 to 1.9",
        {
            "entmax package": lambda: entmax_bisect(normal, alpha, dim=-1),
            "polyhead": lambda: rows.entmax(normal, alpha),
        },
        "entmax package",
    )
    save(options, results)


if __name__ == "__main__":
    main()
