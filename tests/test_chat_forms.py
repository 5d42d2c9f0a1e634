"""Thoughts, tools and prefills under the templates of many families: trained is what the template writes of the turn, or nothing."""

from __future__ import annotations

import json

import pytest

from pipeline.layouts import parse, parse_prompt
from pipeline.rendering import Rendered, Renderer
from tests.chat_templates import FIELD_ONLY, GEMMA, HERMES, LLAMA3, MISTRAL, OPENING, QWEN3, R1
from tests.conftest import CHATML
from tests.test_steps import stretches
from tests.tiny_tokenizers import byte_level, config, text_of

FAMILIES = {
    "chatml": CHATML,
    "hermes": HERMES,
    "qwen3": QWEN3,
    "opening": OPENING,
    "r1": R1,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "field": FIELD_ONLY,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": {"type": "object"}}}


def user(text: str = "Oslo?") -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | None, **fields) -> dict:
    return {"role": "assistant", "content": text, **fields}


def call(city: str = "Oslo", number: int = 1) -> dict:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"id": f"call{number:05d}", "type": "function", "function": function}


def answer(text: str = "3 C", number: int = 1) -> dict:
    return {"role": "tool", "content": text, "tool_call_id": f"call{number:05d}"}


def render(family: str, value: dict, kind: str = "demonstration") -> Rendered:
    return Renderer(byte_level(FAMILIES[family]), config())(parse(value, kind))


def shown(family: str, value: dict, kind: str = "demonstration") -> tuple[str, ...]:
    """The prompt and each response, as text."""
    rendered = render(family, value, kind)
    return tuple(text_of(byte_level(FAMILIES[family]), ids) for ids in (rendered.prompt_ids, *rendered.response_ids))


def reason(family: str, value: dict, kind: str = "demonstration") -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared by those who ask)
        render(family, value, kind)
    return str(caught.value)


def written(family: str, turns: list[dict], tools: list[dict] | None = None, **options) -> str:
    """What the template writes, begun as every sequence is."""
    text = byte_level(FAMILIES[family]).apply_chat_template(turns, tools=tools, tokenize=False, **options)
    return "<s>" + text.removeprefix("<s>")


def all_kinds(prompt: list[dict], best: dict, worst: dict, **more) -> list[tuple[str, dict]]:
    """The same answers as records of each kind."""
    return [
        ("demonstration", {"prompt": prompt, "response": best, **more}),
        ("demonstration", {"messages": [*prompt, best], **more}),
        ("preference", {"prompt": prompt, "chosen": best, "rejected": worst, **more}),
        ("preference", {"chosen": [*prompt, best], "rejected": [*prompt, worst], **more}),
        ("ranking", {"prompt": prompt, "responses": [worst, best], "scores": [0, 1], **more}),
        ("unpaired", {"prompt": prompt, "completion": best, "label": 1, **more}),
        ("trajectory", {"messages": [*prompt, best], "reward": 1, **more}),
        ("trajectory", {"prompt": prompt, "response": best, "reward": 1, **more}),
    ]


# -------------------------------------------------------------------------------------------------------- thoughts

SAID = "<think>\ntwo and two\n</think>\n\n4"


@pytest.mark.parametrize("family", ["chatml", "qwen3", "opening", "r1", "field"])
@pytest.mark.parametrize("response", [SAID, assistant(SAID), assistant("4", reasoning_content="two and two")])
def test_thoughts_are_written_once_whoever_opens_them(family, response):
    if family == "chatml" and isinstance(response, dict) and "reasoning_content" in response:
        assert reason(family, {"prompt": [user()], "response": response}) == "the chat template leaves out reasoning"
        return
    for kind, value in (
        all_kinds([user()], assistant(SAID), assistant("no"))
        if response == SAID
        else (
            ("demonstration", {"prompt": [user()], "response": response}),
            ("preference", {"prompt": [user()], "chosen": response, "rejected": assistant("no")}),
            ("trajectory", {"prompt": [user()], "messages": [response], "reward": 1}),
        )
    ):
        prompt, best, *_ = shown(family, value, kind)
        assert prompt == written(family, [user()], add_generation_prompt=True)
        assert (prompt + best).count("<think>") == 1
        ends = "</s>" if family == "r1" else "<|im_end|>"
        assert (prompt + best).endswith("<think>\ntwo and two\n</think>\n\n4" + ends)
        if family in ("qwen3", "opening"):
            assert prompt + best + "\n" == written(family, [user(), assistant(SAID)])


