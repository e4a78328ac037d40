"""What `ph.sparse` keeps of cached keys: the numbers are those worked out anew, whatever befalls a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as t

import polyhead as ph
from hf.tiny import DECODERS, llama, tokens
from polyhead.attend.selectors import Summaries
from polyhead.hf.kept_summaries import KeptSummaries

OWN = ph.select(ph.key_bounds(), ph.keep_blocks(2), rows=1, cols=3, always=ph.window(0))
SELECTORS = {
    "key_bounds": OWN,
    "mean_keys": ph.select(ph.mean_keys(), ph.keep_share(0.3), rows=8, cols=4, always=ph.sink(1)),
    "sampled_mass": ph.select(ph.sampled_mass(2), ph.keep_mass(0.6), rows=8, cols=4),
    "mean_mass": ph.select(ph.mean_mass(4, 2), ph.keep_mass(0.6), rows=8, cols=4),
    "prism": ph.prism(0.6, rows=8, cols=4),
    "proxy_attn": ph.proxy_attn(0.6, least=4, rows=8, cols=4),
    "token_indexer": ph.token_indexer(6),
    "hisa": ph.hisa(6, 2, 4),
}


@contextmanager
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(KeptSummaries, "of", lambda *_: None)
        yield


class Counted:
    """How often rows were made of new keys alone, and how often of all keys."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept = self.anew = 0
        rows = Summaries.rows

        def counted(own: Summaries, name: Any, size: int, keys: int, make: Callable[[int], Any]) -> Any:
            def asked(start: int) -> Any:
                self.kept += start > 0
                self.anew += start == 0
                return make(start)

            return rows(own, name, size, keys, asked)

        monkeypatch.setattr(Summaries, "rows", counted)

    def take(self) -> tuple[int, int]:
        found, self.kept, self.anew = (self.kept, self.anew), 0, 0
        return found


Change = Callable[[t.DynamicCache], None]


def written_into(cache: t.DynamicCache) -> None:
    for layer in cache.layers:
        layer.keys[:, :, 2:5] *= -2


def replaced(cache: t.DynamicCache) -> None:
    for layer in cache.layers:
        layer.keys = layer.keys.flip(2).contiguous()


CHANGES: dict[str, Change] = {
    "nothing": lambda cache: None,
    "crop": lambda cache: cache.crop(-4),
    "crop twice": lambda cache: (cache.crop(-2), cache.crop(-3)),  # type: ignore[dict-item, return-value]
    "beams": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "same beam": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "written into": written_into,
    "replaced": replaced,
}


def run(model: Any, ids: torch.Tensor, change: Change, padded: bool) -> torch.Tensor:
    cache = t.DynamicCache(config=model.config)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    found = []

    def step(part: torch.Tensor) -> None:
        length = cache.get_seq_length() + part.shape[1]
        found.append(model(part, past_key_values=cache, attention_mask=mask[:, :length]).logits)

    step(ids[:, :14])
    for n in range(14, 19):
        step(ids[:, n : n + 1])
    change(cache)
    for n in range(19, 24):
        step(ids[:, n : n + 1])
    step(ids[:, 24:27])
    step(ids[:, 27:28])
    return torch.cat(found, 1)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_the_numbers_are_those_worked_out_anew(
    change: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = llama().double(), tokens(2, 30)
    with ph.sparse(model, OWN):
        found = run(model, ids, CHANGES[change], padded)
        with anew(monkeypatch):
            expected = run(model, ids, CHANGES[change], padded)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert (found - run(model, ids, CHANGES[change], padded)).abs().max() > 1e-3  # dense


@torch.no_grad()
@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector(name: str, prefill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama().double(), tokens(2, 30)
    with ph.sparse(model, SELECTORS[name], prefill=prefill):
        found = run(model, ids, CHANGES["crop"], False)
        with anew(monkeypatch):
            expected = run(model, ids, CHANGES["crop"], False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gpt2", "t5"])
def test_other_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sliding windows, whose caches forget; with sinks; with a cache for a context besides."""
    if name == "t5":
        from hf.tiny import t5

        model = t5().double()
    else:
        model = DECODERS[name]().double()
    how = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    with ph.sparse(model, OWN):
        found = model.generate(tokens(2, 12), **how)
        with anew(monkeypatch):
            assert torch.equal(found, model.generate(tokens(2, 12), **how))


@torch.no_grad()
def test_steps_look_at_new_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, seen = llama().double(), tokens(2, 30), Counted(monkeypatch)
    layers = model.config.num_hidden_layers
    with ph.sparse(model, OWN):
        caches = [t.DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            model(ids[:, :14], past_key_values=cache)
            assert seen.take() == (0, layers)
        for n in range(14, 17):  # two texts in turns
            for cache in caches:
                model(ids[:, n : n + 1], past_key_values=cache)
                assert seen.take() == (layers, 0)
        caches[0].crop(-2)
        model(ids[:, 15:16], past_key_values=caches[0])
        assert seen.take() == (layers, 0)
        caches[0].reorder_cache(torch.tensor([1, 0]))
        model(ids[:, 16:17], past_key_values=caches[0])
        assert seen.take() == (0, layers)
        caches[0].reset()
        model(ids[:, :9], past_key_values=caches[0])
        assert seen.take() == (0, layers)
        with torch.inference_mode():  # nobody counts what is written there
            model(ids[:, 9:10], past_key_values=caches[0])
            model(ids[:, 10:11], past_key_values=caches[0])
        assert seen.take()[1] >= layers
        model(ids[:, 17:18], past_key_values=caches[1])
        assert seen.take() == (layers, 0)
    model(ids[:, 18:19], past_key_values=caches[1])  # dense, outside of the block
    with ph.sparse(model, OWN):
        model(ids[:, 19:20], past_key_values=caches[1])
    assert seen.take() == (0, layers)


@torch.no_grad()
def test_a_dense_step_in_between_is_noticed_or_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama().double(), tokens(2, 30)

    def steps() -> torch.Tensor:
        cache, found = t.DynamicCache(config=model.config), []
        with ph.sparse(model, OWN):
            found.append(model(ids[:, :14], past_key_values=cache).logits)
            with ph.sparse(model, {}):  # the innermost decides: dense
                found.append(model(ids[:, 14:15], past_key_values=cache).logits)
            found.append(model(ids[:, 15:16], past_key_values=cache).logits)
        return torch.cat(found, 1)

    found = steps()
    with anew(monkeypatch):
        torch.testing.assert_close(steps(), found, rtol=0, atol=1e-13)


@torch.no_grad()
def test_hooks_go_with_the_block() -> None:
    model = llama()
    with ph.sparse(model, OWN):
        assert any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
