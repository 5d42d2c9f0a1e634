"""A sweep before and between its trials: identity, preparation, and from a point of the space to a trial.

Preparation happens here, in the driver, for every configuration that the space can reach, so that no trial waits for it and
trials share one prepared data set and one reference cache.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline import driver
from pipeline.config import ConfigError, RunConfig, digest
from pipeline.contracts import Needs
from pipeline.driver import Prepared
from pipeline.durable import read_json, write_json
from pipeline.model_files import fingerprint
from pipeline.order import Plan
from pipeline.redaction import urls_without_credentials
from pipeline.rows import Rows
from tune import search
from tune.spaces import Point, Space
from tune.table import SWEEP_FILE, Table, Trial

FOLDER, JOB_FILE = "sweeps", "job.json"


class Sweep:
    """One sweep, opened: `todo` yields its trials as they are wanted.

    Attributes:
        config: the sweep's, with `config.sweep`.
        folder, identity: `<storage>/sweeps/<name>-<identity>`.
        owner: the token of this driver in its runs' leases.
        table: what became of its trials.
    """

    def __init__(self, config: RunConfig, local: bool) -> None:
        assert config.sweep is not None
        self.config, self.settings = config, config.sweep
        self.space = Space(config)
        search.start(config, self.space, ())  # a missing package is told before any work
        _check_unit(config, self.settings.metric, [dimension.key for dimension in self.space.dimensions])
        self._prepared = self._prepare(local)
        self.owner = uuid.uuid4().hex
        self.identity = self._identity()
        self.folder = Path(config.storage) / FOLDER / f"{config.name}-{self.identity}"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SWEEP_FILE, {"identity": self.identity, "config": config.dump()})
        self.table = Table(self.folder)
        self._next = self.table.next_number()
        self._runs = {trial.run for trial in self.table.trials.values() if trial.run}
        self._search = search.start(config, self.space, [trial.point for trial in self.table.trials.values()])
        for trial in self.table.done():
            self.tell(trial)

    def todo(self) -> Iterator[Trial]:
        """Trials to run: first those of an earlier call that did not end, then new ones.

        A point whose configuration is refused is recorded as failed; one that makes the run of another trial is left out.
        """
        for trial in self.table.unfinished():
            if (again := self._open(trial.number, trial.point)) is not None:
                yield again
        while (point := self._search.propose()) is not None:
            trial = self._open(self._next, point)
            if trial is not None and trial.run not in self._runs:
                self._next += 1
                self._runs.add(trial.run)
                yield trial

    def tell(self, trial: Trial) -> None:
        """The search learns how a trial ended."""
        self._search.tell(trial.point, trial.value(self.settings.metric))

    def trial_folder(self, trial: Trial) -> Path:
        """What belongs to the trial in this sweep (its run may belong to several)."""
        return self.folder / "trials" / trial.name

    def config_of(self, trial: Trial) -> RunConfig:
        return self.space.configure(trial.point)[0]

    def prepared_for(self, config: RunConfig) -> Prepared:
        return self._prepared[_needed(config)]

    def steps_of(self, config: RunConfig) -> Plan:
        """The steps of a whole run."""
        rows = Rows(self.prepared_for(config).rows)
        return Plan(config, rows.lengths[rows.split(config.data, config.seed).train])

    def check_reported(self, trials: Iterable[Trial]) -> None:
        """Raises ConfigError where trials finished and none of them has the metric."""
        finished = [trial for trial in trials if trial.state == "finished"]
        if finished and not any(self.settings.metric in trial.metrics for trial in finished):
            known = sorted({name for trial in finished for name in trial.metrics if name.startswith("eval/")})
            raise ConfigError(
                f"sweep.metric: no trial reports {self.settings.metric}; known here: {', '.join(known) or 'none'}"
            )

    # ------------------------------------------------------------------------------------------------- parts

    def _open(self, number: int, point: Point) -> Trial | None:
        """The trial's run folder and its job file; None where the configuration is refused."""
        try:
            config, overrides = self.space.configure(point)
        except ConfigError as error:
            self.tell(
                self.table.put(Trial(number, point, self.space.overrides(point), "", "failed", reason=str(error)))
            )
            self._next = max(self._next, number + 1)
            return None
        prepared = self.prepared_for(config)
        run, _ = driver.open_run(config, prepared)
        trial = Trial(number, point, overrides, str(run))
        self.trial_folder(trial).mkdir(parents=True, exist_ok=True)
        write_json(
            self.trial_folder(trial) / JOB_FILE,
            {
                "plain": driver.job_for(config, prepared, run, self.owner).plain(),
                "metric": self.settings.metric,
                "total_steps": self.steps_of(config).total_steps,
                "max_failures": self.settings.max_failures,
            },
        )
        return trial

    def _prepare(self, local: bool) -> dict[tuple[str, Needs], Prepared]:
        """Rows and reference log-probs of every configuration that trials may have; most often one."""
        prepared: dict[tuple[str, Needs], Prepared] = {}
        # Trials of different lengths or orders read different rows.
        work: Literal["all", "run"] = "all" if any(d.key.startswith("train") for d in self.space.dimensions) else "run"
        for point in self.space.preparations(self.settings.search == "grid"):
            try:
                config, _ = self.space.configure(point)
            except ConfigError:
                continue  # recorded when it is its turn
            if _needed(config) not in prepared:
                prepared[_needed(config)] = driver.prepare(config, local, work=work)
                _check_metric(config, prepared[_needed(config)], self.settings.metric)
        if not prepared:
            raise ConfigError(
                "sweep.space: no combination of these values is a valid configuration; change one of them"
            )
        return prepared

    def _identity(self) -> str:
        """Of all that changes what is tried and how it ends; not of `trials`, which may be raised later."""
        settings = self.settings.model_dump(mode="json")
        loose = {"trials", "max_concurrent_trials", "max_failures", "evaluate", "register_as"}
        base = urls_without_credentials(self.config.model_copy(update={"sweep": None}).dump())
        free = {
            "name",
            "storage",
            "checkpoint_from",
            "scaling",
            "checkpoint",
            "tracking",
            "sampling",
            "evaluation",
            "sweep",
        }
        cache = Path(self.config.storage) / "cache"
        sources = sorted(
            [p.rows.name, p.reference.parent.name if p.reference else "", fingerprint(p.model, cache)]
            for p in self._prepared.values()
        )
        kept: dict[str, Any] = {key: value for key, value in settings.items() if key not in loose}
        return digest(1, kept, {key: value for key, value in base.items() if key not in free}, sources)


