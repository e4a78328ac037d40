"""Transformers' mask functions in the mask algebra: the same pairs, and spelled as one would."""

import pytest
import torch
from transformers import masking_utils as theirs

from hf.tiny import llama, padding, tokens
from polyhead.attend.masks import densify
from polyhead.hf import attach
from polyhead.hf.mask_tensor import MaskTensor
from polyhead.hf.masks import mask_function

LEFT = torch.tensor([0, 3])
IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 2, 2, 2]])
GROUPS = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1], [-1, -1, -1, 0, 0, -1, -1, -1, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 0, 1, 2]])
REAL = torch.tensor([[False, False, True, True, True, True, True, True, True], [True] * 9])


def odd(b, h, q, k):
    return (q + k) % 2 == 1


def packed(inner):
    return theirs.packed_sequence_compatibility_function(inner, POSITIONS, IDS)


PACKED = {
    "documents(<int64 2×9>) & causal() ": packed(theirs.causal_mask_function),
    "documents(<int64 2×9>) & window(1)": packed(theirs.sliding_window_causal_mask_function(2)),
    "where( ": packed(theirs.chunked_causal_mask_function(2, LEFT)),
}  # without a cache only
FUNCTIONS = {
    "causal()": theirs.causal_mask_function,
    "None": theirs.bidirectional_mask_function,
    "window(2)": theirs.sliding_window_causal_mask_function(3),
    "window(3, 3)": theirs.sliding_window_bidirectional_mask_function(3),
    "blocks(3) & causal()": theirs.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)),
    "documents(<int64 2×9>) & causal()": theirs.chunked_causal_mask_function(3, LEFT),
    "causal() | documents(<int64 2×9>)": theirs.or_masks(
        theirs.causal_mask_function, theirs.blockwise_overlay(GROUPS)
    ),
    "causal() & padding(<bool 2×9>)": theirs.and_masks(
        theirs.causal_mask_function, theirs.padding_mask_function(REAL)
    ),
    "where(": theirs.and_masks(theirs.causal_mask_function, odd),
}


def ask(function, queries, keys, q_offset=0, kv_offset=0, attention_mask=None, **more):
    arguments = {
        "batch_size": 2,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": attention_mask,
        "device": torch.device("cpu"),
        **more,
    }
    return mask_function(**arguments), theirs.sdpa_mask(**arguments, allow_is_causal_skip=False)


def dense(mask: MaskTensor):
    """The mask of the held keys written out, and False for the unfilled end of the cache."""
    batch, _, queries, keys = mask.shape
    found = torch.ones(batch, 1, queries, mask.visible, dtype=torch.bool)
    if mask.mask is not None:
        shape = {"batch": batch, "heads": 1, "queries": queries, "keys": mask.visible}
        mask.mask.check(**shape, offset=mask.visible - queries)
        found = densify(mask.mask, **shape).expand(batch, 1, -1, -1)
    return torch.nn.functional.pad(found, (0, keys - mask.visible))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spelling", FUNCTIONS | PACKED)
def test_full_pass(spelling, padded):
    mask, expected = ask((FUNCTIONS | PACKED)[spelling], 9, 9, attention_mask=REAL if padded else None)
    assert torch.equal(dense(mask), expected)
    if not padded:
        assert repr(mask.mask).startswith(spelling.strip())


# query length, key length, token of the first query, token of the first key
PLACES = {
    "decode": (1, 9, 8, 0),
    "chunk": (3, 9, 6, 0),
    "static, filling": (3, 9, 2, 0),
    "static, one": (1, 9, 4, 0),
    "sliding": (2, 4, 7, 5),
    "sliding, one": (1, 3, 8, 6),
    "beyond the keys": (3, 4, 5, 2),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("spelling", FUNCTIONS)
def test_every_place_in_a_cache(spelling, place, padded):
    queries, keys, q_offset, kv_offset = PLACES[place]
    attention_mask = REAL if padded else None
    mask, expected = ask(FUNCTIONS[spelling], queries, keys, q_offset, kv_offset, attention_mask)
    assert torch.equal(dense(mask), expected)
    assert mask.start == kv_offset


def test_unfilled_keys_of_a_static_cache_are_left_out():
    mask, _ = ask(theirs.causal_mask_function, 3, 100, q_offset=4)
    assert mask.visible == 7
    assert repr(mask.mask) == "causal()"


def test_padding_without_padding_vanishes():
    mask, _ = ask(theirs.causal_mask_function, 9, 9, attention_mask=torch.ones(2, 9, dtype=torch.bool))
    assert repr(mask.mask) == "causal()"


def test_a_function_for_vmap_is_left_to_transformers():
    table = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.5

    def looks_up(b, h, q, k):
        return table[b][q][k]  # right for numbers, wrong for index tensors

    mask, expected = ask(theirs.and_masks(theirs.causal_mask_function, looks_up), 9, 9, use_vmap=True)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, expected)


def test_mask_functions_of_older_versions():
    # they say where the queries are by a tensor
    mask = mask_function(
        2, kv_length=9, mask_function=theirs.causal_mask_function, cache_position=torch.arange(6, 9)
    )
    assert tuple(mask.shape) == (2, 1, 3, 9)
    assert repr(mask.mask) == "causal()"


def test_a_mask_that_is_touched_becomes_the_real_tensor():
    mask, expected = ask(theirs.causal_mask_function, 9, 9, attention_mask=REAL)
    same = mask[:, :, :, :9]  # as much as there is: nothing is cut off
    assert type(same) is MaskTensor
    assert same.mask is mask.mask
    assert mask.touched is None
    assert torch.equal(mask[:, :, 3:], expected[:, :, 3:])
    assert torch.equal(~mask, ~expected)
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(expected, 0.0, -1.0))
    assert type(mask + 0) is torch.Tensor
    same[:, :, :, 0] = False  # what is written into it counts
    assert not mask.touched[..., 0].any()
    assert repr(mask) == (
        "MaskTensor(causal() & padding(<bool 2×9>), shape=(2, 1, 9, 9), visible=9, start=0)"
    )


@pytest.mark.parametrize("side", ["none", "left"])
def test_model_code_may_write_into_its_mask(side):
    model = llama()
    kept = []

    class First(torch.nn.Module):
        """Forbids the first key, in the mask that it is given."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden, attention_mask=None, **more):
            kept.append(type(attention_mask))
            attention_mask[:, :, 1:, 0] = False
            return self.inner(hidden, attention_mask=attention_mask, **more)

    model.model.layers[0] = First(model.model.layers[0])
    mask = padding(side)
    mask = torch.ones(2, 12, dtype=torch.long) if mask is None else mask
    mask[0, -1] = 0  # so that transformers' sdpa writes its mask out, too
    real = mask.bool()
    with torch.no_grad():
        expected = model(tokens(), attention_mask=mask, use_cache=False).logits
        with attach(model):
            got = model(tokens(), attention_mask=mask, use_cache=False).logits
    assert kept == [torch.Tensor, MaskTensor]
    torch.testing.assert_close(got[real], expected[real], atol=3e-5, rtol=1e-5)


def test_all_layers_of_a_pass_share_one_mask():
    model, masks = llama(), []
    with attach(model, handler=lambda call: (masks.append(call.mask), call.proceed())[1]), torch.no_grad():
        model(tokens(), use_cache=False)
    assert masks[0] is masks[1]
