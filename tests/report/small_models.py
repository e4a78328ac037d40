"""Model folders of a user's own: tiny, random, with a tokenizer."""

from pathlib import Path

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from polyhead.tasks import sample_text

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def tokenizer(encoder: bool = False) -> t.PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]"] if encoder else ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([sample_text()[:20_000]], trainer)
    if encoder:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        return t.PreTrainedTokenizerFast(
            tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
        )
    return t.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def save(folder: Path, kind: type, config: t.PretrainedConfig, encoder: bool = False) -> Path:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer(encoder).save_pretrained(folder)
    return folder


def llama(folder: Path, **changes: int) -> Path:
    sizes = {
        **SIZES,
        "num_key_value_heads": 2,
        "vocab_size": 600,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    return save(folder, t.LlamaForCausalLM, t.LlamaConfig(**sizes))


def gpt2(folder: Path) -> Path:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 600}
    return save(folder, t.GPT2LMHeadModel, t.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def bert(folder: Path) -> Path:
    return save(folder, t.BertModel, t.BertConfig(**SIZES, vocab_size=600), encoder=True)


def gptj(folder: Path) -> Path:
    """An architecture whose attention no one can replace from outside."""
    config = t.GPTJConfig(vocab_size=600, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=512)
    return save(folder, t.GPTJForCausalLM, config)
