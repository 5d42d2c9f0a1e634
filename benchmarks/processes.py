"""Fresh processes of one thread, each with a log file of its own, that end when the benchmark does, however that is."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def processes(count: int, logs: Path) -> ProcessPoolExecutor:
    """A pool of `count`; what they print goes to `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, spawn, initializer=_begin, initargs=(str(logs),))


def _begin(logs: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update({name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    log = os.open(f"{logs}/{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A pool waits for work for ever once whoever gave it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
