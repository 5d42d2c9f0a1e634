"""What one worker does: the training loop, with one optimizer step at its top.

`train_worker` runs alike under Ray Train, in the driver's own process (`--local`) and in tests. It is re-entrant: everything
it builds is released when it returns. Progress leaves through one file, `metrics.jsonl`, which the driver mirrors to the
terminal and to MLflow, so that neither can slow down or break training.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import group

from pipeline.collate import collate
from pipeline.config import ConfigError, RunConfig
from pipeline.config_file import validate
from pipeline.contracts import Batch, Mean, Objective, TermGroup
from pipeline.distributed import agree, process_group
from pipeline.errors import UserError
from pipeline.evaluation import held_out
from pipeline.fencing import confirm
from pipeline.learner import Learner
from pipeline.lease import is_taken_over
from pipeline.metrics import Sums, all_sum, batch_metrics
from pipeline.notice import Notice
from pipeline.order import Plan, costs_of, micro_batches
from pipeline.patience import patiently
from pipeline.progress import LOG_FILE, METRICS_FILE, MetricsFile, log_to, tell
from pipeline.redaction import urls_without_credentials
from pipeline.reference import REFUSED
from pipeline.rows import Rows, Split
from pipeline.run_log import RunLog, last_start
from pipeline.saver import Saver
from pipeline.watchdog import Watchdog
from pipeline.zero import unshared

logger = logging.getLogger(__name__)


class Diverged(UserError, RuntimeError):
    """The loss is not finite: names the step and its rows."""


def train_step(
    learner: Learner, objective: Objective, batches: Sequence[Batch], step: int, total_steps: int
) -> dict[str, float]:
    """One optimizer step (number `step` from 0) over this rank's micro-batches → metrics, equal on all ranks.

    The loss of the whole step (all ranks, all micro-batches) is Σ_terms coefficient · total / weight, with weights known
    from masks before the first backward: how rows are split into micro-batches cannot change the update.

    Raises Diverged, on all ranks alike, when loss or gradient is not finite: weights are as before, no gradient is left.
    """
    weights = _step_weights(objective, batches)
    sums, metrics, finite = Sums(), {}, True
    for i, batch in enumerate(batches):
        torch.manual_seed(batch.seed)
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
        loss = sum(losses.values()).detach()
        one = torch.ones((), device=loss.device)
        # Already divided: summing over micro-batches and ranks completes the mean, so their weight is 1 once.
        share = one if i == 0 and learner.rank == 0 else torch.zeros_like(one)
        sums.add({"loss": Mean(loss, share)})
        sums.add({f"loss/{k}": Mean(t.total / weights[k], share) for k, t in result.terms.items()})
        sums.add(result.metrics | batch_metrics(objective, out, batch))
        if last := i == len(batches) - 1:
            metrics = sums.reduce()
            if not (finite := bool(np.isfinite(metrics["loss"]))):  # so is every gradient: no engine may step
                losses = {group: value * math.nan for group, value in losses.items()}
        learner.backward(losses, last, step)
    try:
        return metrics | learner.step(step, total_steps)
    except FloatingPointError as error:
        what = str(error).partition(";")[0] if finite else f"the loss is {metrics['loss']}"
        raise _diverged(what, batches, step) from None


def _diverged(what: str, batches: Sequence[Batch], step: int) -> Diverged:
    """The error with the step's rows, those of all ranks; every rank comes here. Before the first update the learning rate is
    not to blame.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [int(row) for batch in batches for row in batch.row_ids])
    rows = sorted({row for own in gathered for row in own})
    blamed = "lower optimizer.lr, or check" if step else "no update was made yet: check model.path,"
    return Diverged(f"{what}; {blamed} objective.* and the rows with these row ids: {rows}")


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
    states: Path | None = None  # its hidden states, where they are cached
    owner: str | None = None  # the driver's token in the run's lease; None: whoever has it

    def plain(self) -> dict[str, Any]:
        paths = {
            "run": str(self.run),
            "rows": str(self.rows),
            "reference": str(self.reference) if self.reference else None,
            "states": str(self.states) if self.states else None,
        }
        config = urls_without_credentials(self.config.dump())  # they open no source and no tracking server
        return {"config": config, "model": self.model, "frozen": self.frozen, "owner": self.owner, **paths}

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> Job:
        reference, states = (Path(plain[name]) if plain[name] else None for name in ("reference", "states"))
        paths = Path(plain["run"]), Path(plain["rows"]), reference
        return cls(validate(plain["config"]), *paths, plain["model"], plain["frozen"], states, plain["owner"])


