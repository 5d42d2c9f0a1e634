from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.scales import Scale, number

SIZES = st.floats(1e-6, 1e6)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3.0, "3"),
        (-0.12346, "−0.1235"),
        (1e-5, "1e−5"),
        (1234567.0, "1.235e6"),
        (None, "–"),
        (math.nan, "not a number"),
        (-math.inf, "−∞"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert number(value) == text


@given(st.floats(-1e6, 1e6), SIZES, st.booleans())
def test_ticks_are_inside_the_scale_evenly_spaced_and_read_as_what_they_are(low, width, downwards):
    start, end = (300.0, 10.0) if downwards else (10.0, 300.0)
    scale = Scale(low, low + width, start, end)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 6
    assert all(9.9 <= tick.at <= 300.1 for tick in ticks)
    gaps = [b.at - a.at for a, b in pairwise(ticks)]
    assert max(gaps) - min(gaps) < 0.3
    for tick in ticks:
        written = float(tick.text.replace("−", "-"))
        assert scale(written) == pytest.approx(tick.at, abs=0.3 + 290 * abs(written) * 1e-5 / width)


@given(SIZES, st.floats(1.5, 1e6))
def test_a_logarithmic_scale_keeps_ratios_and_its_ticks_are_inside(low, ratio):
    scale = Scale(low, low * ratio, 0.0, 300.0, log=True)
    assert scale(low * math.sqrt(ratio)) == pytest.approx(150, abs=0.1)
    ticks = scale.ticks()
    assert len(ticks) >= 2
    assert all(-0.1 <= tick.at <= 300.1 for tick in ticks)


def test_a_scale_shows_all_of_its_values_even_if_they_are_one():
    for values in ([5.0], [0.0], [-3.0, 7.0]):
        scale = Scale.over(values, 0.0, 100.0)
        assert all(0 < scale(v) < 100 for v in values)