def read_job(path: Path) -> dict[str, Any]:
    """What a trial's workers are told. Raises durable.Corrupt."""

    def checked(job: Any) -> dict[str, Any]:
        return {
            "plain": dict(job["plain"]),
            "metric": str(job["metric"]),
            "total_steps": int(job["total_steps"]),
            "max_failures": int(job["max_failures"]),
        }

    return read_json(path, checked, "the same command writes it again")


def _needed(config: RunConfig) -> tuple[str, Needs]:
    """Configurations that agree in this are prepared alike."""
    return digest(config.data.model_dump(), config.model.model_dump(), config.seed), config.objective.needed()


def _check_unit(config: RunConfig, metric: str, swept: Sequence[str]) -> None:
    """Raises ConfigError where a swept key changes the metric's unit: the best value would be an artefact of the scale.

    Implicit rewards are measured in what the objective makes of them. Losses of different settings are different functions, but for β
    where the loss is the negative log-likelihood of the preferences: that stays in nats.
    """
    kind = metric.removeprefix("eval/").partition("/")[0]
    keys = [key for key in swept if key.partition(".")[0] == "objective"]
    if kind == "loss" and config.objective.bradley_terry:
        keys = [key for key in keys if key != "objective.beta"]
    if kind in ("reward", "loss") and keys:
        raise ConfigError(
            f"sweep.metric: {metric} is measured in units that {keys[0]} changes, so that it cannot rank these trials; take "
            "eval/accuracy, or with sweep.evaluate compare the samples' reward at equal KL in sweep.html"
        )


def _check_metric(config: RunConfig, prepared: Prepared, metric: str) -> None:
    """Raises ConfigError where no trial could report the metric."""
    rows = Rows(prepared.rows)
    if metric.startswith("eval/") and not len(rows.split(config.data, config.seed).eval):
        raise ConfigError(f"sweep.metric: {metric} needs held-out rows; set data.eval_fraction or data.eval_sources")
