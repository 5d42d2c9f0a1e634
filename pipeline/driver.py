"""From a configuration to a trained, exported and tracked model: `fit(config)`, used by jobs/ and tune/ alike.

The driver prepares rows and reference log-probs, gives the run its identity, starts the workers (Ray Train, or this process),
mirrors their progress, exports the result. All state is in files: the same call again continues a killed run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoint, cluster, data, reference
from pipeline.config import ConfigError, RunConfig, digest
from pipeline.durable import write_json
from pipeline.errors import Leaving, UserError
from pipeline.export import EXPORT, RUN_FILE, export
from pipeline.gauges import Gauges
from pipeline.loop import Job, train_worker
from pipeline.order import Plan
from pipeline.pretrained import fingerprint, load_config, load_tokenizer, locate, precision
from pipeline.progress import ERROR_FILE, METRICS_FILE, RAY_FILE, Monitor, read_metrics, tell
from pipeline.redaction import redact, redacted
from pipeline.reference_cost import states_folder
from pipeline.rows import Rows
from pipeline.thinker import assistant_of, check_steps, latent_identity, refuse_thoughts_under_kl
from pipeline.tracking import Tracker, start, tracking_uri

logger = logging.getLogger(__name__)


class TrainingFailed(UserError):
    """What a worker said, when starting it again cannot help."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that training reads, on storage that all nodes share."""

    model: str  # where training starts from
    frozen: str  # the reference's weights
    rows: Path
    reference: Path | None  # its log-probs of the rows, where the objective asks for them
    states: Path | None = (
        None  # its hidden states, where the objective asks for an exact KL and reading them is cheaper
    )


@dataclass(frozen=True, slots=True)
class Result:
    """Where a run's results are."""

    prepared: Prepared
    run: Path
    export: Path
    metrics: dict[str, float]  # of the last step
    tracking: str  # where to find the MLflow run; empty when tracking is off
    already_finished: bool = False


def check(config: RunConfig, local: bool = False) -> None:
    """What can be known to fail before any work starts. Raises ConfigError."""
    if config.tracking.enabled:
        tracking_uri(config)
    if local and config.scaling.gpus_per_worker and not torch.cuda.is_available():
        raise ConfigError("scaling.gpus_per_worker: this machine has no GPU; set it to 0")
    try:
        (Path(config.storage) / "cache").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"storage: cannot be written ({error}); name another folder") from None
    if config.scaling.offload_optimizer:
        from pipeline.engine import check_offload

        check_offload()


def check_lengths(config: RunConfig, model: str) -> None:
    """Rows have to fit the model at `model`: its context and its vocabulary. Raises ConfigError."""
    text = load_config(model, config.model.trust_remote_code).get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    thoughts = config.latent.n_latents if config.objective.needed().latent != "none" else 0
    if context is not None and config.data.max_length + thoughts > context:
        beside = f" and {thoughts} thoughts" if thoughts else ""
        raise ConfigError(
            f"data.max_length: {config.data.max_length}{beside} exceeds the model's context of {context} tokens; lower it"
        )
    tokens = len(load_tokenizer(model, config.model.trust_remote_code))
    if tokens > text.vocab_size:
        raise ConfigError(
            f"model.path: the tokenizer has {tokens} tokens, the model {text.vocab_size}; they do not belong together"
        )


def prepare(config: RunConfig, local: bool = False, train: bool = False) -> Prepared:
    """Weights located, rows tokenised, reference scored; all cached. train: begin to start Ray Train meanwhile."""
    check(config, local)
    cache = Path(config.storage) / "cache"
    model = locate(config.model.path, cache)
    if not local:
        cluster.import_beside("transformers.models.auto.tokenization_auto", *(["pipeline.elastic"] if train else []))
        cluster.connect(config)
        if train:
            from pipeline.elastic import start_coordinator

            start_coordinator()
    check_lengths(config, model)
    frozen = locate(config.model.reference, cache, "model.reference") if config.model.reference else model
    needs = config.objective.needed()
    if frozen != model:
        _check_vocabularies(config, model, frozen, "model.reference")
    refuse_thoughts_under_kl(needs, model, frozen)
    if needs.latent != "none" and (assistant := assistant_of(config)) is not None:
        _check_vocabularies(config, model, assistant, "latent.assistant")
        check_lengths(config, assistant)
    rows = data.prepare(config, model, local)
    _check_rows(config, rows)
    states = states_folder(config, rows, frozen, local) if needs.kl != "none" else None
    asked = needs.reference != "none"
    scored = reference.score(config, rows, frozen, local, states) if asked or states else None
    return Prepared(model, frozen, rows, scored if asked else None, states)


