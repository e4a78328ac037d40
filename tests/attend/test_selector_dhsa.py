"""Keys by the score of their chunk; and where chunks begin."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import polyhead as ph
from attend.operands import tensors
from polyhead.attend import attend
from polyhead.attend.masks import Chosen, densify
from polyhead.attend.selectors import Chunks, Grid, Selector, choose
from polyhead.errors import ConfigError, ShapeError, UnknownName

SHAPES = [(2, 4, 2, 60, 60, 8), (1, 4, 1, 23, 71, 5), (1, 2, 2, 1, 70, 1), (1, 4, 2, 40, 40, 1)]


class Given(Chunks):
    """Chunks that begin where a tensor says."""

    begin: Tensor

    def starts(self, q: Tensor, k: Tensor, mask: ph.Mask | None, grid: Grid) -> Tensor:
        return self.begin

    def most(self, keys: int) -> int:
        return keys


def ragged(batch: int, keys: int) -> Tensor:
    """Chunks of 1 to 20 keys, those of every sequence its own."""
    draw = torch.Generator().manual_seed(keys)
    return torch.rand(batch, keys, generator=draw) < torch.rand(batch, keys, generator=draw) * 0.3


def read(selector: Selector, q: Tensor, k: Tensor, mask: ph.Mask | None = None) -> Tensor:
    """Which keys every block of queries reads, the same ones for all heads: bool (B, M, S)."""
    found = choose(selector, q, k, ph.causal() if mask is None else mask, q.shape[-1] ** -0.5)
    assert isinstance(found, Chosen)
    assert found.index.shape[1] == 1
    index = found.index[:, 0]
    table = torch.zeros(*index.shape[:2], k.shape[2] + 1, dtype=torch.bool)
    return table.scatter_(-1, index.masked_fill(index < 0, k.shape[2]), True)[..., :-1]


@pytest.mark.parametrize("pooling", ["sqrt", "mean", "max"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_twin(shape: tuple[int, ...], pooling: str) -> None:
    *sizes, rows = shape
    q, k, _ = tensors(*sizes)
    starts = ragged(sizes[0], sizes[4])
    for keep, local, last in ((20, 9, 0), (12, 12, 5), (30, 8, 64), (11, 8, 1)):
        call = {"keep": keep, "local": local, "last": last, "rows": rows, "pooling": pooling}
        found = read(ph.dhsa(chunks=Given(starts), **call), q, k)
        assert torch.equal(found, ph.reference("dhsa")(q, k, starts, **call))


def test_padding_counts_in_no_chunk() -> None:
    q, k, _ = tensors(2, 4, 2, 50, 50)
    starts, real = ragged(2, 50), torch.arange(50) >= torch.tensor([[0], [17]])
    mask = ph.causal() & ph.padding(real)
    visible = densify(mask, batch=2, heads=1, queries=50, keys=50)[:, 0]
    for pooling in ("sqrt", "mean", "max"):
        call = {"keep": 14, "local": 6, "last": 3, "rows": 6, "pooling": pooling}
        own = ph.dhsa(chunks=Given(starts), **call)
        expected = ph.reference("dhsa")(q, k, starts, visible=visible, real=real, **call)
        assert torch.equal(read(own, q, k, mask), expected)
        spoilt = k.clone()
        spoilt[1, :, :17] = 1e4
        assert torch.equal(read(own, q, spoilt, mask), expected)


def test_chunks_of_one_key_for_single_queries_of_one_head_are_the_best_keys() -> None:
    q, k, _ = tensors(1, 1, 1, 40, 40)
    found = read(ph.dhsa(8, ph.even_chunks(1), local=1, last=0, rows=1), q, k)
    logits = (q @ k.mT)[0, 0].masked_fill(torch.arange(40) > torch.arange(40)[:, None], -math.inf)
    logits.fill_diagonal_(math.inf)  # its own key is the local one
    for t in range(8, 40):
        assert set(found[0, t].nonzero().view(-1).tolist()) == set(logits[t].topk(8).indices.tolist())


def test_enough_keys_are_plain_attention() -> None:
    x = tensors(2, 4, 2, 60, 60)
    dense = attend(*x, mask=ph.causal())
    for own in (ph.dhsa(60, local=16, rows=16), ph.dhsa(16, local=16, rows=16, last=59)):
        found = attend(*x, mask=ph.causal(), select=own)
        start = 0 if own.last == 64 else 16
        torch.testing.assert_close(found[:, :, start:], dense[:, :, start:])


def test_chunks_of_one_length_rank_alike_with_and_without_the_root() -> None:
    q, k, _ = tensors(1, 4, 2, 64, 64)
    own = [ph.dhsa(24, ph.even_chunks(8), pooling=p, local=8, rows=8, last=0) for p in ("sqrt", "mean")]
    assert torch.equal(read(own[0], q, k), read(own[1], q, k))
    ragged_ones = [
        ph.dhsa(24, Given(ragged(1, 64)), pooling=p, local=8, rows=8, last=0) for p in ("sqrt", "mean")
    ]
    assert not torch.equal(read(ragged_ones[0], q, k), read(ragged_ones[1], q, k))


def test_with_the_root_the_spread_of_scores_does_not_depend_on_the_length() -> None:
    draw = torch.Generator().manual_seed(0)
    spread = {}
    for size in (2, 32):
        keys = torch.randn(2000, size, generator=draw, dtype=torch.float64)
        spread[size] = float((keys.mean(1) * size**0.5).std()), float(keys.mean(1).std())
    assert spread[2][0] == pytest.approx(spread[32][0], rel=0.05)
    assert spread[2][1] > 3 * spread[32][1]


def test_every_block_reads_its_latest_keys_and_no_more_than_it_may() -> None:
    q, k, _ = tensors(2, 4, 2, 61, 61)
    found = read(ph.dhsa(20, Given(ragged(2, 61)), local=12, rows=8, last=0), q, k)
    for m in range(found.shape[1]):
        end = min((m + 1) * 8, 61)
        assert found[:, m, max(0, end - 12) : end].all()
        assert not found[:, m, end:].any()
        assert (found[:, m].sum(-1) == min(20, end)).all()


def test_what_is_chosen_is_read_exactly() -> None:
    x = tensors(2, 4, 2, 45, 45)
    own = ph.dhsa(16, Given(ragged(2, 45)), local=8, rows=8, last=5)
    table = (
        read(own, *x[:2]).repeat_interleave(8, 1)[:, :45] & densify(ph.causal(), queries=45, keys=45)[0, 0]
    )
    k, v = (t.repeat_interleave(2, 1) for t in x[1:])
    weights = (x[0] @ k.mT * 8**-0.5).masked_fill(~table[:, None], -math.inf).softmax(-1)
    torch.testing.assert_close(attend(*x, mask=ph.causal(), select=own), weights @ v)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_the_ratio_equals_its_twin(window: int) -> None:
    q, k, _ = tensors(2, 4, 2, 31, 31)
    found = ph.boundary_ratio(q, k, window=window)
    torch.testing.assert_close(found, ph.reference("boundary_ratio")(q, k, window=window))
    assert (ph.boundary_ratio(q[:, :, :6], k[:, :, :6]) == 1).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_in_no_ratio(side: str) -> None:
    """Neither as queries nor as keys, whatever stands there: the ratio is that of the text alone."""
    q, k, _ = tensors(2, 4, 2, 41, 41)
    text = slice(9, None) if side == "left" else slice(None, 32)
    real = torch.zeros(2, 41, dtype=torch.bool)
    real[0], real[1, text] = True, True
    spoilt = [x.clone() for x in (q, k)]
    for x in spoilt:
        x[1].masked_fill_(~real[1, :, None], 1e4)
    found = ph.boundary_ratio(*spoilt, ph.padding(real))
    torch.testing.assert_close(found, ph.reference("boundary_ratio")(q, k, window=4, real=real))
    torch.testing.assert_close(found[:1], ph.boundary_ratio(q[:1], k[:1]))
    torch.testing.assert_close(found[1:, text], ph.boundary_ratio(q[1:, :, text], k[1:, :, text]))
    assert (found[1][~real[1]] == 1).all()


def test_boundaries_are_found_where_attention_changes() -> None:
    """Every query scores the keys of a part of the text alike, and those of another part otherwise."""
    level = torch.tensor([3.0, 0.0, 2.0, -1.0], dtype=torch.float64).repeat_interleave(16)
    k = level[None, None, :, None]
    q = torch.ones_like(k)
    ratio = ph.boundary_ratio(q, k)[0]
    assert all(int(ratio[s - 8 : s + 8].argmax()) == 8 for s in (16, 32, 48))
    grid = Grid(1, 1, 1, 64, 64, 1, 1, 1.0)
    found = ph.attention_chunks(16).starts(q, k, ph.causal(), grid)
    assert found[0].nonzero().view(-1).tolist() == [16, 32, 48]


def test_boundaries_keep_their_distance_and_their_number() -> None:
    q, k, _ = tensors(2, 4, 2, 90, 90)
    grid = Grid(2, 4, 2, 90, 90, 1, 1, 8**-0.5)
    ratio = ph.boundary_ratio(q, k)
    for length, distance in ((8, 8), (4, 3), (10, 1), (1, 5)):
        own = ph.attention_chunks(length, distance=distance)
        found = own.starts(q, k, ph.causal(), grid)
        for b in range(2):
            at = found[b].nonzero().view(-1).tolist()
            assert len(at) <= 90 // length < own.most(90) + 1
            assert all(y - x >= distance for x, y in pairwise(at))
            taken: list[int] = []  # greedily, best first
            for s in sorted(range(90), key=lambda s: -float(ratio[b, s])):
                far = all(abs(s - other) >= distance for other in taken)
                if float(ratio[b, s]) > 1.1 and far and len(taken) < 90 // length:
                    taken.append(s)
            assert at == sorted(taken)


def test_a_network_learns_boundaries_from_keys() -> None:
    """Keys of two kinds in stretches: the network has to see where the kind changes."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    predictor = ph.boundary_predictor(8, width=16, hidden=16)
    steps = torch.optim.Adam(predictor.tensors(), lr=3e-3)

    def text() -> tuple[Tensor, Tensor]:
        change = torch.rand(4, 80, generator=draw) < 0.06
        kind = change.cumsum(-1) % 2 * 2.0 - 1
        k = 0.3 * torch.randn(4, 2, 80, 4, generator=draw) + kind[:, None, :, None]
        return k, torch.where(change, 3.0, 1.0)

    for _ in range(150):
        loss = ph.boundary_loss(predictor, *text())
        steps.zero_grad()
        loss.backward()
        steps.step()
    k, ratio = text()
    logits = predictor.logits(k)[:, 8:-8]
    change = ratio[:, 8:-8] > 2
    assert logits[change].mean() > logits[~change].mean() + 1
    own = ph.learned_chunks(predictor.map_tensors(Tensor.detach), 8)
    q = torch.randn(4, 2, 80, 4, generator=draw)
    assert read(ph.dhsa(24, own, local=8, rows=8), q, k).any()
    # a step of decoding can be asked too
    assert read(ph.dhsa(24, own, local=8, rows=1), q[:, :, -1:], k).sum(-1).tolist() == [[24]] * 4
    assert ph.from_json(ph.to_json(own)) == own


