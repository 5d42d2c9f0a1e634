"""The scorer `verifiable` end to end: answers come from the records that the prompts came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.evaluation.answers import read_answers
from pipeline.evaluation.judging import Texts
from pipeline.evaluation.scorers import judge_for


@pytest.fixture
def config(make_config, tmp_path: Path):
    """config(records, …) → a configuration that samples from these prompts and scores answers."""

    def make(records: list[dict], *overrides: str):
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return make_config(f"sampling.prompts={{path: {file}}}", "sampling.scorer=verifiable", *overrides)

    return make


def test_answers_are_found_by_the_prompts_text(config, tiny_model: Path) -> None:
    found = config([{"prompt": "2+2", "meta": {"gold": 4}}, {"prompt": "3+3", "meta": {}}, {"prompt": "é"}])
    found = found.model_copy(update={"evaluation": found.evaluation.model_copy(update={"answer": "meta.gold"})})
    assert read_answers(found, str(tiny_model), {"2+2", "3+3"}) == {"2+2": "4"}
    judge = judge_for(found, str(tiny_model), ["2+2", "3+3"])
    scores, failures = judge([Texts("2+2", "it is #### 4", [], []), Texts("3+3", "6", [], [])], True)
    assert scores[0] == 1.0
    assert failures == [(1, "LookupError: no answer for this prompt")]


def test_a_missing_column_is_told_before_any_work(config) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.answer: no answer in the first records \(column 'answer'"):
        judge_for(config([{"prompt": "2+2"}]), None)


def test_two_answers_to_one_prompt_are_refused(config, tiny_model: Path) -> None:
    twice = config([{"prompt": "2+2", "answer": "4"}, {"prompt": "2+2", "answer": "5"}])
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2 answers a prompt with '5'"):
        read_answers(twice, str(tiny_model), {"2+2"})


def test_without_prompts_of_their_own_the_records_of_the_data_answer(make_config, tmp_path: Path, tiny_model) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "1+1", "chosen": "2", "rejected": "3", "answer": "2"}) + "\n")
    found = make_config(f"data.sources=[{{path: {file}}}]", "sampling.scorer=verifiable")
    assert read_answers(found, str(tiny_model), {"1+1"}) == {"1+1": "2"}
