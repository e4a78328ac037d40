"""Selectors that look at no content."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph
from polyhead.attend.masks import densify
from polyhead.attend.selectors import choose
from polyhead.errors import ConfigError


def test_token_by_token_it_is_its_mask() -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 40, 8, generator=draw)
    k, v = (torch.randn(1, 1, 60, 8, generator=draw) for _ in range(2))
    own = ph.a_shape(4, 10, rows=1, cols=1)
    expected = ph.attend(q, k, v, mask=ph.causal() & (ph.sink(4) | ph.window(9)))
    torch.testing.assert_close(ph.attend(q, k, v, mask=ph.causal(), select=own), expected)


@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (37, 90), (1, 70)])
def test_blocks_that_hold_something_of_the_mask_equal_the_twin(queries: int, keys: int) -> None:
    q, k = torch.zeros(1, 2, queries, 4), torch.zeros(1, 1, keys, 4)
    found = choose(ph.a_shape(3, 12, rows=8, cols=16), q, k, ph.causal(), 1.0)
    table = ph.reference("a_shape")(q, k, first=3, nearest=12, rows=8, cols=16)
    wide = table.repeat_interleave(8, 2)[:, :, :queries].repeat_interleave(16, 3)[..., :keys]
    assert torch.equal(densify(found, heads=2, queries=queries, keys=keys).expand_as(wide), wide)


def test_it_adds_without_taking_from_a_budget() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 64, 8, generator=draw) for _ in range(2))

    def read(own: ph.Selector) -> torch.Tensor:
        return densify(choose(own, q, k, ph.causal(), 0.3), heads=2, queries=64, keys=64)

    best = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=8, cols=8)
    first = ph.fixed(ph.sink(1), rows=8, cols=8)
    assert torch.equal(read(best | first), read(best) | read(first))


def test_wrong_input_is_said() -> None:
    with pytest.raises(ConfigError, match="fixed: mask must be a mask such as sink"):
        ph.fixed(4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fixed: rows must be at least 1; got 0"):
        ph.fixed(ph.sink(1), rows=0)
    with pytest.raises(ConfigError, match="a_shape: nearest must be at least 1; got 0"):
        ph.a_shape(1, 0)
    assert ph.from_json(ph.to_json(ph.a_shape(4, 256))) == ph.a_shape(4, 256)
