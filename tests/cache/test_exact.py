"""A cache whose heads forget answers as the full forward pass under each head's own mask."""

import pytest
import torch

from cache.tiny import MODELS, left_padded, llama, masked_forward, some_heads, tokens
from polyhead.attend.masks import where
from polyhead.cache import per_head

CLOSE = {"rtol": 0, "atol": 1e-9}


def cached_forward(model, ids, cache, chunks, attention_mask=None):
    """The logits of all tokens, given to the model in chunks."""
    logits, start = [], 0
    with torch.no_grad():
        for count in chunks:
            mask = None if attention_mask is None else attention_mask[:, : start + count]
            positions = None
            if attention_mask is not None:
                positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, start : start + count]
            part = ids[:, start : start + count]
            found = model(part, past_key_values=cache, attention_mask=mask, position_ids=positions)
            logits.append(found.logits)
            start += count
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1)


CHUNKS = {
    "at once": [40],
    "one by one": [1] * 40,
    "chunks": [7, 1, 13, 2, 1, 1, 15],
    "prompt": [31] + [1] * 9,
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_masked_forward_pass(name, chunks):
    model = MODELS[name]()
    ids, full = tokens(2, 40), some_heads(model)
    expected = masked_forward(model, ids, full, 3, 8)
    cache = per_head(model, full=full, sink=3, window=8)
    torch.testing.assert_close(cached_forward(model, ids, cache, chunks), expected, **CLOSE)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_masked_forward_pass_with_left_padding(name, chunks):
    model = MODELS[name]()
    ids, mask = left_padded(3, 40, [0, 9, 21])
    full = some_heads(model)
    cache = per_head(model, full=full, sink=3, window=8)
    found = cached_forward(model, ids, cache, chunks, mask)
    for row, count in enumerate([0, 9, 21]):
        alone = masked_forward(model, ids[row : row + 1, count:], full, 3, 8)
        torch.testing.assert_close(found[row : row + 1, count:], alone, **CLOSE)


@pytest.mark.parametrize(("sinks", "recent"), [(0, 1), (0, 8), (1, 1), (8, 1), (13, 5), (2, 30)])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_sizes(name, sinks, recent):
    model = MODELS[name]()
    ids, full = tokens(1, 40), some_heads(model)
    expected = masked_forward(model, ids, full, sinks, recent)
    for chunks in CHUNKS.values():
        cache = per_head(model, full=full, sink=sinks, window=recent)
        torch.testing.assert_close(cached_forward(model, ids, cache, chunks), expected, **CLOSE)


def some_windows(model):
    """Windows in which heads differ, longer and shorter than the text and the model's own window."""
    config = model.config
    count = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return [[(1, 9, 60, 4, 9, 13)[(h + n) % 6] for h in range(count)] for n in range(3)]


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("name", MODELS)
def test_windows_of_their_own(name, chunks):
    model = MODELS[name]()
    ids, full, windows = tokens(2, 40), some_heads(model), some_windows(model)
    expected = masked_forward(model, ids, full, 3, windows)
    cache = per_head(model, full=full, sink=3, window=windows)
    torch.testing.assert_close(cached_forward(model, ids, cache, chunks), expected, **CLOSE)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_windows_of_their_own_with_left_padding(name, chunks):
    model = MODELS[name]()
    ids, mask = left_padded(3, 40, [0, 9, 21])
    full, windows = some_heads(model), some_windows(model)
    cache = per_head(model, full=full, sink=3, window=torch.tensor(windows))
    found = cached_forward(model, ids, cache, chunks, mask)
    for row, count in enumerate([0, 9, 21]):
        alone = masked_forward(model, ids[row : row + 1, count:], full, 3, windows)
        torch.testing.assert_close(found[row : row + 1, count:], alone, **CLOSE)


def test_padding_in_the_middle_and_on_the_right_counts_real_tokens():
    model, full = llama(), [[False] * 3, [True, False, True], [False, True, False]]
    ids, mask = left_padded(3, 40, [4, 0, 0])
    mask[1, 12:20] = 0  # a prompt padded on the right, then more tokens
    mask[2, 30:] = 0
    for chunks in CHUNKS.values():
        cache = per_head(model, full=full, sink=3, window=8)
        found = cached_forward(model, ids, cache, chunks, mask)
        for row in range(3):
            real = mask[row].bool()
            alone = masked_forward(model, ids[row : row + 1, real], full, 3, 8)
            torch.testing.assert_close(found[row : row + 1, real], alone, **CLOSE)


def test_a_mask_written_out_pair_by_pair():
    model, full = llama(), some_heads(llama())
    ids, mask = left_padded(2, 40, [0, 9])
    pairs = torch.ones(40, 40).tril().bool() & mask.bool()[:, None, None, :]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = per_head(model, full=full, sink=3, window=8)
    logits = []
    with torch.no_grad():
        for start, stop in [(0, 20), (20, 21), (21, 39), (39, 40)]:
            found = model(
                ids[:, start:stop],
                past_key_values=cache,
                attention_mask=pairs[:, :, start:stop, :stop],
                position_ids=positions[:, start:stop],
            )
            logits.append(found.logits)
    found = torch.cat(logits, 1)
    for row, count in enumerate([0, 9]):
        alone = masked_forward(model, ids[row : row + 1, count:], full, 3, 8)
        torch.testing.assert_close(found[row : row + 1, count:], alone, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_dense_prefill_is_exact(name):
    model, ids = MODELS[name](), tokens(2, 40)
    with torch.no_grad():
        expected = masked_forward(model, ids, [[True] * 6] * 3, 0, 1)
        cache = per_head(model, full=some_heads(model), sink=3, window=8, prefill="dense")
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected, **CLOSE)
    assert min(cache.held()[0]) == 11


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("chunks", [[40], [30] + [1] * 10, [13, 1, 1, 9, 16]], ids=str)
def test_dense_chunks_forget_afterwards(name, chunks):
    """A token sees its own chunk, the sinks, and the window as it was when the chunk came."""
    model, ids = MODELS[name](), tokens(2, 40)
    full = some_heads(model)
    first = torch.tensor([sum(chunks[:n]) for n, count in enumerate(chunks) for _ in range(count)])
    alone = torch.tensor([count == 1 for count in chunks for _ in range(count)])

    def seen(b, h, i, j):
        return (j < 3) | (j >= first[i] - 8 + alone[i])  # one token takes the place of the oldest

    cache = per_head(model, full=full, sink=3, window=8, prefill="dense")
    found = cached_forward(model, ids, cache, chunks)
    expected = masked_forward(model, ids, full, 3, 8, short=where(seen))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_dense_chunks_with_padding():
    model = llama()
    ids, mask = left_padded(3, 40, [0, 9, 21])
    full = some_heads(model)
    cache = per_head(model, full=full, sink=3, window=8, prefill="dense")
    found = cached_forward(model, ids, cache, [30, 1, 1, 8], mask)
    for row, count in enumerate([0, 9, 21]):
        own = per_head(model, full=full, sink=3, window=8, prefill="dense")
        alone = cached_forward(model, ids[row : row + 1, count:], own, [30 - count, 1, 1, 8])
        torch.testing.assert_close(found[row : row + 1, count:], alone, **CLOSE)


def test_short_sequences_are_exact_for_any_choice():
    """DuoAttention: L <= sink + recent gives full attention for any pattern."""
    model, ids = llama(), tokens(2, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for chunks in CHUNKS.values():
        cache = per_head(model, full="none", sink=4, window=36)
        torch.testing.assert_close(cached_forward(model, ids, cache, chunks), expected, **CLOSE)


def test_all_heads_in_full_is_exact():
    model, ids = llama(), tokens(2, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for chunks in CHUNKS.values():
        cache = per_head(model, full="all", sink=0, window=1)
        torch.testing.assert_close(cached_forward(model, ids, cache, chunks), expected, **CLOSE)
