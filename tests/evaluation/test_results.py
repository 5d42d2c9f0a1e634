"""evaluation.json: what is written is what is read, and nothing that is no number gets in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import ConfigError
from pipeline.evaluation.findings import Findings, combine
from pipeline.evaluation.results import (
    Auroc,
    Bin,
    CreditResponse,
    CreditRow,
    Evaluation,
    Metric,
    SamplePair,
    Skipped,
    read,
)

WHOLE = Evaluation(
    title="π",
    metrics={"a": Metric(value=1.0, standard_error=0.5, low=0.0, high=2.0, n=3), "b": Metric(value=2.0, n=1)},
    reliability=[Bin(low=0.5, high=0.6, confidence=0.55, accuracy=1.0, n=2)],
    credit=[
        CreditRow(
            row_id=1,
            prompt="<script>",
            responses=[
                CreditResponse(label="chosen", tokens=["a"], values={"implicit reward": [None]}, planted=[True])
            ],
        )
    ],
    samples=[SamplePair(prompt="p", before="x", after="y", score_after=0.5)],
    credit_auroc={"-log π_ref": Auroc(value=0.9, errors=1, sound=2, top_1=1.0, responses=1)},
    skipped=[Skipped(what="rewards", reason="no scorer")],
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = WHOLE.write(tmp_path / "new" / "evaluation.json")
    assert read(path) == WHOLE
    plain = json.loads(path.read_text())
    assert plain["metrics"]["b"] == {"value": 2.0, "standard_error": None, "low": None, "high": None, "n": 1}


def test_numbers_are_values_with_known_errors() -> None:
    assert WHOLE.numbers() == {"a": 1.0, "b": 2.0, "a_se": 0.5}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_refused(value) -> None:
    with pytest.raises(ValidationError):
        Metric(value=value, n=1)


def test_another_structure_or_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.json")
    for text in ("{", '{"title": "x"}', '{"title": "x", "metrics": {}, "more": 1}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ConfigError, match="run qalign eval again") as caught:
            read(tmp_path / "other.json")
        assert "\n" not in str(caught.value)


def test_findings_are_put_together_in_order() -> None:
    one, two = Metric(value=1.0, n=1), Metric(value=2.0, n=1)
    skipped = Skipped(what="x", reason="y")
    found = combine("t", [Findings(metrics={"b": two}, skipped=[skipped]), Findings(metrics={"a": one})])
    assert list(found.metrics) == ["b", "a"] and found.skipped == [skipped] and found.title == "t"
