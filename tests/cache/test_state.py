"""What a per-head cache holds, and what can be done to it."""

import gc

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from cache.tiny import SIZES, gemma2, left_padded, llama, masked_forward, short_mask, tokens
from polyhead.attend.masks import causal
from polyhead.cache import per_head
from polyhead.cache.policy import full_heads
from polyhead.errors import ConfigError, ShapeError, UnsupportedModel
from polyhead.head_scores import Heads, HeadScores
from polyhead.hf import LayerInfo, attach

HALF = [[True, False, False], [False, True, False], [False, False, True]]
ROW = 2 * 8 * 8  # bytes of one head's key and value


def fed(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, attention_mask=mask).logits


# -- bytes ---------------------------------------------------------------------------------------------


def test_bytes_are_those_of_what_is_held():
    model = llama()
    cache = per_head(model, full=HALF, sink=2, window=8)
    fed(model, cache, tokens(2, 200))
    assert cache.nbytes_used() == 2 * 3 * ROW * (200 + 2 * 10)
    assert cache.nbytes() == 2 * 3 * ROW * (264 + 2 * 10)
    assert cache.held() == [[200, 10, 10], [10, 200, 10], [10, 10, 200]]
    assert cache.get_seq_length() == 200
    assert cache.get_mask_sizes(5, 0) == (205, 0)
    assert cache.get_max_length() == -1
    assert not cache.is_compileable


def test_a_short_context_takes_little_memory():
    model = llama()
    cache = per_head(model, full="none", sink=4, window=256)
    fed(model, cache, tokens(1, 10))
    assert cache.nbytes() == 9 * ROW * 16


def test_memory_is_freed_layer_by_layer_and_chunk_by_chunk():
    model, ids = llama(), tokens(1, 200)
    seen = []

    def watch(call):
        out = call.proceed()
        seen.append([cache.layers[n].nbytes() for n in range(3)])
        return out

    cache = per_head(model, full="none", sink=2, window=8)
    with attach(model) as attachment, attachment.handling(watch):
        for start in (0, 100):
            fed(model, cache, ids[:, start : start + 100])
            size = 3 * ROW * 10
            assert seen[-3:] == (
                [[size, 0, 0], [size, size, 0], [size] * 3] if start == 0 else [[size] * 3] * 3
            )


def test_rows_are_not_moved_by_a_step():
    model = llama()
    cache = per_head(model, full=HALF, sink=2, window=8)
    fed(model, cache, tokens(1, 100))
    places = [group.rows.keys.data_ptr() for layer in cache.layers for group in layer.groups]
    for n in range(10):
        fed(model, cache, tokens(1, 1, seed=n))
    assert [group.rows.keys.data_ptr() for layer in cache.layers for group in layer.groups] == places


def test_windows_of_their_own_hold_as_much_as_each_head_keeps():
    model, windows = llama(), [[8, 30, 8], [1, 2, 3], [90, 90, 500]]
    cache = per_head(model, full=[[False] * 3, [False, True, False], [False] * 3], sink=2, window=windows)
    fed(model, cache, tokens(1, 100))
    assert cache.held() == [[10, 32, 10], [3, 100, 5], [92, 92, 100]]
    assert cache.nbytes_used() == ROW * sum(map(sum, cache.held()))
    assert "1 of 9 KV heads in full, the rest 2 + 1 to 500 tokens" in repr(cache)
    same = per_head(model, full="none", sink=2, window=[[8] * 3] * 3)
    assert "the rest 2 + 8 tokens" in repr(same)


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (0, "whole number of tokens, at least 1; got 0"),
        (True, "for each KV head of each layer"),
        (2.5, "whole number of tokens, at least 1; got 2.5"),
        ("256", "for each KV head of each layer"),
        ([8, 8, 8], "for each KV head of each layer"),
        ([[8] * 3] * 2, "row of numbers for each of the model's 3 layers; got 2 rows"),
        ([[8] * 3, [8] * 2, [8] * 3], "one number for each KV head: .* has 3 of them; got 2"),
        ([[8] * 3, [8] * 3, [8, -1, 8]], "at least 1; got -1"),
        ([[8] * 3, [8] * 3, [8, True, 8]], "at least 1; got True"),
    ],
)
def test_windows_that_do_not_fit(window, said):
    model = llama()
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match=said):
        per_head(model, full="none", window=window)
    assert model.config._attn_implementation == before  # nothing stays attached
    cache = per_head(model, full="none", window=8)
    assert model.config._attn_implementation != before
    cache.detach()


