"""What all drills share: undisturbed runs to compare with, trainings to break, and the form of a result."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.history import History, history, order_of
from benchmarks.faults.materials import ROWS_PER_STEP, settings, write_model, write_pairs
from benchmarks.faults.runs import Training, equal
from benchmarks.nodes import ROOT, LocalCluster

NODES, CPUS = 2, 2
OWN = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SOON = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
"""A node that is gone is noticed after 3 s instead of 15."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of the table. None: the question does not arise."""

    did: str
    happened: str
    ok: bool
    seconds: float | None = None  # from the last sign of life to the next step
    repeated: int | None = None  # finished steps that were done again
    equal: bool | None = None  # final weights, to the undisturbed run's, to the last bit


Drill = Callable[["Bench"], Outcome]


@dataclass(slots=True)
class Bench:
    """Where drills happen: a context, which ends the cluster.

    Args:
        folder: takes everything.
        quick: shorter trainings, fewer kills, shorter outages.
        takes_jobs: whether the cluster has a job server.
    """

    folder: Path
    quick: bool
    takes_jobs: bool = False
    _quiet: dict[str, Training] = field(default_factory=dict)
    _cluster: LocalCluster | None = None
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def cluster(self) -> LocalCluster:
        """Made when the first drill asks for it."""
        if self._cluster is None:
            made = LocalCluster(OWN | SOON, takes_jobs=self.takes_jobs, logs=self.folder / "cluster")
            self._cluster = self._open.enter_context(made)
            for _ in range(NODES):
                self.add_node()
        return self._cluster

    def add_node(self) -> None:
        """One more node of the cluster."""
        self.cluster.add_node(CPUS)

    @property
    def steps(self) -> int:
        """Optimizer steps of a training."""
        return 24 if self.quick else 40

    @property
    def every(self) -> int:
        """Steps between checkpoints."""
        return 4 if self.quick else 5

    @contextmanager
    def training(self, name: str, *overrides: str, local: bool = False, steps: int | None = None) -> Iterator[Training]:
        """A training that is not started yet, with two ZeRO-2 workers on the cluster, or local; ended with the block."""
        self.quiet(local, steps)
        made = self._training(name, *overrides, local=local, steps=steps)
        try:
            yield made
        finally:
            made.close()

    def quiet(self, local: bool = False, steps: int | None = None) -> Training:
        """The undisturbed run, made once."""
        name = f"quiet-{'local' if local else 'cluster'}-{steps or self.steps}"
        if name not in self._quiet:
            made = self._training(name, local=local, steps=steps)
            made.start()
            made.finish()
            self._quiet[name] = made
        return self._quiet[name]

    def compare(self, training: Training, local: bool = False, steps: int | None = None) -> tuple[History, bool]:
        """What became of a finished training's steps, and whether its weights are the undisturbed run's."""
        quiet = self.quiet(local, steps)
        order = order_of(quiet.processes(), 1 if local else 2)
        return history(training.processes(), order), equal(training.weights(), quiet.weights())

    def _training(self, name: str, *overrides: str, local: bool, steps: int | None = None) -> Training:
        count = steps or self.steps
        environment = dict(self.environment) if local else self.cluster.environment
        workers = [] if local else ["scaling.workers=2", "scaling.max_failures=-1"]
        given = settings(self.model, self.folder / f"pairs-{count}.jsonl", count, self.every)
        made = Training(self.folder / name, given, environment, [*workers, "objective.pause=0.15", *overrides])
        shutil.copytree(self._prepared(given, count), made.storage)
        return made

    def _prepared(self, given: dict[str, Any], count: int) -> Path:
        """A storage folder with everything prepared, once: no drill of training is about that."""
        from pipeline import driver
        from pipeline.config_file import validate

        storage = self.folder / f"prepared-{count}"
        if not storage.exists():
            write_pairs(self.folder / f"pairs-{count}.jsonl", count * ROWS_PER_STEP // 2)  # two epochs
            driver.prepare(validate(given | {"storage": str(storage)}), local=True)
        return storage

    @property
    def model(self) -> Path:
        """Where training starts from."""
        folder = self.folder / "model"
        return folder if folder.is_dir() else write_model(folder)

    @property
    def environment(self) -> dict[str, str]:
        """Of a local training."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return own | OWN | {"PYTHONPATH": str(ROOT)}