@pytest.mark.parametrize("words", ["two.\n</think>\n\n4", "two.</think>4", "two. </think> 4 < 5"])
@pytest.mark.parametrize("family", ["opening", "r1", "field"])
def test_an_answer_that_closes_what_the_prompt_opened_stands_as_the_model_wrote_it(family, words):
    prompt, best = shown(family, {"prompt": [user()], "response": words})
    assert prompt.endswith("<think>\n")
    assert best == words + ("</s>" if family == "r1" else "<|im_end|>")


def test_a_template_that_is_named_among_the_models_own():
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = {"default": CHATML, "reasoning": OPENING}
    record = parse({"prompt": [user()], "response": SAID}, "demonstration")
    for name, ends in ((None, SAID), ("reasoning", SAID.removeprefix("<think>\n"))):
        rendered = Renderer(tokenizer, config(chat_template=name))(record)
        assert text_of(tokenizer, rendered.response_ids[0]) == ends + "<|im_end|>"
        opened = text_of(tokenizer, rendered.prompt_ids).endswith("<think>\n")
        assert opened == (name == "reasoning")


def test_thoughts_that_never_end_stand_as_the_model_wrote_them():
    for family, begun in (("qwen3", "<think>\nfor ever"), ("opening", "for ever"), ("r1", "for ever")):
        _, best = shown(family, {"prompt": [user()], "response": "<think>\nfor ever"})
        assert best == begun + ("</s>" if family == "r1" else "<|im_end|>")
    spoken_of = [user(), assistant("It begins with <think>, always.")]
    assert "".join(shown("qwen3", {"messages": spoken_of})) + "\n" == written("qwen3", spoken_of)


def test_thoughts_that_the_call_opens_and_the_template_closes_with_other_white_space_are_opened_once():
    """As Nemotron's: the call ends with a line feed behind the tag, an answer without thoughts has none inside."""
    family = (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and '</think>' not in (m.content or '') %}<think></think>{% endif %}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = byte_level(family)
    renderer = Renderer(tokenizer, config())
    for answering, behind in ((assistant("4"), "</think>4<|im_end|>"), (assistant("", tool_calls=[call()]), None)):
        rendered = renderer(parse({"messages": [user(), answering], "tools": [TOOL]}, "demonstration"))
        prompt, best = (text_of(tokenizer, ids) for ids in (rendered.prompt_ids, rendered.response_ids[0]))
        assert prompt.endswith("<|im_start|>assistant\n<think>\n")
        whole = tokenizer.apply_chat_template([user(), answering], tools=[TOOL], tokenize=False)
        assert prompt.removeprefix("<s>").removesuffix("\n") + best + "\n" == whole
        assert behind in (None, best)


