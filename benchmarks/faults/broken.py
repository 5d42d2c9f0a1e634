"""`prepare` on records of which one in twenty is broken: every one is counted, and memory does not grow with their number.

    python -m benchmarks.faults.broken --rows 100000 1000000

Each number of rows is prepared by a process of its own on a Ray cluster of its own, whose tree's memory is sampled (PSS).
Exit status 1: a record is unaccounted for, or memory grew by more than `GROWTH`; 2: it could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.errors import DrillError
from benchmarks.faults.materials import write_model
from benchmarks.throughput.memory import PeakPss
from benchmarks.throughput.prepare import write_records
from benchmarks.throughput.report import GIB, machine, table
from pipeline.errors import UserError

EVERY = 20
"""One record in so many is broken."""
GROWTH = 1.25
"""Memory at the largest number of rows, as a multiple of that at the smallest."""
BREAKS: dict[str, Any] = {
    "broken JSON": lambda line: line[: len(line) // 2],
    "bad UTF-8": lambda line: line[:20] + b"\xff\xfe" + line[20:],
    "not a JSON object": lambda line: b"[" + line + b"]",
    "missing field: rejected": lambda line: line.replace(b'"rejected"', b'"refused"'),
    "wrong type: responses are partly text and partly messages": lambda line: _with(line, chosen=7),
    "chosen and rejected are the same": lambda line: _with(line, chosen="x", rejected="x"),
    "non-finite weight": lambda line: _with(line, weight=10**400),
}
"""Ways to break a record, by the reason that the quarantine has to give (or that it has to begin with)."""


def _with(line: bytes, **changes: Any) -> bytes:
    return json.dumps(json.loads(line) | changes).encode()


def write_broken(path: Path, count: int) -> int:
    """Records of which one in `EVERY` is broken, at a random place of each `EVERY` → how many are."""
    whole = path.with_suffix(".whole")
    write_records(whole, count)
    chance, ways = np.random.default_rng(1), list(BREAKS.values())
    broken, place = 0, -1
    with whole.open("rb") as lines, path.open("wb") as out:
        for i, line in enumerate(lines):
            if i % EVERY == 0:
                place = i + int(chance.integers(EVERY))
            if i == place:
                line = ways[broken % len(ways)](line.rstrip(b"\n")) + b"\n"
                broken += 1
            out.write(line)
    whole.unlink()
    return broken


def prepare(folder: Path, model: Path) -> dict[str, Any]:
    """What `prepare` makes of the records in `folder`; in a process of its own."""
    from pipeline import cluster, data
    from pipeline.config_file import validate
    from pipeline.rows import Rows

    config = validate(
        {
            "storage": str(folder / "storage"),
            "data": {"kind": "preference", "sources": [{"path": str(folder / "pairs.jsonl")}], "max_length": 4096},
            "model": {"path": str(model)},
            "objective": {"name": "dpo"},
        }
    )
    cluster.connect(config)
    began = time.perf_counter()
    rows = data.prepare(config, str(model))
    seconds = time.perf_counter() - began
    found = data.summary(rows)
    with (rows / data.QUARANTINE).open("rb") as lines:
        quarantined = sum(1 for _ in lines)
    return {
        "seconds": seconds,
        "records": found.records,
        "rows": found.rows,
        "on_disk": len(Rows(rows)),
        "quarantined": found.quarantined,
        "in_quarantine": quarantined,
        "reasons": found.reasons,
    }


def measure(count: int, model: Path, folder: Path) -> dict[str, Any]:
    """One number of rows. Raises DrillError where it fails or a record is unaccounted for."""
    folder.mkdir()
    broken = write_broken(folder / "pairs.jsonl", count)
    command = [sys.executable, "-m", "benchmarks.faults.broken", "--child", str(folder), "--model", str(model)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    log = folder / "log.txt"
    with log.open("w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        with PeakPss([process.pid], every=1.0) as peak:
            said, _ = process.communicate()
    if process.returncode:
        raise DrillError(f"{count} rows: {log.read_text().strip().splitlines()[-1:]}")
    found = json.loads(said.strip().splitlines()[-1]) | {"peak": peak.bytes}
    check(found, count, broken)
    return found


def check(found: dict[str, Any], count: int, broken: int) -> None:
    """Every record is a row or in quarantine, for the reason that it was broken for. Raises DrillError."""
    seen = (found["records"], found["rows"], found["on_disk"], found["quarantined"], found["in_quarantine"])
    if seen != (count, count - broken, count - broken, broken, broken):
        raise DrillError(f"{count} records of which {broken} are broken became {seen}")
    wanted = Counter(list(BREAKS)[i % len(BREAKS)] for i in range(broken))
    given: Counter[str] = Counter()
    for reason, number in found["reasons"].items():
        given[next((known for known in wanted if reason.startswith(known)), reason)] += number
    if given != wanted:
        raise DrillError(
            f"other reasons than those they were broken for: {dict(given - wanted)} for {dict(wanted - given)}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Errors that a user can mend are one line on stderr."""
    options = _parser().parse_args(arguments)
    if options.child:
        print(json.dumps(prepare(Path(options.child), Path(options.model))))
        return 0
    output = Path(options.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    found: dict[int, dict[str, Any]] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="broken-") as folder:
            model = write_model(Path(folder) / "model") if options.bytes else _smollm2(Path(folder))
            for count in sorted(options.rows):
                found[count] = measure(count, model, Path(folder) / str(count))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = f"# Prepare, {1 / EVERY:.0%} of the records broken\n\n{machine()}\n\n{page(found)}"
    (output / "broken.md").write_text(text, encoding="utf-8")
    (output / "broken.json").write_text(json.dumps(found, indent=1))
    print(text)
    return 0 if growth(found) <= GROWTH else 1


def growth(found: dict[int, dict[str, Any]]) -> float:
    """Peak memory at the largest number of rows over that at the smallest."""
    return found[max(found)]["peak"] / found[min(found)]["peak"]


def page(found: dict[int, dict[str, Any]]) -> str:
    """A row for each number of records, and the growth."""
    head = ["records", "usable", "quarantined", "reasons", "rows/s", "peak tree PSS, GiB"]
    rows = [
        [
            f"{count:,}",
            f"{one['rows']:,}",
            f"{one['quarantined']:,}",
            str(len(one["reasons"])),
            f"{count / one['seconds']:.0f}",
            f"{one['peak'] / GIB:.2f}",
        ]
        for count, one in found.items()
    ]
    grown = f"Memory from {min(found):,} to {max(found):,} records: {growth(found):.2f} × (at most {GROWTH:g} ×).\n"
    return "\n".join([table(head, rows), *([grown] if len(found) > 1 else [])])


def _smollm2(folder: Path) -> Path:
    from pipeline.model_files import locate

    return Path(locate("package:smollm2", folder / "cache"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults.broken",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="numbers of records (default: 100000 1000000)"
    )
    add("--bytes", action="store_true", help="a tokenizer of single bytes instead of SmolLM2's")
    add("--output", default="outputs/faults", help="folder of the report (default: outputs/faults)")
    add("--child", help=argparse.SUPPRESS)
    add("--model", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
