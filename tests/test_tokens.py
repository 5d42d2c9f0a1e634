"""Texts to tokens without transformers between, where that gives the same; else through it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tokens import Encoder
from tests.tiny_tokenizers import byte_level, sentence_piece

TOKENIZERS = {"byte level": byte_level, "sentence piece": sentence_piece}


def through_transformers(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), min_size=2, max_size=4)
)
def test_tokens_are_those_that_transformers_gives(name: str, texts: list[str]) -> None:
    tokenizer = TOKENIZERS[name]()
    encoder = Encoder(tokenizer)
    assert encoder._direct is not None
    first, *others = texts
    ids, rest = encoder.sequence(first, others)
    assert ids == encoder.encode(first) == through_transformers(tokenizer, first)
    assert rest == [encoder.alone(text).ids for text in others]
    assert encoder.each_after(first, ids, others) == [encoder.after(first, ids, text).ids for text in others]
    assert encoder.each_after("", [], others) == rest
    if not encoder._adds_space:
        assert rest == [through_transformers(tokenizer, text) for text in others]


def test_a_border_inside_a_token_stays_one() -> None:
    encoder = Encoder(byte_level())
    assert encoder.encode("the cat")[: len(encoder.encode("the ca"))] != encoder.encode("the ca")
    context = ("the ca", encoder.encode("the ca"))
    assert encoder.each_after(*context, ["t", "t sat"]) == [encoder.alone("t").ids, encoder.alone("t sat").ids]


def test_a_tokenizer_that_does_more_in_python_is_asked_itself() -> None:
    tokenizer = byte_level()

    class Lower(type(tokenizer)):
        def __call__(self, text, **options):
            return super().__call__(text.lower(), **options)

    plain = Encoder(tokenizer).encode("some words")
    tokenizer.__class__ = Lower
    encoder = Encoder(tokenizer)
    assert encoder._direct is None
    assert encoder.encode("SOME Words") == plain
    assert encoder.sequence("SOME Words", ["Some WORDS"]) == (plain, [plain])
