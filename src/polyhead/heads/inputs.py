"""What a model reads while its heads are watched: a text, the user's own inputs, repeated random tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polyhead.description import Part
from polyhead.errors import ConfigError, UnsupportedModel
from polyhead.tasks.reading import context_length, encode

__all__ = ["Given", "Reader", "Repeats", "Source", "Text", "context_length", "run", "text_model"]


@dataclass(frozen=True)
class Reader:
    """A model, and how to have its heads watched: `with reader.watched(...)` around a forward pass.

    Attributes:
        model: the model.
        tokenizer: its tokenizer, or None.
        seed: for what is drawn.
        watched: `watched(ids=, padding=, query_padding=)`, a context within which all gauges look on.
    """

    model: nn.Module
    tokenizer: Any
    seed: int
    watched: Callable[..., AbstractContextManager[Any]]

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong."""
        return next(self.model.parameters()).device


class Source(Part):
    """Something to read. Equal sources are read once for all measurements that ask for them.

    Attributes:
        title: what it is, for people who wait.
    """

    title: ClassVar[str] = ""

    @property
    def passes(self) -> int:
        """How many watched forward passes reading takes."""
        return 1

    def read(self, reader: Reader) -> None:
        """Run the model, watched where it matters."""
        raise NotImplementedError

    def suits(self, model: nn.Module, tokenizer: Any, kinds: frozenset[str]) -> str:
        """Why this model cannot read it; empty when it can. `kinds` are those of the model's layers."""
        return ""


def text_model(model: nn.Module) -> nn.Module:
    """The model without its head: what reads token ids and has all attention layers.

    Raises:
        UnsupportedModel: it reads more than one sequence.
    """
    from polyhead.hf.layers import pretrained_parts

    whole = pretrained_parts(model)[0]
    if getattr(whole.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(whole).__name__} reads two sequences, so a text alone does not say what to run; give the "
            "model's inputs in place of the text, such as {'input_ids': ..., 'decoder_input_ids': ...}"
        )
    return whole.base_model


def run(model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """One forward pass without what is not needed: no cache, logits of one position only."""
    accepted = inspect.signature(model.forward).parameters
    extra = {"use_cache": False, "logits_to_keep": 1}
    return model(**{k: v for k, v in extra.items() if k in accepted and k not in arguments}, **arguments)


class Text(Source):
    """Token ids, `(S,)` each, read one after the other."""

    title = "text"

    ids: tuple[Tensor, ...]

    @property
    def passes(self) -> int:
        return len(self.ids)

    def read(self, reader: Reader) -> None:
        body = text_model(reader.model)
        for ids in self.ids:
            row = ids.to(reader.device)[None]
            with reader.watched(ids=row):
                run(body, {"input_ids": row})


class Given(Source):
    """The model's own inputs, as the user hands them over."""

    title = "inputs"

    names: tuple[str, ...]
    values: tuple[Any, ...]

    def read(self, reader: Reader) -> None:
        inputs = dict(zip(self.names, self.values, strict=True))
        inputs = {k: v.to(reader.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        two = getattr(getattr(reader.model, "config", None), "is_encoder_decoder", False)
        padding = inputs.get("attention_mask")
        query_padding = inputs.get("decoder_attention_mask") if two else padding
        with reader.watched(ids=inputs.get("input_ids"), padding=padding, query_padding=query_padding):
            run(reader.model, inputs)


class Repeats(Source):
    """Random tokens, `length` of them drawn without replacement and repeated `repeats` times.

    Ids come from the middle 80 % of the vocabulary without special tokens: ids go roughly by frequency, and
    the paper leaves out the most and the least common tokens. The tokens that the tokenizer puts around a
    text (or else a beginning-of-sequence token, if there is one) are put around the repeats.

    Attributes:
        length: tokens of a block. Default 25.
        repeats: how often the block stands there. Default 4.
        sequences: number of sequences. Default 4.
    """

    title = "repeated random tokens"

    length: int = 25
    repeats: int = 4
    sequences: int = 4

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("repeats", 2), ("sequences", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def suits(self, model: nn.Module, tokenizer: Any, kinds: frozenset[str]) -> str:
        if "cross" in kinds or not hasattr(model, "get_input_embeddings"):
            return "it is measured on random tokens, which only a model of one sequence of tokens can read"
        if getattr(model.get_input_embeddings(), "num_embeddings", 0) < 4 * self.length:  # type: ignore[operator]
            return f"it is measured on random tokens, and the model knows fewer than {4 * self.length}"
        return ""

    def read(self, reader: Reader) -> None:
        ids = self.ids(reader).to(reader.device)
        with reader.watched(ids=ids):
            run(text_model(reader.model), {"input_ids": ids})

    def ids(self, reader: Reader) -> Tensor:
        """The sequences, `(sequences, S)`."""
        size = reader.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        special = set(getattr(reader.tokenizer, "all_special_ids", ()))
        low, high = size // 10, size - size // 10
        pool = torch.tensor([i for i in range(low, high) if i not in special])
        generator = torch.Generator().manual_seed(reader.seed)
        before, after = _around(reader)
        rows = []
        for _ in range(self.sequences):
            block = pool[torch.randperm(len(pool), generator=generator)[: self.length]]
            rows.append(torch.cat([before, block.repeat(self.repeats), after]))
        return torch.stack(rows)


def _around(reader: Reader) -> tuple[Tensor, Tensor]:
    """The special tokens that stand before and after a text."""
    tokenizer = reader.tokenizer
    none = torch.empty(0, dtype=torch.int64)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    if tokenizer is not None:
        ids = encode(tokenizer, "a b").tolist()
        inner = [k for k, i in enumerate(ids) if i not in special]
        if inner and (inner[0] > 0 or inner[-1] < len(ids) - 1):
            return torch.tensor(ids[: inner[0]]).long(), torch.tensor(ids[inner[-1] + 1 :]).long()
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None:
        begin = getattr(getattr(reader.model, "config", None), "bos_token_id", None)
    return (none if not isinstance(begin, int) else torch.tensor([begin])), none
