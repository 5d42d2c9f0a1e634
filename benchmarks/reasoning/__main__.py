"""Run the benchmark: `python -m benchmarks.reasoning [--quick]`. The same command again continues where it was stopped.

Two runs go on at a time: two driver processes on one Ray cluster, a CPU each. Their output is in `<storage>/reasoning/log`.
Results: `<storage>/reasoning/report.md`, `accuracy.svg` and `.png`, and one MLflow run above those of all fits.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.reasoning import report
from benchmarks.reasoning.methods import BASE, BLOCKS, SEEDS, SFT, TUNING_SEED, Block, merge
from benchmarks.reasoning.runs import Place, make_world, run_method
from pipeline import cluster, tracking
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.durable import write_json
from pipeline.errors import UserError

Scores = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run."""

    blocks: Sequence[str]
    seeds: Sequence[int]
    tuned: bool

    def runs_in(self, block: Block) -> int:
        """Worlds and runs of one block."""
        fixed = len(self.seeds) * (1 + len(block.methods))
        if not self.tuned:
            return fixed
        return fixed + 1 + sum(map(len, block.tuned.values())) + len(self.seeds) * len(block.tuned)


FULL = Plan(list(BLOCKS), SEEDS, tuned=True)


def main() -> int:
    """The command. Errors that a user can mend are one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reasoning", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed of MID, without the methods that need tuning")
    parser.add_argument("--storage", default="outputs", help="folder for all files (default: outputs)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, one CPU each (default: 2)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    name, plan = ("quick", Plan(["mid"], SEEDS[:1], tuned=False)) if options.quick else ("full", FULL)
    command = "python -m benchmarks.reasoning" + (" --quick" if options.quick else "")
    try:
        run(plan, Path(options.storage).absolute() / "reasoning" / name, options.storage, options.at_once, command)
    except BrokenProcessPool:
        print("error: a driver process died; see the logs, and repeat the command to continue", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(plan: Plan, folder: Path, storage: str, at_once: int, command: str) -> None:
    """All of `plan`, with the report in `folder` and one MLflow run above those of all fits."""
    folder.mkdir(parents=True, exist_ok=True)
    config = parent_config(storage)
    tracker = tracking.start(config, folder, f"reasoning-{folder.name}")
    tracker.log_summary({"benchmark": "reasoning"})
    tracker.last_step()  # sends what waits, so that the run exists
    parent = json.loads((folder / "tracking.json").read_text())["run_id"]
    status: tracking.Status = "FAILED"
    try:
        with drivers(config, at_once, folder.parent / "log") as pool, progress(plan) as bar:
            benchmark = Benchmark(Place(storage, parent=parent), plan, pool, bar)
            for block in plan.blocks:
                benchmark.run_block(block)
                (folder / "report.md").write_text(benchmark.page(command), encoding="utf-8")
                write_json(folder / "results.json", benchmark.results)
        for file in [folder / "report.md", *report.plot(benchmark.results, benchmark.titles, folder)]:
            tracker.log_artifact(file)
        tracker.log_summary(benchmark.summary())
        status = "FINISHED"
    finally:
        tracker.finish(status)
    print(benchmark.page(command))
    print(f"written {folder}\nmlflow  {tracker.location}")


def parent_config(storage: str) -> RunConfig:
    """Storage, tracking and one worker's share: what the benchmark itself asks of a configuration."""
    data = {"kind": "demonstration", "sources": [{"path": "unused"}]}
    return validate(merge(merge(BASE, SFT), {"storage": storage, "data": data, "model": {"path": "unused"}}))


# ---------------------------------------------------------------------------------------------- two at a time


@contextmanager
def drivers(config: RunConfig, count: int, logs: Path) -> Iterator[ProcessPoolExecutor]:
    """Processes that join this process's Ray cluster, each with a log file of its own."""
    import ray

    cluster.connect(config)
    address = ray.get_runtime_context().gcs_address
    logs.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(count, spawn, initializer=_become_driver, initargs=(address, str(logs))) as pool:
            yield pool
    finally:
        ray.shutdown()


def _become_driver(address: str, logs: str) -> None:
    """In a new process: output to a file, one thread, the parent's Ray."""
    log = os.open(f"{logs}/driver-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    import ray
    import torch

    torch.set_num_threads(1)
    os.environ.update(cluster.ENVIRONMENT)
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": cluster.WORKER_ENVIRONMENT},
    )


