"""Text for language models, in byte pairs: the documentation of Python's standard library, or a file."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from polyhead.errors import ConfigError, MissingExtra
from polyhead.hf.fetch import cache_folder
from polyhead.league.seeds import generator

__all__ = ["Corpus", "corpus"]

_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "turtledemo",
}
_FORM = 1  # raise it where the same sources give other tokens


@dataclass(frozen=True)
class Corpus:
    """Tokens of a text.

    Attributes:
        train, held_out: tokens, int64.
        sizes: bytes of every token of the vocabulary, int64.
        digest: of the tokens: what numbers on them depend on.
    """

    train: Tensor
    held_out: Tensor
    sizes: Tensor
    digest: str


def corpus(vocabulary: int, file: str | None) -> Corpus:
    """The text in byte pairs. Every tenth document is held out; the tokenizer learns from the others.

    Args:
        vocabulary: tokens of the tokenizer.
        file: a UTF-8 text; its documents are its paragraphs. Default: the documentation of this Python.

    Raises:
        ConfigError: a file that cannot be read, or is too short to hold something out.
        MissingExtra: the tokenizers package is absent.
    """
    if file is None:
        return _made(vocabulary, None, None)
    path = Path(file).expanduser().absolute()
    return _made(vocabulary, str(path), _state(path) if path.is_file() else None)


@cache
def _made(vocabulary: int, file: str | None, state: str | None) -> Corpus:
    """`state` tells a file that has changed from the one that was read."""
    sources = _sources() if file is None else []
    documents = [] if file is None else _paragraphs(Path(file))
    # a library by the state of its files: to read it takes seconds, in every run of a league
    key = documents or [_state(source) for source in sources]
    digest = hashlib.blake2b("\x00".join(key).encode(), digest_size=6).hexdigest()
    kept = cache_folder() / "texts" / f"text-{digest}-{vocabulary}-{_FORM}.npz"
    found = _read(kept)
    if found is None:
        documents = documents or _documentation(sources)
        order = torch.randperm(len(documents), generator=generator("corpus", "order")).tolist()
        cut = len(documents) // 10
        held_out, train = (sorted(part) for part in (order[:cut], order[cut:]))
        found = _encode(vocabulary, [documents[n] for n in train], [documents[n] for n in held_out])
        _keep(kept, found)
    parts = {name: torch.from_numpy(found[name].astype(np.int64)) for name in ("train", "held_out", "sizes")}
    tokens = hashlib.blake2b(
        digest_size=6
    )  # another version of the tokenizer may cut the same text elsewhere
    for part in parts.values():
        tokens.update(part.numpy().tobytes())
    return Corpus(**parts, digest=tokens.hexdigest())


def _sources() -> list[Path]:
    """The files of the standard library."""
    found: list[Path] = []
    for folder, inside, files in os.walk(sysconfig.get_paths()["stdlib"]):
        inside[:] = set(inside) - _SKIPPED
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(file for file in found if file.is_file())


def _state(file: Path) -> str:
    state = file.stat()
    return f"{file} {state.st_size} {state.st_mtime_ns}"


def _documentation(sources: list[Path]) -> list[str]:
    """The language reference topics and the docstrings of the standard library, each a document."""
    from pydoc_data.topics import topics

    found = [topics[name].strip() for name in sorted(topics)]
    for file in sources:
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
                if len(text) >= 200:  # one line says little that the next could follow from
                    found.append(text)
    return list(dict.fromkeys(found))


def _paragraphs(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data: {file} cannot be read as UTF-8 text: {error}") from None
    # one that comes twice would be learned from and held out as well
    found = list(dict.fromkeys(part.strip() for part in text.split("\n\n") if part.strip()))
    letters = sum(map(len, found))
    if len(found) < 20 or letters < 20_000:
        raise ConfigError(
            f"data: {file} holds {letters:,} characters in {len(found)} different paragraphs; a text of at "
            "least 20,000 characters in 20 paragraphs is needed, to learn from and to hold out"
        )
    return found


def _encode(vocabulary: int, train: list[str], held_out: list[str]) -> dict[str, np.ndarray]:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise MissingExtra("tokenizers", "compare", "the task text") from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=sorted(letters), show_progress=False
    )
    tokenizer.train_from_iterator(train, trainer)
    if tokenizer.get_vocab_size() > vocabulary:
        raise ConfigError(
            f"vocabulary must be at least {len(letters)}, the bytes that any text is written with; "
            f"got {vocabulary}"
        )
    names = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    sizes = np.zeros(vocabulary, dtype=np.int32)  # one letter of the byte-level alphabet stands for one byte
    sizes[: len(names)] = [len(name) for name, _ in names]
    found = {"sizes": sizes}
    for name, documents in (("train", train), ("held_out", held_out)):
        encoded = tokenizer.encode_batch([document + "\n\n" for document in documents])
        found[name] = np.concatenate([np.asarray(one.ids, dtype=np.int32) for one in encoded])
    return found


def _read(file: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(file) as data:
            return {name: data[name] for name in ("train", "held_out", "sizes")}
    except (OSError, ValueError, KeyError, json.JSONDecodeError):
        return None


def _keep(file: Path, data: dict[str, np.ndarray]) -> None:
    beside = file.with_suffix(f".{os.getpid()}.part.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(beside, **data)  # type: ignore[arg-type]
        beside.replace(file)
    except OSError:
        beside.unlink(missing_ok=True)
