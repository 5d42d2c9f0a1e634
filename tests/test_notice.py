"""A worker that is told to end saves at the end of its step; a second signal ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint, driver, notice
from pipeline.distributed import process_group
from pipeline.errors import Leaving
from pipeline.loop import train_worker
from pipeline.notice import Notice
from pipeline.progress import METRICS_FILE, read_metrics

CPU = torch.device("cpu")


@pytest.fixture
def group(make_config):
    with process_group(make_config()):
        yield


def test_nothing_is_due_unless_somebody_says_so(group) -> None:
    with Notice(CPU) as heard:
        assert not heard.due()


def test_sigterm_is_due_and_answered_by_leaving(group) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Notice(CPU) as heard:
        signal.raise_signal(signal.SIGTERM)
        assert heard.due()
        with pytest.raises(Leaving, match="SIGTERM: step 7 is saved"):
            heard.saved(7, 0.1)
    assert signal.getsignal(signal.SIGTERM) is before
    with Notice(CPU) as again:
        assert not again.due(), "a notice is for one training"


def test_a_second_sigterm_does_what_it_did_before(group) -> None:
    told = []
    before = signal.signal(signal.SIGTERM, lambda *_: told.append("before"))
    try:
        with Notice(CPU):
            signal.raise_signal(signal.SIGTERM)
            assert told == []
            signal.raise_signal(signal.SIGTERM)
            assert told == ["before"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_resize_waits_for_the_checkpoint(group) -> None:
    assert notice.save_before_resize(0.0), "nothing is being trained"
    answers = []
    asker = threading.Thread(target=lambda: answers.append(notice.save_before_resize(20)))
    with Notice(CPU) as heard:
        asker.start()
        while not heard.due():
            time.sleep(0.01)
        assert answers == []
        with pytest.raises(Leaving, match="another number of workers: step 3 is saved"):
            heard.saved(3, 0.1)
        assert answers == [], "before the training has ended nothing may be ended"
    asker.join()
    assert answers == [True]
    with Notice(CPU):
        assert not notice.save_before_resize(0.01), "the step did not end in time"


def test_a_drained_node_is_trained_on_and_saved_again_and_again(group, monkeypatch, caplog) -> None:
    now = [1000.0]
    monkeypatch.setattr(notice.time, "monotonic", lambda: now[0])
    words: list[str | None] = [None]
    with Notice(CPU, lambda: words[0]) as heard:
        assert not heard.due()
        words[0] = "the node of rank 1 goes in 30 s"
        assert not heard.due(), "Ray is asked every two seconds only"
        now[0] += notice.DRAIN_POLL_SECONDS
        assert heard.due()
        heard.saved(5, seconds=2.0)
        assert not heard.due()
        now[0] += 17.9
        assert not heard.due()
        now[0] += 0.2  # a save of 2 s takes a tenth of the time
        assert heard.due()
        assert caplog.text.count("the node of rank 1 goes in 30 s; saving now") == 1
        words[0] = None
        now[0] += notice.DRAIN_POLL_SECONDS
        assert not heard.due(), "it goes no more"


@pytest.mark.slow
def test_a_run_that_is_told_to_end_goes_on_from_that_very_step_bit_for_bit(make_config, tmp_path: Path) -> None:
    """In this process: SIGTERM in step 4 of 9, with no checkpoint due before the end."""
    changes = ("train.epochs=3", "checkpoint.every=100")
    quiet = driver.fit(make_config(*changes), local=True)
    config = make_config(*changes, f"storage={tmp_path / 'told'}")
    prepared = driver.prepare(config, local=True)
    run, _ = driver.open_run(config, prepared)

    def tell() -> bool:  # asked after each step
        if len(read_metrics(run / METRICS_FILE)) == 3:
            signal.raise_signal(signal.SIGTERM)
        return False

    with pytest.raises(Leaving):
        train_worker(driver.job_for(config, prepared, run).plain(), tell)
    assert [folder.name for folder in checkpoint.saved(run)] == ["step-00000004"]
    told = driver.fit(config, local=True)
    assert told.run == run
    assert [line["step"] for line in read_metrics(run / METRICS_FILE)] == list(range(1, 10))
    expected = dict(checkpoint.read_weights(checkpoint.saved(quiet.run)[-1]))
    for name, tensor in checkpoint.read_weights(checkpoint.saved(run)[-1]):
        assert torch.equal(tensor, expected[name]), name


DRIVER = """
import sys
from jobs.cli import main
sys.exit(main(["train", *sys.argv[1:], "--local"]))
"""


@pytest.mark.slow
def test_the_command_line_saves_on_sigterm_and_says_so(make_config, tmp_path: Path) -> None:
    make_config()
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    command = [
        sys.executable,
        str(script),
        str(tmp_path / "config.yaml"),
        "train.epochs=3000",
        "checkpoint.every=100000",
    ]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)
    runs = tmp_path / "outputs" / "runs"
    deadline = time.monotonic() + 120
    while not any(read_metrics(path) for path in runs.glob(f"*/{METRICS_FILE}")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    (run,) = runs.iterdir()
    (saved,) = checkpoint.saved(run)
    assert f"SIGTERM: step {int(saved.name[5:])} is saved; the same command continues from there" in told
