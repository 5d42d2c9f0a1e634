"""Drills: processes that are killed or stopped, from one worker to a whole machine."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import psutil

from benchmarks.faults.bench import Bench, Outcome
from benchmarks.faults.errors import DrillError
from benchmarks.faults.preparing import killed_data_actor
from benchmarks.faults.runs import PATIENCE, Training
from benchmarks.nodes import RAY, ROOT, kill

WORKER, SUPERVISOR = "RayTrainWorker", "JobSupervisor"
UNDER_WAY = 2
"""Steps that may pass while a checkpoint is being written: what is killed then goes on from the one before."""


def killed_worker(bench: Bench) -> Outcome:
    """SIGKILL to one of two training workers."""
    with bench.training("killed-worker") as training:
        training.start()
        training.await_step(bench.every + 2)
        kill(_workers(bench)[:1])
        training.finish()
        return _recovered(bench, training, "SIGKILL to one of two workers", "the group started again")


def hung_worker(bench: Bench) -> Outcome:
    """SIGSTOP to one of two training workers: nothing fails, nothing goes on."""
    with bench.training("hung-worker", "train.hang_timeout=15") as training:
        training.start()
        training.await_step(bench.every + 2)
        stopped = _workers(bench)[:1]
        stopped[0].send_signal(signal.SIGSTOP)
        training.finish()
        said = "saw no progress for 15 s" in training.log()
        found = _recovered(
            bench, training, "SIGSTOP to one of two workers", "the others gave up after hang_timeout = 15 s"
        )
        kill([process for process in stopped if process.is_running()])
        return found if said else _failed(found, "nobody said that a worker hung")


def killed_node(bench: Bench) -> Outcome:
    """SIGKILL to every process of the machine that both workers are on."""
    cluster = bench.cluster
    with bench.training("killed-node") as training:
        training.start()
        training.await_step(bench.every + 2)
        cluster.holding(WORKER).kill()
        training.finish()
        found = _recovered(bench, training, "SIGKILL to all of a node", "training moved to the other node")
    bench.add_node()
    return found


def killed_driver(bench: Bench) -> Outcome:
    """SIGKILL to the driver, and the same command again at once."""
    with bench.training("killed-driver") as training:
        training.start()
        training.await_step(bench.every + 2)
        training.kill_driver()
        training.start()
        training.finish()
        return _recovered(bench, training, "SIGKILL to the driver", "the same command went on")


def killed_supervisor(bench: Bench) -> Outcome:
    """SIGKILL to the process of `ray job submit` that looks after the driver, and the same job again."""
    jobs = bench.cluster.job_environment
    with bench.training("killed-supervisor") as training:
        first = _submit(training, jobs, "first")
        training.wait_until(lambda: max(training.steps, default=0) >= bench.every + 2, "enough steps")
        kill(bench.cluster.find(SUPERVISOR))
        _await_status(jobs, first, "FAILED")
        _await_gone(training)
        _await_status(jobs, _submit(training, jobs, "second"), "SUCCEEDED")
        return _recovered(bench, training, "SIGKILL to the job's supervisor", "the job FAILED; the same job went on")


def random_kills(bench: Bench) -> Outcome:
    """Many kills in one training, at random moments: a worker, all workers, or the driver."""
    kills = 3 if bench.quick else 20
    chance = random.Random(7)  # noqa: S311 - which process dies
    steps = kills * (bench.every + 2) + bench.every
    steps += steps % 2
    done = []
    with bench.training("random-kills", steps=steps) as training:
        training.start()
        for number in range(kills):
            # Each sort once, whatever the dice say.
            victim = ("driver", "worker", "all workers")[number] if number < 3 else chance.choice(VICTIMS)
            _await_progress(training, chance.randint(2, bench.every + 2))
            time.sleep(chance.random() * 0.3)
            if victim == "driver":
                training.kill_driver()
                training.start()
            else:
                workers = _workers(bench)
                kill(workers if victim == "all workers" else [chance.choice(workers)])
            done.append(victim)
        training.finish()
        counts = ", ".join(f"{done.count(victim)} × {victim}" for victim in sorted(set(done)))
        return _recovered(bench, training, f"{kills} kills in one training ({counts})", "it went on each time", steps)


VICTIMS = ("worker", "worker", "worker", "all workers", "driver")

DRILLS = [killed_worker, hung_worker, killed_node, killed_driver, killed_supervisor, killed_data_actor, random_kills]


def _workers(bench: Bench) -> list[psutil.Process]:
    found = bench.cluster.find(WORKER)
    if len(found) != 2:
        raise DrillError(f"{len(found)} workers instead of 2")
    return found


def _recovered(bench: Bench, training: Training, did: str, happened: str, steps: int | None = None) -> Outcome:
    """The outcome of a training that had to end like the undisturbed one."""
    found, same = bench.compare(training, steps=steps)
    restarts = len(found.repeated)
    worst = max(found.repeated, default=0)
    ok = same and restarts > 0 and worst <= bench.every + UNDER_WAY
    times = f"{happened}; restarts: {restarts}, checkpoint every {bench.every} steps"
    return Outcome(did, times, ok, max(found.recovered, default=None), worst, same)


def _failed(found: Outcome, why: str) -> Outcome:
    return Outcome(found.did, f"{found.happened}; but {why}", False, found.seconds, found.repeated, found.equal)


def _await_progress(training: Training, steps: int) -> None:
    """Until a group that began after now has gone so many steps (both ranks: twice as many forwards)."""
    now = time.time()
    training.wait_until(
        lambda: max((sum(seen.time > now for seen in lines) for lines in training.processes()), default=0) >= steps,
        f"{steps} more steps",
    )


def _submit(training: Training, jobs: dict[str, str], name: str) -> str:
    """The training as a job; it runs in the head's folder and finds the code through the node's environment."""
    job = f"drill-{name}-{int(time.time())}"
    command = [str(RAY), "job", "submit", "--no-wait", "--submission-id", job, "--", "python"]
    until = time.monotonic() + PATIENCE
    while True:  # the job server answers before the node's agent, which starts jobs, is there
        asked = subprocess.run([*command, *training.command()], env=jobs, cwd=ROOT, capture_output=True, text=True)
        if asked.returncode == 0:
            return job
        if time.monotonic() > until:
            raise DrillError(f"the job was not taken: {asked.stderr[-300:]}")
        time.sleep(1)


def _await_status(jobs: dict[str, str], job: str, wanted: str) -> None:
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(jobs["RAY_ADDRESS"], headers=_token(jobs))
    until = time.monotonic() + PATIENCE
    while (status := client.get_job_status(job).value) != wanted:
        if time.monotonic() > until or status in {"SUCCEEDED", "FAILED", "STOPPED"}:
            raise DrillError(f"job {job}: {status} instead of {wanted}: {client.get_job_logs(job)[-500:]}")
        time.sleep(0.3)


def _token(jobs: dict[str, str]) -> dict[str, str]:
    return {"Authorization": f"Bearer {Path(jobs['RAY_AUTH_TOKEN_PATH']).read_text()}"}


def _await_gone(training: Training) -> None:
    """Until the job's driver has ended: Ray does that when its supervisor is gone."""
    config = str(training.folder / "config.yaml")
    until = time.monotonic() + PATIENCE
    while any(config in " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])):
        if time.monotonic() > until:
            raise DrillError("the job's driver lives on without its supervisor")
        time.sleep(0.2)
