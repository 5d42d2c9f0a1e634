"""What a run is doing, and why it waits: read from its folder, and from the Ray that it runs on.

    qalign train CONFIG --status

Changes nothing, and needs neither the driver nor Ray to be alive: a run's state is in its files.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline import checkpoint, run_log
from pipeline.config import RunConfig
from pipeline.durable import Corrupt, read_json, recall_json
from pipeline.export import EXPORT, RUN_FILE, run_settings
from pipeline.progress import ERROR_FILE, LOG_FILE, METRICS_FILE, RAY_FILE, read_error, read_metrics, summarise
from pipeline.redaction import sealed
from pipeline.waiting import cluster_lines

MEANING = ("data", "objective", "optimizer", "seed")
"""Sections that have to be equal for a folder to be this configuration's run, and `critic` and `latent` where the objective has
one; of `train` the keys of `LENGTH`, of `model` all but those of `MANNER`."""
MANNER = ("reference_states", "activation_checkpointing", "trust_remote_code")
"""How a model is computed, not what."""
LENGTH = ("epochs", "max_steps", "rows_per_step")
QUIET_SECONDS = 60.0
"""A driver and its workers are heard of more often than this."""
LAST_LINES = 3
REMEDY = "the command that trains this run writes it anew"

logger = logging.getLogger(__name__)


def find_run(config: RunConfig) -> Path | None:
    """The newest run of this configuration, or None: nothing is prepared or computed to know."""
    return next((run for run in _runs(config) if _is_of(config, run)), None)


def _runs(config: RunConfig) -> list[Path]:
    """All runs of this name, newest first."""
    files = list((Path(config.storage) / "runs").glob(f"{config.name}-*/{RUN_FILE}"))
    return [path.parent for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)]


def _is_of(config: RunConfig, run: Path) -> bool:
    try:
        return _same(config, read_json(run / RUN_FILE, run_settings, REMEDY)["config"])
    except Corrupt as error:
        logger.warning("%s", error)
        return False


def _same(config: RunConfig, other: dict[str, Any]) -> bool:
    own = sealed(config.dump())
    needs = config.objective.needed()
    extra = [*(["critic"] if needs.critic else []), *(["latent"] if needs.latent != "none" else [])]
    lengths = all(own["train"].get(key) == other["train"].get(key) for key in LENGTH)
    models = [{key: value for key, value in plain["model"].items() if key not in MANNER} for plain in (own, other)]
    same = all(own[section] == other.get(section) for section in (*MEANING, *extra))
    return lengths and same and models[0] == models[1]


@dataclass(frozen=True, slots=True)
class Rank:
    """The last that was heard of a rank."""

    rank: int
    event: str
    step: int | None
    age: float  # seconds


def describe(config: RunConfig) -> str:
    """The whole report, for people."""
    run = find_run(config)
    if run is None:
        text = (
            f"no run of this configuration in {config.storage}/runs: not started, or its data is still being prepared"
        )
        address = os.environ.get("RAY_ADDRESS", "")
        others = [f"of other settings: {other}" for other in _runs(config)[:LAST_LINES]]
        return "\n".join([text, *others, *_ray(address if address and "://" not in address else None)])
    start, ranks = run_log.last_start(run), ranks_of(run)
    state, explanation = state_of(run, start, ranks)
    lines = [f"run         {run}", f"state       {state}{explanation}"]
    if start is not None:
        lines += _progress(run, start)
        lines.append(f"workers     {_workers(config, start, ranks)}")
        lines.append(f"attempts    {start['attempt']}")
    lines.append(f"checkpoint  {_checkpoint(run)}")
    lines += [f"log         {line}" for line in _tail(run / LOG_FILE)]
    if state in ("waiting", "training", "loading"):
        noted = run / RAY_FILE
        lines += _ray(recall_json(noted, lambda told: str(told["address"]), "left out"))
    return "\n".join(lines)


def state_of(run: Path, start: dict[str, Any] | None, ranks: list[Rank]) -> tuple[str, str]:
    """finished, failed, stopped, waiting, loading or training; and what to add."""
    if (run / EXPORT).is_dir():
        return "finished", f": {run / EXPORT}"
    driver = _age(run / "lease")
    if driver is None or driver > QUIET_SECONDS:
        if (run / ERROR_FILE).is_file():
            return "failed", f": {read_error(run) or f'see {run / run_log.FOLDER}'}"
        return "stopped", ": no driver is alive; the same command continues"
    if start is None or not ranks or all(rank.event in ("end", "left", "failed") for rank in ranks):
        return "waiting", ": for workers to start"
    silent = [rank for rank in ranks if rank.age > QUIET_SECONDS]
    if any(rank.event == "start" for rank in ranks):
        return "loading", f": {len(ranks)} workers start, for {_span(max(rank.age for rank in ranks))}"
    if silent:
        slowest = max(silent, key=lambda rank: rank.age)
        return "training", f", but nothing was heard of rank {slowest.rank} for {_span(slowest.age)}"
    return "training", ""


def ranks_of(run: Path) -> list[Rank]:
    """The ranks of the newest attempt."""
    last = {}
    for path in sorted((run / run_log.FOLDER).glob("rank-*.jsonl")):
        for event in run_log.read_events(path):
            if event["event"] != "log":
                last[path] = event
    newest = max((event["attempt"] or 0 for event in last.values()), default=0)
    now = time.time()
    return [
        Rank(event["rank"], event["event"], event["step"], now - datetime.fromisoformat(event["time"]).timestamp())
        for event in last.values()
        if event["attempt"] == newest
    ]


def _progress(run: Path, start: dict[str, Any]) -> list[str]:
    lines = read_metrics(run / METRICS_FILE)
    if not lines:
        return [f"step        0 of {start['total_steps']}"]
    age = _age(run / METRICS_FILE) or 0.0
    return [
        f"step        {lines[-1]['step']} of {start['total_steps']}, {_span(age)} ago",
        f"metrics     {summarise(lines[-1])}",
    ]


def _workers(config: RunConfig, start: dict[str, Any], ranks: list[Rank]) -> str:
    steps = [rank.step for rank in ranks if rank.step is not None]
    wanted = f"{config.scaling.least_workers} to {config.scaling.most_workers}" if config.scaling.elastic else ""
    apart = f", at steps {min(steps)} to {max(steps)} when last heard of" if steps and min(steps) < max(steps) else ""
    return f"{start['workers']}{f' of {wanted}' if wanted else ''}{apart}"


def _checkpoint(run: Path) -> str:
    saved = checkpoint.saved(run)
    if not saved:
        return "none yet"
    return f"step {int(saved[-1].name[5:])}, {_span(_age(saved[-1]) or 0.0)} ago"


def _tail(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-LAST_LINES:] if path.is_file() else []


def _ray(address: str | None) -> list[str]:
    if address is None:
        return ["ray         its address is not known here"]
    return [f"ray         {line}" for line in cluster_lines(address)]


def _age(path: Path) -> float | None:
    return max(0.0, time.time() - path.stat().st_mtime) if path.exists() else None


def _span(seconds: float) -> str:
    """12 s, 3 min, 5 h, 2 days."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} days"
