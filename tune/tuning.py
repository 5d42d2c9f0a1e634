"""Trials on Ray Tune: which one starts where and when, and which is stopped early. Only this module and `trial` know Tune."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from pipeline.lease import Superseded
from pipeline.progress import METRICS_FILE, read_metrics
from pipeline.redaction import redact
from tune.plan import JOB_FILE, Sweep
from tune.record import Recorder
from tune.table import Trial
from tune.trial import TrialActor

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics are in the runs' own files
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has none
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is for the command line
    "RAY_AIR_NEW_OUTPUT": "0",  # its terminal output is not silenced by verbose=0
}
TUNE_FOLDER = "ray"


def run(sweep: Sweep, recorder: Recorder) -> None:
    """Run all trials of `sweep.todo()` to their ends."""
    os.environ.update(ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    scaling, settings = sweep.config.scaling, sweep.settings
    worker = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}
    # The trial's own actor only waits: it takes no share of the machine.
    resources = ray.tune.PlacementGroupFactory([{}, *[worker] * scaling.most_workers])
    searcher: Searcher = Proposals(sweep, recorder)
    if settings.max_concurrent_trials:
        searcher = ConcurrencyLimiter(searcher, settings.max_concurrent_trials)
    storage = sweep.folder / TUNE_FOLDER
    attempts = len(list(storage.iterdir())) if storage.is_dir() else 0
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(TrialActor, resources),
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler(sweep),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=ray.tune.RunConfig(
            name=f"attempt-{attempts + 1}",
            storage_path=str(storage),
            callbacks=[Events(recorder)],
            stop=Problem(recorder),
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),  # runs keep their own
            failure_config=ray.tune.FailureConfig(max_failures=settings.max_failures),
            verbose=0,
        ),
    )
    tuner.fit()


def _name(trial: Any) -> str:
    return f"trial-{_number(trial):03d}"


def _number(trial: Any) -> int:
    return int(Path(trial.config["job"]).parent.name)


class _NotKept:
    """Tune pickles what it is given, to restore itself from; a sweep goes on from its own table instead."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Proposals(_NotKept, Searcher):
    """The sweep's own trials, one at a time, as Tune asks for them."""

    def __init__(self, sweep: Sweep, recorder: Recorder) -> None:
        super().__init__()
        self._trials, self._sweep, self._recorder = sweep.todo(), sweep, recorder

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        for trial in self._trials:
            with suppress(Superseded):  # recorded as failed; the next one
                self._recorder.expect(trial)
                return {"job": str(self._sweep.trial_folder(trial) / JOB_FILE)}
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """The recorder tells the sweep."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see `_NotKept`."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from its own table")


class Problem(_NotKept, ray.tune.Stopper):
    """Ends all trials when the recorder found that the sweep makes no sense."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._recorder.problem is not None


class Events(_NotKept, ray.tune.Callback):
    """Tune's events → the recorder's."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._recorder.started(_number(trial))

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        if last.get("state", "running") == "running":
            self._recorder.ended(_number(trial), "stopped", f"behind the others at step {last.get('step', 0)}")
        else:
            self._recorder.ended(_number(trial), last["state"], last.get("reason", ""))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        error = " ".join(str(trial.get_pickled_error()).split())
        self._recorder.ended(_number(trial), "failed", f"its actor broke down: {redact(error)[-300:]}")


# ----------------------------------------------------------------------------------------------- early stopping


def scheduler(sweep: Sweep) -> TrialScheduler:
    """The scheduler that `config.sweep` names; ASHA is told of the trials that ended in an earlier call."""
    settings = sweep.settings
    if settings.scheduler == "fifo":
        return FIFOScheduler()
    steps = sweep.steps_of(sweep.space.configure(next(sweep.space.corners()))[0])
    total = steps.total_steps
    grace = settings.asha.grace or sweep.config.train.eval_every or steps.steps_per_epoch
    asha = ASHAScheduler(
        time_attr="step",
        metric=settings.metric,
        mode="max" if settings.maximise else "min",
        max_t=total,
        grace_period=min(grace, total),
        reduction_factor=settings.asha.reduction,
        stop_last_trials=False,  # they end by themselves
    )
    for trial in sweep.table.done():
        _replay(asha, trial, settings.metric)
    return asha


def _replay(asha: ASHAScheduler, trial: Trial, metric: str) -> None:
    stand_in = SimpleNamespace(trial_id=f"earlier-{trial.name}")
    asha.on_trial_add(None, stand_in)
    for line in read_metrics(Path(trial.run) / METRICS_FILE):
        if metric in line:
            asha.on_trial_result(None, stand_in, {"step": line["step"], metric: line[metric]})
