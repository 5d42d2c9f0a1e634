"""cluster.yaml against Ray's own schema and checks, and for what it promises: scales to zero, open to nobody, one storage."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.config_file import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def prepared(cluster) -> dict:
    """With Ray's defaults for AWS filled in, as `ray up` does before it calls the cloud."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(copy.deepcopy(cluster))


def test_fits_rays_schema(cluster):
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_worker": 8}, schema)


def test_passes_rays_own_validation(prepared):
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared)
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config({**prepared, "head_node_type": "nobody"})


def test_workers_scale_from_zero_and_back(prepared):
    workers = {name: node for name, node in prepared["available_node_types"].items() if name != "head"}
    assert workers.keys() == {"gpu"}
    assert (workers["gpu"]["min_workers"], workers["gpu"]["max_workers"]) == (0, 8)
    assert workers["gpu"]["resources"]["GPU"] > 0
    assert "GPU" not in prepared["available_node_types"]["head"]["resources"]
    assert prepared["available_node_types"]["head"]["max_workers"] == 0, "one head"
    assert prepared["max_workers"] == 8
    assert 0 < prepared["idle_timeout_minutes"] <= 30
    assert prepared["provider"]["cache_stopped_nodes"] is False


def test_dashboard_is_on_loopback(prepared):
    starts = [command for command in prepared["head_start_ray_commands"] if "ray start" in command]
    assert len(starts) == 1
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "0.0.0.0" not in json.dumps(prepared["head_start_ray_commands"] + prepared["worker_start_ray_commands"])


def test_every_node_demands_the_token_and_the_file_does_not_hold_it(cluster, prepared):
    options = prepared["docker"]["run_options"]
    path = "/home/ray/.ray/auth_token"
    assert "-e RAY_AUTH_MODE=token" in options
    assert f"-e RAY_AUTH_TOKEN_PATH={path}" in options
    assert cluster["file_mounts"][path] == "~/.ray/auth_token"
    assert f"chmod 600 {path}" in prepared["head_setup_commands"]
    assert f"chmod 600 {path}" in prepared["worker_setup_commands"]
    text = (ROOT / "cluster.yaml").read_text()
    assert not re.search(r"RAY_AUTH_TOKEN=|[0-9a-f]{32}", text)


def test_nodes_install_the_pinned_versions(cluster, prepared):
    pins = (ROOT / "requirements" / "base.lock").read_text().splitlines()
    ray = next(pin.partition("==")[2] for pin in pins if pin.startswith("ray=="))
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{ray}-py311")
    assert cluster["docker"]["head_image"].startswith(f"rayproject/ray:{ray}-py311")
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch
    for commands in (prepared["head_setup_commands"], prepared["worker_setup_commands"]):
        assert f"pip install {torch[1]}" in commands
        assert any("--no-deps --no-build-isolation -r requirements/base.lock" in command for command in commands)


def test_storage_of_the_real_size_configuration_is_on_every_node(cluster):
    storage = load(ROOT / "jobs" / "configs" / "dpo-7b-zero3.yaml").storage
    assert storage.startswith("/shared/")
    assert "-v /shared:/shared" in cluster["docker"]["run_options"], "for head and workers alike"
    assert any("mount -t nfs4" in command for command in cluster["initialization_commands"])
    assert any(storage in command for command in cluster["initialization_commands"])


def test_one_node_holds_the_real_size_configuration(cluster):
    scaling = load(ROOT / "jobs" / "configs" / "dpo-7b-zero3.yaml").scaling
    node = cluster["available_node_types"]["gpu"]["resources"]
    assert scaling.workers * scaling.gpus_per_worker <= node["GPU"]
    assert scaling.workers * scaling.cpus_per_worker < node["CPU"]