def _check_vocabularies(config: RunConfig, model: str, other: str, key: str) -> None:
    """Two models of one token mean the same only if it is the same token. Raises ConfigError about the `key` of the other."""
    trust = config.model.trust_remote_code
    sizes = [load_config(path, trust).get_text_config().vocab_size for path in (model, other)]
    tokenizers = [data.tokenizer_identity(load_tokenizer(path, trust)) for path in (model, other)]
    if sizes[0] != sizes[1] or tokenizers[0] != tokenizers[1]:
        raise ConfigError(
            f"{key}: its tokenizer differs from the policy's (vocabularies of {sizes[1]} and {sizes[0]}); "
            f"name {'a reference' if key == 'model.reference' else 'a model'} with the same one"
        )


def _check_rows(config: RunConfig, folder: Path) -> None:
    """What the objective asks of the rows, and the steps that they make, before anything is scored. Raises ConfigError."""
    found, needs, rows = data.summary(folder), config.objective.needed(), Rows(folder)
    split = rows.split(config.data, config.seed)
    if len(split.train) == 0:
        raise ConfigError("data.eval_fraction: holds out every prompt; lower it or add records")
    steps = Plan(config, rows.lengths[split.train]).total_steps
    if needs.critic and config.critic.steps_alone >= steps:
        raise ConfigError(
            f"critic.steps_alone: {config.critic.steps_alone} of {steps} steps would leave none for the policy; "
            "lower it or train longer"
        )
    if config.data.kind == "unpaired" and found.mean_return is not None and abs(found.mean_return) == 1:
        logger.warning("data.sources: all labels are the same; there is nothing to tell good from bad by")
    if needs.mismatched and found.mismatched < found.rows:
        logger.warning(
            "data.sources: %d rows have no response to another prompt beside them, all of one prompt?",
            found.rows - found.mismatched,
        )
    if needs.latent == "steps" and found.stepped < found.rows:
        check_steps(found.rows - found.stepped, found.rows)
    if needs.behaviour and found.behaviour < found.rows:
        raise ConfigError(
            f"objective.importance: {found.rows - found.behaviour} of {found.rows} rows have no log-probs of the policy that "
            "made them; give each step a logprob, or set importance=reference (the reference made them) or none"
        )


def fit(config: RunConfig, local: bool = False, report: Callable[[Result, Tracker], None] | None = None) -> Result:
    """Train to the end; continues a killed run, returns at once when the run is already finished.

    `report` is called with the exported result while the MLflow run is still open, for what else belongs to it.
    Raises ConfigError, data.DataError, loop.Diverged: one line each; Leaving where SIGTERM ended a run without Ray.
    """
    prepared = prepare(config, local, train=True)
    run, identity = open_run(config, prepared)
    tracker = start(config, run, identity)
    if (run / EXPORT).is_dir():
        return Result(prepared, run, run / EXPORT, last_metrics(run), tracker.location, already_finished=True)
    status = "FAILED"
    try:
        _train(config, prepared, run, tracker, local)
        newest = checkpoint.latest(run)
        assert newest is not None
        exported = export(config, newest, prepared.model, run / EXPORT)
        tracker.log_summary({f"final/{name}": value for name, value in last_metrics(run).items()})
        tracker.log_model_reference(exported, config.tracking.copy_model, config.tracking.register_as)
        result = Result(prepared, run, exported, last_metrics(run), tracker.location)
        if report is not None:
            report(result, tracker)
        status = "FINISHED"
    except (KeyboardInterrupt, Leaving):
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)
    return result


def open_run(config: RunConfig, prepared: Prepared) -> tuple[Path, str]:
    """The run's folder, named by what changes the run's meaning; made if it is new."""
    storage = Path(config.storage)
    identity = digest(
        1,
        prepared.rows.name,
        prepared.reference.name if prepared.reference else None,
        [source.share for source in config.data.sources],
        len(config.data.sources),
        config.data.eval_fraction,
        fingerprint(prepared.model, storage / "cache"),
        str(precision(config.model.dtype)),
        config.model.lora.model_dump() if config.model.lora else None,
        config.dump()["objective"],
        config.optimizer.model_dump(),
        *([config.critic.model_dump()] if config.objective.needed().critic else []),
        *(latent_identity(config) if config.objective.needed().latent != "none" else []),
        config.train.model_dump(include={"epochs", "max_steps", "rows_per_step"}),
        config.seed,
    )
    run = storage / "runs" / f"{config.name}-{identity}"
    if not (run / RUN_FILE).is_file():
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / RUN_FILE, {"identity": identity, "model": prepared.model, "config": redacted(config.dump())})
    return run, identity


