"""Connect to Ray: the cluster in RAY_ADDRESS (set for submitted jobs), else a private one on this machine."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, Leaving
from pipeline.forks import ForkServer
from pipeline.heap import HUGE_PAGES, ONE_HEAP
from pipeline.redaction import redact

if TYPE_CHECKING:
    from pipeline.config import RunConfig

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # The controller notices the end of training at its next health check: 0.2 s instead of 2 s saves 4 s a run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "TOKENIZERS_PARALLELISM": "false",
    **HUGE_PAGES,
}
WORKER_ENVIRONMENT = ENVIRONMENT | ONE_HEAP
"""Of workers alone: Ray's own servers and this process keep their heaps."""

LOCAL_ENVIRONMENT = {
    # Nothing preempts one's own machine: an actor less to start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray's C++ side warns on our terminal of things that only its own log files are for.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
FORKED_ENVIRONMENT = {
    # The Python processes that Ray would have ready are none that a fork server made.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
}

_server: ForkServer | None = None


def begin_imports() -> None:
    """Have a process import what workers on this machine need, beside whatever this one does until `connect`."""
    global _server
    if _server is None and not os.environ.get("RAY_ADDRESS") and sys.platform == "linux":
        try:
            _server = ForkServer(WORKER_ENVIRONMENT)
        except OSError as error:  # no room for its socket, say: workers start as they would without it
            logger.warning("workers will start slowly: %s", error)


def import_beside(*modules: str) -> None:
    """Import modules that take seconds in a thread, while Ray starts. (Not the other way round: Ray's processes die with the
    thread that started them.)"""
    threading.Thread(target=lambda: list(map(importlib.import_module, modules)), name="imports", daemon=True).start()


def connect(config: RunConfig) -> None:
    """Start or join Ray, once per process. Raises ConfigError when this machine cannot hold the workers."""
    import ray

    if ray.is_initialized():
        return
    _start(config)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _leave)  # Ray's own handler aborts the process
    address = ray.get_runtime_context().gcs_address
    threading.Thread(target=_watch_head, args=(address,), name="head", daemon=True).start()


def broke_down(error: BaseException) -> str | None:
    """What a person has to know where Ray itself failed under a job; None: something else did."""
    exceptions = getattr(sys.modules.get("ray"), "exceptions", None)
    if exceptions is None or not isinstance(error, exceptions.RayError) or isinstance(error, exceptions.RayTaskError):
        return None
    what = redact(" ".join(str(error).split()))[:300]
    return f"a process of Ray's broke down ({type(error).__name__}: {what}); the same command continues from the last checkpoint"


def _leave(*_: object) -> None:
    raise Leaving("ended by SIGTERM, behind the last checkpoint")


HEAD_SECONDS = 10.0
"""A head that nobody can connect to for so long is gone."""


def _watch_head(address: str) -> None:
    """Tell of a head that is gone: Ray ends this process a minute later, without a word."""
    import ray

    host, _, port = address.rpartition(":")
    since = None
    while ray.is_initialized():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            since = None
        except OSError:
            since = since or time.monotonic()
            if time.monotonic() - since > HEAD_SECONDS:
                print(
                    f"error: Ray's head at {address} is gone, and with it this command: it ends within a minute, and the same command "
                    "then continues from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                return
        time.sleep(2)


def _start(config: RunConfig) -> None:
    import ray

    _set_environment(ENVIRONMENT)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": WORKER_ENVIRONMENT})
        return
    cpus = os.cpu_count() or 1
    wanted = config.scaling.least_workers * config.scaling.cpus_per_worker
    if wanted > cpus:
        raise ConfigError(
            f"scaling.workers: {config.scaling.least_workers} workers of {config.scaling.cpus_per_worker:g} CPUs do not fit this "
            f"machine's {cpus}; lower scaling.workers or scaling.cpus_per_worker, or submit to a cluster"
        )
    _set_environment(LOCAL_ENVIRONMENT)
    python = _python(config.scaling.gpus_per_worker > 0)
    if python is not None:
        _set_environment(FORKED_ENVIRONMENT)
    with _without_line(b"Set ray log level"):  # said each time the level is set
        # Workers' prints stay in Ray's log files: what a person should know comes through the run's log (see `progress`).
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"py_executable": python} if python else None,
        )


@contextmanager
def _without_line(words: bytes) -> Iterator[None]:
    """What comes on standard error meanwhile is shown at the end, without lines that have these words. (C++ writes to the file
    itself, past `sys.stderr`.)"""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as aside, os.fdopen(os.dup(2), "wb") as shown:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(shown.fileno(), 2)
            aside.seek(0)
            shown.writelines(line for line in aside if words not in line)


def _set_environment(variables: dict[str, str]) -> None:
    """What a user has set stays."""
    os.environ.update({key: value for key, value in variables.items() if key not in os.environ})


def _python(gpus: bool) -> str | None:
    """The program that Ray runs workers with on this machine; None: the ordinary Python."""
    begin_imports()
    if _server is not None and gpus:
        _server.close()  # a library that looks for GPUs while it is imported leaves none to the forks
        return None
    return _server.python if _server is not None else None
