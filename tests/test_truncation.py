"""Prompts that do not fit: whole turns go first, words keep their headers, and nothing is cut to nonsense."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.records import Demonstration, Dialogue, Message, PreferencePair, Ranking, Step, Trajectories, Trajectory
from pipeline.rendering import Rendered, Renderer
from tests.conftest import CHATML, tiny_tokenizer
from tests.test_rendering import outcome
from tests.tiny_tokenizers import byte_level, chat, config, sentence_piece, text_of

TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = (  # the system text inside of the first user's turn, words without white space around them
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content + '\n\n' %}{% else %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' and ns.system %}"
    "{{ ns.system }}{% set ns.system = '' %}{% endif %}{{ m.content | trim }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LETTERS = tiny_tokenizer()


@cache
def letters(template: str):
    """A token for each letter."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def prompt_of(prompt, room: int = 1, template: str = CHATML, tokenizer=None, **values) -> str:
    tokenizer = tokenizer or letters(template)
    return text_of(tokenizer, Renderer(tokenizer, config(**values)).prompt_ids(prompt, room))


def rendered(record, template: str = CHATML, **values) -> Rendered:
    return Renderer(letters(template), config(**values))(record)


def turn(role: str, words: str) -> str:
    return f"<|im_start|>{role}\n{words}<|im_end|>\n"


CALL = "<|im_start|>assistant\n"
STORY = chat("system: be brief", "Tell me a story. " * 3, "ONCE UPON A TIME " * 6, "Shorter, please.")


# ----------------------------------------------------------------------------------------------- whole turns


def test_the_oldest_turns_go_whole():
    kept = turn("system", "system: be brief") + turn("user", "Shorter, please.") + CALL
    whole = len(Renderer(letters(CHATML), config()).prompt_ids(STORY))
    assert prompt_of(STORY, max_length=whole - 1 + 6, room=6) == kept
    pair = PreferencePair(prompt=STORY, chosen="Once.", rejected="No.")
    found = rendered(pair, max_length=whole - 1 + 6)
    assert text_of(LETTERS, found.prompt_ids) == kept
    assert (found.prompt_tokens_cut, found.responses_cut) == (whole - len(found.prompt_ids), 0)


def test_as_few_turns_go_as_possible():
    turns = chat("first", "one", "second", "two", "third", "three", "fourth")
    sizes = [len(Renderer(letters(CHATML), config()).prompt_ids(turns[start:])) for start in (0, 2, 4, 6)]
    for start, size in zip((0, 2, 4, 6), sizes, strict=True):
        text = "".join(turn(t.role, t.content) for t in turns[start:]) + CALL
        assert prompt_of(turns, max_prompt_length=size) == text
    last = turn("user", "ourth") + CALL
    assert prompt_of(turns, max_prompt_length=sizes[-1] - 1) == last


def test_what_fits_is_what_the_template_writes():
    tokenizer = letters(CHATML)
    whole = tokenizer(text_of(tokenizer, Renderer(tokenizer, config()).prompt_ids(STORY)))["input_ids"]
    assert Renderer(tokenizer, config(max_length=len(whole) + 6)).prompt_ids(STORY, room=6) == whole


def called(name: str) -> Message:
    return Message(role="assistant", tool_calls=({"type": "function", "function": {"name": name, "arguments": {}}},))


