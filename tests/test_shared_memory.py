"""Sums and gathers through memory: what torch.distributed gives, on every rank, and nothing left behind."""

from __future__ import annotations

from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import shared_memory
from pipeline.shared_memory import SharedMemory

WORLD = 3
SIZES = (1, 2, 7, 300, 1001)
"""Numbers in a tensor: fewer than ranks, no multiple of them, and several pieces."""


def drawn(size: int, dtype: torch.dtype, rank: int) -> torch.Tensor:
    """Of one rank; sums of such numbers are exact in any order."""
    generator = torch.Generator().manual_seed(100 * size + rank)
    return torch.randint(-8, 8, (size,), generator=generator).to(dtype)


def exchange(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), WORLD), rank=rank, world_size=WORLD)
    shared_memory.PIECE = 400
    made: list[Path] = []
    create = shared_memory._create
    shared_memory._create = lambda size: made.append(create(size)) or made[-1]  # type: ignore[func-returns-value]
    memory = SharedMemory.open()
    assert memory is not None
    assert len(made) == (rank == 0)
    assert not any(path.exists() for path in made), "its file is gone as soon as all have it"
    for _ in range(3):
        for size in SIZES:
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                parts = [drawn(size, dtype, other) for other in range(WORLD)]
                total = parts[rank].clone()
                memory.all_reduce(total)
                assert torch.equal(total, sum(parts))
                out = torch.full((WORLD * size,), -99.0, dtype=dtype)
                own = out[rank * size : (rank + 1) * size]  # as DeepSpeed calls it
                own.copy_(parts[rank])
                memory.all_gather(out, own)
                assert torch.equal(out, torch.cat(parts))
    third = torch.full((1001,), 1 / 3) * (rank + 1)
    memory.all_reduce(third)
    everyones = [torch.empty_like(third) for _ in range(WORLD)]
    dist.all_gather(everyones, third)
    assert all(torch.equal(one, third) for one in everyones), "the same bits on each rank"
    if rank == 1:
        shared_memory._map = lambda path, size: None  # as on another machine
    assert SharedMemory.open() is None
    assert len(made) == 2 * (rank == 0)
    assert not any(path.exists() for path in made)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_get_the_sums_and_parts_that_sockets_would_bring(tmp_path: Path) -> None:
    forkserver.set_forkserver_preload(["torch.distributed"])
    mp.start_processes(exchange, (tmp_path,), nprocs=WORLD, start_method="forkserver")


@pytest.mark.parametrize("full", [True, False])
def test_without_room_for_it_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path if full else tmp_path / "missing")

    def no_room(*_: int) -> None:
        raise OSError(28, "No space left on device")

    assert not full or shared_memory._create(100).stat().st_size == 100
    for path in tmp_path.iterdir():
        path.unlink()
    monkeypatch.setattr(shared_memory.os, "posix_fallocate", no_room)
    assert shared_memory._create(100) is None
    assert not list(tmp_path.iterdir())
