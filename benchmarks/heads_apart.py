"""Heads that share the context out, over 8,192 tokens, 8 heads of 64, against SDPA causal.

A head reads four blocks of 64 near the query and every eighth of the others (S2-Attention): together they
read everything, each by itself a fifth. The gate: at a twelfth of the length, output and gradients are those
of the dense form.
"""

import torch
import torch.nn.functional as F
from _harness import aim, arguments, begin, interleave, report, save

import polyhead as ph

LENGTH, HEADS = 8192, 8
FASTER = 1.5
MASK = ph.causal() & ph.per_head([ph.halo(None, 64, 192) | ph.shard(64, HEADS, h) for h in range(HEADS)])


def main() -> None:
    options = begin(arguments(__doc__, repeats=5))
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(1, HEADS, LENGTH, 64, generator=generator).to(options.device).requires_grad_()
        for _ in range(3)
    ]
    up = torch.randn(1, HEADS, LENGTH, 64, generator=generator).to(options.device)
    calls = {
        "SDPA causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "by head": lambda q, k, v: ph.attend(q, k, v, mask=MASK),
    }

    def trained(call, tensors, grad):
        return torch.autograd.grad(call(*tensors), tensors, grad)

    short = [x.detach()[:, :, : LENGTH // 12].double().requires_grad_() for x in leaves]
    found = [
        trained(
            lambda *x, b=backend: ph.attend(*x, mask=MASK, backend=b),
            short,
            up[:, :, : LENGTH // 12].double(),
        )
        for backend in ("auto", "reference")
    ]
    for own, dense in zip(*found, strict=True):
        torch.testing.assert_close(own, dense)
    print(ph.explain(*leaves, mask=MASK).backend)

    def forward(call):
        with torch.no_grad():
            return call(*leaves)

    results = []
    for title, way in (("forward", forward), ("forward and backward", lambda c: trained(c, leaves, up))):
        ways = {name: lambda c=call, w=way: w(c) for name, call in calls.items()}
        result = report(title, interleave(ways, options.repeats, device=options.device), "SDPA causal")
        aim("by head", result["ratio"]["by head"], FASTER)
        results.append(result)
    save(options, results)


if __name__ == "__main__":
    main()