def train_worker(
    plain: dict[str, Any],
    stop: Callable[[], bool] | None = None,
    draining: Callable[[], str | None] | None = None,
    score: Callable[[np.ndarray], None] | None = None,
) -> None:
    """Train to the end from the newest checkpoint (or from the start). Runs on every rank.

    `stop` is asked on rank 0 after each step: where it says so, all ranks return there, with no checkpoint of that step.
    `draining` is asked on all ranks: see `notice`. `score` scores rows with the reference whose turn has come; default: wait for
    those who do. Raises `Diverged` on a non-finite loss, `lease.Superseded` when a newer
    attempt has taken over the run, `patience.StorageFailed` when the storage is full or out of reach for too long, and
    `Leaving` when this worker was told to end.
    """
    job = Job.parse(plain)
    # Whoever made the group starts it again; a worker alone has nobody who would.
    timeout = job.config.train.hang_timeout if dist.is_initialized() else None
    patiently(job.run.stat, job.run, job.config.checkpoint.patience)  # a worker may start while storage is out of reach
    with process_group(job.config) as device, ExitStack() as stack:
        rank = dist.get_rank()
        if rank == 0:
            stack.enter_context(log_to(job.run / LOG_FILE, partial(is_taken_over, job.run, job.owner)))
        events = stack.enter_context(RunLog(job.run, rank, dist.get_world_size(), job.owner))
        together = group.WORLD.get_group_store().clone() if timeout and dist.get_world_size() > 1 else None
        watchdog = Watchdog(timeout, f"rank {rank}", job.run / LOG_FILE, job.run / f"stacks-{rank}.txt", together)
        beat = stack.enter_context(watchdog).beat
        _train(job, device, stop, stack.enter_context(Notice(device, draining)), events, beat, score)


def _train(
    job: Job,
    device: torch.device,
    stop: Callable[[], bool] | None,
    notice: Notice,
    events: RunLog,
    beat: Callable[[], None],
    score: Callable[[np.ndarray], None] | None,
) -> None:
    config, rank = job.config, dist.get_rank()
    rows = Rows(job.rows, job.reference, job.states, growing=True)
    split = rows.split(config.data, config.seed)
    plan = Plan(config, rows.lengths[split.train])
    saver = Saver.begin(job.run, config.checkpoint, beat, job.owner)
    if rank == 0 and (news := _news(last_start(job.run), saver.step)):
        tell(job.run, news)
    events.start(saver.number, saver.step, plan.total_steps)
    own = unshared(config, dist.get_world_size())
    learner = Learner.start(own, job.model, job.frozen, device, saver.resume, cached=job.states is not None)
    learner.beat = beat
    watch = Watch(config.objective, saver.metrics, config.train.skip_nan)
    patience = config.checkpoint.patience
    log = MetricsFile(job.run / METRICS_FILE, saver.step, patience, beat, saver.current) if rank == 0 else None
    try:
        with _closed(learner), saver:
            for step in range(saver.step, plan.total_steps):
                saver.poll()
                due = [split.train[plan.positions(step)], *([split.eval] if plan.evaluates_after(step) else [])]
                await_reference(job, rows, np.concatenate(due), saver.number, score, beat)
                metrics = _step(job, learner, rows, split, plan, step, watch)
                watch.note(metrics)
                if log is not None:
                    log.append(step + 1, metrics)
                events.stepped(step + 1, metrics)
                last = step + 1 == plan.total_steps
                asked = not last and notice.due()
                due = last or (step + 1) % config.checkpoint.every == 0
                if asked or due or saver.best_so_far(metrics):
                    seconds = saver.save(learner, step + 1, metrics, wait=asked)
                    events.event("checkpoint", seconds=round(seconds, 3))
                if asked:
                    notice.saved(step + 1, seconds)
                if stop is not None and agree(rank == 0 and stop()):
                    break
    finally:
        if log is not None:
            log.close()


def await_reference(
    job: Job,
    rows: Rows,
    positions: np.ndarray,
    attempt: int,
    score: Callable[[np.ndarray], None] | None,
    beat: Callable[[], None],
) -> None:
    """Return once the reference has scored these rows: by `score`, or by whoever does so beside training.

    Nobody scores for an attempt (its number) that is superseded or whose driver is gone: raises lease.Superseded. Raises
    UserError where scoring ended with an error, StorageFailed.
    """
    folder = job.reference or job.states
    patient = partial(patiently, root=job.run, seconds=job.config.checkpoint.patience, beat=beat)
    while len(unscored := patient(partial(rows.unscored, positions))):
        beat()
        if score is not None:
            score(unscored)
            continue
        if folder is not None and (folder / REFUSED).is_file():
            reason = patient((folder / REFUSED).read_bytes)
            raise UserError(f"reference: {reason.decode(errors='replace').strip()}")
        patient(partial(confirm, job.run, attempt, job.owner))
        time.sleep(0.2)


