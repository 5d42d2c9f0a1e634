"""Ends a worker that makes no progress, so that its group is started again from the last checkpoint.

A rank that waits in a collective for one that is stuck or stopped is as stuck itself: whoever notices first ends its own
process, and whoever started the group (Ray Train, a sweep) does the rest. A process that was stopped altogether is
noticed by Ray's own health check, which `ray_train` sets to the same time.

Left out: a run without a group (`--local`), which nobody would start again.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from types import TracebackType

STATUS = 75
"""Exit status of a worker that ended itself: a temporary failure, in the words of sysexits.h."""
LAST_WORDS_SECONDS = 5.0
"""Storage may be what hangs: nobody waits longer for a message to be written."""


class Watchdog:
    """A context that ends this process when `beat` is not called for `seconds`.

    The clock starts with the first beat: loading a model takes as long as it takes.

    Args:
        seconds: None: never.
        who: begins the message, e.g. "rank 3".
        log: file to which the message is appended.
        stacks: file that gets every thread's stack.
    """

    def __init__(self, seconds: float | None, who: str, log: Path, stacks: Path) -> None:
        self._seconds, self._who, self._log, self._stacks = seconds, who, log, stacks
        self._last: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something was done."""
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._stop.wait(min(1.0, self._seconds / 10)):
            if self._last is not None and time.monotonic() - self._last > self._seconds:
                words = threading.Thread(target=self._last_words, daemon=True)
                words.start()
                words.join(LAST_WORDS_SECONDS)
                os._exit(STATUS)

    def _last_words(self) -> None:
        with self._log.open("a") as log:
            log.write(
                f"{self._who} made no progress for {self._seconds:g} s (train.hang_timeout) and ends itself, so that all "
                f"workers start again from the last checkpoint; where it stood: {self._stacks}\n"
            )
        with self._stacks.open("w") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
