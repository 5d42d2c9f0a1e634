"""One typed configuration: precedence, errors of one line with a remedy, round trips, the editor's schema."""

from __future__ import annotations

import copy
import json
import os

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import ConfigError, RunConfig, digest
from pipeline.config_file import describe, json_schema, load, validate
from pipeline.objectives import OBJECTIVES
from pipeline.objectives.dpo import Dpo

YAML = """
data:
  kind: preference
  sources:
    - path: first.jsonl
    - path: second.jsonl
model: {path: some/model}
objective: {name: dpo, beta: 0.2}
optimizer: {lr: 1e-5, warmup_steps: 5}
"""
PLAIN = {
    "data": {"kind": "preference", "sources": [{"path": "first.jsonl"}, {"path": "second.jsonl"}]},
    "model": {"path": "some/model", "lora": {"r": 4}},
    "objective": {"name": "dpo", "beta": 0.2},
    "optimizer": {"lr": 1e-5, "clip": None},
    "sampling": {"prompts": {"path": "prompts.jsonl"}},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def changed(dotted: str, value: object) -> dict:
    """PLAIN with one key set."""
    plain = node = copy.deepcopy(PLAIN)
    *parents, last = dotted.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value
    return plain


# --------------------------------------------------------------------------------------------- precedence


def test_yaml_overrides_defaults_and_overrides_override_yaml(file):
    plain = load(file)
    assert (plain.objective, plain.optimizer.lr, plain.optimizer.warmup_steps) == (Dpo(beta=0.2), 1e-5, 5)
    assert (plain.optimizer.clip, plain.train.epochs) == (1.0, 1)
    over = load(file, ["objective.beta=0.3", "optimizer.clip=null", "train.epochs=2", "train.epochs=7"])
    assert (over.objective.beta, over.optimizer.lr, over.optimizer.clip, over.train.epochs) == (0.3, 1e-5, None, 7)


def test_workers_are_a_number_or_bounds(file):
    fixed, elastic = load(file, ["scaling.workers=3"]).scaling, load(file, ["scaling.workers=[2,4]"]).scaling
    assert (fixed.elastic, fixed.least_workers, fixed.most_workers) == (False, 3, 3)
    assert (elastic.elastic, elastic.least_workers, elastic.most_workers) == (True, 2, 4)
    assert load(file, ["scaling.workers=[2,2]"]).scaling.workers == 2
    assert validate(load(file, ["scaling.workers=[2,4]"]).dump()).scaling == elastic


def test_overrides_reach_into_lists_and_replace_mappings(file):
    over = load(file, ["data.sources.1.path=a=b.jsonl", "data.sources.0.share=0.5", "data.sources.1.share=5e-1"])
    assert [source.path for source in over.data.sources] == ["first.jsonl", "a=b.jsonl"]
    assert [source.share for source in over.data.sources] == [0.5, 0.5]
    assert load(file, ["data.sources=[{path: only.parquet}]"]).data.sources[0].path == "only.parquet"
    assert load(file, ["objective={name: sft}"]).objective_name == "sft"


def test_environment_variables_can_be_read(file, monkeypatch):
    monkeypatch.setenv("QALIGN_TEST_STORAGE", "/somewhere/shared")
    assert load(file, ["storage=${oc.env:QALIGN_TEST_STORAGE}"]).storage == "/somewhere/shared"


def test_nothing_changes_after_validation(file):
    loaded = load(file)
    for section, key in [(loaded, "seed"), (loaded.optimizer, "lr"), (loaded.objective, "beta")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 3)
    assert hash(loaded.optimizer) == hash(load(file).optimizer)


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.lrr", 1, "optimizer.lrr: unknown key; did you mean lr?"),
        ("optimiser", {}, "optimiser: unknown key; did you mean optimizer?"),
        ("objective.bta", 1, "objective.bta: unknown key; did you mean beta?"),
        ("data.sources.0.pth", "x", "data.sources.0.pth: unknown key; did you mean path?"),
        ("model.lora.alfa", 1, "model.lora.alfa: unknown key; did you mean alpha?"),
        ("sampling.prompts.kolumns", 1, "sampling.prompts.kolumns: unknown key; did you mean columns?"),
        ("train.zzz", 1, "train.zzz: unknown key; remove it"),
        ("objective.beta", -1, "objective.beta: input should be greater than 0, not -1"),
        ("objective.label_smoothing", 0.5, "objective.label_smoothing: input should be less than 0.5, not 0.5"),
        ("optimizer.lr", float("nan"), "optimizer.lr: input should be a finite number, not nan"),
        ("optimizer.weight_decay", float("inf"), "optimizer.weight_decay: input should be a finite number, not inf"),
        ("train.rows_per_step", 0, "train.rows_per_step: input should be greater than or equal to 1, not 0"),
        (
            "data.eval_fraction",
            "2.5 %",
            "data.eval_fraction: input should be a valid number, unable to parse string as a number, not '2.5 %'; write 0.025",
        ),
        (
            "scaling.workers",
            [2, 1],
            "scaling.workers: give a number of workers, or [min, max] with 1 ≤ min ≤ max for elastic training; not [2, 1]",
        ),
        (
            "scaling.workers",
            [0, 2],
            "scaling.workers: give a number of workers, or [min, max] with 1 ≤ min ≤ max for elastic training; not [0, 2]",
        ),
        (
            "scaling.workers",
            [1, 2, 3],
            "scaling.workers: give a number of workers, or [min, max] with 1 ≤ min ≤ max for elastic training; not [1, 2, 3]",
        ),
        (
            "scaling.workers",
            [],
            "scaling.workers: give a number of workers, or [min, max] with 1 ≤ min ≤ max for elastic training; not []",
        ),
        (
            "scaling.workers",
            True,
            "scaling.workers: give a number of workers, or [min, max] with 1 ≤ min ≤ max for elastic training; not True",
        ),
        (
            "scaling.workers",
            [True, 2],
            "scaling.workers: give a number of workers, or [min, max] with 1 ≤ min ≤ max for elastic training; not [True, 2]",
        ),
        (
            "scaling.workers",
            0,
            "scaling.workers: give a number of workers, or [min, max] with 1 ≤ min ≤ max for elastic training; not 0",
        ),
        (
            "scaling.workers",
            1.5,
            "scaling.workers: give a number of workers, or [min, max] with 1 ≤ min ≤ max for elastic training; not 1.5",
        ),
        ("scaling.zero_stage", 4, "scaling.zero_stage: input should be 0, 1, 2 or 3, not 4"),
        ("data.sources", [], "data.sources: tuple should have at least 1 item after validation, not 0, not []"),
        ("model", {}, "model.path: missing; set it"),
        ("model.path", "", "model.path: string should have at least 1 character, not ''"),
        ("objective", "dpo", "objective: name: missing; write {name: …} with one of sft, dpo, f_dpo, plackett_luce"),
        ("data.kind", "demonstration", "data.kind: dpo trains on preference, not on demonstration; change data.kind"),
        ("data.sources.0.share", 0.5, "data: sources: set `share` on all sources or on none"),
        ("data.max_prompt_length", 1024, "data: max_prompt_length: must be below max_length"),
        ("name", "a/b", "name: string should match pattern"),
    ],
)
def test_wrong_values_are_one_line_that_names_key_and_remedy(key, value, message):
    with pytest.raises(ConfigError) as error:
        validate(changed(key, value))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert "|" not in str(error.value), "one cause, one message"


