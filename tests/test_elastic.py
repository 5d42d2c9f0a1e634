"""Nodes that come and go under a training: the same steps, the same losses, nothing lost that was saved."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import elastic
from benchmarks.nodes import LocalCluster
from pipeline import checkpoint
from pipeline.run_log import path_of, read_events

pytestmark = pytest.mark.ray

# Evaluation after each step makes steps of a tenth of a second.
SLOW_STEPS = ("data.eval_fraction=0.5", "train.eval_every=1", "optimizer.lr=1e-4", "checkpoint.every=10")


def test_failures_count_while_there_is_no_new_checkpoint(tmp_path: Path) -> None:
    from ray.exceptions import RayActorError
    from ray.train import PreemptionError, PreemptionInfo
    from ray.train.v2._internal.execution.controller.state import RestartingState, RunningState
    from ray.train.v2.api.exceptions import WorkerGroupError

    from pipeline.elastic import GaveUp, Hooks

    def fail(hooks: Hooks, error: Exception) -> None:
        state = RestartingState(training_failed_error=error)
        hooks._looked = time.monotonic()  # there is no cluster to look at
        hooks.after_controller_state_update(RunningState(), state)
        hooks.after_controller_state_update(state, state)  # it waits for room: the same failure

    def saved(step: int) -> None:
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)

    died = WorkerGroupError("rank 1 died", {1: RayActorError()})
    hooks = Hooks(tmp_path, max_failures=2)
    for step in (10, 20, 30):
        saved(step)
        fail(hooks, died)
        fail(hooks, died)
    fail(hooks, PreemptionError(PreemptionInfo(None, {"node": [1]}), drain_timed_out=True))
    with pytest.raises(GaveUp, match="workers failed 3 times without a new checkpoint; the last time: rank 1 died"):
        fail(hooks, died)
    never = Hooks(tmp_path, max_failures=-1)
    for _ in range(100):
        fail(never, died)


@pytest.mark.slow
def test_two_workers_one_and_two_again_train_as_one_process_does(make_config, tmp_path: Path) -> None:
    make_config()
    found = elastic.drill(tmp_path / "config.yaml", [*SLOW_STEPS, "scaling.zero_stage=2"])
    assert found.difference < 1e-4, "float32"
    starts = [event for event in found.starts if event["event"] == "start"]
    assert [start["workers"] for start in starts] == [2, 1, 2]
    assert [start["attempt"] for start in starts] == [1, 2, 3]
    assert re.search(r"^2 → 1 workers, continuing at step \d+$", found.told, re.MULTILINE)
    assert re.search(r"^1 → 2 workers, continuing at step \d+$", found.told, re.MULTILINE)
    at = found.starts.index(starts[2])
    before = found.starts[at - 1]
    assert before["event"] == "checkpoint"
    assert before["step"] == starts[2]["step"], "saved for the resize: no step was trained again"
    assert found.shrink < 180, "a busy machine, but no minute-long time-outs one after the other"
    assert found.grow < 180


@pytest.mark.slow
def test_a_node_that_is_reclaimed_is_saved_within_its_grace(make_config, tmp_path: Path) -> None:
    """SIGTERM to a node, as Kubernetes sends it to a pod: Ray drains it, the workers save, training goes on elsewhere."""
    make_config()
    storage = tmp_path / "outputs"
    overrides = [*SLOW_STEPS, "checkpoint.every=100000", "checkpoint.best=null"]
    overrides += ["train.epochs=100000", "scaling.workers=[1,2]"]
    with LocalCluster() as cluster:
        cluster.add_node()
        reclaimed = cluster.add_node(RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="15")
        command = [sys.executable, "-m", "jobs.train", str(tmp_path / "config.yaml"), *overrides]
        log = tmp_path / "driver.log"
        with log.open("w") as output:
            driver = subprocess.Popen(command, env=cluster.environment, stdout=output, stderr=output)
        try:
            follow = elastic.Follow(storage, driver, log)
            follow.until(lambda: follow.workers == 2 and follow.step >= 3)
            assert checkpoint.saved(follow.run) == []
            reclaimed.reclaim()
            told = time.monotonic()
            follow.until(lambda: len(checkpoint.saved(follow.run)) > 0)
            assert time.monotonic() - told < 12, "within the grace"
            follow.until(lambda: follow.workers == 1)
            follow.until(lambda step=follow.step: follow.step > step)
        finally:
            driver.kill()
            driver.wait()
        events = list(read_events(path_of(follow.run, 0)))
        (again,) = [event for event in events if event["event"] == "start" and event["workers"] == 1]
        saved = [event["step"] for event in events if event["event"] == "checkpoint" and event["attempt"] == 1]
        assert again["step"] == saved[-1] > 0
        assert re.search(r"the node of rank \d goes in \d+ s; saving now", log.read_text())
