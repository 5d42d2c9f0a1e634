"""A queue in front of a service that may be away: entries wait while it fails, and never raise.

Left out: what the service is (`tracking` knows).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pipeline.redaction import redact

logger = logging.getLogger(__name__)


class Backlog:
    """Thread-safe.

    Args:
        service: name for messages.
        connect: called before each transmission until it succeeds once; its result is what entries are called with.
        is_final: whether an error says that the entry can never succeed. Such an entry is dropped and listed.
        interval: seconds between two transmissions.
        retry: seconds to leave the service alone after it failed.
    """

    def __init__(
        self,
        service: str,
        connect: Callable[[], Any],
        is_final: Callable[[Exception], bool],
        interval: float = 1.0,
        retry: float = 15.0,
    ) -> None:
        self._service, self._connect, self._is_final = service, connect, is_final
        self._interval, self._retry, self._due = interval, retry, 0.0
        self._entries: deque[tuple[str, Callable[[Any], None]]] = deque()
        self._connection: Any = None
        self._trouble = ""
        self._refused: list[str] = []
        self._lock = threading.RLock()

    def add(self, name: str, send: Callable[[Any], None], flush: bool = True) -> None:
        """Queue `send`; transmit if it is time to."""
        with self._lock:
            self._entries.append((name, send))
            if flush:
                self.flush(force=False)

    def flush(self, force: bool = True, patience: int = 1) -> None:
        """Send until all is sent or `patience` entries in a row fail. The first failure of an outage is a warning.

        An entry that fails goes to the end of the queue, so that one which always fails cannot block the others.
        """
        with self._lock:
            if time.monotonic() < self._due and not force:
                return
            failures = 0
            while self._entries and failures < patience:
                try:
                    self._send()
                    failures = 0
                except Exception as error:
                    failures += 1
                    self._entries.rotate(-1)
                    if not self._trouble:
                        logger.warning("%s fails, training goes on: %s", self._service, one_line(error))
                    self._trouble = one_line(error)
            if not failures:
                self._trouble = ""
            self._due = time.monotonic() + (self._retry if failures else self._interval)

    def close(self) -> bool:
        """A last attempt; says what could not be sent, and returns whether all was."""
        with self._lock:
            self.flush(patience=3)
            if self._entries:
                names = [name for name, _ in self._entries]
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                logger.warning("%s was not told: %s%s (%s)", self._service, ", ".join(names[:5]), more, self._trouble)
            if self._refused:
                logger.warning("%s refused %s", self._service, "; ".join(self._refused))
            return not self._entries

    def _send(self) -> None:
        if self._connection is None:
            self._connection = self._connect()
        name, send = self._entries[0]
        try:
            send(self._connection)
        except Exception as error:
            if not self._is_final(error):
                raise
            self._refused.append(f"{name}: {one_line(error)}")
        self._entries.popleft()


def one_line(error: Exception) -> str:
    """An exception's type and text, fit for a message of one line."""
    return f"{type(error).__name__}: {redact(' '.join(str(error).split()))[:300]}"
