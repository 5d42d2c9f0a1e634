"""The process of one contender: `python -m benchmarks.throughput.child TASK`, driven line by line (see `pace`).

It answers `{"logprobs": …}` when its model is loaded, before any training.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Protocol

from benchmarks.throughput.pace import Pace
from benchmarks.throughput.tasks import Task
from benchmarks.throughput.workloads import CONTENDERS


class Contender(Protocol):
    """What is raced. Its constructor takes a `Task`, loads the models and makes the optimizer."""

    def logprobs(self) -> dict[int, list[float]]:
        """log π(response | prompt) under the starting policy: row of the first step → its K responses."""
        ...

    def train(self, pace: Pace) -> None:
        """One optimizer step on the next rows after each `pace.begin()`, reported through `pace.end`."""
        ...


def main() -> int:
    """Standard output is for the protocol alone: whatever a library prints goes to standard error, a log file."""
    task = Task.parse(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if task.entry.pinned:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[task.rank]})
    import torch

    torch.set_num_threads(task.threads)
    module, name = CONTENDERS[task.entry.contender].split(":")
    contender: Contender = getattr(importlib.import_module(module), name)(task)
    pace = Pace(sys.stdin, answers)
    pace.say({"logprobs": contender.logprobs()})
    contender.train(pace)
    pace.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