def test_the_network_written_out() -> None:
    torch.manual_seed(0)
    own = ph.boundary_predictor(6, window=3, width=5, hidden=4).map_tensors(
        lambda t: torch.randn_like(t).double()
    )
    k = torch.randn(1, 2, 20, 3, dtype=torch.float64)
    x = torch.cat([k[0, 0], k[0, 1]], -1)  # tokens by features

    def encoded(tokens: Tensor) -> Tensor:
        inner = ((tokens * own.filters.T).sum(0) + own.filter_bias).relu()
        return (own.mix @ inner + own.mix_bias).relu()

    found = own.logits(k)[0]
    for s in range(20):
        if s < 3 or s > 17:
            assert found[s] == -math.inf
            continue
        left, right = encoded(x[s - 3 : s]), encoded(x[s : s + 3])
        cosine = (left @ right / (left.norm() * right.norm()).clamp(min=1e-8)).view(1)
        both = torch.cat([left, right, (left - right).abs(), left * right, cosine])
        expected = (own.hidden @ both + own.hidden_bias).relu() @ own.out + own.out_bias
        torch.testing.assert_close(found[s], expected)


def test_loss_is_focal_with_soft_targets() -> None:
    torch.manual_seed(0)
    own = ph.boundary_predictor(4, window=2, width=3, hidden=3)
    k, ratio = torch.randn(1, 1, 12, 4), 1 + torch.rand(1, 12)
    p = own.logits(k)[0, 4:8].sigmoid()
    t = torch.sigmoid(4 * (ratio[0, 4:8].log() - math.log(1.1)))
    entropy = -(t * p.log() + (1 - t) * (1 - p).log())
    torch.testing.assert_close(ph.boundary_loss(own, k, ratio), (entropy * (t - p) ** 2).mean())
    torch.testing.assert_close(ph.boundary_loss(own, k, ratio, gamma=0.0), entropy.mean())


