"""Trajectories to tokens: whose each token is, and where rewards land, on real tokenizers and their habits."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import Step, Trajectories, Trajectory, Unpaired
from pipeline.rendering import Rendered, Renderer
from pipeline.steps import Segment, last_tokens
from tests.conftest import CHATML
from tests.tiny_tokenizers import LLAMA, byte_level, chat, config, sentence_piece, smollm2, text_of


def slow():
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


TOKENIZERS = {"smollm2": smollm2, "byte_level": byte_level, "sentence_piece": sentence_piece, "slow": slow}


def tool(text: str, reward: float = 0.0, speaker: str = "tool") -> Step:
    return Step(text=text, role="environment", speaker=speaker, reward=reward)


def said(text: str, reward: float = 0.0, logprob: float | None = None) -> Step:
    return Step(text=text, reward=reward, logprob=logprob)


def render(tokenizer, steps: list[Step], reward: float = 0.0, prompt="the cat", **data) -> Rendered:
    way = Trajectory(steps=steps, reward=reward)
    return Renderer(tokenizer, config(**data))(Trajectories(prompt=prompt, trajectories=[way]))


def stretches(tokenizer, rendered: Rendered, k: int = 0) -> list[tuple[bool, str]]:
    """Whether the policy wrote it, and the text, of each run of tokens of one author."""
    trained = rendered.trained[k] if rendered.trained else [True] * len(rendered.response_ids[k])
    pairs = zip(trained, rendered.response_ids[k], strict=True)
    runs = groupby(pairs, lambda pair: pair[0])
    return [(policy, text_of(tokenizer, [token for _, token in run])) for policy, run in runs]


def landed(tokenizer, rendered: Rendered, k: int = 0) -> list[tuple[float, str]]:
    """Each reward, and the text up to and including its token."""
    ids, rewards = rendered.response_ids[k], rendered.token_rewards[k]
    return [(reward, text_of(tokenizer, ids[: i + 1])) for i, reward in enumerate(rewards) if reward]


# --------------------------------------------------------------------------------------------------- plain text


@pytest.mark.slow
def test_rewards_land_on_the_last_token_of_their_step():
    tokenizer = smollm2()
    steps = [said(" 48 / 2 = 24.\n", 0.25), said("48 + 24 = 72.\n", 0.5), said("#### 72", 2.0)]
    rendered = render(tokenizer, steps, reward=1.0)
    text = " 48 / 2 = 24.\n48 + 24 = 72.\n#### 72"
    assert rendered.response_ids == [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]  # tokenised together
    assert landed(tokenizer, rendered) == [
        (0.25, " 48 / 2 = 24.\n"),
        (0.5, " 48 / 2 = 24.\n48 + 24 = 72.\n"),
        (2.0, text),
        (1.0, text + "<|im_end|>"),
    ]
    assert (rendered.trained, rendered.behaviour_logprobs) == (None, None)
    assert rendered.text == "the cat" + text


def test_a_token_over_a_border_belongs_to_the_step_that_it_ends_in():
    tokenizer = smollm2()
    assert len(tokenizer("vement")["input_ids"]) == 1
    rendered = render(tokenizer, [said("It is a mo", 1.0), said("v", 2.0), said("e", 4.0), said("ment.", 8.0)])
    pieces = [text_of(tokenizer, [token]) for token in rendered.response_ids[0]]
    assert pieces == ["It", " is", " a", " movement", ".", "<|im_end|>"]
    # The steps inside the word have no token of their own: their rewards go to the one that holds their last character.
    assert rendered.token_rewards == [[0, 0, 1.0, 6.0, 8.0, 0]]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_borders_between_authors_are_borders_of_tokens(name):
    tokenizer = TOKENIZERS[name]()
    steps = [said("the ca", 1.0), tool("t sat\n", 2.0), said("on the mat", 4.0), tool("x"), said("y")]
    rendered = render(tokenizer, steps, reward=8.0)
    end = tokenizer.eos_token
    expected = [(True, "the ca"), (False, "t sat\n"), (True, "on the mat"), (False, "x"), (True, "y" + end)]
    assert stretches(tokenizer, rendered) == expected
    upto = ["the ca", "the cat sat\n", "the cat sat\non the mat", "the cat sat\non the matxy" + end]
    assert landed(tokenizer, rendered) == list(zip([1.0, 2.0, 4.0, 8.0], upto, strict=True))


@pytest.mark.parametrize("name", ["smollm2", "byte_level"])
def test_a_trajectory_that_the_environment_ends_has_no_end_token(name):
    tokenizer = TOKENIZERS[name]()
    rendered = render(tokenizer, [said("the cat"), tool(" sat", 0.5)], reward=1.0)
    assert stretches(tokenizer, rendered) == [(True, "the cat"), (False, " sat")]
    assert landed(tokenizer, rendered) == [(1.5, "the cat sat")]


def test_a_slow_tokenizer_reads_step_by_step():
    rendered = render(slow(), [said("é\n", 1.0), said("b", 2.0)], reward=4.0)
    assert rendered.response_ids == [[198, 172, 13, 101, 1]]
    assert rendered.token_rewards == [[0, 0, 1.0, 2.0, 4.0]]


def test_best_first_and_each_with_what_is_its_own():
    tokenizer = byte_level()
    ways = [
        Trajectory(steps=[said("cat", logprob=-1.0), tool("!"), said("on", logprob=-2.0)], reward=0.5),
        Trajectory(steps=[said("the", 1.0)]),
    ]
    rendered = Renderer(tokenizer, config())(Trajectories(prompt="p", trajectories=ways))
    assert [stretches(tokenizer, rendered, k) for k in (0, 1)] == [
        [(True, "the</s>")],
        [(True, "cat"), (False, "!"), (True, "on</s>")],
    ]
    assert rendered.behaviour_logprobs == [None, -3.0]
    assert [sum(rewards) for rewards in rendered.token_rewards] == [1.0, 0.5]


def test_nothing_is_cut_on_the_right():
    tokenizer = slow()
    steps = [said("12345678", 1.0)]
    rendered = render(tokenizer, steps, prompt="abcdef", max_length=12)
    assert text_of(tokenizer, rendered.prompt_ids) == "def"
    assert rendered.prompt_tokens_cut == 3
    assert (len(rendered.response_ids[0]), rendered.responses_cut) == (9, 0)
    with pytest.raises(ValueError, match=r"^a trajectory does not fit max_length$"):
        render(tokenizer, [*steps, said("9ab")], prompt="abcdef", max_length=12)


def test_ends_inside_a_trajectory_are_refused():
    for steps in ([said("a</s>b")], [said("a<s>"), tool("x"), said("b")]):
        with pytest.raises(ValueError, match=r"^a response contains BOS, EOS or the end of a turn$"):
            render(byte_level(), steps)
    with pytest.raises(ValueError, match=r"^a step of the environment contains BOS or EOS$"):
        render(byte_level(), [said("a"), tool("x</s>"), said("b")])
    with pytest.raises(ValueError, match=r"^empty step: the tokenizer makes no token of it$"):
        render(smollm2(), [said("a"), tool("\x04"), said("b")])


def test_the_label_of_an_unpaired_response_is_its_last_tokens_reward():
    for label, reward in ((True, 1.0), (False, -1.0)):
        rendered = Renderer(slow(), config(max_length=8))(Unpaired(prompt="abc", response="cat", label=label))
        assert rendered.token_rewards == [[0.0, 0.0, 0.0, reward]]
        cut = Renderer(slow(), config(max_length=4))(Unpaired(prompt="abc", response="cats", label=label))
        assert (cut.token_rewards, cut.responses_cut) == ([[0.0, reward]], 1)


# ---------------------------------------------------------------------------------------------------- dialogues

TALK = [said("calc: ", 0.5), said("1+1", 1.0), tool("2", 2.0), tool("done", 4.0), said("It is 2.", 8.0)]


def test_a_dialogue_is_what_the_tokenizers_own_template_says():
    tokenizer = smollm2()
    prompt = chat("system: be brief", "1+1?")
    rendered = render(tokenizer, TALK, reward=16.0, prompt=prompt)
    turns = [m.model_dump() for m in prompt] + [
        {"role": "assistant", "content": "calc: 1+1"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "It is 2."},
    ]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    assert rendered.prompt_ids + rendered.response_ids[0] + tokenizer("\n")["input_ids"] == whole
    between = "\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>tool\ndone<|im_end|>\n<|im_start|>assistant\n"
    assert stretches(tokenizer, rendered) == [
        (True, "calc: 1+1<|im_end|>"),
        (False, between),
        (True, "It is 2.<|im_end|>"),
    ]
    # A step's reward stands where its words end (the environment's: its turn), the terminal one on the end of the turn.
    found = landed(tokenizer, rendered)
    first = "calc: 1+1<|im_end|>\n<|im_start|>tool\n2<|im_end|>"
    assert found[1:] == [
        (1.0, "calc: 1+1"),
        (2.0, first),
        (4.0, first + "\n<|im_start|>tool\ndone<|im_end|>"),
        (8.0, "calc: 1+1<|im_end|>" + between + "It is 2."),
        (16.0, "calc: 1+1<|im_end|>" + between + "It is 2.<|im_end|>"),
    ]
    assert found[0][0] == 0.5
    assert found[0][1] in ("calc:", "calc: ")


def test_templates_that_strip_and_templates_with_bos():
    tokenizer = byte_level(LLAMA)
    rendered = render(
        tokenizer, [said("\n\n\n\nthe ", 1.0), said("cat\n", 2.0), tool(" sat "), said("on")], prompt=chat("hi")
    )
    assert stretches(tokenizer, rendered) == [
        (True, "the cat</s>"),
        (False, "\n[tool]\nsat</s>\n[assistant]\n"),
        (True, "on</s>"),
    ]
    assert [text.strip() for _, text in landed(tokenizer, rendered)] == ["the", "the cat"]
    assert [i for i, token in enumerate(rendered.prompt_ids + rendered.response_ids[0]) if token == 0] == [0]


def test_a_dialogue_that_the_environment_ends():
    tokenizer = byte_level(CHATML)
    rendered = render(tokenizer, [said("the cat"), tool("sat", speaker="user")], reward=1.0, prompt=chat("hi"))
    last = "\n<|im_start|>user\nsat<|im_end|>"
    assert stretches(tokenizer, rendered) == [(True, "the cat<|im_end|>"), (False, last)]
    assert landed(tokenizer, rendered) == [(1.0, "the cat<|im_end|>" + last)]


def test_templates_that_rewrite_earlier_turns_are_refused():
    forgetful = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
    tokenizer = byte_level(forgetful)
    steps = [said("it is</think>Yes"), tool("ok"), said("Bye")]
    with pytest.raises(ValueError, match=r"^the chat template rewrites earlier turns"):
        render(tokenizer, steps, prompt=chat("hi"))
    assert stretches(tokenizer, render(tokenizer, [said("Yes"), *steps[1:]], prompt=chat("hi")))[0] == (
        True,
        "Yes<|im_end|>",
    )


def test_a_template_that_drops_other_speakers_is_refused():
    deaf = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    with pytest.raises(ValueError, match=r"^the chat template leaves out the words of a turn \(tool\)$"):
        render(byte_level(deaf), [said("a"), tool("x"), said("b")], prompt=chat("hi"))


def test_an_end_inside_an_earlier_turn_is_refused():
    with pytest.raises(ValueError, match=r"^a message contains a special token"):
        render(byte_level(CHATML), [said("a<|im_end|>b"), tool("x"), said("c")], prompt=chat("hi"))


# --------------------------------------------------------------------------------------------------- properties

# A step that ends with a line feed before a word ends with a token in all these tokenizers.
LINE = st.text(alphabet="the catson.+=19 ", min_size=1, max_size=12).map(lambda text: "a" + text.rstrip() + "\n")
AUTHORED = st.lists(st.tuples(LINE, st.booleans()), min_size=1, max_size=5).filter(
    lambda steps: any(policy for _, policy in steps)
)


@settings(max_examples=25)
@given(st.sampled_from(sorted(TOKENIZERS)), AUTHORED)
def test_text_up_to_a_reward_ends_with_its_step(name, authored):
    tokenizer = TOKENIZERS[name]()
    steps = [said(t, 2.0**i) if policy else tool(t, 2.0**i) for i, (t, policy) in enumerate(authored)]
    rendered = render(tokenizer, steps, reward=64.0, append_eos=False)
    found = landed(tokenizer, rendered)
    upto = ["".join(step.text for step in steps[: i + 1]) for i in range(len(steps))]
    rewards = [2.0**i for i in range(len(steps))]
    rewards[-1] += 64.0
    assert found == list(zip(rewards, upto, strict=True))
    runs = groupby(steps, lambda step: step.role == "policy")
    assert stretches(tokenizer, rendered) == [(policy, "".join(s.text for s in run)) for policy, run in runs]


ANY = st.text(st.characters(max_codepoint=0x2FFF, exclude_categories=("Cs", "Cc"), exclude_characters="<"), min_size=1)


@settings(max_examples=25)
@given(st.sampled_from(["smollm2", "byte_level"]), st.lists(ANY, min_size=1, max_size=4))
def test_wherever_steps_end_no_reward_is_lost_nor_early(name, texts):
    tokenizer = TOKENIZERS[name]()
    if not "".join(texts).strip():
        return
    rendered = render(tokenizer, [said(text, 2.0**i) for i, text in enumerate(texts)], append_eos=False)
    assert sum(rendered.token_rewards[0]) == 2.0 ** len(texts) - 1
    assert rendered.response_ids[0] == tokenizer("".join(texts), add_special_tokens=False)["input_ids"]
    places = []
    for i in range(len(texts)):  # rewards are powers of 2: each token's sum says whose it holds
        (place,) = (j for j, reward in enumerate(rendered.token_rewards[0]) if int(reward) >> i & 1)
        places.append(place)
        whole = len("".join(texts[: i + 1]).encode())
        # Nothing of the step is said behind the token after the one with its reward.
        assert len(text_of(tokenizer, rendered.response_ids[0][: place + 2]).encode()) >= whole
    assert places == sorted(places)


def test_last_tokens_of_steps_by_hand():
    def tokens(steps: list[int], *ends: int) -> list[int]:
        return last_tokens(Segment("x" * 9, steps, [0.0] * len(steps), True), ends)

    assert tokens([3, 9], 1, 3, 5, 9) == [1, 3]
    assert tokens([4, 9], 1, 3, 5, 9) == [1, 3]  # token 2 ends in step 2
    assert tokens([4, 6], 1, 3, 5, 6, 9) == [1, 3]  # what follows closes the turn
    assert tokens([1, 9], 3, 9) == [0, 1]  # step 1 has no token of its own
    assert tokens([1, 2, 9], 9, 9) == [0, 0, 1]
    assert tokens([3, 9], 3, 3, 9, 9) == [1, 3]  # two tokens of one character
    assert tokens([3, 9], 3) == [0, 0]  # the tokenizer makes nothing of the rest
