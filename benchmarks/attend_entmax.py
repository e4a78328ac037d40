"""Exact 1.5-entmax attention over 4096 tokens, 8 heads of 64: time and memory against the entmax package.

The yardstick is attention written with the package's exact `entmax15` on the dense scores. The gate: the same
output and gradients at 512 tokens. Peak memory is that of a process of its own for each.
"""

import subprocess
import sys
from pathlib import Path

import torch
from _harness import arguments, begin, interleave, report, save
from entmax import entmax15

import polyhead as ph

MASK, NORMALIZER = ph.causal(), ph.entmax(1.5)


def operands(length, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 8, length, 64, generator=generator).to(device).requires_grad_() for _ in range(3)]


def package(q, k, v):
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return entmax15((q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, float("-inf")), dim=-1) @ v


def polyhead(q, k, v):
    return ph.attend(q, k, v, mask=MASK, normalizer=NORMALIZER)


CALLS = {"entmax package": package, "polyhead": polyhead}


def trained(call, leaves):
    return torch.autograd.grad(call(*leaves).square().sum(), leaves)


def peak(name, length):
    """MiB that forward and backward need on top of the operands, in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, attend_entmax as a, _harness as h\n"
        f"x = a.operands({length}); a.trained(a.CALLS[{name!r}], a.operands(64))\n"
        "before = h.peak()\n"
        f"a.trained(a.CALLS[{name!r}], x)\n"
        "print((h.peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    options = begin(arguments(__doc__, repeats=3))
    small = operands(512, options.device)
    for a, b in zip(trained(package, small), trained(polyhead, small), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    results = []
    leaves = operands(4096, options.device)
    for title, way in (
        ("forward", lambda c: c(*(x.detach() for x in leaves))),
        ("forward and backward", lambda c: trained(c, leaves)),
    ):
        ways = {name: lambda c=call, w=way: w(c) for name, call in CALLS.items()}
        times = interleave(ways, options.repeats, device=options.device)
        results.append(report(f"causal 1.5-entmax attention, 4096 tokens, {title}", times, "entmax package"))
    if options.device == "cpu":
        print("\npeak memory of forward and backward, above the operands")
        rows = [("entmax package", 4096), ("polyhead", 4096), ("polyhead", 8192), ("polyhead", 16384)]
        mib = {f"{name}, {length} tokens": peak(name, length) for name, length in rows}
        for name, value in mib.items():
            print(f"  {name:28}  {value:7.0f} MiB")
        results.append({"title": "peak memory, forward and backward", "mib": mib})
    save(options, results)


if __name__ == "__main__":
    main()