@contextmanager
def progress(plan: Plan) -> Iterator[tqdm]:
    """A bar over all runs; finished ones of an earlier call pass quickly."""
    total = sum(plan.runs_in(BLOCKS[name]) for name in plan.blocks)
    with tqdm(total=total, desc="runs", unit="run", mininterval=0) as bar:
        yield bar


class Benchmark:
    """Runs blocks in a pool of drivers and collects their results."""

    def __init__(self, place: Place, plan: Plan, pool: ProcessPoolExecutor, bar: tqdm) -> None:
        self._place, self._plan, self._pool, self._bar = place, plan, pool, bar
        self.results: dict[str, dict[str, list[Scores]]] = {}
        self.titles: dict[str, dict[str, str]] = {}
        self.tuning: dict[str, dict[str, float]] = {}

    def run_block(self, name: str) -> None:
        """Worlds first; then the fixed methods and the tuning; then, on fresh seeds, what the tuning chose."""
        block, seeds = BLOCKS[name], self._plan.seeds
        worlds = self._all(
            {
                (seed,): self._pool.submit(make_world, self._place, name, block, seed)
                for seed in [*seeds, *([TUNING_SEED] if self._plan.tuned else [])]
            }
        )
        models = {seed: scores["model"] for (seed,), scores in worlds.items()}
        fixed = {(m, seed): self._submit(name, block, m, {}, models, seed) for m in block.methods for seed in seeds}
        settings = {(m, i): self._tune(name, block, m, i, models) for m, i in _settings(block) if self._plan.tuned}
        found = self._all(fixed | {("tune", *key): future for key, future in settings.items()})
        validation = {(m, i): found["tune", m, i]["validation"] for m, i in settings}
        self.tuning[name] = {block.tuned[m][i].title: accuracy for (m, i), accuracy in validation.items()}
        chosen = best_settings(validation)
        found |= self._all(
            {(m, seed): self._submit(name, block, m, chosen, models, seed) for m in chosen for seed in seeds}
        )
        methods = block.all_methods(chosen)
        self.results[name] = {"sft": [worlds[seed,] for seed in seeds]}
        self.results[name] |= {method: [found[method, seed] for seed in seeds] for method in methods}
        self.titles[name] = {"sft": report.BEFORE} | {m: method.title for m, method in methods.items()}

    def page(self, command: str) -> str:
        return report.page(self.results, self.titles, self.tuning, self._plan.seeds, command)

    def summary(self) -> dict[str, float]:
        """Mean greedy accuracies, for the parent run."""
        return {
            f"{block}/{method}": report.mean(scores)
            for block, rows in self.results.items()
            for method, scores in rows.items()
        }

    def _submit(
        self, name: str, block: Block, method: str, chosen: Mapping[str, int], models: Mapping[int, str], seed: int
    ) -> Future[Scores]:
        setting = block.all_methods(chosen)[method]
        return self._pool.submit(run_method, self._place, name, setting, models[seed], seed, method)

    def _tune(self, name: str, block: Block, method: str, setting: int, models: Mapping[int, str]) -> Future[Scores]:
        return self._pool.submit(
            run_method,
            self._place,
            name,
            block.tuned[method][setting],
            models[TUNING_SEED],
            TUNING_SEED,
            f"tune-{method}-{setting}",
            validation=True,
        )

    def _all(self, futures: Mapping[tuple, Future[Scores]]) -> dict[tuple, Scores]:
        """Wait for all of them, moving the bar. A failure stops the benchmark; what is finished stays."""
        keys = {future: key for key, future in futures.items()}
        for future in as_completed(keys):
            if future.exception() is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
            scores = future.result()
            self._bar.update()
            shown = scores.get("greedy", scores.get("validation"))
            self._bar.set_postfix_str(f"{'/'.join(map(str, keys[future]))} {shown:.3f}")
        return {key: future.result() for key, future in futures.items()}


def best_settings(validation: Mapping[tuple[str, int], float]) -> dict[str, int]:
    """Of each method the setting with the best validation accuracy, the first of equals. validation: (method, setting) → it."""
    best: dict[str, int] = {}
    for (method, setting), accuracy in sorted(validation.items()):
        if method not in best or accuracy > validation[method, best[method]]:
            best[method] = setting
    return best


def _settings(block: Block) -> list[tuple[str, int]]:
    return [(method, place) for method, tried in block.tuned.items() for place in range(len(tried))]


if __name__ == "__main__":
    from benchmarks.reasoning import __main__ as program

    sys.exit(program.main())
