"""Policy and critic side by side: two optimizers, two schedules, one forward; what a step hands to the next."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import checkpoint, learner, loop
from pipeline.config import ConfigError, ModelConfig
from pipeline.contracts import Alarm, Needs
from pipeline.critic import Critic
from pipeline.driver import fit
from pipeline.loop import Watch
from pipeline.model import Policy
from pipeline.objectives.kto import Kto
from pipeline.progress import METRICS_FILE, read_metrics
from pipeline.reward import load_reward_network
from pipeline.zero import unshared

EXAMPLES = Path(__file__).parents[1] / "jobs" / "examples"
DQO = (
    "data.kind=trajectory",
    f"data.sources.0.path={EXAMPLES / 'trajectories.jsonl'}",
    "data.max_length=512",
    "objective={name: dqo, beta: 0.5}",
    "train.max_steps=4",
    "train.rows_per_step=4",
    "checkpoint.every=1",
    "checkpoint.keep=9",
)


def weights(run: Path, step: int, prefix: str = "") -> dict[str, torch.Tensor]:
    return dict(checkpoint.read_weights(checkpoint.path_of(run, step), prefix))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_the_critic_trains_alone_first_and_on_its_own_schedule(make_config) -> None:
    config = make_config(
        *DQO,
        "critic.steps_alone=2",
        "critic.optimizer={lr: 0.01, schedule: hold_decay, decay_fraction: 0.5, warmup_steps: 1}",
    )
    run = fit(config, local=True).run
    lines = read_metrics(run / METRICS_FILE)
    assert ["grad_norm" in line for line in lines] == [False, False, True, True]
    assert ["lr" in line for line in lines] == [False, False, True, True]
    assert [line["critic/lr"] for line in lines] == pytest.approx([0.005, 0.01, 0.01, 0.005])
    assert all(line["critic/grad_norm"] > 0 for line in lines)
    assert same(weights(run, 1), weights(run, 2))
    assert not same(weights(run, 2), weights(run, 3))
    for step in (1, 2, 3):
        assert not same(weights(run, step, "critic-"), weights(run, step + 1, "critic-"))
    assert lines[0]["sequence_log_ratio"] == pytest.approx(0, abs=1e-4)
    assert lines[0]["value"] == 0
    state = checkpoint.read_state(checkpoint.path_of(run, 4))
    assert state["updates"] == {"policy": 2, "critic": 4}


def test_a_critic_that_leaves_no_step_for_the_policy_is_refused(make_config) -> None:
    with pytest.raises(ConfigError, match=r"^critic\.steps_alone: 4 of 4 steps would leave none for the policy"):
        fit(make_config(*DQO, "critic.steps_alone=4"), local=True)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("scaling.zero_stage=3",), ("critic.architecture=head",)])
def test_other_stages_and_a_value_head_train_the_same_policy_at_first(
    make_config, tmp_path: Path, settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the critic has learned something (V = 0 at step 1), the first update does not depend on what it is."""
    monkeypatch.setattr(loop, "unshared", lambda config, workers: config)  # one worker's stage 3, too
    runs = [
        fit(make_config(*DQO, f"storage={tmp_path / name}", *more), local=True).run
        for name, more in (("plain", ()), ("other", settings))
    ]
    first, second = (read_metrics(run / METRICS_FILE) for run in runs)
    for metric in ("loss", "loss/q", "loss/value", "grad_norm"):
        assert second[0][metric] == pytest.approx(first[0][metric], rel=1e-4)
    for name, tensor in weights(runs[0], 1).items():
        torch.testing.assert_close(weights(runs[1], 1)[name], tensor, atol=2e-5, rtol=1e-4)
    critics = [weights(run, 4, "critic-") for run in runs]
    assert (set(critics[1]) == {"head.weight", "head.bias"}) == ("head" in settings[0])
    if "zero_stage" in settings[0]:
        assert second[-1]["loss"] == pytest.approx(first[-1]["loss"], rel=1e-3)