def test_a_wrong_item_does_not_make_its_list_too_short():
    plain = changed("data.sources", [{"path": "first.jsonl", "pth": "x"}])
    with pytest.raises(ConfigError, match=r"^data\.sources\.0\.pth: unknown key; did you mean path\?$"):
        validate(plain)


def test_several_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        validate({**changed("optimizer.lrr", 1), "seed": "x"})
    assert str(error.value).count(" | ") == 1


def test_columns_of_trajectories_are_for_trajectories():
    plain = changed("data.eval_sources", [{"path": "x.jsonl", "trajectories": [{"steps": "solution"}]}])
    with pytest.raises(ConfigError, match=r"^data\.eval_sources\.0\.trajectories: only for data\.kind=trajectory"):
        validate(plain)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"reward": "right", "answer": "truth"}, "answer: remove it, or remove reward"),
        ({"answer_pattern": "("}, "answer_pattern: no regular expression"),
        ({"answer_pattern": "#### .*"}, "answer_pattern: needs one group"),
    ],
)
def test_a_mapping_that_cannot_work_is_refused(change, cause):
    plain = changed("data.sources.0.trajectories", [{"steps": "solution"} | change])
    with pytest.raises(ConfigError, match=rf"^data\.sources\.0\.trajectories\.0: {cause}"):
        validate(plain)


def test_kinds_that_only_some_settings_take():
    """Unpaired responses have nothing but their rewards to go by."""
    plain = changed("objective", {"name": "rejection_sft"})
    plain["data"]["kind"] = "unpaired"
    with pytest.raises(
        ConfigError, match=r"^data\.kind: rejection_sft trains on .* with these settings, not on unpaired"
    ):
        validate(plain)
    plain["objective"]["min_reward"] = 0.0
    assert validate(plain).data.kind == "unpaired"


def test_held_out_rows_have_one_source():
    plain = changed("data.eval_fraction", 0.1)
    plain["data"]["eval_sources"] = [{"path": "held_out.jsonl"}]
    with pytest.raises(ConfigError, match=r"^data: eval_fraction: remove it, or remove eval_sources"):
        validate(plain)


