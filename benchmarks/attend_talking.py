"""Talking heads with gradient, 4096 tokens, 8 heads of 64, against the dense form by einsum.

The gate: the same output and gradients, those of both matrices among them. The dense form holds logits and
weights as tensors 8 x 4096 x 4096. Peak memory is that of a process of its own for each.
"""

import subprocess
import sys
from pathlib import Path

import torch
from _harness import aim, arguments, begin, interleave, report, save

import polyhead as ph

HEADS, LENGTH, WIDTH = 8, 4096, 64
FORWARD, TRAINED = 5.0, 3.0  # aims


def operands(device, length=LENGTH):
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


def trained(call, leaves, up):
    return torch.autograd.grad(call(*leaves), leaves, up)


def peak(name, length):
    """MiB that forward and backward need on top of the operands, in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        "import torch, attend_talking as a, _harness as h\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"x = a.operands('cpu', {length}); up = torch.ones_like(x[0])\n"
        "before = h.peak()\n"
        f"a.trained(a.CALLS[{name!r}](True), x, up)\n"
        "print((h.peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    options = begin(arguments(__doc__, repeats=5))
    leaves = operands(options.device)
    up = torch.randn(1, HEADS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(options.device)
    results = []
    for causal in (False, True):
        calls = {name: make(causal) for name, make in CALLS.items()}
        grads = [trained(call, leaves, up) for call in calls.values()]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * b.abs().max().item())
        del grads, a, b

        def forward(call):
            with torch.no_grad():
                return call(*leaves)

        for title, way, least in (
            ("forward", forward, FORWARD),
            ("forward and backward", lambda c: trained(c, leaves, up), TRAINED),
        ):
            ways = {name: lambda c=call, w=way: w(c) for name, call in calls.items()}
            result = report(
                f"{'causal' if causal else 'both directions'}, {title}",
                interleave(ways, options.repeats, device=options.device),
                "dense",
            )
            if causal:
                aim("polyhead", result["ratio"]["polyhead"], least)
            results.append(result)
    if options.device == "cpu":
        print("\npeak memory of forward and backward, causal, above the operands")
        for name, length in (("dense", LENGTH), ("polyhead", LENGTH), ("polyhead", 4 * LENGTH)):
            mib = peak(name, length)
            print(f"  {name:8}  {length:6} tokens  {mib:7.0f} MiB")
            results.append({"title": "peak memory", "way": name, "length": length, "mib": mib})
    save(options, results)


if __name__ == "__main__":
    main()