def test_no_tools_answer_stays_without_its_call_and_declared_tools_stay():
    tools = ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    turns = [
        *chat("an old question", "an old answer", "the task"),
        *(called("a"), Message(role="tool", content="1" * 30), Message(role="tool", content="2" * 30)),
        *(called("b"), Message(role="tool", content="3" * 30)),
    ]
    prompt = Dialogue(tuple(turns), tools=tools)
    first = turn("system", 'Tools: [{"type": "function", "function": {"name": "f", "parameters": {}}}]')
    task, b = turn("user", "the task"), turn("assistant", "<call>b{}</call>") + turn("tool", "3" * 30)
    a = turn("assistant", "<call>a{}</call>") + turn("tool", "1" * 30) + turn("tool", "2" * 30)
    old = turn("user", "an old question") + turn("assistant", "an old answer")
    for kept in (first + old + task + a + b + CALL, first + task + a + b + CALL, first + task + b + CALL):
        size = len(LETTERS(kept)["input_ids"])
        assert prompt_of(prompt, template=TOOLS, max_prompt_length=size, max_length=1000) == kept
        assert prompt_of(prompt, template=TOOLS, max_prompt_length=size + 1, max_length=1000) == kept
    shorter = first + turn("user", "task") + b + CALL
    assert (
        prompt_of(prompt, template=TOOLS, max_prompt_length=len(LETTERS(kept)["input_ids"]) - 4, max_length=1000)
        == shorter
    )


def test_the_beginning_of_an_answer_stays():
    turns = [*chat("old " * 9, "yes", "is it so? " * 9), Message(role="assistant", content="It is")]
    prompt = Dialogue(tuple(turns), continued=True)
    text = prompt_of(prompt, max_length=100, room=9)
    assert text.endswith("is it so? <|im_end|>\n<|im_start|>assistant\nIt is")
    assert text.startswith("<|im_start|>user\n")
    assert text.count("<|im_start|>") == 2
    assert len(LETTERS(text)["input_ids"]) == 91


# ------------------------------------------------------------------------------------- words and responses


@pytest.mark.parametrize("template", [CHATML, TOOLS, TRIMMED])
def test_last_words_lose_their_beginning_inside_their_turn(template):
    prompt = chat("system: S", "abcdefghij" * 5)
    whole = prompt_of(prompt, template=template)
    for size in range(len(LETTERS(whole)["input_ids"]) - 45, len(LETTERS(whole)["input_ids"])):
        text = prompt_of(prompt, template=template, max_prompt_length=size)
        lost = len(whole) - len(text)
        head = whole.index("abcdefghij")
        assert text == whole[:head] + whole[head + lost :]
        assert len(LETTERS(text)["input_ids"]) == size


def test_a_response_that_is_cut_anyway_leaves_the_question_alone():
    question = chat("system: Be kind.", "What is the capital of Norway?")
    whole = prompt_of(question)
    long = "r" * 400
    for record in (
        PreferencePair(prompt=question, chosen="Oslo", rejected=long),
        PreferencePair(prompt=question, chosen=long, rejected="Oslo"),
        Ranking(prompt=question, responses=["Oslo", "Bergen", long], ranks=[1, 2, 3]),
        Demonstration(prompt=question, response=long),
    ):
        found = rendered(record, max_length=200)
        assert text_of(LETTERS, found.prompt_ids) == whole
        assert (found.prompt_tokens_cut, found.responses_cut) == (0, 1)
        assert max(map(len, found.response_ids)) == 200 - len(found.prompt_ids)


def test_a_prompt_gives_way_to_a_response_down_to_its_minimum():
    """Of 100 tokens 25 are the prompt's in any case; a response that fits beside them is whole, a longer one costs the prompt no
    more than half."""
    for words, prompt, response in ((40, 59, 41), (60, 39, 61), (74, 25, 75), (75, 50, 50), (500, 50, 50)):
        found = rendered(Demonstration(prompt="p" * 80, response="r" * words), max_length=100)
        assert (len(found.prompt_ids), len(found.response_ids[0])) == (prompt, response)
        assert found.prompt_tokens_cut == 80 - prompt
    least = rendered(Demonstration(prompt="p" * 80, response="r" * 88), max_length=100, min_prompt_length=10)
    assert (len(least.prompt_ids), len(least.response_ids[0])) == (11, 89)
    tight = rendered(Demonstration(prompt="p" * 80, response="r" * 88), max_length=100, max_prompt_length=7)
    assert (len(tight.prompt_ids), tight.responses_cut) == (7, 0)