def test_offload_needs_a_zero_stage():
    plain = changed("scaling.offload_optimizer", True)
    assert validate(plain).scaling.offload_optimizer
    plain["scaling"]["zero_stage"] = 0
    with pytest.raises(ConfigError, match=r"^scaling\.offload_optimizer: needs scaling\.zero_stage 1, 2 or 3$"):
        validate(plain)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (b"", [], "data: missing; set it | model: missing; set it | objective: missing; set it"),
        (b"[1, 2]", [], "a configuration is a mapping of sections"),
        (b"3", [], "Invalid loaded object type"),
        (b"a: [1", [], "while parsing a flow sequence"),
        (b"a: \xff", [], "can't decode byte"),
        (b"a: 1\na: 2", [], "found duplicate key"),
        (b"a: !!python/object:os.system 1", [], "could not determine a constructor"),
        (YAML.encode(), ["train.epochs"], "train.epochs: overrides have the form key.path=value"),
        (YAML.encode(), ["=3"], "=3: overrides have the form key.path=value"),
        (YAML.encode(), ["data.sources.7.path=x"], "data.sources.7.path=x: list index out of range"),
        (YAML.encode(), ["data.sources.x.path=x"], "data.sources.x.path=x: Index 'x' (str) is not an int"),
        (YAML.encode(), ["storage=${oc.env:QALIGN_NOT_SET}"], "Environment variable 'QALIGN_NOT_SET' not found"),
        (YAML.encode(), ["train.epochs="], "train.epochs: input should be a valid integer, not None"),
    ],
)
def test_unreadable_files_and_overrides_are_one_line(tmp_path, text, overrides, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_default_that_depends_on_another_key_adds_nothing_to_that_keys_error():
    with pytest.raises(ConfigError, match=r"^objective\.variant: input should be 1 or 2, not 3$"):
        validate(changed("objective", {"name": "tdpo", "variant": 3}))
    (line,) = [line for line in describe().splitlines() if line.startswith("objective.alpha") and "variant" in line]
    assert line.startswith("objective.alpha = 0.5 ")


def test_a_best_checkpoint_needs_what_it_is_measured_on():
    plain = changed("checkpoint", {"best": "-eval/accuracy"})
    plain["data"] |= {"eval_fraction": 0.0, "eval_sources": []}
    with pytest.raises(ConfigError, match=r"^checkpoint\.best: eval/accuracy is measured on held-out rows, and there"):
        validate(plain)
    plain["data"]["eval_fraction"] = 0.1
    assert validate(plain).checkpoint.best == "-eval/accuracy"
    for wrong in ("", "-", "eval loss"):
        with pytest.raises(ConfigError, match=r"^checkpoint\.best: string should match"):
            validate(changed("checkpoint", {"best": wrong}))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such configuration file"):
        load(tmp_path / "nowhere.yaml")


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**6), 10**20), st.floats(), st.text(max_size=5), st.just("alpha")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=4,
)
PATHS = [(section, key) for section, body in PLAIN.items() for key in [*body, *RunConfig.model_fields, "unknown"]] + [
    (key, None) for key in RunConfig.model_fields
]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=3))
def test_whatever_is_wrong_is_a_config_error(mutations):
    plain = copy.deepcopy(PLAIN)
    for (section, key), value in mutations:
        if key is None or not isinstance(plain.get(section), dict):
            plain[section] = value
        else:
            plain[section][key] = value
    try:
        loaded = validate(plain)
    except ConfigError as error:
        message = str(error)
    else:
        message = "ok"
        assert validate(json.loads(json.dumps(loaded.dump()))) == loaded
    assert len(message.splitlines()) == 1


# ------------------------------------------------------------------------------------- dump, schema, digest


@pytest.mark.parametrize("name", OBJECTIVES)
def test_dump_round_trips_through_json(name):
    plain = changed("objective", {"name": name})
    plain["data"]["kind"] = min(OBJECTIVES[name]().needed().records)
    loaded = validate(plain)
    dumped = json.loads(json.dumps(loaded.dump(), allow_nan=False))
    assert validate(dumped) == loaded
    assert dumped["objective"]["name"] == name


@pytest.mark.slow
def test_schema_accepts_what_loads_and_rejects_what_does_not():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(PLAIN, schema)
    jsonschema.validate(json.loads(json.dumps(validate(PLAIN).dump())), schema)
    jsonschema.validate(changed("objective", {"name": "mine.module:Loss", "anything": 1}), schema)
    for key, value in [
        ("optimizer.lrr", 1),
        ("objective.bta", 1),
        ("objective.beta", -1),
        ("zzz", 1),
        ("scaling.zero_stage", 4),
        ("objective", {"name": "dpoo"}),
        ("objective", {"beta": 0.1}),
    ]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed(key, value), schema)


def test_schema_explains_each_key():
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    described = [field for section in sections for field in section.get("properties", {}).values()]
    assert sum("description" in field for field in described) > len(described) / 2
    beta = next(b for b in schema["properties"]["objective"]["anyOf"] if b["properties"]["name"].get("const") == "dpo")
    assert beta["properties"]["beta"]["exclusiveMinimum"] == 0


def test_digest_names_content():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest("a", "b") != digest("ab")
    assert os.path.basename(digest("x")) == digest("x")
    assert len(digest("x")) == 16


def test_the_critic_keeps_its_own_learning_rate():
    """Also where only another of its optimizer's keys is given."""
    assert validate(changed("critic", {"optimizer": {"schedule": "constant"}})).critic.optimizer.lr == 1e-5
    assert validate(changed("seed", 1)).critic.optimizer.lr == 1e-5
