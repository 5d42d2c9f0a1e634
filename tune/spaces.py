"""What a sweep varies: dimensions over dotted configuration keys, and points in them → configurations.

A point gives each dimension a plain number: the index of an option, or the value itself. So points fit into JSON, name
trials, and mean the same to every search.

Left out: which points are tried, and in which order (`search`).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import ConfigError, Range, RunConfig
from pipeline.config_file import validate
from pipeline.objectives import OBJECTIVES, resolve

Point = dict[str, int | float]
"""Dimension's key → index of its option, or its value."""

FIXED = {
    "storage": "all trials share it",
    "tracking": "all trials are tracked in one place",
    "scaling": "trials share their workers",
    "sweep": "a sweep has no sweeps",
    **dict.fromkeys(("name", "checkpoint", "checkpoint_from", "sampling", "evaluation"), "it does not change training"),
}
"""Sections that cannot be swept, and why."""
DIVERGENCES: tuple[dict[str, Any], ...] = (
    {"objective.divergence": "reverse_kl", "objective.beta": 0.1},
    {"objective.divergence": "jensen_shannon", "objective.beta": 0.1},
    {"objective.divergence": "forward_kl", "objective.beta": 1e-5},
    *({"objective.divergence": "alpha", "objective.alpha": alpha, "objective.beta": 0.01} for alpha in (0.3, 0.5, 0.7)),
)
"""With β as the authors of f-DPO shrink it (arXiv 2309.16240); where β is swept too, that dimension decides."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A dimension of options; each sets one key, or several that belong together."""

    key: str
    options: tuple[dict[str, Any], ...]

    def grid(self) -> Sequence[int]:
        return range(len(self.options))

    def sample(self, generator: random.Random) -> int:
        return generator.randrange(len(self.options))

    def overrides(self, value: float) -> dict[str, Any]:
        return self.options[int(value)]


@dataclass(frozen=True, slots=True)
class Interval:
    """A dimension of numbers."""

    key: str
    range: Range

    def grid(self) -> Sequence[float]:
        """`points` values, evenly spaced, both ends included."""
        last = self.range.points - 1
        values = [self._at(i / last) for i in range(last + 1)]
        return list(dict.fromkeys(values))  # whole numbers may coincide

    def sample(self, generator: random.Random) -> float:
        return self._at(generator.random())

    def overrides(self, value: float) -> dict[str, Any]:
        return {self.key: int(value) if self.range.integer else float(f"{value:.6g}")}

    def _at(self, share: float) -> float:
        low, high = self.range.low, self.range.high
        if self.range.log:
            value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        else:
            value = low + share * (high - low)
        value = float(round(value)) if self.range.integer else float(f"{value:.6g}")
        return min(max(value, low), high)


class Space:
    """All dimensions of a sweep over `config`.

    Raises ConfigError for a key that is unknown, cannot be swept, has no default space, or takes a value out of range.
    """

    def __init__(self, config: RunConfig) -> None:
        assert config.sweep is not None
        self._config = config
        # Of the objective, what the user set: what the rest defaults to may depend on the key that is swept.
        self._base = config.dump() | {"sweep": None, "objective": _renamed(config, config.objective_name)}
        self.dimensions: tuple[Choice | Interval, ...] = tuple(
            _dimension(key, found, config) for key, found in config.sweep.space.items()
        )
        self._check()

    def grid(self) -> Iterator[Point]:
        """All combinations; the first dimension varies slowest."""
        keys = [dimension.key for dimension in self.dimensions]
        for values in itertools.product(*(dimension.grid() for dimension in self.dimensions)):
            yield dict(zip(keys, values, strict=True))

    def sample(self, generator: random.Random) -> Point:
        """One point, uniform (on its scale) in each dimension."""
        return {dimension.key: dimension.sample(generator) for dimension in self.dimensions}

    def overrides(self, point: Point) -> dict[str, Any]:
        """Dotted key → value of what a point sets, sections before their keys. A dimension outdoes another's extras."""
        sets = [dimension.overrides(point[dimension.key]) for dimension in self.dimensions]
        extras = {key: value for found in reversed(sets) for key, value in found.items()}
        own = {dimension.key: found[dimension.key] for dimension, found in zip(self.dimensions, sets, strict=True)}
        return dict(
            sorted((extras | own).items(), key=lambda item: (item[0].count("."), not item[0].endswith(".name")))
        )

    def configure(self, point: Point) -> tuple[RunConfig, dict[str, Any]]:
        """A trial's configuration and the overrides that make it. Raises ConfigError.

        A key of the section `objective` that this point's objective does not have is left out: objectives differ.
        """
        plain, applied = _copy(self._base), {}
        for key, value in self.overrides(point).items():
            if key == "objective.name":
                plain["objective"] = _renamed(self._config, value)
            elif not self._skips(plain, key):
                _set(plain, key, value)
            else:
                continue
            applied[key] = value
        return validate(plain), applied

    @property
    def sweeps_objectives(self) -> bool:
        return any(dimension.key in ("objective", "objective.name") for dimension in self.dimensions)

    def corners(self) -> Iterator[Point]:
        """Each option and both ends of each interval at least once, with every objective of the sweep."""
        ends = [d.grid() if isinstance(d, Choice) else (d.range.low, d.range.high) for d in self.dimensions]
        first = {d.key: values[0] for d, values in zip(self.dimensions, ends, strict=True)}
        names = [(d.key, d.grid()) for d in self.dimensions if d.key in ("objective", "objective.name")]
        for chosen in itertools.product(*(values for _, values in names)):
            base = first | {key: value for (key, _), value in zip(names, chosen, strict=True)}
            for dimension, values in zip(self.dimensions, ends, strict=True):
                yield from ({**base, dimension.key: value} for value in values if dimension.key not in dict(names))
            yield base

    def preparations(self, grid: bool) -> Iterator[Point]:
        """Points that show every value of the keys that rows or reference log-probs may depend on.

        Raises ConfigError for such a key with a range that is not `grid`: there would be no end of them.
        """
        values: list[Sequence[float]] = []
        for dimension in self.dimensions:
            prepares = dimension.key.partition(".")[0] in ("data", "model", "seed", "objective")
            if isinstance(dimension, Interval) and dimension.key.partition(".")[0] in ("data", "model", "seed"):
                if not grid:
                    raise ConfigError(
                        f"sweep.space.{dimension.key}: rows are prepared before trials start; write a list of values"
                    )
                values.append(dimension.grid())
            else:
                first = dimension.grid()[:1]
                values.append(dimension.grid() if isinstance(dimension, Choice) and prepares else first)
        for chosen in itertools.product(*values):
            yield {d.key: value for d, value in zip(self.dimensions, chosen, strict=True)}

    def _check(self) -> None:
        """Every key reaches a configuration, and every option and end is valid by itself."""
        reached: set[str] = set()
        for point in self.corners():
            try:
                reached |= self.configure(point)[1].keys()
            except ConfigError as error:
                raise ConfigError(f"sweep.space: {error}") from None
        for dimension in self.dimensions:
            if dimension.key not in reached:
                raise ConfigError(f"sweep.space.{dimension.key}: no objective of this sweep has it; remove the key")

    def _skips(self, plain: dict[str, Any], key: str) -> bool:
        section, _, field = key.partition(".")
        if section != "objective" or not field or not self.sweeps_objectives:
            return False
        try:
            return field not in resolve(str(plain["objective"]["name"])).model_fields
        except (ValueError, KeyError, TypeError):
            return False  # the validation says what is wrong


