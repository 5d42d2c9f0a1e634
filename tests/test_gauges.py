"""A run's gauges reach the place that Prometheus reads Ray's metrics from."""

from __future__ import annotations

import os
import re
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline.gauges import GAUGES, Gauges
from pipeline.run_log import RunLog


def exported(run: str) -> dict[str, float]:
    """What the node exports about a run."""
    import ray

    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    found = re.findall(rf'^ray_(qalign_\w+){{.*run="{run}".*}} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


@pytest.mark.ray
@pytest.mark.slow
def test_prometheus_can_read_what_a_run_does(ray_cluster, tmp_path: Path) -> None:
    run = tmp_path / "dpo-0123"
    saved = run / "checkpoints" / "step-00000020"
    saved.mkdir(parents=True)
    with RunLog(run, 0, 2) as log:
        log.start(attempt=3, step=20, total_steps=90)
    gauges = Gauges(run, 90)
    later = time.time() + 0.5
    os.utime(saved, (later, later))
    gauges.step(24, {"loss": 0.25, "tokens_per_second": 1234.0, "accuracy": 1.0})
    gauges.tick()
    deadline = time.monotonic() + 60
    while set(values := exported(run.name)) != set(GAUGES):
        assert time.monotonic() < deadline, values
        time.sleep(1)
    age = values.pop("qalign_checkpoint_age_seconds")
    assert 0 <= age < 60
    assert values == {
        "qalign_step": 24,
        "qalign_total_steps": 90,
        "qalign_loss": 0.25,
        "qalign_tokens_per_second": 1234,
        "qalign_workers": 2,
        "qalign_attempts": 3,
    }
