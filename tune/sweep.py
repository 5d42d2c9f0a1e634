"""`python -m tune.sweep CONFIG`: many runs of one configuration. The same command again continues a killed sweep.

    config.sweep ─spaces─▶ points ─search─▶ trials ─plan─▶ runs ─tuning─▶ warm workers ─record─▶ table, MLflow ─results─▶ best

Each trial is the configuration with overrides, in a run folder of its own, trained by the `train_worker` of `jobs.train`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, Leaving

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.config import RunConfig
    from pipeline.tracking import Tracker
    from tune.plan import Sweep
    from tune.record import Recorder
    from tune.table import Trial

HELP = (
    "Sweep any keys of a configuration (section `sweep`): grid, random or Optuna; trials that are behind are stopped early "
    "(scheduler asha). Run it again to continue a killed sweep."
)


@dataclass(frozen=True, slots=True)
class Finished:
    """A sweep that came to its end, and its best model."""

    sweep: Sweep
    tracker: Tracker
    best: Trial | None  # None: no trial finished
    export: Path | None


def run(config: RunConfig, options: argparse.Namespace) -> None:
    """Run the sweep to its end and say where everything is. Raises ConfigError."""
    from tune.live import print_final

    done = conduct(config, options.local)
    settings = done.sweep.settings
    print_final(done.sweep.table.ranked(settings.metric, settings.maximise), settings.metric, config.name)
    print(_describe(done))


def conduct(config: RunConfig, local: bool) -> Finished:
    """All trials, their evaluation where asked for, and the best model. Raises ConfigError."""
    settings = config.sweep
    if settings is None:
        raise ConfigError(
            "sweep: missing; add a section sweep with a space, e.g. sweep={space: {objective.beta: default}}"
        )
    if local and settings.scheduler != "fifo":
        raise ConfigError("sweep.scheduler: --local runs one trial after the other; set it to fifo")
    if config.scaling.elastic:
        raise ConfigError("scaling.workers: a sweep's trials share workers that stay; give one number")
    from pipeline.lease import Lease
    from tune.plan import Sweep

    sweep = Sweep(config, local)
    with Lease(sweep.folder):  # nobody else tells MLflow of this sweep, either
        return _conduct(sweep, local)


def _conduct(sweep: Sweep, local: bool) -> Finished:
    from pipeline import tracking
    from tune import results
    from tune.live import Screen
    from tune.record import Recorder

    config, settings = sweep.config, sweep.settings
    parent = tracking.start(config, sweep.folder, sweep.identity)
    known = len(sweep.table.done())
    if known:
        print(f"{known} trials are done already; going on in {sweep.folder}", file=sys.stderr)
    status: tracking.Status = "FAILED"
    try:
        parent.log_config(config.dump())
        with (
            Screen(settings.metric, settings.maximise, sweep.folder.name) as screen,
            Recorder(sweep, parent, screen.show) as recorder,
        ):
            (_in_process if local else _on_ray)(sweep, recorder)
        if settings.evaluate:  # has bars of its own
            results.evaluate(sweep, local)
        best, exported = results.conclude(sweep, parent)
        status = "FINISHED"
    except (KeyboardInterrupt, Leaving):
        status = "KILLED"
        raise
    finally:
        parent.finish(status)
    return Finished(sweep, parent, best, exported)


def _describe(done: Finished) -> str:
    """Where everything is, and what to do next."""
    from tune.overhead import describe

    lines, best = [f"sweep              {done.sweep.folder}"], done.best
    if done.tracker.location:
        lines.append(f"mlflow             {done.tracker.location}")
    if overhead := describe([trial.spent for trial in done.sweep.table.trials.values()]):
        lines.append(f"overhead           {overhead}")
    if best is None:
        return "\n".join([*lines, "best               none: no trial finished"])
    chosen = " ".join(f"{key}={value}" for key, value in best.overrides.items())
    lines += [f"best               trial {best.name}: {chosen}", f"model              {done.export}"]
    return "\n".join([*lines, f"next               qalign eval CONFIG.yaml checkpoint_from={best.run}"])


def _on_ray(sweep: Sweep, recorder: Recorder) -> None:
    from tune import tuning

    tuning.run(sweep, recorder)


def _in_process(sweep: Sweep, recorder: Recorder) -> None:
    """One trial after the other, in this process."""
    from pipeline.lease import Superseded
    from pipeline.redaction import redact
    from tune.group import attempt
    from tune.plan import JOB_FILE, read_job

    for trial in sweep.todo():
        if recorder.problem is not None:
            return
        try:
            recorder.expect(trial)
        except Superseded:
            continue  # recorded as failed
        recorder.started(trial.number)
        try:
            outcome = attempt(read_job(sweep.trial_folder(trial) / JOB_FILE)["plain"])
        except Leaving:
            raise
        except Exception as error:
            recorder.ended(
                trial.number, "failed", f"{type(error).__name__}: {redact(' '.join(str(error).split()))[:500]}"
            )
        else:
            recorder.ended(trial.number, outcome.state, outcome.reason)


if __name__ == "__main__":
    from jobs.cli import run_job
    from tune import sweep as job

    sys.exit(run_job(job))
