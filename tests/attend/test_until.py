"""A mask of keys that are seen for a while."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph
from polyhead.attend.masks import densify, tile_map, until
from polyhead.errors import ConfigError, ShapeError

STOP = torch.randint(-3, 60, (2, 3, 53), generator=torch.Generator().manual_seed(0))
PAIRS = torch.arange(16, 53)[:, None] < STOP[:, :, None]


def test_pairs_and_tiles_are_those_before_the_end() -> None:
    mask = until(STOP)
    assert torch.equal(densify(mask, batch=2, heads=3, queries=37, keys=53), PAIRS)
    for height, width in ((4, 4), (8, 5), (37, 53), (3, 7), (1, 1)):
        tiles = tile_map(mask, batch=2, heads=3, queries=37, keys=53, rows=height, cols=width)
        for r in range(tiles.some.shape[2]):
            for c in range(tiles.some.shape[3]):
                here = PAIRS[:, :, r * height : (r + 1) * height, c * width : (c + 1) * width].flatten(2)
                assert torch.equal(tiles.some[:, :, r, c], here.any(-1))
                assert torch.equal(tiles.every[:, :, r, c], here.all(-1))


def test_one_item_or_one_head_stands_for_all() -> None:
    for stop in (STOP[:1], STOP[:, :1], STOP[:1, :1]):
        found = densify(until(stop), batch=2, heads=3, queries=37, keys=53)
        assert torch.equal(
            found.expand(2, 3, -1, -1),
            (torch.arange(16, 53)[:, None] < stop[:, :, None]).expand(2, 3, -1, -1),
        )


@pytest.mark.parametrize("backend", ["tiles", "auto"])
def test_it_combines_and_runs(backend: str) -> None:
    mask = ph.causal() & (until(STOP) | ph.sink(2))
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64).requires_grad_() for n in (37, 53, 53))
    out = ph.attend(q, k, v, mask=mask, backend=backend)
    expected = ph.attend(q, k, v, mask=mask, backend="reference")
    torch.testing.assert_close(out, expected)
    for got, want in zip(
        torch.autograd.grad(out.sin().sum(), (q, k, v)),
        torch.autograd.grad(expected.sin().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    assert ph.from_json(ph.to_json(mask)) == mask
    assert repr(until(STOP)).startswith("until(")


def test_what_does_not_fit_is_said() -> None:
    for stop in (STOP.double(), STOP[0], None):
        with pytest.raises(ConfigError, match=r"until: stop must be an integer tensor \(B, H, S\)"):
            until(stop)  # type: ignore[arg-type]
    x = [torch.randn(2, 3, 20, 8) for _ in range(3)]
    with pytest.raises(
        ShapeError, match=r"stop has shape \(2, 3, 53\), but the call has 2 batch items, 3 heads"
    ):
        ph.attend(*x, mask=until(STOP))
