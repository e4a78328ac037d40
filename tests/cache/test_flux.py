"""Routers of layers that are trained, and caches that keep what routed layers read."""

import pytest
import torch
from transformers import DynamicCache

import polyhead as ph
from hf.tiny import LENGTH, llama, padding, tokens
from polyhead.cache import flux
from polyhead.errors import ConfigError, ShapeError
from polyhead.hf import layer_routers, routed_layers

HOW = {"sink": 2, "window": 3, "size": 2}


def saying(model, *decisions):
    """Routers that say for each layer full (1) or sparse (0)."""
    routers = layer_routers(model).requires_grad_(False)
    for router, said in zip(routers.layers.values(), decisions, strict=True):
        router.last.bias.copy_(torch.tensor([1.0 - said, said]))
    return routers


@torch.no_grad()
@pytest.mark.parametrize("decisions", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("side", ["none", "left"])
def test_decoding_with_what_is_kept_is_decoding_with_everything(decisions, side):
    model = llama()
    mask = padding(side)
    ids = tokens(length=LENGTH + 8)
    attention = None if mask is None else torch.cat([mask, mask.new_ones(2, 8)], 1)

    def known(n):
        return None if attention is None else attention[:, :n]

    with routed_layers(model, saying(model, *decisions), **HOW) as routing:
        past = model(ids[:, :LENGTH], attention_mask=known(LENGTH), use_cache=True).past_key_values
        cache = flux.pruned(routing, past)
        assert cache.held() == [[LENGTH if said else 5] * 2 for said in decisions]
        for n in range(LENGTH, LENGTH + 8):
            step = {"input_ids": ids[:, n : n + 1], "attention_mask": known(n + 1)}
            found = model(**step, past_key_values=cache).logits
            expected = model(**step, past_key_values=past).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert all(max(row) <= 5 or said for row, said in zip(cache.held(), decisions, strict=True))
        assert past.get_seq_length() == cache.get_seq_length() == LENGTH + 8
    cache.detach()


@torch.no_grad()
def test_a_layer_that_one_sequence_reads_in_full_is_kept_in_full():
    model = llama()
    ids = tokens(length=LENGTH + 4)
    with routed_layers(model, saying(model, 0, 0), **HOW) as routing:
        past = model(ids[:, :LENGTH], use_cache=True).past_key_values
        routing.decisions[0] = torch.tensor([1.0, 0.0])
        cache = flux.pruned(routing, past)
        assert cache.held() == [[LENGTH] * 2, [5] * 2]
        for n in range(LENGTH, LENGTH + 4):
            found = model(ids[:, n : n + 1], past_key_values=cache).logits
            expected = model(ids[:, n : n + 1], past_key_values=past).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    cache.detach()


@torch.no_grad()
def test_generate_goes_on_from_what_is_kept():
    model = llama()
    ids = tokens(1, 20)
    with routed_layers(model, saying(model, 0, 1), **HOW) as routing:
        past = model(ids[:, :-1], use_cache=True).past_key_values
        cache = flux.pruned(routing, past)
        found = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        expected = model.generate(ids, past_key_values=past, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)
    cache.detach()


def samples(kinds, seed=0):
    draw = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(3, 99, (len(kinds), 16), generator=draw)
        counted = torch.ones_like(ids, dtype=torch.bool)
        counted[:, 0] = False
        yield flux.Task(ids, counted, kinds)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_training_pulls_the_sparsity_to_its_target(target):
    """From routers that do not know, on texts of which nothing can be learned."""
    torch.manual_seed(0)
    model = llama()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    routers = layer_routers(model)
    with torch.no_grad():
        for router in routers.layers.values():
            router.last.bias.zero_()
    seen = []
    penalty = flux.train(
        model,
        routers,
        samples(["noise"] * 4),
        targets={"noise": target},
        steps=60,
        sink=2,
        window=12,
        size=3,
        lr=3e-3,
        penalty_lr=0.05,
        progress=lambda step, steps, loss, sparsity: seen.append((step, steps, sparsity)),
    )
    assert [(a, b) for a, b, _ in seen] == [(n + 1, 60) for n in range(60)]
    first, last = (sum(s for *_, s in part) / 20 for part in (seen[:20], seen[-20:]))
    assert abs(last - target) < 0.2 < abs(first - target)
    assert float(penalty.linear.detach()) > 0.5  # it has ascended
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_wrong_input_is_said():
    model = llama()
    routers = layer_routers(model)
    how = {"targets": {"a": 0.5}, "steps": 2}
    with pytest.raises(ConfigError, match="samples ended after 0 of 2 steps"):
        flux.train(model, routers, [], **how)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        flux.train(model, routers, [], targets={"a": 0.5}, steps=0)
    with pytest.raises(ConfigError, match="flux.train: lr"):
        flux.train(model, routers, [], **how, lr=0)
    good = next(samples(["a"]))
    with pytest.raises(ConfigError, match="not the first of a text"):
        flux.train(model, routers, [good._replace(counted=torch.ones_like(good.counted))], **how)
    with pytest.raises(ShapeError, match="counted must be bool of the shape of ids"):
        flux.train(model, routers, [good._replace(counted=good.ids)], **how)
    with pytest.raises(ShapeError, match="2 kinds"):
        flux.train(model, routers, [good._replace(kinds=["a", "a"])], **how)
    past = model(tokens(), use_cache=True).past_key_values
    with routed_layers(model, routers, **HOW) as routing:
        with pytest.raises(ConfigError, match="nothing has been decided yet"):
            flux.pruned(routing, past)
        with torch.no_grad():
            model(tokens())
        with pytest.raises(ConfigError, match="holds every token of every layer"):
            flux.pruned(routing, DynamicCache())


@torch.no_grad()
def test_a_cache_takes_over_only_where_it_has_not_begun():
    model = llama()
    past = model(tokens(), use_cache=True).past_key_values
    cache = ph.cache.per_head(model, full="none", sink=2, window=3)
    cache.take_over(past)
    assert cache.held() == [[5, 5]] * 2
    with pytest.raises(ConfigError, match="has seen 12 tokens; reset"):
        cache.take_over(past)
    cache.reset()
    cache.take_over(past)
    cache.detach()
