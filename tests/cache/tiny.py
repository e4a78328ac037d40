"""Tiny random models, and the full forward pass with the mask that a cache stands for."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from polyhead.attend.masks import Mask, causal, per_head, sink, window
from polyhead.hf import attach

WORDS = 97
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def llama():
    return _made(LlamaForCausalLM, LlamaConfig(**SIZES))


def qwen3():
    return _made(Qwen3ForCausalLM, Qwen3Config(**SIZES))


def gemma2():
    """Soft caps, and a sliding window in every second layer."""
    return _made(
        Gemma2ForCausalLM,
        Gemma2Config(**SIZES, sliding_window=12, attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
    )


def gpt_oss():
    """Sink logits, and a sliding window in every second layer."""
    sizes = SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 12}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    model = _made(GptOssForCausalLM, GptOssConfig(**sizes))
    model.set_experts_implementation("eager")  # the others know no float64
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def gpt2():
    config = GPT2Config(
        vocab_size=WORDS, n_embd=48, n_layer=3, n_head=6, n_positions=512, bos_token_id=1, eos_token_id=None
    )
    return _made(GPT2LMHeadModel, config)


MODELS = {"llama": llama, "qwen3": qwen3, "gemma2": gemma2, "gpt_oss": gpt_oss, "gpt2": gpt2}


def _made(kind, config):
    torch.manual_seed(0)
    model = kind(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # sharper than at initialisation, so that heads matter
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def tokens(batch, length, seed=0):
    return torch.randint(2, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch, length, pads, seed=0):
    """Tokens and attention mask, item n with `pads[n]` tokens of padding on the left."""
    ids = tokens(batch, length, seed)
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        ids[row, :count] = 0
        mask[row, :count] = 0
    return ids, mask


def some_heads(model):
    """A choice of KV heads in which layers differ: none, the middle one, the outer ones."""
    config = model.config
    count = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    rows = [[False] * count, [h == 1 for h in range(count)], [h in (0, count - 1) for h in range(count)]]
    return rows


def short_mask(sinks: int, recent: int) -> Mask:
    return window(recent - 1) | sink(sinks)


def masked_forward(model, ids, full, sinks, recent, short=None):
    """Logits of one full forward pass without a cache, every head under its own mask.

    `recent` is one number, or one for every KV head of every layer.
    """

    def own_mask(layer, head):
        if full[layer][head]:
            return causal()
        size = recent if isinstance(recent, int) else recent[layer][head]
        return short_mask(sinks, size) if short is None else short

    def handler(call):
        repeat = call.layer.heads // call.layer.kv_heads
        heads = [own_mask(call.layer.index, h // repeat) for h in range(call.layer.heads)]
        own = per_head(heads)
        return call.replace(mask=own if call.mask is None else call.mask & own).proceed()

    with attach(model) as attachment, attachment.handling(handler), torch.no_grad():
        return model(ids, use_cache=False).logits
