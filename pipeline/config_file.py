"""From a YAML file and dotted overrides to a `RunConfig`; and from its types to help texts.

`load("demo.yaml", ["objective.beta=0.3"])` reads the YAML, lays the overrides over it, and validates the whole: an unknown
key, a value out of range or a combination that cannot work is a `ConfigError` of one line, before any cluster work
starts. The precedence is overrides > YAML > defaults; nothing is changed after validation.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config import ConfigError, RunConfig, Section
from pipeline.objectives import OBJECTIVES, resolve

SHOWN = 100
"""Characters of a wrong value that a message has room for."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, set each `key.path=value` in turn, validate. Raises `ConfigError`.

    A number steps into a list (`data.sources.0.path=x`); a mapping or list replaces what was there.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such configuration file")
    where = str(path)
    try:
        tree = OmegaConf.load(path)
        if not OmegaConf.is_dict(tree):
            return validate(None)
        for where in overrides:
            key, equals, value = where.partition("=")
            if not (key and equals):
                raise ConfigError(f"{' '.join(where.split())}: overrides have the form key.path=value")
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
            OmegaConf.update(tree, key, parsed["value"], merge=False)
        where = str(path)
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError, TypeError, ValueError) as error:
        raise ConfigError(" ".join(f"{where}: {error}".split())) from None
    return validate(plain)


def validate(plain: Any) -> RunConfig:
    """Plain JSON types → RunConfig, or a `ConfigError` of one line."""
    if not isinstance(plain, Mapping):
        raise ConfigError("a configuration is a mapping of sections (data, model, objective, …)")
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(_one_line(error, plain)) from None


def _one_line(error: ValidationError, plain: Mapping[str, Any]) -> str:
    """All problems of a validation in one line, each with its dotted key and, for a typo, the likely key."""
    problems = []
    found = error.errors()
    for problem in found:
        if any(other["loc"][: len(problem["loc"])] == problem["loc"] != other["loc"] for other in found):
            continue  # a list is "too short" only because of an item that is wrong itself
        if problem["type"] == "default_factory_not_called":
            continue  # only because of another key, which it depends on
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _known_keys(problem["loc"][:-1], plain), n=1)
            message = "unknown key" + (f"; did you mean {near[0]}?" if near else "; remove it")
        elif problem["type"] == "missing":
            message = "missing; set it"
        elif problem["type"] != "value_error":
            message = f"{message[:1].lower()}{message[1:]}, not {_shown(problem['input'])}"
            if share := _PERCENT.fullmatch(str(problem["input"])):
                message += f"; write {float(share[1]) / 100:g}"
        problems.append(f"{key}: {message}" if key else message)
    return " ".join(" | ".join(problems).split())


_PERCENT = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*%\s*")


def _shown(value: Any) -> str:
    """The value as Python writes it; of a number of many digits, the first and the last ones; of much else, the beginning."""
    if isinstance(value, int):
        return reprlib.repr(value)
    written = repr(value)
    return written if len(written) <= SHOWN else f"{written[:SHOWN]}…"


def _known_keys(location: tuple[int | str, ...], plain: Mapping[str, Any]) -> list[str]:
    """Field names of the section at `location`."""
    if location == ("objective",):
        return list(resolve(str(plain["objective"]["name"])).model_fields)
    model: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        model = _section_in(annotation)
        if model is None:
            return []
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """The Section class in an annotation such as `tuple[Source, ...]` or `LoraSection | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_in(inner)) is not None:
            return found
    return None


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for completion in editors; one branch per built-in objective."""
    schema = RunConfig.model_json_schema()
    branches = []
    for name, objective in OBJECTIVES.items():
        branch = objective.model_json_schema()
        schema["$defs"].update(branch.pop("$defs", {}))
        branch["properties"] = {"name": {"const": name}, **branch.get("properties", {})}
        branch["required"] = ["name", *branch.get("required", [])]
        branches.append(branch)
    dotted = {"type": "object", "properties": {"name": {"type": "string", "pattern": ":"}}, "required": ["name"]}
    schema["properties"]["objective"] = {"anyOf": [*branches, dotted]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "qalign", **schema}


def describe() -> str:
    """Every key with its default and meaning, for `qalign keys`."""
    lines = _describe_section(RunConfig, "")
    for name, objective in OBJECTIVES.items():
        lines.append(f"\nobjective.name={name}: {(objective.__doc__ or '').strip().splitlines()[0]}")
        lines += _describe_section(objective, "objective.")
    return "\n".join(lines)


def _describe_section(model: type[BaseModel], prefix: str) -> list[str]:
    lines, defaults = [], dict[str, Any]()
    for name, info in model.model_fields.items():
        defaults[name] = info.get_default(call_default_factory=True, validated_data=defaults)
        section = _section_in(info.annotation)
        if section is not None and name != "objective":
            lines += ["", f"[{prefix}{name}] {(section.__doc__ or '').strip().splitlines()[0]}"]
            lines += _describe_section(section, f"{prefix}{name}.")
        elif name != "objective":
            default = "required" if info.is_required() else repr(defaults[name])
            lines.append(f"{prefix}{name} = {default}    {(info.description or '').strip()}")
    return lines
