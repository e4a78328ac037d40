"""Attaching and what undoes it; handlers and their order; what is refused."""

import copy
import gc
import weakref

import pytest
import torch
import transformers as t
from torch import nn

import polyhead as ph
from hf.tiny import DECODERS, SIZES, eager, llama, make, t5, tokens, vit, whisper
from polyhead.errors import ConfigError, UnsupportedModel
from polyhead.hf import Attachment, LayerInfo, attach


def named(model):
    """What every config in the model names as its attention."""
    return {
        name: module.config._attn_implementation
        for name, module in model.named_modules()
        if hasattr(module, "config")
    }


@torch.no_grad()
def logits(model):
    return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize("build", [llama, vit, whisper, t5])
@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_leaving_gives_the_model_back(build, before):
    model = build()
    model.set_attn_implementation(before)
    configs = named(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with attach(model) as attachment:
        assert set(named(model).values()) == {"polyhead"}
        assert attachment.attached
    assert named(model) == configs
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not attachment.attached


def test_parts_with_different_attention_get_their_own_back():
    model = whisper()
    model.set_attn_implementation("sdpa")
    text = make(t.CLIPModel, t.CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION))
    text.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    before = named(text)
    assert set(before.values()) == {"eager", "sdpa"}
    with attach(text):
        assert set(named(text).values()) == {"polyhead"}
    assert named(text) == before


CLIP_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
CLIP_VISION = CLIP_TEXT | {"image_size": 16, "patch_size": 4}


def test_an_error_inside_restores():
    model = llama()

    def broken(call):
        raise RuntimeError("from the handler")

    with pytest.raises(RuntimeError, match="from the handler"), attach(model, handler=broken):
        logits(model)
    assert model.config._attn_implementation == "sdpa"
    attachment = attach(model)
    with pytest.raises(RuntimeError, match="from the handler"), attachment.handling(broken):
        logits(model)
    logits(model)  # the handler is gone
    attachment.detach()
    attachment.detach()  # twice does no harm
    assert model.config._attn_implementation == "sdpa"


def test_reentrant_and_attached_again():
    model = llama()
    attachment = attach(model)
    with attachment:
        with attachment:
            pass
        assert attachment.attached
    assert not attachment.attached
    with attachment:
        assert model.config._attn_implementation == "polyhead"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("first_out", [0, 1])
def test_nested_attachments_in_any_order(first_out):
    model, seen = llama(), []

    def note(name):
        def handler(call):
            seen.append(name)
            return call.proceed()

        return handler

    both = [attach(model, handler=note("outer")), attach(model, handler=note("inner"))]
    logits(model)
    assert seen == ["inner", "outer"] * 2
    seen.clear()
    both[first_out].detach()
    logits(model)
    assert seen == [["inner"], ["outer"]][first_out] * 2
    assert model.config._attn_implementation == "polyhead"
    both[1 - first_out].detach()
    assert model.config._attn_implementation == "sdpa"


def test_attaching_a_part_of_an_attached_model():
    model, seen = llama(), []

    def inner(call):
        seen.append(call.layer.name)
        return call.proceed()

    def outer(call):
        seen.append(call.layer.name)
        return call.proceed()

    with attach(model, handler=outer):
        with attach(model.model, handler=inner):
            logits(model)
        assert model.config._attn_implementation == "polyhead"
    # each handler knows the layer by its own model's names
    assert seen[:2] == ["layers.0.self_attn", "model.layers.0.self_attn"]


def test_two_models_at_once():
    one, two = llama(), DECODERS["qwen3"]()
    calls = []

    def note(name):
        return lambda call: (calls.append(name), call.proceed())[1]

    with attach(one, handler=note("one")), attach(two, handler=note("two")):
        logits(one)
        logits(two)
    assert calls == ["one"] * 2 + ["two"] * 2
    assert one.config._attn_implementation == two.config._attn_implementation == "sdpa"


def test_handlers_change_calls_and_hand_them_on():
    model = llama()
    with attach(model) as attachment:
        plain = logits(model)

        def near(call):
            return call.replace(mask=call.mask & ph.window(2)).proceed()

        with attachment.handling(near):
            seen = logits(model)

            def doubled(call):
                assert repr(call.replace().mask) == "causal()"  # it comes before `near`
                return 2 * call.proceed()

            with attachment.handling(doubled):
                assert not torch.equal(logits(model), seen)
            assert torch.equal(logits(model), seen)
        assert torch.equal(logits(model), plain)
    other = make(t.MistralForCausalLM, t.MistralConfig(**SIZES, sliding_window=3))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(seen, logits(eager(other)), atol=3e-5, rtol=1e-5)


def test_a_handler_may_observe():
    model = llama()

    class Mass:
        needs_logits = False

        def __init__(self):
            self.total = 0.0

        def visit(self, tile, logits, weights):
            self.total += weights.sum().item()

    mass = Mass()
    with attach(model) as attachment:
        plain = logits(model)
        with attachment.handling(lambda call: call.observe([mass])):
            torch.testing.assert_close(logits(model), plain, atol=3e-5, rtol=1e-5)
    layers, items, heads, rows = 2, 2, 4, 12
    assert mass.total == pytest.approx(layers * items * heads * rows, rel=1e-5)


