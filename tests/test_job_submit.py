"""A job goes through `ray job submit` unchanged, against a real head with its dashboard and a token."""

from __future__ import annotations

import os
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


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment to reach a head of our own; it is ended by its process id."""
    token = tmp_path / "token"
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
        yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the session that this test started


def test_train_through_ray_job_submit(head: dict[str, str], make_config, tmp_path: Path) -> None:
    make_config()  # writes config.yaml
    submit = [str(BIN / "ray"), "job", "submit", "--working-dir", str(ROOT), "--", "python", "-m"]
    overrides = ["scaling.workers=2", "train.max_steps=2", f"storage={tmp_path / 'shared'}"]
    deadline = time.monotonic() + 120
    probe = [str(BIN / "ray"), "job", "submit", "--no-wait", "--", "true"]
    while True:  # the job server answers before the node's agent, which starts jobs, has registered with it
        probed = subprocess.run(probe, env=head, capture_output=True, text=True)
        if probed.returncode == 0:
            break
        assert time.monotonic() < deadline, probed.stderr
        time.sleep(1)
    command = [*submit, "jobs.train", str(tmp_path / "config.yaml"), *overrides]
    done = subprocess.run(command, env=head, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    run = next((tmp_path / "shared" / "runs").iterdir())
    assert (run / "export" / "model.safetensors").is_file()
    assert f"model              {run / 'export'}" in done.stdout

    failing = [*submit, "jobs.train", str(tmp_path / "config.yaml"), "objective.beta=-1"]
    refused = subprocess.run(failing, env=head, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    assert "objective.beta: input should be greater than 0" in refused.stdout + refused.stderr
