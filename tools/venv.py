"""Make a virtual environment with pinned packages, or find that it is there already.

    python3 tools/venv.py .venv --extras dev        the package (editable) with these extras
    python3 tools/venv.py .venv-docs --only docs    the packages of these extras, not the package

Needs nothing but Python. The last thing that a finished set-up writes is a stamp, `.ready`, inside the
environment. One that was interrupted has no stamp and is made anew; what pip had fetched is in pip's own
cache. An environment whose stamp no longer fits pyproject.toml or constraints.txt is brought up to date.
Two set-ups of one environment wait for each other.

On Linux the CPU build of torch is preferred, because the plain wheel brings gigabytes of CUDA libraries.
TORCH_INDEX may name a package index that has CPU builds, if pip's own indexes have none.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (said here, before imports that old Pythons lack)
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"error: Polyhead needs Python 3.11 or newer, this is {found}; try: make PYTHON=python3.12")

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
STAMP = ".ready"


def say(message: str) -> None:
    """One line about what is going on."""
    print(f"setup: {message}", flush=True)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One set-up of this environment at a time."""
    try:
        import fcntl
    except ImportError:  # no such thing on Windows: go without
        yield
        return
    path = ROOT / ".cache" / f"{name}.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.set_inheritable(file.fileno(), True)  # for `run`
        yield


def project() -> dict[str, Any]:
    """The tables of pyproject.toml that decide what is installed."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    keys = ("name", "requires-python", "dependencies", "optional-dependencies", "scripts")
    return {key: data["project"][key] for key in keys} | {"build": data["build-system"]["requires"]}


def pin(package: str) -> str:
    """The line of constraints.txt that pins this package."""
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{package}=="):
            return line.strip()
    sys.exit(f"error: {CONSTRAINTS.name} does not pin {package}")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command quietly. It inherits the lock: one that outlives a killed set-up still holds it."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, close_fds=False)


def pip_install(python: Path, *arguments: str, index: str = "", quiet: bool = False) -> bool:
    """Run `pip install` under the constraints; what pip says is shown only where it fails."""
    command = [str(python), "-m", "pip", "install", "-qq", "--no-input", "--disable-pip-version-check"]
    command += ["--root-user-action", "ignore", "-c", str(CONSTRAINTS), *arguments]
    if index:
        command += ["--extra-index-url", index]
    done = run(command)
    if done.returncode and not quiet:
        sys.stderr.write(done.stdout + done.stderr)
    return done.returncode == 0


def install_torch(python: Path) -> bool:
    """The pinned torch: the CPU build where the platform has one, else the plain wheel."""
    torch = pin("torch")
    if sys.platform == "linux":
        say(f"installing {torch} (CPU build)")
        if pip_install(python, f"{torch}+cpu", index=os.environ.get("TORCH_INDEX", ""), quiet=True):
            return True
        say("pip's indexes have no CPU build of torch: taking the plain wheel, which may be gigabytes large;")
        say("set TORCH_INDEX to an index that has CPU builds (see docs/install.md) to avoid that")
    else:
        say(f"installing {torch}")
    return pip_install(python, torch)


def build(place: Path, extras: list[str], package: bool) -> None:
    """Install everything into `place`, which is made anew unless a finished set-up is found there."""
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = place / STAMP
    if not (stamp.exists() and python.exists()):
        if place.exists():
            say(f"{place.name} is unfinished: starting again")
            shutil.rmtree(place)
        say(f"making {place.name}")
        made = run([sys.executable, "-m", "venv", str(place)])
        if made.returncode:
            sys.stderr.write(made.stdout + made.stderr)
            sys.exit("error: no virtual environment could be made (on Debian: apt-get install python3-venv)")
    stamp.unlink(missing_ok=True)
    tables = project()
    if package:
        # no build isolation: the build backend comes from the constraints too
        ok = install_torch(python)
        say("installing the build backend")
        ok = ok and pip_install(python, *tables["build"], "editables")
        say(f"installing polyhead[{','.join(extras)}]")
        ok = ok and pip_install(python, "--no-build-isolation", "-e", f".[{','.join(extras)}]")
    else:
        needed = [line for extra in extras for line in tables["optional-dependencies"][extra]]
        say(f"installing {', '.join(needed)}")
        ok = pip_install(python, *needed)
    if not ok:
        sys.exit("error: the packages could not be installed; the same command tries again")


def main() -> None:
    """Read the command line and see to the environment that it names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("place", help="where the environment is, relative to the project: .venv")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--extras", help="install the package with these extras, separated by commas")
    what.add_argument("--only", help="install only what these extras list, without the package")
    arguments = parser.parse_args()
    package = arguments.only is None
    extras = (arguments.extras if package else arguments.only).split(",")
    unknown = sorted(set(extras) - set(project()["optional-dependencies"]))
    if unknown:
        parser.error(f"pyproject.toml has no extra called {', '.join(unknown)}")

    wanted = json.dumps([project(), CONSTRAINTS.read_text(encoding="utf-8"), extras, package, sys.version])
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    place = ROOT / arguments.place
    stamp = place / STAMP

    def ready() -> bool:
        return stamp.exists() and stamp.read_text(encoding="utf-8") == digest

    if ready():
        return
    with locked(place.name):
        if ready():
            return
        build(place, extras, package)
        partial = stamp.with_suffix(".partial")
        partial.write_text(digest, encoding="utf-8")
        partial.replace(stamp)
    say(f"{place.name} is ready")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command takes it up again")
