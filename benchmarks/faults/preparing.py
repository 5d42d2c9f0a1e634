"""Drill: an actor of Ray Data that is killed while records are tokenised, and while the reference scores them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.faults.bench import Bench, Outcome
from benchmarks.faults.errors import DrillError
from benchmarks.faults.materials import settings, write_pairs
from benchmarks.faults.runs import PATIENCE
from benchmarks.nodes import ROOT, kill
from pipeline.durable import digest_file
from pipeline.rows import manifest

ACTOR = "ray::MapWorker"
STAGES = {"rows": "simpo", "reference": "dpo"}
"""The folder that a stage writes, and an objective whose preparation ends with it."""


def killed_data_actor(bench: Bench) -> Outcome:
    """SIGKILL to an actor of each stage; the folders have to be those of an undisturbed run in one process."""
    folder = bench.folder / "data-actor"
    folder.mkdir()
    many, few = folder / "many.jsonl", folder / "few.jsonl"
    write_pairs(many, 20_000 if bench.quick else 60_000, words=30)
    write_pairs(few, 300 if bench.quick else 1500, words=60)
    equal, seconds = True, 0.0
    for stage, objective in STAGES.items():
        config = folder / f"{stage}.json"
        given = settings(bench.model, few if stage == "reference" else many, 1, 1) | {"objective": {"name": objective}}
        given["data"]["max_length"] = 512
        config.write_text(json.dumps(given))
        _prepare(bench, config, folder / f"quiet-{stage}", local=True).wait(PATIENCE)
        began = time.monotonic()
        disturbed = _prepare(bench, config, folder / f"killed-{stage}")
        _kill_an_actor(bench, folder / f"killed-{stage}", stage, disturbed)
        if disturbed.wait(PATIENCE):
            raise DrillError(f"prepare ended with status {disturbed.returncode}; see {folder}/killed-{stage}.log")
        seconds = max(seconds, time.monotonic() - began)
        equal &= _made(folder / f"killed-{stage}", stage) == _made(folder / f"quiet-{stage}", stage)
    happened = f"its piece went to another actor; same rows, same log-probs; {seconds:.0f} s in all"
    return Outcome("SIGKILL to an actor of `tokenise` and of `reference`", happened, equal, equal=equal)


def _prepare(bench: Bench, config: Path, storage: Path, local: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-m", "jobs.prepare", str(config), f"storage={storage}", *(["--local"] if local else [])]
    environment = bench.environment if local else bench.cluster.environment
    with storage.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def _kill_an_actor(bench: Bench, storage: Path, stage: str, driver: subprocess.Popen) -> None:
    """Once the stage has written its first part."""
    until = time.monotonic() + PATIENCE
    while not list(storage.glob(f"cache/{stage}-*/**/part-*.arrow")):
        if time.monotonic() > until or driver.poll() is not None:
            raise DrillError(f"{stage}: no part was written; see {storage}.log")
        time.sleep(0.01)
    actors = bench.cluster.find(ACTOR)
    finished = list(storage.glob(f"cache/{stage}-*/**/manifest.json"))
    if not actors or finished:
        raise DrillError(f"{stage}: was over before an actor could be killed; give it more records")
    kill(actors[:1])


def _made(storage: Path, stage: str) -> dict[str, str]:
    """The checksums of a finished folder's parts; the folder's own name says what they are made of."""
    (finished,) = storage.glob(f"cache/{stage}-*/**/manifest.json")
    folder = finished.parent
    return {str((folder / n).relative_to(storage)): digest_file(folder / n) for n in manifest(folder)["parts"]}
