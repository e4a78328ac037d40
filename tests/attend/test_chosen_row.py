"""One query by chosen blocks: what the dense form gives, however the keys lie in memory."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

import polyhead as ph
from attend.operands import draw
from polyhead.attend import attend
from polyhead.attend.function import explain


def chosen(share: float, heads: int, batch: int, blocks: int, cols: int, keys: int) -> ph.Mask:
    """Blocks drawn for every head, unequally many, in any order and with -1 between."""
    found = draw(batch, heads, 1, blocks, seed=3).argsort(-1)
    found[draw(batch, heads, 1, blocks, seed=4).sigmoid() > share] = -1
    return ph.chosen(found, rows=1, cols=cols, first=keys - 1)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers, as caches and models hold them."""
    batch, heads, keys, width = x.shape
    room = torch.full((batch, heads, keys + 9, width), torch.nan, dtype=x.dtype)
    room[:, :, 4 : keys + 4] = x
    return {
        "contiguous": x.contiguous(),
        "in a buffer": room[:, :, 4 : keys + 4],
        "tokens first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "apart": x.mT.contiguous().mT,
    }


REST = {
    "none": None,
    "causal": ph.causal(),
    "window": ph.causal() & ph.window(30),
    "heads": ph.causal() & ph.where(lambda b, h, i, j: (j + h + b) % 3 != 0),
}


@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.95])
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(2, 6, 2), (1, 4, 4), (3, 3, 1)])
@pytest.mark.parametrize(("keys", "cols"), [(61, 4), (64, 4), (8, 8), (61, 1), (61, 30)])
def test_equals_the_dense_form(
    rest: str, share: float, batch: int, heads: int, kv_heads: int, keys: int, cols: int
) -> None:
    q, k, v = draw(batch, heads, 1, 8), draw(batch, kv_heads, keys, 8, seed=1), draw(batch, kv_heads, keys, 8)
    choice = chosen(share, heads, batch, -(-keys // cols), cols, keys)
    mask = choice if REST[rest] is None else choice & REST[rest]
    assert explain(q, k, v, mask=mask).backend in ("chosen", "sdpa")
    expected = attend(q, k, v, mask=mask, backend="reference")
    lse = attend(q, k, v, mask=mask, backend="reference", return_lse=True)[1]
    for name, keys_there in layouts(k).items():
        found = attend(q, keys_there, layouts(v)[name], mask=mask, backend="chosen", return_lse=True)
        torch.testing.assert_close(found[0], expected)
        torch.testing.assert_close(found[1], lse)
        # single precision has a way of its own
        single = [x.float() for x in (q, layouts(k)[name], layouts(v)[name])]
        for want_lse in (False, True):
            given = attend(*single, mask=mask, backend="chosen", return_lse=want_lse)
            out = given[0] if want_lse else given
            torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(given[1], lse.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_and_padding(dtype: torch.dtype) -> None:
    q, k, v = draw(2, 6, 1, 8), draw(2, 2, 61, 8, seed=1), draw(2, 2, 61, 8, seed=2)
    real = draw(2, 61, seed=5) > -0.5
    mask = chosen(0.3, 6, 2, 16, 4, 61) & ph.padding(real)
    expected = attend(q, k, v, mask=mask, backend="reference")
    found = attend(*(x.to(dtype) for x in (q, k, v)), mask=mask, backend="chosen")
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("want_lse", [False, True])
def test_groups_in_turn_are_groups_at_once(
    dtype: torch.dtype, want_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (draw(2, n, m, 8, seed=m).to(dtype) for n, m in ((6, 1), (3, 90), (3, 90)))
    mask = chosen(0.1, 6, 2, 23, 4, 90)
    at_once = attend(q, k, v, mask=mask, backend="chosen", return_lse=want_lse)
    monkeypatch.setattr(import_module("polyhead.attend.chosen_row"), "_BYTES", 1)
    in_turn = attend(q, k, v, mask=mask, backend="chosen", return_lse=want_lse)
    torch.testing.assert_close(in_turn, at_once)


def test_heads_that_see_nothing_give_zeros() -> None:
    q, k, v = draw(1, 4, 1, 8), draw(1, 2, 40, 8, seed=1), draw(1, 2, 40, 8, seed=2)
    index = torch.tensor([[[[3, 1]], [[-1, -1]], [[-1, -1]], [[-1, -1]]]])
    mask = ph.chosen(index, rows=1, cols=4, first=39)
    found, lse = attend(q, k, v, mask=mask, backend="chosen", return_lse=True)
    assert bool((found[:, 1:] == 0).all())
    assert bool((found[:, 0] != 0).all())
    assert lse.isneginf().flatten().tolist() == [False, True, True, True]
    none, lse = attend(
        q,
        k,
        v,
        mask=ph.chosen(index[:, 3:].expand(-1, 4, -1, -1), rows=1, cols=4, first=39),
        backend="chosen",
        return_lse=True,
    )
    assert not bool(none.any())
    assert bool(lse.isneginf().all())


def test_keys_that_nobody_chose_are_not_read() -> None:
    q, k, v = draw(1, 6, 1, 8), draw(1, 2, 61, 8, seed=1), draw(1, 2, 61, 8, seed=2)
    index = torch.tensor([0, 7, 15]).view(1, 1, 1, 3)  # the last block is ragged
    mask = ph.chosen(index, rows=1, cols=4, first=60)
    expected = attend(q, k, v, mask=mask, backend="reference")
    read = torch.tensor([*range(4), *range(28, 32), 60])
    hidden = torch.ones(61, dtype=torch.bool).index_fill(0, read, False)
    hidden[57:60] = False  # the ragged block is read together with keys before it, which weigh nothing
    k[:, :, hidden], v[:, :, hidden] = torch.nan, torch.nan
    torch.testing.assert_close(attend(q, k, v, mask=mask, backend="chosen"), expected)


def test_the_planner_takes_it_for_many_keys() -> None:
    q, k, v = draw(1, 6, 1, 8), draw(1, 2, 600, 8, seed=1), draw(1, 2, 600, 8, seed=2)
    mask = chosen(0.2, 6, 1, 38, 16, 600) & ph.causal()
    assert explain(q, k, v, mask=mask).backend == "chosen"
    assert "blocks of them were chosen" in str(explain(q, k, v, mask=mask))
    torch.testing.assert_close(attend(q, k, v, mask=mask), attend(q, k, v, mask=mask, backend="reference"))
    few = chosen(0.2, 6, 1, 25, 16, 400)
    assert explain(q, k[:, :, :400], v[:, :, :400], mask=few).backend == "sdpa"
    assert explain(q.requires_grad_(), k, v, mask=mask).backend == "sdpa"
