"""Every configuration that ships loads, fits the schema, and finds its example records."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from omegaconf import OmegaConf

from pipeline.config import RunConfig
from pipeline.config_file import json_schema, load, validate
from pipeline.layouts import parse
from pipeline.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
EXAMPLES = ROOT / "jobs" / "examples"


@pytest.fixture(scope="module")
def configs() -> dict[str, RunConfig]:
    return {path.stem: load(path) for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_loads_fits_the_schema_and_round_trips(path):
    loaded = load(path)
    jsonschema.validate(OmegaConf.to_container(OmegaConf.load(path)), json_schema())
    assert validate(loaded.dump()) == loaded
    assert path.read_text().startswith("# "), "says what it is for and how to start it"


def test_every_objective_has_a_configuration_of_its_name(configs):
    for name in OBJECTIVES:
        assert configs[name].objective_name == name


def test_names_differ(configs):
    assert len({config.name for config in configs.values()}) == len(configs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_small_configurations_are_small_and_their_records_all_parse(configs, name):
    config = configs[name]
    assert config.model.path == "package:smollm2"
    assert config.train.max_steps is not None
    assert config.train.max_steps <= 10
    assert not config.scaling.gpus_per_worker
    for source in config.data.sources:
        lines = (ROOT / source.path).read_text().splitlines()
        records = [parse(json.loads(line), config.data.kind, config.data.ties) for line in lines]
        assert len(records) >= config.train.rows_per_step * config.train.max_steps
        assert len({str(record.prompt) for record in records}) > 0.9 * len(records), "few prompts repeat"
        assert any(isinstance(record.prompt, str) for record in records)
        assert any(not isinstance(record.prompt, str) for record in records), "chat messages are shown too"


def test_examples_are_all_used(configs):
    used = {Path(source.path).name for config in configs.values() for source in config.data.sources}
    assert {path.name for path in EXAMPLES.glob("*.jsonl")} <= used


def test_rankings_are_ragged_and_ordered_by_quality(configs):
    data = configs["plackett_luce"].data
    lines = (ROOT / data.sources[0].path).read_text().splitlines()
    records = [parse(json.loads(line), "ranking", data.ties) for line in lines]
    assert {len(record.ranked) for record in records} == {2, 3, 4}
    sums = [record for record in records if "Question" in str(record.prompt)]
    assert sums
    for record in sums:
        total = sum(int(word) for word in str(record.prompt).split() if word.isdigit())
        assert str(total) in record.ranked[0]
        assert str(total) not in record.ranked[-1]


def test_demo_has_the_settings_of_the_experiment(configs):
    demo = configs["demo"]
    assert (demo.objective_name, demo.objective.beta) == ("dpo", 0.1)
    assert (demo.optimizer.lr, demo.optimizer.schedule, demo.optimizer.warmup_steps) == (6e-5, "constant", 5)
    assert (demo.train.rows_per_step, demo.train.epochs) == (8, 2)
    assert (demo.scaling.workers, demo.scaling.cpus_per_worker, demo.scaling.zero_stage) == (2, 1, 2)
    assert (demo.sampling.per_prompt, demo.sampling.max_new_tokens, demo.sampling.scorer) == (4, 32, "vader")


def test_real_size_configuration_asks_for_its_cluster(configs):
    big = configs["dpo-7b-zero3"]
    assert (big.scaling.workers, big.scaling.gpus_per_worker, big.scaling.zero_stage) == (8, 1, 3)
    assert (big.model.dtype, big.model.activation_checkpointing) == ("bfloat16", True)
    assert big.optimizer.lr == 5e-7
