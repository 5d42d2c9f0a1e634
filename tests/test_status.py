"""`--status` says what a run is doing and why it waits, from its files and from Ray."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from pipeline import status
from pipeline.durable import write_json
from pipeline.export import RUN_FILE
from pipeline.progress import METRICS_FILE, tell
from pipeline.run_log import RunLog, path_of
from pipeline.waiting import cluster_lines, lines_of


@pytest.fixture
def opened(make_config):
    """(config, its run's folder), as the driver makes it."""
    config = make_config("scaling.workers=[1,2]")
    run = Path(config.storage) / "runs" / "run-0123456789abcdef"
    run.mkdir(parents=True)
    write_json(run / RUN_FILE, {"identity": "0123456789abcdef", "model": "m", "config": config.dump()})
    return config, run


def start(run: Path, rank: int = 0, workers: int = 2, attempt: int = 2, step: int = 20) -> RunLog:
    log = RunLog(run, rank, workers)
    log.start(attempt, step, 90)
    return log


def made_old(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_run_that_was_never_started(make_config, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    told = status.describe(make_config())
    assert told.startswith("no run of this configuration in ")
    assert "its address is not known here" in told


def test_another_configuration_is_another_run_but_workers_and_cadence_are_not(opened, make_config) -> None:
    _, run = opened
    assert status.find_run(make_config("scaling.workers=4", "checkpoint.every=7", "train.eval_every=3")) == run
    assert status.find_run(make_config("objective.beta=0.2")) is None
    assert f"of other settings: {run}" in status.describe(make_config("objective.beta=0.2"))
    assert status.find_run(make_config("train.epochs=2")) is None
    assert status.find_run(make_config("name=other")) is None


def test_latent_and_critic_tell_runs_apart_where_the_objective_has_them(make_config) -> None:
    """As the runs' own names do; and how a model is computed makes no other run."""
    lta = ("objective={name: lta, focus_weight: 0}", "latent.n_latents=2")
    dqo = ("objective={name: dqo}", "data.kind=trajectory")
    dpo = ("objective={name: dpo}",)
    runs = {}
    for number, settings in enumerate((lta, dqo, dpo)):
        config = make_config(*settings)
        run = runs[settings] = Path(config.storage) / "runs" / f"run-{number:016d}"
        run.mkdir(parents=True)
        write_json(run / RUN_FILE, {"identity": str(number), "model": "m", "config": config.dump()})
    for settings, run in runs.items():
        assert status.find_run(make_config(*settings, "model.activation_checkpointing=true")) == run
    assert status.find_run(make_config(*lta, "latent.n_latents=3")) is None
    assert status.find_run(make_config(*lta, "latent.positions=true")) is None
    assert status.find_run(make_config(*lta, "critic.steps_alone=2")) == runs[lta]
    assert status.find_run(make_config(*dqo, "critic.steps_alone=2")) is None
    assert status.find_run(make_config(*dpo, "latent.n_latents=3", "critic.steps_alone=2")) == runs[dpo]


def test_stopped_failed_and_finished(opened) -> None:
    config, run = opened
    assert "state       stopped: no driver is alive; the same command continues" in status.describe(config)
    write_json(run / "error.json", "step 3: the loss is nan")
    assert "state       failed: step 3: the loss is nan" in status.describe(config)
    (run / "export").mkdir()
    assert f"state       finished: {run / 'export'}" in status.describe(config)


def test_a_run_that_waits_says_what_for(opened) -> None:
    config, run = opened
    (run / "lease").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    write_json(run / "ray.json", {"address": address})
    told = status.describe(config)
    assert "state       waiting: for workers to start" in told
    assert f"ray         Ray at {address} does not answer" in told
    assert "checkpoint  none yet" in told


def test_a_run_that_trains(opened) -> None:
    config, run = opened
    (run / "lease").touch()
    logs = [start(run, 0), start(run, 1)]
    assert "state       loading: 2 workers start" in status.describe(config)
    for log in logs:
        log.stepped(24, {"loss": 0.5})
    (run / METRICS_FILE).write_text('{"step": 24, "loss": 0.5, "tokens_per_second": 1234.0}\n')
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    made_old(run / "checkpoints" / "step-00000020", 600)
    tell(run, "1 → 2 workers, continuing at step 20")
    told = status.describe(config).splitlines()
    assert "state       training" in told
    assert "step        24 of 90, 0 s ago" in told
    assert "metrics     loss=0.5 tok/s=1234" in told
    assert "workers     2 of 1 to 2" in told
    assert "attempts    2" in told
    assert "checkpoint  step 20, 10 min ago" in told
    assert "log         1 → 2 workers, continuing at step 20" in told


def test_a_silent_rank_is_named(opened) -> None:
    config, run = opened
    (run / "lease").touch()
    for rank in (0, 1):
        start(run, rank).stepped(24, {})
    path = path_of(run, 1)
    path.write_text(path.read_text().replace('"time": "2', '"time": "1'))  # a thousand years ago
    assert "training, but nothing was heard of rank 1 for " in status.describe(config)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b'{"address"', b"\0" * 9, b"\xff"])
def test_damaged_files_do_not_keep_it_from_telling(opened, content: bytes) -> None:
    config, run = opened
    (run / "lease").touch()
    start(run, 0).stepped(24, {"loss": 0.5})
    for name in ("ray.json", "logs/rank-00001.jsonl", METRICS_FILE):
        (run / name).write_bytes(content + b"\n")
    told = status.describe(config)
    assert "state       training" in told and "its address is not known here" in told
    (run / "error.json").write_bytes(content)
    made_old(run / "lease", 600)
    assert f"state       failed: see {run / 'logs'}" in status.describe(config)
    (run / RUN_FILE).write_bytes(content)
    assert status.describe(config).startswith("no run of this configuration in ")


def test_ranks_of_earlier_attempts_do_not_count(opened) -> None:
    _, run = opened
    start(run, 1, attempt=1)
    start(run, 0, attempt=2, workers=1)
    assert [rank.rank for rank in status.ranks_of(run)] == [0]


def test_demands_and_nodes_in_words() -> None:
    from ray.autoscaler.v2.schema import (
        ClusterStatus,
        LaunchRequest,
        NodeInfo,
        PlacementGroupResourceDemand,
        RayTaskActorDemand,
        ResourceDemandSummary,
        ResourceRequestByCount,
        ResourceUsage,
    )

    nodes = [NodeInfo("i", "gpu", "1", "ip"), NodeInfo("i", "gpu", "2", "ip")]
    together = PlacementGroupResourceDemand([ResourceRequestByCount({"GPU": 1.0, "CPU": 8.0}, 4)], details="")
    actor = RayTaskActorDemand([ResourceRequestByCount({"CPU": 1.0, "node:1.2.3.4": 0.001}, 2)])
    cluster = ClusterStatus(
        active_nodes=nodes[:1],
        idle_nodes=nodes[1:],
        pending_nodes=nodes,
        pending_launches=[LaunchRequest("i", "gpu", 3, LaunchRequest.Status.PENDING, 0)],
        failed_launches=[
            LaunchRequest("i", "gpu", 1, LaunchRequest.Status.FAILED, 0, details="no capacity\nin zone a")
        ],
        cluster_resource_usage=[ResourceUsage("CPU", 16.0, 8.0), ResourceUsage("memory", 1e9, 0.0)],
        resource_demands=ResourceDemandSummary([together], [actor], []),
    )
    assert lines_of(cluster) == [
        "2 nodes, in use: 8 of 16 CPU",
        "waits for  2 × 1 CPU",
        "waits for  4 × 1 GPU + 8 CPU, together",
        "starting   5 × gpu",
        "failed     gpu: no capacity in zone a",
    ]


@pytest.mark.ray
def test_a_real_ray_says_what_it_waits_for(ray_cluster) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    wanted = placement_group([{"CPU": 2}, {"CPU": 2}])
    deadline = time.monotonic() + 30
    address = ray.get_runtime_context().gcs_address
    while "waits for  2 × 2 CPU, together" not in (told := cluster_lines(address)):
        assert time.monotonic() < deadline, told
        time.sleep(0.5)
    assert told[0].startswith("1 node, in use: ")
    remove_placement_group(wanted)
