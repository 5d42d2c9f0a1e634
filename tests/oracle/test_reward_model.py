"""A table of scores instead of a scorer: with soft labels a reward model finds the reward, up to a constant per prompt."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from pipeline.contracts import Batch, PolicyOut
from pipeline.objectives.plackett_luce import plackett_luce_loss
from pipeline.objectives.reward_model import RewardModel
from tests.oracle.cases import rankings, small, soft_pairs, tiny
from tests.oracle.mdp import TokenMdp
from tests.oracle.policy import loss_of, minimise, rows


def responses_of(mdp: TokenMdp, batch: Batch) -> Tensor:
    """Which of the N responses each one is, [B, K]; 0 at padding."""
    number = {response: n for n, response in enumerate(mdp.responses)}
    index = torch.zeros(batch.valid.shape, dtype=torch.long)
    for b, k in batch.valid.nonzero().tolist():
        index[b, k] = number[tuple(batch.response_ids[b, k][batch.response_mask[b, k]].tolist())]
    return index


def trained(mdp: TokenMdp, batch: Batch, objective: RewardModel) -> Tensor:
    """The scores s(x, y) that training ends with, from 0. [X, N]"""
    table = torch.zeros_like(mdp.reward).requires_grad_()
    prompt, index = batch.input_ids[:, :1], responses_of(mdp, batch)

    def loss() -> Tensor:
        scores = table[prompt, index]
        return loss_of(objective, PolicyOut(torch.zeros(()), scores=scores), batch)

    minimise(table, loss)
    return table.detach()


@pytest.mark.parametrize("case", ["pairs", "rankings"])
def test_scores_are_the_reward_up_to_the_prompt(case):
    mdp = small() if case == "pairs" else tiny()
    scores = trained(mdp, soft_pairs(mdp) if case == "pairs" else rankings(mdp)[0], RewardModel())
    constant = scores - mdp.reward
    torch.testing.assert_close(constant, constant.mean(-1, keepdim=True).expand_as(constant), rtol=0, atol=1e-6)
    assert mdp.reward.std(-1).min() > 0.5


@pytest.mark.parametrize("weight", [0.01, 10.0])
@pytest.mark.parametrize("case", ["a pair each", "rankings of all responses"])
def test_centring_moves_each_prompts_scores_to_sum_zero_and_leaves_their_differences(case, weight):
    """Whatever its weight, the loss is then lowest at the reward itself, less its mean: label probabilities are exact."""
    if case == "a pair each":  # labels of .90 and .70
        mdp = TokenMdp(vocabulary=2, horizon=1, prompts=2)
        mdp.token_reward[:, 0] = torch.logit(torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)) / 2
        batch = soft_pairs.__wrapped__(mdp)
    else:
        mdp = TokenMdp(vocabulary=4, horizon=1)
        orders = [(x, order) for x in range(mdp.prompts) for order in permutations(range(mdp.size))]
        ranked = torch.stack([mdp.reward[x, list(order)] for x, order in orders])
        batch = rows(mdp, orders, (-plackett_luce_loss(ranked, torch.ones_like(ranked, dtype=torch.bool))).exp())
    scores = trained(mdp, batch, RewardModel(center_weight=weight))
    torch.testing.assert_close(scores, mdp.reward - mdp.reward.mean(-1, keepdim=True), rtol=0, atol=1e-6)
    labels = torch.sigmoid(scores[:, :, None] - scores[:, None, :])
    torch.testing.assert_close(labels, mdp.preference, rtol=0, atol=1e-6)


def test_centring_over_rows_that_share_responses_is_balanced_and_shrinks_little():
    """A common shift of a prompt's scores changes the sums alone: its slope, their mean over the data, has to vanish."""
    mdp = small()
    centred = trained(mdp, soft_pairs(mdp), RewardModel(center_weight=0.01))
    seen = mdp.preference.sum(-1) + mdp.preference.sum(-2)  # how often a response is in a pair, on either side
    assert (seen * centred).sum(-1).abs().max() < 1e-6
    free = mdp.reward - mdp.reward.mean(-1, keepdim=True)
    assert torch.corrcoef(torch.stack([centred.flatten(), free.flatten()]))[0, 1] > 0.99
    shrunk = centred.std(-1) / free.std(-1)
    assert (shrunk > 0.7).all() and (shrunk < 0.999).all()