def test_new_adapters_follow_from_the_seed(make_config) -> None:
    def adapter(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # whatever was drawn before
        config = make_config("model.lora={r: 2}", f"seed={seed}")
        weights = dict(learner.load_networks(config, config.model.path, None)[0].named_parameters())
        return next(tensor for name, tensor in weights.items() if "lora_A" in name).detach()

    assert torch.equal(adapter(1), adapter(1))
    assert not torch.equal(adapter(1), adapter(2))


def test_one_worker_shares_nothing(make_config) -> None:
    def stage(workers: int, *overrides: str) -> int:
        return unshared(make_config("scaling.zero_stage=2", *overrides), workers).scaling.zero_stage

    bf16 = "model.dtype=bfloat16"
    assert [stage(1), stage(2), stage(1, bf16), stage(2, bf16)] == [0, 2, 1, 2]
    assert [stage(1, "scaling.offload_optimizer=true"), stage(1, bf16, "scaling.zero_stage=0")] == [2, 0]


def test_a_step_hands_its_baseline_to_the_next_one() -> None:
    watch = Watch(Kto(), {"mismatched_log_ratio": 0.25, "loss": 1.0})
    assert watch.carried == {"mismatched_log_ratio": 0.25}, "as the checkpoint remembers it"
    watch.note({"mismatched_log_ratio": -0.5, "loss": 2.0})
    assert watch.carried == {"mismatched_log_ratio": -0.5}
    watch.note({"loss": 2.0})
    assert watch.carried == {"mismatched_log_ratio": -0.5}, "a step without mismatched responses changes nothing"


class Alarmed(Kto):
    needs: ClassVar[Needs] = Needs(records=frozenset({"unpaired"}))
    alarms: ClassVar[tuple[Alarm, ...]] = (Alarm("weight", "lower the rate", low=0.05), Alarm("x", "never", high=9.0))


def test_an_alarm_is_raised_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    watch = Watch(Alarmed(), {})
    with caplog.at_level(logging.WARNING):
        for value in (1.0, 0.05, 0.04, 0.01):
            watch.note({"weight": value, "x": 1.0})
    assert [record.getMessage() for record in caplog.records] == ["weight is 0.04: lower the rate"]


def test_data_without_behaviour_logprobs_are_refused_before_training(make_config, tmp_path: Path) -> None:
    lines = (EXAMPLES / "trajectories.jsonl").read_text().splitlines()
    bare = tmp_path / "bare.jsonl"
    bare.write_text("\n".join(line.replace('"logprob"', '"timestamp"') for line in lines[:12]))
    behaviour = ("objective.importance=behaviour", "train.max_steps=1")
    assert "importance_weight" in fit(make_config(*DQO, *behaviour), local=True).metrics
    with pytest.raises(ConfigError, match=r"^objective\.importance: 12 of 12 rows have no log-probs of the policy"):
        fit(make_config(*DQO, *behaviour, f"data.sources.0.path={bare}"), local=True)


def test_a_reference_with_other_tokens_is_refused_before_anything_is_scored(make_config, tmp_path: Path) -> None:
    from tests.conftest import save_tiny_llama

    other = save_tiny_llama(tmp_path / "other", vocab_size=300)
    config = make_config("objective={name: tdpo}", f"model.reference={other}")
    with pytest.raises(
        ConfigError, match=r"^model\.reference: its tokenizer differs .* of 300 and 259\); name a reference"
    ):
        fit(config, local=True)
    assert not list((Path(config.storage) / "cache").glob("re*"))


def test_labels_that_are_all_the_same_and_lonely_prompts_are_warned_of(make_config, tmp_path: Path, caplog) -> None:
    data = tmp_path / "good.jsonl"
    data.write_text(
        '{"prompt": "p", "response": "a", "label": true}\n{"prompt": "p", "response": "b", "label": true}\n'
    )
    fit(make_config("data.kind=unpaired", f"data.sources.0.path={data}", "objective={name: kto}"), local=True)
    assert "all labels are the same" in caplog.text
    assert "2 rows have no response to another prompt" in caplog.text


def test_a_bound_that_no_response_reaches_is_warned_of(make_config, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(*DQO, "objective={name: rejection_sft, min_reward: 99}", "train.max_steps=1")
    fit(config, local=True)
    assert "no response of this step reaches objective.min_reward" in caplog.text


@pytest.mark.parametrize("tied", [False, True])
def test_the_heads_share_is_that_of_the_weights_that_a_token_is_multiplied_with(tied: bool) -> None:
    def policy() -> Policy:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return Policy(LlamaForCausalLM(LlamaConfig(vocab_size=97, tie_word_embeddings=tied, **shape)))

    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    below = 2 * layer + 16
    assert learner.head_share([policy()]) == pytest.approx(97 * 16 / below)
    critic = Critic(16, policy().lm.base_model)
    assert learner.head_share([policy(), critic]) == pytest.approx(97 * 16 / (2 * below + 17))


def test_a_reward_model_has_no_head_over_the_vocabulary(tiny_model: Path) -> None:
    network = load_reward_network(ModelConfig(path=str(tiny_model)), str(tiny_model))
    assert learner.head_share([network]) == 0
