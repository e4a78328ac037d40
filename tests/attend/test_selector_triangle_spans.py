"""Spans found by triangles, retrieved by one vector each: alone, and followed through a model's calls."""

import itertools
import math

import pytest
import torch

import polyhead as ph
from polyhead.attend.masks import densify
from polyhead.attend.selectors import (
    Span,
    choose,
    cover,
    detect_spans,
    guarded,
    keep_blocks,
    mean_keys,
    rectified,
    select,
    triangle_scores,
    triangle_spans,
)
from polyhead.errors import ConfigError, ShapeError
from polyhead.reference import reference

HOW = {"budget": 10, "window": 12, "first": 2, "chunk": 6, "rows": 5}


def tensors(batch=2, heads=4, kv_heads=2, tokens=61, width=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = (heads, kv_heads, kv_heads)
    return [2 * torch.randn(batch, h, tokens, width, generator=draw, dtype=torch.float64) for h in sizes]


def attention(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, n, generator=draw, dtype=torch.float64)
    return logits.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)


def blocks_of(sizes, inside=0.3, outside=0.02):
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.where(label[:, None] == label, inside, outside).double()


def read(selector, q, k, mask=None):
    """Which keys are read `(B, 1, L, S)`, causality and the mask included."""
    mask = ph.causal() if mask is None else ph.causal() & mask
    found = choose(selector, q, k, mask, q.shape[-1] ** -0.5) & mask
    return densify(found, batch=len(q), heads=1, queries=q.shape[2], keys=k.shape[2], device=q.device)


@pytest.mark.parametrize("n", [1, 2, 7, 20])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5])
def test_scores_by_prefix_sums_are_the_sums(n, threshold):
    map_ = attention(n) + torch.ones(n, n).triu(1)  # above the diagonal nothing counts
    found = triangle_scores(map_[None].expand(2, -1, -1), threshold)
    assert found.shape == (2, n, n + 1)
    for x, y in itertools.combinations(range(n + 1), 2):
        expected = reference("triangle_score")(map_, x, y, threshold)
        assert float(found[1, x, y]) == pytest.approx(expected, abs=1e-12)
    assert not bool(found.tril().any())


@pytest.mark.parametrize("sizes", [[5, 7, 4, 9], [2, 12, 2], [30], [3] * 8])
def test_bright_triangles_are_found_exactly(sizes):
    """Blocks of one weight, with θ halfway between it and what lies outside."""
    map_ = blocks_of(sizes)
    spans = cover(detect_spans(map_, 0.16), sum(sizes))
    edges = [0, *itertools.accumulate(sizes)]
    assert [(s.start, s.stop) for s in spans] == list(itertools.pairwise(edges))


def test_a_low_threshold_merges_neighbours():
    spans = detect_spans(blocks_of([6, 6]), 0.0)
    assert (spans[0].start, spans[0].stop) == (0, 12)


@pytest.mark.parametrize("n", [9, 17, 24])
@pytest.mark.parametrize("how", [{}, {"shortest": 3, "longest": 6}, {"overlap": 0.0}, {"overlap": 0.7}])
def test_detection_equals_its_twin_and_winners_overlap_little(n, how):
    map_ = attention(n, n)
    found = detect_spans(map_, 0.3, **how)
    expected = reference("detect_spans")(map_, 0.3, **how)
    assert [s[:2] for s in found] == [s[:2] for s in expected]
    assert found
    for a, b in itertools.combinations(found, 2):
        shared = max(0, min(a.stop, b.stop) - max(a.start, b.start))
        union = a.stop - a.start + b.stop - b.start - shared
        assert shared / union <= how.get("overlap", 0.3) + 1e-12
    assert all(s.score > 0 for s in found)
    assert all(a.score >= b.score for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("longest", [None, 4])
def test_a_cover_holds_every_token_once(longest):
    found = cover(detect_spans(attention(40, 3), 0.3), 40, longest)
    assert [t for s in found for t in range(s.start, s.stop)] == list(range(40))
    assert any(s.score == 0 for s in found)
    assert longest is None or all(s.stop - s.start <= 4 for s in found if s.score == 0)


def test_what_a_better_span_leaves_of_another_stays_with_its_score():
    found = cover([Span(4, 7, 3.0), Span(2, 10, 2.0)], 12)
    assert found == [Span(0, 2, 0.0), Span(2, 4, 2.0), Span(4, 7, 3.0), Span(7, 10, 2.0), Span(10, 12, 0.0)]


@pytest.mark.parametrize("tokens", [61, 60, 13, 5])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"rows": 1},
        {"votes": False},
        {"threshold": 0.1, "longest": 3},
        {"overlap": 0.0, "first": 0},
        {"say": torch.tensor([1.0, 0.0, 2.0, 0.5])},
        {"window": 17, "chunk": 4, "budget": 3},
    ],
    ids=str,
)
def test_it_equals_its_twin(tokens, how):
    q, k, _ = tensors(tokens=tokens)
    how = HOW | how
    found = read(triangle_spans(**how), q, k)[:, 0]
    assert torch.equal(found, reference("triangle_spans")(q, k, **how))


