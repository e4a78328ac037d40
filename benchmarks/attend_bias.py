"""A learned relative bias with gradient, 4096 tokens, 8 heads of 64, against SDPA with the bias as mask.

The gate: the same output and gradients, those of the bias among them. SDPA has to be given the bias as a
tensor 8 x 4096 x 4096, gathered from the table; on a CPU it then falls back to dense attention. Peak memory
is that of a process of its own for each.
"""

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from _harness import aim, arguments, begin, interleave, report, save

import polyhead as ph

LENGTH, REACH, AIM = 4096, 128, 3.0


def operands(device):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, 8, LENGTH, 64, generator=generator) for _ in range(3)]
    made.append(torch.randn(8, 2 * REACH + 1, generator=generator))
    return [x.to(device).requires_grad_() for x in made]


def sdpa(causal):
    def call(q, k, v, table):
        i = torch.arange(LENGTH, device=q.device)
        bias = table[:, REACH + (i - i[:, None]).clamp(-REACH, REACH)]
        if causal:
            bias = bias.masked_fill(i > i[:, None], float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])

    return call


def polyhead(causal):
    mask = ph.causal() if causal else None
    return lambda q, k, v, table: ph.attend(q, k, v, mask=mask, score=ph.relative_bias(table))


CALLS = {"SDPA": sdpa, "polyhead": polyhead}


def trained(call, leaves, up):
    return torch.autograd.grad(call(*leaves), leaves, up)


def peak(name):
    """MiB that forward and backward need on top of the operands, in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        "import torch, attend_bias as a, _harness as h\n"
        "x = a.operands('cpu'); up = torch.ones(1, 8, a.LENGTH, 64)\n"
        "before = h.peak()\n"
        f"a.trained(a.CALLS[{name!r}](True), x, up)\n"
        "print((h.peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    options = begin(arguments(__doc__, repeats=5))
    leaves = operands(options.device)
    up = torch.randn(1, 8, LENGTH, 64, generator=torch.Generator().manual_seed(1)).to(options.device)
    results = []
    for causal in (False, True):
        calls = {name: make(causal) for name, make in CALLS.items()}
        grads = [trained(call, leaves, up) for call in calls.values()]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
        for title, way in (
            ("forward", lambda c: c(*leaves)),
            ("forward and backward", lambda c: trained(c, leaves, up)),
        ):
            ways = {name: lambda c=call, w=way: w(c) for name, call in calls.items()}
            result = report(
                f"{'causal' if causal else 'both directions'}, {title}",
                interleave(ways, options.repeats, device=options.device),
                "SDPA",
            )
            aim("polyhead", result["ratio"]["polyhead"], AIM)
            results.append(result)
    if options.device == "cpu":
        mib = {name: peak(name) for name in CALLS}
        print("\npeak memory of forward and backward, causal, above the operands")
        for name, value in mib.items():
            print(f"  {name:8}  {value:7.0f} MiB")
        results.append({"title": "peak memory, causal, forward and backward", "mib": mib})
    save(options, results)


if __name__ == "__main__":
    main()
