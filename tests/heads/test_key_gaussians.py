"""Mean and covariance of a model's keys."""

import pytest
import torch

import polyhead as ph
from hf.tiny import llama, tokens
from polyhead.errors import ConfigError
from polyhead.heads import key_gaussians
from polyhead.hf import attach


def test_moments_of_all_keys_but_the_first():
    model, ids = llama(), tokens(2, 20)
    seen = []

    def handler(call):
        seen.append(call.k[:, :, 3:].double())
        return call.proceed()

    with torch.no_grad(), attach(model, handler=handler):
        model(ids, use_cache=False)
    found = key_gaussians(model, text=ids, first=3)
    assert len(found) == len(seen) == 2
    for one, k in zip(found, seen, strict=True):
        for g in range(2):
            flat = k[:, g].flatten(0, 1)
            torch.testing.assert_close(one.mean[g], flat.mean(0).float(), atol=1e-5, rtol=1e-4)
            expected = torch.cov(flat.T, correction=0).float()
            torch.testing.assert_close(one.covariance[g], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_they_go_into_a_model_layer_by_layer():
    model, ids = llama(), tokens(1, 40)
    far = key_gaussians(model, text=tokens(1, 40) + 1, first=2)
    dense = model(ids, use_cache=False).logits
    found = []
    for tau in (0.0, 0.5, 2.0):
        with ph.sparse(model, [ph.qada(tau, one, first=2, nearest=6, cols=2) for one in far]):
            found.append((model(ids, use_cache=False).logits - dense).abs().mean())
    assert found[0] > found[1] > found[2]
    assert found[2] < 1e-4


def test_a_short_text_is_refused():
    with pytest.raises(ConfigError, match="must have at least 18 tokens, of which the first 16"):
        key_gaussians(llama(), text=tokens(1, 10))
