"""Plain causal and grouped attention, forward and backward, against torch's SDPA.

`attend` hands these calls to SDPA, so what is measured is the cost of deciding that. SDPA is called as one
would write it by hand: `is_causal` where lengths agree, no mask for one query at the end of a cache.
"""

import torch
import torch.nn.functional as F
from _harness import aim, arguments, begin, interleave, report, save

import polyhead as ph

CAUSAL = ph.causal()
AIM = 1 / 1.05


def operands(heads, kv_heads, queries, keys, dtype, device, grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, queries, 64), (1, kv_heads, keys, 64), (1, kv_heads, keys, 64))
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_(grad) for s in shapes]


def main() -> None:
    options = begin(arguments(__doc__, repeats=21))
    results, missed = [], []

    def compare(title, calls, repeats):
        torch.testing.assert_close(calls["polyhead"](), calls["SDPA"](), rtol=2e-2, atol=2e-2)
        result = report(title, interleave(calls, repeats, device=options.device), "SDPA")
        results.append(result)
        if not aim("polyhead", result["ratio"]["polyhead"], round(AIM, 3)):
            missed.append(title)

    for dtype in (torch.float32, torch.bfloat16):
        for kv_heads in (8, 2):
            for length in (256, 1024, 4096, 8192):
                repeats = max(5, min(options.repeats * 4, options.repeats * 2048 // length))
                title = f"causal, 8 heads on {kv_heads}, {length} x 64, {str(dtype)[6:]}"
                q, k, v = operands(8, kv_heads, length, length, dtype, options.device)
                grouped = kv_heads != 8

                def sdpa(q=q, k=k, v=v, grouped=grouped):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

                def ours(q=q, k=k, v=v):
                    return ph.attend(q, k, v, mask=CAUSAL)

                compare(f"{title}, forward", {"SDPA": sdpa, "polyhead": ours}, repeats)
                leaves = operands(8, kv_heads, length, length, dtype, options.device, grad=True)

                def trained(call, leaves=leaves):
                    return torch.autograd.grad(call(*leaves).float().sum(), leaves)[0]

                compare(
                    f"{title}, forward and backward",
                    {"SDPA": lambda t=trained, f=sdpa: t(f), "polyhead": lambda t=trained, f=ours: t(f)},
                    max(5, repeats // 2),
                )
            for keys in (1024, 8192):
                q, k, v = operands(8, kv_heads, 1, keys, dtype, options.device)
                grouped = kv_heads != 8
                compare(
                    f"one query on {keys} keys, 8 heads on {kv_heads}, {str(dtype)[6:]}",
                    {
                        "SDPA": lambda q=q, k=k, v=v, g=grouped: F.scaled_dot_product_attention(
                            q, k, v, enable_gqa=g
                        ),
                        "polyhead": lambda q=q, k=k, v=v: ph.attend(q, k, v, mask=CAUSAL),
                    },
                    options.repeats * 10,
                )
    print(
        f"\n{len(results) - len(missed)} of {len(results)} cases reach the aim"
        + "".join(f"\n  missed: {m}" for m in missed)
    )
    save(options, results)


if __name__ == "__main__":
    main()