def test_padding_has_no_part():
    q, k, _ = tensors(tokens=50)
    real = torch.ones(2, 50, dtype=torch.bool)
    real[0, :9], real[1, 44:] = False, False
    expected = reference("triangle_spans")(q, k, **HOW, real=real)
    k = k.masked_fill(~real[:, None, :, None], math.nan)
    found = read(triangle_spans(**HOW), q, k, ph.padding(real))[:, 0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("how", [{"budget": 100}, {"window": 61}, {"budget": 100, "first": 0, "rows": 1}])
def test_with_budget_or_window_enough_it_is_full_attention(how):
    q, k, v = tensors()
    found = ph.attend(q, k, v, mask=ph.causal(), select=triangle_spans(**(HOW | how)))
    torch.testing.assert_close(found, ph.attend(q, k, v, mask=ph.causal()))


def test_what_is_read_is_first_window_and_at_most_the_budget():
    q, k, _ = tensors()
    found = read(triangle_spans(**HOW), q, k)
    i, j = torch.arange(61)[:, None], torch.arange(61)
    s = i // 5 * 5
    always = (j <= i) & ((j < 2) | (j >= s - 12))
    assert bool(found[0, 0][always].all())
    more = (found[:, 0] & ~always).sum(-1)
    assert more.max() == 10
    assert bool((more[:, 22:25] == 6).all())  # of query 20 on, tokens 2..7 lie back: fewer than the budget


def test_later_tokens_have_no_part_where_every_query_chooses_for_itself():
    q, k, _ = tensors()
    how = HOW | {"rows": 1}
    whole = read(triangle_spans(**how), q, k)
    for cut in (30, 41, 60):
        short = read(triangle_spans(**how), q[:, :, :cut], k[:, :, :cut])
        assert torch.equal(whole[:, :, :cut, :cut], short)


def test_spans_depend_on_what_was_read_until_the_next_chunk():
    q, k, _ = tensors()
    own = triangle_spans(**HOW)
    index = own.begin().index
    grid_calls(own, index, q, k, [61])
    for cut in (12, 24, 59):
        other = own.begin().index
        grid_calls(own, other, q[:, :, :cut], k[:, :, :cut], [cut])
        spans, known = other.starts.shape[1], other.vectors.shape[2]
        assert torch.equal(other.starts, index.starts[:, :spans])
        torch.testing.assert_close(other.vectors, index.vectors[:, :, :known])


def grid_calls(own, index, q, k, ends):
    from polyhead.attend.selectors.choice import grid_of

    start = 0
    for end in ends:
        part = q[:, :, start:end], k[:, :, :end]
        index.add(*part, None, grid_of(own, *part, None, 8**-0.5))
        start = end


@pytest.mark.parametrize("ends", [[1, 2, 3, *range(4, 62)], [17, *range(18, 62)], [6, 12, 30, 61], [61]])
@pytest.mark.parametrize("how", [{"rows": 1}, {"rows": 1, "votes": False}])
def test_calls_that_go_on_read_what_the_whole_call_does(ends, how):
    q, k, v = tensors()
    own = triangle_spans(**(HOW | how))
    whole = ph.attend(q, k, v, mask=ph.causal(), select=own)
    going, start, parts = own.begin(), 0, []
    for end in ends:
        mask = None if end - start == 1 else ph.causal()
        parts.append(ph.attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask=mask, select=going))
        start = end
    torch.testing.assert_close(torch.cat(parts, 2), whole)


@pytest.mark.parametrize(
    "around",
    [
        lambda own: guarded(own, most=1.0),
        lambda own: own | select(mean_keys(), keep_blocks(3), rows=1, cols=1),
        lambda own: rectified(own, apart=ph.sink(3)),
    ],
    ids=["guarded", "either", "rectified"],
)
def test_selectors_around_it_go_on_too(around):
    q, k, v = tensors()
    own = around(triangle_spans(**(HOW | {"rows": 1})))
    whole = ph.attend(q, k, v, mask=ph.causal(), select=own)
    going = own.begin()
    assert own.remembers
    going.see(q[:, :, :30], k[:, :, :30], ph.causal(), 8**-0.5)
    for n in range(30, 61):
        step = ph.attend(q[:, :, n : n + 1], k[:, :, : n + 1], v[:, :, : n + 1], select=going)
        torch.testing.assert_close(step, whole[:, :, n : n + 1])


