"""Loading a pretrained model and its tokenizer by one name."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from polyhead.errors import ConfigError, MissingExtra, PolyheadError, UnknownName, unknown_name
from polyhead.hf.fetch import DEMO_MODELS, demo_model
from polyhead.hf.gguf import converted, read

__all__ = ["Loaded", "load"]

log = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)


class Loaded(NamedTuple):
    """What `load` found.

    Attributes:
        model: in evaluation mode.
        tokenizer: its own; None if it has none, such as a vision model.
    """

    model: Any
    tokenizer: Any


def load(
    source: str | os.PathLike[str] | tuple[Any, Any] | torch.nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    announce: Callable[[str], None] = log.info,
) -> Loaded:
    """A pretrained transformers model and its tokenizer.

    Args:
        source: one of
            a demo model, "smollm2" or "minilm", fetched when it is first asked for;
            a folder that `save_pretrained` wrote;
            a GGUF file;
            the id of a model on the Hugging Face hub, such as "org/model";
            a model that is already there, or a pair (model, tokenizer), which is passed through as it is.
        dtype: of the weights. Ignored for a model that is already there.
        device: where the model goes; default: where it is loaded, the CPU.
        announce: called with a line before anything that takes long.

    Returns:
        `(model, tokenizer)`; the model is in evaluation mode.

    Raises:
        UnknownName: no demo model, file, folder or hub model has this name.
        ConfigError: the folder or file holds no model that transformers can read, or files of a tokenizer
            that it cannot, the hub's cache among them.
        MissingExtra: transformers (or gguf, for a GGUF file) is not installed.
    """
    _need("transformers", "loading a pretrained model")
    if isinstance(source, tuple):
        if len(source) != 2:
            raise ConfigError(f"source must be a pair (model, tokenizer), got a tuple of {len(source)}")
        return Loaded(*source)
    if isinstance(source, torch.nn.Module):
        return Loaded(source, _tokenizer_of(source))
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ConfigError(
            f"source must be a name, a path, a model or a pair (model, tokenizer), got {source!r}"
        )
    with _quiet():
        model, tokenizer = _open(os.fspath(source), dtype, announce)
    if device is not None:
        model = model.to(device)
    return Loaded(model.eval(), tokenizer)


def _need(package: str, purpose: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise MissingExtra(package, "hf", purpose) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()


def _open(name: str, dtype: torch.dtype, announce: Callable[[str], None]) -> tuple[Any, Any]:
    path = Path(name).expanduser()
    if name in DEMO_MODELS and not path.exists():
        path = demo_model(name, announce=announce)
    if path.is_dir():
        return _from_folder(path, dtype)
    if path.is_file():
        return _from_gguf(path, dtype, announce)
    if path.suffix == ".gguf" or name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name:
        raise UnknownName(
            f"there is no file or folder {str(path)!r}; give a folder that holds config.json, a GGUF file, "
            f"the id of a model on the Hugging Face hub, or one of {_demos()}"
        )
    if "/" not in name and get_close_matches(name, DEMO_MODELS, cutoff=0.6):
        raise unknown_name("model", name, DEMO_MODELS)
    return _from_hub(name, dtype)


def _demos() -> str:
    return ", ".join(map(repr, DEMO_MODELS))


def _from_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        hint = (
            f"load one of its GGUF files by name, such as {str(files[0])!r}"
            if files
            else "give a folder that save_pretrained wrote"
        )
        raise ConfigError(f"the folder {str(folder)!r} holds no config.json, so it is no model; {hint}")
    try:
        return _from_pretrained(str(folder), dtype)
    except _unreadable() as error:
        if isinstance(error, PolyheadError):
            raise
        raise ConfigError(
            f"transformers cannot load the folder {str(folder)!r}: {_first_line(error)}"
        ) from error


def _from_hub(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    # without a network transformers would ask again and again for half a minute
    offline = {} if _hub_may_answer() else {"local_files_only": True}
    try:
        return _from_pretrained(name, dtype, **offline)
    except _unreadable() as error:
        if isinstance(error, PolyheadError):
            raise
        raise UnknownName(
            f"no model {name!r}: it is no folder, no GGUF file, none of {_demos()}, and the Hugging Face hub "
            f"did not give it ({_first_line(error)}); check the name and the network"
        ) from error


def _hub_may_answer() -> bool:
    """Whether the hub's address, or a proxy, is known here."""
    if getproxies().get("https"):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False


def _unreadable() -> tuple[type[Exception], ...]:
    """What transformers raises for a file or folder that it cannot read."""
    from safetensors import SafetensorError

    return (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        RuntimeError,
        SafetensorError,
        struct.error,
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _from_pretrained(where: str, dtype: torch.dtype, **more: Any) -> tuple[Any, Any]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(where, **more)
    saved_as = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, saved_as, None) or transformers.AutoModel
    model = kind.from_pretrained(where, config=config, dtype=dtype, **more)
    return model, _tokenizer(where, **more)


def _tokenizer(where: str, **more: Any) -> Any:
    """The tokenizer that belongs to a model, or None if it has none.

    Raises:
        ConfigError: the folder, or the hub's cache, holds files of a tokenizer, and they cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where, **more)
    except Exception as error:  # the tokenizers library raises nothing more exact
        folder = _folder(where)
        files = sorted({file.name for form in _TOKENIZER_FILES for file in folder.glob(form)})
        if files:
            way_out = (
                "mend its files, or take them away to load the model alone"
                if folder == Path(where)
                else f"take {str(folder.parents[1])!r} away to have it fetched again, or give the pair "
                "(model, tokenizer)"
            )
            raise ConfigError(
                f"transformers cannot read the tokenizer in the folder {str(folder)!r} ({', '.join(files)}): "
                f"{_first_line(error)}; {way_out}"
            ) from error
        if isinstance(error, OSError | ValueError | KeyError):
            return None
        raise


def _folder(where: str) -> Path:
    """Where the files of a model lie: in its own folder, or in the hub's cache, if they are there."""
    from huggingface_hub import try_to_load_from_cache

    if Path(where).is_dir():
        return Path(where)
    config = try_to_load_from_cache(where, "config.json")
    return Path(config).parent if isinstance(config, str) else Path(where)


def _tokenizer_of(model: Any) -> Any:
    where = getattr(getattr(model, "config", None), "_name_or_path", "")
    found = _tokenizer(where) if where and Path(where).is_dir() else None
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} does not say where its tokenizer is; pass the pair (model, tokenizer)"
        )
    return found


def _from_gguf(path: Path, dtype: torch.dtype, announce: Callable[[str], None]) -> tuple[Any, Any]:
    _need("gguf", "reading a GGUF file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConfigError(
                f"the file {str(path)!r} is not a GGUF file; give a folder that holds config.json, "
                "or a GGUF file"
            )
    try:
        kept = converted(path, announce)
        return read(path, dtype) if kept is None else _from_folder(kept, dtype)
    except _unreadable() as error:
        if isinstance(error, PolyheadError):
            raise
        raise ConfigError(
            f"transformers cannot load the GGUF file {str(path)!r}: {_first_line(error)}"
        ) from error
