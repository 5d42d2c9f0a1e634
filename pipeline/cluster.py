"""Connect to Ray: the cluster in RAY_ADDRESS (set for submitted jobs), else a private one on this machine."""

from __future__ import annotations

import importlib
import logging
import os
import threading

from pipeline.config import ConfigError, RunConfig

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # The controller notices the end of training at its next health check: 0.2 s instead of 2 s saves 4 s a run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "TOKENIZERS_PARALLELISM": "false",
    "THP_MEM_ALLOC_ENABLE": "1",  # large tensors on huge pages: a seventh of a training step went into page faults
}


def import_beside(*modules: str) -> None:
    """Import modules that take seconds in a thread, while Ray starts. (Not the other way round: Ray's processes die with the
    thread that started them.)"""
    threading.Thread(target=lambda: list(map(importlib.import_module, modules)), name="imports", daemon=True).start()


def connect(config: RunConfig) -> None:
    """Start or join Ray, once per process. Raises ConfigError when this machine cannot hold the workers."""
    import ray

    if ray.is_initialized():
        return
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": ENVIRONMENT})
        return
    cpus = os.cpu_count() or 1
    wanted = config.scaling.least_workers * config.scaling.cpus_per_worker
    if wanted > cpus:
        raise ConfigError(
            f"scaling.workers: {config.scaling.least_workers} workers of {config.scaling.cpus_per_worker:g} CPUs do not fit this "
            f"machine's {cpus}; lower scaling.workers or scaling.cpus_per_worker, or submit to a cluster"
        )
    # Nothing preempts one's own machine: an actor less to start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray's C++ side warns on our terminal of things that only its own log files are for.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Workers' prints stay in Ray's log files: what a person should know comes through the run's log (see `progress`).
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
