"""The joint to Ray Train: `train_on_ray` runs `loop.train_worker` as a group of workers, whose failures Ray answers.

Left out: what Ray Train does between two groups (`elastic`), and connecting to Ray (`cluster`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.durable import write_json
from pipeline.errors import Leaving, UserError
from pipeline.fencing import next_attempt
from pipeline.lease import Superseded, is_taken_over
from pipeline.loop import Job, train_worker
from pipeline.progress import ERROR_FILE, RAY_FILE, read_error, tell
from pipeline.redaction import redact
from pipeline.run_log import FOLDER
from pipeline.terminal import guard, leaving_without_secrets


class TrainingFailed(UserError):
    """What a worker said, when starting it again cannot help."""


def train_on_ray(job: Job) -> None:
    """The workers as a Ray Train group; Ray starts them again after a failure, they continue from the last checkpoint."""
    import ray
    from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline import elastic

    scaling = job.config.scaling
    elastic.set_environment(scaling)
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": scaling.gpus_per_worker} if scaling.gpus_per_worker else {})
    (job.run / ERROR_FILE).unlink(missing_ok=True)
    write_json(job.run / RAY_FILE, {"address": ray.get_runtime_context().gcs_address})  # for `status`
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{job.config.train.hang_timeout:g}"  # of a stopped process
    trainer = TorchTrainer(
        _worker,
        train_loop_config=job.plain(),
        scaling_config=ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=scaling.resize_seconds,
        ),
        torch_config=TorchConfig(backend="nccl" if scaling.gpus_per_worker else "gloo"),
        run_config=RayRunConfig(
            name=f"{job.run.name}-{next_attempt(job.run)}",  # a name used before would continue Ray's own state
            storage_path=str(job.run / "ray"),
            failure_config=FailureConfig(max_failures=-1),  # the hooks count
            callbacks=[elastic.Hooks(job.run, scaling.max_failures)],
        ),
    )
    try:
        _interruptible(trainer.fit)
    except TrainingFailedError as error:
        if not (job.run / ERROR_FILE).is_file():
            raise TrainingFailed(str(error).strip().splitlines()[-1]) from error
    if (job.run / ERROR_FILE).is_file():
        raise TrainingFailed(read_error(job.run) or f"a worker failed; see {job.run / FOLDER}") from None


def _interruptible(call: Callable[[], Any]) -> None:
    """`call` in a thread: Ray Train leaves signals alone there, so that Ctrl-C and SIGTERM reach the driver as anywhere else."""
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            ended.append(error)
        else:
            ended.append(None)

    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    while not ended:
        thread.join(0.5)
    if ended[0] is not None:
        raise ended[0]


def _worker(plain: dict[str, Any]) -> None:
    """`train_worker` under Ray Train, which would start workers again after any error.

    An error that a person has to mend is left in a file instead: the next start sees it and ends at once, on all ranks.
    """
    from pipeline.elastic import draining

    guard()
    run = Path(plain["run"])
    note = run / ERROR_FILE
    if note.is_file() or is_taken_over(run, plain["owner"]):  # in the second case the driver finds out, and says so
        return
    with leaving_without_secrets():
        _attempt(run, plain, draining)


def _attempt(run: Path, plain: dict[str, Any], draining: Callable[[], str | None]) -> None:
    try:
        train_worker(plain, draining=draining)
    except Superseded:
        raise  # the note is the newer attempt's
    except UserError as error:
        write_json(run / ERROR_FILE, redact(str(error)))
        raise
    except Leaving:
        raise  # told already
    except Exception as error:
        tell(
            run,
            f"a worker failed, starting again: {type(error).__name__}: {redact(' '.join(str(error).split()))[:500]}",
        )
        raise
