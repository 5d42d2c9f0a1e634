"""Runs the contenders of a workload side by side: one resident process per worker, one step at a time, in turns.

    models and rows written → processes started → rounds (warm-up, timed) → one round under memory watch → watched steps

In a round each contender takes one step on the same rows, and says which token ids it saw: that they are the same is
checked. Imports neither torch nor the pipeline.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.throughput.memory import PeakPss
from benchmarks.throughput.tasks import Task, expected, write_rows
from benchmarks.throughput.workloads import AGREEMENT_STEPS, Entry, Workload
from pipeline.errors import UserError
from pipeline.heap import HUGE_PAGES, ONE_HEAP

WARM_UP = 2
AGAIN = 5
"""Repetitions of one step whose least time is compared with the least times of its products."""
WATCHED = 3 + AGAIN
"""Steps after the timed ones, all on the same rows: memory, profile, products, and those."""
PAUSE = 0.1
"""Seconds between turns: threads of the one before stop spinning."""


class RaceError(UserError, RuntimeError):
    """A contender could not be run."""


@dataclass(slots=True)
class Result:
    """What one contender did. Lists have one item a step, warm-up included."""

    entry: Entry
    seconds: list[float] = field(default_factory=list)  # the slowest worker's
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    logprobs: dict[str, list[float]] = field(default_factory=dict)  # of the first step's rows, before training
    tree_pss: int = 0  # peak in one step
    peak_rss: int = 0  # the largest worker's
    peak_since_first_step: bool = True  # False: the system cannot reset it, so loading counts
    products: dict[str, Any] | None = None
    again: list[float] = field(default_factory=list)  # seconds of the step that the products are of
    profile: str | None = None


def rounds(steps: int) -> int:
    """Rounds before the watched ones, `steps` of them timed: enough to compare a loss after `AGREEMENT_STEPS`."""
    return max(WARM_UP + steps, AGREEMENT_STEPS + 1)


def run(
    workload: Workload, output: Path, steps: int, threads: int, quick: bool, tick: Callable[[str], None]
) -> dict[str, Result]:
    """Results by entry name; the last `steps` items of `seconds` are the timed ones. Logs and profiles land in `output`,
    models and rows in a temporary folder. `tick(contender)` is called before each of its turns.

    Raises RaceError when a process ends, or when a contender saw other rows than it was given.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        return _run(workload, Path(folder), output, steps, threads, quick, tick)


def _run(
    workload: Workload,
    folder: Path,
    output: Path,
    steps: int,
    threads: int,
    quick: bool,
    tick: Callable[[str], None],
) -> dict[str, Result]:
    total = rounds(steps) + WATCHED
    write_rows(folder, workload, rounds(steps), steps, WATCHED)
    tasks = {
        e.name: Task(str(folder), workload.name, e.name, total, e.threads(threads), quick) for e in workload.entries
    }
    _write_materials(workload, tasks, output)
    rows = tasks[workload.entries[0].name].groups()
    with ExitStack() as stack:
        teams = []
        for entry in workload.entries:
            teams.append(Team(tasks[entry.name], output))
            stack.callback(teams[-1].close)
        for team in teams:
            team.wait_until_loaded()
        for number in range(rounds(steps)):
            for team in teams:
                tick(team.result.entry.name)
                team.step(expected(rows[number]))
                time.sleep(PAUSE)
        for team in teams:
            tick(f"{team.result.entry.name} (memory)")
            team.watch_memory()
            _watch(team, workload, output)
            team.stop()
    return {team.result.entry.name: team.result for team in teams}


def _watch(team: Team, workload: Workload, output: Path) -> None:
    """Profile and matrix products of the entry that has a target for them."""
    if any(t.measure == "products" and t.ours == team.result.entry.name for t in workload.targets):
        path = str(output / f"{workload.name}-profile-{team.result.entry.name}.txt")
        team.result.profile = team.ask({"do": "step", "with": "profile", "path": path})[0]["profile"]
        team.result.again = [team.ask({"do": "step"})[0]["seconds"] for _ in range(AGAIN)]
        team.result.products = team.ask({"do": "step", "with": "products"})[0]["products"]


def _write_materials(workload: Workload, tasks: dict[str, Task], output: Path) -> None:
    """Models, and reference log-probs in each precision that a contender reads from the cache."""
    precisions = sorted({entry.precision for entry in workload.entries if entry.contender == "ours"})
    task = tasks[workload.entries[0].name]
    log = output / f"{workload.name}-materials.log"
    command = [sys.executable, "-m", "benchmarks.throughput.materials", task.dump(), *precisions]
    with log.open("w") as lines:
        done = subprocess.run(command, env=_environment(task), stderr=lines, stdout=lines, check=False)
    if done.returncode:
        raise RaceError(f"{workload.name}: its models cannot be written: {_last_line(log)}")


class Team:
    """The workers of one contender: usually one process."""

    def __init__(self, task: Task, output: Path) -> None:
        self.result = Result(task.entry)
        self._log = output / f"{task.name}-{task.entry_name}.log"
        self._log.write_text("")
        self._processes: list[subprocess.Popen[str]] = []
        for rank in range(task.entry.workers):
            own = replace(task, rank=rank)
            command = [sys.executable, "-m", "benchmarks.throughput.child", own.dump()]
            with self._log.open("a") as log:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env=_environment(task),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                    )
                )

    def wait_until_loaded(self) -> None:
        """Its first answer: the log-probs before training."""
        for answer in self._answers():
            self.result.logprobs |= answer["logprobs"]

    def close(self) -> None:
        """End the processes that have not ended by themselves."""
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """One line to each worker, one from each."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        return self._answers()

    def step(self, rows: Sequence[str]) -> None:
        """One timed step; `rows`: hashes of what it has to see."""
        answers = self.ask({"do": "step"})
        refuse_other_rows(self.result.entry.name, answers, rows)
        self.result.seconds.append(max(answer["seconds"] for answer in answers))
        self.result.losses.append(answers[0]["loss"])
        self.result.grad_norms.append(answers[0]["grad_norm"])

    def watch_memory(self) -> None:
        """One step with the memory of the process trees sampled beside it."""
        with PeakPss([process.pid for process in self._processes]) as peak:
            self.ask({"do": "step"})
        self.result.tree_pss = peak.bytes

    def stop(self) -> None:
        """The last line, with the peak of the resident memory."""
        answers = self.ask({"do": "stop"})
        self.result.peak_rss = max(answer["peak_rss"] for answer in answers)
        self.result.peak_since_first_step = all(answer["peak_since_first_step"] for answer in answers)
        for process in self._processes:
            process.wait()

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RaceError(
                    f"{self.result.entry.name}: its process ended: {_last_line(self._log)} (see {self._log})"
                )
            answers.append(json.loads(line))
        return answers


def refuse_other_rows(name: str, answers: Sequence[dict[str, Any]], rows: Sequence[str]) -> None:
    """Raises RaceError unless the workers together saw each of a step's sequences, and nothing else (`tasks.digests`)."""
    if {row for answer in answers for row in answer["seen"]} != set(rows):
        raise RaceError(f"{name}: it saw other token ids than the rows of this step hold")


def _environment(task: Task) -> dict[str, str]:
    """The same thread count for whatever library counts threads its own way; nothing is looked up in the network."""
    count = str(task.threads)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)
    memory = HUGE_PAGES | ONE_HEAP if task.entry.contender == "ours" else {}  # as qalign's own workers have it
    return (
        os.environ
        | threads
        | memory
        | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    )


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