def test_boundaries_of_what_does_not_fit_are_refused() -> None:
    q, k, _ = tensors(2, 4, 2, 17, 17)
    own = ph.boundary_predictor(2 * k.shape[3], window=2)
    ratio = ph.boundary_ratio(q, k, window=2)
    assert ph.boundary_loss(own, k[:, :, :9], ratio[:, :9]).isfinite()  # one place with 4 keys on either side
    with pytest.raises(ShapeError, match="4 keys on either side, more than 8 in all; the text has 8"):
        ph.boundary_loss(own, k[:, :, :8], ratio[:, :8])
    with pytest.raises(ShapeError, match=r"ratio must be \(B, S\), \(2, 17\) for these keys; got a tens"):
        ph.boundary_loss(own, k, ratio[:, :9])
    for wrong in (k.repeat(1, 3, 1, 1)[:, :3], k[:1], k[..., :3], k[:, :0]):
        with pytest.raises(ShapeError, match="must agree in B and D, and G must divide H; got q a tensor"):
            ph.boundary_ratio(q, wrong)
    for wrong in (k[0], k.long(), [1.0]):
        with pytest.raises(ShapeError, match=r"must be tensors \(B, H, S, D\) and \(B, G, S, D\); got q"):
            ph.boundary_ratio(q, wrong)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="padding: mask has 7 positions but there are 17 keys"):
        ph.boundary_ratio(q, k, ph.padding(torch.ones(2, 7, dtype=torch.bool)))


