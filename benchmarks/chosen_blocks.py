"""Chosen blocks over 16,384 tokens, 8 heads of 64, against SDPA causal: a tenth of the blocks read, and all.

Blocks are chosen by the means of their keys; the choice is part of the time. The gate: at a twelfth of the
length, the output and gradients are those of the dense form with the same choice.
"""

import torch
import torch.nn.functional as F
from _harness import aim, arguments, begin, interleave, report, save

import polyhead as ph

LENGTH, SHARE = 16_384, 0.1
FASTER, SLOWER = 5.0, 1 / 1.2


def selector(share: float) -> ph.Selector:
    return ph.select(ph.mean_keys(), ph.keep_share(share), rows=128, cols=64)


def main() -> None:
    options = begin(arguments(__doc__, repeats=5))
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(1, 8, LENGTH, 64, generator=generator).to(options.device).requires_grad_()
        for _ in range(3)
    ]
    up = torch.randn(1, 8, LENGTH, 64, generator=generator).to(options.device)
    calls = {
        "SDPA causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "a tenth": lambda q, k, v: ph.attend(q, k, v, mask=ph.causal(), select=selector(SHARE)),
        "everything": lambda q, k, v: ph.attend(q, k, v, mask=ph.causal(), select=selector(1.0)),
    }

    def trained(call, tensors, grad):
        return torch.autograd.grad(call(*tensors), tensors, grad)

    short = [x.detach()[:, :, :1366].double().requires_grad_() for x in leaves]
    found = [
        trained(
            lambda *x, b=backend: ph.attend(*x, mask=ph.causal(), select=selector(SHARE), backend=b),
            short,
            up[:, :, :1366].double(),
        )
        for backend in ("auto", "reference")
    ]
    for own, dense in zip(*found, strict=True):
        torch.testing.assert_close(own, dense)
    print(ph.explain(*leaves, mask=ph.causal(), select=selector(SHARE)))

    def forward(call):
        with torch.no_grad():
            return call(*leaves)

    results = []
    for title, way in (("forward", forward), ("forward and backward", lambda c: trained(c, leaves, up))):
        ways = {name: lambda c=call, w=way: w(c) for name, call in calls.items()}
        result = report(title, interleave(ways, options.repeats, device=options.device), "SDPA causal")
        aim("a tenth", result["ratio"]["a tenth"], FASTER)
        aim("everything", result["ratio"]["everything"], SLOWER)
        results.append(result)
    save(options, results)


if __name__ == "__main__":
    main()
