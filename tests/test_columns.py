"""Records of other layouts through the configuration alone: columns, steps, rewards, answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.columns import _cut, answer_of, mapped, matches
from pipeline.config import ConfigError, Source, TrajectoryColumns
from pipeline.layouts import parse
from pipeline.sources import plan, read

PATTERN = TrajectoryColumns(steps="x").answer_pattern

# Hand-written, in the layouts of two well-known files of word problems.
DEMONSTRATED = {"question": "2 + 3 - 1?", "answer": "2 + 3 = <<2+3=5>>5.\n5 - 1 = <<5-1=4>>4.\n#### 4"}
JUDGED = {
    "question": "How many are 3 dozen?",
    "ground_truth": "3 * 12 = <<3*12=36>>36\nA: 36",
    "small": {"is_correct": False, "solution": "3 * 10 = <<3*10=30>>30\nA: 30"},
    "large": {"is_correct": True, "solution": "3 * 12 = <<3*12=36>>36\nA: 36.0"},
}


def source(**values) -> Source:
    return Source(path="x.jsonl", columns={"prompt": "question"}, **values)


def returns(value: dict, *ways: dict) -> list[tuple[list[str], float]]:
    """Steps and reward of each trajectory."""
    record = parse(mapped(value, source(trajectories=ways)), "trajectory")
    assert record.prompt == value["question"]
    return [([step.text for step in way.steps], way.reward) for way in record.trajectories]


def test_demonstrations_with_an_answer():
    lines = ["2 + 3 = <<2+3=5>>5.\n", "5 - 1 = <<5-1=4>>4.\n", "#### 4"]
    assert returns(DEMONSTRATED, {"steps": "answer", "answer": "answer"}) == [(lines, 1.0)]
    assert returns(DEMONSTRATED, {"steps": "answer", "reward": 0.5}) == [(lines, 0.5)]
    assert returns(DEMONSTRATED, {"steps": "answer", "separator": None, "reward": 1}) == [(["".join(lines)], 1.0)]


@pytest.mark.parametrize("labels", ["is_correct", "answer"])
def test_several_solutions_that_were_judged(labels):
    ways = [
        {"steps": f"{model}.solution"}
        | ({"reward": f"{model}.is_correct"} if labels == "is_correct" else {"answer": "ground_truth"})
        for model in ("small", "large")
    ]
    assert returns(JUDGED, *ways) == [
        (["3 * 10 = <<3*10=30>>30\n", "A: 30"], 0.0),
        (["3 * 12 = <<3*12=36>>36\n", "A: 36.0"], 1.0),
    ]


def test_lists_of_steps_rewards_and_log_probs():
    value = {"question": "q", "moves": ["a", "b"], "scores": [0.5, 1], "logs": [-1, -2], "won": 1}
    way = {"steps": "moves", "step_rewards": "scores", "step_logprobs": "logs", "reward": "won"}
    (found,) = parse(mapped(value, source(trajectories=[way])), "trajectory").trajectories
    assert ([step.reward for step in found.steps], found.reward, found.behaviour_logprob) == ([0.5, 1.0], 1.0, -3.0)


def test_a_whole_name_goes_before_its_dots():
    value = {"question": "q", "a.b": "whole", "a": {"b": "inner"}}
    assert mapped(value, Source(path="x", columns={"prompt": "a.b"}))["prompt"] == "whole"
    del value["a.b"]
    assert mapped(value, Source(path="x", columns={"prompt": "a.b"}))["prompt"] == "inner"


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ({"steps": "small.answer"}, "column 'small.answer' (mapped to trajectories.0.steps) is missing"),
        ({"steps": "question.x"}, "column 'question.x' (mapped to trajectories.0.steps) is missing"),
        ({"steps": "small"}, "wrong type: column 'small' is an object, expected text or a list of steps"),
        (
            {"steps": "small.solution", "reward": "right"},
            "column 'right' (mapped to trajectories.0.reward) is missing",
        ),
        (
            {"steps": "small.solution", "answer": "small.is_correct"},
            "wrong type: column 'small.is_correct' is true/false, expected text or a number",
        ),
        ({"steps": "small.solution", "reward": "question"}, "wrong type: reward is text, expected a number"),
        ({"steps": "small.solution"}, "missing field: reward (inside each trajectory, or of a step)"),
        (
            {"steps": "small.solution", "step_rewards": "question"},
            "wrong type: step_rewards is text, expected a list",
        ),
    ],
)
def test_what_cannot_be_mapped_has_a_reason_that_can_be_counted(way, reason):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared below)
        parse(mapped(JUDGED, source(trajectories=[way])), "trajectory")
    assert str(caught.value) == reason


def test_a_missing_column_is_a_record_with_an_error_and_mappings_are_part_of_the_fingerprint(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(DEMONSTRATED) + "\n" + json.dumps({"question": "q"}) + "\n")

    def planned(**way):
        given = Source(path=str(path), columns={"prompt": "question"}, trajectories=[{"steps": "answer", **way}])
        return plan([given], tmp_path / "work")

    good, bad = (record for chunk in planned(reward=1).chunks for record in read(chunk))
    assert [step.text for step in parse(good.content(), "trajectory").trajectories[0].steps][-1] == "#### 4"
    assert bad.error == "column 'answer' (mapped to trajectories.0.steps) is missing"
    prints = [planned(**way).fingerprint for way in ({"reward": 1}, {"reward": 2}, {"reward": 1, "separator": None})]
    assert len(set(prints)) == 3


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,000", "1000", True),
        ("1,000", "1000.0", True),
        ("$18", "18", True),
        ("-$18.50", "-18.5", True),
        ("$ 1,234,567.", "1234567", True),
        ("18.", " 18 ", True),
        ("1,00", "100", False),  # no separator of thousands
        ("18", "81", False),
        ("50 %", "50%", True),
        ("50 percent", "50%", True),
        ("50 Per Cent.", r"$50\%$", True),
        ("12.5%", "12.50 %", True),
        ("1,000 %", "1000%", True),
        ("-5 %", "-5%", True),
        ("50 %", "5%", False),
        ("5 0%", "50%", False),
        ("%", "percent", False),
        ("a  cat.", "a cat", True),
        ("A cat", "a cat", False),
        ("nan", "nan", True),  # a word, not a number
        ("0.1", "0.10", True),
        ("1e3", "1000", True),
    ],
)
def test_answers_match_as_numbers_else_as_text(one, other, same):
    assert matches(one, other) is same
    assert matches(other, one) is same


@pytest.mark.parametrize(
    ("text", "right", "same"),
    [
        ("The answer is 18 dollars.", "18", True),
        ("ANSWER: 18%", "18", True),
        ("ANSWER: 18 percent of them", "18 %", True),
        (r"so \boxed{18}", "18", True),
        ("Answer: **18**", "18", True),
        ("A: 5. I checked it 3 times", "5", True),
        ("A: -3 degrees", "3", False),
        ("A: .5", "0.5", True),
        ("A: 1,234.50 dollars", "1234.5", True),
        ("The answer is (B)", "B", True),
        ("The answer is B, not C", "B", False),
        ("18 ducks, that is all", "18", False),  # a number somewhere is no answer
        ("18", "so\n#### 18", True),  # nothing but the answer
    ],
)
def test_an_answer_is_found_among_what_people_write_around_it(text, right, same):
    way = TrajectoryColumns(steps="said", answer="right")
    value = mapped({"said": text, "right": right}, Source(path="x", trajectories=(way,)))
    assert value["trajectories"][0]["reward"] == float(same)


def test_the_answer_is_the_last_one_that_the_pattern_finds():
    assert answer_of("A: 3\nNo.\nA: 4", PATTERN) == "4"
    assert answer_of("so 5\n#### 1,000", PATTERN) == "1,000"
    assert answer_of("The answer is 12.", PATTERN) == "12."
    assert answer_of("forty-two", PATTERN) is None
    assert answer_of("x=1 y=2", r"(\d)") == "2"


@pytest.mark.parametrize("pattern", ["no group", "(two) (groups)", "(unclosed"])
def test_a_pattern_needs_one_group(pattern):
    with pytest.raises(ValidationError, match="answer_pattern: "):
        TrajectoryColumns(steps="x", answer_pattern=pattern)


@given(st.text(alphabet="a \n", max_size=12).filter(str.strip), st.sampled_from(["\n", "\n\n", " "]))
def test_steps_are_the_text_and_none_is_blank(text, separator):
    steps = _cut(text, separator)
    assert "".join(steps) == text
    assert all(step.strip() for step in steps)
    assert all(step.endswith(separator) for step in steps[:-1])


def test_blank_lines_go_to_their_neighbours():
    assert _cut("\n\na\n\nb\n", "\n") == ["\n\na\n\n", "b\n"]


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        ({"wieght": "w"}, "sources.0.columns.wieght: no field of a preference; did you mean weight?"),
        ({"promt": "instruction"}, "sources.0.columns.promt: no field of a preference; did you mean prompt?"),
        (
            {"response": "a"},
            "sources.0.columns.response: no field of a preference; known are chat_template_kwargs, chosen",
        ),
    ],
)
def test_a_mapping_to_what_is_no_field_is_refused(make_config, columns: dict[str, str], hint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"data: {hint}")):
        make_config(f"data.sources=[{{path: x.jsonl, columns: {json.dumps(columns)}}}]")


@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_a_missing_field_names_the_columns_that_there_are(qalign, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"instruction": "q", "chosen": "a"}) + "\n")
    status, _, told = qalign("train", *arguments, f"data.sources=[{{path: {tmp_path}/other.jsonl}}]")
    assert status == 2
    assert "1 × missing field: rejected; the first record's columns are chosen, instruction" in told


def test_a_dry_run_shows_every_mapped_field(qalign, tmp_path: Path) -> None:
    record = {"q": "2 + 2?", "good": "4", "bad": "5", "w": 0.25}
    (tmp_path / "mapped.jsonl").write_text(json.dumps(record) + "\n")
    columns = json.dumps({"prompt": "q", "chosen": "good", "rejected": "bad", "weight": "w"})
    status, told, _ = qalign(
        "train", "--dry-run", f"data.sources=[{{path: {tmp_path}/mapped.jsonl, columns: {columns}}}]"
    )
    assert status == 0
    for line in ("prompt     ← q = '2 + 2?'", "chosen     ← good = '4'", "weight     ← w = 0.25"):
        assert f"  {line}" in told.splitlines()
