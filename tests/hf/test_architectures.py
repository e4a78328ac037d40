"""Many architectures, tiny and random: attached, each computes what its own eager attention computes."""

import pytest
import torch
import transformers as t

from hf.tiny import SIZES, noisy, padding, tokens
from polyhead.hf import attach

pytestmark = pytest.mark.slow

SMALL = SIZES | {
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "n_layer": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_layers": 2,
    "n_head": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_intermediate_size": 48,
    "n_positions": 64,
    "sliding_window": 4,
    "attention_chunk_size": 4,
    "num_local_experts": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "image_size": 16,
    "patch_size": 4,
    "decoder_start_token_id": 1,
}

LANGUAGE = """
apertus arcee bert biogpt bitnet camembert cohere cohere2 cwm deepseek_v4 diffllama doge electra
ernie4_5 eurobert exaone4 flex_olmo gemma gemma2 gemma3_text glm glm4 gpt_bigcode gpt_neox gpt_oss
granite granitemoe helium internlm3 lfm2 llama llama4_text mistral mixtral modernbert
modernbert-decoder nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe
qwen3 qwen3_moe roberta seed_oss smollm3 stablelm starcoder2 vaultgemma xlm-roberta
"""
ENCODER_DECODER = """
bart blenderbot m2m_100 marian mbart pegasus plbart umt5 t5 mt5
"""
VISION = """
beit deit dinov2 dinov3_vit ijepa siglip_vision_model vit vit_msn clip_vision_model
"""


def shrink(config):
    for name, value in SMALL.items():
        now = getattr(config, name, None)
        if now is not None and not isinstance(now, list | tuple | dict):
            setattr(config, name, value)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list) and len(kinds) > 2:
            setattr(config, name, (list(dict.fromkeys(kinds)) * 2)[:2])
    return config


def build(kind, name):
    torch.manual_seed(0)
    config = shrink(t.CONFIG_MAPPING[name]())
    model = noisy(kind.from_config(config, attn_implementation="eager"))
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def check(model, real=None, **inputs):
    expected = model(**inputs)[0]
    with attach(
        model, handler=lambda call: (asked.append(call.layer.index), call.proceed())[1]
    ) as attachment:
        asked = []
        got = model(**inputs)[0]
    assert set(asked) == {layer.index for layer in attachment.layers}
    if real is not None:
        got, expected = got[real], expected[real]
    assert (got - expected).abs().max() < 2e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", LANGUAGE.split())
def test_language(name, side):
    mask = padding(side)
    causal = name in t.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model = build(t.AutoModelForCausalLM if causal else t.AutoModel, name)
    check(model, None if mask is None else mask.bool(), input_ids=tokens(), attention_mask=mask)


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("name", ENCODER_DECODER.split())
def test_encoder_decoder(name, side):
    model = build(t.AutoModelForSeq2SeqLM, name)
    check(model, input_ids=tokens(), attention_mask=padding(side), decoder_input_ids=tokens(2, 7))


@pytest.mark.parametrize("name", VISION.split())
def test_vision(name):
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    check(build(t.AutoModel, name), pixel_values=pixels)
