"""`ph.sparse`: selectors inside pretrained models."""

import pytest
import torch
import transformers as t

import polyhead as ph
from hf.tiny import DECODERS, bert, llama, make, t5, tokens, vit
from polyhead.attend.function import weights_of
from polyhead.attend.masks import Chosen, densify
from polyhead.attend.selectors import choose
from polyhead.errors import ConfigError, ShapeError
from polyhead.heads.measurements.places import WindowMass
from polyhead.hf import attach

EVERYTHING = ph.select(ph.mean_keys(), ph.keep_share(1.0), rows=2, cols=3)
# every query chooses for itself, by whole blocks of the past: a step sees what the prefill saw
STEPWISE = ph.select(ph.key_bounds(), ph.keep_blocks(2), rows=1, cols=3, always=ph.window(0))


def long(batch=2, length=30):
    return tokens(batch, length)


@torch.no_grad()
def logits(model, ids=None, **more):
    return model(long() if ids is None else ids, use_cache=False, **more).logits


@pytest.mark.parametrize("name", DECODERS)
def test_keeping_everything_changes_nothing(name):
    model = DECODERS[name]()
    before, dense = model.config._attn_implementation, logits(model)
    with ph.sparse(model, EVERYTHING) as attachment:
        assert attachment.attached
        torch.testing.assert_close(logits(model), dense, atol=1e-4, rtol=1e-4)
    assert not attachment.attached
    assert model.config._attn_implementation == before
    assert torch.equal(logits(model), dense)


