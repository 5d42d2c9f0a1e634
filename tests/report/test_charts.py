from __future__ import annotations

import math

import pytest

from pipeline.evaluation.results import Bin
from pipeline.report.charts import DASHES, Frame, Series, place_texts
from pipeline.report.content import Point, Trial
from pipeline.report.curves import POINTS, averaged, curves
from pipeline.report.frontier import efficient, frontier
from pipeline.report.parameters import parameter_charts
from pipeline.report.reliability import reliability, wilson


def trial(objective: str, beta: float, kl: float, reward: float, **more) -> Trial:
    parameters = {"objective.beta": beta}
    points = (Point(kl=kl, reward=reward, label=f"{beta:g}"),)
    return Trial(label=f"{objective} {beta}", objective=objective, parameters=parameters, points=points, **more)


def test_the_frontier_is_what_nobody_beats():
    points = [Point(kl=k, reward=r) for k, r in [(1, 0.2), (2, 0.5), (2, 0.4), (3, 0.5), (4, 0.9), (4, 0.9)]]
    assert efficient(points) == [True, True, False, False, True, True]


def test_the_reference_stands_once_at_no_kl_and_its_own_reward():
    trials = [trial("dpo", beta, kl, 0.5) for beta, kl in [(1.0, 1.0), (0.1, 4.0)]]
    measured = [t.model_copy(update={"metrics": {"reference/reward": 0.3, "reference/reward_se": 0.1}}) for t in trials]
    chart = frontier(measured)
    assert [series.name for series in chart.series] == ["dpo", "reference"]
    (mark,) = chart.series[1].marks
    first = chart.series[0].marks[0]
    assert mark.x < first.x and mark.y > first.y and not mark.hollow, (
        "left of and below every policy, and beaten by none"
    )
    assert chart.table.rows[-1] == ["reference", "before training", "–", "0", "–", "0.3", "0.1", "yes"]
    assert [series.name for series in frontier(trials).series] == ["dpo"], "nobody measured it"


def test_a_frontier_draws_more_reward_higher_and_more_kl_further_right():
    chart = frontier([trial("dpo", 1.0, 1.0, 0.2), trial("dpo", 0.1, 4.0, 0.6), trial("ipo", 0.1, 6.0, 0.5)])
    dpo, ipo = chart.series
    low, high, beaten = *dpo.marks, *ipo.marks
    assert low.x < high.x < beaten.x
    assert high.y < beaten.y < low.y  # pixels count downwards
    assert [m.hollow for m in (low, high, beaten)] == [False, False, True]
    assert [m.text for m in (low, high, beaten)] == ["1", "0.1", "0.1"]
    assert (dpo.name, ipo.name) == ("dpo", "ipo") and dpo.colour != ipo.colour and dpo.marker != ipo.marker
    assert [row[-1] for row in chart.table.rows] == ["yes", "yes", "no"]


def test_seeds_of_one_beta_are_joined_by_their_mean():
    chart = frontier([trial("dpo", 1.0, k, r) for k, r in [(1.0, 0.2), (3.0, 0.4)]] + [trial("dpo", 0.1, 5.0, 0.9)])
    (series,) = chart.series
    first, second, last = series.marks
    assert len(series.line) == 2
    assert series.line[0] == pytest.approx(((first.x + second.x) / 2, (first.y + second.y) / 2), abs=0.1)
    assert series.line[1] == (last.x, last.y)


def test_error_bars_are_95_percent_of_the_standard_error():
    point = Point(kl=2.0, reward=0.5, kl_error=0.5, reward_error=0.1)
    chart = frontier([Trial(label="t", objective="dpo", parameters={}, points=(point,))])
    mark = chart.series[0].marks[0]
    # At this scale: the bars span 4 · 1.96 · error of what the ticks say.
    one, two = (next(t.at for t in chart.x_ticks if t.text == text) for text in ("1", "2"))
    assert two - one > 50
    left = float(mark.bars[1:].split()[0])
    assert (mark.x - left) / (two - one) == pytest.approx(1.96 * 0.5, abs=0.01)


