"""Times optimizer steps of qalign against TRL's and plain PyTorch's, side by side on this machine.

    python -m benchmarks.throughput [race] --workloads w1 w3 --steps 10 --threads 2
    python -m benchmarks.throughput scaling    two workers of one core each against one
    python -m benchmarks.throughput prepare --rows 100000 1000000    tokenising, against datasets.map
    python -m benchmarks.throughput startup --steps 5    from the command to the first step, five times

Results land in `--output` as report.md and results.json (scaling, prepare and startup: their own names), with logs and profiles.
Exit status 1: contenders disagree about log-probs, loss or gradient; 2: something could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.throughput import prepare, race, report, startup
from benchmarks.throughput.verdicts import agreement, agrees
from benchmarks.throughput.workloads import SCALING, WORKLOADS, Workload, named
from pipeline.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Errors that a user can mend are one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    command = shlex.join(["python", "-m", "benchmarks.throughput", *given])
    output = Path(options.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    steps = 2 if options.quick else options.steps
    try:
        if options.what == "prepare":
            page, found = prepare.run(options.rows, output, options.quick)
            _write(output, "prepare", f"# Prepare\n\n`{command}`\n\n{report.machine()}\n\n{page}", found)
            return 0
        if options.what == "startup":
            page, found = startup.run(1 if options.quick else options.steps, output)
            _write(output, "startup", f"# Start-up\n\n`{command}`\n\n{report.machine()}\n\n{page}", found)
            return 0
        names = [SCALING.name] if options.what == "scaling" else options.workloads
        workloads = [named(name, options.quick) for name in names]
        if options.contenders:
            workloads = [w for w in (w.only(options.contenders) for w in workloads) if w.entries]
        if not workloads:
            raise race.RaceError(f"--contenders: none of these workloads has {', '.join(options.contenders)}")
        _check(workloads)
        stem = "scaling" if options.what == "scaling" else "report"
        return _race(workloads, steps, options.threads, options.quick, output, stem, command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", nargs="?", choices=["race", "scaling", "prepare", "startup"], default="race", help="default: race")
    add("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="default: all")
    add("--contenders", nargs="+", metavar="NAME", help="only these, by their names in the report (default: all)")
    add("--steps", type=_positive, default=10, help="timed steps of each contender, or runs of startup (default: 10)")
    add("--threads", type=_positive, default=os.cpu_count(), help="threads of each contender (default: all cores)")
    add("--rows", type=_positive, nargs="+", default=[100_000], help="prepare: numbers of rows (default: 100000)")
    add("--output", default="outputs/throughput", help="folder of the report (default: outputs/throughput)")
    add("--quick", action="store_true", help="a tiny model and two timed steps: shows that everything runs")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _check(workloads: Sequence[Workload]) -> None:
    contenders = {entry.contender for workload in workloads for entry in workload.entries}
    if "trl" in contenders and find_spec("trl") is None:
        raise race.RaceError("trl is not installed; pip install 'qalign[throughput]'")
    workers = max(entry.workers for workload in workloads for entry in workload.entries)
    if workers > len(os.sched_getaffinity(0)):
        raise race.RaceError(f"{workers} workers with a core each do not fit this machine's cores")


def _race(
    workloads: Sequence[Workload], steps: int, threads: int, quick: bool, output: Path, stem: str, command: str
) -> int:
    """Workload by workload; the report is complete after each one."""
    sections = [report.heading(command, steps)]
    found: dict[str, Any] = {"command": command, "machine": report.machine(), "threads": threads, "workloads": {}}
    all_agree = True
    turns = sum(len(workload.entries) for workload in workloads) * (race.rounds(steps) + 1)
    with tqdm(total=turns, desc="steps", unit="step", mininterval=0) as bar:
        for workload in workloads:

            def tick(contender: str, name: str = workload.name) -> None:
                bar.set_postfix_str(f"{name} {contender}", refresh=False)
                bar.update()

            results = race.run(workload, output, steps, threads, quick, tick)
            sections.append(report.section(workload, results, steps, threads))
            found["workloads"][workload.name] = report.plain(workload, results, steps)
            all_agree &= agrees(agreement(workload, results))
            _write(output, stem, "\n".join(sections), found, quiet=True)
    print("\n".join(sections))
    print(f"written {output / stem}.md")
    if not all_agree:
        print("error: contenders that have to agree do not; see the report", file=sys.stderr)
    return 0 if all_agree else 1


def _write(output: Path, stem: str, page: str, found: dict[str, Any], quiet: bool = False) -> None:
    numbers = "results.json" if stem == "report" else f"{stem}.json"
    (output / f"{stem}.md").write_text(page, encoding="utf-8")
    (output / numbers).write_text(json.dumps(found, indent=1))
    if not quiet:
        print(page)
        print(f"written {output / stem}.md")


if __name__ == "__main__":
    sys.exit(main())