def written_out(module, query, key, value, mask, scaling, softcap=None, s_aux=None, **more):
    """Attention over blocks of 3 keys, of which every 2 queries read the 2 best, pair by pair."""
    repeat, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    i = torch.arange(length)
    visible = (i[:, None] >= i) & (i[:, None] - i < (more.get("sliding_window") or length))
    read = torch.zeros(*query.shape[:2], length, length, dtype=torch.bool)
    for m in range(0, length, 2):
        mean = query[:, :, m : m + 2].mean(2)
        seen = [n for n in range(0, length, 3) if bool(visible[m : m + 2, n : n + 3].any())]
        scores = torch.stack([(mean * key[:, :, n : n + 3].mean(2)).sum(-1) for n in seen], -1)
        for best in scores.topk(min(2, len(seen))).indices.unbind(-1):
            block = torch.tensor(seen)[best] // 3
            read[:, :, m : m + 2] |= (i // 3 == block[..., None])[:, :, None]
    read &= visible
    scores = query @ key.transpose(-1, -2) * scaling
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp() * read
    total = weights.sum(-1, keepdim=True)
    if s_aux is not None:
        total = total + (s_aux.view(-1, 1, 1) - top).exp()
    return (weights / total @ value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_equals_a_choice_written_out(name):
    """Plain, with a sliding window, with soft caps, and with sinks: the last two run in the tile engine."""
    model = DECODERS[name]().double()
    own = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=2, cols=3)
    with ph.sparse(model, own):
        found = logits(model)
    dense = logits(model)
    t.AttentionInterface.register("written_out", written_out)
    model.set_attn_implementation("written_out")
    torch.testing.assert_close(found, logits(model))
    assert (found - dense).abs().max() > 0.1


@torch.no_grad()
def test_a_corrected_output():
    """As in the operator, layer by layer; handlers on the way see what is read; steps equal the prefill."""
    model = llama().double()
    inner = ph.select(ph.mean_keys(), ph.keep_blocks(1), rows=1, cols=3, always=ph.window(0))
    own = ph.rectified(inner, gate=ph.open_gate(), apart=ph.sink(1))
    read = []

    def look(call):
        read.append(call.mask)
        return call.proceed()

    with attach(model, handler=look), ph.sparse(model, own):
        found = logits(model)
    assert len(read) == 2
    assert all(any(isinstance(term, Chosen) for term in mask.terms) for mask in read)

    def directly(call):
        return ph.attend(call.q, call.k, call.v, mask=call.mask, select=own, scale=call.scale)

    with attach(model, handler=directly):
        torch.testing.assert_close(found, logits(model))
    with ph.sparse(model, own):
        steps = stepwise(model, long(), t.DynamicCache(config=model.config))
    torch.testing.assert_close(steps, found)
    dense = logits(model)
    with ph.sparse(model, inner):
        plain = logits(model)
    assert (found - plain).abs().max() > 0.01
    with ph.sparse(model, [own, None]):  # by layer, and among layers that follow
        assert (logits(model) - dense).abs().max() > 0.01
    for name, what in (("gemma2", "score"), ("gpt_oss", "normalizer")):
        other = DECODERS[name]()
        with ph.sparse(other, own), pytest.raises(ConfigError, match=f"rectified corrects .* no {what}"):
            logits(other)


def stepwise(model, ids, cache, **more):
    """Logits of a prefill of 20 tokens and single steps."""
    parts = ids.split([20, *[1] * (ids.shape[1] - 20)], 1)
    found, done = [], 0
    for part in parts:
        done += part.shape[1]
        how = {name: mask[:, :done] for name, mask in more.items()}
        found.append(model(part, past_key_values=cache, **how).logits)
    return torch.cat(found, 1)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_steps_equal_the_prefill(name, kind, padded):
    model = DECODERS[name]().double()
    for owner in (model.config, *model.modules()):  # the cache drops nothing: blocks stay where they are
        if getattr(owner, "sliding_window", None):
            owner.sliding_window = 32
    ids, more = long(), {}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        more = {"attention_mask": mask}
    if kind == "dynamic":
        cache = t.DynamicCache(config=model.config)
    else:
        cache = t.StaticCache(config=model.config, max_cache_len=40)
    with attach(model):
        dense = logits(model, ids, **more)
    with ph.sparse(model, STEPWISE):
        whole = logits(model, ids, **more)
        steps = stepwise(model, ids, cache, **more)
    real = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        real[0, :4] = False
    torch.testing.assert_close(steps[real], whole[real])
    assert (dense[real] - whole[real]).abs().max() > 0.1


@torch.no_grad()
def test_decode_false_leaves_single_queries_dense():
    model, ids = llama().double(), long()
    cache = t.DynamicCache()
    with ph.sparse(model, STEPWISE, decode=False):
        prefill = model(ids[:, :-1], past_key_values=cache).logits
        found = model(ids[:, -1:], past_key_values=cache).logits
    cache = t.DynamicCache()
    with ph.sparse(model, STEPWISE):
        expected = model(ids[:, :-1], past_key_values=cache).logits
    torch.testing.assert_close(prefill, expected)
    torch.testing.assert_close(found, model(ids[:, -1:], past_key_values=cache).logits)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}]
)
def test_generate(how):
    """With a cache and without one it is the same sparse model, and another one than the dense."""
    model = llama().double()
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False} | how
    beams = {"num_beams": how.get("num_beams", 1)}
    dense = model.generate(long(), **how)
    with ph.sparse(model, EVERYTHING):
        assert torch.equal(model.generate(long(), **how), dense)
    with ph.sparse(model, STEPWISE):
        found = model.generate(long(), **how)
        again = model.generate(long(), **how | beams | {"cache_implementation": None, "use_cache": False})
    assert torch.equal(found, again)
    assert not torch.equal(found, dense)


def test_fewer_keys_than_a_block_are_all_read():
    model = llama()
    own = ph.select(ph.mean_keys(), ph.keep_share(0.0), rows=1, cols=30)
    dense = logits(model)
    with ph.sparse(model, own):
        assert torch.equal(logits(model)[:, :30], dense)
        longer = logits(model, long(2, 31))
    assert not torch.allclose(longer[:, -1], logits(model, long(2, 31))[:, -1], atol=1e-2)


def recorded(model, selector, **how):
    """Of every layer, whether a choice was made."""
    found = []

    def note(call):
        found.append("chosen" in repr(call.mask))
        return call.proceed()

    with attach(model, handler=note), ph.sparse(model, selector, **how):
        logits(model)
    return found


