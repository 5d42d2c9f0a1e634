"""Memory of processes on Linux: a process's own peak, and what its whole tree holds (PSS: shared pages are split)."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType


def peak_resident(pid: int | str = "self") -> int:
    """The largest resident set so far, bytes: since the process began, or since `reset_peak`."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), flags=re.MULTILINE)
    assert found is not None, "Linux reports VmHWM"
    return 1024 * int(found[1])


def reset_peak() -> bool:
    """Start this process's peak anew; False where the system does not allow that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def tree_pss(roots: Iterable[int]) -> int:
    """Proportional set size of these processes and all below them, bytes. Processes that end meanwhile count nothing."""
    import psutil

    total = 0
    for root in roots:
        try:
            process = psutil.Process(root)
            members = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for member in members:
            try:
                total += member.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
    return total


class PeakPss:
    """The largest `tree_pss` while the block runs, sampled beside it.

    Reading it costs the machine some milliseconds a time: never around a step whose time counts.
    """

    def __init__(self, roots: Sequence[int], every: float = 0.05) -> None:
        self.bytes = 0
        self._roots, self._every = list(roots), every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakPss:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, tree_pss(self._roots))
            self._done.wait(self._every)
