"""The server that Ray's workers on one's own machine are forked from, without Ray: its forks are what new processes would be."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.forks import ForkServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="used on Linux only")

TELL = """
import json, os, random, resource, sys
print(json.dumps({
    "name": __name__, "argv": sys.argv, "cwd": os.getcwd(), "pid": os.getpid(), "group": os.getpgid(0), "path": sys.path,
    "marked": os.environ.get("MARKED"), "inherited": os.environ.get("OF_THE_SERVER"), "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "early": "colorsys" in sys.modules, "late": "tabnanny" in sys.modules, "random": random.random(), "parent": os.getppid(),
}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    os.environ["OF_THE_SERVER"] = "yes"
    server = ForkServer({}, ["colorsys"], ["tabnanny"])
    del os.environ["OF_THE_SERVER"]
    yield server
    server.close()
    server._process.wait(10)


def start(server: ForkServer, script: Path, *arguments: str, **options) -> subprocess.Popen:
    command = [*shlex.split(server.python), str(script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def told(server: ForkServer, folder: Path, *arguments: str, **options) -> dict:
    script = folder / "tell.py"
    script.write_text(TELL)
    output, errors = start(server, script, *arguments, **options).communicate(timeout=20)
    assert not errors
    return json.loads(output)


def wait_for(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_a_fork_looks_like_a_new_python(server, tmp_path):
    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (321, 1024))

    environment = {"MARKED": "this one", "PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "added")}
    found = told(server, tmp_path, "--a", "b c", cwd=tmp_path, env=environment, preexec_fn=few_files)
    assert found["name"] == "__main__"
    assert found["argv"] == [str(tmp_path / "tell.py"), "--a", "b c"]
    assert found["cwd"] == str(tmp_path)
    assert found["marked"] == "this one"
    assert found["inherited"] is None  # the environment is the client's, all of it
    assert found["files"] == 321
    assert found["group"] == found["pid"]  # what kills its group kills nothing else
    assert found["path"][0] == str(tmp_path)
    assert str(tmp_path / "added") in found["path"]


def test_forks_share_imports_and_nothing_else(server, tmp_path):
    one, two = told(server, tmp_path), told(server, tmp_path)
    assert one["early"]
    assert one["late"]
    assert one["parent"] == two["parent"] != os.getpid()
    assert one["random"] != two["random"]


def test_each_job_has_its_own_server(server, tmp_path):
    parents = [
        told(server, tmp_path, env={**os.environ, "RAY_JOB_ID": job, "RAY_RAYLET_PID": raylet})["parent"]
        for job, raylet in [("01", "7"), ("01", "7"), ("02", "7"), ("01", "8")]
    ]
    assert parents[0] == parents[1]
    assert len(set(parents)) == 3


@pytest.mark.parametrize(("program", "status"), [("raise SystemExit(7)", 7), ("", 0), ("1 / 0", 1)])
def test_the_client_ends_as_its_worker_did(server, tmp_path, program, status):
    script = tmp_path / "end.py"
    script.write_text(program)
    process = start(server, script)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert ("ZeroDivisionError" in errors) == (status == 1)


def running(server: ForkServer, folder: Path) -> tuple[subprocess.Popen, psutil.Process]:
    """A client whose worker sleeps, and the worker."""
    script = folder / "sleep.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    client = start(server, script)
    return client, psutil.Process(int(client.stdout.readline()))


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_worker_takes_its_client_along(server, tmp_path):
    client, worker = running(server, tmp_path)
    worker.kill()
    assert client.wait(10) == -signal.SIGKILL


def test_a_killed_client_takes_its_worker_along(server, tmp_path):
    client, worker = running(server, tmp_path)
    client.kill()
    assert wait_for(lambda: gone(worker))
    assert told(server, tmp_path)["name"] == "__main__"  # the server goes on


def test_clients_that_go_away_while_the_server_imports_do_not_take_it_along(tmp_path):
    (tmp_path / "slow.py").write_text("import time; time.sleep(0.7)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        patch.chdir(tmp_path)
        slow = ForkServer({}, ["slow", "colorsys"], ["tabnanny"])
        impatient = start(slow, tmp_path / "none.py")
        whole = json.dumps({"arguments": ["none.py"], "environment": {}, "folder": "/", "open_files": 64}).encode()
        requests = [
            (b"", 0),
            (b"\x00", 3),
            ((10_000).to_bytes(8, "big") + b"{", 3),
            (len(whole).to_bytes(8, "big") + whole, 1),
        ]
        for sent, files in requests:
            with socket.socket(socket.AF_UNIX) as client, (tmp_path / "file").open("w") as file:
                client.connect(slow._address)
                if sent:
                    socket.send_fds(client, [sent], [file.fileno()] * files)
        time.sleep(0.1)
        impatient.kill()
        first = told(slow, tmp_path)
    assert first["early"]
    assert first["late"]
    assert told(slow, tmp_path)["parent"] == first["parent"]
    slow.close()
    assert slow._process.wait(10) == 0


def test_without_a_server_the_client_is_the_ordinary_python(server, tmp_path):
    closed = ForkServer({}, ["colorsys"], ["colorsys"])
    assert told(closed, tmp_path)["early"]
    closed.close()
    assert closed._process.wait(10) == 0
    found = told(closed, tmp_path, "x", cwd=tmp_path)
    assert found["argv"][1:] == ["x"]
    assert not found["early"]
    assert found["parent"] == os.getpid()  # it is the client itself
    assert not Path(closed._address).parent.exists()


def test_a_server_that_cannot_import_leaves_the_ordinary_python(tmp_path):
    broken = ForkServer({}, ["no_such_module"], [])
    broken._process.wait(20)
    assert not told(broken, tmp_path)["early"]


def test_a_server_that_is_still_importing_ends_with_its_parent(tmp_path):
    (tmp_path / "endless.py").write_text("import time; time.sleep(60)\n")
    program = (
        "import sys\nfrom pipeline.forks import ForkServer\n"
        "server = ForkServer({}, ['endless'], [])\nprint(server._process.pid, server._address)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(tmp_path)])
    found = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
    )
    pid, address = found.stdout.split()
    assert wait_for(lambda: not psutil.pid_exists(int(pid)) or gone(psutil.Process(int(pid))))
    assert not Path(address).parent.exists()


def test_the_server_ends_with_its_parent_and_its_last_worker(tmp_path):
    """The parent is killed; its worker ends by itself, then the servers do."""
    script = tmp_path / "work.py"
    script.write_text("import os, sys, time\nprint(os.getpid(), os.getppid(), flush=True)\nsys.stdin.readline()\n")
    program = (
        "import shlex, subprocess, sys\nfrom pipeline.forks import ForkServer\n"
        "server = ForkServer({}, ['colorsys'], ['colorsys'])\n"
        f"subprocess.Popen([*shlex.split(server.python), {str(script)!r}])\nprint(server._process.pid, flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    root = str(Path(__file__).parents[1])
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    lines = [parent.stdout.readline().split() for _ in range(2)]
    (first,), (worker, of_job) = sorted(lines, key=len)
    processes = [psutil.Process(int(pid)) for pid in (first, worker, of_job)]
    parent.kill()
    parent.wait()
    time.sleep(0.5)
    assert not gone(processes[1])  # a worker is Ray's to end
    parent.stdin.write("end\n")
    parent.stdin.close()
    assert wait_for(lambda: all(gone(process) for process in processes))


@pytest.mark.slow
def test_rays_ids_differ_from_fork_to_fork(tmp_path):
    """In the first thread and in others: two ranks' tasks with one id would end the actor that both ask."""
    server = ForkServer({}, ["colorsys"])
    script = tmp_path / "draw.py"
    script.write_text(
        "import sys, threading\n"
        "assert 'ray.train.torch' in sys.modules\n"
        "import ray, ray.actor\n"
        "assert ray.actor.ActorClassID is ray.ActorClassID\n"
        "draw = lambda: print(ray.ObjectRef.from_random().hex(), flush=True)\n"
        "draw()\n"
        "thread = threading.Thread(target=draw); thread.start(); thread.join()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "RAY_JOB_ID": "01"}
    drawn = [start(server, script, env=environment).communicate(timeout=60)[0].split() for _ in range(3)]
    server.close()
    server._process.wait(10)
    assert [len(ids) for ids in drawn] == [2, 2, 2]
    assert len({one for ids in drawn for one in ids}) == 6
