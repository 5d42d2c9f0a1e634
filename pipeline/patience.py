"""Storage that is out of reach or full for a while: try again, say so once, give up after a bounded time.

A file server that restarts, a mount that comes back and a disk that somebody clears cost a run nothing but the waiting.

Left out: what is being written (`durable`, `checkpoint`, `progress`), and doing it beside training (`saver`).
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.durable import FULL
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

OUT_OF_REACH = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ENODEV", "EREMOTEIO"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ECONNREFUSED", "ECONNRESET"),
    )
    if hasattr(errno, name)
)
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds between tries; the last one again and again."""


class StorageFailed(UserError, RuntimeError):
    """Storage stayed out of reach, or full, for longer than the run has patience."""


def may_pass(error: OSError, root: Path) -> bool:
    """Whether trying again can help. root: a folder that is there for as long as its storage is."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return not _is_there(root)
    return error.errno in OUT_OF_REACH | FULL


def patiently(
    act: Callable[[], T],
    root: Path,
    seconds: float,
    hurry: threading.Event | None = None,
    what: str = "storage",
    beat: Callable[[], None] = lambda: None,
) -> T:
    """`act()`, again after each `OSError` that may pass, for as long as `seconds`; the first one is logged.

    Args:
        act: may be called any number of times.
        root: a folder that is there for as long as its storage is; an error "no such file" while it is there is final.
        hurry: once set, nothing is tried again.
        beat: called after each failure: waiting is bounded, and tells a watchdog that this is no hang.

    Raises StorageFailed, one line, when the time is over; other errors at once.
    """
    started: float | None = None
    tries = 0
    while True:
        try:
            done = act()
        except OSError as error:
            if not may_pass(error, root):
                raise
            beat()
            now = time.monotonic()
            if started is None:
                started = now
                logger.warning("%s: %s; trying again for %g s", what, error, seconds)
            if now - started >= seconds or (hurry is not None and hurry.is_set()):
                raise StorageFailed(f"{what}: {error}, for {now - started:.0f} s; {_remedy(error)}") from error
            _pause(min(PAUSES[min(tries, len(PAUSES) - 1)], started + seconds - now), hurry)
            tries += 1
        else:
            if started is not None:
                logger.warning("%s: works again after %.0f s", what, time.monotonic() - started)
            return done


def _remedy(error: OSError) -> str:
    mend = "free some space" if error.errno in FULL else "mend the storage"
    return f"{mend}, then the same command goes on from the last checkpoint"


def _pause(seconds: float, hurry: threading.Event | None) -> None:
    if hurry is None:
        time.sleep(seconds)
    else:
        hurry.wait(seconds)


def _is_there(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:  # `is_dir` answers only for the usual reasons
        return False
