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
