"""From a configuration to a trained, exported and tracked model: `fit(config)`, used by jobs/ and tune/ alike.

The driver prepares rows and reference log-probs, gives the run its identity, starts the workers (Ray Train, or this process),
mirrors their progress, exports the result. All state is in files: the same call again continues a killed run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline import checkpoint, checksums, cluster, data, preflight, reference
from pipeline.config import ConfigError, RunConfig, digest
from pipeline.durable import recall_json, write_json
from pipeline.errors import Leaving
from pipeline.export import EXPORT, RUN_FILE, export, intact, mend_export, run_settings
from pipeline.gauges import Gauges
from pipeline.lease import Lease
from pipeline.loop import Job, train_worker
from pipeline.model_files import fingerprint
from pipeline.order import Plan
from pipeline.pretrained import settled
from pipeline.progress import METRICS_FILE, Monitor, read_metrics
from pipeline.ray_train import train_on_ray
from pipeline.reference_cost import keeps_states
from pipeline.rows import Rows
from pipeline.thinker import latent_identity
from pipeline.tracking import Tracker, start

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that training reads, on storage that all nodes share."""

    model: str  # where training starts from
    frozen: str  # the reference's weights
    rows: Path
    reference: Path | None  # its log-probs of the rows, where the objective asks for them
    states: Path | None = None  # its hidden states, where an exact KL is asked for and reading them is cheaper
    scoring: reference.Scoring | None = None  # what makes the two


@dataclass(frozen=True, slots=True)
class Result:
    """Where a run's results are."""

    prepared: Prepared
    run: Path
    export: Path
    metrics: dict[str, float]  # of the last step
    tracking: str  # where to find the MLflow run; empty when tracking is off
    already_finished: bool = False


def prepare(
    config: RunConfig,
    local: bool = False,
    train: bool = False,
    work: Literal["run", "held_out", "all", "later", "rows", "names"] = "run",
) -> Prepared:
    """Weights located, rows tokenised, reference scored; all cached.

    train: begin to start Ray Train meanwhile. work: how much of that is done: the reference scores the rows that this `run` reads, those
    `held_out` (all, where there are none), `all`, or none yet (`later`: `Prepared.scoring` does it); `rows` are tokenised and never
    scored, and `names` tells only where everything is or would be.
    """
    preflight.check(config, local)
    cache, trust = Path(config.storage) / "cache", config.model.trust_remote_code
    model = intact(config.model.path, cache, "model.path", trust)
    if not local:
        cluster.import_beside("transformers.models.auto.tokenization_auto", *(["pipeline.elastic"] if train else []))
        cluster.connect(config)
        if train:
            from pipeline.elastic import start_coordinator

            start_coordinator()
    needs = config.objective.needed()
    assistant = config.latent.assistant if needs.latent != "none" else None
    for key, path in (("model.reference", config.model.reference), ("latent.assistant", assistant)):
        if path:
            mend_export(path, cache, key, trust)
    frozen = preflight.check_models(config, model)
    asked = needs.reference != "none"
    rows = data.folder_of(config, model) if work == "names" else data.prepare(config, model, local)
    if work in ("rows", "names"):
        return Prepared(model, frozen, rows, reference.folder_of(config, rows, frozen) if asked else None)
    preflight.check_rows(config, rows)
    states = needs.kl != "none" and work != "held_out" and keeps_states(config, rows, frozen, local)
    if not asked and not states:
        return Prepared(model, frozen, rows, None)
    scoring = reference.Scoring(config, rows, frozen, local, states)
    if work != "later":
        pieces = scoring.pieces
        every = list(range(len(pieces)))
        scoring.run({"run": pieces.of_the_run, "held_out": pieces.held_out or every, "all": every}[work])
    return Prepared(model, frozen, rows, scoring.folder if asked else None, scoring.states, scoring)


def fit(config: RunConfig, local: bool = False, report: Callable[[Result, Tracker], None] | None = None) -> Result:
    """Train to the end; continues a killed run, returns at once when the run is already finished.

    `report` is called with the exported result while the MLflow run is still open, for what else belongs to it.
    Raises ConfigError, data.DataError, loop.Diverged: one line each; Leaving where SIGTERM ended a run without Ray.
    """
    config = settled(config)
    prepared = prepare(config, local, train=True, work="later")
    run, identity = open_run(config, prepared)
    if (known := _finished(config, prepared, run, identity)) is not None:
        return known
    with Lease(run) as lease:
        mend_export(str(run), Path(config.storage) / "cache", "storage", config.model.trust_remote_code)
        # Another driver may have ended the run while this one waited for the lease.
        known = _finished(config, prepared, run, identity)
        return known or _fit(config, prepared, lease, local, start(config, run, identity), report)


def _finished(config: RunConfig, prepared: Prepared, run: Path, identity: str) -> Result | None:
    """The result of a run of which everything is done, told and whole."""
    if not (run / EXPORT).is_dir() or checksums.damage(run / EXPORT, Path(config.storage) / "cache") is not None:
        return None
    tracker = start(config, run, identity)
    if tracker.owes("FINISHED"):
        return None
    return Result(prepared, run, run / EXPORT, last_metrics(run), tracker.location, already_finished=True)


