"""One raw record, in any of the common layouts, to a `records.Record`.

What a kind of record has beside its prompt (`dialogues` says how that is found):
  * demonstration: `response`, or a dialogue whose last assistant turn it is;
  * preference: `chosen` and `rejected`;
  * ranking: `responses`, and `ranks` (1 = best) or `scores` (higher = better);
  * unpaired: `response` (or `completion`, as in TRL's data for KTO) and `label`: true or false, 1 or 0, "good" or "bad";
  * trajectory: `trajectories` has them.

Nothing else is coerced: a number in quotes is text. Each refusal is a ValueError whose short text starts alike for all
records with the same fault, so that faults can be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.dialogues import answered, check_number, completed, explicit_prompt, prompted, refuse_surrogates
from pipeline.messages import DIALOGUES, SURROGATE, kind_of, turns_of
from pipeline.records import RECORDS, Dialogue, Record, RecordKind
from pipeline.trajectories import RESPONSES, trajectories

LIGHTEST, HEAVIEST = 1e-30, 1e30
"""Weights of records, unless they are 0: float32 holds the sum of a step's, times losses and tokens, without overflow or loss."""
LABELS: dict[str | int | float, bool] = {"good": True, "bad": False, 1: True, 0: False}
"""Labels of an unpaired response; true and false are 1 and 0 to Python."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns in which data for other models keep what is no text."""


def parse(value: Mapping[str, Any], kind: RecordKind, ties: str = "refuse") -> Record:
    """Read `value` as a record of `kind`; null counts as missing.

    ties: "refuse" tied ranks, or take the "first" in the file as the better one.
    Raises ValueError with a short reason.
    """
    given = _given(value)
    _refuse_media(given)
    if "weight" in given:
        _check_weight(given["weight"])
    try:
        record = RECORDS[kind].model_validate(_LAYOUTS[kind](given) | {"weight": given.get("weight", 1.0)})
    except ValidationError as error:
        raise ValueError(_reason(error)) from None
    refuse_surrogates(record.prompt, record.ranked)
    if kind == "ranking" and ties == "refuse" and record.tied:
        raise ValueError("tied ranks")
    return record


def _given(value: Mapping[str, Any]) -> dict[str, Any]:
    """What a record holds; a list in `conversation` (LMSYS, WildChat) is its messages, if nothing else is."""
    given = {field: content for field, content in value.items() if content is not None}
    if isinstance(given.get("conversation"), list) and not any(field in given for field in DIALOGUES):
        given["messages"] = given["conversation"]
    return given


def _refuse_media(given: Mapping[str, Any]) -> None:
    """Pictures and sounds beside the text belong to what it says: without them a record means something else."""
    for field in MEDIA:
        if given.get(field):
            raise ValueError(f"{field} beside the text: only text is read")


def _check_weight(weight: Any) -> None:
    check_number(weight, "weight")
    if weight < 0:
        raise ValueError("negative weight")
    if weight and not LIGHTEST <= weight <= HEAVIEST:
        raise ValueError("weight beyond float32")


def parse_prompt(value: Mapping[str, Any]) -> str | Dialogue:
    """The prompt of a record whose responses, if any, do not matter (sampling). Raises ValueError."""
    given = _given(value)
    _refuse_media(given)
    prompt = explicit_prompt(given, ("prompt", *DIALOGUES))
    if prompt is None:
        raise ValueError("missing field: prompt")
    if "prompt" not in given and prompt[-1].role == "assistant":
        prompt = prompt[:-1]
    if isinstance(prompt, Dialogue) and not prompt:
        raise ValueError("no prompt: the dialogue begins with the answer")
    prompt = completed(prompt, given)
    refuse_surrogates(prompt)
    return prompt


# ------------------------------------------------------------------------------------------ kinds of record


def _demonstration(given: dict[str, Any]) -> dict[str, Any]:
    if "response" in given:
        prompt, (response,) = prompted(given, {"response": given["response"]})
        return {"prompt": prompt, "response": response}
    for field in DIALOGUES:
        if field in given:
            prompt, response = answered(turns_of(given[field], field), field)
            if not prompt:
                raise ValueError(f"no prompt: {field} begins with the answer")
            return {"prompt": completed(prompt, given), "response": response}
    raise ValueError("missing field: response")


def _preference(given: dict[str, Any]) -> dict[str, Any]:
    for field in ("chosen", "rejected"):
        if field not in given:
            raise ValueError(f"missing field: {field}")
    prompt, (chosen, rejected) = prompted(given, {field: given[field] for field in ("chosen", "rejected")})
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _ranking(given: dict[str, Any]) -> dict[str, Any]:
    if "responses" not in given:
        raise ValueError("missing field: responses")
    responses = given["responses"]
    if not isinstance(responses, list):
        raise ValueError(f"wrong type: responses is {kind_of(responses)}, expected a list")
    if len(responses) < 2:
        raise ValueError("fewer than two responses")
    orders = {field: given[field] for field in ("ranks", "scores") if field in given}
    if len(orders) != 1:
        raise ValueError("missing field: ranks or scores" if not orders else "both ranks and scores are given")
    for field, numbers in orders.items():
        if not isinstance(numbers, list):
            raise ValueError(f"wrong type: {field} is {kind_of(numbers)}, expected a list")
        for number in numbers:
            check_number(number, field.removesuffix("s"))
        if len(numbers) != len(responses):
            raise ValueError(f"different numbers of responses and {field}")
    prompt, texts = prompted(given, {f"responses[{k}]": response for k, response in enumerate(responses)})
    if any(texts[i] in texts[:i] for i in range(len(texts))):
        raise ValueError("two responses are the same")
    return {"prompt": prompt, "responses": texts, **orders}


def _unpaired(given: dict[str, Any]) -> dict[str, Any]:
    if "label" not in given:
        raise ValueError("missing field: label")
    field = next((field for field in RESPONSES if field in given), None)
    if field is None:
        return _demonstration(given) | {"label": _label(given["label"])}
    prompt, (response,) = prompted(given, {field: given[field]})
    return {"prompt": prompt, "response": response, "label": _label(given["label"])}


def _label(value: Any) -> bool:
    """Good or bad, as people write it."""
    if not isinstance(value, str | bool | int | float):
        raise ValueError(f"wrong type: label is {kind_of(value)}, expected true or false")
    if value in LABELS:
        return LABELS[value]
    raise ValueError("wrong label: neither true or false, 1 or 0, nor good or bad")


_LAYOUTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "demonstration": _demonstration,
    "preference": _preference,
    "ranking": _ranking,
    "unpaired": _unpaired,
    "trajectory": trajectories,
}


def _reason(error: ValidationError) -> str:
    """The first problem that pydantic found, short and without the record's text."""
    problem = error.errors(include_input=False, include_url=False)[0]
    if problem["type"] == "string_unicode":
        return SURROGATE
    field = str(problem["loc"][0]) if problem["loc"] else "record"
    return f"unusable {field}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
