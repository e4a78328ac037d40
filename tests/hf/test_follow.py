"""Layers of a pretrained model that read what an earlier layer chose."""

import pytest
import torch
import transformers as t

import polyhead as ph
from hf.tiny import SIZES, make, t5, tokens
from polyhead.attend.selectors import choose
from polyhead.errors import ConfigError
from polyhead.hf import attach

LENGTH = 30
UNIFIED = ph.unified_keys(7, 0.5, 2)


@pytest.fixture(scope="module")
def model():
    config = t.LlamaConfig(**SIZES | {"num_hidden_layers": 5})
    return make(t.LlamaForCausalLM, config)


@torch.no_grad()
def logits(model, ids=None, **more):
    return model(tokens(2, LENGTH) if ids is None else ids, use_cache=False, **more).logits


class Reading:
    """A handler: what every layer reads, and the same written out from a leader's own queries and keys."""

    def __init__(self, expected):
        self.expected, self.masks, self.wanted = expected, {}, {}

    def __call__(self, call):
        self.masks[call.layer.index] = call.mask
        if call.layer.index in self.expected:
            own = choose(self.expected[call.layer.index], call.q, call.k, ph.causal(), call.scale)
            self.wanted[call.layer.index] = ph.causal() & own
        return call.proceed()


def test_layers_read_what_their_leader_chose_and_the_leader_everything(model):
    from polyhead.attend.masks import densify

    sizes = {"batch": 2, "heads": 4, "queries": LENGTH, "keys": LENGTH}
    watch = Reading({1: UNIFIED, 3: UNIFIED})
    own = ph.less_is_more(5, 7, at=(1, 3), recent=0.5, first=2)
    with attach(model) as attachment, attachment.handling(watch), ph.sparse(model, own):
        logits(model)
    whole = densify(ph.causal(), **sizes)
    for layer in (0, 1, 3):
        assert torch.equal(densify(watch.masks[layer], **sizes).expand_as(whole), whole)
    for layer, leader in ((2, 1), (4, 3)):
        found = densify(watch.masks[layer], **sizes)
        assert torch.equal(found, densify(watch.wanted[leader], **sizes))
        assert int(found.sum(-1).amax()) == 7


def test_enough_keys_are_the_dense_model(model):
    with ph.sparse(model, ph.less_is_more(5, LENGTH, at=(1, 3))):
        found = logits(model)
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=1e-4)
    with ph.sparse(model, ph.less_is_more(5, 7, at=(1, 3))):
        assert not torch.allclose(logits(model), found, atol=1e-2)


def test_a_layer_may_follow_one_that_reads_less_itself(model):
    alone = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=1, cols=3, always=ph.window(0))
    with ph.sparse(model, {1: alone, 2: ph.follow(1)}):
        found = logits(model)
    with ph.sparse(model, {1: alone}):
        leader = logits(model)
    with ph.sparse(model, {1: alone, 2: alone}):
        both = logits(model)
    assert not torch.allclose(found, leader, atol=1e-3)
    assert not torch.allclose(found, both, atol=1e-3)


def test_steps_of_decoding_choose_as_the_whole_call_does(model):
    ids = tokens(1, 20)
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with ph.sparse(model, ph.less_is_more(5, 7, at=(1, 3))):
        found = model.generate(ids, **how)
        again = model.generate(ids, **how, use_cache=False)
    assert torch.equal(found, again)
    assert not torch.equal(found, model.generate(ids, **how))


