"""Which points of a space are tried next: a grid, random points, or Optuna's TPE sampler.

A search is asked with `propose` and told with `tell`. All are deterministic in the seed and in what they were told, which is
how a sweep that was killed goes on.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import count
from typing import Any

from pipeline.config import ConfigError, RunConfig
from tune.spaces import Choice, Point, Space

PATIENCE = 100
"""Known points in a row, beside those of earlier calls, after which a space counts as exhausted."""


def key_of(point: Point) -> str:
    """A point as text: equal points, equal texts."""
    return " ".join(f"{name}={value!r}" for name, value in sorted(point.items()))


class Search:
    """Proposes points that are not known yet.

    Args:
        points: candidates, in order; those of a search without end may repeat.
        known: points that were tried before.
        trials: how many points there are to be, known ones included; None: all candidates.
    """

    def __init__(self, points: Iterable[Point], known: Iterable[Point], trials: int | None = None) -> None:
        self._points, self._known = iter(points), {key_of(point) for point in known}
        self._trials = trials

    def propose(self) -> Point | None:
        """The next new point; None: there are no more."""
        if self._trials is not None and len(self._known) >= self._trials:
            return None
        patience = PATIENCE + len(self._known)
        for point in self._points:
            if key_of(point) not in self._known:
                self._known.add(key_of(point))
                return point
            patience -= 1
            if self._trials is not None and not patience:
                return None
        return None

    def tell(self, point: Point, value: float | None) -> None:
        """What a point led to; None: nothing that can be compared."""


class Grid(Search):
    """All combinations, in order."""

    def __init__(self, space: Space, known: Iterable[Point]) -> None:
        super().__init__(space.grid(), known)


class Random(Search):
    """`trials` different points at random."""

    def __init__(self, space: Space, trials: int, seed: int, known: Iterable[Point]) -> None:
        generator = random.Random(seed)  # noqa: S311 - no secret
        super().__init__((space.sample(generator) for _ in count()), known, trials)


class Optuna(Search):
    """`trials` points where the sampler expects the most. Raises ConfigError when optuna is not installed."""

    def __init__(self, space: Space, trials: int, seed: int, maximise: bool, known: Iterable[Point]) -> None:
        try:
            import optuna
        except ImportError:
            raise ConfigError("sweep.search: optuna is not installed; pip install optuna, or take random") from None
        known = list(known)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Another seed after a restart: the same one would propose the same first points again.
        sampler = optuna.samplers.TPESampler(seed=seed + len(known))
        self._study = optuna.create_study(sampler=sampler, direction="maximize" if maximise else "minimize")
        self._distributions = {d.key: _distribution(d) for d in space.dimensions}
        self._asked: dict[str, Any] = {}
        super().__init__((self._ask() for _ in count()), known, trials)

    def tell(self, point: Point, value: float | None) -> None:
        import optuna

        state = optuna.trial.TrialState.COMPLETE if value is not None else optuna.trial.TrialState.FAIL
        asked = self._asked.pop(key_of(point), None)
        if asked is not None:
            self._study.tell(asked, value, state=state)
            return
        told = optuna.trial.create_trial(params=point, distributions=self._distributions, value=value, state=state)
        self._study.add_trial(told)

    def _ask(self) -> Point:
        trial = self._study.ask(self._distributions)
        point = dict(trial.params)
        if key_of(point) in self._known:
            self._study.tell(trial, state=_failed())  # told already, when it was tried
        else:
            self._asked[key_of(point)] = trial
        return point


def _failed() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL


def _distribution(dimension: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choice):
        return CategoricalDistribution(tuple(dimension.grid()))
    span = dimension.range
    if span.integer:
        return IntDistribution(int(span.low), int(span.high), log=span.log)
    return FloatDistribution(span.low, span.high, log=span.log)


def start(config: RunConfig, space: Space, known: Iterable[Point]) -> Search:
    """The search that `config.sweep` names; `known` points are not proposed again. Raises ConfigError."""
    assert config.sweep is not None
    settings, known = config.sweep, list(known)
    if settings.search == "grid":
        return Grid(space, known)
    if settings.search == "random":
        return Random(space, settings.trials, config.seed, known)
    return Optuna(space, settings.trials, config.seed, settings.maximise, known)
