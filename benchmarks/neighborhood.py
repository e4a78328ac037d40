"""Neighbourhoods over 64 x 64 tokens, 7 x 7 a window, 8 heads of 64, against SDPA with the mask; memory.

Besides: dilated, strided, over video, and the form that gathers every query's own keys. The gate: on a
smaller grid, output and gradients are those of the dense form. Peak memory of forward and backward is
measured at growing lengths, each in a process of its own, and its slope printed: 1 is O(L).
"""

import math
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from _harness import aim, arguments, begin, interleave, report, save

import polyhead as ph
from polyhead.attend.masks import densify

FASTER = 5.0
MASKS = {
    "7 x 7": ph.neighborhood((64, 64), 7),
    "7 x 7, every 8th": ph.neighborhood((64, 64), 7, dilation=8),
    "8 x 8 for 4 x 4 queries": ph.neighborhood((64, 64), 8, stride=4),
    "video, causal in time": ph.neighborhood((16, 16, 16), (4, 5, 5), causal=(True, False, False)),
}
SIDES = (128, 256, 384)


def operands(places: int, heads: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, places, 64, generator=generator).requires_grad_() for _ in range(3)]


def trained(call, tensors):
    return torch.autograd.grad(call(*tensors).sum(), tensors)


def each_its_own(mask: ph.Mask):
    """The unfused form: scores of every query with the keys that it sees, gathered for it alone."""
    keys = densify(mask, queries=mask.places, keys=mask.places)[0, 0].nonzero()[:, 1].view(mask.places, -1)

    def call(q, k, v):
        scores = torch.einsum("bhid,bhijd->bhij", q, k[:, :, keys]) / math.sqrt(q.shape[-1])
        return torch.einsum("bhij,bhijd->bhid", scores.softmax(-1), v[:, :, keys])

    return call


def held(side: int) -> float:
    """MiB that forward and backward of 2 heads hold at most, in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import neighborhood as n, _harness as h, polyhead as ph\n"
        f"mask = ph.neighborhood(({side}, {side}), 7); x = n.operands(mask.places, 2)\n"
        "n.trained(lambda *x: ph.attend(*x, mask=ph.neighborhood((8, 8), 7)), n.operands(64, 2))\n"
        "before = h.peak(); n.trained(lambda *x: ph.attend(*x, mask=mask), x)\n"
        "print((h.peak() - before) / 1024)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(found.stdout)


def main() -> None:
    options = begin(arguments(__doc__, repeats=5))
    short = [x.detach()[:, :, :300].double().requires_grad_() for x in operands(300)]
    for mask in (ph.neighborhood((20, 15), 7), ph.neighborhood((20, 15), (6, 5), dilation=3)):
        found = [
            (call(*short), *trained(call, short))
            for call in (
                *(lambda *x, m=mask, b=b: ph.attend(*x, mask=m, backend=b) for b in ("auto", "reference")),
                each_its_own(mask),
            )
        ]
        for own, dense, gathered in zip(*found, strict=True):
            torch.testing.assert_close(own, dense)
            torch.testing.assert_close(gathered, dense)

    results = []
    for name, mask in MASKS.items():
        x = operands(mask.places)
        table = densify(mask, queries=mask.places, keys=mask.places)
        calls = {
            "SDPA with the mask": lambda q, k, v, m=table: F.scaled_dot_product_attention(
                q, k, v, attn_mask=m
            ),
            "polyhead": lambda q, k, v, m=mask: ph.attend(q, k, v, mask=m),
        }

        def forward(call, x=x):
            with torch.no_grad():
                return call(*x)

        own = {"each its own keys": each_its_own(mask)} if not any(mask.causal) else {}
        for title, way, more in (
            (f"{name}: forward", forward, own),
            (f"{name}: forward and backward", lambda call, x=x: trained(call, x), {}),
        ):
            ways = {key: lambda c=call, w=way: w(c) for key, call in (calls | more).items()}
            result = report(title, interleave(ways, options.repeats), "SDPA with the mask")
            aim("polyhead", result["ratio"]["polyhead"], FASTER)
            results.append(result)

    print("\npeak memory of forward and backward, 2 heads of 64, 7 x 7")
    peaks = {side: held(side) for side in SIDES}
    for side, peak in peaks.items():
        print(f"  {side:3} x {side:3}  {peak:8.1f} MiB")
    low, high = SIDES[0], SIDES[-1]
    slope = math.log(peaks[high] / peaks[low]) / math.log((high / low) ** 2)
    print(f"  slope over the length: {slope:.2f} (1 is O(L), 2 is O(L²))")
    results.append(
        {"title": "peak memory, MiB", "sides": SIDES, "peaks": list(peaks.values()), "slope": slope}
    )
    save(options, results)


if __name__ == "__main__":
    main()
