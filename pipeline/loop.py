"""What one worker does: the training loop, with one optimizer step at its top.

`train_worker` runs alike under Ray Train, in the driver's own process (`--local`) and in tests. It is re-entrant: everything
it builds is released when it returns. Progress leaves through one file, `metrics.jsonl`, which the driver mirrors to the
terminal and to MLflow, so that neither can slow down or break training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline import checkpoint
from pipeline.collate import collate
from pipeline.config import ConfigError, RunConfig
from pipeline.config_file import validate
from pipeline.contracts import Batch, Mean, Objective, TermGroup
from pipeline.distributed import agree, process_group
from pipeline.errors import UserError
from pipeline.evaluation import held_out
from pipeline.learner import Learner
from pipeline.metrics import Sums, all_sum, batch_metrics
from pipeline.order import micro_batches, step_rows, steps_per_epoch
from pipeline.progress import LOG_FILE, METRICS_FILE, MetricsFile, log_to
from pipeline.rows import Rows, Split

logger = logging.getLogger(__name__)


class Diverged(UserError, RuntimeError):
    """The loss is not finite: names the step and its rows."""


def train_step(
    learner: Learner, objective: Objective, batches: Sequence[Batch], step: int, total_steps: int
) -> dict[str, float]:
    """One optimizer step (number `step` from 0) over this rank's micro-batches → metrics, equal on all ranks.

    The loss of the whole step (all ranks, all micro-batches) is Σ_terms coefficient · total / weight, with weights known
    from masks before the first backward: how rows are split into micro-batches cannot change the update.
    """
    weights = _step_weights(objective, batches)
    sums = Sums()
    for i, batch in enumerate(batches):
        out = learner(batch, step)
        result = objective(out, batch)
        if result.terms.keys() != weights.keys():
            raise ConfigError(
                f"objective: {type(objective).__name__} returns the terms {sorted(result.terms)} but weighs "
                f"{sorted(weights)}; give both the same names"
            )
        losses: dict[TermGroup, torch.Tensor] = {}
        for name, term in result.terms.items():
            losses[term.group] = losses.get(term.group, 0) + term.coefficient * term.total / weights[name]
        learner.backward(losses, last=i == len(batches) - 1, step=step)
        loss = sum(losses.values()).detach()
        one = torch.ones((), device=loss.device)
        # Already divided: summing over micro-batches and ranks completes the mean, so their weight is 1 once.
        share = one if i == 0 and learner.rank == 0 else torch.zeros_like(one)
        sums.add({"loss": Mean(loss, share)})
        sums.add({f"loss/{k}": Mean(t.total / weights[k], share) for k, t in result.terms.items()})
        sums.add(result.metrics | batch_metrics(objective, out, batch))
    metrics = sums.reduce()
    if not np.isfinite(metrics["loss"]):
        raise _diverged(f"the loss is {metrics['loss']}", batches)
    try:
        return metrics | learner.step(step, total_steps)
    except FloatingPointError as error:
        raise _diverged(str(error).partition(";")[0], batches) from None


def _diverged(what: str, batches: Sequence[Batch]) -> Diverged:
    """The error with the step's rows, those of all ranks; every rank comes here."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [int(row) for batch in batches for row in batch.row_ids])
    rows = sorted({row for own in gathered for row in own})
    return Diverged(f"{what}; lower optimizer.lr or check the rows with these row ids: {rows}")


