"""Ray Train for real: two ZeRO workers, a worker that is killed, a driver that is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

from pipeline import checkpoint
from pipeline.driver import fit
from pipeline.progress import METRICS_FILE, read_metrics
from pipeline.ray_train import TrainingFailed

pytestmark = pytest.mark.ray


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run)
    assert newest is not None
    return dict(checkpoint.read_weights(newest))


TWO = ("scaling.workers=2", "train.epochs=3", "checkpoint.every=2")


def kill_one_worker(run: Path, after_step: int) -> None:
    """SIGKILL a training worker of this machine once `after_step` is logged (a line of the run's metrics)."""
    deadline = time.monotonic() + 120
    while not any(line["step"] >= after_step for line in read_metrics(run / METRICS_FILE)):
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.05)
    victims = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    assert victims, "no training worker found"
    os.kill(victims[0].pid, signal.SIGKILL)


def test_two_workers_equal_one_process_and_survive_a_killed_worker(
    make_config, ray_cluster, tmp_path: Path, monkeypatch
) -> None:
    import threading

    alone = fit(make_config("train.epochs=3"), local=True)
    quiet = fit(make_config(*TWO, f"storage={tmp_path / 'quiet'}"))
    lines, expected = read_metrics(quiet.run / METRICS_FILE), read_metrics(alone.run / METRICS_FILE)
    for one, other in zip(lines, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
    for name, tensor in weights(alone.run).items():
        torch.testing.assert_close(weights(quiet.run)[name], tensor, atol=5e-4, rtol=1e-3)

    config = make_config(*TWO, f"storage={tmp_path / 'killed'}")
    run = tmp_path / "killed" / "runs" / quiet.run.name
    killer = threading.Thread(target=kill_one_worker, args=(run, 3))
    killer.start()
    killed = fit(config)
    killer.join()
    assert killed.run == run
    assert int((run / "attempt").read_text().split()[0]) >= 2, "the worker was not killed while it trained"
    for name, tensor in weights(quiet.run).items():
        assert torch.equal(tensor, weights(run)[name]), name
    assert [line["step"] for line in read_metrics(run / METRICS_FILE)] == list(range(1, 10))


DRIVER = """
import sys
import tempfile
from pipeline.config_file import load
from pipeline.driver import fit
fit(load(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_killed_driver_is_continued_by_the_same_command_bit_for_bit(make_config, tmp_path: Path) -> None:
    quiet = make_config(*TWO, f"storage={tmp_path / 'quiet'}")
    config = tmp_path / "config.yaml"
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    def start(storage: str) -> subprocess.Popen:
        command = [sys.executable, str(script), str(config), *TWO, f"storage={tmp_path / storage}"]
        return subprocess.Popen(command, env=environment, cwd=Path(__file__).parent.parent)

    assert start("quiet").wait(timeout=240) == 0
    expected = next((Path(quiet.storage) / "runs").iterdir())
    run = tmp_path / "killed" / "runs" / expected.name
    driver = start("killed")
    deadline = time.monotonic() + 120
    while not any(line["step"] >= 3 for line in read_metrics(run / METRICS_FILE)):
        assert time.monotonic() < deadline
        assert driver.poll() is None
        time.sleep(0.02)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    steps_when_killed = len(list((run / "checkpoints").glob("step-*")))
    time.sleep(5)
    survivors_committed = len(list((run / "checkpoints").glob("step-*"))) - steps_when_killed
    assert survivors_committed <= 1  # at most the commit that was under way
    for process in family:
        if process.is_running():
            process.kill()
    assert start("killed").wait(timeout=240) == 0
    assert (run / "export").is_dir()
    for name, tensor in weights(expected).items():
        assert torch.equal(tensor, weights(run)[name]), name


def test_an_error_that_a_person_must_mend_ends_the_run_in_one_line(make_config, ray_cluster) -> None:
    """A learning rate that makes the loss overflow: no endless restarts, the good checkpoint stays."""
    config = make_config("optimizer.lr=1e30", "optimizer.clip=null", "scaling.workers=2", "checkpoint.every=1")
    with pytest.raises(
        TrainingFailed,
        match=r"^step \d+: the (loss|gradient's norm) is (nan|inf|-inf); lower optimizer\.lr, or check .*row ids: \[\d+",
    ):
        fit(config)


FAILING = """
import os, sys, warnings
from typing import ClassVar
from pipeline.contracts import *
class Failing(Objective):
    needs: ClassVar[Needs] = Needs(records=frozenset({"preference"}))
    def weight(self, batch): return {"a": batch.weight.sum()}
    def __call__(self, out, batch):
        secret = os.environ["PLANTED_SECRET"]
        print(secret, flush=True)
        warnings.warn(secret)
        raise ValueError(secret)
    def token_reward(self, out, batch): return out.logprobs
"""


@pytest.mark.slow
def test_a_driver_ends_in_one_line_for_any_signal_and_no_secret_is_in_rays_logs(make_config, tmp_path: Path) -> None:
    make_config()
    (tmp_path / "failing.py").write_text(FAILING)
    root, logs = Path(__file__).parent.parent, Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}",
        "PLANTED_SECRET": 'PLANTED\\quoted"ünd more\\',
        "RAY_TMPDIR": str(logs),
    }
    told = tmp_path / "told.txt"

    def start(*overrides: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "jobs.cli", "train", str(tmp_path / "config.yaml"), *TWO, *overrides]
        with told.open("wb") as out:
            return subprocess.Popen(command, env=environment, cwd=root, stdout=out, stderr=out, start_new_session=True)

    for step, (number, said) in {
        2: (signal.SIGINT, "interrupted; the same command continues from the last checkpoint"),
        5: (signal.SIGTERM, "ended by SIGTERM, behind the last checkpoint; the same command continues from there"),
    }.items():
        driver = start("train.epochs=30")
        deadline = time.monotonic() + 120
        while not any(line["step"] >= step for file in tmp_path.rglob(METRICS_FILE) for line in read_metrics(file)):
            assert time.monotonic() < deadline and driver.poll() is None, told.read_text()
            time.sleep(0.05)
        os.kill(driver.pid, number)
        assert driver.wait(timeout=60) == 128 + number
        assert told.read_text().splitlines()[-1] == said
        assert "Traceback" not in told.read_text()

    failing = start(
        "objective={name: 'failing:Failing'}",
        "scaling.max_failures=0",
        "data.prompt_template='${oc.env:PLANTED_SECRET} {prompt}'",
    )
    assert failing.wait(timeout=120) == 2
    assert "error: workers failed" in told.read_text() and "ValueError: ***" in told.read_text()
    written = [
        path for folder in (tmp_path, logs) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
    ]
    assert any("worker" in path.name for path in written), "Ray's logs are looked at"
    assert [path for path in written if b"PLANTED\\" in path.read_bytes() and path.name != "failing.py"] == []
    shutil.rmtree(logs)
