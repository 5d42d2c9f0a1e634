"""qalign itself: `Learner` and `train_step`, called as the worker's loop calls them.

A step is: deal the rows out into micro-batches, collate, forward, backward, clip, update, reduce the metrics.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.throughput.pace import Pace
from benchmarks.throughput.tasks import Task, digests
from benchmarks.throughput.workloads import OPTIMIZER, Group
from pipeline.collate import collate
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.contracts import Batch, Row
from pipeline.distributed import process_group
from pipeline.learner import Learner
from pipeline.loop import train_step
from pipeline.order import costs_of, micro_batches
from pipeline.zero import unshared


class Ours:
    """One worker of the pipeline, with reference log-probs from the cache."""

    def __init__(self, task: Task) -> None:
        self._task, self._stack = task, ExitStack()
        self._config = run_config(task)
        if task.entry.pinned and not task.entry.apart:
            _join(task)
        device = self._stack.enter_context(process_group(self._config))
        torch.set_num_threads(task.threads)
        cached = json.loads(task.reference_logprobs.read_text())
        states = load_file(task.reference_states) if task.has_states else {}
        self._steps = [
            [
                as_row(i, group, logprobs, states.get(f"{step}/{i}"))
                for i, (group, logprobs) in enumerate(zip(groups, found, strict=True))
            ]
            for step, (groups, found) in enumerate(zip(task.groups(), cached[: task.steps], strict=True))
        ]
        config = self._config if task.entry.always_zero else unshared(self._config, dist.get_world_size())
        self._learner = Learner.start(config, task.policy, task.reference, device, None, cached=task.has_states)

    def logprobs(self) -> dict[int, list[float]]:
        """Of those of the first step's rows that this rank has."""
        found: dict[int, list[float]] = {}
        with self._learner.evaluating(), torch.no_grad():
            for batch in self._batches(self._steps[0]):
                sums = self._learner.evaluate(batch).logprobs.double().sum(-1)
                found |= dict(zip(batch.row_ids.tolist(), sums.tolist(), strict=True))
        return found

    def train(self, pace: Pace) -> None:
        """A step each time that `pace` asks for one."""
        for number, rows in enumerate(self._steps):
            if not pace.begin():
                break
            batches = self._batches(rows)
            metrics = train_step(self._learner, self._config.objective, batches, number, len(self._steps))
            pace.end(metrics["loss"], metrics["grad_norm"], lambda batches=batches: seen(batches))
        self._learner.close()
        self._stack.close()

    def _batches(self, rows: list[Row]) -> list[Batch]:
        tokens = np.array([row.tokens for row in rows])
        responses = np.array([sum(map(len, row.response_ids)) for row in rows])
        costs = costs_of(tokens, responses, self._learner.head_share)
        workers, budget = self._task.entry.workers, self._task.workload.token_budget
        dealt = micro_batches(range(len(rows)), tokens, workers, budget, self._learner.padded, costs)
        return [
            collate([replace(rows[i], weight=0.0 if micro.filler else 1.0) for i in micro.rows])
            for micro in dealt[self._task.rank]
        ]


def as_row(
    number: int, group: Group, ref_logprobs: list[list[float]] | None = None, ref_states: Tensor | None = None
) -> Row:
    """A row as `prepare` and the reference stage would have written it."""
    return Row(number, group.prompt, group.responses, ref_logprobs, ref_states)


def run_config(task: Task) -> RunConfig:
    """The configuration of a run on this workload; what it does not name has the pipeline's own defaults."""
    workload, entry = task.workload, task.entry
    return validate(
        {
            "storage": task.folder,
            "data": {"kind": workload.kind, "sources": [{"path": "rows.json"}]},
            "model": {
                "path": task.policy,
                "reference": task.reference,
                "dtype": entry.precision,
                "activation_checkpointing": entry.checkpointing,
            },
            "objective": workload.objective,
            "optimizer": OPTIMIZER | {"schedule": "constant", "warmup_steps": 0},
            "train": {
                "rows_per_step": workload.groups_per_step,
                "tokens_per_micro_batch": workload.token_budget,
            },
            "scaling": {"workers": entry.workers, "cpus_per_worker": task.threads},
            "tracking": {"enabled": False},
        }
    )


def seen(batches: list[Batch]) -> list[str]:
    """`tasks.digests` of what was in the batches' packed rows."""
    found = []
    for batch in batches:
        for ids, segment, responses in zip(batch.input_ids, batch.segment, batch.valid, strict=True):
            prompt = ids[segment == 0].tolist()
            found += [(prompt, ids[segment == k + 1].tolist()) for k in responses.nonzero().flatten().tolist()]
    return digests(found)


def _join(task: Task) -> None:
    """The process group of this entry's workers, as Ray Train would have made it."""
    store = dist.FileStore(str(Path(task.folder) / f"store-{task.entry_name}"), task.entry.workers)
    dist.init_process_group("gloo", store=store, rank=task.rank, world_size=task.entry.workers)
