"""Ends a worker that makes no progress, so that its group is started again from the last checkpoint.

A rank that waits for a slower one makes no progress of its own: ranks count their beats together, and none ends while any of
them beats. A rank that waits in a collective for one that is stuck or stopped is as stuck itself: whoever notices first ends its
own process, and whoever started the group (Ray Train, a sweep) does the rest. A process that was stopped altogether is
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

import torch.distributed as dist

STATUS = 75
"""Exit status of a worker that ended itself: a temporary failure, in the words of sysexits.h."""
EXCHANGE_SECONDS = 5.0
"""How often ranks tell each other that they made progress, at most."""
LAST_WORDS_SECONDS = 5.0
"""Storage may be what hangs: nobody waits longer for a message to be written."""


class Watchdog:
    """A context that ends this process when `beat` is called neither here nor by another rank for `seconds`.

    The clock starts with the first beat: loading a model takes as long as it takes.

    Args:
        seconds: None: never.
        who: begins the message, e.g. "rank 3".
        log: file to which the message is appended.
        stacks: file that gets every thread's stack.
        together: a store that all ranks share, on a connection of its own; None: this rank is alone.
    """

    def __init__(
        self, seconds: float | None, who: str, log: Path, stacks: Path, together: dist.Store | None = None
    ) -> None:
        self._seconds, self._who, self._log, self._stacks = seconds, who, log, stacks
        self._together = together
        self._last: float | None = None
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something was done. From any thread."""
        self._last = time.monotonic()
        self._beats += 1

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            self._thread.start()
            if self._together is not None:  # in a thread of its own: whoever serves the store may be what hangs
                threading.Thread(target=self._listen, name="beats of all ranks", daemon=True).start()
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

    def _listen(self) -> None:
        """Add this rank's beats to those of all ranks, and notice when others were added."""
        assert self._seconds is not None and self._together is not None
        told, known = 0, None
        while not self._stop.wait(min(EXCHANGE_SECONDS, self._seconds / 10)):
            own = self._beats
            try:
                total = self._together.add("beats", own - told)
            except RuntimeError:  # it is gone, and with it the rank that served it
                return
            if known is not None and total > known + own - told and self._last is not None:
                self._last = time.monotonic()
            told, known = own, total

    def _last_words(self) -> None:
        with self._log.open("a") as log:
            log.write(
                f"{self._who} saw no progress for {self._seconds:g} s (train.hang_timeout) and ends itself, so that all "
                f"workers start again from the last checkpoint; where it stood: {self._stacks}\n"
            )
        with self._stacks.open("w") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