def test_layers_are_told_in_forward_order():
    with attach(DECODERS["gemma2"]()) as attachment:
        assert attachment.layers == [
            LayerInfo(0, "model.layers.0.self_attn", "decoder", 4, 2, 8, window=4, cache_index=0),
            LayerInfo(1, "model.layers.1.self_attn", "decoder", 4, 2, 8, window=None, cache_index=1),
        ]
        assert repr(attachment) == "Attachment(Gemma2ForCausalLM, 2 attention layers, attached)"
    with attach(whisper()) as attachment:
        kinds = [layer.kind for layer in attachment.layers]
        assert kinds == ["encoder", "encoder", "decoder", "cross", "decoder", "cross"]


def test_a_copy_of_an_attached_model_still_runs():
    model = llama()
    with attach(model):
        twin = copy.deepcopy(model)
        expected = logits(model)
        assert torch.equal(logits(twin), expected)


def test_a_model_is_freed_although_it_was_attached():
    from polyhead.hf.attachment import _entries

    gc.collect()
    before = len(_entries)
    model = llama()
    attach(model)  # and never detached
    gone = weakref.ref(model)
    assert len(_entries) == before + 2
    del model
    gc.collect()
    assert gone() is None
    assert len(_entries) == before


def test_wrapped_models_are_found():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    model = llama()
    with attach(Wrapper(model)) as attachment:
        assert attachment.layers[0].name == "inner.model.layers.0.self_attn"
        assert model.config._attn_implementation == "polyhead"


def test_a_compiled_model():
    model = llama()
    expected = logits(model)
    compiled = torch.compile(model, backend="eager")
    with attach(model):
        torch.testing.assert_close(logits(compiled), expected, atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(logits(compiled), expected, atol=3e-5, rtol=1e-5)


def test_dropout_in_training_is_handed_on():
    config = t.LlamaConfig(**SIZES, attention_dropout=0.5)
    model, drawn = make(t.LlamaForCausalLM, config), []
    with attach(model, handler=lambda call: (drawn.append(call.dropout), call.proceed())[1]):
        logits(model)
        model.train()
        logits(model)
    assert drawn == [0.0, 0.0, 0.5, 0.5]


REFUSED = [
    (t.BloomForCausalLM, t.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4), "bloom"),
    (t.GPTJForCausalLM, t.GPTJConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=4, rotary_dim=4), "gptj"),
    (
        t.DebertaV2Model,
        t.DebertaV2Config(
            vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
        ),
        "deberta-v2",
    ),
]


@pytest.mark.parametrize(("kind", "config", "name"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_models_past_the_interface_are_refused_by_name(kind, config, name):
    model = make(kind, config)
    before = named(model)
    with pytest.raises(UnsupportedModel) as told:
        attach(model)
    assert str(told.value).startswith(f"{kind.__name__} (model type {name!r}) does not go through")
    assert "Use an architecture that does" in str(told.value)
    assert named(model) == before


def test_hidden_choices_of_keys_are_refused_by_name():
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention

    with torch.device("meta"):
        model = llama_with(DeepseekV32Attention)
    with pytest.raises(UnsupportedModel, match="DeepseekV32Attention passes 'indices'"):
        attach(model)


def llama_with(kind):
    """A tiny model that holds an attention module of another kind, never run."""
    model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES))
    attention = kind.__new__(kind)
    nn.Module.__init__(attention)
    attention.config = model.config
    model.model.layers[0].self_attn = attention
    return model


def test_attention_beside_the_interface_is_told():
    config = t.GitConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        vision_config=CLIP_VISION,
    )
    model = make(t.GitForCausalLM, config)
    expected = logits(model)
    with attach(model) as attachment:
        assert [layer.kind for layer in attachment.layers] == ["encoder"]
        assert attachment.unseen == ["git.encoder.layer.0.attention.self"]
        # it adds its mask to its scores, and gets one that can be added
        torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("thing", ["smollm2", nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(UnsupportedModel, match="transformers model"):
        attach(thing)


def test_handlers_that_are_none_or_give_nothing_are_named():
    model, ids = llama(), torch.arange(6)[None]
    with pytest.raises(ConfigError, match="handler must be a function of a Call"):
        attach(model, handler="x")
    with attach(model) as attachment:
        with pytest.raises(ConfigError, match="handler must be a function"), attachment.handling(3):
            pass

        def forgets(call):
            call.proceed()

        for wrong in (forgets, lambda call: call.proceed()[:, :, :-1]):
            with (
                attachment.handling(wrong),
                pytest.raises(ConfigError, match="handler .* must return"),
            ):
                model(ids)
        model(ids)


def test_handling_needs_an_attachment_in_force():
    attachment = attach(llama())
    attachment.detach()
    with pytest.raises(UnsupportedModel, match="detached"), attachment.handling(lambda call: call.proceed()):
        pass


def test_attach_is_public():
    assert ph.attach is attach
    assert isinstance(attach(llama()), Attachment)