def test_in_decoding_spans_may_be_kept_for_some_steps():
    q, k, _ = tensors()
    own = triangle_spans(**(HOW | {"rows": 1, "every": 4}))
    going = own.begin()
    going.see(q[:, :, :40], k[:, :, :40], ph.causal(), 8**-0.5)
    far = []
    for n in range(40, 52):
        found = choose(going, q[:, :, n : n + 1], k[:, :, : n + 1], None, 8**-0.5)
        row = densify(found, batch=2, heads=1, queries=1, keys=n + 1, device=q.device)[:, 0, 0]
        s = 40 + (n - 40) // 4 * 4
        assert bool(row[:, s - 12 :].all())
        far.append(row[:, 2 : s - 12])
    for group in (0, 4, 8):
        assert all(torch.equal(far[group], far[group + n]) for n in range(4))
    anew = read(triangle_spans(**(HOW | {"rows": 1})), q, k)[:, 0]
    assert all(torch.equal(far[n - 40], anew[:, n, 2 : n - 12]) for n in (40, 44, 48))


def test_a_span_that_answers_is_retrieved():
    """A bright triangle far back, whose keys the last queries ask for."""
    draw = torch.Generator().manual_seed(0)
    q, k = (0.1 * torch.randn(1, 1, 200, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    k[0, 0, 37:48, 3] = 6.0
    q[0, 0, 37:48, 3] = 6.0
    q[0, 0, 190:, 3] = 6.0
    own = triangle_spans(11, 64, first=1, chunk=32, rows=10)
    spans = own.begin().index
    grid_calls(own, spans, q, k, [200])
    assert (37, 48) in set(zip(spans.starts[0].tolist(), spans.stops[0].tolist(), strict=True))
    found = read(own, q, k)[0, 0, -1]
    assert bool(found[37:48].all())
    assert not bool(found[1:37].any())


def test_heads_that_have_more_to_say_decide():
    draw = torch.Generator().manual_seed(0)
    q, k = (0.1 * torch.randn(1, 2, 200, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    k[0, :, 40:44, 3], k[0, :, 72:76, 5] = 6.0, 6.0
    q[0, :, 40:44, 3], q[0, :, 72:76, 5] = 6.0, 6.0
    q[0, 0, 190:, 3], q[0, 1, 190:, 5] = 4.0, 4.0
    for say, place in (([1.0, 0.1], 40), ([0.1, 1.0], 72)):
        own = triangle_spans(4, 64, first=1, chunk=32, rows=10, say=torch.tensor(say))
        assert read(own, q, k)[0, 0, -1, 1:100].nonzero().view(-1).tolist() == [
            place - 1 + n for n in range(4)
        ]


def test_wrong_input_is_said():
    for name, value in (
        ("budget", 0),
        ("chunk", 1),
        ("rows", 0),
        ("every", 0),
        ("first", -1),
        ("longest", 1),
    ):
        with pytest.raises(ConfigError, match=f"triangle_spans: {name}"):
            triangle_spans(**({"budget": 8} | {name: value}))
    with pytest.raises(ConfigError, match="at least two chunks.*window 127 and chunk 64"):
        triangle_spans(8, 127)
    with pytest.raises(ConfigError, match="threshold"):
        triangle_spans(8, threshold=-1.0)
    with pytest.raises(ConfigError, match="say must be a tensor"):
        triangle_spans(8, say=torch.tensor([1.0, -1.0]))
    q, k, v = tensors()
    with pytest.raises(ShapeError, match="say has 3 numbers for 4 heads"):
        ph.attend(q, k, v, mask=ph.causal(), select=triangle_spans(8, say=torch.ones(3)))
    with pytest.raises(ConfigError, match="goes on behind 60 tokens of 2 sequences, and 0 of 2 were read"):
        ph.attend(q[:, :, -1:], k, v, select=triangle_spans(8))
    with pytest.raises(ShapeError, match=r"maps \(\.\.\., n, n\); got \(3, 4\)"):
        triangle_scores(torch.zeros(3, 4))
    with pytest.raises(ShapeError, match=r"one map \(n, n\)"):
        detect_spans(torch.zeros(1, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_reads_about_the_same(dtype):
    q, k, _ = tensors()
    halves = read(triangle_spans(**HOW), q.to(dtype), k.to(dtype))
    whole = read(triangle_spans(**HOW), q, k)
    assert (halves == whole).double().mean() > 0.8
