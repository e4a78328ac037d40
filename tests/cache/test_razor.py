"""RazorAttention: the compensation token against its definition, and the probe."""

import math

import pytest
import torch

from cache.tiny import left_padded, llama, tokens
from polyhead.attend.masks import causal, padding, window
from polyhead.attend.normalizers import softmax, sparsemax
from polyhead.attend.scores import soft_cap
from polyhead.cache import per_head, razor
from polyhead.cache.dropped import Dropped
from polyhead.cache.layer import PerHeadLayer
from polyhead.cache.step import Steps
from polyhead.errors import ConfigError, UnsupportedModel
from polyhead.heads.measurements.repeats import DuplicateToken, Induction
from polyhead.heads.watch import measure
from polyhead.hf import Call, LayerInfo

INFO = LayerInfo(0, "layers.0.attn", "decoder", heads=4, kv_heads=2, head_dim=8, cache_index=0)
CHUNKS = {"at once": [30], "one by one": [1] * 30, "chunks": [9, 1, 12, 1, 1, 6]}
SINK, WINDOW = 2, 5


def run(q, k, v, chunks, *, full=(False, False), dense=False, real=None, cap=None, logits=None, scale=0.5):
    """The answers of a layer with compensation, to tokens that come in chunks."""
    layer = PerHeadLayer(
        INFO, full, sink=SINK, windows=(WINDOW,) * len(full), dense=dense, compensate=True, steps=Steps()
    )
    answers, start = [], 0
    for count in chunks:
        stop = start + count
        keys, values = layer.update(k[:, :, start:stop], v[:, :, start:stop])
        mask = causal() if real is None else causal() & padding(real[:, :stop])
        call = Call(
            layer=INFO,
            q=q[:, :, start:stop],
            k=keys,
            v=values,
            mask=mask,
            score=None if cap is None else soft_cap(cap),
            normalizer=softmax() if logits is None else softmax(sink=logits),
            scale=scale,
        )
        answers.append(call.proceed())
        start = stop
    return torch.cat(answers, dim=2)