def test_some_words_stay_behind_a_long_system_text():
    found = rendered(
        Demonstration(prompt=chat("system: " + "s" * 50, "abcdefghij" * 3), response="r" * 90), max_length=120
    )
    text = text_of(LETTERS, found.prompt_ids)
    # 88 tokens are the system's and the template's, and of the minimum of 30 tokens a quarter is the words'.
    assert text == turn("system", "system: " + "s" * 50) + turn("user", "defghij") + CALL
    assert (len(found.response_ids[0]), found.responses_cut) == (120 - len(found.prompt_ids), 1)


def test_a_template_around_plain_prompts_stays_whole():
    around = {"prompt_template": "Question: {prompt}\nAnswer:", "max_prompt_length": 26}
    assert prompt_of("abcdefghijklmnop", **around) == "Question: ijklmnop\nAnswer:"
    assert prompt_of("ijklmnop", **around) == "Question: ijklmnop\nAnswer:"
    with pytest.raises(ValueError, match=r"^nothing left of the prompt within max_prompt_length"):
        prompt_of("abcdefghijklmnop", prompt_template="Question: {prompt}\nAnswer:", max_prompt_length=18)


@pytest.mark.parametrize("tokenizer", [byte_level(CHATML), sentence_piece()], ids=["byte_level", "sentence_piece"])
def test_plain_prompts_lose_tokens_on_the_left_behind_bos(tokenizer):
    text = "the cat sat on the mat, and the dog sat there too"
    ids = tokenizer(text)["input_ids"]
    for size in range(2, len(ids) + 1):
        found = Renderer(tokenizer, config(max_prompt_length=size)).prompt_ids(text)
        assert found == [ids[0], *ids[len(ids) - size + 1 :]]