def test_reasoning_behind_reasoning_that_the_template_takes_away_has_no_need_of_tags():
    """As GPT-OSS has it: thoughts stand in a channel, and those of calls go once there is an answer."""
    template = (
        "{%- for m in messages %}<|im_start|>{{ m.role }}"
        "{%- if m.thinking and (loop.last or (m.tool_calls and messages[-1].role != 'assistant')) %} hm: {{ m.thinking }};{% endif %} "
        "{{- m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    tokenizer = byte_level(template)
    turns = [
        user(),
        assistant("", tool_calls=[call()], reasoning_content="a"),
        answer(),
        assistant("4", reasoning_content="b"),
    ]
    rendered = Renderer(tokenizer, config())(parse({"messages": turns}, "demonstration"))
    asked = tokenizer.apply_chat_template(
        [turn | {"thinking": turn.get("reasoning_content")} for turn in turns[:-1]],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text_of(tokenizer, rendered.prompt_ids) == "<s>" + asked
    assert " hm: a;" in asked
    assert text_of(tokenizer, rendered.response_ids[0]) == " hm: b;4<|im_end|>"


def test_thoughts_of_earlier_turns_go_where_the_template_puts_them():
    turns = [user(), assistant(SAID), user("Rome?"), assistant("4", reasoning_content="two and two"), user("So?")]
    for family in ("qwen3", "opening", "r1"):
        prompt, best = shown(family, {"messages": [*turns, assistant("8")]})
        assert prompt == written(family, turns, add_generation_prompt=True)
        assert "two and two" not in prompt
        assert best.endswith("8</s>" if family == "r1" else "8<|im_end|>")


def test_a_trajectory_whose_thoughts_the_template_takes_away_later_is_refused():
    turns = [user(), assistant(SAID), user("So?"), assistant(SAID)]
    for family in ("qwen3", "opening", "r1"):
        assert reason(family, {"messages": turns, "reward": 1}, "trajectory").startswith("the chat template rewrites ")
    kept = [user(), assistant(None, reasoning_content="look", tool_calls=[call()]), answer(), assistant(SAID)]
    tokenizer = byte_level(QWEN3)
    rendered = render("qwen3", {"messages": kept, "reward": 1, "tools": [TOOL]}, "trajectory")
    text = text_of(tokenizer, rendered.prompt_ids + rendered.response_ids[0])
    assert text + "\n" == written("qwen3", kept, [TOOL])
    spoken = '<think>\nlook\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert [text for policy, text in stretches(tokenizer, rendered) if policy] == [spoken, SAID + "<|im_end|>"]


def trajectory(family: str, turns: list[dict], **beside) -> list[tuple[bool, str]]:
    """Whose each stretch behind the prompt is; all of them are what the template writes of the whole dialogue."""
    tokenizer = byte_level(FAMILIES[family])
    rendered = render(
        family, {"messages": turns, **beside} | ({} if "reward" in beside else {"reward": 1}), "trajectory"
    )
    plain = [{name: field for name, field in turn.items() if name != "reward"} for turn in turns]
    whole = written(family, plain, beside.get("tools"))
    assert text_of(tokenizer, rendered.prompt_ids + rendered.response_ids[0]) == whole.rstrip()
    return stretches(tokenizer, rendered)


def spoken(family: str, turns: list[dict], **beside) -> list[str]:
    return [text for policy, text in trajectory(family, turns, **beside) if policy]


EMPTY = "<think>\n\n</think>\n\n"


def test_turns_that_a_template_writes_otherwise_in_the_middle_are_what_the_whole_dialogue_has():
    turns = [user(), assistant("a b"), answer(""), assistant("c"), user("So?"), assistant("d\ne")]
    assert spoken("qwen3", turns) == ["a b<|im_end|>", "c<|im_end|>", EMPTY + "d\ne<|im_end|>"]
    twice = [user(), assistant("f"), assistant("g"), answer(), assistant("h")]
    assert trajectory("qwen3", twice)[:3] == [
        (True, "f<|im_end|>"),
        (False, "\n<|im_start|>assistant\n"),
        (True, "g<|im_end|>"),
    ]
    calling = [user(), assistant(None, tool_calls=[call()]), answer(), assistant("c")]
    called = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert spoken("qwen3", calling, tools=[TOOL]) == [called, EMPTY + "c<|im_end|>"]
    mixed = [user(), assistant("a"), user("So?"), assistant("b", reasoning_content="hm"), answer(), assistant("c")]
    assert spoken("qwen3", mixed) == ["a<|im_end|>", "<think>\nhm\n</think>\n\nb<|im_end|>", EMPTY + "c<|im_end|>"]
    ends_with_others = [user(), assistant("a"), user("no"), assistant("b"), answer("1")]
    assert trajectory("qwen3", ends_with_others)[-1] == (
        False,
        "\n<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>",
    )


def test_rewards_stay_with_their_turns_where_the_middle_is_written_otherwise():
    tokenizer = byte_level(QWEN3)
    turns = [
        user(),
        assistant("same", reward=1.0),
        answer("same", 1) | {"reward": 2.0},
        answer("same", 2) | {"reward": 4.0},
        assistant("same", reward=8.0),
        user("same") | {"reward": 16.0},
        assistant("same", reward=32.0),
    ]
    rendered = render("qwen3", {"messages": turns, "reward": 64.0}, "trajectory")
    ids, rewards = rendered.response_ids[0], rendered.token_rewards[0]
    whole = text_of(tokenizer, ids)
    told = "\n<|im_start|>user\n<tool_response>\nsame\n</tool_response>"
    first = "same<|im_end|>" + told
    second = first + "\n<tool_response>\nsame\n</tool_response><|im_end|>"
    third = second + "\n<|im_start|>assistant\nsame"
    fourth = third + "<|im_end|>\n<|im_start|>user\nsame<|im_end|>"
    fifth = fourth + f"\n<|im_start|>assistant\n{EMPTY}same"
    ends = [(reward, text_of(tokenizer, ids[: i + 1])) for i, reward in enumerate(rewards) if reward]
    assert ends == [
        (1.0, "same"),
        (2.0, first),
        (4.0, second),
        (8.0, third),
        (16.0, fourth),
        (32.0, fifth),
        (64.0, whole),
    ]


def test_the_end_of_a_turn_in_the_middle_may_be_another_mark():
    """As GPT-OSS has it: the last turn ends with a mark of its own."""
    template = CHATML.replace("<|im_end|>", "{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}")
    tokenizer = byte_level(template)
    turns = [user(), assistant("a"), answer(), assistant("b")]
    rendered = Renderer(tokenizer, config())(parse({"messages": turns, "reward": 1}, "trajectory"))
    assert [text for policy, text in stretches(tokenizer, rendered) if policy] == ["a<|im_end|>", "b</s>"]


def test_a_call_that_opens_thoughts_which_earlier_turns_lack():
    plain = {"messages": [user(), assistant("a"), answer(), assistant("b")], "reward": 1}
    assert reason("opening", plain, "trajectory").startswith("the chat template opens thoughts in its call ")
    turns = [user(), assistant("a", reasoning_content="hm"), answer(), assistant("b", reasoning_content="so")]
    assert spoken("opening", turns) == ["hm\n</think>\n\na<|im_end|>", "so\n</think>\n\nb<|im_end|>"]


# ----------------------------------------------------------------------------------------------------------- tools

ASKED = [user(), assistant(None, tool_calls=[call()]), answer(), user("And now?")]


@pytest.mark.parametrize("family", ["hermes", "qwen3", "mistral"])
@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL["function"]])])
def test_calls_are_what_the_template_writes_of_them(family, tools):
    best, worst = assistant(None, tool_calls=[call("Rome")]), assistant("no")
    for kind, value in all_kinds([user()], best, worst, tools=tools):
        prompt, said, *_ = shown(family, value, kind)
        assert prompt == written(family, [user()], [TOOL], add_generation_prompt=True)
        assert (prompt + said).rstrip() == written(family, [user(), best], [TOOL]).rstrip()
        assert '"city": "Rome"' in said


