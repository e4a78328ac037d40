import math

import pytest
import torch

from polyhead.errors import ConfigError
from polyhead.tasks import perplexity, sample_text
from tasks.tokens import llama, tokenizer

IDS = torch.randint(3, 400, (90,), generator=torch.Generator().manual_seed(0))


def expected(model, skip):
    with torch.no_grad():
        logits = model(IDS[None]).logits[0]
    return torch.nn.functional.cross_entropy(logits[skip - 1 : -1], IDS[skip:]).item()


@pytest.mark.parametrize("chunk", [1, 7, 32, 89, 1000])
@pytest.mark.parametrize("skip", [1, 2, 40, 89])
def test_chunks_change_nothing(chunk, skip):
    model = llama().double()
    found = perplexity(model, None, IDS, chunk=chunk, skip=skip)
    assert found.nats == pytest.approx(expected(model, skip), rel=1e-6)
    assert found.value == float(found) == pytest.approx(math.exp(found.nats))
    assert found.tokens == 90 - skip


def test_logits_of_one_chunk_at_most():
    model = llama()
    sizes = []
    model.lm_head.register_forward_hook(lambda m, a, out: sizes.append(out.shape[1]))
    perplexity(model, None, IDS, chunk=16, skip=41)
    assert max(sizes) <= 16
    assert sum(sizes[2:]) == 90 - 41


def test_reads_through_the_given_cache():
    from transformers import DynamicCache

    model = llama()
    cache = DynamicCache(config=model.config)
    steps = []
    perplexity(model, None, IDS, cache=cache, progress=lambda *step: steps.append(step))
    assert cache.get_seq_length() == 89
    assert steps[-1] == (90, 90)


def test_a_smaller_cache_shows():
    from polyhead.cache import per_head

    model = llama()
    full = perplexity(model, None, IDS, chunk=8)
    everything = perplexity(model, None, IDS, chunk=8, cache=per_head(model, full="all"))
    little = perplexity(model, None, IDS, chunk=8, cache=per_head(model, full="none", sink=1, window=4))
    assert everything.nats == pytest.approx(full.nats, rel=1e-4)
    assert little.nats != pytest.approx(full.nats, rel=1e-3)


def test_texts():
    found = perplexity(llama(), tokenizer(), sample_text(), length=50)
    assert found.tokens == 49


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"skip": 0}, "skip must be at least 1 and below the 90 tokens"),
        ({"skip": 90}, "skip must be at least 1 and below the 90 tokens"),
        ({"length": 91}, "has 90 tokens, length asks for 91"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        perplexity(llama(), None, IDS, **arguments)
