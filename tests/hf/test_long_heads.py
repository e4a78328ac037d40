"""Heads that choose chunks of a long text and read them at near positions, alone and in pretrained models."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as t
from torch import Tensor

import polyhead as ph
from hf.tiny import SIZES, make, tokens
from polyhead.errors import ConfigError, ShapeError
from polyhead.hf.long_heads import LongHeads
from polyhead.nn import LinearScaling, Yarn, rope
from polyhead.nn.long_heads import attend_to_chunks, chunk_keys, keys_of_chunks

ROPE = rope(500.0)
SHAPES = [(2, 4, 2, 37), (1, 2, 2, 61), (1, 4, 1, 48)]


def tensors(batch: int, heads: int, kv_heads: int, tokens: int, width: int = 8) -> list[Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    sizes = (heads, kv_heads, kv_heads)
    return [2 * torch.randn(batch, h, tokens, width, generator=draw, dtype=torch.float64) for h in sizes]


def whole(q: Tensor, k: Tensor, v: Tensor, window: int, length: int, position: ph.nn.Rope = ROPE) -> Tensor:
    own = {"position": position, "window": window}
    return attend_to_chunks(q, k, v, chunk_keys(q, k, v, **own), length=length, **own)


def turned(x: Tensor) -> Tensor:
    n = x.shape[2]
    return ROPE.turn(x, ROPE.turned(torch.arange(n), x.shape[3], n))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ph.attend(turned(q), turned(k), v, mask=ph.causal())


@pytest.mark.parametrize(("window", "length"), [(4, 12), (5, 25), (1, 6)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_its_twin(shape: tuple[int, ...], window: int, length: int) -> None:
    x = tensors(*shape)
    expected = ph.reference("long_heads")(*x, window=window, length=length, base=500.0)
    torch.testing.assert_close(whole(*x, window, length), expected)
    assert not torch.allclose(expected, plain(*x), atol=0.01)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_all_chunks_may_be_read_it_is_plain_attention(shape: tuple[int, ...]) -> None:
    x = tensors(*shape)
    for window, length in ((4, 64), (16, 64), (7, 63)):
        torch.testing.assert_close(whole(*x, window, length), plain(*x))
    short = whole(*x, 4, 12)[:, :, :12]
    torch.testing.assert_close(short, plain(*x)[:, :, :12])


@pytest.mark.parametrize(("window", "length"), [(4, 12), (5, 25), (1, 6), (16, 64)])
def test_so_many_keys_are_read(window: int, length: int) -> None:
    q, k, v = tensors(1, 2, 2, 61)
    own = {"position": ROPE, "window": window}
    every = torch.eye(61, dtype=torch.float64).expand(1, 2, 61, 61)
    weights = attend_to_chunks(q, k, every, chunk_keys(q, k, v, **own), length=length, **own)
    found = keys_of_chunks(torch.arange(61), window=window, length=length)
    assert torch.equal((weights > 0).sum(-1), found.expand(1, 2, 61))


def test_steps_are_what_the_whole_call_is() -> None:
    q, k, v = tensors(2, 4, 2, 37)
    own = {"position": ROPE, "window": 4}
    expected = whole(q, k, v, 4, 16)
    keys = chunk_keys(q, k, v, **own)
    for first, last in ((0, 9), (9, 10), (19, 20), (20, 21), (21, 37), (36, 37)):
        part = k[:, :, :last], v[:, :, :last]
        found = attend_to_chunks(q[:, :, first:last], *part, keys[:, :, : last // 4], length=16, **own)
        torch.testing.assert_close(found, expected[:, :, first:last])


def test_later_tokens_have_no_part() -> None:
    x = tensors(1, 4, 2, 50)
    before = whole(*x, 4, 16)
    for cut in (17, 24, 38):
        changed = [torch.cat([one[:, :, :cut], one[:, :, cut:] + 3], 2) for one in x]
        torch.testing.assert_close(whole(*changed, 4, 16)[:, :, :cut], before[:, :, :cut])


class Asked(ph.nn.Rope):
    """A rope that refuses places beyond a limit."""

    limit: int = 16

    def turned(self, positions: Tensor, head_dim: int, length: int) -> Tensor:
        assert int(positions.min()) >= 0
        assert int(positions.max()) < self.limit
        return super().turned(positions, head_dim, length)


def test_no_place_reaches_the_length() -> None:
    x = tensors(1, 4, 2, 90)
    whole(*x, 4, 16, Asked())
    with pytest.raises(AssertionError):
        whole(*x, 4, 20, Asked())


def test_a_head_reads_the_chunks_that_answer_it_and_heads_differ() -> None:
    """Two heads, each asks for a chunk of its own in the middle of a text: both are found."""
    _, k, v = tensors(1, 1, 1, 64)
    k, v = 0.01 * k, v / 8
    q = torch.zeros(1, 2, 64, 8, dtype=torch.float64)
    q[0, 0, -1, 3] = q[0, 1, -1, 7] = 9.0  # the slowest pair, which hardly turns
    k[0, 0, 20:24, 3] = k[0, 0, 40:44, 7] = 4.0
    v[0, 0, 20:24] = 5.0
    v[0, 0, 40:44] = -5.0
    y = whole(q, k, v, 4, 16, rope(1e6))[0, :, -1]
    assert (y[0] > 4).all()
    assert (y[1] < -4).all()


def test_gradients_flow_through_what_is_read() -> None:
    x = [one.requires_grad_() for one in tensors(1, 2, 1, 15, 4)]
    assert torch.autograd.gradcheck(lambda *x: whole(*x, 2, 8), x)


def test_wrong_input_is_said() -> None:
    q, k, v = tensors(1, 2, 2, 20)
    for length in (10, 14, 8):
        with pytest.raises(ConfigError, match=f"at least three of it.*length {length} and window 4"):
            whole(q, k, v, 4, length)
    with pytest.raises(ConfigError, match="window must be at least 1; got 0"):
        attend_to_chunks(q, k, v, q, position=ROPE, window=0, length=16)
    with pytest.raises(ShapeError, match="20 keys have 5 complete chunks of 4.*got 4 chunk keys"):
        attend_to_chunks(q, k, v, q[:, :, :4], position=ROPE, window=4, length=16)
    with pytest.raises(ShapeError, match="equally wide; got 8 and 5"):
        chunk_keys(q, k, v[..., :5], position=ROPE, window=4)
    with pytest.raises(ConfigError, match=r"rotary one such as rope\(\)"):
        chunk_keys(q, k, v, position=ph.nn.no_position(), window=4)


@pytest.fixture(scope="module")
def model() -> t.LlamaForCausalLM:
    return make(t.LlamaForCausalLM, t.LlamaConfig(**SIZES | {"num_hidden_layers": 3}))


@torch.no_grad()
def logits(model: t.PreTrainedModel, ids: Tensor, **more: object) -> Tensor:
    return model(ids, **more).logits


def test_a_model_within_its_length_is_as_it_was(model: t.LlamaForCausalLM) -> None:
    ids = tokens(2, 40)
    expected = logits(model, ids)
    with ph.long_heads(model, window=8, length=40):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-3, atol=1e-4)
    with ph.long_heads(model, window=4, length=12):
        assert not torch.allclose(logits(model, ids), expected, atol=1e-3)
    torch.testing.assert_close(logits(model, ids), expected)


def test_its_layers_read_what_the_twin_reads(model: t.LlamaForCausalLM) -> None:
    found: dict[int, list[Tensor]] = {}

    def note(call: ph.hf.Call) -> Tensor:
        found[call.layer.index] = [call.q, call.k, call.v, call.proceed()]  # type: ignore[list-item]
        return found[call.layer.index][-1]

    base = float(model.config.rope_parameters["rope_theta"])
    with ph.long_heads(model, window=4, length=12) as attachment, attachment.handling(note):
        logits(model, tokens(1, 30), use_cache=False)
    assert len(found) == 3
    for q, k, v, y in found.values():
        own = rope(base)
        back = own.turned(-torch.arange(30), q.shape[-1], 30)
        expected = ph.reference("long_heads")(
            own.turn(q, back), own.turn(k, back), v, window=4, length=12, base=base
        )
        torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-4)


def test_decoding_is_the_whole_call(model: t.LlamaForCausalLM) -> None:
    ids = tokens(2, 40)
    with ph.long_heads(model, window=4, length=12):
        expected = logits(model, ids)
        cache = None
        for first, last in ((0, 22), (22, 23), (23, 24), (24, 31), (31, 32), (32, 40)):
            made = model(ids[:, first:last], past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            torch.testing.assert_close(made.logits, expected[:, first:last], rtol=1e-3, atol=1e-4)
        begun = logits(model, ids[:, :9])  # another text
        torch.testing.assert_close(begun, expected[:, :9], rtol=1e-3, atol=1e-4)


def test_a_text_goes_on_in_several_ways(model: t.LlamaForCausalLM) -> None:
    ids, handler = tokens(), LongHeads.of(model, window=2, length=6)
    cache = t.DynamicCache(config=model.config)
    with torch.no_grad(), ph.attach(model, handler=handler):
        model(ids[:, :-3], past_key_values=cache)
    ends = (ids[:, -3:], ids[:, -3:].flip(1))
    for end in (*ends, *ends):
        with torch.no_grad(), ph.attach(model, handler=handler.copy()):
            found = model(end, past_key_values=copy.deepcopy(cache)).logits
        with torch.no_grad(), ph.long_heads(model, window=2, length=6):
            whole = model(torch.cat([ids[:, :-3], end], 1)).logits
        torch.testing.assert_close(found, whole[:, -3:], atol=1e-5, rtol=1e-4)


def test_scalings_of_frequencies_are_undone(model: t.LlamaForCausalLM) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    own = make(t.LlamaForCausalLM, t.LlamaConfig(**SIZES | {"rope_parameters": yarn}))
    ids = tokens(1, 30)
    expected = logits(own, ids)
    with ph.long_heads(own, window=8, length=32):
        torch.testing.assert_close(logits(own, ids), expected, rtol=1e-3, atol=1e-4)
    given = rope(1e4, scaling=Yarn(4.0, 16))
    with ph.long_heads(own, window=8, length=32, position=given):
        torch.testing.assert_close(logits(own, ids), expected, rtol=1e-3, atol=1e-4)
    with ph.long_heads(own, window=4, length=12, position=given):
        assert not torch.allclose(logits(own, ids), expected, atol=1e-3)
    assert not given.stretching
    assert LinearScaling(2.0).stretching is False


def test_a_model_says_what_it_cannot(model: t.LlamaForCausalLM) -> None:
    ids = tokens(2, 20)
    cache = model(ids[:, :10]).past_key_values
    with ph.long_heads(model, window=4, length=12), pytest.raises(ConfigError, match="begin the text"):
        model(ids[:, 10:], past_key_values=cache)
    padding = torch.ones(2, 20, dtype=torch.long)
    padding[0, :3] = 0
    with ph.long_heads(model, window=4, length=12), pytest.raises(ConfigError, match="without padding"):
        model(ids, attention_mask=padding)
    with pytest.raises(ConfigError, match="at least three"), ph.long_heads(model, window=4, length=8):
        pass
    with (
        pytest.raises(ConfigError, match=r"rotary one such as rope\(\)"),
        ph.long_heads(model, position=ph.nn.no_position()),  # type: ignore[arg-type]
    ):
        pass
    other = make(t.GPT2LMHeadModel, t.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=100))
    with pytest.raises(ConfigError, match="names no rope_parameters"), ph.long_heads(other):
        pass
