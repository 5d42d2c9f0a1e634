"""A group of training workers that stays warm: plain Ray actors that run `train_worker` again and again.

A Ray Train start costs 10 to 20 s where its processes are not forked (`pipeline.forks`), most of it imports. Here each trial
costs the loading of its model only: the processes live on, and join a new process group for each trial. A worker that died takes
the group with it; the next start makes a new one.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config import ScalingConfig
from pipeline.redaction import redact, unsealed
from pipeline.terminal import guard, leaving_without_secrets

STOP_FILE = "stop"
"""In a run's folder: its workers return after the step that they are in."""
TOGETHER_SECONDS = 60.0
"""Ranks end within this time of each other, or something is wrong."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training ended. `died`: a worker's process, or its Python, broke down; another start may help."""

    state: Literal["finished", "diverged", "failed", "died"]
    reason: str = ""


def attempt(plain: dict[str, Any]) -> Outcome:
    """`train_worker` until the end, or until the stop file is there; what a person has to mend becomes an outcome.

    plain: what a trial's job file holds; its secrets are those of this process's environment.
    """
    from pipeline.errors import UserError
    from pipeline.loop import Diverged, train_worker

    try:
        train_worker(unsealed(plain), (Path(plain["run"]) / STOP_FILE).exists)
    except Diverged as error:
        return Outcome("diverged", redact(str(error)))
    except UserError as error:
        return Outcome("failed", redact(str(error)))
    return Outcome("finished")


class TrialWorker:
    """One rank, in a process of its own."""

    def warm_up(self) -> None:
        """Pay for the imports before there is something to do."""
        guard()
        import transformers  # noqa: F401

        import pipeline.loop  # noqa: F401
        from pipeline.zero import import_deepspeed

        import_deepspeed()

    def address(self) -> str:
        """host:port at which the other ranks can meet this one."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def train(self, plain: dict[str, Any], rank: int, world: int, address: str) -> Outcome:
        """Join the group that meets at `address`, train, leave it."""
        import torch.distributed as dist

        backend = "nccl" if plain["config"]["scaling"]["gpus_per_worker"] else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=world)
        try:
            with leaving_without_secrets():
                return attempt(plain)
        finally:
            dist.destroy_process_group()


class Group:
    """All ranks, in the bundles of the placement group that this actor (or driver) is in.

    Args:
        scaling: how many workers, and what each one gets.
    """

    def __init__(self, scaling: ScalingConfig) -> None:
        self._scaling = scaling
        self._workers: list[Any] = []
        self._training: list[Any] = []
        self._first_end: float | None = None

    def start(self, plain: dict[str, Any]) -> None:
        """Begin to train; returns at once."""
        if not self._workers:
            self._workers = self._make()
        address = self._workers[0].address.remote()
        world = len(self._workers)
        self._first_end = None
        self._training = [w.train.remote(plain, rank, world, address) for rank, w in enumerate(self._workers)]

    def outcome(self, timeout: float) -> Outcome | None:
        """How it ended; None: it goes on. After a breakdown the group is closed."""
        import ray

        ended, running = ray.wait(self._training, num_returns=len(self._training), timeout=timeout)
        outcomes = [_outcome(reference) for reference in ended]
        died = next((outcome for outcome in outcomes if outcome.state == "died"), None)
        if died is None and running:
            if ended and self._first_end is None:
                self._first_end = time.monotonic()
            if self._first_end is None or time.monotonic() - self._first_end < TOGETHER_SECONDS:
                return None
            died = Outcome("died", f"{len(running)} workers did not end with the others ({outcomes[0].reason})")
        if died is not None:
            self.close()
            return died
        self._training = []
        return outcomes[0]

    @property
    def busy(self) -> bool:
        return bool(self._training)

    def close(self) -> None:
        """End the processes. A later `start` makes new ones."""
        import ray

        for worker in self._workers:
            ray.kill(worker)
        self._workers, self._training = [], []

    def _make(self) -> list[Any]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        placement = ray.util.get_current_placement_group()
        options: dict[str, Any] = {"num_cpus": self._scaling.cpus_per_worker, "num_gpus": self._scaling.gpus_per_worker}
        workers = []
        for i in range(self._scaling.most_workers):
            if placement is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(placement, i)
            workers.append(ray.remote(TrialWorker).options(**options).remote())
            workers[-1].warm_up.remote()  # all of them at once, while the first waits for nobody
        return workers


def _outcome(reference: Any) -> Outcome:
    """What a rank returned, or what broke it."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        return Outcome("died", _one_line(f"{type(cause).__name__}: {cause}"))
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        return Outcome("died", _one_line(f"a worker died: {error}"))


def _one_line(text: str) -> str:
    return redact(" ".join(text.split()))[:500]
