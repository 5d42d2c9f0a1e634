"""Every layout that loads, and every fault that is refused with a reason that can be counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.layouts import parse, parse_prompt
from pipeline.records import RECORDS, Message, Ranking


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def shown(record) -> tuple:
    """Prompt (a dialogue as (role, content) pairs) and ranked responses."""
    prompt = record.prompt if isinstance(record.prompt, str) else [(m.role, m.content) for m in record.prompt]
    return prompt, record.ranked


HI = [("user", "hi")]
MULTI = [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "why?")]
multi = [system("be brief"), user("hi"), assistant("hello"), user("why?")]


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, ""),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "system": None, "messages": None, "id": 7}, "p"),
        ({"prompt": [user("hi")], "chosen": "a", "rejected": "b"}, HI),
        ({"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, HI),
        ({"prompt": [user("hi")], "chosen": assistant("a"), "rejected": assistant("b")}, HI),
        ({"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant("b")]}, HI),
        ({"prompt": "hi", "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}, HI),
        ({"prompt": multi, "chosen": [*multi, assistant("a")], "rejected": [*multi, assistant("b")]}, MULTI),
        ({"chosen": [*multi, assistant("a")], "rejected": [*multi, assistant("b")]}, MULTI),
        # A `messages` column that repeats the chosen dialogue is no prompt.
        (
            {
                "messages": [*multi, assistant("a")],
                "chosen": [*multi, assistant("a")],
                "rejected": [*multi, assistant("b")],
            },
            MULTI,
        ),
        ({"prompt": "hi", "system": "be brief", "chosen": "a", "rejected": "b"}, [MULTI[0], *HI]),
        ({"prompt": multi, "system": "other", "chosen": "a", "rejected": "b"}, MULTI),
        (
            {
                "conversations": [{"from": "human", "value": "hi"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            HI,
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "chosen": "a", "rejected": "b"},
            HI,
        ),
    ],
)
def test_preference_layouts(value, prompt):
    assert shown(parse(value, "preference")) == (prompt, ["a", "b"])


@pytest.mark.parametrize(
    ("texts", "prompt"),
    [
        (["\n\nHuman: hi\n\nAssistant: a", "\n\nHuman: hi\n\nAssistant: b"], "\n\nHuman: hi\n\nAssistant:"),
        (
            [
                "\n\nHuman: x\n\nAssistant: y\n\nHuman: z\n\nAssistant: a b",
                "\n\nHuman: x\n\nAssistant: y\n\nHuman: z\n\nAssistant: a c",
            ],
            "\n\nHuman: x\n\nAssistant: y\n\nHuman: z\n\nAssistant:",
        ),
        (["Tell me a joke. Why?", "Tell me a joke. So!"], "Tell me a joke."),  # white space goes to the response
        (["Tell me a joke.\nWhy?", "Tell me a joke. So!"], "Tell me a joke."),
        (["Q: ok?\nA: yes", "Q: ok?\nA: yen"], "Q: ok?\nA:"),  # back to the border of a word
        (["Q: ok?\nA: yes", "Q: ok?\nA: yes, but"], "Q: ok?\nA:"),  # one is the beginning of the other
        (["Q: ok?\nA: yes ", "Q: ok?\nA: yes  but"], "Q: ok?\nA:"),
    ],
)
def test_the_prompt_of_whole_texts_is_what_they_share(texts, prompt):
    record = parse({"chosen": texts[0], "rejected": texts[1]}, "preference")
    assert record.prompt == prompt
    assert [prompt + response for response in record.ranked] == texts


def test_transcripts_as_prompt_stay_text():
    text = "\n\nHuman: hi\n\nAssistant:"
    assert shown(parse({"prompt": text, "chosen": " a", "rejected": " b"}, "preference")) == (text, [" a", " b"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "p", "response": "a"}, ("p", ["a"])),
        ({"prompt": [user("hi")], "response": assistant("a")}, (HI, ["a"])),
        ({"messages": [*multi, assistant("a")]}, (MULTI, ["a"])),
        ({"messages": [user("hi"), assistant("a"), user("and?")]}, (HI, ["a"])),  # nothing answers the last turn
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}], "system": "be brief"},
            ([MULTI[0], *HI], ["a"]),
        ),
    ],
)
def test_demonstration_layouts(value, expected):
    assert shown(parse(value, "demonstration")) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "p", "responses": ["a", "b", "c"], "ranks": [3, 1, 2]}, ("p", ["b", "c", "a"])),
        ({"prompt": "p", "responses": ["a", "b", "c"], "scores": [0.5, -1, 2]}, ("p", ["c", "a", "b"])),
        (
            {"prompt": [user("hi")], "responses": [[assistant("a")], [assistant("b")]], "ranks": [2, 1]},
            (HI, ["b", "a"]),
        ),
        (
            {"responses": [[*multi, assistant("a")], [*multi, assistant("b")]], "ranks": [1, 2], "scores": None},
            (MULTI, ["a", "b"]),
        ),
        (
            {"responses": ["Say: one", "Say: two", "Say: three"], "ranks": [1, 2, 3]},
            ("Say:", [" one", " two", " three"]),
        ),
    ],
)
def test_ranking_layouts(value, expected):
    assert shown(parse(value, "ranking")) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "p", "response": "a", "label": True}, ("p", "a", True)),
        ({"prompt": "p", "response": "a", "label": 0}, ("p", "a", False)),
        ({"prompt": "p", "completion": "a", "label": 1.0}, ("p", "a", True)),
        ({"prompt": "p", "response": "a", "label": "bad"}, ("p", "a", False)),
        ({"prompt": "p", "completion": "a", "label": "good"}, ("p", "a", True)),
        ({"prompt": [user("hi")], "completion": [assistant("a")], "label": False}, (HI, "a", False)),
        ({"response": "\n\nHuman: x\n\nAssistant: a", "label": 1}, ("\n\nHuman: x\n\nAssistant:", " a", True)),
    ],
)
def test_unpaired_layouts(value, expected):
    record = parse(value, "unpaired")
    assert (*shown(record)[:1], record.response, record.label) == expected


def test_weights_are_kept():
    assert parse({"prompt": "p", "response": "a", "weight": 0.25}, "demonstration").weight == 0.25


def test_ties():
    value = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 2, 2.0]}
    with pytest.raises(ValueError, match=r"^tied ranks$"):
        parse(value, "ranking", "refuse")
    assert parse(value, "ranking", "first").ranked == ["b", "c", "a"]


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
GOOD = {"prompt": "p", "response": "a", "label": True}
RANKED = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("preference", {"prompt": "p", "rejected": "b"}, "missing field: chosen"),
        ("preference", PAIR | {"rejected": None}, "missing field: rejected"),
        (
            "preference",
            {"chosen": "a b", "rejected": "c d"},
            "missing field: prompt (and the responses share no beginning)",
        ),
        ("preference", {"chosen": [assistant("a")], "rejected": [assistant("b")]}, "missing field: prompt"),
        ("demonstration", {"prompt": "p"}, "missing field: response"),
        ("ranking", {"prompt": "p", "ranks": [1, 2]}, "missing field: responses"),
        ("ranking", {"prompt": "p", "responses": ["a", "b"]}, "missing field: ranks or scores"),
        ("ranking", RANKED | {"scores": [1, 2]}, "both ranks and scores are given"),
        ("demonstration", {"response": "one two"}, "missing field: prompt"),
        ("unpaired", {"prompt": "p", "label": True}, "missing field: response"),
        ("unpaired", {"prompt": "p", "response": "a"}, "missing field: label"),
        ("unpaired", GOOD | {"label": 2}, "wrong label: neither true or false, 1 or 0, nor good or bad"),
        ("unpaired", GOOD | {"label": "yes"}, "wrong label: neither true or false, 1 or 0, nor good or bad"),
        ("unpaired", GOOD | {"label": [1]}, "wrong type: label is a list, expected true or false"),
        ("unpaired", GOOD | {"response": " "}, "empty response: response"),
        ("preference", PAIR | {"prompt": 5}, "wrong type: prompt is a number, expected text or messages"),
        ("preference", PAIR | {"chosen": ["a"]}, "wrong type: responses are partly text and partly messages"),
        (
            "preference",
            PAIR | {"chosen": 1, "rejected": True},
            "wrong type: chosen is a number, expected text or messages",
        ),
        ("demonstration", {"messages": "hi"}, "wrong type: messages is text, expected messages"),
        ("preference", PAIR | {"prompt": ["x"]}, "wrong type: a message of prompt is text, expected role and content"),
        (
            "preference",
            PAIR | {"prompt": [{"role": "user", "content": None}]},
            "wrong type: a message's content in prompt is null, expected text",
        ),
        (
            "preference",
            PAIR | {"prompt": [{"content": "x"}]},
            "wrong type: a message's role in prompt is null, expected text",
        ),
        ("preference", PAIR | {"system": 3}, "wrong type: system is a number, expected text"),
        ("ranking", RANKED | {"responses": "ab"}, "wrong type: responses is text, expected a list"),
        ("ranking", RANKED | {"ranks": 1}, "wrong type: ranks is a number, expected a list"),
        ("ranking", RANKED | {"ranks": [1, "2"]}, "wrong type: rank is text, expected a number"),
        ("ranking", RANKED | {"ranks": [1, True]}, "wrong type: rank is true/false, expected a number"),
        ("preference", PAIR | {"weight": "1"}, "wrong type: weight is text, expected a number"),
        ("preference", PAIR | {"weight": -1}, "negative weight"),
        ("preference", PAIR | {"weight": 3e38}, "weight beyond float32"),
        ("ranking", RANKED | {"weight": 1e39}, "weight beyond float32"),
        ("preference", PAIR | {"weight": 1e-40}, "weight beyond float32"),
        ("preference", PAIR | {"weight": float("nan")}, "non-finite weight"),
        ("preference", PAIR | {"weight": float("inf")}, "non-finite weight"),
        ("ranking", RANKED | {"ranks": None, "scores": [1.0, float("nan")]}, "non-finite score"),
        ("ranking", RANKED | {"ranks": [1, 10**400]}, "non-finite rank"),
        ("ranking", RANKED | {"ranks": [1, 2, 3]}, "different numbers of responses and ranks"),
        ("ranking", RANKED | {"responses": ["a"], "ranks": [1]}, "fewer than two responses"),
        ("ranking", RANKED | {"responses": ["a", "a"]}, "two responses are the same"),
        ("ranking", RANKED | {"responses": ["a", " \n"]}, "empty response: responses"),
        ("preference", PAIR | {"chosen": ""}, "empty response: chosen"),
        ("preference", PAIR | {"rejected": "\t "}, "empty response: rejected"),
        ("preference", PAIR | {"chosen": assistant(" "), "rejected": assistant("b")}, "empty response: chosen"),
        (
            "preference",
            {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: x\n\nAssistant:"},
            "empty response: rejected",
        ),
        ("preference", PAIR | {"rejected": "a"}, "chosen and rejected are the same"),
        ("preference", {"chosen": "one two", "rejected": "one two"}, "chosen and rejected are the same"),
        ("preference", PAIR | {"chosen": [user("a")], "rejected": [user("b")]}, "no assistant turn: chosen"),
        ("demonstration", {"messages": []}, "no messages: messages"),
        ("demonstration", {"messages": [assistant("a")]}, "no prompt: messages begins with the answer"),
        (
            "preference",
            {"chosen": [user("x"), assistant("a")], "rejected": [user("y"), assistant("b")]},
            "no shared prompt: the dialogues differ before their last answer",
        ),
        (
            "preference",
            {
                "chosen": "\n\nHuman: x\n\nAssistant: a\n\nHuman: y\n\nAssistant: b",
                "rejected": "\n\nHuman: x\n\nAssistant: c",
            },
            "no shared prompt: the dialogues differ before their last answer",
        ),
        (
            "preference",
            {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: y\n\nAssistant: a"},
            "no shared prompt: the dialogues differ before their last answer",
        ),
        (
            "preference",
            {"prompt": "z", "chosen": [user("x"), assistant("a")], "rejected": [user("x"), assistant("b")]},
            "prompt is no turn of the dialogues beside it",
        ),
        (
            "preference",
            {"prompt": [user("z")], "chosen": [user("x"), assistant("a")], "rejected": [user("x"), assistant("b")]},
            "prompt is not what the dialogues beside it begin with",
        ),
        ("preference", PAIR | {"images": ["x.png"]}, "images beside the text: only text is read"),
        (
            "demonstration",
            {"prompt": "p", "response": "a", "audio": {}, "video": b"x"},
            "video beside the text: only text is read",
        ),
        ("preference", PAIR | {"chosen": "a\ud800"}, "bad Unicode: half of a surrogate pair"),
        ("preference", PAIR | {"prompt": [user("\udc00")]}, "bad Unicode: half of a surrogate pair"),
    ],
)
def test_faults_are_refused_with_a_reason_that_can_be_counted(kind, value, reason):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared below)
        parse(value, kind)
    assert str(caught.value) == reason


def test_words_that_name_nothing_are_words():
    """ "null" and "NaN" are answers like others; an empty list of pictures is no picture."""
    value = {"prompt": "None", "chosen": "null", "rejected": "NaN", "images": [], "audio": None}
    record = parse(value, "preference")
    assert (record.prompt, record.chosen, record.rejected) == ("None", "null", "NaN")


def test_the_prompt_alone():
    assert parse_prompt({"prompt": "p"}) == "p"
    assert list(parse_prompt({"messages": [user("hi"), assistant("a")]})) == [Message(role="user", content="hi")]
    assert list(parse_prompt({"conversations": [{"from": "human", "value": "hi"}], "system": "s"})) == [
        Message(role="system", content="s"),
        Message(role="user", content="hi"),
    ]
    with pytest.raises(ValueError, match=r"^images beside the text"):
        parse_prompt({"prompt": "p", "images": ["x.png"]})
    for value, reason in (({"text": "p"}, r"^missing field: prompt$"), ({"messages": [assistant("a")]}, r"^no prompt")):
        with pytest.raises(ValueError, match=reason):
            parse_prompt(value)


FIELDS = ["prompt", "chosen", "rejected", "response", "responses", "ranks", "scores", "messages", "system", "weight"]
FIELDS += ["label", "steps", "reward", "trajectories"]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(RECORDS)), st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_whatever_a_record_holds_it_is_read_or_refused(kind, value):
    try:
        record = parse(value, kind)
    except ValueError as error:
        reason = str(error)
    else:
        assert all(response.strip() for response in record.ranked)
        assert not (isinstance(record, Ranking) and record.tied)
        return
    assert len(reason) < 120
    assert "\n" not in reason


def test_an_unpaired_dialogue_ends_with_its_response():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    record = parse({"messages": turns, "label": False}, "unpaired")
    assert (record.prompt[0].content, record.response, record.label) == ("Hi", "Hello.", False)
