"""What tiles can gain on a mask, in numbers."""

from __future__ import annotations

import math

import pytest
import torch

import polyhead as ph
from polyhead.attend.grid_tiles import kinds
from polyhead.attend.masks import Mask, densify
from polyhead.errors import ConfigError


@pytest.mark.parametrize(("stride", "share"), [(1, 2 / 3), (2, 2 / 3), (4, 1 / 2), (8, 5 / 9), (12, 1 / 2)])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_numbers_of_a_cube(stride: int, share: float, axes: int) -> None:
    found = ph.simulate(ph.neighborhood((24,) * axes, 12, stride=stride), 4)
    assert found.share == pytest.approx(share**axes)
    assert found.speedup == pytest.approx(share**-axes)
    assert found.flop_bound == 2**axes
    assert found.block_sparse == (stride in (4, 12))
    assert found.full == found.visited or not found.block_sparse


@pytest.mark.parametrize(("stride", "share"), [(1, 0.625), (2, 0.625), (4, 0.625), (8, 0.5)])
def test_the_numbers_of_a_line(stride: int, share: float) -> None:
    assert ph.simulate(ph.neighborhood(16, 8, stride=stride), 4).share == share


def counted(mask: Mask, tile: tuple[int, ...], key_tile: tuple[int, ...]) -> tuple[int, ...]:
    """Tiles, visited, full, read and allowed, pair by pair."""
    seen = densify(mask, queries=mask.places, keys=mask.places)[0, 0]
    at = torch.cartesian_prod(*map(torch.arange, mask.grid)).view(mask.places, -1)
    step = torch.tensor(mask.dilation)

    def tile_of(sizes: tuple[int, ...]) -> torch.Tensor:
        name = torch.cat([at % step, at // step // torch.tensor(sizes)], 1)
        return name.unique(dim=0, return_inverse=True)[1]

    rows, cols = tile_of(tile), tile_of(key_tile)
    area = torch.zeros(int(rows.max()) + 1, int(cols.max()) + 1, dtype=torch.long)
    inside = area.clone()
    where = rows[:, None].expand_as(seen), cols[None].expand_as(seen)
    area.index_put_(where, torch.ones_like(seen, dtype=torch.long), accumulate=True)
    inside.index_put_(where, seen.long(), accumulate=True)
    some = inside > 0
    return area.numel(), int(some.sum()), int((inside == area).sum()), int(area[some].sum()), int(seen.sum())


@pytest.mark.parametrize(
    ("mask", "tile", "key_tile"),
    [
        (ph.neighborhood(29, 6, stride=3), (4,), (5,)),
        (ph.neighborhood(29, 6, dilation=4, stride=2), (3,), (2,)),
        (ph.neighborhood(29, 5, causal=True, stride=4), (4,), (4,)),
        (ph.neighborhood((9, 10), (4, 3), dilation=(2, 3)), (2, 2), (3, 2)),
        (ph.neighborhood((8, 12), (4, 6), causal=(True, False), stride=(4, 3)), (4, 3), (4, 3)),
        (ph.neighborhood((4, 6, 5), (2, 3, 5), causal=(True, False, False)), (2, 2, 2), (1, 3, 5)),
    ],
    ids=repr,
)
def test_it_counts_right(mask: Mask, tile: tuple[int, ...], key_tile: tuple[int, ...]) -> None:
    found = ph.simulate(mask, tile, key_tile)
    own = found.tiles, found.visited, found.full, found.read, found.allowed
    assert own == counted(mask, tile, key_tile)
    assert found.pairs == mask.places**2
    assert found.share >= 1 / found.flop_bound or found.pairs != found.tiles * math.prod(tile + key_tile)


@pytest.mark.parametrize("causal", [False, True])
def test_perfect_where_strides_windows_and_their_starts_fit_the_tiles(causal: bool) -> None:
    perfect = 0
    for window in (4, 8, 12):
        for stride in range(1, window + 1):
            found = ph.simulate(ph.neighborhood(24, window, stride=stride, causal=causal), 4)
            rule = not stride % 4 and not (stride // 2 - window // 2) % 4
            if not causal:
                assert found.block_sparse == rule
            perfect += found.block_sparse
            assert found.share >= 1 / found.flop_bound
    assert perfect == (0 if causal else 4)


def test_what_the_backend_reads_is_what_single_keys_as_tiles_give() -> None:
    for stride in (1, 2, 4, 8, 12):
        mask = ph.neighborhood((24, 24), 12, stride=stride)
        read = sum(
            kind.queries((24, 24)).numel() * kind.keys((24, 24)).shape[1]
            for kind in kinds(mask.axes(), (4, 4))
        )
        assert read == ph.simulate(mask, 4, 1).read


def test_any_mask_in_runs_of_positions() -> None:
    found = ph.simulate(ph.causal(), 16, keys=64)
    assert (found.tiles, found.visited, found.full) == (16, 10, 6)
    assert found.allowed == 64 * 65 // 2
    assert found.speedup == 1.6
    assert not found.block_sparse
    assert ph.simulate(ph.blocks(16), 16, keys=64).block_sparse
    heads = ph.per_head([ph.window(3), ph.causal()]) & ph.padding(
        torch.arange(50) < torch.tensor([[50], [13]])
    )
    found = ph.simulate(heads, 8, 5, queries=30, keys=50, batch=2, heads=2)
    seen = densify(heads, batch=2, heads=2, queries=30, keys=50)
    assert found.allowed == int(seen.sum())
    assert found.pairs == seen.numel()
    assert found.tiles == 4 * 4 * 10
    blank = torch.nn.functional.pad(seen.float(), (0, 0, 0, 2))
    assert found.visited == int((torch.nn.functional.max_pool2d(blank, (8, 5)) > 0).sum())
    mask = ph.neighborhood((16, 16), 4) & ph.causal()
    assert ph.simulate(mask, 16, keys=256).allowed == int(densify(mask, queries=256, keys=256).sum())


@pytest.mark.parametrize(
    "mask",
    [
        ph.where(lambda b, h, i, j: (j <= i) & (j % 3 > b)),
        ph.causal() & ph.padding(torch.arange(64) >= torch.tensor([[0], [29]])),
        ph.documents(torch.tensor([0, 2] * 30 + [1] * 4)) & ph.window(20),
        ph.per_head([ph.causal(), ph.window(9) & ph.padding(torch.arange(64)[None] % 16 > 12)]),
        ph.strided(3) | ph.blocks(7),
    ],
    ids=repr,
)
def test_tiles_of_which_a_mask_knows_little_are_asked(mask: Mask) -> None:
    seen = densify(mask, batch=2, heads=2, queries=60, keys=64).expand(2, 2, -1, -1)
    for tile, key_tile in ((8, 16), (16, 5), (1, 64)):
        tiles = [part for band in seen.split(tile, 2) for part in band.split(key_tile, 3)]
        some = [part.flatten(2).any(-1) for part in tiles]
        found = ph.simulate(mask, tile, key_tile, queries=60, keys=64, batch=2, heads=2)
        assert found.tiles == 4 * len(tiles)
        assert found.visited == sum(int(one.sum()) for one in some)
        assert found.full == sum(int(part.flatten(2).all(-1).sum()) for part in tiles)
        assert found.read == sum(
            int(one.sum()) * part[0, 0].numel() for one, part in zip(some, tiles, strict=True)
        )
        assert found.allowed == int(seen.sum())


def test_how_it_prints() -> None:
    assert str(ph.simulate(ph.neighborhood((24, 24), 12, stride=4), 4)).splitlines() == [
        "neighborhood((24, 24), 12, stride=4), tiles of 4×4 by 4×4",
        "visited   324 of 1,296 tiles (25.0%), all of them whole",
        "speed-up  at most 4.00 x; pairs alone would give 4.00 x",
        "in vain   0.0% of the pairs that are read",
    ]
    assert "0 of them whole" in str(ph.simulate(ph.window(2), 16, keys=64))


def test_what_does_not_fit_is_said() -> None:
    mask = ph.neighborhood((8, 8), 3)
    for call, said in (
        (lambda: ph.simulate("causal", 4), "mask must be a mask"),
        (lambda: ph.simulate(mask, (4, 4, 4)), "tile needs one value, or one for each of the 2 axes"),
        (lambda: ph.simulate(mask, 0), r"tile\[0\] must be at least 1; got 0"),
        (lambda: ph.simulate(mask, 4, keys=64), "keys must be left out, the grid says it; got 64"),
        (lambda: ph.simulate(ph.causal(), 4), "keys must be given"),
        (lambda: ph.simulate(ph.causal() & mask, (4, 4), keys=64), "one number unless the mask is"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
