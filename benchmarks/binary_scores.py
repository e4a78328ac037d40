"""Scores of one-bit queries and keys, 4096 tokens, 8 heads of 64, against fp32 scores and SDPA.

The gate: every candidate gives the scores of the floats, the packed ones at a smaller size. The yardstick of
the scores is the fp32 product, in the strips of rows in which SDPA and Polyhead go; every candidate gives
float32 logits, scaled by the magnitudes of rows and columns. Whole calls are compared with SDPA, also with a
learned bias. The aim: scores in at most 0.8 of the time.
"""

import torch
from _harness import aim, arguments, begin, interleave, report, save

import polyhead as ph

HEADS, LENGTH, WIDTH, ROWS = 8, 4096, 64, 128
AIM = 1 / 0.8


def rows(length=LENGTH):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(HEADS, length, WIDTH, generator=generator) for _ in range(3))
    q, k = (x.abs().mean(-1, keepdim=True) * torch.where(x >= 0, 1.0, -1.0) for x in (q, k))
    return q, k, v


def parts(q, k):
    """Signs, magnitudes of rows with the scale in them, and of columns."""
    return q.sign(), k.sign(), q[..., :1].abs() * WIDTH**-0.5, k[..., :1].abs().transpose(1, 2)


def strips(length, work):
    for head in range(HEADS):
        for start in range(0, length, ROWS):
            work(head, slice(start, start + ROWS))


def floats(q, k, take):
    q, out = q * WIDTH**-0.5, torch.empty(ROWS, q.shape[1])

    def work(h, r):
        take(h, r, torch.mm(q[h, r], k[h].T, out=out))

    return lambda: strips(q.shape[1], work)


def integers(q, k, take):
    """int8 signs, exact int32 sums."""
    s, t, mu, nu = parts(q, k)
    s, t, out = s.to(torch.int8), t.to(torch.int8), torch.empty(ROWS, q.shape[1])
    sums = torch.empty_like(out, dtype=torch.int32)

    def work(h, r):
        torch._int_mm(s[h, r], t[h].T, out=sums)
        take(h, r, out.copy_(sums).mul_(mu[h, r]).mul_(nu[h]))

    return lambda: strips(q.shape[1], work)


def halves(q, k, take):
    """bfloat16 signs, whose sums are exact up to a width of 256."""
    s, t, mu, nu = parts(q, k)
    s, t, out = s.bfloat16(), t.bfloat16(), torch.empty(ROWS, q.shape[1])
    sums = torch.empty_like(out, dtype=torch.bfloat16)

    def work(h, r):
        torch.mm(s[h, r], t[h].T, out=sums)
        take(h, r, out.copy_(sums).mul_(mu[h, r]).mul_(nu[h]))

    return lambda: strips(q.shape[1], work)


def packed(q, k, take):
    """Words of 16 bits: xor, then the count of bits by a table of 2^16."""
    bits = 1 << torch.arange(16)
    s, t, mu, nu = parts(q, k)
    s, t = (((x > 0).long().unflatten(-1, (-1, 16)) * bits).sum(-1).to(torch.int32) for x in (s, t))
    out, words = torch.empty(ROWS, q.shape[1]), s.shape[-1]
    table = torch.tensor([n.bit_count() for n in range(1 << 16)], dtype=torch.float32)

    def work(h, r):
        out.zero_()
        for w in range(words):
            out.add_(table[s[h, r, w, None] ^ t[h, :, w]])
        take(h, r, out.mul_(-2).add_(WIDTH).mul_(mu[h, r]).mul_(nu[h]))

    return lambda: strips(q.shape[1], work)


def shifted(q, k, take):
    """Words of 64 bits: xor, then the count of bits by shifts, masks and one product."""
    s, t, mu, nu = parts(q, k)
    bits = 1 << torch.arange(64)
    s, t = (((x > 0).long() * bits).sum(-1) for x in (s, t))
    out = torch.empty(ROWS, q.shape[1])
    ones, twos, fours = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F

    def work(h, r):
        x = s[h, r, None] ^ t[h]
        x -= (x >> 1) & ones
        x = (x & twos) + ((x >> 2) & twos)
        x = (x + ((x >> 4) & fours)) & fours
        count = x.mul_(0x0101010101010101).bitwise_right_shift_(56).bitwise_and_(127)
        take(h, r, out.copy_(count).mul_(-2).add_(WIDTH).mul_(mu[h, r]).mul_(nu[h]))

    return lambda: strips(q.shape[1], work)


CANDIDATES = {
    "fp32 product": floats,
    "int8 product": integers,
    "bfloat16 product": halves,
    "xor, table of counts": packed,
    "xor, shifts and masks": shifted,
}


def nothing(head, rows, logits):
    """The logits are made, and not used."""


def check():
    q, k, _ = rows(2 * ROWS)
    want = q @ k.transpose(1, 2) * WIDTH**-0.5

    def same(head, rows, logits):
        torch.testing.assert_close(logits, want[head, rows], rtol=1e-5, atol=1e-5)

    for make in CANDIDATES.values():
        make(q, k, same)()


def main() -> None:
    options = begin(arguments(__doc__, repeats=5))
    if options.device != "cpu":
        raise SystemExit("this benchmark is about CPUs")
    check()
    q, k, v = rows()
    calls = {name: make(q, k, nothing) for name, make in CANDIDATES.items()}
    scores = report("scores alone", interleave(calls, options.repeats), "fp32 product")
    aim("int8 product, against the fp32 product,", scores["ratio"]["int8 product"], AIM)
    results = [scores]
    q, k, v = q[None], k[None], v[None]
    table = 0.02 * torch.randn(HEADS, 129, generator=torch.Generator().manual_seed(1))
    distance = (torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]).clamp(-64, 64) + 64
    bias = table[:, distance]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for title, score, dense in (
        ("whole calls", None, None),
        ("whole calls with a learned bias", ph.relative_bias(table), bias),
    ):
        ways = {
            "sdpa": lambda m=dense: sdpa(q, k, v, attn_mask=m),
            "polyhead, fp32": lambda s=score: ph.attend(q, k, v, score=s),
            "polyhead, signs": lambda s=score: ph.attend(q, k, v, score=s, backend="signs"),
        }
        made = [way() for way in ways.values()]
        for one in made[1:]:
            torch.testing.assert_close(one, made[0], rtol=1e-3, atol=1e-4)
        results.append(report(title, interleave(ways, options.repeats), "sdpa"))
    save(options, results)


if __name__ == "__main__":
    main()