@pytest.mark.parametrize("family", ["hermes", "qwen3", "llama3"])
def test_calls_in_the_prompt_are_in_the_prompt(family):
    prompt, _ = shown(family, {"prompt": ASKED, "response": "cold", "tools": [TOOL]})
    assert prompt == written(family, ASKED, [TOOL], add_generation_prompt=True)
    tokenizer = byte_level(FAMILIES[family])
    ids = Renderer(tokenizer, config()).prompt_ids(parse_prompt({"prompt": ASKED, "tools": [TOOL]}))
    assert text_of(tokenizer, ids) == prompt


def test_arguments_are_objects_or_text_as_the_template_wants_them():
    text = call()
    text["function"] = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    for family in ("hermes", "qwen3", "r1", "llama3"):
        objects, texts = (
            shown(family, {"prompt": [user()], "response": assistant(None, tool_calls=[one])}) for one in (call(), text)
        )
        assert objects == texts
        assert '{"city": "Oslo"}' in objects[1]
    thought = {"prompt": [user()], "response": assistant(None, tool_calls=[call()], reasoning_content="look")}
    assert shown("r1", thought)[1].startswith("look\n</think>\n\n<|call|>weather\n")
    text["function"] = {"name": "weather", "arguments": "{city"}
    value = {"prompt": [user()], "response": assistant(None, tool_calls=[text])}
    assert reason("hermes", value) == "a call's arguments are not JSON, and the chat template reads objects"
    assert "{city" in shown("qwen3", value)[1]


