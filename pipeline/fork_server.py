"""The process that forks Ray's workers (`forks` says why): it imports what they need, then serves `fork_client`s.

There are two kinds of server. The first imports all but Ray, which reads what is special to a node and a job while it is imported.
For the first worker of each job it forks another one, which imports Ray as this worker would, and forks all workers of this job.
A server does nothing but fork: it has used no GPU and no thread of torch's, so that its forks are sound.

Left out: starting it, and when that makes sense (`forks`, `cluster`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

MODULES = (
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "pipeline.loop",
)
"""Without Ray: see above."""
JOB_MODULES = ("ray.train.torch", "pipeline.elastic")
REQUEST_SECONDS = 5.0
"""A client says what it wants in one go."""
JOB = ("RAY_RAYLET_PID", "RAY_JOB_ID")
"""What Ray reads from the environment while it is imported, and which no two jobs share."""


@dataclass(slots=True)
class Worker:
    """What a client asks for."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    open_files: int  # limit
    files: list[int]  # its stdin, stdout and stderr

    @property
    def job(self) -> str:
        return "-".join(self.environment.get(name, "") for name in JOB)


def _read(client: socket.socket) -> Worker | None:
    """None where the client has gone in the middle of its request."""
    files: list[int] = []
    client.settimeout(REQUEST_SECONDS)
    try:
        head, files, _, _ = socket.recv_fds(client, 8, 3)
        with client.makefile("rb") as stream:
            asked = json.loads(stream.read(int.from_bytes(head, "big")))
        if len(files) < 3:
            raise ValueError("no standard files")
        client.settimeout(None)
        return Worker(**asked, files=list(files))
    except (OSError, ValueError, TypeError):
        _close(files)
        return None


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


