"""Dense attention from the equations, with all weights, for tests."""

import torch


def dense_attention(q, k, v, mask=None, score=None, normalizer=None):
    """Output, weights, logits after score maps (-inf at forbidden) and allowed pairs, as float64 numpy."""
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    repeat = heads // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    i = torch.arange(queries)[:, None] + keys - queries
    j = torch.arange(keys)
    logits = q @ k.transpose(-1, -2) / dim**0.5
    if score is not None:
        if type(score).__name__ == "SoftCap":
            cap = 2.0
            logits = cap * torch.tanh(logits / cap)
        else:  # ALiBi of a power of two of heads: slopes 2^(-8h/H), on -|i - j|
            slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]).double()
            logits = logits - slopes[:, None, None] * (i - j).abs()
    allowed = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if mask is not None:
        b, h = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(heads).view(-1, 1, 1)
        allowed = allowed & mask.allowed(b, h, i, j)
    logits = logits.masked_fill(~allowed, float("-inf"))
    if type(normalizer).__name__ == "Sigmoid":
        weights = 1 / (1 + torch.exp(-(logits + normalizer.bias)))
    else:
        powers = logits.exp()
        bottom = powers.sum(-1, keepdim=True)
        if normalizer is not None:
            bottom = bottom + normalizer.sink.view(-1, 1, 1).exp()
        weights = torch.where(bottom > 0, powers / bottom, 0.0)
    out = weights @ v
    return tuple(x.numpy() for x in (out, weights, logits, allowed))
