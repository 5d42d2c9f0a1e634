"""The same training with two workers, one and two again: what elastic training rests on, without Ray."""

from __future__ import annotations

from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.lease import Lease
from pipeline.loop import train_worker
from pipeline.progress import METRICS_FILE, read_metrics
from tests.test_loop import job_of

STEPS, PART = 12, 4


def work(rank: int, world: int, meeting: Path, plain: dict[str, Any], until: int) -> None:
    """One rank, until step `until`."""
    store = dist.FileStore(str(meeting), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.set_num_threads(1)
    run = Path(plain["run"])
    train_worker(plain, stop=lambda: read_metrics(run / METRICS_FILE)[-1]["step"] >= until)
    dist.destroy_process_group()


def losses(make_config, folder: Path, name: str, counts: list[int], *overrides: str) -> list[float]:
    """Of `STEPS` steps, which workers of these counts share evenly; each group goes on from the checkpoint of the one before."""
    config = make_config(*overrides, "scaling.workers=[1,2]", f"checkpoint.every={PART}", f"train.max_steps={STEPS}")
    job = job_of(config, name)
    for i, world in enumerate(counts):
        until = STEPS * (i + 1) // len(counts)
        with Lease(job.run):
            told = (world, folder / f"{name}-{i}", job.plain(), until)
            mp.start_processes(work, told, nprocs=world, start_method="forkserver")
    lines = read_metrics(job.run / METRICS_FILE)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


DROPOUT = "model.lora={r: 8, dropout: 0.2}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "stage", "more"),
    [
        ("float32", 1, "optimizer.lr=2e-4"),
        ("float32", 1, DROPOUT),
        *(("bfloat16", stage, "optimizer.lr=2e-4") for stage in (1, 2, 3)),
    ],
)
def test_a_resize_leaves_no_trace_in_the_loss(make_config, tmp_path: Path, dtype: str, stage: int, more: str) -> None:
    forkserver.set_forkserver_preload(["deepspeed", "transformers.models.llama.modeling_llama"])
    given = (f"model.dtype={dtype}", f"scaling.zero_stage={stage}", "train.epochs=10", more)
    fixed = losses(make_config, tmp_path, "fixed", [2], *given)
    resized = losses(make_config, tmp_path, "resized", [2, 1, 2], *given)
    assert fixed[-1] < 0.9 * fixed[0]
    assert resized[:PART] == fixed[:PART]
    assert resized == pytest.approx(fixed, abs=1e-6)
