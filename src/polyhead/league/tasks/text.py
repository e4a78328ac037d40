"""A language model of English documentation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.checks import whole
from polyhead.errors import ConfigError
from polyhead.league.seeds import generator
from polyhead.league.tasks.base import Batch, Recipe, Sizes, Task
from polyhead.league.tasks.corpus import Corpus, corpus

__all__ = ["TextTask"]


class TextTask(Task):
    """What comes next in text: tokens of a byte-pair tokenizer that is trained on the same text.

    The text is the English documentation of the standard library of this Python (topics of the language
    reference and docstrings), or `file`. A tenth of the documents is held out. Docstrings repeat one another:
    one in twenty stretches of 32 held-out tokens stands in the training text too. The score is in bits per
    byte of held-out text, so that it does not depend on the tokenizer. In the split "longer" sequences have
    twice the length.

    Attributes:
        tokens: length of a sequence.
        tokenizer: size of the vocabulary, at least 256.
        file: a UTF-8 text of one's own, with blank lines between its paragraphs.
        digest: of the text as it was cut into tokens; found by itself. Another one is refused: numbers on
            other tokens do not compare.
    """

    name = "text"
    summary = "a language model of English documentation, in byte pairs"
    metric = "bits per byte"
    better = "lower"
    grows = ("tokens",)
    sizes = Sizes(dim=128, heads=4, layers=4, mlp=512)
    recipe = Recipe(steps=1000, batch=16, rate=2e-3, warmup=0.05, decay=0.1)

    tokens: int = 128
    tokenizer: int = 1024
    file: str | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        whole("tokens", self.tokens, 1)
        whole("tokenizer", self.tokenizer, 256)
        found = self._corpus
        object.__setattr__(self, "digest", found.digest)
        shortest = min(len(found.train), len(found.held_out))
        if shortest < 2 * self.tokens + 2:
            raise ConfigError(
                f"tokens={self.tokens}: the text is too short; its smaller part has {shortest} tokens"
            )

    @property
    def _corpus(self) -> Corpus:
        found = corpus(self.tokenizer, self.file)
        if self.digest not in (None, found.digest):
            raise ConfigError(
                f"digest: the text here, cut into tokens, is {found.digest} and not {self.digest}: numbers "
                "do not compare. Another Python has other documentation, another version of tokenizers may "
                "cut it elsewhere, and a file may have changed"
            )
        return found

    @property
    def vocabulary(self) -> int:
        return self.tokenizer

    @property
    def outputs(self) -> int:
        return self.tokenizer

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def splits(self) -> tuple[str, ...]:
        return ("validation", "longer")

    def batch(self, split: str, number: int, size: int, seed: int) -> Batch:
        text = self._corpus.train if split == "train" else self._corpus.held_out
        length = self.tokens * (2 if split == "longer" else 1)
        draw = generator(self.name, split, number, seed)
        start = torch.randint(len(text) - length, (size, 1), generator=draw)
        cut = text[start + torch.arange(length + 1)]
        return Batch(cut[:, :-1], cut[:, 1:])

    def measure(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        answers = batch.answers()
        bits = F.cross_entropy(outputs, answers, reduction="none") / math.log(2)
        return bits, self._corpus.sizes.to(answers.device)[answers]

    def yardsticks(self) -> Mapping[str, float]:
        """Bits per byte of counts: of tokens whatever stood before, and of tokens after the one before.

        A model without any mixing of tokens sees the token itself and no other: it can be a table of pairs,
        and nothing more. Pairs are interpolated with frequencies by Witten and Bell's rule.
        """
        found = self._corpus
        first, second = found.held_out[:-1], found.held_out[1:]
        alone = (found.train.bincount(minlength=self.tokenizer) + 1).double()
        alone = alone / alone.sum()
        pairs = (found.train[:-1] * self.tokenizer + found.train[1:]).bincount(minlength=self.tokenizer**2)
        counts = pairs.view(self.tokenizer, self.tokenizer).double()
        kinds = (counts > 0).sum(1, keepdim=True).clamp(min=1)
        after = (counts + kinds * alone) / (counts.sum(1, keepdim=True) + kinds)
        size = found.sizes[second].sum()
        return {
            "token frequencies": float(-alone.log2()[second].sum() / size),
            "pairs of tokens": float(-after[first, second].log2().sum() / size),
        }
