"""Token indexers: the keys that score best, of all or of the best blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import polyhead as ph
from attend.chosen_parts import pairs_read
from attend.operands import tensors
from polyhead.attend import attend
from polyhead.attend.masks import Chosen, densify
from polyhead.attend.selectors import Grid, Indexer, choose
from polyhead.errors import ConfigError, ShapeError

SHAPES = [(2, 4, 2, 37, 37), (1, 4, 1, 23, 51), (1, 2, 2, 1, 70)]
KINDS = ("mean", "grouped", "learned", "computed")


def indexer(kind: str, q: Tensor, k: Tensor) -> Indexer:
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    of_query, of_key = q.shape[1] * q.shape[3], k.shape[1] * k.shape[3]
    if kind == "learned":
        return ph.learned_indexer(normal(3, 5, of_query), normal(3, of_query), normal(5, of_key))
    if kind == "computed":
        own = q.shape[0], 3, q.shape[2]
        return ph.computed_indexer(normal(*own, 5), normal(*own), normal(own[0], k.shape[2], 5))
    return ph.mean_indexer(2 if kind == "grouped" else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_equal_their_twins(shape: tuple[int, ...], kind: str) -> None:
    q, k, _ = tensors(*shape)
    own = indexer(kind, q, k)
    features = own.features(q, k)
    for keep in (1, 9, 200):
        expected = ph.reference("token_indexer")(*features, keep=keep)
        assert torch.equal(pairs_read(ph.token_indexer(keep, own), q, k), expected)
    for keep, blocks, size in ((5, 2, 4), (9, 3, 7), (20, 4, 13), (30, 30, 1)):
        expected = ph.reference("hisa")(*features, keep=keep, blocks=blocks, size=size)
        assert torch.equal(pairs_read(ph.hisa(keep, blocks, size, own), q, k), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_blocks_enough_or_of_one_key_it_is_the_flat_indexer(shape: tuple[int, ...]) -> None:
    q, k, _ = tensors(*shape)
    own = indexer("learned", q, k)
    flat = pairs_read(ph.token_indexer(12, own), q, k)
    for blocks, size in ((9, 8), (2, 64), (100, 1), (11, 7)):
        assert torch.equal(pairs_read(ph.hisa(12, blocks, size, own), q, k), flat)


def test_blocks_of_one_key_that_are_searched_are_ranked_by_the_same_score() -> None:
    """Fewer blocks than keys, so that the blocks are in fact ranked: the edges are candidates besides."""
    q, k, _ = tensors(1, 2, 2, 40, 40)
    own = indexer("learned", q, k)
    flat, found = (pairs_read(one, q, k) for one in (ph.token_indexer(10, own), ph.hisa(10, 12, 1, own)))
    assert torch.equal(found, flat)


def test_what_is_read_is_of_the_past_and_as_much_as_there_is() -> None:
    q, k, _ = tensors(2, 4, 2, 60, 60)
    found = pairs_read(ph.hisa(9, 3, 5, indexer("learned", q, k)), q, k)
    t = torch.arange(60)
    assert not (found & (t > t[:, None])).any()
    assert torch.equal(found.sum(-1), (t + 1).clamp(max=9).expand(2, -1).where(t < 15, found.sum(-1)))
    assert (found.sum(-1) <= 9).all()
    # candidates are at least two whole blocks and one key
    assert (found.sum(-1)[:, 15:] == 9).all()


def test_first_and_own_blocks_are_candidates_whatever_they_score() -> None:
    q = torch.ones(1, 1, 40, 4, dtype=torch.float64)
    k = torch.full((1, 1, 40, 4), 0.1, dtype=torch.float64)
    k[:, :, 8:32] = 1.0  # the blocks between have far better means
    k[:, :, 2] = k[:, :, 37] = 5.0  # but the best keys stand at the edges
    k[:, :, [1, 3, 36, 38]] = -5.0
    found = pairs_read(ph.hisa(2, 3, 8), q, k)
    assert found[0, 39].nonzero().view(-1).tolist() == [2, 37]


def test_a_key_that_its_block_hides_is_missed() -> None:
    """The limit of the method: a block's mean may say nothing of a single key."""
    q = torch.ones(1, 1, 64, 4, dtype=torch.float64)
    k = torch.full((1, 1, 64, 4), 0.1, dtype=torch.float64)
    k[:, :, 16:24] = -1.0
    k[:, :, 20] = 5.0
    assert pairs_read(ph.token_indexer(8), q, k)[0, -1, 20]
    assert not pairs_read(ph.hisa(8, 3, 8), q, k)[0, -1, 20]
    assert pairs_read(ph.hisa(8, 8, 8), q, k)[0, -1, 20]


