"""Caches that return handles instead of tensors reach the attention function through the models' code."""

import pytest
import torch
import transformers as t

from hf.tiny import DECODERS, LENGTH, bert, t5, tokens
from polyhead.attend import attend
from polyhead.errors import ConfigError, UnsupportedModel
from polyhead.hf import KVHandle, attach


class Held(KVHandle):
    """Keys (or values) that are kept out of sight."""

    def __init__(self, tensor):
        super().__init__(tuple(tensor.shape), tensor.dtype, tensor.device)
        self.held = tensor

    def attend(self, call):
        mask, keys = call.mask, self.held.shape[2]
        assert call.k is self
        assert call.start == 0
        assert (mask is None) or call.q.shape[2] <= keys
        return attend(
            call.q,
            self.held,
            call.v.held,
            mask=mask,
            score=call.score,
            normalizer=call.normalizer,
            scale=call.scale,
        )


class HandleCache(t.DynamicCache):
    def update(self, *args, **kwargs):
        keys, values = super().update(*args, **kwargs)
        return Held(keys), Held(values)


# windows make transformers' own caches drop keys: not wanted here
PLAIN = {name: build for name, build in DECODERS.items() if name not in ("mistral", "gemma3", "llama4")}


@pytest.mark.parametrize("steps", [[12], [5, 3, 1, 1, 2]], ids=str)
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_models_hand_handles_through(name, steps):
    model = PLAIN[name]()

    def run(cache):
        found, at = [], 0
        for step in steps:
            found.append(model(tokens()[:, at : at + step], past_key_values=cache).logits)
            at += step
        return torch.cat(found, 1)

    with attach(model):
        expected = run(t.DynamicCache())
        got = run(HandleCache())
    assert got.shape[1] == LENGTH
    torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-5)


def test_handlers_see_handles_untouched():
    model, seen = PLAIN["llama"](), []

    def note(call):
        seen.append((type(call.k), type(call.v), call.k.shape))
        return call.proceed()

    with attach(model, handler=note), torch.no_grad():
        model(tokens(), past_key_values=HandleCache())
    assert seen == [(Held, Held, torch.Size((2, 2, 12, 8)))] * 2


def test_handles_cannot_be_observed():
    model = PLAIN["llama"]()
    with (
        attach(model, handler=lambda call: call.observe([])),
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"layer 'model.layers.0.self_attn' attends to keys in a Held"),
    ):
        model(tokens(), past_key_values=HandleCache())


def test_touching_a_handle_is_refused_by_name():
    handle = Held(torch.zeros(1, 2, 3, 4))
    assert handle.ndim == handle.dim() == 4
    assert handle.size(2) == handle.shape[-2] == 3
    assert handle.size() == torch.Size((1, 2, 3, 4))
    with pytest.raises(
        UnsupportedModel, match=r"calls matmul\(\) on its cached keys or values, but Held is no"
    ):
        torch.matmul(torch.zeros(1, 2, 3, 4), handle)
    with pytest.raises(UnsupportedModel, match="asks its cached keys or values for 'transpose'"):
        handle.transpose(1, 2)
    with pytest.raises(UnsupportedModel, match="DynamicCache"):
        handle[:, :, :1]


def test_without_an_attachment_a_handle_is_refused():
    with torch.no_grad(), pytest.raises(UnsupportedModel, match="its cached keys or values"):
        PLAIN["llama"]()(tokens(), past_key_values=HandleCache())


def test_the_base_handle_says_nothing_of_its_own():
    with pytest.raises(NotImplementedError):
        KVHandle((1, 1, 1, 1), torch.float32, torch.device("cpu")).attend(None)


def test_encoders_need_no_cache():
    for model in (bert(), t5().encoder):
        with attach(model, handler=lambda call: call.proceed()) as attachment, torch.no_grad():
            model(tokens())
        assert {layer.kind for layer in attachment.layers} == {"encoder"}