def job_for(config: RunConfig, prepared: Prepared, run: Path) -> Job:
    """What the workers of this run are told."""
    frozen = prepared.frozen if config.objective.needed().kl != "none" else None
    return Job(config, run, prepared.rows, prepared.reference, prepared.model, frozen, prepared.states)


def last_metrics(run: Path) -> dict[str, float]:
    """Each metric's newest value."""
    newest: dict[str, float] = {}
    for line in read_metrics(run / METRICS_FILE):
        newest |= line
    newest.pop("step", None)
    return newest


def _log_data(tracker: Tracker, rows: Path, left_out: int) -> None:
    found = data.summary(rows)
    if left_out:
        tracker.log_summary({"data/left_out_by_shares": left_out})
    tracker.log_summary({"data/records": found.records, "data/rows": found.rows, "data/quarantined": found.quarantined})
    if found.quarantined:
        tracker.log_dict({"reasons": found.reasons}, "quarantine.json")
        tracker.log_artifact(rows / data.QUARANTINE)


def _train(config: RunConfig, prepared: Prepared, run: Path, tracker: Tracker, local: bool) -> None:
    job = job_for(config, prepared, run)
    rows = Rows(prepared.rows, prepared.reference)
    split = rows.split(config.data, config.seed)
    if split.left_out:
        logger.warning(
            "data.sources: the shares leave out %d of %d rows", split.left_out, split.left_out + len(split.train)
        )
    plan = Plan(config, rows.lengths[split.train])

    def introduce() -> int:  # beside the workers' start: importing MLflow and opening its database takes seconds
        tracker.log_config(config.dump())
        _log_data(tracker, prepared.rows, split.left_out)
        return tracker.last_step()

    gauges = None if local else Gauges(run, plan.total_steps)

    def told(step: int, metrics: dict[str, float]) -> None:
        tracker.log_metrics(step, metrics)
        if gauges is not None:
            gauges.step(step, metrics)

    tick = (lambda: None) if gauges is None else gauges.tick
    with checkpoint.Lease(run), Monitor(run, plan.total_steps, told, introduce, tick):
        if local:
            train_worker(job.plain())
        else:
            _train_on_ray(job)


def _train_on_ray(job: Job) -> None:
    """The workers as a Ray Train group; Ray starts them again after a failure, they continue from the last checkpoint."""
    import ray
    from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline import elastic

    scaling = job.config.scaling
    elastic.set_environment(scaling)
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": scaling.gpus_per_worker} if scaling.gpus_per_worker else {})
    (job.run / ERROR_FILE).unlink(missing_ok=True)
    write_json(job.run / RAY_FILE, {"address": ray.get_runtime_context().gcs_address})  # for `status`
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{job.config.train.hang_timeout:g}"  # of a stopped process
    trainer = TorchTrainer(
        _worker,
        train_loop_config=job.plain(),
        scaling_config=ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=scaling.resize_seconds,
        ),
        torch_config=TorchConfig(backend="nccl" if scaling.gpus_per_worker else "gloo"),
        run_config=RayRunConfig(
            name=f"{job.run.name}-{checkpoint.next_attempt(job.run)}",  # a name used before would continue Ray's own state
            storage_path=str(job.run / "ray"),
            failure_config=FailureConfig(max_failures=-1),  # the hooks count
            callbacks=[elastic.Hooks(job.run, scaling.max_failures)],
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        if not (job.run / ERROR_FILE).is_file():
            raise TrainingFailed(str(error).strip().splitlines()[-1]) from error
    if (job.run / ERROR_FILE).is_file():
        raise TrainingFailed(json.loads((job.run / ERROR_FILE).read_text())) from None


def _worker(plain: dict[str, Any]) -> None:
    """`train_worker` under Ray Train, which would start workers again after any error.

    An error that a person has to mend is left in a file instead: the next start sees it and ends at once, on all ranks.
    """
    from pipeline.elastic import draining

    run = Path(plain["run"])
    note = run / ERROR_FILE
    if note.is_file():
        return
    try:
        train_worker(plain, draining=draining)
    except UserError as error:
        write_json(note, redact(str(error)))
        raise
    except Leaving:
        raise  # told already
    except Exception as error:
        tell(run, f"a worker failed, starting again: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
        raise