def _step_weights(objective: Objective, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Each term's denominator, summed over micro-batches and ranks; 1 where nothing has weight (0 / 1 = 0)."""
    totals: dict[str, torch.Tensor] = {}
    for batch in batches:
        for name, weight in objective.weight(batch).items():
            totals[name] = totals.get(name, 0) + weight.float()
    names = list(totals)
    stacked = all_sum(torch.stack([totals[name] for name in names]))
    return {name: torch.where(total > 0, total, 1.0) for name, total in zip(names, stacked, strict=True)}


# -------------------------------------------------------------------------------------------- one worker


@dataclass(frozen=True, slots=True)
class Job:
    """All that a worker is told, as plain values: `train_worker` receives `Job.plain()`."""

    config: RunConfig
    run: Path  # the run's folder, on storage that all workers share
    rows: Path  # prepared rows
    reference: Path | None  # their reference log-probs
    model: str  # located weights (a hub name or folder)
    frozen: str | None = None  # the reference's, for objectives that need its whole distribution

    def plain(self) -> dict[str, Any]:
        paths = {
            "run": str(self.run),
            "rows": str(self.rows),
            "reference": str(self.reference) if self.reference else None,
        }
        return {"config": self.config.dump(), "model": self.model, "frozen": self.frozen, **paths}

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> Job:
        reference = Path(plain["reference"]) if plain["reference"] else None
        paths = Path(plain["run"]), Path(plain["rows"]), reference
        return cls(validate(plain["config"]), *paths, plain["model"], plain["frozen"])


def train_worker(plain: dict[str, Any], stop: Callable[[], bool] | None = None) -> None:
    """Train to the end from the newest checkpoint (or from the start). Runs on every rank.

    `stop` is asked on rank 0 after each step: where it says so, all ranks return there, with no checkpoint of that step.
    Raises `Diverged` on a non-finite loss and `checkpoint.Superseded` when a newer attempt has taken over the run.
    """
    job = Job.parse(plain)
    with process_group(job.config) as device, ExitStack() as stack:
        if dist.get_rank() == 0:
            stack.enter_context(log_to(job.run / LOG_FILE))
        _train(job, device, stop)


def _train(job: Job, device: torch.device, stop: Callable[[], bool] | None) -> None:
    config, rank = job.config, dist.get_rank()
    rows = Rows(job.rows, job.reference)
    split = rows.split(config.data, config.seed)
    plan = Plan(config, rows.lengths[split.train])
    saver = Saver.begin(job)
    learner = Learner.start(config, job.model, job.frozen, device, saver.resume)
    watch = Watch(config.objective, saver.metrics)
    log = MetricsFile(job.run / METRICS_FILE, after=saver.step) if rank == 0 else None
    try:
        for step in range(saver.step, plan.total_steps):
            metrics = _step(job, learner, rows, split, plan, step, watch)
            watch.note(metrics)
            if log is not None:
                log.append(step + 1, metrics)
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == plan.total_steps:
                saver.save(learner, step + 1, metrics)
            if stop is not None and agree(rank == 0 and stop()):
                break
    finally:
        learner.close()
        if log is not None:
            log.close()


def _step(
    job: Job, learner: Learner, rows: Rows, split: Split, plan: Plan, step: int, watch: Watch
) -> dict[str, float]:
    """Step number `step` (from 0): its rows, its update, and the evaluation that is due after it."""
    config, started = job.config, time.monotonic()
    # Random state is a function of where we are: a checkpoint has none to save.
    torch.manual_seed(hash((config.seed, step, dist.get_rank())) % 2**63)
    chosen = split.train[plan.positions(step)]
    batches = _my_batches(chosen, rows, config, learner, watch.carried)
    try:
        metrics = train_step(learner, config.objective, batches, step, plan.total_steps)
    except Diverged as error:
        raise Diverged(f"step {step + 1}: {error}") from None
    seconds = time.monotonic() - started
    metrics |= {
        "tokens_per_second": float(rows.lengths[chosen].sum()) / seconds,
        "rows_per_second": len(chosen) / seconds,
        "epoch": (step + 1) / plan.steps_per_epoch,
    }
    if len(split.eval) and plan.evaluates_after(step):
        sums = Sums()
        held = _my_batches(split.eval, rows, config, learner, watch.carried)
        with learner.evaluating():
            held_out.add_batches(sums, learner.evaluate, config.objective, held)
        metrics |= held_out.means(sums)
    return metrics


def _my_batches(
    chosen: np.ndarray, rows: Rows, config: RunConfig, learner: Learner, carried: Mapping[str, float]
) -> list[Batch]:
    """This rank's micro-batches of the chosen rows."""
    budget = config.train.tokens_per_micro_batch
    dealt = micro_batches(chosen, rows.lengths + learner.places, dist.get_world_size(), budget, learner.padded)
    return [replace(collate(rows.take(micro)), carried=carried).to(learner.device) for micro in dealt[dist.get_rank()]]


# ------------------------------------------------------------------------------------------------- parts


class Plan:
    """The steps of a whole run, as a function of lengths, seed and epoch alone."""

    def __init__(self, config: RunConfig, lengths: np.ndarray) -> None:
        self._lengths, self._seed, self._train = lengths, config.seed, config.train
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])
        self.steps_per_epoch = steps_per_epoch(len(lengths), config.train.rows_per_step)
        self.total_steps = config.train.epochs * self.steps_per_epoch
        if config.train.max_steps is not None:
            self.total_steps = min(self.total_steps, config.train.max_steps)

    def positions(self, step: int) -> np.ndarray:
        """Rows of a step (counted from 0), as positions in `lengths`."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, step_rows(self._lengths, self._seed, epoch, self._train.rows_per_step))
        return self._epoch[1][within]

    def evaluates_after(self, step: int) -> bool:
        """Every `eval_every` steps (default: epochs), and at the end."""
        every = self._train.eval_every or self.steps_per_epoch
        return (step + 1) % every == 0 or step + 1 == self.total_steps


class Watch:
    """What a step's metrics mean for the next one: values to carry over, and alarms to raise once."""

    def __init__(self, objective: Objective, before: Mapping[str, float]) -> None:
        self._names, self._alarms = objective.needed().carried, list(objective.alarms)
        self.carried: dict[str, float] = {name: before[name] for name in self._names if name in before}

    def note(self, metrics: Mapping[str, float]) -> None:
        """Keep what the next step wants, and warn of metrics that left their range."""
        self.carried |= {name: metrics[name] for name in self._names if name in metrics}
        for alarm in list(self._alarms):
            value = metrics.get(alarm.metric)
            if value is not None and not alarm.low <= value <= alarm.high:
                self._alarms.remove(alarm)
                if dist.get_rank() == 0:
                    logger.warning("%s is %.4g: %s", alarm.metric, value, alarm.advice)


