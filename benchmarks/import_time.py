"""Import time: `import polyhead`, and the first use of its operator, against `import torch`.

Every measurement is a fresh process; the variants take turns, and the medians are compared. The aim is
`import torch` plus at most 0.3 s.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time

VARIANTS = {
    "import torch": "import torch",
    "import polyhead": "import polyhead",
    "polyhead with its operator": "import polyhead; polyhead.attend, polyhead.causal, polyhead.softmax",
    "the command line": "import polyhead.cli",
}
AIM = 0.3


def seconds(code: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--device", default="cpu", help="taken like every benchmark does; makes no difference here"
    )
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()

    heavy = "import sys, polyhead; assert not {'transformers', 'plotly', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", heavy], check=True)

    import torch

    print(f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}")
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for code in VARIANTS.values():  # the file cache is filled, and not measured
        seconds(code)
    for _ in range(arguments.repeats):
        for name, code in VARIANTS.items():
            times[name].append(seconds(code))
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["import torch"]
    for name, median in medians.items():
        print(f"{name:28} {median:6.2f} s   torch {median - base:+.2f} s   ratio {median / base:.2f}")
    # what is imported at first use counts too: the honest number is the one with the operator
    extra = medians["polyhead with its operator"] - base
    verdict = "reached" if extra <= AIM else "MISSED"
    print(f"polyhead with its operator: torch {extra:+.2f} s, aim at most +{AIM} s: {verdict}")


if __name__ == "__main__":
    main()
