"""Credit per token: the arithmetic by hand, the actor against the objective itself, and AUROC on planted errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.contracts import PolicyOut, Row
from pipeline.evaluation.credit import ADVANTAGE, REWARD, SURPRISE, VALUE, find_errors, labels, token_values, values_of
from pipeline.objectives.dpo import Dpo
from pipeline.objectives.dqo import Dqo
from tests.batches import make_batch


def test_token_values_of_a_pair() -> None:
    batch = make_batch([[2, 1]])
    out = PolicyOut(torch.full((1, 2, 2), -1.0) * batch.response_mask)
    found = token_values(Dpo(beta=0.5), out, batch)
    assert found.keys() == {REWARD, SURPRISE, "-log π"}, "no critic, no value"
    torch.testing.assert_close(found[SURPRISE], -batch.ref_logprobs)
    torch.testing.assert_close(found[REWARD][0, 0, 0], 0.5 * (-1.0 - batch.ref_logprobs[0, 0, 0]))


def test_advantages_are_those_of_the_loss() -> None:
    """Three tokens, reward 1 at the end, βρ = .1, .2, .3, V = .5, .4, .3, λ = 1: A = R − Σ_later βρ − V."""
    batch = make_batch([[3]])
    rho = torch.tensor([[[0.1, 0.2, 0.3]]])
    batch = replace(batch, token_rewards=torch.tensor([[[0.0, 0.0, 1.0]]]))
    out = PolicyOut(batch.ref_logprobs + rho, values=torch.tensor([[[0.5, 0.4, 0.3]]]))
    found = token_values(Dqo(beta=1.0), out, batch)
    torch.testing.assert_close(found[ADVANTAGE], torch.tensor([[[1 - 0.5 - 0.5, 1 - 0.3 - 0.4, 1 - 0.3]]]))
    torch.testing.assert_close(found[VALUE], out.values)
    mixed = token_values(Dqo(beta=1.0, lam=0.0), out, batch)[ADVANTAGE]  # X = G⁰ = r − βρ + V(next)
    torch.testing.assert_close(mixed, torch.tensor([[[-0.2 + 0.3 - 0.5, 1 - 0.3 - 0.4, 1 - 0.3]]]))
    one_step = token_values(Dqo(beta=1.0, lam=0.0, q_target="value"), out, batch)[ADVANTAGE]
    torch.testing.assert_close(one_step, torch.tensor([[[0.4 - 0.5, 0.3 - 0.4, 1 - 0.3]]]))


def test_a_perfect_score_and_one_that_points_the_wrong_way() -> None:
    errors = [np.array([False, True, False]), np.array([True, False, False])]
    good = find_errors([np.array([0.0, 2.0, 1.0]), np.array([3.0, 0.5, 0.0])], errors)
    assert (good.value, good.top_1, good.errors, good.sound, good.responses) == (1.0, 1.0, 2, 4, 2)
    bad = find_errors([np.array([0.0, -2.0, 1.0]), np.array([-3.0, 0.5, 0.0])], errors)
    assert (bad.value, bad.top_1) == (0.0, 0.0)


def test_responses_are_named_by_what_is_known_of_them() -> None:
    pair = Row(0, [1], [[2], [3]])
    assert labels(pair) == ["chosen", "rejected"]
    assert labels(replace(pair, response_ids=[[1], [2], [3]])) == ["rank 1", "rank 2", "rank 3"]
    assert labels(replace(pair, token_rewards=[[0.5, 0.5], [0.0]])) == ["return 1", "return 0"]
    assert labels(replace(pair, mismatched=True)) == ["response", "response to another prompt"]


def test_the_actor_reads_policy_and_reference(make_config, tiny_model, tmp_path) -> None:
    """Against itself a model's implicit rewards are 0; against another one −log π_ref is the other's, token by token."""
    from tests.conftest import save_tiny_llama

    other = save_tiny_llama(tmp_path / "other", seed=7)
    row = Row(5, [10, 11], [[12, 13, 2], [14, 2]], trained=[[True, True, True], [False, True]])
    config = make_config()
    (own,) = values_of(config, str(tiny_model), str(tiny_model), [row], local=True)
    (found,) = values_of(config, str(tiny_model), str(other), [row], local=True)
    assert own["responses"][0]["values"][REWARD] == pytest.approx([0, 0, 0], abs=1e-5)
    chosen, rejected = found["responses"]
    assert rejected["values"][REWARD][0] is None, "the environment's token has no credit"
    assert len(chosen["tokens"]) == 3
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(other).eval()(torch.tensor([[10, 11, 12, 13, 2]])).logits[0]
    expected = -logits.log_softmax(-1)[[1, 2, 3], [12, 13, 2]]
    assert chosen["values"][SURPRISE] == pytest.approx(expected.tolist(), abs=1e-4)
    rewards = 0.5 * (np.array(chosen["values"][SURPRISE]) - np.array(chosen["values"]["-log π"]))
    assert chosen["values"][REWARD] == pytest.approx(rewards.tolist(), abs=1e-5)
