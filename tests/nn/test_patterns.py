"""What a mask says of the pattern of a call."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph
from polyhead.errors import UnsupportedPattern
from polyhead.nn.patterns import looks_ahead, never_ahead


def mixed(*masks: ph.Mask) -> ph.Mask:
    return ph.per_head(list(masks))


def test_one_causal_head_is_enough_to_be_causal_and_one_that_is_not_to_look_ahead() -> None:
    both = ph.window(2, 2)
    for mask, causal, ahead in (
        (ph.causal(), True, False),
        (ph.causal() & ph.sink(2), True, False),
        (both, False, True),
        (mixed(ph.causal(), both), True, True),
        (mixed(both, ph.causal()), True, True),
        (mixed(both, both), False, True),
        (mixed(ph.causal(), ph.window(3)), True, False),
    ):
        assert never_ahead(mask, 0, 6, 6, heads=2) is causal, mask
        assert looks_ahead(mask, 0, 6, 6, heads=2) is ahead, mask


def test_one_item_that_looks_ahead_is_enough_not_to_be_causal() -> None:
    ids = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]])
    for swapped in (ids, ids.flip(0)):
        assert not never_ahead(ph.documents(swapped), 0, 4, 4, batch=2)
        assert looks_ahead(ph.documents(swapped), 0, 4, 4, batch=2)
    assert never_ahead(ph.documents(ids[:1]), 0, 4, 4, batch=1)


def test_without_a_later_key_there_is_nothing_to_hide() -> None:
    for mask in (ph.causal(), ph.window(2, 2)):
        assert not never_ahead(mask, 5, 1, 6)
        assert not looks_ahead(mask, 5, 1, 6)
    assert not looks_ahead(None, 5, 1, 6)
    assert looks_ahead(None, 0, 6, 6)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_bottleneck_refuses_a_causal_mask_of_any_head(order: tuple[int, int]) -> None:
    module = ph.build("attention_bottleneck", dim=8, heads=2)
    masks = (ph.causal(), ph.window(9, 9))
    with pytest.raises(UnsupportedPattern, match="does not support causal masks"):
        module(torch.randn(2, 5, 8), mask=mixed(*(masks[n] for n in order)))