@contextmanager
def _closed(learner: Learner) -> Iterator[None]:
    """Close it in the end. Where training failed, that error is told: what broke it, a lost peer, say, often breaks closing, too."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            learner.close()
        raise
    learner.close()


def _news(before: Mapping[str, Any] | None, step: int) -> str | None:
    """What a person wants to know of a start that is not the first."""
    if before is None:
        return None
    now = dist.get_world_size()
    resized = "" if before["workers"] == now else f"{before['workers']} → {now} workers, "
    return f"{resized}continuing at step {step}"


def _step(
    job: Job, learner: Learner, rows: Rows, split: Split, plan: Plan, step: int, watch: Watch
) -> dict[str, float]:
    """Step number `step` (from 0): its rows, its update, and the evaluation that is due after it."""
    config, started = job.config, time.monotonic()
    chosen = split.train[plan.positions(step)]
    batches = list(_my_batches(chosen, rows, config, learner, watch.carried, step))
    try:
        metrics = train_step(learner, config.objective, batches, step, plan.total_steps)
    except Diverged as error:
        metrics = watch.skip(Diverged(f"step {step + 1}: {error}"))
    seconds = time.monotonic() - started
    metrics |= {
        "tokens_per_second": float(rows.lengths[chosen].sum()) / seconds,
        "rows_per_second": len(chosen) / seconds,
        "epoch": (step + 1) / plan.steps_per_epoch,
    }
    if len(split.eval) and plan.evaluates_after(step):
        sums = Sums()
        held = _my_batches(split.eval, rows, config, learner, watch.carried, step)
        with learner.evaluating():
            held_out.add_batches(sums, learner.evaluate, config.objective, held)
        metrics |= held_out.means(sums)
    return metrics


def _my_batches(
    chosen: np.ndarray, rows: Rows, config: RunConfig, learner: Learner, carried: Mapping[str, float], step: int
) -> Iterator[Batch]:
    """This rank's micro-batches of the chosen rows, each read when it is asked for."""
    tokens, budget = rows.lengths[chosen] + learner.places, config.train.tokens_per_micro_batch
    costs = None if learner.padded else costs_of(tokens, rows.trained_tokens(chosen), learner.head_share)
    world = dist.get_world_size()
    # Ray Train starts no more workers than `most_workers`; other launchers may.
    most = max(world, config.scaling.most_workers)
    dealt = micro_batches(chosen, tokens, world, budget, learner.padded, costs, most)
    for micro in dealt[dist.get_rank()]:
        # Random numbers are a function of where we are: a checkpoint has none to save, and a resize draws the same.
        seed = hash((config.seed, step, micro.rows[0])) % 2**63
        yield replace(collate(rows.take(micro)), carried=carried, seed=seed).to(learner.device)


# ------------------------------------------------------------------------------------------------- parts


class Watch:
    """What a step means for the next one: values to carry over, alarms to raise once, steps that may be left out."""

    def __init__(self, objective: Objective, before: Mapping[str, float], may_skip: int = 0) -> None:
        self._names, self._alarms = objective.needed().carried, list(objective.alarms)
        self.carried: dict[str, float] = {name: before[name] for name in self._names if name in before}
        self._may_skip, self._skipped = may_skip, 0

    def skip(self, error: Diverged) -> dict[str, float]:
        """Metrics of a step that is left out, weights being as before; raises `error` after too many in a row."""
        if self._skipped == self._may_skip:
            raise error
        self._skipped += 1
        if dist.get_rank() == 0:
            logger.warning("%s; the step is left out (train.skip_nan)", error)
        return {"skipped": 1.0}

    def note(self, metrics: Mapping[str, float]) -> None:
        """Keep what the next step wants, and warn of metrics that left their range."""
        if "skipped" not in metrics:
            self._skipped = 0
        self.carried |= {name: metrics[name] for name in self._names if name in metrics}
        for alarm in list(self._alarms):
            value = metrics.get(alarm.metric)
            if value is not None and not alarm.low <= value <= alarm.high:
                self._alarms.remove(alarm)
                if dist.get_rank() == 0:
                    logger.warning("%s is %.4g: %s", alarm.metric, value, alarm.advice)
