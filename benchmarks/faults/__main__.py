"""Breaks trainings and preparations, one drill at a time, and shows what became of them.

    python -m benchmarks.faults                      every drill (half an hour on two cores)
    python -m benchmarks.faults --quick              short trainings, three random kills instead of twenty
    python -m benchmarks.faults --only killed_node   one drill, or several

Everything runs on a private Ray cluster of three nodes on this machine, whose processes alone are killed. Results land in
`--output` as faults.md and faults.json. Exit status 1: something was lost; 2: a drill could not be run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from benchmarks.faults import numbers, processes, storage
from benchmarks.faults.bench import Bench, Drill, Outcome
from benchmarks.throughput.report import machine, table
from pipeline.errors import UserError

DRILLS: dict[str, Drill] = {drill.__name__: drill for drill in (*storage.DRILLS, *numbers.DRILLS, *processes.DRILLS)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Errors that a user can mend are one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    output = Path(options.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    try:
        found = run(options.only or list(DRILLS), options.quick)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "benchmarks.faults", *given])
    text = f"# Faults\n\n`{command}`\n\n{machine()}\n\n{page(found)}"
    (output / "faults.md").write_text(text, encoding="utf-8")
    (output / "faults.json").write_text(json.dumps({name: asdict(one) for name, one in found.items()}, indent=1))
    print(text)
    print(f"written {output / 'faults.md'}")
    return 0 if all(one.ok for one in found.values()) else 1


def run(names: Sequence[str], quick: bool) -> dict[str, Outcome]:
    """The outcome of each drill. Raises DrillError where one could not be run. What failed leaves its folder behind."""
    found: dict[str, Outcome] = {}
    folder = Path(tempfile.mkdtemp(prefix="drills-"))
    with Bench(folder, quick, takes_jobs="killed_supervisor" in names) as bench:
        for name in tqdm(names, desc="drills", unit="drill", mininterval=0):
            began = time.monotonic()
            found[name] = DRILLS[name](bench)
            verdict = "ok" if found[name].ok else f"FAILED, see {folder}"
            tqdm.write(f"{name}: {verdict}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    if all(one.ok for one in found.values()):
        shutil.rmtree(folder)
    return found


def page(found: dict[str, Outcome]) -> str:
    """One table."""
    head = ["drill", "what was done", "what happened", "s to recover", "steps repeated", "final weights equal", ""]
    rows = [
        [
            name,
            one.did,
            one.happened,
            "–" if one.seconds is None else f"{one.seconds:.1f}",
            "–" if one.repeated is None else str(one.repeated),
            {None: "–", True: "to the last bit", False: "NO"}[one.equal],
            "ok" if one.ok else "FAILED",
        ]
        for name, one in found.items()
    ]
    return table(head, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=list(DRILLS), metavar="NAME", help=f"some of: {', '.join(DRILLS)}")
    add("--quick", action="store_true", help="shorter trainings and outages, fewer kills")
    add("--output", default="outputs/faults", help="folder of the table (default: outputs/faults)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
