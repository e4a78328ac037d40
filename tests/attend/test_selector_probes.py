"""Selectors that ask a few queries ask real ones: an item of a padded batch chooses as it does alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend import attend
from polyhead.attend.selectors import Grid, Selector, choose
from polyhead.attend.selectors.probes import even_probes, last_probes

S, REAL, ROWS = 96, 64, 16
CPU = torch.device("cpu")
PLAIN = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=ROWS, cols=4)
SELECTORS: dict[str, Selector] = {
    "vertical_slash": ph.vertical_slash(8, 4, first=3, nearest=2, probes=16, rows=ROWS, cols=1),
    "more probes than tokens": ph.vertical_slash(8, 4, first=3, nearest=2, probes=80, rows=ROWS, cols=4),
    "keep_last_mass": ph.select(ph.mean_keys(), ph.keep_last_mass(0.3), rows=ROWS, cols=4),
    "guarded": ph.guarded(PLAIN, 0.5, probes=10),
    "guarded, all": ph.guarded(PLAIN, 0.5, probes=80),
    "together": ph.select(ph.mean_keys(), ph.together(ph.keep_share(0.3)), rows=ROWS, cols=4),
}


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(queries + keys)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [3 * torch.randn(batch, n, m, 16, generator=draw, dtype=torch.float64) for n, m in shapes]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SELECTORS)
def test_an_item_of_a_batch_chooses_as_it_does_alone(name: str, side: str) -> None:
    q, k, v = tensors(2, 4, 2, S, S)
    own = slice(S - REAL, S) if side == "left" else slice(0, REAL)
    real = torch.zeros(2, S, dtype=torch.bool)
    real[0], real[1, own] = True, True
    mask, select = ph.causal() & ph.padding(real), SELECTORS[name]
    with ph.selections() as batch:
        found = attend(q, k, v, mask=mask, select=select)
    expected = []
    with ph.selections() as single:
        for item, part in ((0, slice(None)), (1, own)):
            cut = (x[item : item + 1, :, part] for x in (q, k, v))
            expected.append(attend(*cut, mask=ph.causal(), select=select))
    torch.testing.assert_close(found[:1], expected[0])
    torch.testing.assert_close(found[1:, :, own], expected[1])
    if batch.missed:
        torch.testing.assert_close(batch.missed[0], torch.cat(single.missed))
    for garbage in (7.0, torch.nan):
        other = torch.where(real[:, None, :, None], q, garbage * (1 + torch.rand_like(q)))
        after = attend(other, k, v, mask=mask, select=select)
        assert torch.equal(found[real[:, None].expand(-1, 4, -1)], after[real[:, None].expand(-1, 4, -1)])


def test_a_guard_measures_real_queries() -> None:
    q, k, v = tensors(2, 4, 2, S, S)
    real = torch.arange(S) < torch.tensor([[S], [37]])
    mask = ph.causal() & ph.padding(real)
    with ph.selections() as seen:
        attend(q, k, v, mask=mask, select=ph.guarded(PLAIN, 1.0, probes=S))
    true = ph.missed_mass(q, k, v, mask=mask, select=PLAIN).mass
    torch.testing.assert_close(seen.missed[0][0], true[0].mean(-1))
    torch.testing.assert_close(seen.missed[0][1], true[1, :, :37].mean(-1))


def test_the_first_keys_are_those_of_the_text() -> None:
    q, k, _ = tensors(2, 4, 2, S, S)
    real = torch.arange(S) >= torch.tensor([[0], [41]])
    own = ph.vertical_slash(8, 1, first=8, nearest=1, rows=1, cols=1)
    found = choose(own, q, k, ph.causal() & ph.padding(real), 0.25).index
    for item, start in enumerate((0, 41)):
        for head in range(4):
            last = sorted(x for x in found[item, head, -1].tolist() if x >= 0)
            assert last == [*range(start, start + 8), S - 1]


def test_which_queries_are_asked() -> None:
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1, 0], [0] * 8]).bool()
    grid = Grid(3, 1, 1, 6, 8, 1, 1, 1.0, real)  # queries stand at 2 to 7
    last = last_probes(grid, 3, CPU)
    assert last.there.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    assert last.positions[:2, 0, :, 0].tolist() == [[5, 6, 7], [3, 5, 6]]
    even = even_probes(grid, 3, CPU)
    assert even.there.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    assert even.positions[:2, 0, :, 0].tolist() == [[2, 5, 7], [2, 5, 6]]
    many = even_probes(grid, 5, CPU)
    assert many.there[1].tolist() == [True] * 4 + [False]
    assert many.positions[1, 0, :4, 0].tolist() == [2, 3, 5, 6]
    assert even_probes(Grid(1, 1, 1, 9, 9, 1, 1, 1.0), 1, CPU).rows.tolist() == [[0]]
    before = last_probes(Grid(3, 1, 1, 10, 8, 1, 1, 1.0, real), 9, CPU)  # two queries before the first key
    assert before.positions[1, 0, -6:, 0].tolist() == [-2, -1, 2, 3, 5, 6]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*SELECTORS, "proxy_attn"])
def test_more_queries_than_keys(name: str, padded: bool) -> None:
    q, k, v = tensors(2, 4, 2, 50, 30)
    select = SELECTORS.get(name, ph.proxy_attn(0.6, least=1, rows=ROWS, cols=4))
    mask = ph.causal()
    if padded:
        mask = mask & ph.padding(torch.arange(30) < torch.tensor([[30], [17]]))
    out = attend(q, k, v, mask=mask, select=select)
    assert torch.equal(out[:, :, :20], torch.zeros_like(out[:, :, :20]))  # before the first key
    assert (out[:, :, -1] != 0).any(-1).all()
    assert attend(q, k, v, select=select).isfinite().all()
