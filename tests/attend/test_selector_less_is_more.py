"""Keys that heads name in turns, and layers that follow a choice."""

from __future__ import annotations

import math

import pytest
import torch

import polyhead as ph
from attend.chosen_parts import pairs_read
from attend.operands import tensors
from polyhead.attend import attend
from polyhead.attend.masks import densify
from polyhead.errors import ConfigError

SHAPES = [(2, 4, 2, 33, 33), (1, 6, 2, 20, 41), (1, 3, 1, 1, 70)]
WAYS = [(12, 0.25, 4), (12, 0.25, 2), (13, 0.5, 4), (9, 1.0, 3), (9, 0.0, 4), (1, 0.25, 4), (300, 0.25, 4)]


@pytest.mark.parametrize(("keep", "recent", "first"), WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_twin(shape: tuple[int, ...], keep: int, recent: float, first: int) -> None:
    q, k, _ = tensors(*shape)
    call = {"keep": keep, "recent": recent, "first": first}
    found = pairs_read(ph.unified_keys(**call), q, k)
    assert torch.equal(found, ph.reference("unified_keys")(q, k, **call))
    seen = torch.arange(shape[4] - shape[3], shape[4]) + 1
    assert torch.equal(found.sum(-1), seen.clamp(max=keep).expand_as(found.sum(-1)))


def test_first_and_latest_keys_are_read_and_the_best_of_every_head() -> None:
    q, k, _ = tensors(2, 4, 2, 1, 70)
    found = pairs_read(ph.unified_keys(16, 0.5, 3), q, k)[:, 0]
    assert found[:, :3].all()
    assert found[:, -5:].all()
    scores = (q @ k.repeat_interleave(2, 1).mT)[:, :, 0, 3:-5]
    best = scores.topk(2, -1).indices + 3  # eight are named, two by each of four heads
    for b in range(2):
        assert found[b, best[b].flatten()].all()


def test_one_head_names_its_best_and_reads_the_own_key() -> None:
    q, k, _ = tensors(1, 1, 1, 1, 50)
    found = pairs_read(ph.unified_keys(10, 0.0, 4), q, k)[0, 0]
    best = (q @ k.mT)[0, 0, 0, :-1].topk(9).indices.tolist()
    assert set(found.nonzero().view(-1).tolist()) == {*best, 49}


@pytest.mark.parametrize("keep", [1, 4, 13, 16, 17])
@pytest.mark.parametrize("recent", [0.0, 0.25, 1.0])
def test_every_query_reads_its_own_key(keep: int, recent: float) -> None:
    q, k, _ = tensors(1, 4, 2, 40, 40)
    found = pairs_read(ph.unified_keys(keep, recent), q, k)[0]
    assert found.diagonal().all()
    assert (found.sum(-1) <= keep).all()


def test_heads_name_in_turns_what_was_not_named() -> None:
    k = torch.eye(8, dtype=torch.float64)[None, None]
    q = torch.tensor([[8, 7, 6, 5, 0, 0, 0, 0.0], [8, 0, 0, 0, 7, 6, 0, 0.0]], dtype=torch.float64)[
        None, :, None
    ]
    for keep, named in ((1, {7}), (2, {0, 7}), (3, {0, 1, 7}), (4, {0, 1, 4, 7}), (5, {0, 1, 4, 2, 7})):
        assert set(pairs_read(ph.unified_keys(keep, 0.0, 0), q, k)[0, 0].nonzero().view(-1).tolist()) == named


def test_padding_and_windows_count_from_what_is_seen() -> None:
    q, k, _ = tensors(2, 4, 2, 40, 40)
    real = torch.arange(40) >= torch.tensor([[0], [13]])
    for mask in (ph.causal(), ph.causal() & ph.window(17), ph.window(15, 9)):
        mask = mask & ph.padding(real)
        visible = densify(mask, batch=2, heads=1, queries=40, keys=40)[:, 0]
        expected = ph.reference("unified_keys")(q, k, keep=9, first=2, recent=0.5, visible=visible)
        assert torch.equal(pairs_read(ph.unified_keys(9, 0.5, 2), q, k, mask), expected)


def test_decoding_chooses_as_the_whole_call_does() -> None:
    q, k, v = tensors(2, 4, 2, 60, 60)
    own = ph.unified_keys(11)
    whole = attend(q, k, v, mask=ph.causal(), select=own)
    for t in (3, 10, 11, 40, 59):
        x = q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]
        torch.testing.assert_close(attend(*x, mask=ph.causal(), select=own), whole[:, :, t : t + 1])


def test_what_is_chosen_is_read_exactly() -> None:
    x = tensors(2, 4, 2, 40, 40)
    table = pairs_read(ph.unified_keys(9), *x[:2])[:, None]
    k, v = (t.repeat_interleave(2, 1) for t in x[1:])
    weights = (x[0] @ k.mT * 8**-0.5).masked_fill(~table, -math.inf).softmax(-1)
    torch.testing.assert_close(attend(*x, mask=ph.causal(), select=ph.unified_keys(9)), weights @ v)
    everything = attend(*x, mask=ph.causal(), select=ph.unified_keys(40))
    torch.testing.assert_close(everything, attend(*x, mask=ph.causal()))
    torch.testing.assert_close(attend(*x, mask=ph.causal(), select=ph.lead(ph.unified_keys(9))), everything)


def test_layers_lead_and_follow() -> None:
    chooses = ph.lead(ph.unified_keys(64, 0.5, 2))
    own = ph.less_is_more(7, 64, at=(1, 4), recent=0.5, first=2)
    assert own == [None, chooses, ph.follow(1), ph.follow(1), chooses, ph.follow(4), ph.follow(4)]
    assert ph.less_is_more(3, at=(2,)) == [None, None, ph.lead(ph.unified_keys(1024))]
    assert ph.from_json(ph.to_json(tuple(own))) == tuple(own)


def test_wrong_input_is_said() -> None:
    x = tensors(1, 2, 2, 10, 10)
    with pytest.raises(ConfigError, match=r"follow\(2\) reads what another layer of a model chose"):
        attend(*x, select=ph.follow(2))
    with pytest.raises(ConfigError, match="lead: selector must be one that chooses"):
        ph.lead(ph.follow(2))
    with pytest.raises(ConfigError, match="at must ascend within the 4 layers"):
        ph.less_is_more(4, at=(2, 4))
    with pytest.raises(ConfigError, match="at must ascend"):
        ph.less_is_more(4, at=(2, 2))
    with pytest.raises(ConfigError, match="at must be numbers of layers"):
        ph.less_is_more(4, at=2)
    with pytest.raises(
        ConfigError, match="unified_keys: recent must be a finite number at least 0 and at most 1"
    ):
        ph.unified_keys(4, 1.5)
    with pytest.raises(ConfigError, match="unified_keys: keep must be at least 1; got 0"):
        ph.unified_keys(0)
