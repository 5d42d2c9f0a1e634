"""Every layout of a trajectory that loads, and every fault that is refused with a reason that can be counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.layouts import parse
from pipeline.records import Trajectories
from tests.test_layouts import assistant, system, user


def shown(value: dict) -> tuple:
    """Prompt (a dialogue as (role, content) pairs), and per trajectory (author, text, reward) of its steps and its reward."""
    record = parse(value, "trajectory")
    assert isinstance(record, Trajectories)
    prompt = record.prompt if isinstance(record.prompt, str) else [(m.role, m.content) for m in record.prompt]
    ways = [
        ([(s.speaker if s.role == "environment" else "policy", s.text, s.reward) for s in way.steps], way.reward)
        for way in record.trajectories
    ]
    return prompt, ways


TWO = [("policy", "a\n", 0.5), ("policy", "b", 0.0)]
HI = [("user", "hi")]


@pytest.mark.parametrize(
    ("value", "prompt", "ways"),
    [
        ({"prompt": "p", "steps": [{"text": "a\n", "reward": 0.5}, {"text": "b"}], "reward": 1}, "p", [(TWO, 1.0)]),
        ({"prompt": "p", "steps": [{"text": "a\n", "reward": 0.5}, "b"]}, "p", [(TWO, 0.0)]),
        ({"prompt": "p", "steps": ["a\n", "b"], "step_rewards": [0.5, 0]}, "p", [(TWO, 0.0)]),
        ({"prompt": "p", "steps": ["a\n", "b"], "step_rewards": [0.5, None], "reward": 2}, "p", [(TWO, 2.0)]),
        ({"prompt": "p", "response": "a", "reward": -1}, "p", [([("policy", "a", 0.0)], -1.0)]),
        ({"prompt": "p", "completion": "a", "reward": 0}, "p", [([("policy", "a", 0.0)], 0.0)]),
        ({"prompt": [user("hi")], "response": assistant("a"), "reward": 1}, HI, [([("policy", "a", 0.0)], 1.0)]),
        (
            {"prompt": "p", "trajectories": [{"steps": ["a"], "reward": 1}, {"response": "b", "reward": 0}]},
            "p",
            [([("policy", "a", 0.0)], 1.0), ([("policy", "b", 0.0)], 0.0)],
        ),
        (
            {"prompt": "p", "steps": ["a", {"text": "=1", "role": "environment", "speaker": "tool"}, "b"], "reward": 1},
            "p",
            [([("policy", "a", 0.0), ("tool", "=1", 0.0), ("policy", "b", 0.0)], 1.0)],
        ),
        (
            {"messages": [system("s"), user("hi"), assistant("a"), user("no"), assistant("b")], "reward": 1},
            [("system", "s"), *HI],
            [([("policy", "a", 0.0), ("user", "no", 0.0), ("policy", "b", 0.0)], 1.0)],
        ),
        (
            {"prompt": "hi", "messages": [user("hi"), {"role": "assistant", "content": "a", "reward": 3}]},
            HI,
            [([("policy", "a", 3.0)], 0.0)],
        ),
        (
            {"prompt": [user("hi")], "messages": [assistant("a"), {"role": "tool", "content": "t"}], "reward": 1},
            HI,
            [([("policy", "a", 0.0), ("tool", "t", 0.0)], 1.0)],
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}], "reward": 1},
            HI,
            [([("policy", "a", 0.0)], 1.0)],
        ),
        (
            {
                "trajectories": [
                    {"messages": [user("hi"), assistant("a")], "reward": 1},
                    {"messages": [user("hi"), assistant("b")], "reward": 0},
                ],
                "system": "s",
            },
            [("system", "s"), *HI],
            [([("policy", "a", 0.0)], 1.0), ([("policy", "b", 0.0)], 0.0)],
        ),
        (  # the dialogue beside the trajectories is their prompt
            {"messages": [user("hi")], "trajectories": [{"messages": [assistant("a")], "reward": 1}]},
            HI,
            [([("policy", "a", 0.0)], 1.0)],
        ),
    ],
)
def test_layouts(value, prompt, ways):
    assert shown(value) == (prompt, ways)


def test_best_first_and_equal_ones_stay():
    ways = [{"steps": ["a"], "reward": 0}, {"steps": ["b"], "reward": 1}, {"steps": ["a"], "reward": 0}]
    record = parse({"prompt": "p", "trajectories": ways}, "trajectory")
    assert record.ranked == ["b", "a", "a"]


def test_log_probs_of_steps_and_of_their_tokens():
    step = {"text": "a", "logprob": -1.5}
    tool = {"text": "t", "role": "environment"}
    for value, expected in (
        ({"steps": [step, tool, {"text": "b", "logprobs": [-0.25, -0.5]}]}, -2.25),
        ({"steps": ["a", tool, "b"], "step_logprobs": [-1, None, -2]}, -3.0),
        ({"steps": [step, tool, "b"]}, None),
        ({"messages": [user("x"), assistant("a") | {"logprob": -1}, user("y"), assistant("b") | {"logprob": -3}]}, -4),
    ):
        record = parse({"prompt": "x", "reward": 1, **value}, "trajectory")
        assert record.trajectories[0].behaviour_logprob == expected


STEPS = {"prompt": "p", "steps": ["a", "b"], "reward": 1}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"prompt": "p", "reward": 1}, "missing field: steps"),
        ({"steps": ["a"], "reward": 1}, "missing field: prompt"),
        ({"prompt": "p", "steps": ["a"]}, "missing field: reward (inside each trajectory, or of a step)"),
        (STEPS | {"steps": []}, "no steps"),
        (STEPS | {"steps": "a"}, "wrong type: steps is text, expected a list"),
        (STEPS | {"steps": ["a", 5]}, "wrong type: a step is a number, expected text or an object with text"),
        (STEPS | {"steps": ["a", ""]}, "step without text"),
        (STEPS | {"steps": ["a", {"reward": 1}]}, "step without text"),
        (STEPS | {"steps": [" ", "\n"]}, "empty response: the policy's steps"),
        (STEPS | {"steps": [{"text": 5}]}, "wrong type: a step's text is a number, expected text"),
        (STEPS | {"steps": [{"text": "a", "role": "user"}]}, "wrong role: a step's is neither policy nor environment"),
        (STEPS | {"steps": [{"text": "a", "role": 1}]}, "wrong type: a step's role is a number, expected text"),
        (STEPS | {"steps": [{"text": "a", "role": "environment"}]}, "no policy step"),
        (STEPS | {"reward": "1"}, "wrong type: reward is text, expected a number"),
        (STEPS | {"reward": [1]}, "wrong type: reward is a list, expected a number"),
        (STEPS | {"reward": float("nan")}, "non-finite reward"),
        (STEPS | {"reward": 1e39}, "reward beyond float32"),
        (STEPS | {"step_rewards": [2e38, 2e38], "reward": 0}, "rewards whose sum is beyond float32"),
        (STEPS | {"step_logprobs": [-1e39, -1]}, "logprob beyond float32"),
        (STEPS | {"step_logprobs": [-2e38, -2e38]}, "logprobs whose sum is beyond float32"),
        (STEPS | {"steps": [{"text": "a", "reward": float("inf")}]}, "non-finite step's reward"),
        (STEPS | {"steps": [{"text": "a", "reward": "1"}]}, "wrong type: step's reward is text, expected a number"),
        (STEPS | {"step_rewards": [1]}, "different numbers of steps and step_rewards"),
        (STEPS | {"step_rewards": 1}, "wrong type: step_rewards is a number, expected a list"),
        (STEPS | {"step_logprobs": [-1]}, "different numbers of steps and step_logprobs"),
        (
            {"prompt": "p", "steps": [{"text": "a", "reward": 1}], "step_rewards": [1]},
            "both step_rewards and a step's own reward",
        ),
        (STEPS | {"steps": [{"text": "a", "logprob": 0.5}]}, "positive logprob"),
        (STEPS | {"steps": [{"text": "a", "logprobs": [-1, "x"]}]}, "wrong type: logprob is text, expected a number"),
        (STEPS | {"steps": [{"text": "a", "logprob": -1, "logprobs": [-1]}]}, "both logprob and logprobs of a step"),
        ({"prompt": "p", "trajectories": []}, "no trajectories"),
        ({"prompt": "p", "trajectories": {}}, "wrong type: trajectories is an object, expected a list"),
        ({"prompt": "p", "trajectories": ["a"]}, "wrong type: a trajectory is text, expected steps and reward"),
        (
            {"prompt": "p", "trajectories": [{"steps": ["a"], "reward": 1}, {"steps": ["a"], "reward": 0}]},
            "equal trajectories with different rewards",
        ),
        ({"messages": [user("hi")], "reward": 1}, "no assistant turn: messages"),
        ({"messages": [assistant("a")], "reward": 1}, "missing field: prompt"),
        (
            {
                "trajectories": [
                    {"messages": [user("x"), assistant("a")], "reward": 1},
                    {"messages": [user("y"), assistant("a")], "reward": 1},
                ]
            },
            "no shared prompt: the dialogues differ before their last answer",
        ),
        (
            {"prompt": [user("x")], "steps": [{"text": "t", "role": "environment"}, "a"], "reward": 1},
            "a trajectory of a dialogue begins with the environment; put that into the prompt",
        ),
        (STEPS | {"steps": ["a\ud800"]}, "bad Unicode: half of a surrogate pair"),
    ],
)
def test_faults_are_refused_with_a_reason_that_can_be_counted(value, reason):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared below)
        parse(value, "trajectory")
    assert str(caught.value) == reason


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3))
STEP = st.dictionaries(st.sampled_from(["text", "reward", "role", "speaker", "logprob", "logprobs"]), LEAVES)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(max_size=3),
        "steps": st.lists(st.one_of(LEAVES, STEP), max_size=3),
        "reward": st.one_of(LEAVES, st.floats(-1, 1)),
        "step_rewards": st.lists(LEAVES, max_size=3),
        "response": LEAVES,
    },
)


@given(ENTRY, st.lists(ENTRY, max_size=2))
def test_whatever_a_record_holds_it_is_read_or_refused(value, nested):
    try:
        record = parse(value | ({"trajectories": nested} if nested else {}), "trajectory")
    except ValueError as error:
        reason = str(error)
    else:
        assert all(abs(way.total) < float("inf") and way.text.strip() for way in record.trajectories)
        return
    assert len(reason) < 120
    assert "\n" not in reason


def test_labels_are_rewards_too():
    """Outcome and process labels, as data of true and false have them."""
    value = {"prompt": "p", "steps": ["a", "b"], "step_rewards": [True, False], "reward": True}
    (way,) = parse(value, "trajectory").trajectories
    assert [step.reward for step in way.steps] == [1.0, 0.0]
    assert way.reward == 1.0


def test_the_same_words_in_other_steps_are_the_same_trajectory():
    ways = [{"steps": ["ab"], "reward": 1}, {"steps": ["a", "b"], "reward": 0}]
    with pytest.raises(ValueError, match="equal trajectories with different rewards"):
        parse({"prompt": "p", "trajectories": ways}, "trajectory")
