"""Sweeps on Ray for real: warm workers, early stops, a killed worker, a killed driver."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipeline.progress import METRICS_FILE, read_metrics
from tune import sweep
from tune.table import Table

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ON_RAY = argparse.Namespace(local=False)
COMMON = ("data.eval_fraction=0.25", "sweep.metric=eval/loss", "optimizer.clip=null", "checkpoint.every=20")


def table_in(storage: str | Path) -> Table:
    (folder,) = (Path(storage) / "sweeps").iterdir()
    return Table(folder)


def steps_of(table: Table, number: int) -> list[int]:
    return [line["step"] for line in read_metrics(Path(table.trials[number].run) / METRICS_FILE)]


def workers_of(family: psutil.Process) -> list[psutil.Process]:
    """Processes of our training workers."""
    found = []
    for process in family.children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "TrialWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def free_cpus_again(wanted: float) -> bool:
    import ray

    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return ray.available_resources().get("CPU", 0) == wanted


def test_two_workers_stay_warm_for_five_trials_and_early_stops_free_them(make_config, ray_cluster) -> None:
    rates = "sweep.space.optimizer.lr=[1e-3,1e30,1e-7,2e-3,1e-6]"
    length = ("train.epochs=50", "train.eval_every=10")  # 150 steps
    config = make_config(rates, "sweep.scheduler=asha", "scaling.workers=2", *length, *COMMON)
    seen: set[int] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            seen.update(process.pid for process in workers_of(psutil.Process()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    sweep.run(config, ON_RAY)
    over.set()
    watcher.join()
    table = table_in(config.storage)
    assert [t.state for t in table.trials.values()] == ["finished", "diverged", "stopped", "finished", "stopped"]
    assert len(seen) == 2, "one group of two processes trained all trials"
    assert steps_of(table, 1) == list(range(1, 151))
    for stopped in (3, 5):
        assert 10 <= len(steps_of(table, stopped)) < 100, "it went on after the stop"
    assert free_cpus_again(2.0)


@pytest.mark.parametrize("allowed", [1, 0])
def test_a_killed_worker_costs_one_attempt_and_no_other_trial(make_config, ray_cluster, allowed: int) -> None:
    length = ("train.epochs=60", f"sweep.max_failures={allowed}", "sweep.max_concurrent_trials=1")
    config = make_config("sweep.space.optimizer.lr=[1e-3,2e-3]", *length, *COMMON)

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not list((Path(config.storage) / "runs").glob("*/checkpoints/step-*")):
            assert time.monotonic() < deadline, "training did not start"
            time.sleep(0.02)
        os.kill(workers_of(psutil.Process())[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    sweep.run(config, ON_RAY)
    killer.join()
    first, second = table_in(config.storage).trials.values()
    assert second.state == "finished"
    attempts = int(Path(first.run, "attempt").read_text())
    if allowed:
        assert (first.state, attempts) == ("finished", 2)
        assert steps_of(table_in(config.storage), 1) == list(range(1, 181))
    else:
        assert (first.state, attempts) == ("failed", 1)
        assert "a worker died" in first.reason
    assert free_cpus_again(2.0)


def test_a_killed_sweep_goes_on_with_the_same_command_and_repeats_nothing(make_config, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    overrides = ["sweep.space.optimizer.lr=[1e-3,2e-3,3e-3]", "train.epochs=60", "sweep.max_concurrent_trials=1"]
    overrides += [*COMMON, "tracking.enabled=true", f"storage={tmp_path / 'shared'}"]
    make_config()
    command = [sys.executable, "-m", "tune.sweep", str(tmp_path / "config.yaml"), *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2])

    driver = start()
    deadline = time.monotonic() + 240
    while True:  # until the second trial has a checkpoint
        assert driver.poll() is None and time.monotonic() < deadline
        if (tmp_path / "shared" / "sweeps").is_dir() and 2 in (table := table_in(tmp_path / "shared")).trials:
            run = Path(table.trials[2].run)
            if list(run.glob("checkpoints/step-*")):
                break
        time.sleep(0.02)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    for process in family:
        if process.is_running():
            process.kill()
    table = table_in(tmp_path / "shared")
    assert [t.state for t in table.trials.values()] == ["finished", "running"]
    first = Path(table.trials[1].run)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}

    assert start().wait(timeout=240) == 0
    table = table_in(tmp_path / "shared")
    assert [t.state for t in table.trials.values()] == ["finished"] * 3
    changed = {
        p.relative_to(first).parts[0] for p, at in before.items() if not p.exists() or p.stat().st_mtime_ns != at
    }
    assert not changed, "the finished trial was touched"
    attempts = [int(Path(t.run, "attempt").read_text()) for t in table.trials.values()]
    assert attempts == [1, 2, 1]
    assert steps_of(table, 2) == list(range(1, 181))

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'shared' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("qalign").experiment_id])
    assert len(runs) == 4, "a parent, and one child per trial"
    assert {run.info.status for run in runs} == {"FINISHED"}
    state = json.loads((table.folder / "trials" / "002" / "tracking.json").read_text())
    history = client.get_metric_history(state["run_id"], "loss")
    assert [metric.step for metric in history] == list(range(1, 181))
