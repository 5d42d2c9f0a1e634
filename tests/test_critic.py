"""The value network: where its values stand, what moves it, and that it comes back from disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.collate import collate
from pipeline.config import ConfigError
from pipeline.contracts import Row
from pipeline.critic import load_critic, load_trained_critic, merge_critic, save_critic
from pipeline.model import load_policy
from pipeline.scalar_head import ScalarHead

ROWS = [
    Row(0, [5, 6, 7], [[20, 21, 22, 23], [30, 31]], trained=[[True, False, True, True], [True, True]]),
    Row(1, [40], [[41, 42, 43]]),
]
DQO = ("data.kind=trajectory", "objective={name: dqo}")
HEAD = "critic.architecture=head"


def outputs(config, batch):
    """The critic as it starts, and what it is fed."""
    policy = load_policy(config.model, config.model.path, keep_states=config.critic.architecture == "head")
    return load_critic(config, config.model.path), policy(batch)


@pytest.mark.parametrize("settings", [(), (HEAD,)])
def test_values_start_at_zero_and_only_the_critic_moves_them(make_config, settings) -> None:
    config, batch = make_config(*DQO, *settings), collate(ROWS)
    critic, out = outputs(config, batch)
    values = critic(batch, out)
    assert values.shape == batch.response_mask.shape
    assert (values == 0).all()
    with torch.no_grad():
        critic.head.weight.normal_()
        critic.head.bias.fill_(0.7)
    values = critic(batch, out)
    assert (values[batch.response_mask] != 0).all()
    assert (values[~batch.response_mask] == 0).all(), "neither padding nor the environment's tokens have a value"
    values.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.head.parameters())
    assert out.logprobs.requires_grad
    assert out.states is None or not out.states.requires_grad, "a value head's loss does not reach the policy"


def test_values_are_not_rounded_to_bfloat16() -> None:
    """In which 4.0 and 4.03 are neighbours."""
    head = ScalarHead(8).to(torch.bfloat16)
    torch.nn.init.constant_(head.weight, 0.5)
    torch.nn.init.constant_(head.bias, 4.0)
    states = torch.zeros(2, 8, dtype=torch.bfloat16)
    states[1, 0] = 0.015625
    values = head(states)
    assert values.dtype == torch.float32
    assert values[:, 0].tolist() == [4.0, 4.0078125]
    values.sum().backward()
    assert head.weight.grad[0, 0] == 0.015625


@pytest.mark.parametrize("settings", [(), (HEAD,)])
def test_a_value_is_that_of_the_state_before_its_token(make_config, settings) -> None:
    """Another token changes the values of later states, not its own state's; siblings see nothing of it."""
    config = make_config(*DQO, *settings)
    changed = [replace(ROWS[0], response_ids=[[20, 21, 99, 23], [30, 31]]), ROWS[1]]
    critic, _ = outputs(config, collate(ROWS))
    with torch.no_grad():
        critic.head.weight.normal_()
    before, after = (critic(collate(rows), outputs(config, collate(rows))[1]) for rows in (ROWS, changed))
    moved = (before - after).abs() > 1e-6
    assert moved.nonzero().tolist() == [[0, 0, 3]]
    torch.testing.assert_close(before[0, 0, 0], before[0, 1, 0])  # the prompt is one state


@pytest.mark.parametrize("settings", [(), (HEAD,), ("model.lora={r: 4, alpha: 8}",)])
def test_a_trained_critic_comes_back_from_its_folder(make_config, tmp_path: Path, settings) -> None:
    config, batch = make_config(*DQO, *settings), collate(ROWS)
    critic, out = outputs(config, batch)
    with torch.no_grad():
        for p in critic.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    expected = critic(batch, out)
    merge_critic(critic)
    save_critic(critic, tmp_path / "critic")
    torch.testing.assert_close(load_trained_critic(config, tmp_path / "critic")(batch, out), expected)


def test_a_model_without_critic_is_refused_in_one_line(make_config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no critic"):
        load_trained_critic(make_config(*DQO), tmp_path / "critic")