class Saver:
    """Commits checkpoints of one attempt at a run; only the newest attempt may."""

    def __init__(self, job: Job, attempt: checkpoint.Attempt | None, resume: Path | None) -> None:
        self._run, self._settings, self._attempt = job.run, job.config.checkpoint, attempt
        self.resume = resume
        state = checkpoint.read_state(resume) if resume else {"step": 0, "best": None, "metrics": {}}
        self.step: int = state["step"]
        self.metrics: dict[str, float] = state["metrics"]  # of the last step
        self._best: dict[str, Any] | None = state["best"]  # {"step": …, "value": …}

    @classmethod
    def begin(cls, job: Job) -> Saver:
        """Take over the run (rank 0) and agree on the checkpoint to go on from."""
        attempt = checkpoint.Attempt.begin(job.run) if dist.get_rank() == 0 else None
        return cls(job, attempt, agree(checkpoint.latest(job.run) if attempt else None))

    def save(self, learner: Learner, step: int, metrics: dict[str, float]) -> None:
        """Write, commit and prune; collective. Raises `Superseded` on all ranks alike."""
        folder = agree(self._attempt.temporary(step) if self._attempt else None)
        learner.save(folder)
        dist.barrier()
        self._note_best(step, metrics)
        error = None
        if self._attempt is not None:
            try:
                state = {"step": step, "updates": learner.updates(), "best": self._best, "metrics": metrics}
                checkpoint.finish(folder, state, self._attempt)
                best = checkpoint.path_of(self._run, self._best["step"]) if self._best else None
                checkpoint.prune(self._run, self._settings.keep, best)
            except checkpoint.Superseded as superseded:
                error = str(superseded)
        if (error := agree(error)) is not None:
            raise checkpoint.Superseded(error)
        self.step = step

    def _note_best(self, step: int, metrics: dict[str, float]) -> None:
        name = self._settings.best
        sign = -1.0 if name.startswith("-") else 1.0
        value = metrics.get(name.lstrip("-"))
        if value is None and dist.get_rank() == 0 and any(metric.startswith("eval/") for metric in metrics):
            logger.warning("checkpoint.best: there is no metric %s; known here: %s", name, ", ".join(sorted(metrics)))
        if value is not None and (self._best is None or sign * value < self._best["value"]):
            self._best = {"step": step, "value": sign * value}
