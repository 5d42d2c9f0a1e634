"""Ray Train where it is told more than its public interface says: the only file that uses what lies behind it (Ray 2.60).

    Hooks             in Ray Train's controller: workers hear SIGTERM and save before a resize, room for workers is looked up anew,
                      failures without progress are counted
    draining          in a worker: whether Ray is about to take one of the group's nodes away

Without the hooks training would be as right, only slower: a resize would repeat the steps since the last checkpoint, and a group
that lost a node would wait for it for a minute before it starts without.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

import ray
import ray.train
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.exceptions import GetTimeoutError, RayError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, ResizingState, RestartingState
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure

from pipeline import checkpoint, notice

if TYPE_CHECKING:
    from pathlib import Path

    from ray.train.v2._internal.execution.controller import TrainControllerState
    from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext
    from ray.train.v2.api.exceptions import TrainingFailedError

    from pipeline.config import ScalingConfig

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    # Elastic training asks for as many workers as there is room for. If they do not come at once a node has just gone, which Ray
    # will have noticed by then: ask again. (A group of fixed size waits for nodes that an autoscaler is starting.)
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
}
SAVE_SECONDS = 600.0
"""A step and a checkpoint have this long to end before a resize; as long as Ray lets a worker hang."""
LOOK_SECONDS = 1.0


def set_environment(scaling: ScalingConfig) -> None:
    """What Ray Train's controller and workers inherit from this process; what a user has set stays."""
    for key, value in ENVIRONMENT.items() if scaling.elastic else ():
        os.environ.setdefault(key, value)


def start_coordinator() -> None:
    """Have the actor started that Ray Train will ask for room, while there is other work to do."""
    get_or_create_autoscaling_coordinator()


class GaveUp(Exception):
    """Starting the workers again and again does not help."""


class Hooks(ControllerCallback, WorkerGroupCallback):
    """Called by Ray Train's controller, in its process.

    Args:
        run: the run's folder.
        max_failures: so many failures in a row, without a new checkpoint between them, are borne; −1: any number.
    """

    def __init__(self, run: Path, max_failures: int) -> None:
        self._run, self._max_failures = run, max_failures
        self._group: WorkerGroup | None = None
        self._looked = 0.0
        self._failures, self._step = 0, -1

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self._group = worker_group
        worker_group.execute(_listen)

    def before_worker_group_shutdown(self, worker_group: WorkerGroup) -> None:
        self._group = None

    def after_worker_group_abort(self, worker_group_context: WorkerGroupContext) -> None:
        self._group = None

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        if isinstance(current_state, ResizingState):
            self._save()
        elif isinstance(current_state, RestartingState) and current_state is not previous_state:
            self._count(current_state.training_failed_error)
        if isinstance(current_state, RestartingState | ReschedulingState):
            self._look_for_room()

    def _save(self) -> None:
        """A healthy group is about to be replaced."""
        if self._group is None:
            return
        answers = self._group.execute_async(notice.save_before_resize, SAVE_SECONDS)
        try:
            saved = all(ray.get(answers, timeout=SAVE_SECONDS + 10))
        except RayError as error:  # a worker is gone: the new group starts from the checkpoint before
            logger.warning("no checkpoint before the resize: %s", " ".join(str(error).split())[:300])
        else:
            if not saved:
                logger.warning("no checkpoint before the resize: the step did not end within %.0f s", SAVE_SECONDS)

    def _count(self, error: TrainingFailedError) -> None:
        """Raises GaveUp. Ray Train counts all failures of a run; one of weeks on machines that come and go has many."""
        if _is_preemption_failure(error):
            return
        step = max((int(folder.name[5:]) for folder in checkpoint.saved(self._run)), default=0)
        self._failures = 1 if step > self._step else self._failures + 1
        self._step = step
        if 0 <= self._max_failures < self._failures:
            reason = str(error).strip().splitlines()[-1]
            raise GaveUp(f"workers failed {self._failures} times without a new checkpoint; the last time: {reason}")

    def _look_for_room(self) -> None:
        """Ray Train decides from a list of nodes that may be 20 s old: have it made anew."""
        if time.monotonic() < self._looked + LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        coordinator = get_or_create_autoscaling_coordinator()
        try:
            ray.get(coordinator.get_reserved_resources.remote("qalign", recompute=True), timeout=10)
        except (RayError, GetTimeoutError) as error:
            logger.warning("Ray's list of nodes could not be renewed: %s", " ".join(str(error).split())[:300])


def _listen() -> None:
    notice.listen()


def draining() -> str | None:
    """What Ray says of the nodes of this group that are about to go, or None. Collective: all ranks have to call it."""
    info = ray.train.get_preemption_info()
    if info is None:
        return None
    ranks = ", ".join(map(str, info.preempted_ranks))
    left = "soon" if info.deadline_ms is None else f"in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
    return f"the node of rank {ranks} goes {left}"
