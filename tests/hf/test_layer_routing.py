"""Layers that read everything or little, as routers say, in tiny pretrained models."""

import pytest
import torch

import polyhead as ph
from hf.tiny import DECODERS, LENGTH, eager, llama, make, padding, t5, tokens
from polyhead.errors import ConfigError, UnsupportedModel
from polyhead.hf import layer_routers, routed_layers
from polyhead.nn.layer_router import mean_of_ends
from polyhead.reference import reference

HOW = {"sink": 2, "window": 3, "size": 2}
ROUTED = ("llama", "qwen3", "mistral", "gemma3", "gpt_oss", "llama4")


def saying(model, *decisions):
    """Routers that say for each layer full (1) or sparse (0), or answer to what they read (None)."""
    routers = layer_routers(model)
    torch.manual_seed(3)
    for router, said in zip(routers.layers.values(), decisions, strict=True):
        with torch.no_grad():
            if said is None:
                router.last.weight.normal_(std=5)
                router.last.bias.zero_()
            else:
                router.last.bias.copy_(torch.tensor([1.0 - said, said]))
    return routers.requires_grad_(False)


def sparse_mask(layers=(0, 1), sink=2, window=3):
    """A handler: sparse attention in some layers, by a mask."""
    mask = ph.causal() & (ph.sink(sink) | ph.window(window - 1))

    def handler(call):
        if call.layer.index not in layers:
            return call.proceed()
        return call.replace(mask=mask if call.mask is None else call.mask & mask).proceed()

    return handler


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_untrained_routers_change_nothing(name, side):
    model = DECODERS[name]()
    inputs = {"input_ids": tokens(), "attention_mask": padding(side)}
    with ph.attach(model):
        expected = model(**inputs).logits
    with routed_layers(model, layer_routers(model), **HOW) as routing:
        assert torch.equal(model(**inputs).logits, expected)
    assert routing.sparsity().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ROUTED)
def test_a_window_over_everything_is_full_attention(name):
    model = DECODERS[name]()
    with ph.attach(model):
        expected = model(tokens()).logits
    with routed_layers(model, saying(model, 0, 0), window=LENGTH) as routing:
        torch.testing.assert_close(model(tokens()).logits, expected)
    assert routing.sparsity().tolist() == [1.0, 1.0]


@torch.no_grad()
def test_a_sparse_layer_reads_its_sinks_and_its_window():
    """Against the naive layer, on what the model's own projections gave."""
    model = llama()
    seen = []

    def look(call):
        out = call.proceed()
        seen.append((call, out))
        return out

    with routed_layers(model, saying(model, 1, 0), **HOW), ph.attach(model, handler=look):
        model(tokens())
    for (call, out), full in zip(seen, (True, False), strict=True):
        for b in range(2):
            expected = reference("flux_attention")(
                call.q[b], call.k[b], call.v[b], full=full, sink=2, window=3, scale=call.scale
            )
            torch.testing.assert_close(out[b].double(), expected, rtol=1e-4, atol=1e-5)


def test_tokens_between_sinks_and_window_have_no_part_in_one_layer():
    model = make_one_layer()
    routers = saying(model, 0)
    ids, other = tokens(1), tokens(1)
    other[0, 4] = (other[0, 4] + 1) % 90 + 5
    with routed_layers(model, routers, **HOW):
        a, b = model(ids).logits, model(other).logits
    assert torch.equal(a[:, 7:], b[:, 7:])
    assert not torch.allclose(a[:, 4:7], b[:, 4:7])
    assert not torch.allclose(model(ids).logits[:, 7:], model(other).logits[:, 7:])


def make_one_layer():
    import transformers as t

    from hf.tiny import SIZES

    return make(t.LlamaForCausalLM, t.LlamaConfig(**(SIZES | {"num_hidden_layers": 1})))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_routers_read_queries_before_rotary_positions_and_behind_their_norm(name):
    """Position 0 turns nothing: there the query of the call is the query that is pooled."""
    model = DECODERS[name]()
    first = {}

    def look(call):
        first[call.layer.index] = call.q
        return call.proceed()

    one = tokens()[:, :1]
    with routed_layers(model, layer_routers(model), **HOW) as routing, ph.attach(model, handler=look):
        model(one)
        for layer in (0, 1):
            torch.testing.assert_close(routing.pooled[layer], mean_of_ends(first[layer].transpose(1, 2), 2))
        model(tokens())
    turned = mean_of_ends(first[0].transpose(1, 2), 2)
    assert not torch.allclose(routing.pooled[0], turned, atol=1e-3)


def test_only_the_ends_of_the_prompt_decide():
    model = llama()
    ids, middle, end = tokens(1), tokens(1), tokens(1)
    middle[0, 3:-3] += 1
    end[0, -1] += 1
    with routed_layers(model, saying(model, None, None), **HOW) as routing:
        found = []
        for one in (ids, middle, end):
            model(one)
            found.append(routing.logits[0])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


