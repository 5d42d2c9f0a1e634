"""Checkpoints that are written while training goes on: copies of their moment, one at a time, whole or not there."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline import checkpoint, patience, saver
from pipeline.checkpoint import Corrupt
from pipeline.config import CheckpointConfig
from pipeline.durable import digest_file
from pipeline.fencing import Attempt
from pipeline.lease import Superseded
from pipeline.patience import StorageFailed
from pipeline.saver import Saver
from pipeline.watchdog import STATUS

FILES = ["weights-00001-of-00001.safetensors", "moments-00001-of-00001.safetensors"]


class Trained:
    """What a saver asks of a learner."""

    def __init__(self, files: list[str] = FILES) -> None:
        self.weight, self._files, self.steps = torch.zeros(3), files, 0

    def train(self) -> None:
        self.weight += 1
        self.steps += 1

    def parts(self, copied: bool) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for name in FILES:
            yield name, {"w": self.weight.clone() if copied else self.weight}

    def files(self) -> list[str]:
        return self._files

    def updates(self) -> dict[str, int]:
        return {"policy": self.steps}


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Tensors reach the disk when this is set."""
    ready, real = threading.Event(), checkpoint.write_tensors

    def write(path: Path, tensors: dict[str, torch.Tensor], *rest: object) -> None:
        assert ready.wait(20)
        real(path, tensors, *rest)

    monkeypatch.setattr(checkpoint, "write_tensors", write)
    return ready


def begin(run: Path, **settings) -> Saver:
    return Saver(run, CheckpointConfig(**settings), Attempt.begin(run), None)


def save_once(run: Path, learner: Trained, error: Exception | None = None, **settings) -> None:
    """A training with one checkpoint, after which it fails with `error`."""
    with begin(run, **settings) as own:
        own.save(learner, 1, {})
        if error is not None:
            raise error


def saved(run: Path) -> dict[int, float]:
    """Step → the value of its weights."""
    found = {}
    for folder in checkpoint.saved(run):
        checkpoint.verify(folder)
        tensors = dict(checkpoint.read_weights(folder))
        assert torch.equal(tensors["w"], dict(checkpoint.read_tensors(folder, "moments"))["w"])
        found[checkpoint.read_state(folder)["step"]] = tensors["w"][0].item()
    return found


def test_training_goes_on_and_the_copy_is_of_its_moment(run: Path, disk: threading.Event) -> None:
    learner = Trained()
    with begin(run) as own:
        learner.train()
        assert own.save(learner, 1, {"loss": 0.5}) < 1, "save waits for the disk"
        learner.train()
        own.poll()
        assert own.busy and saved(run) == {}, "it is not there before it is whole"
        disk.set()
    assert saved(run) == {1: 1.0}
    state = checkpoint.read_state(checkpoint.path_of(run, 1))
    assert (state["updates"], state["metrics"]) == ({"policy": 1}, {"loss": 0.5})


def test_at_most_one_is_under_way_and_the_last_one_is_waited_for(run: Path, disk: threading.Event) -> None:
    learner = Trained()
    with begin(run) as own:
        own.save(learner, 1, {})
        threading.Timer(0.3, disk.set).start()
        learner.train()
        began = time.monotonic()
        own.save(learner, 2, {})
        assert time.monotonic() - began > 0.2, "the second one has to wait for the first"
        assert 1 in saved(run)
    assert saved(run) == {1: 0.0, 2: 1.0}


@pytest.mark.parametrize("how", ["wait", "in step"])
def test_it_is_there_when_somebody_waits(run: Path, how: str) -> None:
    with begin(run, in_background=how == "wait", keep=1) as own:
        for step in (1, 2):
            own.save(Trained(), step, {}, wait=how == "wait")
            assert list(saved(run)) == [step], "older ones are pruned"


def broken(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> None:
    """The first `times` files cannot be written."""
    real, left = checkpoint.write_tensors, [None] * times

    def write(path: Path, tensors: dict[str, torch.Tensor], *rest: object) -> None:
        if left:
            left.pop()
            raise OSError(number, "said the disk")
        real(path, tensors, *rest)

    monkeypatch.setattr(patience, "PAUSES", (0.01,))
    monkeypatch.setattr(checkpoint, "write_tensors", write)


def test_a_disk_with_room_again_gets_the_same_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, errno.ENOSPC, times=5)
    learner = Trained()
    with begin(run, patience=20) as own:
        own.save(learner, 1, {})
        learner.train()
    assert saved(run) == {1: 0.0}


def until_done(own: Saver) -> None:
    while own.busy:
        time.sleep(0.01)


def test_what_goes_wrong_surfaces_at_the_next_step_and_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begin(run) as own:
        own.save(Trained(), 1, {})
    broken(monkeypatch, errno.ENOSPC, times=10**6)
    own = begin(run, patience=0.05)
    own.save(Trained(), 2, {})
    until_done(own)
    with pytest.raises(StorageFailed, match=r"said the disk.*free some space"):
        own.poll()
    assert saved(run) == {1: 0.0}
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"], "it takes no space"


