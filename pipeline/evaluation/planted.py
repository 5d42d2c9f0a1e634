"""Responses with errors at known places: records of `evaluation.planted` → token rows that know which tokens hold an error.

A record has a prompt, a response, and `errors`: a list of [start, stop] places in the response, in characters, stop exclusive. A
token holds an error where its characters and an error's overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, RunConfig
from pipeline.contracts import Row
from pipeline.layouts import parse_prompt
from pipeline.pretrained import load_tokenizer
from pipeline.records import Demonstration
from pipeline.rendering import Renderer
from pipeline.sources import plan, read

KEY = "evaluation.planted"


@dataclass(frozen=True, slots=True)
class Planted:
    """One response with errors."""

    row: Row
    errors: list[bool]  # [R]


def read_planted(config: RunConfig, model: str) -> list[Planted]:
    """All planted responses, tokenised as training data are; their row ids are −1, −2, …

    Raises ConfigError for a record that cannot be used: leaving it out would change what is measured.
    """
    assert config.evaluation.planted is not None
    render = Renderer(load_tokenizer(model, config.model.trust_remote_code), config.data)
    found: list[Planted] = []
    work = Path(config.storage) / "cache" / "sources"
    bound = config.data.max_record_bytes
    for chunk in plan([config.evaluation.planted], work, key=KEY, max_record_bytes=bound).chunks:
        for raw in read(chunk):
            try:
                found.append(plant(render, raw.content(), -1 - len(found)))
            except ValueError as error:
                raise ConfigError(f"{KEY}: {raw.source}: {' '.join(str(error).split())[:200]}") from None
    if not found:
        raise ConfigError(f"{KEY}: holds no record")
    return found


def plant(render: Renderer, record: dict[str, Any], row_id: int) -> Planted:
    """One record as a row. Raises ValueError with a short reason."""
    response, spans = record.get("response"), record.get("errors")
    if not isinstance(response, str):
        raise ValueError("missing field: response (a text)")
    spans = checked_spans(spans, len(response))
    prompt = parse_prompt(record)
    rendered = render(Demonstration(prompt=prompt, response=response))
    ids = rendered.response_ids[0]
    errors = [overlaps(*place, spans) for place in token_places(render.tokenizer, ids, response)]
    if not any(errors):
        raise ValueError("no token holds an error: the response was cut before it")
    if all(errors):
        raise ValueError("every token holds an error: there is nothing to tell it from")
    return Planted(Row(row_id, rendered.prompt_ids, [ids]), errors)


def checked_spans(spans: Any, length: int) -> list[tuple[int, int]]:
    """`errors` of a record as places in a text of `length` characters. Raises ValueError."""
    whole = isinstance(spans, list) and bool(spans)
    if not whole or not all(isinstance(s, list) and len(s) == 2 and all(type(x) is int for x in s) for s in spans):
        raise ValueError("errors: has to be a list of [start, stop] places in the response")
    for start, stop in spans:
        if not 0 <= start < stop <= length:
            raise ValueError(f"errors: [{start}, {stop}] lies outside of the response's {length} characters")
    return [(start, stop) for start, stop in spans]


def token_places(tokenizer: Any, ids: Sequence[int], response: str) -> list[tuple[int, int]]:
    """Where each token lies in the text, by what the tokens before it decode to.

    Decoding a growing prefix is right for any tokenizer, fast or slow: a character that takes several tokens belongs to all
    of them, what a chat template puts around the response lies outside.
    """

    whole = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    shift = max(0, whole.find(response))
    texts = [tokenizer.decode(list(ids[: i + 1]), clean_up_tokenization_spaces=False) for i in range(len(ids))]
    ends = [len(text.rstrip("\ufffd")) for text in texts]  # half a character is no character yet
    places, start = [], 0
    for i, end in enumerate(ends):
        later = next((e for e in ends[i:] if e > start), end)  # a character is whole only with its last token
        places.append((start - shift, later - shift))
        start = max(start, end)
    return places


def overlaps(start: int, stop: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether [start, stop) shares a character with one of the spans."""
    return any(start < b and a < stop for a, b in spans)
