"""After the last trial: evaluation where asked for, the best model, summary, report; told to MLflow."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.config import ConfigError, RunConfig
from pipeline.export import EXPORT, export
from pipeline.report import Point, write_sweep_report
from pipeline.report import Trial as Shown
from pipeline.tracking import Tracker
from tune.plan import Sweep
from tune.table import Trial, short

PAGE = "sweep.html"
REWARD, KL = "samples/reward", "samples/kl"


def evaluate(sweep: Sweep, local: bool) -> None:
    """`jobs.eval` with samples on each finished trial that has not been evaluated yet; kept in the table."""
    from jobs.eval import evaluate as measure

    waiting = [t for t in sweep.table.trials.values() if t.state == "finished" and not t.evaluation]
    for place, trial in enumerate(sorted(waiting, key=lambda t: t.number), 1):
        print(f"evaluating trial {trial.name} [{trial.label}], {place} of {len(waiting)}", file=sys.stderr, flush=True)
        config = sweep.config_of(trial)
        silent = config.tracking.model_copy(update={"enabled": False})
        found = measure(config.model_copy(update={"tracking": silent, "checkpoint_from": trial.run}), local, True)
        sweep.table.change(trial.number, evaluation={name: float(value) for name, value in found.items()})


def conclude(sweep: Sweep, parent: Tracker) -> tuple[Trial | None, Path | None]:
    """Summary and plots on disk and in MLflow, the best model exported → (best trial, its export)."""
    settings, table = sweep.settings, sweep.table
    ranked = table.ranked(settings.metric, settings.maximise)
    parent.log_artifact(table.write_summary(settings.metric, settings.maximise))
    parent.log_dict({"metric": settings.metric, "trials": [asdict(t) for t in ranked]}, "summary.json")
    parent.log_artifact(write_page(sweep, ranked))
    counts = {f"trials/{s}": sum(t.state == s for t in ranked) for s in ("finished", "stopped", "diverged", "failed")}
    parent.log_summary(counts)
    first = table.best(settings.metric, settings.maximise)
    if first is None:
        sweep.check_reported(sweep.table.trials.values())
        return None, None
    exported = _export(sweep, first)
    parent.log_summary(
        {
            f"best/{settings.metric}": first.metrics[settings.metric],
            "best.trial": first.name,
            "best.settings": json.dumps(first.overrides),
            "best.run": first.run,
        }
    )
    parent.log_model_reference(exported, sweep.config.tracking.copy_model, settings.register_as)
    return first, exported


def write_page(sweep: Sweep, trials: Sequence[Trial]) -> Path:
    """The sweep in pictures, in its folder: the metric by each parameter, reward against KL where both were measured."""
    settings = sweep.settings
    shown = [_shown(sweep, trial) for trial in trials]
    title = f"{sweep.config.name}: {len(trials)} trials"
    mode = "max" if settings.maximise else "min"
    return write_sweep_report(title, shown, sweep.folder / PAGE, settings.metric, mode)


def _shown(sweep: Sweep, trial: Trial) -> Shown:
    found, parameters = trial.evaluation, {key: _scalar(value) for key, value in trial.overrides.items()}
    objective, label = sweep.config.objective_name, ""
    if trial.run:
        objective, label = series_of(sweep.config_of(trial), trial.overrides)
    points = ()
    if found.keys() >= {REWARD, KL}:
        errors = {"kl_error": found.get(f"{KL}_se"), "reward_error": found.get(f"{REWARD}_se")}
        points = (Point(kl=found[KL], reward=found[REWARD], label=label, **errors),)
    return Shown(
        label=f"{trial.name} {trial.label}".strip(),
        objective=objective,
        parameters=parameters,
        metrics=trial.metrics | found,
        status=trial.state,
        reason=trial.reason,
        points=points,
    )


def series_of(config: RunConfig, overrides: Mapping[str, Any]) -> tuple[str, str]:
    """(series, label) of a trial on the frontier: the strength of its leash is the label, what else the objective was given by the
    sweep tells series apart. The strength is β, or for an objective without one the number that was swept."""
    swept: dict[str, Any] = {}
    for key, value in overrides.items():
        section, _, field = key.partition(".")
        if section == "objective":
            swept |= {field: value} if field else dict(value)
    swept.pop("name", None)
    numbers = [
        field for field, value in swept.items() if isinstance(value, float | int) and not isinstance(value, bool)
    ]
    strength = "beta" if hasattr(config.objective, "beta") else next(iter(numbers), None)
    kinds = {field: value for field, value in swept.items() if field != strength}
    words = [value if isinstance(value, str) else f"{field} {short(value)}" for field, value in kinds.items()]
    label = "" if strength is None else short(getattr(config.objective, strength))
    return ", ".join([config.objective_name, *words]), label


def _scalar(value: Any) -> float | int | str | bool | None:
    return value if value is None or isinstance(value, float | int | str | bool) else short(value)


def _export(sweep: Sweep, trial: Trial) -> Path:
    """The finished trial as a model that transformers loads, where `jobs.train` would put it."""
    run, config = Path(trial.run), sweep.config_of(trial)
    if not (run / EXPORT).is_dir():
        newest = checkpoint.latest(run)
        if newest is None:
            raise ConfigError(
                f"{run}: the best trial's checkpoints are gone; delete {sweep.folder} to run the sweep again"
            )
        prepared = sweep.prepared_for(config)
        export(config, newest, prepared.model, run / EXPORT, prepared.rows)
    return run / EXPORT