def test_several_calls_and_words_beside_them():
    both = assistant("Let me look.", tool_calls=[call(), call("Rome", 2)])
    for family in ("hermes", "qwen3"):
        said = shown(family, {"prompt": [user()], "response": both})[1]
        assert said.index("Let me look.") < said.index("Oslo") < said.index("Rome")
    assert reason("llama3", {"prompt": [user()], "response": assistant(None, tool_calls=both["tool_calls"])}).endswith(
        "one tool call at a time"
    )
    one = both | {"tool_calls": [call()]}
    for value in ({"prompt": [user()], "response": one}, {"messages": [user(), one, answer(), assistant("cold")]}):
        assert (
            reason("llama3", value) == "the chat template leaves out the words of a turn (assistant, beside tool calls)"
        )


@pytest.mark.parametrize(
    ("family", "what"), [("chatml", "tool calls"), ("gemma", "tool calls"), ("field", "tool calls")]
)
def test_what_a_template_would_leave_out_is_refused(family, what):
    called = assistant("Let me look.", tool_calls=[call()])
    assert reason(family, {"prompt": [user()], "response": called}) == f"the chat template leaves out {what}"
    assert (
        reason(family, {"messages": [user(), called, user(), assistant("a")]}) == f"the chat template leaves out {what}"
    )
    assert reason(family, {"prompt": "hi", "response": "a", "tools": [TOOL]}) == "the chat template leaves out tools"


def test_other_fields_and_roles_that_a_template_leaves_out():
    named = {"prompt": [user() | {"name": "Ann"}], "response": "a"}
    assert reason("chatml", named) == "the chat template leaves out names (user)"
    deaf = "{% for m in messages if m.role in ('user', 'assistant') %}" + CHATML.partition("%}")[2]
    renderer = Renderer(byte_level(deaf), config())
    for role in ("system", "tool", "critic"):
        turns = (
            [user(), {"role": role, "content": "x"}, user()]
            if role != "system"
            else [{"role": role, "content": "x"}, user()]
        )
        with pytest.raises(ValueError, match=rf"^the chat template leaves out the words of a turn \({role}\)$"):
            renderer(parse({"prompt": turns, "response": "a"}, "demonstration"))


@pytest.mark.parametrize("family", ["hermes", "qwen3"])
def test_answers_of_tools_in_a_row_are_the_environments(family):
    calling = (
        assistant(None, tool_calls=[call(), call("Rome", 2)], reasoning_content="look")
        if family == "qwen3"
        else assistant(None, tool_calls=[call(), call("Rome", 2)])
    )
    turns = [user(), calling, answer() | {"reward": 0.5}, answer("9 C", 2) | {"reward": 0.25}, assistant(SAID)]
    tokenizer = byte_level(FAMILIES[family])
    rendered = render(family, {"messages": turns, "reward": 1, "tools": [TOOL]}, "trajectory")
    plain = [{k: v for k, v in turn.items() if k != "reward"} for turn in turns]
    assert text_of(tokenizer, rendered.prompt_ids + rendered.response_ids[0]) + "\n" == written(family, plain, [TOOL])
    (_, between) = next(part for part in stretches(tokenizer, rendered) if not part[0])
    first = "\n<|im_start|>user\n<tool_response>\n3 C\n</tool_response>"
    assert between == first + "\n<tool_response>\n9 C\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    ends = {
        reward: text_of(tokenizer, rendered.response_ids[0][: i + 1])
        for i, reward in enumerate(rendered.token_rewards[0])
        if reward
    }
    assert ends[0.5].endswith(first)
    assert ends[0.25].endswith("9 C\n</tool_response><|im_end|>")


