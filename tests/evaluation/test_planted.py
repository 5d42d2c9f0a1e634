"""Planted errors: which tokens hold them, for tokens of any size, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config import ConfigError
from pipeline.evaluation.planted import overlaps, read_planted, token_places
from tests.conftest import tiny_tokenizer


def places(text: str) -> list[tuple[int, int]]:
    tokenizer = tiny_tokenizer()
    return token_places(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], text)


def test_tokens_of_one_character_stand_where_it_does() -> None:
    assert places("ab c") == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_a_character_of_several_tokens_belongs_to_each_of_them() -> None:
    assert places("aé!") == [(0, 1), (1, 2), (1, 2), (2, 3)]
    assert places("😀x") == [(0, 1)] * 4 + [(1, 2)]


def test_tokens_of_several_characters_and_what_stands_around_the_response() -> None:
    words = {1: "<s>", 2: "the", 3: " film", 4: "</s>"}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(words[i] for i in ids))
    assert token_places(tokenizer, [1, 2, 3, 4], "the film") == [(-3, 0), (0, 3), (3, 8), (8, 12)]


@pytest.mark.parametrize(("span", "shares"), [((2, 3), True), ((0, 2), False), ((4, 9), False), ((0, 3), True)])
def test_spans_overlap_where_they_share_a_character(span, shares) -> None:
    assert overlaps(2, 4, [span]) == shares


@pytest.fixture
def planted(make_config, tmp_path: Path, tiny_model: Path):
    def read(*records: object):
        file = tmp_path / "planted.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_planted(make_config(f"evaluation.planted={file}"), str(tiny_model))

    return read


def test_records_become_rows_that_know_their_errors(planted) -> None:
    first, second = planted(
        {"prompt": "p", "response": "a=1;b=2", "errors": [[2, 3]]},
        {"prompt": "q", "response": "xy", "errors": [[0, 1], [1, 2]]},
    )
    assert (first.row.row_id, second.row.row_id) == (-1, -2)
    assert first.errors == [i == 2 for i in range(8)], "seven characters and EOS, which holds none"
    assert second.errors == [True, True, False]
    assert len(first.row.response_ids[0]) == 8


GOOD = {"prompt": "p", "response": "abc", "errors": [[0, 1]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"errors": None}, "errors: has to be a list"),
        ({"errors": []}, "errors: has to be a list"),
        ({"errors": [3]}, "errors: has to be a list"),
        ({"errors": [[True, 2]]}, "errors: has to be a list"),
        ({"errors": [[2, 4]]}, r"errors: \[2, 4\] lies outside of the response's 3 characters"),
        ({"errors": [[1, 1]]}, "lies outside"),
        ({"response": None}, "missing field: response"),
        ({"prompt": None}, "missing field: prompt"),
        ({"response": "x" * 200, "errors": [[199, 200]]}, "cut before it"),
    ],
)
def test_records_that_cannot_be_used_are_one_line_with_their_place(planted, change, message) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation\.planted: .*planted\.jsonl:2: .*{message}") as caught:
        planted(GOOD, GOOD | change)
    assert "\n" not in str(caught.value)