def test_the_models_own_tensors_are_let_go():
    model = llama()
    cache = per_head(model, full=HALF, sink=2, window=8)
    fed(model, cache, tokens(1, 100))
    gc.collect()
    for layer in cache.layers:
        assert layer._pending is None
        for group in layer.groups:
            assert group.rows.keys._base is None
            assert group.rows.keys.untyped_storage().nbytes() == group.rows.keys.numel() * 8


# -- going back, batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("full", ["all", HALF], ids=["all", "some"])
def test_crop_where_nothing_is_missing(full):
    model, ids = llama(), tokens(2, 30)
    rows = HALF if full == HALF else [[True] * 3] * 3
    cache = per_head(model, full=full, sink=4, window=16)
    fed(model, cache, ids[:, :20])
    cache.crop(-7)
    assert cache.get_seq_length() == 13
    expected = masked_forward(model, ids, rows, 4, 16)[:, 13:]
    torch.testing.assert_close(fed(model, cache, ids[:, 13:]), expected)
    cache.crop(0)
    if full == "all":
        cache.crop(-30)
        torch.testing.assert_close(fed(model, cache, ids), masked_forward(model, ids, rows, 4, 16))
    else:
        before = cache.held()
        with pytest.raises(
            ConfigError, match="crop to 29 of 30 tokens: heads that keep 4 sink and 16 recent"
        ):
            cache.crop(-1)
        assert cache.held() == before
    with pytest.raises(ConfigError, match="minus the number of tokens"):
        cache.crop(3)


def test_crop_with_padding():
    model = llama()
    ids, mask = left_padded(2, 30, [0, 8])
    cache = per_head(model, full=HALF, sink=4, window=16)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20], past_key_values=cache)
        cache.crop(-5)
        found = model(
            ids[:, 15:], attention_mask=mask, position_ids=positions[:, 15:], past_key_values=cache
        ).logits
    for row, count in enumerate([0, 8]):
        alone = masked_forward(model, ids[row : row + 1, count:], HALF, 4, 16)
        torch.testing.assert_close(found[row : row + 1], alone[:, 15 - count :])


@pytest.mark.parametrize("pads", [[0, 0, 0], [0, 3, 25]])
def test_batch_operations(pads):
    model = llama()
    ids, mask = left_padded(3, 40, pads)
    cache = per_head(model, full=HALF, sink=2, window=8)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids[:, :36], attention_mask=mask[:, :36], position_ids=positions[:, :36], past_key_values=cache)
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        cache.batch_repeat_interleave(2)
        keep = torch.tensor([0, 3, 4])
        cache.batch_select_indices(keep)
        rows = order.repeat_interleave(2)[keep]
        found = model(
            ids[rows, 36:],
            attention_mask=mask[rows],
            position_ids=positions[rows, 36:],
            past_key_values=cache,
        ).logits
    for n, row in enumerate(rows.tolist()):
        alone = masked_forward(model, ids[row : row + 1, pads[row] :], HALF, 2, 8)
        torch.testing.assert_close(found[n : n + 1], alone[:, -4:])


def test_inference_mode_and_afterwards():
    model, ids = llama(), tokens(1, 30)
    cache = per_head(model, full=HALF, sink=2, window=8)
    with torch.inference_mode():
        first = model(ids[:, :20], past_key_values=cache).logits.clone()
    rest = fed(model, cache, ids[:, 20:])
    expected = masked_forward(model, ids, HALF, 2, 8)
    torch.testing.assert_close(torch.cat([first, rest], 1), expected)