@pytest.mark.parametrize("side", ["none", "left"])
def test_sequences_are_decided_for_one_by_one_and_decisions_stay(side):
    """A batch is its texts by themselves, in the prompt and in what follows."""
    model = llama()
    mask = padding(side)
    routers = saying(model, 1, 0)
    with torch.no_grad():
        routers.of(0).last.weight.normal_(std=5)
    ids, more = tokens(), tokens(length=LENGTH + 4)[:, LENGTH:]
    # a decision of its own for each of the two
    with routed_layers(model, routers, **HOW) as routing:
        model(ids, attention_mask=mask)
        middle = routing.logits[0].diff().mean()
        routers.of(0).last.bias[0] += middle
        whole = torch.cat([ids, more], 1)
        attention = None if mask is None else torch.cat([mask, mask.new_ones(2, 4)], 1)
        out = model(ids, attention_mask=mask, use_cache=True)
        assert sorted(routing.decisions[0].tolist()) == [0.0, 1.0]
        assert routing.decisions[1].tolist() == [0.0, 0.0]
        assert sorted(routing.sparsity().tolist()) == [0.5, 1.0]
        decided = routing.decisions[0].tolist()
        steps = [out.logits]
        for n in range(4):
            known = None if attention is None else attention[:, : LENGTH + n + 1]
            step = model(more[:, n : n + 1], attention_mask=known, past_key_values=out.past_key_values)
            steps.append(step.logits)
        assert routing.decisions[0].tolist() == decided
    found = torch.cat(steps, 1)
    for b in range(2):
        start = 4 if side == "left" and b == 0 else 0
        layers = (1,) if decided[b] else (0, 1)
        with ph.attach(model, handler=sparse_mask(layers)):
            expected = model(whole[b : b + 1, start:]).logits
        torch.testing.assert_close(found[b : b + 1, start:], expected, rtol=1e-4, atol=1e-4)


def test_generate_decides_once_for_each_prompt():
    model = llama()
    with routed_layers(model, saying(model, 0, 1), **HOW):
        found = model.generate(tokens(), max_new_tokens=6, do_sample=False)
        beams = model.generate(tokens(), max_new_tokens=4, num_beams=2)
    with ph.attach(model, handler=sparse_mask((0,))):
        assert torch.equal(model.generate(tokens(), max_new_tokens=6, do_sample=False), found)
        assert torch.equal(model.generate(tokens(), max_new_tokens=4, num_beams=2), beams)


def test_in_training_outputs_are_those_of_the_decisions_and_gradients_reach_the_routers():
    model = llama().requires_grad_(False)
    routers = saying(model, None, None).requires_grad_(True)
    with routed_layers(model, routers, **HOW, temperature=1.5) as routing:
        drawn = set()
        for seed in range(12):
            torch.manual_seed(seed)
            logits = model(tokens(1), use_cache=False).logits
            full = [index for index, z in routing.decisions.items() if float(z)]
            drawn.add(tuple(full))
            expected = unrouted([n for n in (0, 1) if n not in full])
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert len(drawn) > 1
        (logits.logsumexp(-1).sum() + routing.sparsity().sum()).backward()
    for router in routers.layers.values():
        assert all(p.grad is not None and bool(p.grad.any()) for p in router.parameters())
    assert all(p.grad is None for p in model.parameters())


def unrouted(layers):
    """What the same model computes with sparse attention in these layers."""
    other = llama()
    with ph.attach(other, handler=sparse_mask(layers)):
        return other(tokens(1), use_cache=False).logits


def test_some_layers_only():
    model = llama()
    routers = layer_routers(model, [1])
    assert routers.of(0) is None
    with torch.no_grad():
        routers.of(1).last.bias.copy_(torch.tensor([1.0, 0.0]))
    with routed_layers(model, routers, **HOW) as routing:
        found = model(tokens()).logits
    assert list(routing.decisions) == [1]
    with ph.attach(model, handler=sparse_mask((1,))):
        torch.testing.assert_close(found, model(tokens()).logits)


def test_the_model_is_as_it_was():
    model = llama()
    expected = eager(model)(tokens()).logits
    with pytest.raises(ZeroDivisionError), routed_layers(model, saying(model, 0, 0), **HOW):
        model(tokens())[1 // 0]
    assert torch.equal(model(tokens()).logits, expected)
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks


def test_routers_go_through_a_state_dict():
    model = llama()
    routers = saying(model, None, 0)
    other = layer_routers(model)
    other.load_state_dict(routers.state_dict())
    with routed_layers(model, routers, **HOW):
        expected = model(tokens()).logits
    with routed_layers(model, other, **HOW):
        assert torch.equal(model(tokens()).logits, expected)


def test_what_cannot_be_routed_is_said():
    with pytest.raises(UnsupportedModel, match="has no projection that makes its 4 × 8 queries and nothing"):
        layer_routers(DECODERS["gpt2"]())
    model = llama()
    with pytest.raises(ConfigError, match=r"the layers of causal self-attention are \[0, 1\]; got 2"):
        layer_routers(model, [2])
    with pytest.raises(ConfigError, match="at least one layer"):
        layer_routers(model, [])
    with pytest.raises(ConfigError, match="routers must be layer_routers"), routed_layers(model, None):
        pass
    routers = layer_routers(model)
    for name, value in (("sink", -1), ("window", 0), ("size", 0), ("temperature", 0)):
        with (
            pytest.raises(ConfigError, match=f"routed_layers: {name}"),
            routed_layers(model, routers, **{name: value}),
        ):
            pass
    wider = ph.hf.LayerRouters({0: 16})
    with pytest.raises(ConfigError, match="reads queries of 16"), routed_layers(model, wider):
        pass
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks
    past = model(tokens(), use_cache=True).past_key_values
    with routed_layers(model, routers) as routing:
        with pytest.raises(ConfigError, match="nothing has been decided"):
            routing.sparsity()
        with pytest.raises(ConfigError, match="goes on with 2 sequences, of which no sequence was routed"):
            model(tokens()[:, :1], past_key_values=past)


def test_of_two_sequences_read_only_the_decoder_is_routed():
    model = t5()
    routers = layer_routers(model)
    assert len(routers.layers) == 2
    with torch.no_grad():
        for router in routers.layers.values():
            router.last.bias.copy_(torch.tensor([1.0, 0.0]))
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens()}
    expected = model(**inputs).logits
    with routed_layers(model, routers, sink=1, window=2):
        assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)
    with routed_layers(model, routers, sink=1, window=LENGTH):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