def test_a_dense_prefill_before_sparse_steps(model):
    ids = tokens(2, LENGTH)
    own = ph.less_is_more(5, 7, at=(1, 3))
    with ph.sparse(model, own, prefill=False):
        assert torch.equal(logits(model), logits(model))
        whole = logits(model)
        with torch.no_grad():
            held = model(ids[:, :-1], use_cache=True).past_key_values
            last = model(ids[:, -1:], past_key_values=held).logits
    torch.testing.assert_close(whole, logits(model))
    with attach(model), torch.no_grad():
        held = model(ids[:, :-1], use_cache=True).past_key_values
        dense = model(ids[:, -1:], past_key_values=held).logits
    torch.testing.assert_close(dense[:, 0], whole[:, -1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(last[:, 0], whole[:, -1], atol=1e-2)


def test_every_pass_chooses_anew(model):
    own = ph.less_is_more(5, 7, at=(1, 3))
    one, other = tokens(2, LENGTH), tokens(2, LENGTH).flip(1)
    with ph.sparse(model, own):
        first = logits(model, one)
        logits(model, other)
        logits(model, one[:, :11])
        assert torch.equal(logits(model, one), first)


def test_after_a_pass_that_failed_the_next_is_as_ever(model):
    class Failing:
        on = True

        def __call__(self, call):
            if self.on and call.layer.index == 3:
                raise RuntimeError("by intent")
            return call.proceed()

    failing, own = Failing(), ph.less_is_more(5, 7, at=(1,))
    with attach(model) as attachment, attachment.handling(failing), ph.sparse(model, own):
        with pytest.raises(RuntimeError, match="by intent"):
            logits(model)
        failing.on = False
        found = logits(model, tokens(2, LENGTH)[:, :15])
    with ph.sparse(model, own):
        assert torch.equal(logits(model, tokens(2, LENGTH)[:, :15]), found)


def test_a_layer_that_is_run_alone_is_refused(model):
    hidden = torch.randn(1, 12, SIZES["hidden_size"])
    places = model.model.rotary_emb(hidden, torch.arange(12)[None])
    with ph.sparse(model, ph.less_is_more(5, 7, at=(1,))), torch.no_grad():
        logits(model)
        with pytest.raises(ConfigError, match="layer 2 follows layer 1, which has chosen nothing in this"):
            model.model.layers[2](hidden, position_embeddings=places)
        model.model.layers[1](hidden[:, :9], position_embeddings=tuple(x[:, :9] for x in places))
        with pytest.raises(ConfigError, match=r"its call is another .* \(1, 12, 12, 0\), not \(1, 9, 9, 0\)"):
            model.model.layers[2](hidden, position_embeddings=places)


def test_keys_that_are_not_the_leaders_are_refused():
    model = t5()
    inputs = {"input_ids": tokens(1, 12), "decoder_input_ids": tokens(1, 9)}
    with attach(model) as attachment:
        kinds = [layer.kind for layer in attachment.layers]
    leader = kinds.index("decoder")
    crossing = kinds.index("cross", leader)
    own = {leader: UNIFIED, crossing: ph.follow(leader)}
    said = f"layer {crossing} follows layer {leader}, but its call is another"
    with ph.sparse(model, own), torch.no_grad(), pytest.raises(ConfigError, match=said):
        model(**inputs)


def test_missed_mass_of_layers_that_follow(model):
    ids = tokens(1, LENGTH)
    own = ph.less_is_more(5, 7, at=(1, 3))
    missed = ph.heads.missed_mass(model, text=ids, select=own).mass
    for layer in (0, 1, 3):
        assert max(missed[layer]) < 1e-6
    for layer in (2, 4):
        assert min(missed[layer]) > 1e-3
    more = ph.heads.missed_mass(model, text=ids, select=ph.less_is_more(5, 20, at=(1, 3))).mass
    assert more.flat.mean() < missed.flat.mean()


def test_what_cannot_be_followed_is_said(model):
    with pytest.raises(ConfigError, match=r"layer 2: follow\(3\) must name an earlier layer"):
        ph.sparse(model, {2: ph.follow(3), 3: UNIFIED}).__enter__()
    with pytest.raises(ConfigError, match="a layer that chooses, but layer 1 reads everything"):
        ph.sparse(model, {2: ph.follow(1)}).__enter__()
    with pytest.raises(ConfigError, match="a layer that chooses, but layer 2 follows itself"):
        ph.sparse(model, {1: UNIFIED, 2: ph.follow(1), 3: ph.follow(2)}).__enter__()
    with pytest.raises(ConfigError, match="prefill must be True or False"):
        ph.sparse(model, UNIFIED, prefill=1).__enter__()
