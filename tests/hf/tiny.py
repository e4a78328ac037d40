"""Tiny random models of the architectures that the bridge is tested on, and inputs for them."""

import torch
import transformers as t

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LENGTH = 12


def noisy(model):
    """Random weights large enough that a wrong mask, scale or sink shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
    return model.eval()


def make(kind, config):
    torch.manual_seed(0)
    return noisy(kind(config))


def gpt_oss():
    """Sink logits and sliding windows in every second layer."""
    config = t.GptOssConfig(**SIZES, sliding_window=4, num_local_experts=2, num_experts_per_tok=1)
    model = make(t.GptOssForCausalLM, config)
    model.set_experts_implementation("eager")
    return model


def llama4():
    """Chunked attention in the first layer, full attention in the second."""
    sizes = SIZES | {"intermediate_size_mlp": 48, "num_local_experts": 2}
    return make(
        t.Llama4ForCausalLM, t.Llama4TextConfig(**sizes, attention_chunk_size=4, no_rope_layers=[1, 0])
    )


DECODERS = {
    "llama": lambda: make(t.LlamaForCausalLM, t.LlamaConfig(**SIZES)),
    "qwen3": lambda: make(t.Qwen3ForCausalLM, t.Qwen3Config(**SIZES)),
    "mistral": lambda: make(t.MistralForCausalLM, t.MistralConfig(**SIZES, sliding_window=4)),
    "gemma2": lambda: make(
        t.Gemma2ForCausalLM,
        t.Gemma2Config(**SIZES, sliding_window=4, final_logit_softcapping=None, query_pre_attn_scalar=8),
    ),
    "gemma3": lambda: make(t.Gemma3ForCausalLM, t.Gemma3TextConfig(**SIZES, sliding_window=4)),
    "gpt_oss": gpt_oss,
    "llama4": llama4,
    "gpt2": lambda: make(
        t.GPT2LMHeadModel,
        t.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    ),
}


def llama():
    return DECODERS["llama"]()


def bert():
    return make(t.BertModel, t.BertConfig(**SIZES))


def vit():
    config = t.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    )
    return make(t.ViTModel, config)


def t5():
    config = t.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return make(t.T5ForConditionalGeneration, config)


def whisper():
    config = t.WhisperConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return make(t.WhisperForConditionalGeneration, config)


def tokens(batch=2, length=LENGTH):
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side):
    """A 2D attention mask for `tokens()`, or None: the first item loses 4 tokens, or the second 3."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if side == "none":
        return None
    if side == "left":
        mask[0, :4] = 0
    else:
        mask[1, 9:] = 0
    return mask


def eager(model):
    """The model with transformers' own eager attention: the yardstick."""
    model.set_attn_implementation("eager")
    return model
