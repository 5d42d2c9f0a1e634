"""Every numeric key of the configuration at and beyond its bounds: a configuration that works, or one line that names the key."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from pipeline.config import ConfigError, RunConfig
from pipeline.config_file import _section_in, validate
from pipeline.contracts import Objective
from pipeline.objectives import OBJECTIVES
from pipeline.sections.base import FLOAT32_LARGEST, FLOAT32_SMALLEST, INT64_LARGEST

NUMBERS = [-INT64_LARGEST, -1, -1.0, 0, 0.0, 0.5, 1, 2, INT64_LARGEST, FLOAT32_SMALLEST, FLOAT32_LARGEST]
BEYOND = [2**200, -(2**200), 10**300, 1e-320, -1e-39, 1e39, 1e308, float("inf"), float("nan")]


def numeric(annotation: Any) -> bool:
    return annotation in (int, float) or any(numeric(inner) for inner in get_args(annotation))


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted numeric keys; lists of sections under their first place."""
    for name, info in model.model_fields.items():
        section = _section_in(info.annotation)
        if section is not None:
            listed = "tuple" in str(info.annotation)
            yield from keys(section, f"{prefix}{name}.{'0.' if listed else ''}")
        elif numeric(info.annotation) and name != "label":  # evaluation.label: a name or a place, any will do here
            yield f"{prefix}{name}"


PLAIN = {
    "data": {
        "kind": "trajectory",
        "sources": [{"path": "a", "trajectories": [{"steps": "x"}]}],
        "eval_sources": [{"path": "a", "trajectories": [{"steps": "x"}]}],
    },
    "model": {"path": "m", "lora": {}},
    "objective": {"name": "sft"},
    "sampling": {"prompts": {"path": "p", "trajectories": [{"steps": "x"}]}},
    "evaluation": {"planted": {"path": "p", "trajectories": [{"steps": "x"}]}},
}
SHARED = [key for key in keys(RunConfig) if not key.startswith(("objective", "sweep"))]
OWN = [(name, key) for name, objective in OBJECTIVES.items() for key in keys(objective)]


def configured(key: str, value: Any, objective: str = "sft") -> RunConfig:
    plain = copy.deepcopy(PLAIN)
    plain["objective"] = {"name": objective}
    kinds = OBJECTIVES[objective].needs.records
    if "trajectory" not in kinds:
        plain["data"] = {"kind": min(kinds), "sources": [{"path": "a"}]}
    node: Any = plain
    *path, last = key.split(".")
    for part in path:
        node = node[int(part)] if part.isdecimal() else node.setdefault(part, {})
    node[last] = value
    return validate(plain)


def outcome(key: str, value: Any, objective: str = "sft") -> RunConfig | None:
    """The configuration, or None where one line names the key (or the setting that it has to fit)."""
    try:
        return configured(key, value, objective)
    except ConfigError as error:
        text = str(error)
        named = {key, key.rpartition(".")[2], re.sub(r"\.\d+\.", ".", key)}
        assert "\n" not in text
        assert len(text) < 400
        assert any(name in text for name in named), text
        return None


def test_keys_are_found():
    assert {"seed", "data.max_length", "data.sources.0.share", "model.lora.r", "decoding.beams"} <= set(SHARED)
    assert len(SHARED) > 70
    assert ("dpo", "beta") in OWN


@pytest.mark.parametrize("value", NUMBERS)
def test_a_number_is_taken_as_it_is_or_refused_under_its_key(value):
    taken = [key for key in SHARED if outcome(key, value) is not None]
    taken += [f"{name}.{key}" for name, key in OWN if outcome(f"objective.{key}", value, name) is not None]
    assert value < 0 or taken


@pytest.mark.parametrize("value", BEYOND, ids=str)
def test_what_neither_float32_nor_64_bits_hold_is_refused_everywhere(value):
    """A scale that is lost in float32 makes losses 0 or infinite, and a count beyond 64 bits breaks whatever counts with it."""
    for key in SHARED:
        assert outcome(key, value) is None, key
    for name, key in OWN:
        assert outcome(f"objective.{key}", value, name) is None, key


def test_an_objective_of_ones_own_is_held_to_the_same_numbers():
    class Own(Objective):
        scale: float = 1.0

    with pytest.raises(ValueError, match="beyond float32"):
        Own(scale=1e-320)
    assert Own(scale=1e-30).scale == 1e-30


# ----------------------------------------------------------------------------------------------- jobs

TRAINED = ["seed", "data", "model.lora", "optimizer", "train", "scaling", "checkpoint", "latent"]
DRY = [key for key in SHARED if key.startswith(tuple(TRAINED)) and "trajectories" not in key]
DECODED = [key for key in SHARED if re.fullmatch(r"(sampling|decoding)\.\w+", key)]
BUSY = {"sampling.per_prompt", "decoding.n", "decoding.rollouts"}
"""Whose largest values are work for days."""
METHODS = [
    ["beam", "decoding.beams=5"],
    ["best_of_n", "sampling.scorer=tests.test_number_bounds:length"],
    ["controlled", "sampling.scorer=tests.test_number_bounds:length", "decoding.candidates=2"],
    ["proxy"],
    ["sampling"],
]


def length(prompt: str, response: str) -> float:
    return float(len(response))


def extremes(key: str) -> list[Any]:
    """Accepted numbers, the smallest and the largest of them, and one."""
    accepted = [value for value in NUMBERS if outcome(key, value) is not None]
    return sorted({min(accepted), max(accepted), 1} & set(accepted)) if accepted else []


@pytest.mark.slow
@pytest.mark.parametrize("key", DRY)
def test_a_dry_run_at_the_bounds_is_a_report_or_one_line(qalign, key, pairs_file):
    for value in extremes(key):
        given = f"eval_sources=[{{path: {pairs_file}, share: {value}}}]" if "eval_sources" in key else f"{key}={value}"
        status, _, error = qalign("train", "--dry-run", f"data.{given}" if "eval_sources" in key else given)
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert (status, len(lines)) in {(0, 0), (2, 1)}, error


@pytest.mark.slow
@pytest.mark.parametrize("key", DECODED)
def test_decoding_at_the_bounds_is_completions_or_one_line(qalign, key, tmp_path: Path, tiny_model):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(3)))
    for value in extremes(key):
        if key in BUSY and value > 2:
            continue
        for i, (method, *more) in enumerate(METHODS):
            status, _, error = qalign(
                "decode",
                f"checkpoint_from={tiny_model}",
                f"sampling.prompts={{path: {prompts}}}",
                f"sampling.output={tmp_path}/{key}-{value}-{i}.jsonl",
                "sampling.max_new_tokens=2",
                "sampling.limit=2",
                "sampling.batch_size=2",
                f"decoding.method={method}",
                *more,
                f"{key}={value}",
            )
            lines = [line for line in error.splitlines() if line.startswith("error: ")]
            assert (status, len(lines)) in {(0, 0), (2, 1)}, error
