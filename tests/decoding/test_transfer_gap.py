"""The study of decoders at equal KL: its KLs are equal, nothing is beyond the frontier, and its Qs are the decoders' own."""

from __future__ import annotations

import torch

from benchmarks.transfer_gap import at_kl, decoders, divergence, frontier, gaps, mean_reward, values
from tests.decoding.tabular import values_after
from tests.oracle.mdp import TokenMdp

MDPS = TokenMdp(vocabulary=3, horizon=3, beta=0.5, prompts=20, seed=11)


def test_values_differ_from_enumeration_by_what_was_earned_before():
    mdp = TokenMdp(vocabulary=3, horizon=3, seed=1)
    policy = mdp.conditionals(mdp.optimum)
    difference = values_after(mdp, policy, mdp.token_reward) - values(mdp, policy)
    torch.testing.assert_close(difference, difference[..., :1].expand_as(difference), rtol=0, atol=1e-12)
    torch.testing.assert_close(difference[:, 0], torch.zeros_like(difference[:, 0]), rtol=0, atol=1e-12)


def test_kl_is_what_was_asked_for_and_no_decoder_passes_the_frontier():
    wanted = torch.full((20,), 0.5, dtype=torch.float64)
    for policy in decoders(MDPS).values():
        alpha, reachable = at_kl(MDPS, policy, wanted)
        assert reachable.sum() >= 18
        torch.testing.assert_close(divergence(MDPS, policy(alpha))[reachable], wanted[reachable], rtol=0, atol=1e-9)
    to_frontier, to_best, _, ok = gaps(MDPS, wanted)
    for name, gap in to_frontier.items():
        assert (gap[ok] >= -1e-9).all()
        assert (to_best[name] >= gap - 1e-9)[ok].all()
        assert gap[ok].mean() > 1e-3, "a token-wise tilt by a value that is not the soft one loses something"


def test_the_baseline_lies_on_the_frontier():
    own = divergence(MDPS, MDPS.optimum)
    b, _ = at_kl(MDPS, frontier(MDPS), own)
    torch.testing.assert_close(b, torch.full_like(b, MDPS.beta), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean_reward(MDPS, frontier(MDPS)(b)), mean_reward(MDPS, MDPS.optimum), rtol=0, atol=1e-6)
