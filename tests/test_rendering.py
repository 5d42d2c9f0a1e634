"""Records to tokens: chats, prompts cut from the left, and what holds for every record."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import Demonstration, PreferencePair, Ranking
from pipeline.rendering import Rendered, Renderer
from tests.conftest import CHATML
from tests.tiny_tokenizers import LLAMA, byte_level, chat, config, smollm2, text_of

# ------------------------------------------------------------------------------------------- SmolLM2, chat


@pytest.mark.slow
def test_a_chat_is_what_the_tokenizers_own_template_says():
    tokenizer = smollm2()
    prompt = chat("system: be brief", "Hi!", "Hello.", "How are you?")
    rendered = Renderer(tokenizer, config())(PreferencePair(prompt=prompt, chosen="Fine, thanks.", rejected="Why?"))
    turns = [m.model_dump() for m in prompt]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    answered = tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": "Fine, thanks."}], return_dict=False
    )
    assert rendered.prompt_ids == asked
    line_feed = tokenizer("\n")["input_ids"]
    assert rendered.prompt_ids + rendered.response_ids[0] + line_feed == answered
    assert [text_of(tokenizer, ids) for ids in rendered.response_ids] == ["Fine, thanks.<|im_end|>", "Why?<|im_end|>"]
    assert rendered.text == text_of(tokenizer, rendered.prompt_ids + rendered.response_ids[0])
    assert (rendered.prompt_tokens_cut, rendered.responses_cut) == (0, 0)


def test_plain_text_gets_no_template_and_one_eos():
    tokenizer = smollm2()
    rendered = Renderer(tokenizer, config())(PreferencePair(prompt="This film is", chosen=" good.", rejected=" bad."))
    assert rendered.prompt_ids == tokenizer("This film is")["input_ids"]
    assert rendered.response_ids == [
        [*tokenizer(" good.")["input_ids"], tokenizer.eos_token_id],
        [*tokenizer(" bad.")["input_ids"], tokenizer.eos_token_id],
    ]


def test_one_prompt_for_all_where_joint_tokens_would_differ():
    tokenizer = smollm2()
    whole = [tokenizer("The mo" + rest)["input_ids"] for rest in ("vie", "vement", "on")]
    prompt = tokenizer("The mo")["input_ids"]
    assert any(ids[: len(prompt)] != prompt for ids in whole), "pick words whose tokens merge across the border"
    record = Ranking(prompt="The mo", responses=["vie", "vement", "on"], ranks=[1, 2, 3])
    rendered = Renderer(tokenizer, config())(record)
    assert rendered.prompt_ids == prompt
    assert [text_of(tokenizer, ids) for ids in rendered.response_ids] == [f"{r}<|im_end|>" for r in record.responses]


def test_merge_across_the_border_of_a_chat():
    tokenizer = smollm2()
    record = PreferencePair(prompt=chat("hi"), chosen="\n\nYes", rejected="No")
    renderer = Renderer(tokenizer, config())
    rendered = renderer(record)
    assert rendered.prompt_ids == renderer.prompt_ids(record.prompt)
    assert text_of(tokenizer, rendered.response_ids[0]) == "\n\nYes<|im_end|>"


def test_generation_sees_the_prompt_that_training_saw():
    renderer = Renderer(smollm2(), config(max_length=48))
    for prompt in ("word " * 60, chat("word " * 60), chat("system: be brief", "word " * 60)):
        rendered = renderer(PreferencePair(prompt=prompt, chosen="yes it is", rejected="no"))
        assert rendered.prompt_tokens_cut > 0
        assert renderer.prompt_ids(prompt, room=max(map(len, rendered.response_ids))) == rendered.prompt_ids


def test_a_cut_chat_keeps_system_text_and_the_call_for_an_answer():
    tokenizer = smollm2()
    renderer = Renderer(tokenizer, config(max_length=40))
    rendered = renderer(PreferencePair(prompt=chat("system: be brief", "word " * 60), chosen="yes", rejected="no"))
    text = text_of(tokenizer, rendered.prompt_ids)
    assert text.startswith("<|im_start|>system\nsystem: be brief<|im_end|>\n<|im_start|>user\n word")
    assert text.endswith("word <|im_end|>\n<|im_start|>assistant\n")
    assert len(rendered.prompt_ids) == 40 - 2
    squeezed = renderer(Demonstration(prompt=chat("system: be brief", "word " * 60), response="yes " * 60))
    kept = "<|im_start|>system\nsystem: be brief<|im_end|>\n<|im_start|>user\n word <|im_end|>\n<|im_start|>assistant\n"
    assert text_of(tokenizer, squeezed.prompt_ids) == kept
    assert squeezed.responses_cut == 1
    assert [text_of(tokenizer, ids) for ids in rendered.response_ids] == ["yes<|im_end|>", "no<|im_end|>"]


def test_the_prompt_yields_first_then_responses_are_cut_and_counted():
    tokenizer = byte_level()
    renderer = Renderer(tokenizer, config(max_length=12))
    record = PreferencePair(prompt="the cat sat on the mat", chosen="q" * 30, rejected="z")
    rendered = renderer(record)
    whole = tokenizer(record.prompt)["input_ids"]
    assert rendered.prompt_ids == [0, *whole[-5:]]  # half: the response is too long for any more of it to help
    assert rendered.response_ids == [tokenizer("q" * 30)["input_ids"][1:7], [*tokenizer("z")["input_ids"][1:], 1]]
    assert rendered.responses_cut == 1
    assert rendered.prompt_tokens_cut == len(whole) - 6
    rendered = renderer(PreferencePair(prompt=record.prompt, chosen="q" * 8, rejected="z"))
    assert rendered.prompt_ids == [0, *whole[-2:]]
    assert rendered.responses_cut == 0


def test_max_prompt_length_is_a_bound_of_its_own():
    tokenizer = byte_level()
    record = Demonstration(prompt="z" * 20, response="q")
    rendered = Renderer(tokenizer, config(max_length=100, max_prompt_length=5))(record)
    assert rendered.prompt_ids == [0, *tokenizer("z" * 20)["input_ids"][-4:]]
    assert rendered.prompt_tokens_cut == 16


def test_what_truncation_leaves_nothing_of_is_refused():
    pair = PreferencePair(prompt="z" * 9, chosen="q" * 20 + "a", rejected="q" * 20 + "b")
    with pytest.raises(ValueError, match=r"^responses are equal after truncation$"):
        Renderer(byte_level(), config(max_length=12))(pair)
    prompt = chat("system: " + "z" * 50, "hi")
    with pytest.raises(ValueError, match=r"^nothing left of the response within max_length"):
        Renderer(byte_level(CHATML), config(max_length=40))(PreferencePair(prompt=prompt, chosen="a", rejected="b"))
    with pytest.raises(ValueError, match=r"^nothing left of the prompt within max_prompt_length"):
        Renderer(byte_level(CHATML), config(max_prompt_length=40))(
            PreferencePair(prompt=prompt, chosen="a", rejected="b")
        )


# ---------------------------------------------------------------------------------------------- properties

# SmolLM2's vocabulary lacks the bytes of some control characters and of planes 4 and up: nobody could decode those.
BASIC = st.text(
    st.characters(
        max_codepoint=0xFFFF, exclude_categories=("Cs", "Cc"), include_characters="\n\t", exclude_characters="<"
    ),
    min_size=1,
    max_size=40,
).filter(str.strip)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=40).filter(str.strip)


def outcome(renderer: Renderer, record) -> tuple[Rendered | None, str]:
    try:
        return renderer(record), ""
    except ValueError as error:
        return None, str(error)


@settings(max_examples=50, deadline=None)
@given(
    template=st.sampled_from([LLAMA, CHATML]),
    prompt=st.one_of(TEXT, st.lists(TEXT, min_size=1, max_size=4).map(lambda turns: chat(*turns))),
    responses=st.lists(TEXT, min_size=2, max_size=4, unique=True),
    max_length=st.integers(2, 120),
)
def test_every_rendered_record_can_be_trained_on(template, prompt, responses, max_length):
    tokenizer = byte_level(template)
    renderer = Renderer(tokenizer, config(max_length=max_length))
    record = Ranking(prompt=prompt, responses=responses, ranks=list(range(len(responses))))
    rendered, reason = outcome(renderer, record)
    if rendered is None:
        assert reason.startswith(("nothing left of the response within max_length", "responses are equal after t"))
        return
    ends = {1, 3} if template == CHATML and not isinstance(prompt, str) else {1}
    assert rendered.prompt_ids[0] == 0
    assert rendered.prompt_ids.count(0) == 1
    assert renderer.prompt_ids(prompt, room=max(map(len, rendered.response_ids))) == rendered.prompt_ids
    cut = 0
    for text, ids in zip(responses, rendered.response_ids, strict=True):
        assert 1 <= len(ids) <= max_length - len(rendered.prompt_ids)
        if ids[-1] in ends:
            said = text_of(tokenizer, ids[:-1])
            stripped = template == LLAMA and not isinstance(prompt, str)
            assert said == (text.strip() if stripped else text)
        else:
            cut += 1
            assert len(ids) == max_length - len(rendered.prompt_ids)
        assert not ({0, *ends} & set(ids[:-1]))
    assert rendered.responses_cut == cut
    if cut:  # only when the prompt has given all it could
        assert rendered.prompt_tokens_cut > 0 or len(renderer.prompt_ids(prompt, room=10**6)) == len(
            rendered.prompt_ids
        )


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(BASIC, min_size=1, max_size=3), response=BASIC)
def test_tokens_after_the_last_special_one_are_those_of_the_whole_text(turns, response):
    tokenizer = smollm2()
    prompt = chat(*turns)
    rendered = Renderer(tokenizer, config())(Demonstration(prompt=prompt, response=response))
    joint = tokenizer(rendered.text)["input_ids"]
    if joint[: len(rendered.prompt_ids)] == rendered.prompt_ids:
        assert rendered.prompt_ids + rendered.response_ids[0] == joint
    assert text_of(tokenizer, rendered.response_ids[0]) == response + "<|im_end|>"