def test_a_tool_says_nothing_and_the_assistant_speaks_twice():
    turns = [user(), assistant("call f"), assistant("call g"), {"role": "tool", "content": ""}, assistant("done")]
    tokenizer = byte_level(CHATML)
    rendered = render("chatml", {"messages": turns, "reward": 1}, "trajectory")
    assert text_of(tokenizer, rendered.prompt_ids + rendered.response_ids[0]) + "\n" == written("chatml", turns)
    call_for = "\n<|im_start|>assistant\n"
    assert stretches(tokenizer, rendered) == [
        (True, "call f<|im_end|>"),
        (False, call_for),
        (True, "call g<|im_end|>"),
        (False, "\n<|im_start|>tool\n<|im_end|>" + call_for),
        (True, "done<|im_end|>"),
    ]
    assert shown("chatml", {"messages": turns[:3]}) == (
        written("chatml", turns[:2], add_generation_prompt=True),
        "call g<|im_end|>",
    )


def test_a_turn_of_calls_that_ends_otherwise():
    calling = assistant(None, tool_calls=[call()])
    tokenizer = byte_level(LLAMA3)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>", "<|eot|>", "<|eom|>"]})
    renderer = Renderer(tokenizer, config())
    turns = [user(), calling, answer('say "hi"'), assistant("It said hi.")]
    rendered = renderer(parse({"messages": turns, "reward": 1}, "trajectory"))
    assert text_of(tokenizer, rendered.prompt_ids + rendered.response_ids[0]) == written("llama3", turns)
    said = [text for policy, text in stretches(tokenizer, rendered) if policy]
    assert said == ['{"name": "weather", "parameters": {"city": "Oslo"}}<|eom|>', "It said hi.<|eot|>"]
    rendered = renderer(parse({"prompt": [user()], "response": calling}, "demonstration"))
    assert text_of(tokenizer, rendered.response_ids[0]) == said[0], "its end is its only end"


# --------------------------------------------------------------------------------------------------------- prefills


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"opening", "field", "r1"}))
def test_a_prefill_is_continued(family):
    begun = [user(), assistant("Old pond")]
    best, worst = assistant(" a frog"), assistant(" no")
    for kind, value in (
        ("demonstration", {"prompt": begun, "response": " a frog"}),
        ("preference", {"prompt": begun, "chosen": best, "rejected": worst}),
        ("ranking", {"prompt": begun, "responses": [worst, best], "ranks": [2, 1]}),
        ("unpaired", {"prompt": begun, "completion": [best], "label": True}),
        ("trajectory", {"prompt": begun, "steps": [" a", " frog"], "reward": 1}),
        ("trajectory", {"prompt": begun, "messages": [best], "reward": 1}),
    ):
        prompt, said, *_ = shown(family, value, kind)
        assert prompt == written(family, begun, continue_final_message=True)
        assert prompt.endswith("Old pond")
        assert (prompt + said).rstrip() == written(family, [user(), assistant("Old pond a frog")]).rstrip()
    tokenizer = byte_level(FAMILIES[family])
    ids = Renderer(tokenizer, config()).prompt_ids(parse_prompt({"prompt": begun}))
    assert text_of(tokenizer, ids) == written(family, begun, continue_final_message=True)


@pytest.mark.parametrize("family", ["qwen3", "opening", "r1", "field"])
@pytest.mark.parametrize("begun", [assistant("<think>\ntwo"), assistant(None, reasoning_content="two")])
def test_begun_thoughts_are_continued(family, begun):
    prompt, said = shown(family, {"prompt": [user(), begun], "response": " and two\n</think>\n\n4"})
    assert prompt.endswith(("assistant\n<think>\ntwo", "<|assistant|><think>\ntwo"))
    assert said == " and two\n</think>\n\n4" + ("</s>" if family == "r1" else "<|im_end|>")


def test_what_cannot_be_continued():
    for last, said in (
        (assistant(None, tool_calls=[call()]), "the prompt ends with tool calls: there is nothing to continue"),
        (assistant(" "), "the prompt ends with an empty message: there is nothing to continue"),
    ):
        assert reason("hermes", {"prompt": [user(), last], "response": "a"}) == said


def test_options_of_a_record_reach_its_template():
    value = {"prompt": [user()], "response": "4", "chat_template_kwargs": {"enable_thinking": False}}
    prompt, said = shown("qwen3", value)
    assert prompt == written("qwen3", [user()], add_generation_prompt=True, enable_thinking=False)
    assert said == "4<|im_end|>"
    taken = value | {"chat_template_kwargs": {"tokenize": True}}
    assert reason("qwen3", taken) == "chat_template_kwargs cannot set tokenize"