def _fit(
    config: RunConfig,
    prepared: Prepared,
    lease: Lease,
    local: bool,
    tracker: Tracker,
    report: Callable[[Result, Tracker], None] | None,
) -> Result:
    """`fit` by the driver that has the lease: nobody else writes to the run or tells of it."""
    run = lease.run
    finished, status = (run / EXPORT).is_dir(), "FAILED"
    try:
        if finished:  # the driver was killed behind the export, or MLflow was away
            tracker.log_config(config.dump())
            _tell_steps(tracker, run)
        else:
            _train(config, prepared, lease, tracker, local)
            newest = checkpoint.latest(run)
            assert newest is not None
            export(config, newest, prepared.model, run / EXPORT, prepared.rows)
        tracker.log_summary({f"final/{name}": value for name, value in last_metrics(run).items()})
        tracker.log_model_reference(run / EXPORT, config.tracking.copy_model, config.tracking.register_as)
        result = Result(prepared, run, run / EXPORT, last_metrics(run), tracker.location, already_finished=finished)
        if report is not None:
            report(result, tracker)
        status = "FINISHED"
    except (KeyboardInterrupt, Leaving):
        status = "KILLED"
        raise
    finally:
        if not lease.lost:
            tracker.finish(status)
    return result


def open_run(config: RunConfig, prepared: Prepared) -> tuple[Path, str]:
    """The run's folder and identity; made if it is new."""
    run, identity = run_of(config, prepared)
    if recall_json(run / RUN_FILE, run_settings) is None:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / RUN_FILE, {"identity": identity, "model": prepared.model, "config": config.dump()})
    return run, identity


def trained_run(config: RunConfig, prepared: Prepared) -> tuple[Path, str]:
    """The same for what reads a run: raises ConfigError where this configuration was never trained, and makes nothing."""
    run, identity = run_of(config, prepared)
    if not (run / RUN_FILE).is_file():
        raise ConfigError(untrained(config))
    return run, identity


def check_trained(config: RunConfig) -> None:
    """Raises ConfigError where no run of any configuration has this name: known before anything is prepared."""
    if not any((Path(config.storage) / "runs").glob(f"{config.name}-*/{RUN_FILE}")):
        raise ConfigError(untrained(config))


def untrained(config: RunConfig) -> str:
    """What is missing, and what to do."""
    return (
        f"checkpoint_from: this configuration ({config.name}) has no run in {Path(config.storage) / 'runs'}; train it first, or "
        "name a model"
    )


def run_of(config: RunConfig, prepared: Prepared) -> tuple[Path, str]:
    """Where the run's folder is, named by what changes the run's meaning, and its identity."""
    storage = Path(config.storage)
    identity = digest(
        1,
        prepared.rows.name,
        prepared.reference.parent.name if prepared.reference else None,
        [source.share for source in config.data.sources],
        len(config.data.sources),
        config.data.eval_fraction,
        fingerprint(prepared.model, storage / "cache"),
        settled(config).model.dtype,
        config.model.lora.model_dump() if config.model.lora else None,
        config.dump()["objective"],
        config.optimizer.model_dump(),
        *([config.critic.model_dump()] if config.objective.needed().critic else []),
        *(latent_identity(config) if config.objective.needed().latent != "none" else []),
        config.train.model_dump(include={"epochs", "max_steps", "rows_per_step"}),
        config.seed,
    )
    return storage / "runs" / f"{config.name}-{identity}", identity


def job_for(config: RunConfig, prepared: Prepared, run: Path, owner: str | None = None) -> Job:
    """What the workers of this run are told. owner: the token of the driver's lease."""
    frozen = prepared.frozen if config.objective.needed().kl != "none" else None
    return Job(config, run, prepared.rows, prepared.reference, prepared.model, frozen, prepared.states, owner)


def last_metrics(run: Path) -> dict[str, float]:
    """Each metric's newest value."""
    newest: dict[str, float] = {}
    for line in read_metrics(run / METRICS_FILE):
        newest |= line
    newest.pop("step", None)
    return newest


def _tell_steps(tracker: Tracker, run: Path) -> None:
    """Those that the tracker does not know yet."""
    known = tracker.last_step()
    for line in read_metrics(run / METRICS_FILE):
        step = int(line.pop("step"))
        if step > known:
            tracker.log_metrics(step, line)


def _log_data(tracker: Tracker, rows: Path, left_out: int) -> None:
    found = data.summary(rows)
    if left_out:
        tracker.log_summary({"data/left_out_by_shares": left_out})
    tracker.log_summary({"data/records": found.records, "data/rows": found.rows, "data/quarantined": found.quarantined})
    if found.quarantined:
        tracker.log_dict({"reasons": found.reasons}, "quarantine.json")
        tracker.log_artifact(rows / data.QUARANTINE)


def _train(config: RunConfig, prepared: Prepared, lease: Lease, tracker: Tracker, local: bool) -> None:
    run = lease.run
    job = job_for(config, prepared, run, lease.owner)
    rows = Rows(prepared.rows)
    split = rows.split(config.data, config.seed)
    if split.left_out:
        logger.warning(
            "data.sources: the shares leave out %d of %d rows", split.left_out, split.left_out + len(split.train)
        )
    for warning in rows.weightless(config.data, split):
        logger.warning("%s", warning)
    plan = Plan(config, rows.lengths[split.train])

    def introduce() -> int:  # beside the workers' start: importing MLflow and opening its database takes seconds
        tracker.log_config(config.dump())
        _log_data(tracker, prepared.rows, split.left_out)
        return tracker.last_step()

    gauges = None if local else Gauges(run, plan.total_steps)

    def told(step: int, metrics: dict[str, float]) -> None:
        if lease.lost:
            return
        tracker.log_metrics(step, metrics)
        if gauges is not None:
            gauges.step(step, metrics)

    tick = (lambda: None) if gauges is None else gauges.tick
    scoring = nullcontext(None) if prepared.scoring is None else prepared.scoring.while_training()
    with scoring as score, Monitor(run, plan.total_steps, told, introduce, tick):
        if local:
            train_worker(job.plain(), score=score)
        else:
            train_on_ray(job)
    lease.confirm()
