"""The process group of a worker: Ray Train's where there is one, else a group of this process alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import ConfigError, RunConfig
from pipeline.heap import keep_freed_memory


@contextmanager
def process_group(config: RunConfig) -> Iterator[torch.device]:
    """Yields this worker's device. A group that this call made is taken down again: the worker is re-entrant."""
    device = _device(config)
    torch.set_num_threads(threads(config))
    if device.type == "cpu":
        keep_freed_memory()
    with _without_denormals(), nullcontext() if dist.is_initialized() else _group_of_one(device):
        yield device


@contextmanager
def _without_denormals() -> Iterator[None]:
    """Probabilities and moments fade out below 1e-38, where processors take many times as long for a number: there they are 0."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def _group_of_one(device: torch.device) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(os.path.join(folder, "store"), 1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def threads(config: RunConfig) -> int:
    """CPU threads of one worker: its share under Ray, when it runs alone the whole machine (or OMP_NUM_THREADS)."""
    if dist.is_initialized():
        return max(1, int(config.scaling.cpus_per_worker))
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def _device(config: RunConfig) -> torch.device:
    if not config.scaling.gpus_per_worker or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    if config.model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("model.dtype: the workers' GPUs have no bfloat16; set model.dtype=float32")
    return device


def agree(value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def greatest(value: int, device: torch.device) -> int:
    """The greatest of all ranks' values, on all ranks."""
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