def test_a_handler_that_answers_by_itself_still_fills_the_cache():
    model, ids = llama(), tokens(1, 30)
    cache = per_head(model, full=HALF, sink=2, window=8)

    def skip(call):
        return torch.zeros_like(call.q) if call.layer.index == 1 else call.proceed()

    with attach(model) as attachment:
        with attachment.handling(skip):
            found = torch.cat([fed(model, cache, ids[:, :20]), fed(model, cache, ids[:, 20:])], 1)
            assert cache.held()[1] == [10, 20, 10]
            assert cache.layers[1].get_seq_length() == 30
        short = short_mask(2, 8)

        def both(call):
            if call.layer.index == 1:
                return torch.zeros_like(call.q)
            masks = [causal() if HALF[call.layer.index][h // 2] else short for h in range(6)]
            from polyhead.attend.masks import per_head as by_head

            return call.replace(mask=call.mask & by_head(masks)).proceed()

        with attachment.handling(both), torch.no_grad():
            torch.testing.assert_close(found, model(ids).logits)


def test_a_mask_changed_by_a_handler_is_obeyed():
    model, ids = llama(), tokens(1, 30)
    from polyhead.attend.masks import per_head as by_head
    from polyhead.attend.masks import sink

    def blind(call):
        return call.replace(mask=call.mask & by_head([~sink(1)] * 2 + [causal()] * 4)).proceed()

    with attach(model) as attachment, attachment.handling(blind):
        expected = masked_forward(model, ids, HALF, 2, 8)
        for chunks in ([30], [1] * 30, [10, 20]):
            cache = per_head(model, full=HALF, sink=2, window=8)
            with attachment.handling(blind):
                found = [fed(model, cache, part) for part in ids.split(chunks, 1)]
            torch.testing.assert_close(torch.cat(found, 1)[:, 1:], expected[:, 1:])


# -- models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_encoder_decoders(kind):
    torch.manual_seed(0)
    if kind == "t5":
        config = T5Config(
            vocab_size=97,
            d_model=48,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=6,
            decoder_start_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
        model = T5ForConditionalGeneration(config)
        inputs = {"input_ids": tokens(2, 12)}
    else:
        config = WhisperConfig(
            vocab_size=97,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=6,
            decoder_attention_heads=6,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
            suppress_tokens=None,
        )
        model = WhisperForConditionalGeneration(config)
        inputs = {"input_features": torch.randn(2, 8, 40)}
    model = model.double().eval().requires_grad_(False)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    for parameter in model.parameters():
        parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)
    decoder = tokens(2, 24)
    attached = attach(model)
    layers = [layer for layer in attached.layers if layer.kind == "decoder"]
    attached.detach()
    full = [[h % 2 == n for h in range(6)] for n in range(2)]
    whole = model(**inputs, decoder_input_ids=decoder, use_cache=False).logits

    def short(call):
        from polyhead.attend.masks import per_head as by_head

        if call.layer.kind != "decoder":
            return call.proceed()
        row = full[[layer.index for layer in layers].index(call.layer.index)]
        masks = [causal() if row[h] else short_mask(2, 5) for h in range(6)]
        return call.replace(
            mask=by_head(masks) if call.mask is None else call.mask & by_head(masks)
        ).proceed()

    with attach(model) as attachment, attachment.handling(short):
        expected = model(**inputs, decoder_input_ids=decoder, use_cache=False).logits
    assert (expected - whole).abs().max() > 1e-4
    for rows, wanted in (("all", whole), (full, expected)):
        cache = per_head(model, full=rows, sink=2, window=5)
        found, start = [], 0
        encoded = model.get_encoder()(**inputs)
        for count in (9, 1, 1, 13):
            part = decoder[:, start : start + count]
            found.append(model(encoder_outputs=encoded, decoder_input_ids=part, past_key_values=cache).logits)
            start += count
        torch.testing.assert_close(torch.cat(found, 1), wanted)
        cross = cache.cross_attention_cache.layers[0].keys
        assert cache.nbytes() == cache.self_attention_cache.nbytes() + 4 * cross.numel() * 8
        assert cache.held()[0] == [24] * 6 if rows == "all" else [24, 7] * 3
        cache.detach()
    model.generation_config.eos_token_id = None
    how = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    found = model.generate(**inputs, past_key_values=per_head(model, full="all"), **how)
    assert found.tolist() == model.generate(**inputs, **how).tolist()


def test_layers_that_share_keys_and_recurrent_layers():
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "num_hidden_layers"}
    shared = Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **sizes,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            sliding_window=12,
            vocab_size_per_layer_input=97,
            hidden_size_per_layer_input=8,
            laurel_rank=8,
            altup_num_inputs=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            activation_sparsity_pattern=[0.0] * 4,
        )
    )
    recurrent = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **sizes,
            num_hidden_layers=4,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"] * 2,
        )
    )
    for model in (shared, recurrent):
        model.eval().requires_grad_(False)
        model.generation_config.eos_token_id = None
        ids = tokens(2, 20)
        how = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        expected = model.generate(ids, **how)
        cache = per_head(model, full="all")
        assert model.generate(ids, past_key_values=cache, **how).tolist() == expected.tolist()
        assert cache.nbytes() > 0
        cache = per_head(model, full="none", sink=2, window=6)
        model.generate(ids, past_key_values=cache, **how)
        assert max(max(row) for row in cache.held()) == 8


