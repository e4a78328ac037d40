"""Run the experiments of experiments/ whose results are not there yet, and write the page of checks.

python tools/experiments.py            what lacks a result: some minutes each
python tools/experiments.py 044        those whose names begin so, anew
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from checks import result_of
from verdicts import ROOT


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="how the names of those to run anew begin")
    names = tuple(parser.parse_args().names)
    for file in sorted((ROOT / "experiments").glob("[!_]*.py")):
        if file.name.startswith(names) if names else not result_of(file.name).is_file():
            print(f"\n{file.stem}", flush=True)
            subprocess.run([sys.executable, str(file)], check=True)
    subprocess.run([sys.executable, str(ROOT / "tools" / "checks.py")], check=True)


if __name__ == "__main__":
    main()