def naive(q, k, v, *, dropped_by, real=None, cap=None, logits=None, scale=0.5):
    """Row by row: what is seen, and one token for the N tokens that `dropped_by(row's tokens)` says."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                if real is not None and not real[b, i]:
                    continue
                past = [j for j in range(i + 1) if real is None or real[b, j]]
                gone = dropped_by(past)
                seen = [j for j in past if j not in gone]
                keys, values = k[b, g, seen], v[b, g, seen]
                extra = torch.zeros(len(seen), dtype=q.dtype)
                if gone:
                    keys = torch.cat([keys, k[b, g, gone].mean(0, keepdim=True)])
                    values = torch.cat([values, v[b, g, gone].mean(0, keepdim=True)])
                    extra = torch.cat([extra, torch.tensor([math.log(len(gone))], dtype=q.dtype)])
                scores = scale * keys @ q[b, h, i]
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                weights = (scores + extra).exp()
                total = weights.sum() + (0.0 if logits is None else logits[h].exp())
                out[b, h, i] = weights @ values / total
    return out


def masked(past):
    """What a query that sees sinks and a window has left behind."""
    return past[SINK : max(SINK, len(past) - WINDOW)]


def inputs(batch=2, length=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 4, length, 8), (batch, 2, length, 8), (batch, 2, length, 6)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(
    "more",
    [{}, {"cap": 2.0}, {"logits": torch.tensor([0.5, -1.0, 2.0, 0.0]).double()}],
    ids=["plain", "cap", "sinks"],
)
def test_equals_its_definition(chunks, more):
    q, k, v = inputs()
    expected = naive(q, k, v, dropped_by=masked, **more)
    torch.testing.assert_close(run(q, k, v, chunks, **more), expected)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_equals_its_definition_with_padding(chunks):
    q, k, v = inputs(batch=3)
    real = torch.ones(3, 30, dtype=torch.bool)
    real[1, :7] = False
    real[2, :25] = False
    found = run(q, k, v, chunks, real=real)
    expected = naive(q, k, v, dropped_by=masked, real=real)
    rows = real[:, None, :, None].expand_as(found)
    torch.testing.assert_close(found[rows], expected[rows])


def test_dense_chunks_see_everything_and_what_was_dropped_before():
    q, k, v = inputs()

    def before_the_chunk(past):
        start = 0 if len(past) <= 20 else 20 if len(past) <= 28 else len(past)
        return past[SINK : max(SINK, start - WINDOW)]

    found = run(q, k, v, [20, 8, 1, 1], dense=True)
    torch.testing.assert_close(found, naive(q, k, v, dropped_by=before_the_chunk))


def test_exact_when_nothing_is_dropped_or_all_heads_are_kept():
    q, k, v = inputs(length=SINK + WINDOW)
    whole = naive(q, k, v, dropped_by=lambda past: [])
    torch.testing.assert_close(run(q, k, v, [3, 1, 1, 1, 1]), whole)
    q, k, v = inputs()
    whole = naive(q, k, v, dropped_by=lambda past: [])
    torch.testing.assert_close(run(q, k, v, CHUNKS["chunks"], full=(True, True)), whole)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("dense", [False, True])
def test_exact_when_all_dropped_tokens_are_the_same(chunks, dense):
    q, k, v = inputs()
    k[:, :, SINK:-WINDOW] = k[:, :, SINK : SINK + 1]
    v[:, :, SINK:-WINDOW] = v[:, :, SINK : SINK + 1]
    whole = naive(q, k, v, dropped_by=lambda past: [])
    torch.testing.assert_close(run(q, k, v, chunks, dense=dense), whole)


def test_running_mean_equals_the_mean_of_the_batch():
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 3, 5000, 4, generator=generator)
    dropped = Dropped()
    for t in range(5000):
        dropped.add(k[:, :, t : t + 1], v[:, :, t : t + 1])
    for found, rows in zip(dropped.means(), (k, v), strict=True):
        torch.testing.assert_close(found, rows.double().mean(2).float(), rtol=1e-4, atol=1e-5)


def test_the_whole_model_compensates_alike_in_any_chunks():
    model = llama()
    ids, mask = left_padded(2, 30, [0, 6])
    full = [[False] * 3, [True, False, False], [False] * 3]
    logits = []
    for chunks in ([30], [1] * 30, [11, 1, 18]):
        cache = per_head(model, full=full, sink=SINK, window=WINDOW, compensate=True)
        parts, start = [], 0
        with torch.no_grad():
            for count in chunks:
                stop = start + count
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
                found = model(
                    ids[:, start:stop],
                    past_key_values=cache,
                    attention_mask=mask[:, :stop],
                    position_ids=positions,
                )
                parts.append(found.logits)
                start = stop
        logits.append(torch.cat(parts, 1)[mask.bool()])
    for other in logits[1:]:  # merged by log-sum-exps, which are float32
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-5)
    without = per_head(model, full=full, sink=SINK, window=WINDOW)
    with torch.no_grad():
        plain = model(ids, past_key_values=without, attention_mask=mask).logits[mask.bool()]
    assert (plain - logits[0]).abs().max() > 1e-3


def test_refuses_what_it_cannot_compensate():
    q, k, v = inputs()
    layer = PerHeadLayer(
        INFO, (False, False), sink=2, windows=(5, 5), dense=False, compensate=True, steps=Steps()
    )
    keys, values = layer.update(k, v)
    call = Call(INFO, q, keys, values, causal(), None, sparsemax(), 1.0)
    with pytest.raises(UnsupportedModel, match="compensate=True goes with softmax"):
        call.proceed()


def test_probe_scores_of_perfect_and_uniform_heads():
    ids = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:20].repeat(4)[None]
    words = torch.nn.functional.one_hot(ids, 40).double()
    before = torch.cat([torch.zeros(1, 1, 40).double(), words[:, :-1]], dim=1)
    nothing = torch.zeros_like(words)
    # heads: the token after an earlier occurrence, an earlier occurrence, everywhere alike
    k = torch.stack([before, words, nothing], dim=1)
    q = torch.stack([words * 60] * 3, dim=1)
    # nobody but the past: the current token matches itself
    found = measure(q, k, k, [Induction(), DuplicateToken()], ids=ids, mask=causal() & ~window(0), scale=1.0)
    induction, echo = found["induction"], found["duplicate_token"]
    assert induction[0] > 0.999
    assert echo[1] > 0.999
    assert induction[0] == induction.max()
    assert echo[1] == echo.max()
    assert 0.01 < induction[2] < 0.06  # its share of the tokens before: about one in twenty
    assert abs(induction[2] - echo[2]) < 0.01


def test_retrieval_heads_are_the_union_of_the_best():
    model = llama().float()
    probed = razor.probe(model, length=8, repeats=4)
    assert probed.echo.level == probed.induction.level == "kv"
    assert len(probed.induction) == 9
    heads = razor.retrieval_heads(model, induction=0.34, echo=0.12, probed=probed)
    assert set(heads) == set(probed.induction.top(3)) | set(probed.echo.top(1))
    cache = per_head(model, full=heads, sink=2, window=8, prefill="dense", compensate=True)
    assert sum(map(sum, cache.full)) == len(heads)
    same = razor.retrieval_heads(model, induction=0.34, echo=0.12, length=8, repeats=4)
    assert set(same) == set(heads)
    assert len(razor.retrieval_heads(model, induction=0.0, echo=0.0, probed=probed)) == 0


def test_probe_and_shares_are_checked():
    model = llama()
    with pytest.raises(ConfigError, match="length=200 tokens 4 times are more than the 512"):
        razor.probe(model, length=200)
    with pytest.raises(ConfigError, match="echo must be a share"):
        razor.retrieval_heads(model, echo=3)


def test_a_cache_with_compensation_counts_its_bytes():
    model, ids = llama(), tokens(1, 30)
    sizes = []
    for compensate in (False, True):
        cache = per_head(model, full="none", sink=SINK, window=WINDOW, compensate=compensate)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        sizes.append(cache.nbytes())
    rows = 3 * 3 * 2 * 8 * 8  # layers, heads, keys and values, width, bytes
    assert sizes[0] == rows * (SINK + WINDOW)
    assert sizes[1] == rows * (SINK + WINDOW + 1 + 1)  # a row of means, and the sums
