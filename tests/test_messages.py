"""Messages of many makers: each field is read, or known to say nothing, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.config import Source
from pipeline.layouts import parse, parse_prompt
from pipeline.messages import tools_of, turns_of
from pipeline.records import Dialogue, Message
from pipeline.sources import plan
from pipeline.sources import read as read_chunk

USER = {"role": "user", "content": "Weather in Oslo?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWERED = {"role": "tool", "content": "3 C", "tool_call_id": "c1", "name": "weather"}
FUNCTION = {"name": "weather", "description": "now", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}


def read(*turns: dict) -> list[Message]:
    return [turn.message for turn in turns_of(list(turns), "messages")]


@pytest.mark.parametrize(
    "calling",
    [
        CALLING,
        {"role": "assistant", "tool_calls": [CALL]},
        CALLING | {"tool_calls": json.dumps([CALL])},
        CALLING | {"tool_calls": [json.dumps(CALL)]},
        CALLING | {"tool_calls": [{**CALL, "index": None}], "audio": None, "function_call": None, "refusal": ""},
        CALLING | {"id": "m7", "timestamp": 3, "model": "x"},
    ],
)
def test_calls_of_tools(calling):
    assert read(calling) == [Message(role="assistant", tool_calls=(CALL,))]


@pytest.mark.parametrize(
    "calling",
    [
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "assistant", "tool_calls": [CALL["function"]]},
        {"role": "assistant", "tool_calls": [{"name": "weather", "parameters": {"city": "Oslo"}}]},
    ],
)
def test_calls_that_are_a_function_alone(calling):
    assert read(calling) == [
        Message(role="assistant", tool_calls=({"type": "function", "function": CALL["function"]},))
    ]


def test_arguments_stay_as_they_are_given():
    text = '{"city":"Oslo"}'
    (message,) = read(CALLING | {"tool_calls": [{"function": {"name": "f", "arguments": text}}]})
    assert message.tool_calls[0]["function"]["arguments"] == text
    for nothing in (None, "", {}):
        (message,) = read(CALLING | {"tool_calls": [{"function": {"name": "f", "arguments": nothing}}]})
        assert message.tool_calls[0]["function"]["arguments"] == {}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_under_their_names(name):
    assert read({"role": "assistant", "content": "4", name: "2+2"}) == [
        Message(role="assistant", content="4", reasoning_content="2+2")
    ]


def test_thoughts_and_words_in_parts():
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    assert read({"role": "assistant", "content": parts}) == [
        Message(role="assistant", content="42", reasoning_content="hm")
    ]


def test_answers_of_tools_under_their_names():
    for role in ("tool", "function", "observation"):
        assert read(ANSWERED | {"role": role}) == [
            Message(role="tool", content="3 C", tool_call_id="c1", name="weather")
        ]
    assert read({"from": "observation", "value": ""}) == [Message(role="tool", content="")]
    assert read({"role": "tool", "content": None}) == [Message(role="tool", content="")]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (USER | {"audio": {"id": "x"}}, "a message has a field that is not understood: 'audio'"),
        (USER | {"image_url": "x"}, "a message has a field that is not understood: 'image_url'"),
        (
            USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "a message has content that is no text: 'image_url'",
        ),
        (
            USER | {"content": [{"type": "text", "text": "a"}, {"type": "image"}]},
            "a message has content that is no text: 'image'",
        ),
        (
            USER | {"content": [{"type": "text", "text": "a", "source": {"x": 1}, "data": {"type": "x"}}]},
            "a part of a message has a field that is not understood: 'data'",
        ),
        ({"role": "assistant", "content": None}, "wrong type: a message's content in messages is null, expected text"),
        (USER | {"tool_calls": [CALL]}, "tool calls in a message that is not the assistant's"),
        (CALLING | {"tool_calls": "{"}, "broken JSON: the text of tool_calls"),
        (CALLING | {"tool_calls": 5}, "wrong type: tool_calls is a number, expected a list of calls"),
        (CALLING | {"tool_calls": [{"function": {"arguments": {"a": 1}}}]}, "a tool call has no name"),
        (CALLING | {"tool_calls": [{**CALL, "type": "custom"}]}, "a tool call is no function's"),
        (CALLING | {"tool_calls": [{**CALL, "extra": 1}]}, "a tool call has a field that is not understood: 'extra'"),
        (
            CALLING | {"tool_calls": [{"name": "f", "arguments": [1]}]},
            "wrong type: a call's arguments are a list, expected an object or its JSON text",
        ),
        ({"from": "function_call", "value": "weather(Oslo)"}, "broken JSON: the text of tool_calls"),
        (
            {"role": "assistant", "content": "a", "reasoning": "x", "thinking": "y"},
            "a message has two different reasonings",
        ),
        (
            {"role": "assistant", "content": "a", "reasoning_details": [{"text": "x"}]},
            "a message has a field that is not understood: 'reasoning_details'",
        ),
        (
            CALLING | {"function_call": {"name": "other", "arguments": "{}"}},
            "a message has two different calls",
        ),
        (USER | {"type": "reasoning"}, "a message has a field that is not understood: 'type'"),
        (USER | {"name": 5}, "wrong type: a message's name in messages, expected text"),
        (USER | {"weight": 1}, "a message that is marked to be trained on is not the assistant's"),
        (
            {"role": "assistant", "content": "a", "weight": 0.5},
            "a message's weight is neither true or false nor 0 or 1",
        ),
        (
            {"role": "assistant", "content": "a", "weight": 0, "train": True},
            "a message is marked both to be trained on and not to be",
        ),
    ],
)
def test_what_is_not_understood_is_refused_with_a_reason_that_can_be_counted(turn, reason):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared below)
        read(turn)
    assert str(caught.value) == reason


def test_tools_in_their_layouts():
    for given in ([TOOL], [FUNCTION], json.dumps([TOOL]), json.dumps([FUNCTION]), [json.dumps(TOOL)], TOOL):
        assert tools_of(given) == (TOOL,)
    anthropic = {("input_schema" if name == "parameters" else name): value for name, value in FUNCTION.items()}
    assert tools_of([anthropic]) == (TOOL,)
    assert [tools_of(nothing) for nothing in (None, [], "", "[]", {})] == [None] * 5
    for given, reason in (
        (["hammer"], "wrong type: a tool is text, expected a function"),
        ("hammer", "broken JSON: the text of tools"),
        ([5], "wrong type: a tool is a number, expected a function"),
        ([{"type": "web_search"}], "a tool is no function"),
        ([{"type": "function", "function": {"description": "x"}}], "a tool has no name"),
    ):
        with pytest.raises(ValueError, match=f"^{reason}$"):
            tools_of(given)


# --------------------------------------------------------------------------------------------------------- records


def test_json_text_is_read_as_messages():
    turns = [USER, {"role": "assistant", "content": "3 C"}]
    expected = parse({"messages": turns}, "demonstration")
    assert parse({"messages": json.dumps(turns)}, "demonstration") == expected
    assert parse({"messages": [json.dumps(turn) for turn in turns]}, "demonstration") == expected
    assert parse({"prompt": json.dumps(turns[:1]), "response": json.dumps(turns[1:])}, "demonstration") == expected
    chosen, rejected = ([USER, {"role": "assistant", "content": text}] for text in "ab")
    pair = {"chosen": json.dumps(chosen), "rejected": json.dumps(rejected)}
    assert parse(pair, "preference") == parse({"chosen": chosen, "rejected": rejected}, "preference")
    assert parse({"prompt": "p", "response": '[{"a": 1}]'}, "demonstration").response == '[{"a": 1}]'
    with pytest.raises(ValueError, match=r"^broken JSON: the text of messages$"):
        parse({"messages": "[{"}, "demonstration")
    with pytest.raises(ValueError, match=r"^bad Unicode: half of a surrogate pair$"):
        parse({"messages": json.dumps([USER | {"content": "\ud800"}, turns[1]])}, "demonstration")


def test_tools_and_options_go_with_the_prompt():
    value = {"tools": [FUNCTION], "chat_template_kwargs": {"enable_thinking": False}, "prompt": "hi", "response": "a"}
    expected = Dialogue((Message(role="user", content="hi"),), (TOOL,), {"enable_thinking": False})
    assert parse(value, "demonstration").prompt == expected
    assert parse_prompt(value) == expected
    assert parse(value | {"label": 1}, "unpaired").prompt == expected
    assert parse(value | {"reward": 1}, "trajectory").prompt == expected
    assert parse(value | {"chosen": "a", "rejected": "b"}, "preference").prompt == expected
    assert parse(value | {"responses": ["a", "b"], "ranks": [1, 2]}, "ranking").prompt == expected
    way = {"messages": [{"role": "assistant", "content": "a"}], "reward": 1, "tools": [TOOL]}
    assert parse({"prompt": [{"role": "user", "content": "hi"}], "trajectories": [way]}, "trajectory").prompt.tools == (
        TOOL,
    )
    with pytest.raises(ValueError, match=r"different tools"):
        parse({"prompt": "hi", "trajectories": [way, way | {"tools": None}]}, "trajectory")


def test_responses_with_more_than_words_are_messages():
    for kind, fields in (
        ("demonstration", {"response": CALLING}),
        ("unpaired", {"completion": CALLING, "label": 1}),
        ("preference", {"chosen": CALLING, "rejected": {"role": "assistant", "content": "no"}}),
        ("ranking", {"responses": [CALLING, {"role": "assistant", "content": "no"}], "ranks": [1, 2]}),
    ):
        best = parse({"prompt": [USER], **fields}, kind).ranked[0]
        assert best == Message(role="assistant", tool_calls=(CALL,))
    with pytest.raises(ValueError, match=r"^chosen and rejected are the same$"):
        parse({"prompt": [USER], "chosen": CALLING, "rejected": CALLING}, "preference")
    other = CALLING | {"tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"city": "Rome"}}}]}
    assert len(parse({"prompt": [USER], "chosen": CALLING, "rejected": other}, "preference").ranked) == 2


def test_turns_that_are_not_to_be_trained_on():
    turns = [
        USER,
        {"role": "assistant", "content": "a", "weight": 1},
        USER,
        {"role": "assistant", "content": "b", "weight": 0},
    ]
    record = parse({"messages": turns}, "demonstration")
    assert (len(record.prompt), record.response) == (1, "a")
    (way,) = parse(
        {"messages": [*turns, {"role": "assistant", "content": "c"}], "reward": 1}, "trajectory"
    ).trajectories
    assert [step.role for step in way.steps] == ["policy", "environment", "environment", "policy"]
    with pytest.raises(ValueError, match=r"^no assistant turn is to be trained on: messages$"):
        parse({"messages": [USER, {"role": "assistant", "content": "b", "train": False}]}, "demonstration")


def test_the_turn_that_an_explicit_prompt_ends_with_is_continued():
    begun = [USER, {"role": "assistant", "content": "It is"}]
    assert parse({"prompt": begun, "response": " cold"}, "demonstration").prompt.continued
    assert parse_prompt({"prompt": begun}).continued
    whole = [*begun, {"role": "assistant", "content": "cold"}]  # two turns of a dialogue
    assert not parse({"messages": whole}, "demonstration").prompt.continued
    assert not parse_prompt({"messages": whole}).continued


def test_a_trajectory_is_turns_and_what_they_call():
    turns = [
        USER,
        CALLING | {"reward": 0.5},
        ANSWERED,
        ANSWERED | {"content": ""},
        {"role": "assistant", "content": "Cold."},
    ]
    record = parse({"messages": turns, "reward": 1}, "trajectory")
    (way,) = record.trajectories
    assert [(step.role, step.text, step.reward) for step in way.steps] == [
        ("policy", "", 0.5),
        ("environment", "3 C", 0.0),
        ("environment", "", 0.0),
        ("policy", "Cold.", 0.0),
    ]
    assert way.steps[0].message.tool_calls == (CALL,)
    other = json.loads(json.dumps(turns).replace('"city": "Oslo"', '"city": "Rome"'))
    both = [{"messages": turns, "reward": 1}, {"messages": other, "reward": 0}]
    assert len(parse({"trajectories": both}, "trajectory").trajectories) == 2, "they call with other arguments"
    with pytest.raises(ValueError, match=r"^equal trajectories with different rewards$"):
        parse({"trajectories": [both[0], both[0] | {"reward": 0}]}, "trajectory")


PLAIN = [Message(role="user", content="Weather in Oslo?"), Message(role="assistant", content="3")]
ANSWER = {"role": "assistant", "content": "3"}
NOTHING = {"tool_calls": [{"id": None, "function": {"name": None, "arguments": None}}], "function_call": {"name": None}}


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "Human", "value": "Weather in Oslo?", "markdown": None}, {"from": "GPT", "value": "3", "text": None}],
        [{"from": "User", "value": "Weather in Oslo?", "label": None}, {"from": "bing", "value": "3", "weight": 1.0}],
        [{"role": "USER", "content": "Weather in Oslo?"}, {"role": "Assistant", "content": "3"}],
        [
            USER | {"turn_identifier": 1, "hashed_ip": "x"},
            ANSWER | {"openai_id": "x", "token_counter": 3, "top_p": 1.0},
        ],
        [USER | {"info": {"source": "x"}}, ANSWER | NOTHING | {"provider_specific_fields": {"refusal": None}}],
        [USER, ANSWER | {"refusal": None, "annotations": [], "audio": {"id": None}, "user_id": "u", "source": "s"}],
        [
            USER | {"content": [{"type": "text", "text": "Weather in Oslo?", "cache_control": {"type": "ephemeral"}}]},
            ANSWER | {"content": [{"type": "text", "text": "3", "citations": [{"url": "x"}], "mimeType": None}]},
        ],
        [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather in Oslo?"}]},
            {
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "3", "logprobs": []}],
            },
        ],
    ],
)
def test_fields_without_meaning_of_public_data_sets_and_services(turns):
    assert read(*turns) == PLAIN
    for field in ("messages", "conversations", "conversation"):
        record = parse({field: turns, "id": 1, "system_prompt": None, "parallel_tool_calls": False}, "demonstration")
        assert (list(record.prompt), record.response) == (PLAIN[:1], "3")


def test_thoughts_and_names_that_services_return_twice():
    details = [{"type": "reasoning.text", "text": "x"}]
    thought = Message(role="assistant", content="3", reasoning_content="x")
    assert read(ANSWER | {"reasoning": "x", "reasoning_details": details, "thinking_blocks": details}) == [thought]
    parts = [{"type": "thinking", "thinking": "x", "signature": "s"}, {"type": "text", "text": "3"}]
    assert read(ANSWER | {"content": parts}) == [thought]
    assert read({"role": "tool", "tool_name": "weather", "content": "3"}) == [
        Message(role="tool", name="weather", content="3")
    ]


def test_older_and_other_layouts_of_calls():
    spoken = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert read({"role": "tool_call", "content": spoken}) == read({"from": "function_call", "value": spoken})
    older = {"messages": [USER, ANSWER], "functions": [FUNCTION]}
    newer = {"messages": [USER, ANSWER], "tools": [TOOL]}
    assert parse(older, "demonstration") == parse(newer, "demonstration")
    assert parse(older | {"reward": 1}, "trajectory") == parse(newer | {"reward": 1}, "trajectory")
    assert parse_prompt(older | {"functions": json.dumps([FUNCTION])}) == parse_prompt(newer)
    assert parse_prompt({"messages": [USER, ANSWER], "functions": ["sin", "cos"]}).tools is None  # of another meaning


def test_a_dialogue_beside_its_own_answer_is_no_prompt_with_that_answer():
    for response in ("3", [ANSWER]):
        record = parse({"conversations": [USER, ANSWER], "response": response}, "demonstration")
        assert (list(record.prompt), record.response) == (PLAIN[:1], "3")
    pair = {"messages": [USER, ANSWER], "chosen": "3", "rejected": "4"}
    assert list(parse(pair, "preference").prompt) == PLAIN[:1]
    assert list(parse(pair | {"chosen": "5"}, "preference").prompt) == PLAIN
    continued = {"prompt": [USER, ANSWER], "chosen": "3", "rejected": "4"}
    assert list(parse(continued, "preference").prompt) == PLAIN
    with pytest.raises(ValueError, match=r"^no prompt: the dialogue begins with the answer$"):
        parse({"messages": [ANSWER], "response": "3"}, "demonstration")


def test_messages_out_of_parquet_have_no_fields_of_each_other(tmp_path: Path):
    calls = [CALL, {"id": "c2", "type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}]
    turns = [USER, CALLING | {"tool_calls": calls}, ANSWERED, {"role": "assistant", "content": "a", "reasoning": "b"}]
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [
        TOOL | {"function": FUNCTION | {"parameters": parameters}},
        {"type": "function", "function": {"name": "time"}},
    ]
    table = pa.Table.from_pylist([{"messages": turns, "tools": tools}])
    assert set(table.to_pylist()[0]["messages"][0]) > {"tool_calls", "reasoning"}
    parquet.write_table(table, tmp_path / "a.parquet")
    made = plan([Source(path=str(tmp_path / "a.parquet"))], tmp_path / "work")
    (record,) = (parse(raw.content(), "demonstration") for chunk in made.chunks for raw in read_chunk(chunk))
    assert record == parse({"messages": turns, "tools": tools}, "demonstration")
    assert [list(call["function"]["arguments"]) for call in record.prompt[1].tool_calls] == [["city"], ["zone"]]
