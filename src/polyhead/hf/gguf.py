"""GGUF files as model folders: read once in a minute, then loaded in a second."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from polyhead.hf.fetch import cache_folder

__all__ = ["converted", "read"]

KEEP_UP_TO = 512 << 20  # bytes of a file that is kept converted; its float32 copy is some five times larger


def converted(path: Path, announce: Callable[[str], None]) -> Path | None:
    """The folder with the model of a GGUF file, made at first use.

    None if the file is too large for a second copy, or no folder can be written.
    """
    if path.stat().st_size > KEEP_UP_TO:
        return None
    kept = cache_folder() / "converted" / _key(path)
    if kept.is_dir():
        return kept
    announce(f"reading {path.name}: this takes a minute once")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):
            if not kept.is_dir():
                _convert(path, kept)
    except PermissionError as error:
        announce(f"the converted model cannot be kept in {kept.parent} ({error})")
        return None
    return kept


def read(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer out of a GGUF file, its weights as plain numbers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return model, tokenizer


def _key(path: Path) -> str:
    """Names the content of a file by its path, size and time of change."""
    state = path.stat()
    told = f"{path.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"
    return f"{path.stem}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def _convert(path: Path, kept: Path) -> None:
    """Write the model as a folder, whole or not at all; the caller holds the lock."""
    for leftover in kept.parent.glob(f".{kept.name}-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    model, tokenizer = read(path, torch.float32)
    with tempfile.TemporaryDirectory(prefix=f".{kept.name}-", dir=kept.parent) as folder:
        made = Path(folder) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(kept)
