"""Sums and gathers among the processes of one machine through its memory, for CPUs.

gloo sends what processes tell each other through sockets, also where both are on one machine. Here each writes its part into memory
that all have mapped, and reads the others'. Who is ready is still asked with gloo's barrier: a process that died is noticed as before.

Left out: several machines, and GPUs, which have a library for this.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed import agree

FOLDER = Path("/dev/shm")  # noqa: S108  # names in it are random, and nobody else may read them
PIECE = 4 * 2**20
"""Bytes that a process tells the others at a time; it maps twice as many for each of them."""
logger = logging.getLogger(__name__)


class SharedMemory:
    """Memory of all processes of the default group; its collectives are called by all of them in the same order.

    Pieces take turns in two halves of the memory: before a process writes into one again, all have passed the barrier behind the piece
    between, so none is still reading.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._memory, self._half = memory, 0

    @classmethod
    def open(cls) -> SharedMemory | None:
        """None, on all ranks alike, where they are on several machines or the system gives no such memory. Collective."""
        size = 2 * PIECE * dist.get_world_size()
        own = _create(size) if dist.get_rank() == 0 else None
        try:
            path = agree(own)
            memory = None if path is None else _map(path, size)
            everywhere = torch.tensor(memory is not None, dtype=torch.int32)
            dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        finally:
            if own is not None:
                own.unlink()  # the memory stays for as long as somebody has it mapped, and no longer
        return cls(memory) if memory is not None and everywhere else None

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over all processes, the same bits on each, in place of `tensor`. Contiguous, any shape.

        Each adds up its share of a piece, own numbers first, then those of the others by rank.
        """
        for part, places in self._pieces(tensor.view(-1)):
            bounds = [len(part) * rank // self.world for rank in range(self.world + 1)]
            shares = [slice(*pair) for pair in pairwise(bounds)]
            others = [rank for rank in range(self.world) if rank != self.rank]
            own = shares[self.rank]
            for rank in others:
                places[self.rank, shares[rank]] = part[shares[rank]]
            dist.barrier()
            for rank in others:
                part[own].add_(places[rank, own])
            places[self.rank, own] = part[own]
            dist.barrier()
            for rank in others:
                part[shares[rank]] = places[rank, shares[rank]]

    def all_gather(self, out: Tensor, own: Tensor) -> None:
        """All processes' `own`, one behind the other by rank, into `out`. Contiguous, any shape; `own` may be this rank's part of it."""
        rows, start = out.view(self.world, -1), 0
        for part, places in self._pieces(own.view(-1)):
            places[self.rank] = part
            dist.barrier()
            rows[:, start : start + len(part)] = places
            start += len(part)

    def _pieces(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of a flat tensor, each with memory for as many numbers of each process: [n] and [world, n]."""
        most = PIECE // flat.element_size()
        for part in flat.split(most):
            half, self._half = self._half, 1 - self._half
            offset = half * self.world * PIECE
            places = torch.frombuffer(self._memory, dtype=flat.dtype, count=self.world * most, offset=offset)
            yield part, places.view(self.world, most)[:, : len(part)]


def _create(size: int) -> Path | None:
    path = FOLDER / f"qalign-{secrets.token_hex(16)}"
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Later would be too late: a process that writes into memory that is not there dies.
            os.posix_fallocate(handle, 0, size)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(handle)
    except OSError as error:
        need = f"{size / 2**20:.0f} MiB"
        logger.warning("%s: %s; workers of one machine talk through sockets, with %s there faster", FOLDER, error, need)
        return None
    return path


def _map(path: Path, size: int) -> mmap.mmap | None:
    try:
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), size)
    except OSError:  # on another machine there is no such file
        return None