def test_recall_of_the_flat_choice_is_the_share_of_it_that_lies_in_kept_blocks() -> None:
    q, k, _ = tensors(1, 4, 2, 96, 96)
    own = indexer("learned", q, k)
    flat = pairs_read(ph.token_indexer(12, own), q, k)
    candidates = pairs_read(ph.hisa(24, 3, 8, own), q, k)  # keeps all keys of its blocks
    found = pairs_read(ph.hisa(12, 3, 8, own), q, k)
    assert torch.equal(flat & candidates, flat & found)
    assert not torch.equal(flat, found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_chosen_is_read_exactly(shape: tuple[int, ...]) -> None:
    x = tensors(*shape)
    own = ph.hisa(9, 3, 7, indexer("learned", *x[:2]))
    table = pairs_read(own, *x[:2])[:, None]
    k, v = (t.repeat_interleave(shape[1] // shape[2], 1) for t in x[1:])
    weights = (x[0] @ k.mT * 8**-0.5).masked_fill(~table, -math.inf).softmax(-1)
    torch.testing.assert_close(attend(*x, mask=ph.causal(), select=own), weights @ v)
    everything = ph.hisa(shape[4], shape[4], 1)
    torch.testing.assert_close(attend(*x, mask=ph.causal(), select=everything), attend(*x, mask=ph.causal()))


def test_padding_and_other_masks() -> None:
    q, k, _ = tensors(2, 4, 2, 64, 64)
    real = torch.arange(64) >= torch.tensor([[0], [21]])
    own = ph.mean_indexer(2)
    call = {"keep": 9, "blocks": 3, "size": 5}
    for mask in (ph.causal(), ph.causal() & ph.window(30), ph.window(25, 7)):
        mask = mask & ph.padding(real)
        visible = densify(mask, batch=2, heads=1, queries=64, keys=64)[:, 0]
        expected = ph.reference("hisa")(*own.features(q, k), **call, visible=visible, real=real)
        assert torch.equal(pairs_read(ph.hisa(**call, indexer=own), q, k, mask), expected)
        flat = ph.reference("token_indexer")(*own.features(q, k), keep=9, visible=visible)
        assert torch.equal(pairs_read(ph.token_indexer(9, own), q, k, mask), flat)
    spoilt = k.clone()
    spoilt[1, :, :21] = 1e4
    masks = ph.causal() & ph.padding(real)
    before, after = (pairs_read(ph.hisa(**call, indexer=own), q, x, masks) for x in (k, spoilt))
    assert torch.equal(before, after)


def test_heads_that_see_different_keys_choose_among_their_own() -> None:
    q, k, v = tensors(1, 2, 2, 40, 40)
    mask = ph.per_head([ph.causal(), ph.window(11)])
    for own in (ph.hisa(6, 3, 4), ph.token_indexer(6)):
        y = attend(q, k, v, mask=mask, select=own)
        for h, alone in ((0, ph.causal()), (1, ph.window(11))):
            # the other head's features are a part of the indexer: only the mask differs
            expected = attend(q, k, v, mask=alone, select=own)
            torch.testing.assert_close(y[:, h], expected[:, h])


def test_decoding_chooses_as_the_whole_call_does() -> None:
    q, k, v = tensors(2, 4, 2, 70, 70)
    for own in (ph.hisa(7, 3, 6, ph.mean_indexer(2)), ph.token_indexer(7)):
        whole = attend(q, k, v, mask=ph.causal(), select=own)
        for t in (5, 6, 33, 69):
            x = q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]
            torch.testing.assert_close(attend(*x, mask=ph.causal(), select=own), whole[:, :, t : t + 1])


def test_whole_blocks_by_the_same_indexer() -> None:
    q, k, _ = tensors(1, 4, 2, 30, 30)
    own = indexer("learned", q, k)
    grid = Grid(1, 4, 2, 30, 30, 1, 7, 1.0)
    queries, weights, keys = own.features(q, k)
    means = torch.stack([part.mean(1) for part in keys.split(7, 1)], 1)
    expected = (queries @ means[:, None].mT).relu().mul(weights[..., None]).sum(1) * 5**-0.5
    torch.testing.assert_close(ph.index_scores(own).prepare(q, k, grid)(3, 20)[:, 2], expected[:, 3:20])


def test_an_indexer_learns_what_attention_looks_at() -> None:
    x = [tensors(4, 4, 2, 48, 48, 8)[i] for i in (0, 1)]
    x[0] = 3 * x[0]
    own = indexer("learned", *x).map_tensors(lambda t: (0.1 * t).requires_grad_())
    steps = torch.optim.Adam(own.tensors(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = ph.indexer_loss(own, *x, ph.causal())
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(t.grad is not None and bool(t.grad.abs().sum() > 0) for t in own.tensors())


def test_the_loss_is_a_divergence_from_the_mean_attention() -> None:
    q, k, _ = tensors(2, 4, 2, 20, 20)
    own = indexer("learned", q, k)
    real = torch.arange(20) >= torch.tensor([[0], [5]])
    found = ph.indexer_loss(own, q, k, ph.causal() & ph.padding(real))
    queries, weights, keys = own.features(q, k)
    lost = []
    for b in range(2):
        for t in range(20):
            seen = [s for s in range(t + 1) if real[b, s]]
            if not seen:
                continue
            logits = torch.stack([k[b, h // 2, seen] @ q[b, h, t] for h in range(4)]) * 8**-0.5
            p = logits.softmax(-1).mean(0)
            products = (keys[b, seen] @ queries[b, :, t].T * 5**-0.5).relu()
            log_i = (products * weights[b, :, t]).sum(-1).log_softmax(-1)
            lost.append((p * (p.log() - log_i)).sum())
    torch.testing.assert_close(found, torch.stack(lost).mean())


def test_they_compile_and_are_values() -> None:
    q, k, v = tensors(1, 2, 2, 40, 40)
    own = ph.hisa(6, 3, 4, indexer("learned", q, k))
    assert ph.from_json(ph.to_json(own)) == own
    run = torch.compile(lambda *x: attend(*x, mask=ph.causal(), select=own), fullgraph=True)
    torch.testing.assert_close(run(q, k, v), attend(q, k, v, mask=ph.causal(), select=own))


def test_beside_another_selector_and_under_a_guard() -> None:
    q, k, _ = tensors(1, 2, 2, 40, 40)
    own = ph.hisa(4, 3, 4)
    both = own | ph.fixed(ph.window(2), rows=1, cols=1)
    near = densify(ph.causal() & ph.window(2), queries=40, keys=40).view(40, 40)
    assert torch.equal(pairs_read(both, q, k), pairs_read(own, q, k) | near)
    assert torch.equal(pairs_read(ph.guarded(own, 1.0), q, k), pairs_read(own, q, k))
    assert torch.equal(
        pairs_read(ph.guarded(own, 0.0), q, k), densify(ph.causal(), queries=40, keys=40).view(1, 40, 40)
    )


def test_half_precision_ranks_in_float32() -> None:
    q, k, _ = (x.to(torch.bfloat16) for x in tensors(1, 2, 2, 40, 40))
    own = ph.hisa(6, 3, 4)
    assert torch.equal(pairs_read(own, q, k), pairs_read(own, q.float(), k.float()))


def test_fewer_products_are_counted() -> None:
    grid = Grid(1, 4, 2, 1000, 1000, 1, 1, 1.0)
    flat, few, all_blocks = ph.token_indexer(64), ph.hisa(64, 4, 16), ph.hisa(64, 63, 16)
    assert flat.flops(grid, 8) == all_blocks.flops(grid, 8) == 2 * 1000 * 1000 * 8
    assert few.flops(grid, 8) == 2 * 1000 * (63 + 64) * 8


def test_wrong_input_is_said() -> None:
    q, k, v = tensors(1, 4, 2, 10, 10)
    with pytest.raises(ConfigError, match="2 blocks of 8 keys hold fewer than the 17 to be kept"):
        ph.hisa(17, 2, 8)
    with pytest.raises(ConfigError, match="hisa: blocks must be at least 2; got 1"):
        ph.hisa(1, 1, 8)
    with pytest.raises(ConfigError, match=r"indexer must be one such as mean_indexer\(\)"):
        ph.hisa(1, 2, 8, indexer=ph.mean_keys())
    with pytest.raises(ConfigError, match="groups must divide the 4 heads; got 3"):
        attend(q, k, v, select=ph.hisa(4, 2, 4, ph.mean_indexer(3)))
    with pytest.raises(ConfigError, match="use rows=1, got rows=64"):
        attend(q, k, v, select=ph.select(ph.index_scores(ph.mean_indexer()), ph.keep_blocks(1)))
    one = torch.zeros(2, 3, 32)
    with pytest.raises(ConfigError, match=r"must agree; got \(2, 3, 32\), \(2, 32\) and \(4, 16\)"):
        ph.learned_indexer(one, one[:, 0], torch.zeros(4, 16))
    with pytest.raises(ConfigError, match=r"learned_indexer: weights must be a floating-point tensor \(H_I"):
        ph.learned_indexer(one, one, torch.zeros(3, 16))
    with pytest.raises(ShapeError, match="keys reads 20 features of a token"):
        attend(q, k, v, select=ph.token_indexer(4, ph.learned_indexer(one, one[:, 0], torch.zeros(3, 20))))
    of_call = ph.computed_indexer(torch.zeros(1, 2, 9, 3), torch.zeros(1, 2, 9), torch.zeros(1, 10, 3))
    with pytest.raises(ShapeError, match="queries are of 1 sequences of 9 tokens, but the call has 1 of 10"):
        attend(q, k, v, select=ph.token_indexer(4, of_call))
    with pytest.raises(ConfigError, match="queries .* weights .* and keys .* must agree; got"):
        ph.computed_indexer(torch.zeros(1, 2, 9, 3), torch.zeros(1, 2, 8), torch.zeros(1, 10, 3))


def test_the_choice_is_one_list_for_all_heads() -> None:
    q, k, _ = tensors(1, 4, 2, 40, 40)
    found = choose(ph.hisa(6, 3, 4), q, k, ph.causal(), 1.0)
    assert isinstance(found, Chosen)
    assert found.index.shape == (1, 1, 40, 6)