def others(kind):
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
    torch.manual_seed(0)
    if kind == "mistral":  # a sliding window in every layer
        made = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=12))
    elif kind == "llama4":  # chunks of 16 tokens in two layers
        config = transformers.Llama4TextConfig(
            **SIZES,
            attention_chunk_size=16,
            num_local_experts=2,
            intermediate_size_mlp=64,
            no_rope_layers=[1, 1, 0],
        )
        made = transformers.Llama4ForCausalLM(config)
    elif kind == "deepseek":  # caches what keys and values are made from
        config = transformers.DeepseekV3Config(
            **sizes | {"num_key_value_heads": 6},
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            v_head_dim=8,
            qk_nope_head_dim=8,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=3,
            moe_intermediate_size=16,
        )
        made = transformers.DeepseekV3ForCausalLM(config)
    else:  # cuts cached values in two
        config = transformers.DiffLlamaConfig(**SIZES | {"num_key_value_heads": 6})
        made = transformers.DiffLlamaForCausalLM(config)
    return made.double().eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["mistral", "llama4"])
def test_windows_and_chunks_of_the_models_own(kind):
    model, ids = others(kind), tokens(2, 40)
    expected = masked_forward(model, ids, HALF, 2, 8)
    for chunks in ([40], [20] + [1] * 20, [7, 12, 1, 20]):
        cache = per_head(model, full=HALF, sink=2, window=8)
        found = [fed(model, cache, part) for part in ids.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(found, 1), expected)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("deepseek", "something else than the keys and values of its 6 KV heads into the cache"),
        ("diffllama", "the model's own code calls chunk"),
    ],
)
def test_models_that_need_tensors_are_refused_by_name(kind, message):
    model = others(kind)
    with pytest.raises(UnsupportedModel, match=message):
        fed(model, per_head(model, full="all"), tokens(1, 5))


def test_models_without_a_cache_are_refused():
    model = BertModel(
        BertConfig(
            vocab_size=97, hidden_size=48, num_hidden_layers=1, num_attention_heads=6, intermediate_size=64
        )
    )
    with pytest.raises(UnsupportedModel, match="BertModel has no layer of causal self-attention"):
        per_head(model, full="all")
    assert model.config._attn_implementation == "sdpa"


def test_without_polyhead_the_cache_says_what_it_is():
    model = llama()
    cache = per_head(model, full="none")
    cache.detach()
    with pytest.raises(UnsupportedModel, match="HeldKeys .* no tensor"):
        fed(model, cache, tokens(1, 5))


def test_the_model_is_attached_as_long_as_the_cache_lives():
    model = llama()
    cache, other = per_head(model, full="none"), per_head(model, full="all")
    assert model.config._attn_implementation == "polyhead"
    del cache
    gc.collect()
    assert model.config._attn_implementation == "polyhead"
    other.detach()
    other.detach()
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError):
        per_head(model, full="everything")
    assert model.config._attn_implementation == "sdpa"


# -- wrong use -----------------------------------------------------------------------------------------


