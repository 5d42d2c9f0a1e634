"""Notice that a worker's time is short, answered by a checkpoint at the end of the step that it is in.

    SIGTERM        this process has to end                   save, then all ranks leave (`Leaving`): others may start again
    a resize       the group is about to be started anew     the same
    a drain        a node of the group is about to go         save, and go on while the node lasts, saving again and again

Any rank may hear of it; all agree once a step. A second SIGTERM does what it does without us: it ends the process.

Left out: how Ray tells of drains and resizes (`elastic`), and what a checkpoint is (`checkpoint`).
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from functools import partial

import torch
import torch.distributed as dist

from pipeline.distributed import agree
from pipeline.errors import Leaving

logger = logging.getLogger(__name__)

DRAIN_POLL_SECONDS = 2.0
"""How often rank 0 has all ranks ask whether a node is being drained."""
DRAIN_SHARE = 0.1
"""While a node is being drained, saving takes this share of the time: what is lost with it stays short."""


class Told(IntEnum):
    """What a rank was told, weakest first."""

    NOTHING = 0
    DRAIN = 1
    RESIZE = 2
    LEAVE = 3


class _Process:
    """What reached this process from outside its training thread."""

    def __init__(self) -> None:
        self.told = Told.NOTHING
        self.training = False
        self.answered = threading.Event()


_process = _Process()


def listen() -> Callable[[], object]:
    """From now on SIGTERM is a notice while this process trains. Main thread only. Returns what takes it back."""
    before = signal.getsignal(signal.SIGTERM)

    def hear(number: int, frame: object) -> None:
        if _process.training and _process.told < Told.LEAVE:
            _process.told = Told.LEAVE
            return
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, hear)
    return partial(signal.signal, signal.SIGTERM, before)


def save_before_resize(seconds: float) -> bool:
    """Have the training thread of this process save and leave. Returns whether it did within `seconds`."""
    if not _process.training:
        return True
    _process.told = max(_process.told, Told.RESIZE)
    return _process.answered.wait(seconds)


class Notice:
    """One rank's part in a training: a context; `due` and `saved` are called between steps, on all ranks alike.

    Args:
        device: where the ranks' process group exchanges tensors.
        draining: collective; what is known of nodes that are being drained, in words, or None.
    """

    def __init__(self, device: torch.device, draining: Callable[[], str | None] | None = None) -> None:
        self._device, self._draining = device, draining
        self._told, self._drained = Told.NOTHING, ""
        self._ask_at = self._save_at = 0.0

    def __enter__(self) -> Notice:
        self._take_back = listen() if threading.current_thread() is threading.main_thread() else None
        _process.told, _process.training = Told.NOTHING, True
        _process.answered.clear()
        return self

    def __exit__(self, *_: object) -> None:
        _process.training = False
        _process.answered.set()
        if self._take_back is not None:
            self._take_back()

    def due(self) -> bool:
        """Whether all ranks have to save after this step. Collective."""
        asks = self._draining is not None and dist.get_rank() == 0 and time.monotonic() >= self._ask_at
        told, ask = self._loudest(_process.told, asks)
        if ask and self._draining is not None:
            self._ask_at = time.monotonic() + DRAIN_POLL_SECONDS
            self._note_drain(self._draining() or "")
        self._told = max(Told(told), Told.DRAIN if self._drained else Told.NOTHING)
        if self._told is Told.DRAIN:
            return agree(time.monotonic() >= self._save_at)
        return self._told > Told.DRAIN

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint of `step` is committed and took `seconds`. Raises Leaving where the ranks were told to leave."""
        self._save_at = time.monotonic() + seconds * (1 - DRAIN_SHARE) / DRAIN_SHARE
        if self._told >= Told.RESIZE:
            why = "SIGTERM" if self._told is Told.LEAVE else "another number of workers"
            if dist.get_rank() == 0:
                logger.warning("%s: step %d is saved, leaving", why, step)
            raise Leaving(f"{why}: step {step} is saved")

    def _note_drain(self, what: str) -> None:
        if what and what != self._drained and dist.get_rank() == 0:
            logger.warning("%s; saving now, and training on while it lasts", what)
        self._drained = what

    def _loudest(self, told: int, asks: bool) -> tuple[int, bool]:
        """The greatest over all ranks."""
        if dist.get_world_size() == 1:
            return told, asks
        heard = torch.tensor([int(told), int(asks)], device=self._device)
        dist.all_reduce(heard, dist.ReduceOp.MAX)
        return int(heard[0]), bool(heard[1])
