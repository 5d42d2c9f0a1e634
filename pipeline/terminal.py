"""What a process says, on its terminal and in its logs, passes through here: without secrets, and without a word where nobody listens.

`guarded` holds for a command, `guard` for the whole life of a worker's process: its standard streams, what any library logs, warnings,
and errors that nobody catches. What C and C++ libraries write past Python is theirs.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from pipeline.errors import Leaving, UserError
from pipeline.redaction import redact


class NobodyReads(BrokenPipeError):
    """Standard output was closed by whoever read it: `qalign keys | head`."""


class Guarded:
    """A stream of text whose secrets are hidden as they are written; all else is the stream's own.

    needed: what is written is what was asked for, so that without a reader it raises NobodyReads. Else it is dropped: a training does
    not end because its terminal did.
    """

    def __init__(self, stream: Any, needed: bool) -> None:
        self._stream, self._needed = stream, needed

    def write(self, text: str) -> int:
        try:
            self._stream.write(redact(text))
        except BrokenPipeError:
            self._gone()
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._gone()

    def _gone(self) -> None:
        if self._needed:
            raise NobodyReads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RedactingFormatter(logging.Formatter):
    """Whatever is logged, tracebacks included, is `redact`ed as it is written."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


@contextmanager
def guarded() -> Iterator[None]:
    """What this process says until the end of the block."""
    before = sys.stdout, sys.stderr, logging.getLogRecordFactory(), sys.excepthook, threading.excepthook
    guard()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before[:2]
        logging.setLogRecordFactory(before[2])
        sys.excepthook, threading.excepthook = before[3:]


def guard() -> None:
    """What this process says from now on. A second call changes nothing."""
    if isinstance(sys.stderr, Guarded):
        return
    sys.stdout, sys.stderr = Guarded(sys.stdout, needed=True), Guarded(sys.stderr, needed=False)
    logging.setLogRecordFactory(_without_secrets(logging.getLogRecordFactory()))
    sys.excepthook = _show
    threading.excepthook = lambda broken: _show(broken.exc_type, broken.exc_value, broken.exc_traceback)


def log_to_terminal() -> None:
    """Warnings of all libraries go to standard error. Called once, by the command line."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


@contextmanager
def leaving_without_secrets() -> Iterator[None]:
    """Errors that leave this block, for Ray to log and send, say nothing that has to stay secret: one that would becomes a RuntimeError."""
    try:
        yield
    except (UserError, Leaving):
        raise  # told in one line, where it is caught
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        if (shown := redact(text)) != text:
            raise RuntimeError(f"{type(error).__name__}: {redact(str(error))}\n{shown}") from None
        raise


def _without_secrets(make: Any) -> Any:
    """A maker of log records whose texts are `redact`ed before any handler sees them, Ray's and other libraries' among them."""

    def made(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # of wrong arguments the handler tells
            return record
        if (shown := redact(text)) != text:
            record.msg, record.args = shown, ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
        return record

    return made


def _show(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