def test_selectors_by_layer():
    model = llama()
    assert recorded(model, STEPWISE) == [True, True]
    assert recorded(model, {1: STEPWISE}) == [False, True]
    assert recorded(model, {0: STEPWISE, 1: None}) == [True, False]
    assert recorded(model, (None, STEPWISE)) == [False, True]
    assert recorded(model, {}) == [False, False]
    assert recorded(model, (layer for layer in (None, STEPWISE))) == [False, True]


@pytest.mark.parametrize(
    ("selector", "error", "words"),
    [
        (0.1, ConfigError, "selector must be a selector such as"),
        (None, ConfigError, "selector must be a selector such as"),
        (ph.keep_share(0.1), ConfigError, "selector must be a selector such as"),
        ([STEPWISE], ConfigError, "2 attention layers, but 1 are given"),
        ([STEPWISE, 3], ConfigError, "selector of layer 1 must be"),
        ({2: STEPWISE}, ConfigError, r"layers are 0\.\.1; got 2"),
        ({-1: STEPWISE}, ConfigError, r"layers are 0\.\.1; got -1"),
        ({True: STEPWISE}, ConfigError, r"layers are 0\.\.1; got True"),
        ({0: ph.mean_keys()}, ConfigError, "selector of layer 0 must be"),
        (
            ph.select(ph.mean_keys(), ph.keep_share(torch.full((3,), 0.5))),
            ShapeError,
            r"layer 0, 'model\.layers\.0\.self_attn': keep_share holds 3 numbers, but the call has 4 heads",
        ),
    ],
)
def test_what_does_not_fit_is_said(selector, error, words):
    model = llama()
    with pytest.raises(error, match=words), ph.sparse(model, selector):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_decode_must_be_a_flag():
    with (
        pytest.raises(ConfigError, match="decode must be True or False"),
        ph.sparse(llama(), STEPWISE, decode=1),
    ):
        pass


def test_an_error_inside_restores():
    model = llama()
    dense = logits(model)
    with pytest.raises(RuntimeError, match="inside"), ph.sparse(model, STEPWISE):
        raise RuntimeError("inside")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), dense)
    with attach(model) as attachment:
        idle = logits(model)
        with pytest.raises(RuntimeError, match="inside"), ph.sparse(model, STEPWISE):
            raise RuntimeError("inside")
        assert attachment.attached
        assert torch.equal(logits(model), idle)


def test_the_innermost_decides():
    model = llama()
    other = ph.select(ph.mean_keys(), ph.keep_blocks(1), rows=2, cols=3)
    with ph.sparse(model, STEPWISE):
        outer = logits(model)
    with ph.sparse(model, other):
        inner = logits(model)
        with ph.sparse(model, STEPWISE):
            assert torch.equal(logits(model), outer)
            with ph.sparse(model, {}):
                torch.testing.assert_close(logits(model), logits_attached(model), atol=1e-5, rtol=1e-5)
        assert torch.equal(logits(model), inner)


def logits_attached(model):
    """Those of the dense model, whatever is attached."""
    twin = llama()
    twin.load_state_dict(model.state_dict())
    return logits(twin)


def test_with_handlers_above_and_below():
    """Below, a handler gets the choice within the mask; above, what it changes is chosen from."""
    model = llama()

    def near(call):
        return call.replace(mask=call.mask & ph.window(8)).proceed()

    own = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=2, cols=3)
    with attach(model, handler=near), ph.sparse(model, own):
        below = logits(model)
    with ph.sparse(model, own), attach(model, handler=near):
        above = logits(model)

    def first(call):
        found = choose(own, call.q, call.k, call.mask, call.scale)
        return call.replace(mask=call.mask & found & ph.window(8)).proceed()

    def last(call):
        mask = call.mask & ph.window(8)
        return call.replace(mask=mask & choose(own, call.q, call.k, mask, call.scale)).proceed()

    for handler, found in ((first, below), (last, above)):
        with attach(model, handler=handler):
            torch.testing.assert_close(logits(model), found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "t5"])
