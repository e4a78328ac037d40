"""The bridge on real models: SmolLM2-135M-Instruct (GGUF) and all-MiniLM-L6-v2."""

from pydoc_data import topics

import pytest
import torch

from polyhead.hf import attach

pytestmark = pytest.mark.real
TEXT = topics.topics["formatstrings"]
QUESTION = "What is the capital of France? Answer in one word."


@torch.no_grad()
def both(model, run):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    expected = run()
    model.set_attn_implementation(before)
    with attach(model):
        return run(), expected


def test_smollm2_is_what_it_should_be(smollm2):
    model, tokenizer = smollm2
    with attach(model) as attachment:
        sizes = {(layer.kind, layer.heads, layer.kv_heads, layer.head_dim) for layer in attachment.layers}
    assert len(attachment.layers) == 30
    assert sizes == {("decoder", 9, 3, 64)}
    assert attachment.unseen == []
    text = "It's 2024:\n\tnaïve   中文 <|im_start|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "<|im_start|>assistant" in tokenizer.chat_template


def test_smollm2_logits(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :300]
    got, expected = both(model, lambda: model(ids, use_cache=False).logits)
    difference = (got - expected).abs().max().item()
    print(f"SmolLM2-135M, 300 tokens: largest difference of a logit {difference:.1e}")
    assert difference < 5e-4  # logits reach 30; eager and sdpa differ as much
    loss = torch.nn.functional.cross_entropy(got[0, :-1], ids[0, 1:])
    assert loss < 3.5


def test_smollm2_batch_with_padding(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    rows, mask = torch.zeros(2, 120, dtype=torch.long), torch.ones(2, 120, dtype=torch.long)
    rows[0], rows[1, 50:], mask[1, :50] = ids[:120], ids[200:270], 0
    got, expected = both(model, lambda: model(rows, attention_mask=mask, use_cache=False).logits)
    real_tokens = mask.bool()
    assert (got[real_tokens] - expected[real_tokens]).abs().max() < 5e-4


def test_smollm2_answers(smollm2):
    model, tokenizer = smollm2
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    got, expected = both(model, lambda: model.generate(**chat, do_sample=False, max_new_tokens=12))
    assert torch.equal(got, expected)
    assert "Paris" in tokenizer.decode(got[0, chat["input_ids"].shape[1] :])


def test_minilm_embeddings(minilm):
    model, tokenizer = minilm
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell today, by a lot."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with attach(model) as attachment:
        assert {(layer.kind, layer.heads) for layer in attachment.layers} == {("encoder", 12)}
    real_tokens = batch["attention_mask"].bool()
    got, expected = both(model, lambda: model(**batch).last_hidden_state)
    difference = (got[real_tokens] - expected[real_tokens]).abs().max().item()
    print(f"all-MiniLM-L6-v2: largest difference of a state {difference:.1e}")
    assert difference < 1e-5
    weights = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((got * weights).sum(1) / weights.sum(1), dim=-1)
    near, far = (means[0] @ means[1]).item(), (means[0] @ means[2]).item()
    assert near > 0.6 > 0.3 > far
