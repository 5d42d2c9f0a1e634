"""Which points come next; after a restart, too."""

from __future__ import annotations

import math
import sys

import pytest

from pipeline.config import ConfigError
from tune import search
from tune.search import Search, key_of
from tune.spaces import Point, Space

RANGE = "sweep.space={objective.beta: {low: 0.01, high: 1, log: true}, optimizer.lr: [1e-5, 1e-4]}"


@pytest.fixture
def begin(make_config):
    """begin("sweep.trials=4", known=[…]) → a search over `RANGE`."""

    def make(*overrides: str, known: list[Point] = ()) -> Search:  # type: ignore[assignment]
        config = make_config(RANGE, *overrides)
        return search.start(config, Space(config), known)

    return make


def all_of(found: Search, value: float | None = 0.5) -> list[Point]:
    points = []
    while (point := found.propose()) is not None:
        points.append(point)
        found.tell(point, value)
    return points


def keys(points: list[Point]) -> list[str]:
    return [key_of(point) for point in points]


@pytest.mark.parametrize("kind", ["grid", "random"])
def test_a_restart_goes_on_where_the_first_call_ended(begin, kind: str) -> None:
    options = (f"sweep.search={kind}", "sweep.trials=10")
    whole = all_of(begin(*options))
    assert len(set(keys(whole))) == len(whole) == 10
    assert keys(all_of(begin(*options, known=whole[:4]))) == keys(whole[4:])
    assert all_of(begin(*options, known=whole)) == []


def test_more_random_trials_may_be_asked_for_later(begin) -> None:
    few = all_of(begin("sweep.search=random", "sweep.trials=3"))
    more = all_of(begin("sweep.search=random", "sweep.trials=5", known=few))
    assert keys([*few, *more]) == keys(all_of(begin("sweep.search=random", "sweep.trials=5")))


def test_seeds_make_other_random_points(begin) -> None:
    one, other = (all_of(begin("sweep.search=random", "sweep.trials=3", f"seed={s}")) for s in (0, 1))
    assert not set(keys(one)) & set(keys(other))


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_a_small_space_ends_before_the_trials_do(make_config, kind: str) -> None:
    if kind == "optuna":
        pytest.importorskip("optuna")
    config = make_config("sweep.space={objective.beta: [0.1, 0.2, 0.3]}", f"sweep.search={kind}", "sweep.trials=50")
    points = all_of(search.start(config, Space(config), []))
    assert sorted(point["objective.beta"] for point in points) == [0, 1, 2]


OPTUNA = ("sweep.search=optuna", "sweep.metric=eval/loss")


def test_optuna_goes_to_where_the_loss_is_least(begin) -> None:
    pytest.importorskip("optuna")
    found, losses = begin(*OPTUNA, "sweep.trials=40"), []
    while (point := found.propose()) is not None:
        losses.append((math.log10(point["objective.beta"]) + 1) ** 2)  # least at β = 0.1
        found.tell(point, losses[-1])
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_optuna_goes_on_from_what_an_earlier_call_found(begin) -> None:
    pytest.importorskip("optuna")
    known = all_of(begin("sweep.search=random", "sweep.trials=40"))

    def goes_to(best: float) -> float:
        """Mean log10 β of what is proposed after trials whose loss was least at β = `best`."""
        found, points = begin(*OPTUNA, "sweep.trials=60", known=known), []
        for point in known:
            found.tell(point, abs(math.log10(point["objective.beta"] / best)))
        while (point := found.propose()) is not None:
            points.append(point)
            found.tell(point, None)  # they failed: no value
        assert len(points) == 20 and not set(keys(points)) & set(keys(known))
        return sum(math.log10(point["objective.beta"]) for point in points) / 20

    assert goes_to(0.02) < goes_to(0.7) - 0.5


def test_without_optuna_the_remedy_is_told(begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"^sweep\.search: optuna is not installed; pip install optuna"):
        begin("sweep.search=optuna")