@torch.no_grad()
def test_a_guard_measures_what_the_layer_gives(name):
    """Its soft cap, its sinks and its bias are those of the layer."""
    model = t5() if name == "t5" else DECODERS[name]()
    own = ph.select(ph.mean_keys(), ph.keep_blocks(1), rows=2, cols=3)
    calls = []

    def look(call):
        calls.append(call)
        return call.proceed()

    guard, more = ph.guarded(own, 1.0, probes=99), {"decoder_input_ids": long()} if name == "t5" else {}
    with ph.sparse(model, guard), attach(model, handler=look), ph.selections() as seen:
        logits(model, **more)
    assert len(seen.missed) == len(calls) > 1
    assert any(call.score is not None or call.normalizer != ph.softmax() for call in calls)
    for call, missed in zip(calls, seen.missed, strict=True):
        x = {"mask": call.mask, "score": call.score, "normalizer": call.normalizer, "scale": call.scale}
        weights = weights_of(call.q, call.k, **x)
        found = choose(own, call.q, call.k, call.mask, call.scale)
        size = {"batch": 2, "heads": weights.shape[1], "queries": weights.shape[2], "keys": weights.shape[3]}
        expected = (weights * ~densify(found, **size)).sum(-1).mean(-1)
        torch.testing.assert_close(missed, expected)


def test_a_profile_within_sees_the_sparse_model():
    model = llama()
    ids = long(1)[0]
    two = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=1, cols=1, always=ph.window(1))
    with ph.sparse(model, two):  # every query reads itself and the token before
        seen = ph.profile(model, text=ids, measurements=WindowMass(1))["window"]
    assert seen.flat == pytest.approx(1.0)
    assert ph.profile(model, text=ids, measurements=WindowMass(1))["window"].flat.max() < 0.9
    assert model.config._attn_implementation == "sdpa"


def test_other_architectures():
    """Encoders and encoder-decoders: all their attention layers choose."""
    for build, inputs in (
        (bert, {"input_ids": long()}),
        (vit, {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}),
        (t5, {"input_ids": long(), "decoder_input_ids": long(2, 12)}),
    ):
        model = build()
        few = ph.select(ph.mean_keys(), ph.keep_blocks(1), rows=2, cols=3)

        @torch.no_grad()
        def output(model=model, inputs=inputs):
            return model(**inputs)[0]

        dense = output()
        with ph.sparse(model, EVERYTHING):
            torch.testing.assert_close(output(), dense, atol=1e-4, rtol=1e-4)
        with ph.sparse(model, few) as attachment:
            assert not torch.allclose(output(), dense, atol=1e-2)
        assert {layer.kind for layer in attachment.layers} <= {"encoder", "decoder", "cross"}


def test_beyond_the_positions_the_model_does_what_it_does():
    model = llama()
    ids = tokens(1, 100)
    assert model.config.max_position_embeddings < 100
    dense = logits(model, ids)
    with ph.sparse(model, EVERYTHING):
        torch.testing.assert_close(logits(model, ids), dense, atol=1e-4, rtol=1e-4)
    config = t.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=20)
    model = make(t.GPT2LMHeadModel, config)
    with pytest.raises(IndexError):
        logits(model)
    with pytest.raises(IndexError), ph.sparse(model, EVERYTHING):
        logits(model)
    assert model.config._attn_implementation == "sdpa"


def test_keys_without_tensors_are_refused():
    model = llama().requires_grad_(False)
    cache = ph.cache.per_head(model, full="all")
    with ph.sparse(model, STEPWISE), pytest.raises(ConfigError, match="which cannot be chosen from"):
        model(long(), past_key_values=cache)
    cache.reset()
    with ph.sparse(model, {}):
        model(long(), past_key_values=cache)
    cache.detach()


def test_gradients_flow_through_what_was_read():
    model = llama().double()
    with ph.sparse(model, EVERYTHING):
        model(long(), labels=long()).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(long(), labels=long()).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name)