@dataclass(slots=True)
class Server:
    """Answers clients until its parent has gone and all its forks have ended.

    Args:
        address: path of the socket.
        listener: this socket, which clients wait at already.
        lifeline: is at its end when the parent has gone.
        job_modules: what the server of a job imports.
        of_job: whether workers are forked here, or by a server of their job.
        jobs: of each job, its server's socket and our end of that server's lifeline.
        clients: by process, who it was forked for.
    """

    address: str
    listener: socket.socket
    lifeline: int
    job_modules: Sequence[str]
    of_job: bool = False
    jobs: dict[str, tuple[str, int]] = field(default_factory=dict)
    clients: dict[int, socket.socket] = field(default_factory=dict)
    events: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def serve(self) -> Worker | Server | None:
        """None when all is over. In a fork: what it is to become."""
        woken, wake = socket.socketpair()
        for end in (woken, wake):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno())
        register = self.events.register
        register(self.listener, selectors.EVENT_READ, self._accept)
        register(self.lifeline, selectors.EVENT_READ, self._orphaned)
        register(woken, selectors.EVENT_READ, lambda: self._reap(woken))
        while self.clients or self.listener.fileno() >= 0:
            for key, _ in self.events.select():
                fork = key.data()
                if fork is not None:
                    signal.set_wakeup_fd(-1)
                    for end in (woken, wake):
                        end.close()
                    return fork
        return None

    def _accept(self) -> Worker | Server | None:
        if self.listener.fileno() < 0:  # closed by an event of the same moment
            return None
        client, _ = self.listener.accept()
        worker = _read(client)
        if worker is None:
            client.close()
            return None
        if self.of_job:
            return self._fork(worker, client)
        with client:
            if worker.job not in self.jobs:
                server = self._fork_server(worker)
                if server is not None:
                    return server
            with contextlib.suppress(OSError):
                client.sendall(f"{self.jobs[worker.job][0]}\n".encode())
        _close(worker.files)
        return None

    def _fork(self, worker: Worker, client: socket.socket) -> Worker | None:
        process = os.fork()
        if process == 0:
            client.close()
            self._leave()
            return worker
        with contextlib.suppress(OSError):  # it has gone: the next event says so
            client.sendall(b"forked\n")
        _close(worker.files)
        self.clients[process] = client
        self.events.register(client, selectors.EVENT_READ, lambda: self._forsaken(process))
        return None

    def _fork_server(self, worker: Worker) -> Server | None:
        """One more server, for the job of this worker: in the fork, itself."""
        address = f"{self.address}-{worker.job}"
        listener, (lifeline, held) = listen(address), os.pipe()
        if os.fork() == 0:
            os.close(held)
            self._leave()
            _close(worker.files)
            enter(worker)
            with _ids_by_chance(self.job_modules):
                load(self.job_modules)
            return Server(address, listener, lifeline, (), of_job=True)
        listener.close()
        os.close(lifeline)
        self.jobs[worker.job] = address, held
        return None

    def _leave(self) -> None:
        """In a fork: let go of what is the server's."""
        self.events.close()
        self.listener.close()
        os.close(self.lifeline)
        for client in self.clients.values():
            client.close()
        for _, held in self.jobs.values():
            os.close(held)

    def _orphaned(self) -> None:
        self.events.unregister(self.lifeline)
        self.events.unregister(self.listener)
        self.listener.close()
        for _, held in self.jobs.values():
            os.close(held)
        self.jobs = {}

    def _forsaken(self, process: int) -> None:
        """A client was killed: so was its worker meant to be."""
        if process not in self.clients:  # ended in the same moment
            return
        self.events.unregister(self.clients[process])
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    def _reap(self, woken: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while woken.recv(4096):
                pass
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                process, status = ended
                client = self.clients.pop(process, None)
                if client is not None:
                    with contextlib.suppress(KeyError):
                        self.events.unregister(client)
                    with client, contextlib.suppress(OSError):
                        client.sendall(f"{status}\n".encode())


def listen(address: str) -> socket.socket:
    """A socket at which clients may wait from now on."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(128)
    return listener


def load(modules: Sequence[str]) -> None:
    """Import what forks will find imported."""
    for name in modules:
        importlib.import_module(name)
    if "pipeline.zero" in sys.modules:
        sys.modules["pipeline.zero"].import_deepspeed()  # which the engine imports late, and in its own way
    gc.collect()
    gc.freeze()  # no collection touches, and so copies, the memory that forks share


@contextlib.contextmanager
def _ids_by_chance(modules: Sequence[str]) -> Iterator[None]:
    """Keep Ray's C++ generator unused while its modules are imported.

    At its first use it takes a seed from the system, once in a process, and what it draws in all threads follows from that: forks of
    a process that has used it draw the same ids as each other, and two tasks with one id end a Ray worker. Each actor class draws one.
    """
    if not any(name.partition(".")[0] == "ray" for name in modules):
        yield
        return
    actor = importlib.import_module("ray.actor")
    own = actor.ActorClassID

    class ActorClassID:
        @staticmethod
        def from_random() -> Any:
            return own(os.urandom(own.size()))

    actor.ActorClassID = ActorClassID
    try:
        yield
    finally:
        actor.ActorClassID = own


def enter(worker: Worker) -> None:
    """Take over a worker's environment."""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(worker.environment)
    new = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in before]
    sys.path[:0] = new
    os.chdir(worker.folder)


def become(worker: Worker) -> NoReturn:
    """In a fork: run the worker's script as a new Python would."""
    os.setpgid(0, 0)  # as Ray's workers are: when one ends, Ray kills its group
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for file, place in zip(worker.files, (0, 1, 2), strict=True):
        os.dup2(file, place)
        os.close(file)
    enter(worker)
    with contextlib.suppress(ValueError):  # higher than ours may be
        resource.setrlimit(resource.RLIMIT_NOFILE, (worker.open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for name in ("numpy.random", "torch"):  # by chance, as in a new process; Python sees to its own generator
        if name in sys.modules:
            sys.modules[name].seed()
    sys.argv[:] = worker.arguments
    sys.path.insert(0, str(Path(worker.arguments[0]).parent))
    runpy.run_path(worker.arguments[0], run_name="__main__")
    sys.exit(0)


def main(address: str, listener: str, modules: str, job_modules: str) -> None:
    """The server's process: import, then serve; in a fork, go on as what it was forked for."""
    load(modules.split(","))
    waiting = socket.socket(fileno=int(listener))
    running: Worker | Server | None = Server(address, waiting, os.dup(0), job_modules.split(","))
    while isinstance(running, Server):
        running = running.serve()
    if running is not None:
        become(running)
    shutil.rmtree(Path(address).parent, ignore_errors=True)
