"""Seconds from `python -m jobs.train` to the first optimizer step, with everything cached, and where they go.

A run of a tiny model fills the caches; each of the runs after it has a name of its own, so that it trains anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks.faults.materials import settings, write_model, write_pairs
from benchmarks.throughput.race import RaceError
from benchmarks.throughput.report import table

TARGET = 15.0
STEPS = 4
PLACES = {
    "ray": "Ray's node is there",
    "found": "rows and reference found, Ray Train called",
    "worker": "the worker has its model and engine",
    "step": "first optimizer step",
    "end": "(exported, shut down)",
}
"""What a run comes by, in this order."""
POLL = 0.05


def run(runs: int, output: Path) -> tuple[str, dict[str, Any]]:
    """Markdown and seconds at each place, run by run. Raises RaceError where a run fails."""
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="startup-") as folder,
        tqdm(total=runs + 1, desc="start-up", unit="run") as bar,
    ):
        config = _write(Path(folder))
        for number in range(runs + 1):
            seconds = _measure(Path(folder), config, f"run{number}", output / "startup.log")
            found += [seconds] if number else []  # the first one filled the caches
            bar.update()
    return page(found), {"runs": found}


def page(runs: list[dict[str, float]]) -> str:
    """A line per place: its median, its range, and how long it is after the one before."""
    rows, before = [], 0.0
    for key, place in PLACES.items():
        at = [seconds[key] for seconds in runs]
        rows.append([place, f"{median(at):.1f}", f"{min(at):.1f}–{max(at):.1f}", f"{median(at) - before:.1f}"])
        before = median(at)
    first = median(seconds["step"] for seconds in runs)
    head = ["until", "seconds after the command", "min–max", "after the line before"]
    said = f"Target: the first step at most {TARGET:g} s after the command: {'met' if first <= TARGET else 'missed'}.\n"
    return f"## Start-up, {len(runs)} runs\n\n{table(head, rows)}\n{said}"


def _write(folder: Path) -> Path:
    plain = settings(write_model(folder / "model"), write_pairs(folder / "pairs.jsonl", 64), STEPS, STEPS)
    config = folder / "config.json"
    config.write_text(json.dumps(plain | {"storage": str(folder / "outputs"), "objective": {"name": "dpo"}}))
    return config


def _measure(folder: Path, config: Path, name: str, log: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "jobs.train", str(config), f"name={name}"]
    seconds: dict[str, float] = {}
    with log.open("w") as lines, _process(command, lines) as process:
        started, tree = time.time(), psutil.Process(process.pid)
        while process.poll() is None:
            now = time.time() - started
            if "ray" not in seconds and "raylet" in _names(tree):
                seconds["ray"] = now
            if "found" not in seconds and list(folder.glob(f"outputs/runs/{name}-*/ray/*")):
                seconds["found"] = now
            time.sleep(POLL)
        seconds["end"] = time.time() - started
    for line in [] if process.returncode else _rank_log(folder, name):
        key = {"start": "worker", "step": "step"}.get(line["event"])
        if key is not None:
            seconds.setdefault(key, datetime.fromisoformat(line["time"]).timestamp() - started)
    if process.returncode or set(seconds) != set(PLACES):
        said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise RaceError(f"start-up, {name}: {said[-1]} (see {log})")
    return seconds


@contextmanager
def _process(command: list[str], lines: Any) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(command, stdout=lines, stderr=lines, env=environment)
    try:
        yield process
    finally:
        process.terminate()  # nothing where it has ended
        process.wait()


def _names(tree: psutil.Process) -> set[str]:
    found = set()
    for process in tree.children(recursive=True):
        try:
            found.add(process.name())
        except psutil.NoSuchProcess:
            continue
    return found


def _rank_log(folder: Path, name: str) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"outputs/runs/{name}-*/logs/rank-00000.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]