def test_an_error_in_the_very_moment_of_asking_is_not_lost(run: Path) -> None:
    class Ending(saver.Write):
        """It fails while it is asked about."""

        @property
        def done(self) -> bool:
            self.error = StorageFailed("the disk is full")
            return True

        @done.setter
        def done(self, value: bool) -> None:
            pass

    own = begin(run)
    own._write = Ending([], saver.Place(run / "step", run, 1, 0.0), None)
    with pytest.raises(StorageFailed, match=r"^the disk is full$"):
        own.poll()


def test_an_error_of_our_own_names_itself(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, errno.EACCES, times=1)
    with pytest.raises(RuntimeError, match=r"^a checkpoint could not be written: PermissionError: .*said the disk"):
        save_once(run, Trained())


@pytest.mark.parametrize("background", [True, False])
def test_a_newer_attempt_supersedes(run: Path, background: bool) -> None:
    learner = Trained()
    learner.updates = lambda: {"policy": Attempt.begin(run).number}  # asked for while a checkpoint is being begun
    with pytest.raises(Superseded, match="attempt 2 has taken over"):
        save_once(run, learner, in_background=background)
    assert saved(run) == {}


def test_a_training_that_fails_keeps_the_checkpoint_under_way(run: Path, disk: threading.Event) -> None:
    threading.Timer(0.2, disk.set).start()
    with pytest.raises(ZeroDivisionError):
        save_once(run, Trained(), ZeroDivisionError())
    assert saved(run) == {1: 0.0}