def test_no_two_of_56_objectives_look_alike():
    looks = {(series.colour, series.marker) for series in (Series("", i, []) for i in range(56))}
    assert len(looks) == 56
    assert len(set(DASHES)) == len(DASHES)


def test_texts_avoid_marks_and_each_other_where_there_is_room():
    frame = Frame(400, 300)
    marks = [(150.0, 100.0, "0.1"), (175.0, 100.0, "0.3"), (385.0, 100.0, "1")]
    (x1, _, side1), (x2, _, side2), (x3, _, side3) = place_texts(marks, frame)
    assert side1 == "end" and x1 < 150  # on its right stands the second mark
    assert side2 == "start" and x2 > 175
    assert side3 == "end" and x3 < 385  # on its right the frame ends


def test_reliability_marks_lie_at_confidence_and_accuracy():
    bins = [
        Bin(low=0.5, high=0.75, confidence=0.6, accuracy=0.6, n=10),
        Bin(low=0.75, high=1.0, confidence=0.8, accuracy=0.4, n=40),
    ]
    chart = reliability(bins, "r", "title", "x", "")
    right, sure = chart.series[0].marks
    x1, y1, x2, y2 = chart.guide
    on_diagonal = [y1 + (mark.x - x1) / (x2 - x1) * (y2 - y1) for mark in (right, sure)]
    assert right.y == pytest.approx(on_diagonal[0], abs=0.2)
    assert sure.y > on_diagonal[1] + 50  # too sure: below the diagonal
    assert chart.boxes[1].height == pytest.approx(4 * chart.boxes[0].height, abs=0.2)
    assert reliability([], "r", "title", "x", "") is None


def test_wilson_interval_of_8_of_10():
    # Newcombe 1998 and any table of the Wilson score: 8/10 → 0.4902 … 0.9433.
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(1.0, 5)[1] == 1.0 and wilson(0.0, 5)[0] == 0.0


def test_averages_keep_the_mean_and_short_runs_as_they_are():
    found = [(float(s), float(s * s)) for s in range(1, 1001)]
    binned = averaged(found, 100)
    assert len(binned) == 100 and binned[0] == (5.5, 38.5)
    assert sum(v for _, v in binned) / 100 == pytest.approx(sum(v for _, v in found) / 1000)
    assert averaged(found[:7], 100) == found[:7]


def test_curves_say_what_they_leave_out_and_pair_training_with_held_out():
    lines = [{"step": s, "loss": math.nan if s == 2 else 1.0 / s} for s in range(1, 1001)] + [
        {"step": 1000, "eval/loss": 0.5}
    ]
    (chart,) = curves(lines)
    train, held_out = chart.series
    assert [s.name for s in chart.series] == ["loss", "loss, held-out"]
    assert (train.colour, train.marker) == (held_out.colour, held_out.marker)
    assert train.dash != held_out.dash and held_out.hollow and not train.hollow
    assert len(train.line) == POINTS
    assert "1 values that are not finite" in chart.caption and "mean of about 7 steps" in chart.caption
    assert chart.table.rows[-1][2] == "0.5"
    assert curves([]) == [] and curves([{"step": 1, "unknown": 1.0}]) == []


def test_parameters_are_plotted_by_number_or_by_name():
    found = [
        Trial(label=str(i), objective="dpo", parameters={"a": a, "b": b, "same": 1}, metrics={"m": m})
        for i, (a, b, m) in enumerate([(0.01, "x", 1.0), (1.0, "y", 2.0), (0.1, "x", 3.0), (0.1, "y", math.nan)])
    ]
    by_number, by_name = parameter_charts(found, "m")
    xs = [mark.x for mark in by_number.series[0].marks]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)  # a decade each: logarithmic
    assert [t.text for t in by_number.x_ticks] == ["0.01", "0.1", "1"]
    assert [t.text for t in by_name.x_ticks] == ["x", "y"]
    assert [row[-1] for row in by_name.table.rows] == ["1", "2", "3"]  # the trial that is not a number is not drawn
