"""Ray's own autoscaler takes a cluster from no workers up for real jobs, and down again."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from benchmarks.autoscale import Autoscaled, fake_cloud


def test_the_fake_cloud_fits_rays_schema() -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(fake_cloud(6379, 2), schema)


@pytest.mark.ray
@pytest.mark.slow
def test_up_for_training_and_decoding_and_down_when_idle(make_config, tmp_path: Path) -> None:
    make_config()
    config = str(tmp_path / "config.yaml")
    with Autoscaled(most=2) as autoscaled:
        assert autoscaled.nodes == 0
        trained = autoscaled.run("train", [config, "scaling.workers=2", "train.max_steps=3"])
        assert trained.most_nodes == 2
        assert trained.gone < 120
        (run,) = (tmp_path / "outputs" / "runs").iterdir()
        assert (run / "export" / "model.safetensors").is_file()
        output = tmp_path / "decoded.jsonl"
        settings = ["sampling.limit=4", "sampling.max_new_tokens=4", f"sampling.output={output}", "train.max_steps=3"]
        decoded = autoscaled.run("decode", [config, "scaling.workers=2", *settings])
        assert decoded.most_nodes >= 1
        assert len(output.read_text().splitlines()) == 4
        assert autoscaled.nodes == 0