def test_what_cannot_be_cut_with_sense_is_refused():
    system = "system: " + "s" * 60
    for prompt, reason in (
        (chat(system, "hi"), r"^nothing left of the prompt within max_prompt_length: system text and template "),
        ([Message(role="system", content=system)], r"^a prompt without a user's turn does not fit$"),
        (
            [*chat("hi"), called("f"), Message(role="tool", content="t" * 99)],
            r"^nothing left of the prompt .*: what tools said, ",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            prompt_of(prompt, template=TOOLS, max_prompt_length=60)


def test_trajectories_are_whole_or_refused():
    def walked(prompt, length: int, **values) -> Rendered:
        way = Trajectory(steps=[Step(text="s" * (length - 1))], reward=1.0)
        return rendered(Trajectories(prompt=prompt, trajectories=[way]), **values)

    assert len(walked("p" * 80, 75, max_length=100).prompt_ids) == 25
    with pytest.raises(ValueError, match=r"^a trajectory does not fit max_length$"):
        walked("p" * 80, 76, max_length=100)
    assert len(walked("p" * 20, 80, max_length=100).prompt_ids) == 20
    with pytest.raises(ValueError, match=r"^a trajectory does not fit max_length$"):
        walked("p" * 20, 81, max_length=100)
    found = walked(STORY, 20, max_length=120)
    assert (
        text_of(LETTERS, found.prompt_ids)
        == turn("system", "system: be brief") + turn("user", "Shorter, please.") + CALL
    )
    assert text_of(LETTERS, found.response_ids[0]) == "s" * 19 + "<|im_end|>"
    assert found.token_rewards[0] == [0.0] * 19 + [1.0]


@pytest.mark.parametrize(
    "values", [{"max_length": 9, "min_prompt_length": 9}, {"max_prompt_length": 5, "min_prompt_length": 6}]
)
def test_a_minimum_leaves_room(values):
    with pytest.raises(ValidationError, match="min_prompt_length: must"):
        config(**values)


# ---------------------------------------------------------------------------------------------- properties

WORDS = st.text(st.sampled_from("ab cé日"), min_size=1, max_size=40).filter(str.strip)
TURNS = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.DOTALL)


@st.composite
def dialogues(draw) -> list[Message]:
    turns = [Message(role="system", content=draw(WORDS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        turns.append(Message(role="user", content=draw(WORDS)))
        for _ in range(draw(st.integers(0, 2))):
            turns += [called("f"), *(Message(role="tool", content=draw(WORDS)) for _ in range(draw(st.integers(1, 2))))]
        turns.append(Message(role="assistant", content=draw(WORDS)))
    while turns[-1].role == "assistant":
        turns.pop()
    return turns


def shown(message: Message) -> tuple[str, str]:
    return message.role, (message.content or "") + "<call>f{}</call>" * bool(message.tool_calls)


@settings(max_examples=150)
@given(dialogues(), st.lists(WORDS, min_size=1, max_size=3, unique=True), st.integers(20, 260), st.data())
def test_a_cut_dialogue_is_a_shorter_dialogue(turns, responses, max_length, data):
    least = data.draw(st.none() | st.integers(1, max_length - 1))
    renderer = Renderer(letters(TOOLS), config(max_length=max_length, min_prompt_length=least))
    record = Ranking(prompt=turns, responses=["x", *responses], ranks=list(range(len(responses) + 1)))
    whole = Renderer(letters(TOOLS), config(max_length=10**6)).prompt_ids(turns)
    found, reason = outcome(renderer, record)
    if found is None:
        assert reason.startswith(("nothing left of the response within max_length", "responses are equal after t"))
        return
    assert all(1 <= len(ids) <= max_length - len(found.prompt_ids) for ids in found.response_ids)
    assert found.prompt_tokens_cut == len(whole) - len(found.prompt_ids)
    assert renderer.prompt_ids(turns, room=max(map(len, found.response_ids))) == found.prompt_ids
    text = text_of(LETTERS, found.prompt_ids)
    kept = TURNS.findall(text)
    assert text == "".join(turn(*pair) for pair in kept) + CALL  # nothing but whole turns
    given_turns = list(map(shown, turns))
    system = [pair for pair in given_turns if pair[0] == "system"]
    assert kept[: len(system)] == system
    asked = max(i for i, pair in enumerate(given_turns) if pair[0] == "user")
    if found.prompt_tokens_cut == 0:
        assert kept == given_turns
        return
    mine = max(i for i, pair in enumerate(kept) if pair[0] == "user")
    words = kept[mine][1]
    assert words.strip()
    assert given_turns[asked][1].endswith(words)
    behind, before = kept[mine + 1 :], kept[len(system) : mine]
    assert behind == given_turns[len(given_turns) - len(behind) :]
    assert not behind or behind[0][0] == "assistant"
    if before:  # older turns stay only where all that follows does
        assert before[0][0] == "user"
        assert [*before, kept[mine], *behind] == given_turns[len(given_turns) - len(kept) + len(system) :]
    if words != given_turns[asked][1]:
        assert [pair for pair in behind if pair[0] == "assistant"][1:] == []  # one call at most is left to spare


@settings(max_examples=60)
@given(st.lists(WORDS, min_size=1, max_size=4), st.booleans(), st.sampled_from([CHATML, TRIMMED]), st.integers(1, 200))
def test_tokens_that_merge_give_the_templates_own_tokens(words, system, template, limit):
    tokenizer = byte_level(template)
    turns = chat(*(["system: s"] if system else []), *words[: len(words) - (len(words) + 1) % 2])
    renderer = Renderer(tokenizer, config(max_length=400, max_prompt_length=limit))
    try:
        ids = renderer.prompt_ids(turns)
    except ValueError as error:
        if not str(error).startswith("nothing left of the prompt within max_prompt_length"):
            raise
        return
    assert len(ids) <= limit
    last = turns[-1].content
    rests = [last[start:] for start in range(len(last)) if last[start:].strip()]
    dialogues = [[*turns[:system], *turns[start:]] for start in range(system, len(turns), 2)]
    dialogues += [[*turns[:system], Message(role="user", content=rest)] for rest in rests]
    written = [Renderer(tokenizer, config(max_length=10**6)).prompt_ids(dialogue) for dialogue in dialogues]
    assert ids in written
