"""ProxyAttn: mean heads rank the blocks, every head says how many it needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import polyhead as ph
from attend.chosen_parts import blocks_read
from polyhead.attend.masks import Chosen, densify
from polyhead.attend.selectors import Grid, Scorer, choose
from polyhead.errors import ConfigError

SHAPES = [
    (2, 4, 2, 96, 96, 16, 16),
    (1, 4, 1, 37, 90, 8, 16),
    (1, 4, 4, 70, 70, 7, 9),
    (1, 4, 2, 1, 70, 1, 8),
]


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int = 16) -> list[Tensor]:
    draw = torch.Generator().manual_seed(queries + keys)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    q, k, v = (torch.randn(batch, h, n, width, generator=draw, dtype=torch.float64) for h, n in sizes)
    return [2 * q, k, v]


def scored(scorer: Scorer, q: Tensor, k: Tensor, rows: int, cols: int) -> Tensor:
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
    grid = Grid(*sizes, rows, cols, q.shape[-1] ** -0.5)
    found, middle = scorer.prepare(q, k, grid), grid.row_blocks // 2
    return torch.cat([found(0, middle), found(middle, grid.row_blocks)], dim=2)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
    seen = densify(ph.causal(), queries=q.shape[2], keys=k.shape[2])
    return logits.masked_fill(~seen, -math.inf).softmax(-1)


def largest(weights: Tensor, rows: int, cols: int) -> Tensor:
    """Of every block of a table the largest number."""
    found = [
        torch.stack([part.amax((-1, -2)) for part in band.split(cols, -1)], -1)
        for band in weights.split(rows, 2)
    ]
    return torch.stack(found, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("groups", "stride"), [(1, 4), (2, 3), (4, 1)])
def test_equals_its_twin(shape: tuple[int, ...], groups: int, stride: int) -> None:
    *sizes, rows, cols = shape
    q, k, _ = tensors(*sizes)
    for mass, least in ((0.5, 1), (0.8, 1), (0.3, 25)):
        call = {"mass": mass, "groups": groups, "stride": stride, "least": least, "rows": rows, "cols": cols}
        assert torch.equal(blocks_read(ph.proxy_attn(**call), q, k), ph.reference("proxy_attn")(q, k, **call))


def test_all_mass_or_a_large_floor_is_plain_attention() -> None:
    x = tensors(2, 4, 2, 90, 90)
    dense = ph.attend(*x, mask=ph.causal())
    for own in (ph.proxy_attn(1.0, least=1, rows=16, cols=16), ph.proxy_attn(0.1, rows=16, cols=16)):
        torch.testing.assert_close(ph.attend(*x, mask=ph.causal(), select=own), dense)


def test_a_group_for_every_head_gives_the_largest_true_weight() -> None:
    q, k, _ = tensors(2, 4, 2, 37, 90)
    found = scored(ph.proxy_heads(4, 1), q, k, 8, 16)
    torch.testing.assert_close(found.exp(), largest(probabilities(q, k), 8, 16))


def test_heads_that_are_alike_score_as_each_does_alone() -> None:
    q, k, _ = tensors(1, 1, 1, 64, 64)
    together = scored(ph.proxy_heads(1, 4), q.expand(-1, 4, -1, -1), k.expand(-1, 2, -1, -1), 16, 16)
    torch.testing.assert_close(together, scored(ph.proxy_heads(1, 4), q, k, 16, 16).expand(-1, 4, -1, -1))


def test_strided_tokens_are_a_softmax_among_themselves() -> None:
    q, k, _ = tensors(1, 4, 4, 64, 64)
    mean = [x.mean(1, keepdim=True)[:, :, ::4] for x in (q, k)]
    found = scored(ph.proxy_heads(1, 4), q, k, 16, 16)
    torch.testing.assert_close(found[:, :1].exp(), largest(probabilities(*mean), 4, 4))


def test_heads_of_a_group_read_nested_blocks() -> None:
    q, k, _ = tensors(1, 4, 4, 128, 128)
    q = q * torch.tensor([0.2, 1.0, 2.0, 4.0], dtype=torch.float64).view(4, 1, 1)  # ever sharper
    for groups in (1, 2):
        found = blocks_read(ph.proxy_attn(0.9, groups=groups, least=1, rows=8, cols=8), q, k)
        sizes = found.sum(-1)
        for one in range(4):
            for other in range(4):
                if one // (4 // groups) == other // (4 // groups):
                    small, large = found[0, one], found[0, other]
                    inside = ~(small & ~large).any(-1)
                    assert (inside | (sizes[0, one] > sizes[0, other])).all()
        assert len(sizes.sum(-1).unique()) > 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_to_come_is_read_and_the_own_block_is(shape: tuple[int, ...]) -> None:
    *sizes, rows, cols = shape
    q, k, _ = tensors(*sizes)
    found = blocks_read(ph.proxy_attn(0.2, least=1, rows=rows, cols=cols), q, k)
    assert found[..., 0].all()
    for m in range(found.shape[2]):
        first = k.shape[2] - q.shape[2] + m * rows
        last = min(first + rows, k.shape[2]) - 1
        assert found[:, :, m, first // cols : last // cols + 1].all()
        assert not found[:, :, m, last // cols + 1 :].any()


def test_what_is_chosen_is_read_exactly() -> None:
    for *sizes, rows, cols in SHAPES:
        x = tensors(*sizes)
        own = ph.proxy_attn(0.6, least=1, rows=rows, cols=cols)
        table = blocks_read(own, *x[:2]).repeat_interleave(rows, 2).repeat_interleave(cols, 3)
        table = table[:, :, : sizes[3], : sizes[4]] & densify(ph.causal(), queries=sizes[3], keys=sizes[4])
        k, v = (t.repeat_interleave(sizes[1] // sizes[2], 1) for t in x[1:])
        weights = (x[0] @ k.mT / 4).masked_fill(~table, -math.inf).softmax(-1)
        torch.testing.assert_close(ph.attend(*x, mask=ph.causal(), select=own), weights @ v)


def test_the_sharper_the_last_queries_the_fewer_blocks() -> None:
    q, k, _ = tensors(1, 1, 1, 128, 128)
    k[:, :, 5] = 3 * q[:, :, -8:].mean(2)
    sizes = []
    for factor in (0.0, 0.3, 1.0, 3.0):
        sharp = q.clone()
        sharp[:, :, -8:] = factor * q[:, :, -8:].mean(2, keepdim=True)
        own = ph.select(ph.proxy_heads(), ph.keep_last_mass(0.95), rows=8, cols=8)
        sizes.append(int(blocks_read(own, sharp, k)[0, 0, -1].sum()))
    assert sizes[0] == 15  # alike everywhere, and of the 16th block the last queries see but a part
    assert sizes[-1] == 1  # one key has it all
    assert sizes == sorted(sizes, reverse=True)


def test_a_budget_from_the_last_queries_goes_with_other_scorers() -> None:
    q, k, _ = tensors(1, 2, 2, 64, 64)
    own = ph.select(ph.mean_keys(), ph.keep_last_mass(0.7, least=9), rows=8, cols=8)
    found = blocks_read(own, q, k)
    last = probabilities(q, k)[:, :, -8:].sum(2).unflatten(2, (8, 8)).sum(-1) / 8
    held = last.sort(-1, descending=True).values.cumsum(-1)
    counts = ((held < 0.7).sum(-1) + 1).clamp(min=2)
    fixed = ph.select(ph.mean_keys(), ph.keep_blocks(counts[0]), rows=8, cols=8)
    assert torch.equal(found, blocks_read(fixed, q, k))


def test_what_stands_at_padding_does_not_count() -> None:
    q, k, _ = tensors(2, 4, 2, 64, 64)
    mask = ph.causal() & ph.padding(torch.arange(64) >= torch.tensor([[0], [24]]))
    own = ph.proxy_attn(0.6, least=1, rows=8, cols=8)
    before = choose(own, q, k, mask, 0.25)
    q[1, :, :24], k[1, :, :24] = 50.0, -70.0
    after = choose(own, q, k, mask, 0.25)
    assert isinstance(before, Chosen)
    assert isinstance(after, Chosen)
    assert torch.equal(before.index[:, :, 3:], after.index[:, :, 3:])  # rows 0 to 2 of one are padding


def test_it_is_a_value_and_wrong_input_is_said() -> None:
    own = ph.proxy_attn(0.9, groups=2)
    assert ph.from_json(ph.to_json(own)) == own
    x = tensors(1, 4, 4, 16, 16)
    with pytest.raises(ConfigError, match="groups must divide the 4 heads; got 3"):
        ph.attend(*x, select=ph.proxy_attn(groups=3))
    with pytest.raises(ConfigError, match="keep_last_mass: mass must be a finite number at least 0 and at"):
        ph.proxy_attn(1.1)
    with pytest.raises(ConfigError, match="proxy_heads: stride must be at least 1; got 0"):
        ph.proxy_heads(1, 0)
    with pytest.raises(ConfigError, match="keep_last_mass: least must be at least 1; got 0"):
        ph.keep_last_mass(0.5, 0)