# ------------------------------------------------------------------------------------------- configured → dimension


def _dimension(key: str, found: Range | tuple[Any, ...] | str, config: RunConfig) -> Choice | Interval:
    section = key.partition(".")[0]
    if section in FIXED:
        raise ConfigError(f"sweep.space.{key}: cannot be swept ({FIXED[section]}); remove it")
    if found == "default":
        return _default(key, config)
    if isinstance(found, Range):
        return Interval(key, found)
    assert isinstance(found, tuple)
    return Choice(key, tuple({key: value} for value in found))


def _default(key: str, config: RunConfig) -> Choice | Interval:
    """The space of a key that the user left to us. Raises ConfigError where there is none."""
    rates = {"optimizer.lr": config.optimizer.lr, "critic.optimizer.lr": config.critic.optimizer.lr}
    if key in rates:
        lr = rates[key]
        return Interval(key, Range(low=float(f"{lr / 10:.6g}"), high=float(f"{lr * 10:.6g}"), log=True, points=3))
    if key == "objective.divergence":
        return Choice(key, DIVERGENCES)
    if key == "objective":
        return Choice(key, tuple({key: {"name": name}} for name in _alike(config)))
    ranges = {
        "objective.beta": Range(low=0.01, high=1.0, log=True),
        "objective.lam": Range(low=0.0, high=1.0),
        "objective.alpha": Range(low=0.1, high=0.9),
        **{f"objective.{name}_weight": Range(low=0.1, high=1.0, log=True) for name in ("nll", "align", "focus")},
        "latent.n_latents": Range(low=1, high=8, integer=True, points=8),
    }
    if key not in ranges:
        known = ", ".join([*rates, *ranges, "objective.divergence", "objective"])
        raise ConfigError(f"sweep.space.{key}: has no default space; write values or a range (defaults: {known})")
    return Interval(key, ranges[key])


def _alike(config: RunConfig) -> list[str]:
    """Built-in objectives that train the same kind of model on the same records."""
    wanted = config.objective.needed().model
    return [
        name
        for name, objective in OBJECTIVES.items()
        if config.data.kind in objective().needed().records and objective().needed().model == wanted
    ]


# ------------------------------------------------------------------------------------------------ plain trees


def _copy(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node


def _renamed(config: RunConfig, name: str) -> dict[str, Any]:
    """The objective under another name: what the user set and the other one has as well is kept."""
    kept = config.objective.model_dump(mode="json", include=config.objective.model_fields_set)
    try:
        fields = resolve(name).model_fields
    except ValueError:
        return {"name": name}
    return {"name": name} | {field: value for field, value in kept.items() if field in fields}


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; numbers step into lists, missing sections are made. Raises ConfigError."""
    *path, last = key.split(".")
    node: Any = tree
    for part in path:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: there is no such key; see `qalign keys`")
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = _copy(value)
    elif isinstance(node, dict):
        node[last] = _copy(value)
    else:
        raise ConfigError(f"{key}: there is no such key; see `qalign keys`")
