"""The line protocol of a child process: one optimizer step for each `step` line, answered with what it took.

    parent: {"do": "step", "with": null | "profile" | "products", "path": …}     child: {"seconds": …, "loss": …, …}
    parent: {"do": "stop"}                                                       child: {"peak_rss": …}

A contender drives its own loop and calls `begin` and `end` around each step, so one whose loop belongs to a library
(TRL's `train`) is paced like any other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TextIO

from benchmarks.throughput.instruments import INSTRUMENTS
from benchmarks.throughput.memory import peak_resident, reset_peak


class Pace:
    """Blocks a contender between its steps.

    Args:
        requests, answers: one JSON object a line.
    """

    def __init__(self, requests: TextIO, answers: TextIO) -> None:
        self._requests, self._answers = requests, answers
        self._stack = ExitStack()
        self._started: float | None = None
        self._found: dict[str, Any] = {}
        self._reset: bool | None = None

    def say(self, answer: dict[str, Any]) -> None:
        """One line to the parent."""
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()

    def begin(self) -> bool:
        """Wait until the next step is asked for, and start the clock. False: there is none."""
        request = json.loads(self._requests.readline() or '{"do": "stop"}')
        if request["do"] == "stop":
            return False
        if self._reset is None:
            self._reset = reset_peak()
        self._found = {}
        if (instrument := request.get("with")) is not None:
            self._stack.enter_context(INSTRUMENTS[instrument](self._found, request.get("path")))
        self._started = time.perf_counter()
        return True

    def end(self, loss: float, grad_norm: float, seen: Callable[[], list[str]]) -> None:
        """Stop the clock and answer. `seen` is called after that: hashes of the token ids in this step."""
        assert self._started is not None, "a step ends that has not begun"
        seconds, self._started = time.perf_counter() - self._started, None
        self._stack.close()
        self.say({"seconds": seconds, "loss": loss, "grad_norm": grad_norm, "seen": seen(), **self._found})

    def finish(self) -> None:
        """The last line: the largest resident memory since the first step began."""
        self.say({"peak_rss": peak_resident(), "peak_since_first_step": bool(self._reset)})
