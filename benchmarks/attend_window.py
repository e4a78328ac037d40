"""A window of 256 keys over 8192 tokens, 8 heads of 64, against SDPA causal and the local-attention package.

The gate: the same window in both packages gives the same output and gradients. `local-attention` attends to
keys up to 256 back, so `window(256)`, 257 keys, is what both compute.
"""

import torch
import torch.nn.functional as F
from _harness import aim, arguments, begin, interleave, report, save
from local_attention import LocalAttention

import polyhead as ph

LENGTH, WINDOW, AIM = 8192, 256, 5.0


def main() -> None:
    options = begin(arguments(__doc__, repeats=7))
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(1, 8, LENGTH, 64, generator=generator).to(options.device).requires_grad_()
        for _ in range(3)
    ]
    local = LocalAttention(
        window_size=WINDOW,
        causal=True,
        look_backward=1,
        exact_windowsize=True,
        autopad=True,
        use_rotary_pos_emb=False,
        dim=64,
    )
    mask = ph.window(WINDOW)
    sinks = ph.causal() & (mask | ph.sink(4))
    up = torch.randn(1, 8, LENGTH, 64, generator=generator).to(options.device)
    calls = {
        "SDPA causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "local-attention": local,
        "polyhead": lambda q, k, v: ph.attend(q, k, v, mask=mask),
        "polyhead, 4 sinks": lambda q, k, v: ph.attend(q, k, v, mask=sinks),
    }

    def trained(call):
        return torch.autograd.grad(call(*leaves), leaves, up)

    for a, b in zip(trained(local), trained(calls["polyhead"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    print(ph.explain(*leaves, mask=mask))

    def forward(call):
        with torch.no_grad():
            return call(*leaves)

    results = []
    for title, way in (("forward", forward), ("forward and backward", trained)):
        ways = {name: lambda c=call, w=way: w(c) for name, call in calls.items()}
        times = interleave(ways, options.repeats, device=options.device)
        for yardstick in ("SDPA causal", "local-attention"):
            result = report(f"{title}, against {yardstick}", times, yardstick)
            aim("polyhead", result["ratio"]["polyhead"], AIM)
            results.append(result)
    save(options, results)


if __name__ == "__main__":
    main()
