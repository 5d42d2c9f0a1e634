"""A job goes through `ray job submit` unchanged, against a real head with its dashboard and a token."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment to reach a head of our own, which accepts jobs; it is ended by its process id."""
    token = tmp_path_factory.mktemp("head") / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    port, dashboard = free_port(), free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir=/tmp/qalign-{port}"]
    command += [f"--ray-client-server-port={free_port()}", "--object-store-memory=300000000"]
    # Without a port of its own the agent takes a fixed one, and where another Ray has it no job is ever accepted.
    command += ["--dashboard-agent-listen-port=0"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        environment |= {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        _await_agent(environment)
        yield environment
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the session that this test started


def _await_agent(environment: dict[str, str]) -> None:
    """The job server answers before the node's agent, which starts jobs, has registered with it."""
    deadline = time.monotonic() + 300  # a busy machine takes minutes
    probe = [str(BIN / "ray"), "job", "submit", "--no-wait", "--", "true"]
    while (probed := subprocess.run(probe, env=environment, capture_output=True, text=True)).returncode:
        assert time.monotonic() < deadline, probed.stderr
        time.sleep(1)


def submit(head: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` of `python -m COMMAND` in this repository, to its end."""
    job = [str(BIN / "ray"), "job", "submit", "--working-dir", str(ROOT), "--", "python", "-m", *command]
    return subprocess.run(job, env=head, cwd=ROOT, capture_output=True, text=True, timeout=400)


def test_train_through_ray_job_submit(head: dict[str, str], make_config, tmp_path: Path) -> None:
    make_config()  # writes config.yaml
    overrides = ["scaling.workers=2", "train.max_steps=2", f"storage={tmp_path / 'shared'}"]
    done = submit(head, "jobs.train", str(tmp_path / "config.yaml"), *overrides)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    run = next((tmp_path / "shared" / "runs").iterdir())
    assert (run / "export" / "model.safetensors").is_file()
    assert f"model              {run / 'export'}" in done.stdout

    refused = submit(head, "jobs.train", str(tmp_path / "config.yaml"), "objective.beta=-1")
    assert refused.returncode != 0
    assert "objective.beta: input should be greater than 0" in refused.stdout + refused.stderr

    lost = submit(head, "jobs.train", str(tmp_path / "config.yaml"), "train.max_steps=2", "storage=outputs")
    assert lost.returncode != 0
    assert "storage: " in lost.stdout and "lies in Ray's copy of the job's working directory" in lost.stdout


def test_sweep_through_ray_job_submit(head: dict[str, str], make_config, tmp_path: Path) -> None:
    make_config()
    space = ["sweep.space.objective.beta=[0.1,0.5]", "sweep.metric=eval/accuracy", "data.eval_fraction=0.25"]
    storage = tmp_path / "shared"
    done = submit(head, "tune.sweep", str(tmp_path / "config.yaml"), *space, "train.max_steps=2", f"storage={storage}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for name, beta in (("001", "0.1"), ("002", "0.5")):  # lines where a trial's state changes, instead of a live table
        for state in ("running", "finished"):
            assert re.search(rf"^trial {name} \[beta={beta}\] step \d .*{state}$", done.stdout, re.MULTILINE), (
                done.stdout
            )
    (folder,) = (storage / "sweeps").iterdir()
    assert f"sweep              {folder}" in done.stdout
    states = [json.loads(line)["state"] for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert sorted(states) == ["finished", "finished", "running", "running"]
    assert (folder / "sweep.html").stat().st_size > 10_000


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_who_has_no_token_or_a_wrong_one_is_refused(head: dict[str, str], tmp_path: Path, mode: str) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    trace = tmp_path / "trace"
    stranger = head | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(wrong)}
    command = [str(BIN / "ray"), "job", "submit", "--no-wait", "--", "touch", str(trace)]
    told = subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=120)
    assert told.returncode != 0
    assert re.search(r"401|403|[Uu]nauthori[sz]ed|[Aa]uthenticat|token", told.stdout + told.stderr), told.stderr
    assert not trace.exists()
