"""The oracle agrees with itself: recursion against enumeration, closed forms against what they maximise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.oracle.cases import larger, small
from tests.oracle.mdp import TokenMdp, f_divergence, f_optimum


@pytest.mark.parametrize("mdp", [small, larger])
def test_soft_bellman_recursion_equals_enumeration(mdp: Callable[[], TokenMdp]):
    mdp = mdp()
    torch.testing.assert_close(mdp.soft_values, mdp.values_by_enumeration(), rtol=0, atol=1e-12)
    torch.testing.assert_close(mdp.ref_logprob.logsumexp(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mdp", [small, larger])
def test_log_ratio_of_the_optimum_is_the_advantage(mdp: Callable[[], TokenMdp]):
    """β log π*(a|s)/π_ref(a|s) = r + V*(s') − V*(s) at every state and token (arXiv 2404.12358, Eq. 10)."""
    mdp = mdp()
    ratio = mdp.conditionals(mdp.optimum) - mdp.ref_logits.log_softmax(-1)
    advantage = mdp.token_reward + mdp.after(mdp.soft_values) - mdp.soft_values[..., None]
    torch.testing.assert_close(mdp.beta * ratio, advantage, rtol=0, atol=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jensen_shannon", "alpha"])
def test_f_optimum_maximises_reward_less_divergence(divergence):
    """Normalised, and better than any mixture with another policy, by a step that a slope would show in."""
    mdp, alpha = small(), 0.3
    best = f_optimum(mdp, divergence, alpha)
    torch.testing.assert_close(best.logsumexp(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)

    def value(logp: Tensor) -> Tensor:
        gain = (logp.exp() * mdp.reward).sum(-1)
        return gain - mdp.beta * f_divergence(logp, mdp.ref_logprob, divergence, alpha)

    for n in range(mdp.size):
        corner = torch.zeros_like(best)
        corner[:, n] = 1.0
        for step in (1e-4, -1e-5):
            moved = (1 - step) * best.exp() + step * corner
            if (moved > 0).all():
                assert (value(moved.log()) < value(best)).all()
    if divergence == "reverse_kl":
        torch.testing.assert_close(best, mdp.optimum, rtol=0, atol=1e-11)
