"""Strips of a call: the map of tiles is looked at a band at a time, and nothing depends on how much of it."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph
from polyhead.attend import strips as module
from polyhead.attend.strips import Frame, Strip, strips

QUERIES, KEYS, BATCH, HEADS = 700, 900, 2, 4


def masks() -> dict[str, ph.Mask]:
    random = torch.Generator().manual_seed(0)
    real = torch.rand(BATCH, KEYS, generator=random) > 0.3
    real[:, :8] = True
    ids = torch.randint(0, 9, (BATCH, KEYS), generator=random).sort(dim=1).values
    return {
        "causal": ph.causal(),
        "window and sink": ph.causal() & (ph.window(100) | ph.sink(4)),
        "padding": ph.causal() & ph.padding(real),
        "documents": ph.causal() & ph.documents(ids),
        "per head": ph.per_head([ph.causal(), ph.window(60), ph.causal() & ph.strided(3), ph.blocks(256)]),
        "far only": ph.causal() & ~ph.window(500),
    }


def made(mask: ph.Mask | None) -> list[Strip]:
    frame = Frame(BATCH, HEADS, HEADS // 2, QUERIES, KEYS, torch.device("cpu"))
    return list(strips(frame, mask))


@pytest.mark.parametrize("tiles", [1, 250])
@pytest.mark.parametrize("name", masks())
def test_the_bound_of_the_tile_map_changes_nothing(
    name: str, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = masks()[name]
    random = torch.Generator().manual_seed(1)
    q = torch.randn(BATCH, HEADS, QUERIES, 8, generator=random, requires_grad=True)
    k = torch.randn(BATCH, HEADS // 2, KEYS, 8, generator=random, requires_grad=True)
    sizes: list[int] = []
    tile_map = module.tile_map

    def counting(*args: object, **options: object) -> object:
        found = tile_map(*args, **options)  # type: ignore[arg-type]
        sizes.append(BATCH * HEADS * found.some.shape[2] * found.some.shape[3])
        return found

    def run() -> tuple[list[Strip], list[torch.Tensor]]:
        out = ph.attend(q, k, k, mask=mask, backend="tiles")
        return made(mask), [out, *torch.autograd.grad(out.square().sum(), (q, k))]

    monkeypatch.setattr(module, "tile_map", counting)
    whole, answers = run()
    assert max(sizes) > tiles
    many = len(sizes)
    sizes.clear()
    monkeypatch.setattr(module, "_TILES", tiles)
    bounded, same = run()
    assert len(sizes) > many  # it was looked at piece by piece
    assert max(sizes) <= max(tiles, BATCH * HEADS * -(-KEYS // 64))
    assert bounded == whole
    for a, b in zip(answers, same, strict=True):
        assert torch.equal(a, b)


def test_short_batch_items_go_together_and_long_ones_that_differ_do_not() -> None:
    def made_of(lengths: list[int], tokens: int) -> list[Strip]:
        real = torch.arange(tokens) < torch.tensor(lengths)[:, None]
        frame = Frame(len(lengths), 2, 2, tokens, tokens, torch.device("cpu"))
        return list(strips(frame, ph.padding(real)))

    assert [(s.b0, s.b1) for s in made_of([8, 3, 0, 5] * 64, 8)] == [(0, 256)]
    long = made_of([512, 64, 64, 512], 512)
    assert {(s.b0, s.b1, s.columns) for s in long} == {(0, 1, 512), (1, 3, 64), (3, 4, 512)}
    rows = sum((s.r1 - s.r0) * (s.b1 - s.b0) * (s.g1 - s.g0) for s in long)
    assert rows == 512 * 4 * 2  # every row of every head, once


@pytest.mark.parametrize("kept", [[8, 3, 0, 5], [128, 60, 0, 70]])
def test_items_that_go_together_read_what_each_may_read(kept: list[int]) -> None:
    random = torch.Generator().manual_seed(2)
    tokens = max(kept)
    q = torch.randn(4, 2, tokens, 8, generator=random, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 4, 2, tokens, 8, generator=random, dtype=torch.float64, requires_grad=True)
    mask = ph.causal() & ph.padding(torch.arange(tokens) < torch.tensor(kept)[:, None])
    together = ph.attend(q, k, v, mask=mask, backend="tiles")
    alone = torch.zeros_like(together)
    for item, count in enumerate(kept):
        if count:
            one = slice(item, item + 1)
            read = k[one, :, :count], v[one, :, :count]
            scores = q[one] @ read[0].transpose(-1, -2) / 8**0.5
            late = torch.arange(count) > torch.arange(tokens)[:, None]
            alone[one] = scores.masked_fill(late, -torch.inf).softmax(-1) @ read[1]
    torch.testing.assert_close(together, alone)
    leaves = (q, k, v)
    ours, theirs = (torch.autograd.grad(y.square().sum(), leaves) for y in (together, alone))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
