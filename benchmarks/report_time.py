"""Time of the main job: `polyhead report smollm2` from start to end, against 5 minutes on 2 cores.

The report is written to a temporary folder; what it found is printed as a table. `--keep FOLDER` also writes
the table and the plots there; pages that were written there by hand stay, and are linked. Wall time depends
on what else the machine does, processor time hardly.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from _harness import arguments, begin, machine

from polyhead.report import ReportData
from polyhead.report.summary import markdown

AIM = 300.0


def main() -> None:
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--keep", type=Path, help="a folder for the table and the plots")
    options = begin(parser)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report"
        command = [sys.executable, "-m", "polyhead", "report", options.model, "--out", str(out)]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        data = ReportData.from_json((out / "report.json").read_text(encoding="utf-8"))
        page = (out / "report.html").stat().st_size / 1e6
        cpu = used.ru_utime + used.ru_stime
        lines = [
            f"wall {wall:.0f} s, processor {cpu:.0f} s ({cpu / wall:.2f} cores busy), peak memory "
            f"{used.ru_maxrss / 2**20:.1f} GiB, page {page:.1f} MB",
            *(f"  {phase.name:24} {phase.seconds:6.1f} s" for phase in data.run.phases),
            f"wall time {wall / AIM:.2f} × the aim of {AIM:.0f} s: {'reached' if wall <= AIM else 'MISSED'}; "
            f"processor time {cpu / (2 * AIM):.2f} × that of 2 cores in {AIM:.0f} s",
        ]
        print("\n".join(lines))
        print(markdown(data))
        if options.keep:
            keep(options.keep, out, data, [machine(options.device), *lines])


def keep(folder: Path, report: Path, data: ReportData, times: list[str]) -> None:
    """The findings and the plots of a report, without the page; links to the other pages of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = sorted(report.glob("*.svg"))
    for plot in plots:
        shutil.copy(plot, folder / plot.name)
    command = f"polyhead report {data.model.name}"
    told = replace(data, run=replace(data.run, command=command))
    images = "\n\n".join(f"![{plot.stem}]({plot.name})" for plot in plots)
    block = "\n".join(f"    {line}" for line in times)
    others = sorted(page for page in folder.glob("*.md") if page.name != "README.md")
    links = "".join(f"- [{title(page)}]({page.name})\n" for page in others)
    further = f"\n## Further\n\n{links}" if links else ""
    text = f"{markdown(told)}\n\n{images}\n\n## How long it took\n\n{block}\n{further}"
    (folder / "README.md").write_text(text, encoding="utf-8")


def title(page: Path) -> str:
    """The first heading of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), page.stem)


if __name__ == "__main__":
    main()