def test_wrong_use_is_told():
    model, ids = llama(), tokens(2, 20)
    cache = per_head(model, full=HALF, sink=2, window=8)
    fed(model, cache, ids)
    with pytest.raises(ShapeError, match="holds 2 sequences.*brings 1"):
        fed(model, cache, ids[:1])
    model.requires_grad_(True)
    with pytest.raises(ConfigError, match="torch.no_grad"):
        model(ids, past_key_values=per_head(model, full="all"))
    model.requires_grad_(False)
    for wrong in ({"sink": -1}, {"window": 0}, {"window": 2.5}, {"prefill": "exact"}, {"sink": True}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            per_head(model, full="all", **wrong)
    with pytest.raises(ConfigError, match="compensate=True does not go with a window below the model's own"):
        per_head(gemma2(), full="none", window=8, compensate=True)


def test_padding_must_be_told_all_the_way():
    model = llama()
    ids, mask = left_padded(2, 20, [0, 5])
    cache = per_head(model, full=HALF, sink=2, window=8)
    fed(model, cache, ids, mask)
    with pytest.raises(ConfigError, match="no longer says which of the 20 tokens in the cache were padding"):
        fed(model, cache, ids[:, :1])
    cache = per_head(model, full=HALF, sink=2, window=8)
    fed(model, cache, ids)
    with pytest.raises(ConfigError, match="hides some of the 20 tokens in the cache"):
        fed(model, cache, ids[:, :1], torch.cat([mask, mask[:, -1:]], 1))


# -- which heads ---------------------------------------------------------------------------------------

LAYERS = [LayerInfo(n, f"layers.{n}", "decoder", 6, 3, 8, cache_index=n) for n in range(2)]
WANTED = [(True, False, False), (False, False, True)]


@pytest.mark.parametrize(
    "full",
    [
        Heads(((0, 1), (1, 4), (1, 5)), "query", (2, 2)),
        Heads(((0, 1), (1, 4)), "query"),
        Heads(((0, 0), (1, 2)), "kv"),
        [(0, 0), (1, 2)],
        {(0, 0), (1, 2)},
        [[True, False, False], [False, False, True]],
        torch.tensor([[True, False, False], [False, False, True]]),
        torch.tensor([[True, False, False], [False, False, True]]).numpy(),
    ],
    ids=lambda full: type(full).__name__,
)
def test_which_heads(full):
    assert full_heads(full, LAYERS) == WANTED


def test_which_heads_by_number():
    query = HeadScores(([0, 9, 1, 1, 2, 2], [0, 0, 1, 1, 3, 8]))
    kv = HeadScores(([9, 1, 2], [0, 1, 8]), level="kv")
    for scores in (query, kv):
        assert full_heads(2, LAYERS, scores) == WANTED
        assert full_heads(1 / 3, LAYERS, scores) == WANTED
        assert full_heads(0, LAYERS, scores) == full_heads("none", LAYERS) == full_heads([], LAYERS)
        assert full_heads(1.0, LAYERS, scores) == full_heads("all", LAYERS)


@pytest.mark.parametrize(
    ("full", "message"),
    [
        ("some", "'all', 'none'"),
        (0.2, "pass scores= as well"),
        (HeadScores(([1.0],)), "choose heads from them"),
        ([(5, 0)], "layer 5, but the layers with a cache are 0 to 1"),
        ([(0, 3)], "KV head 3 of layer 0, which has 3"),
        (Heads(((0, 6),), "query"), "query head 6 of layer 0, which has 6"),
        ([[True, False, False]], "a row of bools for each of the model's 2 layers; got 1"),
        ([[True], [False]], "one bool for each KV head: 'layers.0' has 3 of them; got 1"),
        (None, "full must be Heads"),
        ([0, 1], "full must be Heads"),
    ],
)
def test_wrong_heads(full, message):
    with pytest.raises(ConfigError, match=message):
        full_heads(full, LAYERS)


def test_scores_go_with_a_number_only():
    with pytest.raises(ConfigError, match="scores= goes with a number"):
        full_heads("all", LAYERS, HeadScores(([1.0],)))


def test_it_prints():
    model = llama()
    cache = per_head(model, full=HALF, sink=2, window=8)
    fed(model, cache, tokens(1, 20))
    assert repr(cache).startswith(
        "PerHeadCache(3 of 9 KV heads in full, the rest 2 + 8 tokens; 20 tokens seen"
    )
