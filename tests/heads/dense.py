"""Dense attention and the definitions of all measurements, with loops over all weights, for tests."""

import math

import numpy as np
import torch

# where the needle and the rows of the answer are, for both batch items
MARKS = {"needle": torch.tensor([[60, 75], [80, 81]]), "answer": torch.tensor([[150, 160], [155, 158]])}


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


def definition(name, weights, logits, allowed, out, where, x, kind):
    """What a measurement is, head by head: the mean over the (b, i) pairs or what the docstring says."""
    batch, heads, queries, keys = weights.shape
    offset = keys - queries
    found = []
    for h in range(heads):
        rows = []
        for b in range(batch):
            real = np.ones(keys, bool) if where is None else where[b].numpy()
            first = int(np.argmax(real))
            for r in range(queries):
                i, w = r + offset, weights[b, h, r]
                n = int(allowed[b, h, r].sum())
                if not real[i] or n < 2:
                    continue
                j = np.arange(keys)
                p = w / w.sum()
                entropy = -sum(a * math.log(a) for a in p if a > 0)
                if name == "sink" and i > first:
                    rows.append(w[first])
                elif name == "previous_token" and i > first:
                    rows.append(w[i - 1])
                elif name == "next_token" and i + 1 < keys:
                    rows.append(w[i + 1])
                elif name == "own_token":
                    rows.append(w[i])
                elif name == "window":
                    rows.append(w[abs(i - j) <= 64].sum())
                elif name == "distance":
                    rows.append((p * abs(i - j)).sum())
                elif name == "entropy":
                    rows.append(entropy)
                elif name == "normalized_entropy":
                    rows.append(entropy / math.log(n))
                elif name == "largest_logit":
                    rows.append(logits[b, h, r].max())
                elif name == "output_share":
                    norms = np.linalg.norm(out[b, :, r], axis=-1)
                    rows.append(norms[h] / norms.sum())
                elif name == "induction":
                    targets = [p + 1 for p in range(i) if x[b, p] == x[b, i]]
                    if targets:
                        rows.append(w[targets].sum())
                elif name == "retrieval":
                    if MARKS["answer"][b][0] <= i < MARKS["answer"][b][1]:
                        rows.append(w[slice(*MARKS["needle"][b].tolist())].sum())
                elif name == "duplicate_token":
                    targets = [p for p in range(i) if x[b, p] == x[b, i]]
                    if targets:
                        rows.append(w[targets].sum())
        if (
            not rows
            or (name == "next_token" and kind == "decoder")
            or (name == "retrieval" and kind == "encoder")
        ):
            found.append(math.nan)
        else:
            found.append(max(rows) if name == "largest_logit" else np.mean(rows))
    return found


def by_key(name, weights, allowed, where):
    """The measurements that go by key: from what each key receives."""
    batch, heads, queries, keys = weights.shape
    offset = keys - queries
    scores = {"found_sinks": [], "concentration": [], "future_influence": []}
    counted = np.zeros((batch, heads, queries), bool)
    for b in range(batch):
        real = np.ones(keys, bool) if where is None else where[b].numpy()
        counted[b] = (allowed[b].sum(-1) >= 2) & real[offset:]
    for h in range(heads):
        sinks_sum, sinks_count, ginis, influences = 0.0, 0, [], []
        for b in range(batch):
            rows = counted[b, h]
            watchers = (allowed[b, h] & rows[:, None]).sum(0)
            sink_keys = set()
            for g in range(heads):
                seen = allowed[b, g] & counted[b, g][:, None]
                many = seen.sum(0)
                enough = many >= min(64, max(1, counted[b, g].sum() // 2))
                with np.errstate(invalid="ignore", divide="ignore"):
                    received = (weights[b, g] * counted[b, g][:, None]).sum(0) / many
                sink_keys |= {j for j in range(keys) if enough[j] and received[j] >= 0.3}
            sinks_sum += weights[b, h][rows][:, sorted(sink_keys)].sum()
            sinks_count += rows.sum()
            total = weights[b, h][rows].sum(0)
            enough = watchers >= min(64, max(1, rows.sum() // 2))
            values = sorted(total[j] / watchers[j] for j in range(keys) if enough[j])
            if values and sum(values) > 0:
                n = len(values)
                ginis.append(
                    sum(abs(a - c) for a in values for c in values) / (2 * n * sum(values))
                )  # mean absolute difference: the other spelling of Gini's coefficient
            for s in range(keys):
                later = [t for t in range(queries) if rows[t] and 10 <= t + offset - s <= 50]
                if later:
                    influences.append(weights[b, h, later, s].mean())
        scores["found_sinks"].append(sinks_sum / sinks_count if sinks_count else math.nan)
        scores["concentration"].append(np.mean(ginis) if ginis else math.nan)
        scores["future_influence"].append(np.mean(influences) if influences else math.nan)
    return scores[name]