def test_it_is_a_value_and_wrong_input_is_said() -> None:
    own = ph.dhsa(256, ph.attention_chunks(16), pooling="max", local=64, rows=32)
    assert ph.from_json(ph.to_json(own)) == own
    q, k, v = tensors(1, 4, 2, 20, 30)
    with pytest.raises(ShapeError, match="as many queries as keys, a whole text; got 20 and 30"):
        attend(q, k, v, mask=ph.causal(), select=ph.dhsa(16, ph.attention_chunks(), local=8, rows=8))
    with pytest.raises(ConfigError, match="got rows=64, local=32 and keep=2048"):
        ph.dhsa(local=32)
    with pytest.raises(ConfigError, match="got rows=64, local=128 and keep=100"):
        ph.dhsa(100)
    with pytest.raises(UnknownName, match="pooling"):
        ph.dhsa(pooling="min")
    with pytest.raises(ConfigError, match=r"chunks must be such as even_chunks\(32\)"):
        ph.dhsa(chunks=32)
    with pytest.raises(ConfigError, match="even_chunks: size must be at least 1; got 0"):
        ph.even_chunks(0)
    with pytest.raises(ConfigError, match="attention_chunks: length must be at least 1; got 0"):
        ph.attention_chunks(0)
    with pytest.raises(ConfigError, match=r"predictor must be a boundary_predictor\(...\)"):
        ph.learned_chunks(ph.even_chunks(3))
    network = ph.learned_chunks(ph.boundary_predictor(12))
    with pytest.raises(ShapeError, match="reads 12 features of a token, .* the call has 16"):
        attend(q, k, v, mask=ph.causal(), select=ph.dhsa(16, network, local=8, rows=8))


def test_products_are_counted() -> None:
    grid = Grid(1, 4, 2, 640, 640, 64, 1, 1.0)
    assert ph.dhsa(chunks=ph.even_chunks(32)).flops(grid, 8) == 2 * 10 * 20 * 8
