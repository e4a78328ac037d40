"""What is kept of keys from step to step: the same numbers as worked out anew, and nothing of other keys."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import polyhead as ph
from attend.operands import draw
from polyhead.attend.masks import Mask
from polyhead.attend.selectors import Grid, Scorer, Summaries, band_means, choose, proxy_heads
from polyhead.attend.selectors.visible import real_keys

B, H, G, D, COLS = 2, 4, 2, 16, 4


LEARNED = ph.learned_indexer(draw(3, 5, H * D), draw(3, H * D), draw(5, G * D))

SCORERS: dict[str, Scorer] = {
    "mean_keys": ph.mean_keys(),
    "key_bounds": ph.key_bounds(),
    "sampled_mass": ph.sampled_mass(1),
    "mean_mass": ph.mean_mass(1, COLS),
    "band_means": band_means("high", 0.5),
    "proxy_heads": proxy_heads(2, 3),
    "index_scores": ph.index_scores(ph.mean_indexer(2)),
    "learned_index": ph.index_scores(LEARNED),
    "shared": ph.shared(ph.key_bounds()),
}
SELECTORS = {
    name: ph.select(scorer, ph.keep_blocks(3), rows=1, cols=COLS, always=ph.window(0))
    for name, scorer in SCORERS.items()
} | {
    "token_indexer": ph.token_indexer(5, LEARNED),
    "hisa": ph.hisa(5, 2, 3, LEARNED),
    "guarded": ph.guarded(ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=1, cols=COLS), 0.3),
    "prism": ph.prism(0.5, rows=1, cols=COLS),
    "either": ph.select(ph.mean_keys(), ph.keep_blocks(1), rows=1, cols=COLS)
    | ph.select(ph.key_bounds(), ph.keep_mass(0.3), rows=1, cols=COLS),
}


def scores_of(scorer: Scorer, q: Tensor, k: Tensor, mask: Mask | None, summaries: Summaries | None) -> Tensor:
    real = real_keys(mask, q.device)
    if summaries is not None:
        summaries.of(k)
        summaries = summaries.serve(k, real)
        assert summaries is not None
    grid = Grid(*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], 1, COLS, 0.25, real, summaries)
    return scorer.prepare(q, k, grid)(0, q.shape[2])


def steps(length: int, start: int) -> Iterator[int]:
    """How many keys there are: after a prefill, in single steps, and once after three tokens at a time."""
    yield start
    yield from range(start + 1, length - 3)
    yield length


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_those_worked_out_anew(name: str, padded: bool) -> None:
    """To the last bit, and what was kept is not read again."""
    k, q = draw(B, G, 31, D), draw(B, H, 31, D, seed=1)
    real = torch.ones(B, 31, dtype=torch.bool)
    real[0, :6] = False  # a whole block and a half
    summaries, done = Summaries(), 0
    for count in steps(31, 9):
        mask = ph.padding(real[:, :count]) if padded else None
        keys = k[:, :, :count].clone()
        query = q[:, :, max(done, 0) : count]
        expected = scores_of(SCORERS[name], query, keys, mask, None)
        if name != "sampled_mass":  # whose blocks are single keys here
            keys[:, :, : done // COLS * COLS] = torch.nan
        found = scores_of(SCORERS[name], query, keys, mask, summaries)
        assert torch.equal(found, expected)
        done = count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCORERS)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    k, q = draw(B, G, 31, D).to(dtype), draw(B, H, 31, D, seed=1).to(dtype)
    summaries = Summaries()
    for count in steps(31, 9):
        keys, query = k[:, :, :count].clone(), q[:, :, count - 1 : count]
        expected = scores_of(SCORERS[name], query, keys, None, None)
        torch.testing.assert_close(scores_of(SCORERS[name], query, keys, None, summaries), expected)


def same_choice(name: str, q: Tensor, k: Tensor, mask: Mask | None, summaries: Summaries) -> None:
    summaries.of(k)
    found, expected = (choose(SELECTORS[name], q, k, mask, 0.25, held) for held in (summaries, None))
    assert torch.equal(found.index, expected.index)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SELECTORS)
def test_choices_after_crop_reorder_and_reset(name: str) -> None:
    k, q = draw(B, G, 40, D), draw(B, H, 40, D, seed=1)
    other = draw(B, G, 40, D, seed=2)
    summaries = Summaries()
    for count in (9, 10, 11, 12, 13, 19):
        same_choice(name, q[:, :, count - 1 : count], k[:, :, :count].clone(), None, summaries)
    summaries.crop(14)  # in the middle of a block
    k = torch.cat([k[:, :, :14], other[:, :, 14:]], 2)
    for count in (15, 16, 17, 23):
        same_choice(name, q[:, :, count - 1 : count], k[:, :, :count].clone(), None, summaries)
    beam = torch.tensor([1, 1, 0])
    summaries.reorder(beam)
    k, q = k[beam], q[beam]
    for count in (24, 25, 29):
        same_choice(name, q[:, :, count - 1 : count], k[:, :, :count].clone(), None, summaries)
    summaries.clear()
    for count in (7, 8, 9):
        same_choice(name, q[:, :, :1], draw(3, G, 40, D, seed=3)[:, :, :count], None, summaries)


def test_what_is_kept_under_autocast_serves_outside_of_it() -> None:
    k, q = draw(B, G, 31, D).float(), draw(B, H, 31, D, seed=1).float()
    summaries = Summaries()
    for count in (16, 20, 24, 28):
        keys, query = k[:, :, :count], q[:, :, count - 1 : count]
        summaries.of(keys)
        with torch.autocast("cpu", torch.bfloat16, enabled=count % 8 == 0):
            found = choose(SELECTORS["learned_index"], query, keys, None, 0.25, summaries)
        expected = choose(SELECTORS["learned_index"], query, keys, None, 0.25)
        assert torch.equal(found.index, expected.index)


def test_padding_that_changes_forgets() -> None:
    k, q = draw(B, G, 20, D), draw(B, H, 1, D, seed=1)
    summaries = Summaries()
    real = torch.ones(B, 20, dtype=torch.bool)
    same_choice("mean_keys", q, k[:, :, :18], ph.padding(real[:, :18]), summaries)
    real[1, 5] = False  # the tensor that was handed over, written into
    same_choice("mean_keys", q, k[:, :, :19], ph.padding(real[:, :19]), summaries)
    same_choice("mean_keys", q, k[:, :, :19], None, summaries)
    same_choice("mean_keys", q, k[:, :, :20], ph.padding(real), summaries)


def test_other_keys_are_neither_used_nor_kept() -> None:
    k, q = draw(B, G, 20, D), draw(B, H, 1, D, seed=1)
    summaries = Summaries()
    summaries.of(k)
    own = SELECTORS["mean_keys"]
    expected = choose(own, q, 2 - k, None, 0.25)
    assert torch.equal(choose(own, q, 2 - k, None, 0.25, summaries).index, expected.index)  # type: ignore[attr-defined]
    assert summaries.nbytes() == 0
    choose(own, q, k, None, 0.25, summaries)
    assert summaries.nbytes() > 0
    more = torch.cat([k, k], 0)  # of another batch, and vouched for wrongly: the layout tells
    summaries.of(more)
    q = torch.cat([q, q], 0)
    expected = choose(own, q, more, None, 0.25)
    assert torch.equal(choose(own, q, more, None, 0.25, summaries).index, expected.index)  # type: ignore[attr-defined]


def test_weights_of_an_indexer_that_change_forget() -> None:
    keys = draw(5, G * D)
    own = ph.token_indexer(4, ph.learned_indexer(draw(3, 5, H * D), draw(3, H * D), keys))
    k, q = draw(B, G, 20, D), draw(B, H, 1, D, seed=1)
    summaries = Summaries()
    summaries.of(k)
    first = choose(own, q, k, None, 0.25, summaries)
    held = summaries.nbytes()
    keys.neg_()
    second = choose(own, q, k, None, 0.25, summaries)
    assert torch.equal(second.index, choose(own, q, k, None, 0.25).index)  # type: ignore[attr-defined]
    assert not torch.equal(first.index, second.index)  # type: ignore[attr-defined]
    choose(own, q, k, None, 0.25, summaries)
    assert summaries.nbytes() == held  # what nobody asked for any more is gone


def test_a_copy_begins_anew() -> None:
    k, q = draw(B, G, 20, D), draw(B, H, 1, D, seed=1)
    summaries = Summaries()
    summaries.of(k)
    choose(SELECTORS["mean_keys"], q, k, None, 0.25, summaries)
    for other in (copy.deepcopy(summaries), pickle.loads(pickle.dumps(summaries))):
        assert other.nbytes() == 0
        same_choice("mean_keys", q, k, None, other)
