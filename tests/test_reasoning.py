"""The reasoning benchmark: its task and its data by worked examples, and (a drill) DQO's headline from a shipped checkpoint."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.chain_arithmetic import (
    EOS_ID,
    FACTS,
    MID,
    RESPONSE_TOKENS,
    Teacher,
    answer,
    demonstrations,
    draw_prompts,
    is_correct,
    is_strict,
    misconceptions,
    result,
    sound_lines,
    split_lines,
    tokenizer,
)
from benchmarks.reasoning import runs
from benchmarks.reasoning.__main__ import FULL, best_settings
from benchmarks.reasoning.claims import claims_table, verdict
from benchmarks.reasoning.methods import BLOCKS, merge
from benchmarks.reasoning.records import KIND, Sample, data_sets, pairs, trajectory, write
from benchmarks.reasoning.report import table
from pipeline import data
from pipeline.rows import Rows

CHECKPOINT = Path(__file__).parent / "data" / "chain-arithmetic-mid"
"""A model after supervised training on MID demonstrations of seed 0; written by `benchmarks.reasoning`."""

PROMPT = "7+5*3-4*2+9:"
RIGHT = "7+5=2\n2*3=6\n6-4=2\n2*2=4\n4+9=3\n"
LUCKY = "7+5=2\n2*3=8\n8-4=4\n4*2=4\n4+9=3\n"  # two errors that cancel: 2·3 = 8 and 4·2 = 4
WRONG = "7+5=2\n2*3=6\n6-4=2\n2*2=4\n4+9=4\n"


def sampled(response: str, prompt: str = PROMPT, ended: bool = True) -> Sample:
    """A sample with log-probability −1, −2, … of its tokens."""
    return Sample(prompt, response, [-float(i) for i in range(1, len(response) + 1 + ended)], ended)


# ---------------------------------------------------------------------------------------------------- task


def test_a_chain_is_computed_from_left_to_right_modulo_10() -> None:
    assert answer(PROMPT) == 3
    assert answer("0-1*9-9*7+8:") == 2  # 0−1 = 9, 9·9 = 1, 1−9 = 2, 2·7 = 4, 4+8 = 2


def test_judgement_of_right_lucky_and_wrong_responses() -> None:
    assert (is_correct(PROMPT, RIGHT), is_strict(PROMPT, RIGHT)) == (True, True)
    assert (is_correct(PROMPT, LUCKY), is_strict(PROMPT, LUCKY)) == (True, False)
    assert (is_correct(PROMPT, WRONG), is_strict(PROMPT, WRONG)) == (False, False)
    assert sound_lines(PROMPT, LUCKY) == [True, False, True, False, True]  # a line that goes on from an error is sound
    assert sound_lines(PROMPT, "7+5=2\n3*3=9\n9-4=5\n5+2=7\n") == [True, False, True, False, False]
    assert not is_strict(PROMPT, RIGHT + "4+9=3\n"), "a sixth line is too much"
    assert not is_correct(PROMPT, RIGHT[:-1]), "the last line has to be complete"


def test_demonstrations_follow_the_teachers_beliefs() -> None:
    beliefs = misconceptions(MID, seed=5)
    assert len(beliefs) == round(0.14 * len(FACTS))
    assert all(result(*fact) != wrong for fact, wrong in beliefs.items())
    prompts = draw_prompts(300, "test")
    stubborn = demonstrations(Teacher(wrong=1.0, slip=0.0), prompts, seed=5)
    facts = [((int(line[0]), line[1], int(line[2])), int(line[4])) for text in stubborn for line in split_lines(text)]
    assert all(written == beliefs.get(fact, result(*fact)) for fact, written in facts)
    assert {fact for fact, _ in facts} & beliefs.keys()
    chains = [split_lines(text) for text in stubborn]
    assert all(after[0] == before[4] for chain in chains for before, after in pairwise(chain))
    assert all(map(is_strict, prompts, demonstrations(Teacher(wrong=0.0, slip=0.0), prompts, seed=5)))


def test_training_validation_and_test_prompts_are_disjoint() -> None:
    train, validation, test = runs.training_prompts(2000, "any"), runs.validation_prompts(), runs.test_prompts()
    assert len({*train, *validation, *test}) == len(train) + len(validation) + len(test) == 3400
    first = draw_prompts(5, "stream")
    assert draw_prompts(5, "stream") == first and not set(draw_prompts(5, "stream", besides=first)) & set(first)


def test_a_token_is_a_character_and_no_character_is_unknown_in_silence() -> None:
    own = tokenizer()
    ids = own(RIGHT)["input_ids"]
    assert own.decode(ids) == RIGHT and len(ids) == len(RIGHT) == RESPONSE_TOKENS - 1
    assert own("7x")["input_ids"] == [7, own.eos_token_id], "renderers refuse a text with EOS inside"


# ---------------------------------------------------------------------------------------------------- data


def test_trajectories_carry_rewards_and_log_probabilities_line_by_line() -> None:
    outcome, process = trajectory(sampled(LUCKY), process=False), trajectory(sampled(LUCKY), process=True)
    assert [step["text"] for step in outcome["steps"]] == split_lines(LUCKY)
    assert [step["logprob"] for step in outcome["steps"]] == [-21, -57, -93, -129, -165 - 31]  # the last one with EOS
    assert outcome["reward"] == 1.0 and not any("reward" in step for step in outcome["steps"])
    assert process["reward"] == 0.0
    assert [step.get("reward", 0.0) for step in process["steps"]] == [0.2, 0.0, 0.2, 0.0, 0.2]


def test_pairs_use_every_sample_and_repeat_the_rarer_kind() -> None:
    other = "1+1+1+1+1+1:"
    samples = [sampled(RIGHT), sampled(WRONG), sampled(LUCKY), sampled("1+1=2\n", other), sampled("1+1=3\n", other)]
    found = list(pairs(samples, seed=0))
    assert {(p["prompt"], p["rejected"]) for p in found} == {(PROMPT, WRONG)}, (
        "a prompt without a right response is out"
    )
    assert sorted(p["chosen"] for p in found) == sorted([RIGHT, LUCKY])


def test_data_sets_leave_out_what_did_not_end() -> None:
    sets = data_sets([sampled(RIGHT), sampled(WRONG), sampled(RIGHT, ended=False), sampled("")], seed=0)
    assert {name: len(records) for name, records in sets.items()} == {
        "outcome": 2,
        "process": 2,
        "correct": 1,
        "pairs": 1,
        "unpaired": 2,
    }
    assert [record["label"] for record in sets["unpaired"]] == [True, False]


@pytest.mark.parametrize(("name", "expected"), [("process", {5: 0.2, 17: 0.2, 29: 0.2}), ("outcome", {30: 1.0})])
def test_rewards_land_on_the_last_token_of_their_line(name: str, expected: dict[int, float], tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", data_sets([sampled(LUCKY)], seed=0)[name])
    place, method = runs.Place(str(tmp_path), local=True), BLOCKS["hard"].methods["dqo_process"]
    config = runs.configure(place, "x", CHECKPOINT, "trajectory", tmp_path / "data.jsonl", method.config, seed=0)
    row = Rows(data.prepare(config, str(CHECKPOINT), local=True))[0]
    assert row.response_ids == [[*tokenizer()(LUCKY)["input_ids"], EOS_ID]]
    assert row.token_rewards is not None
    assert {i: round(reward, 6) for i, reward in enumerate(row.token_rewards[0]) if reward} == expected
    assert row.behaviour_logprobs == [-496.0]  # −1 −2 … −31


def test_every_setting_is_a_valid_configuration() -> None:
    place = runs.Place("unused", local=True)
    for name, block in BLOCKS.items():
        tried = [*block.methods.items(), *((m, s) for m, settings in block.tuned.items() for s in settings)]
        for label, method in tried:
            config = runs.configure(place, f"{name}-{label}", "m", KIND[method.data], Path("d"), method.config, seed=1)
            assert config.optimizer.schedule == config.critic.optimizer.schedule == "hold_decay"
            assert config.optimizer.warmup_steps == 20 and config.seed == 1
        assert all(len(settings) == 4 for settings in block.tuned.values())


def test_the_best_setting_on_validation_goes_on_and_every_run_is_counted() -> None:
    validation = {("kto", 0): 0.7, ("kto", 1): 0.9, ("kto", 2): 0.9, ("oreo", 0): 0.8, ("oreo", 1): 0.6}
    assert best_settings(validation) == {"kto": 1, "oreo": 0}
    # MID: 4 worlds, 6 methods × 3 seeds, 2 × 4 settings, 2 tuned methods × 3 seeds; HARD: 10 methods.
    assert [FULL.runs_in(block) for block in BLOCKS.values()] == [4 + 18 + 8 + 6, 4 + 30 + 8 + 6]


# ------------------------------------------------------------------------------------------------- verdicts


def scores(*greedy: float) -> list[dict[str, float]]:
    return [{"greedy": value} for value in greedy]


def test_a_claim_counts_only_when_every_seed_agrees_beyond_noise() -> None:
    low, high = scores(0.8, 0.7, 0.75), scores(0.84, 0.74, 0.79)
    assert (verdict(high, low), verdict(low, high)) == ("seen", "contradicted")
    assert verdict(scores(0.99, 0.69, 0.79), low) == "not separable", "one seed says the opposite"
    # Each variance is about 0.75 · 0.25 / 1000, so two standard errors of the sum of three gaps are 0.067.
    assert verdict(scores(0.82, 0.72, 0.77), low) == "not separable", "0.06 in sum"
    assert verdict(high[:2], low[:2]) == "not separable", "two seeds are too few"
    lines = claims_table({"mid": {"sft": scores(0.5, 0.5, 0.5), "dqo": scores(0.9, 0.8, 1.0)}}).splitlines()
    assert len(lines) == 3 and "`dqo` 0.900, `sft` 0.500 | **seen** |" in lines[2]


def test_the_table_shows_every_seed_and_the_means() -> None:
    runs_of = [
        {"greedy": g, "strict": g - 0.1, "sampled": 0.5, "steps": n, "train_seconds": 10, "total_seconds": 31.0}
        for g, n in ((0.9, 72), (0.8, 74))
    ]
    last = table({"dpo": runs_of}, {"dpo": "DPO"}, (0, 1)).splitlines()[-1]
    assert last == "| DPO (`dpo`) | 0.900 | 0.800 | **0.850** | 0.750 | 0.500 | 72–74 | 10 | 31 |"


# ------------------------------------------------------------------------------------------------ headline


@pytest.mark.slow
def test_dqo_lifts_the_shipped_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples, labels and 128 steps of DQO: at least 20 points more, at least 85 % of 1000 prompts."""
    monkeypatch.setattr(
        "os.cpu_count", lambda: 1
    )  # so small a model is fastest on one thread, fourfold on a busy machine
    place, block = runs.Place(str(tmp_path), local=True), BLOCKS["mid"]
    fixed = block.methods["dqo"]
    method = replace(fixed, config=merge(fixed.config, {"tracking": {"enabled": False}}))
    config = runs.configure(place, "sft", CHECKPOINT, "trajectory", tmp_path / "none", method.config, seed=0)
    before = runs.sample(config, str(CHECKPOINT), runs.test_prompts(), temperature=0.0)
    start = sum(sample.correct for sample in before) / len(before)
    counts = runs.sample_data(config, str(CHECKPOINT), place.world("mid", 0), block, seed=0)
    assert counts["outcome"] >= 4090
    after = runs.run_method(place, "mid", method, str(CHECKPOINT), seed=0, label="dqo")
    assert after["steps"] == 128
    assert after["greedy"] >= 0.85
    assert after["greedy"] - start >= 0.20
