"""Python files of a user's own: run as they are, and told apart by what they say."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from polyhead.errors import ConfigError

__all__ = ["digest", "run"]


def run(file: Path, *, kind: str, what: str) -> ModuleType:
    """The module of a file, run anew.

    It is called by what the file says, so that a file that has changed, or another file of this name, makes
    another module, and what it defines has another name.

    Args:
        file: with `~` expanded.
        kind: of what it defines, in the name of the module: "task".
        what: the argument that named the file, for errors.

    Raises:
        ConfigError: there is no such file, or it cannot be run.
    """
    if not file.is_file():
        raise ConfigError(f"{what}: there is no file {file}")
    name = f"polyhead_{kind}_{file.stem}_{digest(file, what=what)}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # not by the loader, which takes a compiled file for it that is as old and as long
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise _broken(file, what, error) from error
    return module


def digest(file: Path, *, what: str) -> str:
    """Of what a file does, in eight characters: comments and the layout of lines do not count.

    Raises:
        ConfigError: it cannot be read, or is no Python.
    """
    try:
        said = ast.dump(ast.parse(file.read_bytes(), str(file)))
    except (OSError, SyntaxError, ValueError) as error:
        raise _broken(file, what, error) from None
    return hashlib.blake2b(said.encode("utf-8", "replace"), digest_size=4).hexdigest()


def _broken(file: Path, what: str, error: BaseException) -> ConfigError:
    return ConfigError(f"{what}: {file} cannot be run: {type(error).__name__}: {error}")
