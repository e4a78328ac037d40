"""Interleaved heads with gradient, 4096 tokens, 4 heads of 64, 2 pseudo-tokens each, against the dense form.

The gate: the same output and gradients, those of the mixtures among them. The dense form holds logits and
weights as tensors 4 x 8192 x 8192. Peak memory is that of a process of its own for each.
"""

import subprocess
import sys
from pathlib import Path

import torch
from _harness import aim, arguments, begin, interleave, report, save

import polyhead as ph

HEADS, LENGTH, WIDTH, PSEUDO = 4, 4096, 64, 2
FORWARD, TRAINED = 5.0, 3.0  # aims


def built(device, order):
    torch.manual_seed(0)
    dim = HEADS * WIDTH
    return ph.build("interleaved_heads", dim=dim, heads=HEADS, pseudo=PSEUDO, order=order, device=device)


def dense(module):
    """The same module by einsum over all virtual pairs."""

    def call(x):
        q, (k, v) = module.projection.queries(x), module.projection.keys_values(x)
        mixes = (module.query_mix, module.key_mix, module.value_mix)
        q, k, v = (
            torch.einsum("phm,bmld->bhlpd", mix.weight, z).flatten(2, 3)
            for mix, z in zip(mixes, (q, k, v), strict=True)
        )
        i = torch.arange(q.shape[2], device=x.device)
        i = i if module.ordered else i // PSEUDO
        logits = torch.einsum("bhid,bhjd->bhij", q, k) * WIDTH**-0.5
        weights = logits.masked_fill(i > i[:, None], float("-inf")).softmax(-1)
        y = torch.einsum("bhij,bhjd->bhid", weights, v).unflatten(2, (-1, PSEUDO))
        return module.output(torch.einsum("hp,bhlpd->bhld", module.collapse.weight, y))

    return call


def polyhead(module):
    return lambda x: module(x, mask=ph.causal())


CALLS = {"dense": dense, "polyhead": polyhead}


def inputs(device, length=LENGTH):
    return torch.randn(1, length, HEADS * WIDTH, generator=torch.Generator().manual_seed(1)).to(device)


def trained(call, module, x, up):
    return torch.autograd.grad(call(x), [x, *module.parameters()], up)


def peak(name, length):
    """MiB that forward and backward need on top of the module, in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        "import torch, interleaved_heads as a, _harness as h\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"x = a.inputs('cpu', {length}).requires_grad_(); up = torch.ones_like(x)\n"
        "module = a.built('cpu', 'token')\n"
        "before = h.peak()\n"
        f"a.trained(a.CALLS[{name!r}](module), module, x, up)\n"
        "print((h.peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    options = begin(arguments(__doc__, repeats=3))
    x = inputs(options.device).requires_grad_()
    up = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(options.device)
    results = []
    for order in ("token", "flat"):
        module = built(options.device, order)
        calls = {name: make(module) for name, make in CALLS.items()}
        grads = [trained(call, module, x, up) for call in calls.values()]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * b.abs().max().item())
        del grads, a, b

        def forward(call):
            with torch.no_grad():
                return call(x)

        for title, way, least in (
            ("forward", forward, FORWARD),
            ("forward and backward", lambda c, m=module: trained(c, m, x, up), TRAINED),
        ):
            ways = {name: lambda c=call, w=way: w(c) for name, call in calls.items()}
            result = report(
                f"causal, order={order}, {title}",
                interleave(ways, options.repeats, device=options.device),
                "dense",
            )
            aim("polyhead", result["ratio"]["polyhead"], least)
            results.append(result)
    if options.device == "cpu":
        print("\npeak memory of forward and backward, order=token, above the module")
        for name, length in (("dense", LENGTH), ("polyhead", LENGTH), ("polyhead", 4 * LENGTH)):
            mib = peak(name, length)
            print(f"  {name:8}  {length:6} tokens  {mib:7.0f} MiB")
            results.append({"title": "peak memory", "way": name, "length": length, "mib": mib})
    save(options, results)


if __name__ == "__main__":
    main()
