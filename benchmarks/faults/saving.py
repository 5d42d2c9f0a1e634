"""What a checkpoint costs training: blocks of 20 steps of the throughput benchmark's W1, in one process, by turns

    none         without a checkpoint
    in step      with one that is written inside its step
    background   with one that is written while training goes on

    python -m benchmarks.faults.saving

All blocks take the same rows. What a checkpoint costs is summed over its step and all that run while it is being written,
against the median of the same steps without one. Target: at most 3 % of the block.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.faults.errors import DrillError
from benchmarks.throughput.memory import peak_resident, reset_peak
from benchmarks.throughput.ours import Ours
from benchmarks.throughput.report import GIB, machine, table
from benchmarks.throughput.tasks import Task, write_rows
from benchmarks.throughput.workloads import named
from pipeline.config import CheckpointConfig
from pipeline.errors import UserError
from pipeline.fencing import Attempt
from pipeline.loop import train_step
from pipeline.saver import Saver

WORKLOAD, ENTRY = "w1", "ours-fp32"
STEPS = 20
"""Of a block: one checkpoint each."""
TARGET = 0.03
MODES = {"none": None, "in step": False, "background": True}
"""Name → `checkpoint.in_background`."""


@dataclass(frozen=True, slots=True)
class Block:
    """One turn of one mode."""

    mode: str
    seconds: list[float]  # of each step
    busy: list[bool]  # a checkpoint was being taken or written in that step
    call: float  # seconds of `Saver.save` itself
    peak: int  # resident bytes


class Turns(Ours):
    """The contender of the throughput benchmark, in blocks."""

    def block(self, mode: str, run: Path, number: int) -> Block:
        """`STEPS` optimizer steps; the checkpoint comes after the first one."""
        saver = self._saver(mode, run, number)
        reset_peak()
        seconds, busy, call = [], [], 0.0
        for i in range(STEPS):
            began = time.perf_counter()
            if saver is not None:
                saver.poll()
            under_way = saver is not None and saver.busy
            metrics = train_step(self._learner, self._config.objective, self._batches(self._steps[i]), i, STEPS)
            if saver is not None and i == 0:
                asked = time.perf_counter()
                saver.save(self._learner, number + 1, metrics)
                call = time.perf_counter() - asked
                under_way = True
            seconds.append(time.perf_counter() - began)
            busy.append(under_way)
        if saver is not None:
            saver.__exit__(None, None, None)
        return Block(mode, seconds, busy, call, peak_resident())

    def warm_up(self) -> None:
        """Steps that do not count."""
        for i in range(3):
            train_step(self._learner, self._config.objective, self._batches(self._steps[i]), i, STEPS)

    def _saver(self, mode: str, run: Path, number: int) -> Saver | None:
        if MODES[mode] is None:
            return None
        settings = CheckpointConfig(every=STEPS, keep=1, in_background=MODES[mode])
        folder = run / f"{number}"
        return Saver(folder, settings, Attempt.begin(folder), None)


def measure(rounds: int, threads: int, folder: Path) -> list[Block]:
    """All blocks. Raises DrillError where the model cannot be made."""
    task = Task(str(folder), WORKLOAD, ENTRY, STEPS, threads)
    write_rows(folder, named(WORKLOAD), STEPS, 0, 0)
    command = [sys.executable, "-m", "benchmarks.throughput.materials", task.dump(), "float32"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise DrillError(f"the model of {WORKLOAD} cannot be made: {made.stderr.strip()[-300:]}")
    turns = Turns(task)
    turns.warm_up()
    names, blocks = list(MODES), []
    for number in range(rounds * len(names)):
        turn, place = divmod(number, len(names))
        blocks.append(turns.block(names[(turn + place) % len(names)], folder, number))  # no mode is always the first
        print(f"{number + 1}/{rounds * len(names)} {blocks[-1].mode} {sum(blocks[-1].seconds):.1f} s", file=sys.stderr)
    return blocks


def costs(blocks: Sequence[Block]) -> dict[str, dict[str, float]]:
    """By mode: seconds that a checkpoint costs, as a median over its turns, and as a share of a block without one.

    The row of `none` says what this way of counting makes of chance: a block without a checkpoint, counted like one that
    has the longest.
    """
    usual = [median(step) for step in zip(*(block.seconds for block in blocks if block.mode == "none"), strict=True)]
    longest = max(sum(block.busy) for block in blocks)
    found = {}
    for mode in MODES:
        own = [block for block in blocks if block.mode == mode]
        extra = []
        for block in own:
            busy = block.busy if any(block.busy) else [i < longest for i in range(len(usual))]
            extra.append(sum(s - u for s, u, there in zip(block.seconds, usual, busy, strict=True) if there))
        found[mode] = {
            "extra": median(extra),
            "low": min(extra),
            "high": max(extra),
            "share": median(extra) / sum(usual),
            "call": median(block.call for block in own),
            "steps": median(sum(block.busy) for block in own),
            "peak": max(block.peak for block in own),
        }
    return found


def page(blocks: Sequence[Block], found: dict[str, dict[str, float]]) -> str:
    """A row for each mode."""
    head = ["checkpoint", "s a step (median)", "s of the call", "steps meanwhile", "s it costs", "min–max"]
    head += ["share of 20 steps", "peak RSS, GiB"]
    rows = [
        [
            mode,
            f"{median(s for block in blocks if block.mode == mode for s in block.seconds):.3f}",
            f"{one['call']:.3f}" if mode != "none" else "–",
            f"{one['steps']:.0f}" if mode != "none" else "–",
            f"{one['extra']:.3f}",
            f"{one['low']:.3f}–{one['high']:.3f}",
            f"{one['share']:.1%}",
            f"{one['peak'] / GIB:.2f}",
        ]
        for mode, one in found.items()
    ]
    verdict = "met" if found["background"]["share"] <= TARGET else "missed"
    share = found["background"]["share"]
    return f"{table(head, rows)}\nTarget: at most {TARGET:.0%} in the background: {share:.1%}, {verdict}.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit status 1: target missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults.saving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each mode (default: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--output", default="outputs/faults", help="default: outputs/faults")
    options = parser.parse_args(arguments)
    output = Path(options.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="saving-") as folder:
            blocks = measure(options.rounds, options.threads, Path(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = costs(blocks)
    text = f"# Cost of a checkpoint\n\n{machine()}\n\n{page(blocks, found)}"
    (output / "saving.md").write_text(text, encoding="utf-8")
    plain: dict[str, Any] = {"costs": found, "blocks": [[b.mode, b.seconds, b.busy] for b in blocks]}
    (output / "saving.json").write_text(json.dumps(plain, indent=1))
    print(text)
    return 0 if found["background"]["share"] <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