def test_a_training_that_fails_says_so_whatever_the_disk_says(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken(monkeypatch, errno.ENOSPC, times=10**6)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        save_once(run, Trained(), ZeroDivisionError(), patience=60)
    assert time.monotonic() - began < 10, "nobody waits for a disk any more"
    assert "the checkpoint under way was not saved" in caplog.text


def test_files_that_never_come(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank that writes to a disk of its own."""
    monkeypatch.setattr(saver, "LONELY_SECONDS", 0.1)
    with pytest.raises(Corrupt, match=r"weights-2 did not come; is the storage shared by all workers\?"):
        save_once(run, Trained([*FILES, "weights-2"]))
    assert saved(run) == {}


def test_a_failed_write_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.write_tensors(tmp_path / "nowhere" / "weights.safetensors", {"w": torch.zeros(1)})


def best_after(run: Path, metric: str | None, values: list[float], resume: Path | None = None) -> Saver:
    """A training that evaluates `values`, one a step behind `resume`'s, and saves where the saver says so."""
    settings = CheckpointConfig(best=metric, keep=1)
    with Saver(run, settings, Attempt.begin(run), resume) as own:
        for step, value in enumerate(values, start=own.step + 1):
            metrics = {"loss": 1.0, "eval/loss": value}
            if own.best_so_far(metrics):
                own.save(Trained(), step, metrics, wait=True)
        own.save(Trained(), own.step + len(values), {"loss": 0.5}, wait=True)
    return own


@pytest.mark.parametrize(
    ("metric", "best"), [("eval/loss", 3), ("-eval/loss", 5), ("−eval/loss", 5), (None, None), ("loss", 6)]
)
def test_the_best_evaluation_is_saved_and_kept(run: Path, metric: str | None, best: int | None) -> None:
    """What is not finite is never best, wherever it comes; of a metric of training, a checkpoint that is due is."""
    best_after(run, metric, [math.nan, 2.0, 1.0, -math.inf if metric == "eval/loss" else math.inf, 3.0, 2.5])
    assert sorted(saved(run)) == sorted({best or 6, 6})
    found = checkpoint.best(run)
    assert found == (None if best is None else checkpoint.path_of(run, best))


def test_a_resume_knows_the_best_and_another_metric_begins_anew(run: Path) -> None:
    best_after(run, "eval/loss", [2.0, 1.0, 3.0])
    best_after(run, "eval/loss", [1.5, 1.2], checkpoint.latest(run))
    assert checkpoint.best(run) == checkpoint.path_of(run, 2)
    best_after(run, "-eval/loss", [1.4, 1.3], checkpoint.latest(run))
    assert checkpoint.best(run) == checkpoint.path_of(run, 6)


def test_a_best_that_is_no_number_is_forgotten(run: Path) -> None:
    best_after(run, "eval/loss", [2.0])
    newest = checkpoint.latest(run)
    state = checkpoint.read_state(newest) | {"best": {"step": 1, "value": math.nan}}
    checkpoint.finish(newest, state)
    best_after(run, "eval/loss", [5.0], checkpoint.latest(run))
    assert checkpoint.best(run) == checkpoint.path_of(run, 2)


def test_a_file_is_what_safetensors_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, in blocks whose size divides nothing; empty tensors, scalars and names beyond ASCII included."""
    from safetensors.torch import save

    tensors = {"b": torch.randn(5, 7), "a": torch.randn(3), "é": torch.zeros(0, 4), "c": torch.tensor(1.5)}
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 17)
    path, beats = tmp_path / "weights.safetensors", []
    checkpoint.write_tensors(path, tensors, lambda: beats.append(1))
    assert path.read_bytes() == save(tensors)
    assert len(beats) == 1 + math.ceil(4 * 3 / 17) + math.ceil(4 * 35 / 17) + 1, "the header, and each block"
    sealed = json.loads((tmp_path / "weights.safetensors.seal").read_text())
    assert sealed == {"size": path.stat().st_size, "xxh3": digest_file(path)}


def test_a_write_that_fails_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*weights\.safetensors"):
        checkpoint.write_tensors(tmp_path / "weights.safetensors", {"w": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["store"], "the process group's own"


@pytest.mark.parametrize("background", [True, False])
def test_slow_storage_beats_and_storage_that_hangs_does_not(
    run: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    """Two files of 16 blocks: each reaches a disk that takes its time, and the last one a disk that does not answer."""
    beats, answers, real, hangs = [], threading.Event(), os.fsync, []

    def slow(number: int) -> None:
        time.sleep(0.005)
        if len(beats) == 32:
            hangs.append(len(beats))
            assert answers.wait(20)
        real(number)

    learner = Trained()
    learner.weight = torch.zeros(16)
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 4)
    monkeypatch.setattr(checkpoint.os, "fsync", slow)
    own = Saver(run, CheckpointConfig(in_background=background), Attempt.begin(run), None, lambda: beats.append(1))
    watched = []

    def watch() -> None:
        while not hangs:
            time.sleep(0.005)
        time.sleep(0.3)
        watched.append(len(beats))
        answers.set()

    threading.Thread(target=watch).start()
    with own:
        own.save(learner, 1, {})
    assert hangs[0] == watched[0] == 32, "nothing was told while nothing was written"
    assert len(beats) >= 34
    assert list(saved(run)) == [1]


RANK = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from pipeline import checkpoint, saver
from pipeline.config import CheckpointConfig
from pipeline.durable import digest_file
from pipeline.fencing import Attempt
from pipeline.saver import Saver
from pipeline.watchdog import STATUS
from pipeline.watchdog import Watchdog

rank, run, case, background = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
meeting = dist.TCPStore("127.0.0.1", int(sys.argv[5]), 2, is_master=rank == 0)  # as Ray's workers have one
dist.init_process_group("gloo", store=meeting, rank=rank, world_size=2)
files = [f"{kind}-0000{part}-of-00002.safetensors" for part in (1, 2) for kind in ("weights", "moments")]

class Learner:
    def parts(self, copied):
        for kind in ("weights", "moments"):
            dist.barrier()  # as where parameters are gathered
            yield f"{kind}-0000{rank + 1}-of-00002.safetensors", {f"w{rank}": torch.full((16,), 1.0)}
    def files(self):
        return files
    def updates(self):
        return {"policy": 1}

checkpoint.BLOCK_BYTES, real = 4, os.fsync
def fsync(number):
    if rank == 1:
        if case == "full":
            raise OSError(28, "no space")
        time.sleep(0.08 if case == "slow" else 60)
    real(number)
store = dist.group.WORLD.get_group_store().clone()
with Watchdog(1.0, f"rank {rank}", run / "log.txt", run / f"stacks-{rank}.txt", store) as watchdog:
    attempt = Attempt.begin(run) if rank == 0 else None
    own = Saver(run, CheckpointConfig(in_background=background, patience=0), attempt, None, watchdog.beat)
    dist.barrier()
    os.fsync = fsync
    watchdog.beat()
    try:
        with own:
            own.save(Learner(), 1, {})
    except Exception as error:
        print(type(error).__name__, error, flush=True)
        os._exit(3)  # as a worker that Ray ends: gloo may wait for its peer as the interpreter shuts down
"""


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(("case", "status"), [("slow", 0), ("full", 3), ("hangs", STATUS)])
def test_ranks_wait_for_a_slow_one_but_not_for_one_that_hangs(
    tmp_path: Path, case: str, status: int, background: bool
) -> None:
    """Rank 1's disk takes 3 s, where ranks that make no progress end after one; or it is full; or it does not answer."""
    run = tmp_path / "run"
    run.mkdir()
    command, port = [sys.executable, "-c", RANK], free_port()
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(run), case, str(background), port],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [rank.communicate(timeout=200)[0] for rank in ranks]
    ends = {rank.returncode for rank in ranks}
    # Of two that hang, the second may be told by gloo that the first is gone before its own time is up.
    assert ends == {status} or (case == "hangs" and ends == {STATUS, 3}), told
    if case == "slow":
        checkpoint.verify(checkpoint.path_of(run, 1))
        assert {name for name, _ in checkpoint.read_weights(checkpoint.path_of(run, 1))} == {"w0", "w1"}
    if case == "full":
        assert all(text.startswith("StorageFailed") and "No space left" in text for text in told)
        assert checkpoint.saved(run) == []
