"""Value-guided decoders against the tabular oracle: exact roll-outs give exact distributions, samples come close."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.decoding import args, controlled, proxy, transfer_q
from pipeline.decoding.contract import Completion, Prompt, Tools
from pipeline.decoding.guided import Draw, Fork, _divided, guided
from pipeline.decoding.prefixes import Prefixes
from pipeline.decoding.rollouts import mean_by_owner, roll_out
from pipeline.errors import UserError
from tests.decoding.tabular import every_rollout, prompts_of, state_of, tools, values_after
from tests.oracle.cases import small, third_policy
from tests.oracle.mdp import TokenMdp

ALPHA = 0.7


def aligned(mdp: TokenMdp, reward: Tensor) -> Tensor:
    """log π*(z|s) for another reward table, as next-token log-probabilities [X, S, V]."""
    return mdp.conditionals((mdp.ref_logprob + mdp.path_sum(reward) / mdp.beta).log_softmax(-1))


def other_reward(mdp: TokenMdp) -> Tensor:
    """A reward that is negative everywhere and prefers other responses."""
    return -1.0 - mdp.token_reward.flip(-1).abs()


def expected(mdp: TokenMdp, value: Tensor, alpha: float = ALPHA) -> Tensor:
    """log π(z|s) of π ∝ π_ref exp(Q/α), [X, S, V]."""
    return (mdp.ref_logits.log_softmax(-1) + value / alpha).log_softmax(-1)


def agree(mdp: TokenMdp, found: list[Completion], exact: Tensor, tolerance: float = 1e-6) -> int:
    """Every completion (drawn at a temperature that visits all of the tree) carries the exact log-probability of each of its tokens; → how many different ones there are."""
    copies = len(found) // mdp.prompts
    for i, completion in enumerate(found):
        assert completion.failure is None
        assert tuple(completion.token_ids) in mdp.responses
        for at, (token, logprob) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            state = state_of(mdp, completion.token_ids[:at])
            assert abs(logprob - exact[i // copies, state, token]) <= tolerance
    return len({(i // copies, *c.token_ids) for i, c in enumerate(found)})


def guided_tools(mdp: TokenMdp, baseline: Tensor, scorers: dict[str, Tensor], **settings) -> Tools:
    models = {"reference": mdp.ref_logits, "baseline": baseline}
    return tools(mdp, models, scorers, **({"alpha": ALPHA, "per_prompt": 12, "temperature": 3.0} | settings))


def test_direct_transfer_is_the_tilted_reference():
    mdp = small()
    baseline = aligned(mdp, mdp.token_reward)
    found = transfer_q.decode(guided_tools(mdp, baseline, {"scorer": mdp.token_reward}), prompts_of(mdp), every_rollout)
    assert agree(mdp, found, expected(mdp, values_after(mdp, baseline, mdp.token_reward))) > 10


def test_where_the_values_outweigh_what_float32_holds_the_best_candidate_is_taken():
    worth = torch.tensor([[-3.0, 5.0, 4.0], [2.0, 1.0, -9.0]])
    logprobs = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.8, 0.1]]).log()
    assert (logprobs + _divided(worth, 1e-38)).log_softmax(-1).exp().tolist() == [[0, 1, 0], [1, 0, 0]]
    assert torch.equal(_divided(worth, 0.5), worth / 0.5)


def test_controlled_gives_the_references_own_value():
    mdp = small()
    found = controlled.decode(
        guided_tools(mdp, mdp.ref_logits, {"scorer": mdp.token_reward}), prompts_of(mdp), every_rollout
    )
    value = values_after(mdp, mdp.ref_logits.log_softmax(-1), mdp.token_reward)
    assert agree(mdp, found, expected(mdp, value)) > 10


def test_indirect_transfer_gives_the_value_under_the_policy_that_the_wanted_reward_would_have_made():
    """Self-normalised per candidate, with negative rewards: E_{ρ_r}[r] from roll-outs of ρ_BL, to rounding."""
    mdp = small()
    wanted, had = other_reward(mdp), mdp.token_reward
    found = transfer_q.decode(
        guided_tools(mdp, aligned(mdp, had), {"scorer": wanted, "baseline_scorer": had}),
        prompts_of(mdp),
        every_rollout,
    )
    assert agree(mdp, found, expected(mdp, values_after(mdp, aligned(mdp, wanted), wanted)), 1e-9) > 10


def test_direct_and_indirect_are_equal_when_the_rewards_are():
    mdp = small()
    table, baseline = mdp.token_reward, aligned(mdp, mdp.token_reward)
    both = [
        transfer_q.decode(guided_tools(mdp, baseline, scorers, rollouts=3), prompts_of(mdp))
        for scorers in ({"scorer": table}, {"scorer": table, "baseline_scorer": table})
    ]
    assert both[0] == both[1]


def test_args_is_guided_by_the_prefixs_own_reward():
    mdp = small()
    found = args.decode(guided_tools(mdp, mdp.ref_logits, {"scorer": mdp.token_reward}), prompts_of(mdp))
    before = torch.zeros(mdp.prompts, len(mdp.next_state), dtype=torch.float64)  # reward up to the state
    for state in range(len(mdp.next_state)):
        for token, after in enumerate(mdp.next_state[state].tolist()):
            if after >= 0:
                before[:, after] = before[:, state] + mdp.token_reward[:, state, token]
    assert agree(mdp, found, expected(mdp, before[..., None] + mdp.token_reward)) > 10


def test_the_soft_value_gives_the_optimum_and_transfers_value_does_not():
    """With α = β, Q* = r + V* makes the guided distribution π* itself; E_{ρ*}[r] overshoots it."""
    mdp = small()
    optimum = mdp.conditionals(mdp.optimum)
    soft = mdp.token_reward + mdp.after(mdp.soft_values)
    torch.testing.assert_close(expected(mdp, soft, mdp.beta), optimum, rtol=0, atol=1e-12)

    def soft_value(tools: Tools, fork: Fork, prefixes: Prefixes) -> Tensor:
        rows = [(d.prompt.key, state_of(mdp, r)) for d, r in zip(fork.draws, fork.responses, strict=True)]
        return torch.stack([soft[x, state] for x, state in rows]).gather(-1, fork.candidates)

    own = guided_tools(mdp, mdp.ref_logits, {}, alpha=mdp.beta)
    agree(mdp, guided(own, prompts_of(mdp), soft_value, "reference", 1), optimum, 1e-9)
    transferred = expected(mdp, values_after(mdp, optimum, mdp.token_reward), mdp.beta)
    assert (transferred - optimum).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [0.2, 3.0])
def test_completions_are_drawn_from_the_guided_distribution(alpha):
    """4000 draws: each response's frequency within four standard errors of its probability."""
    mdp = small()
    draws = 2000
    value = values_after(mdp, mdp.ref_logits.log_softmax(-1), mdp.token_reward)
    exact = mdp.path_sum(expected(mdp, value, alpha)).exp()

    def known(tools: Tools, fork: Fork, prefixes: Prefixes) -> Tensor:
        rows = [(d.prompt.key, state_of(mdp, r)) for d, r in zip(fork.draws, fork.responses, strict=True)]
        return torch.stack([value[x, state] for x, state in rows]).gather(-1, fork.candidates)

    own = guided_tools(mdp, mdp.ref_logits, {}, alpha=alpha, per_prompt=draws, temperature=1.0)
    found = guided(own, prompts_of(mdp), known, "reference", 1)
    for x in range(mdp.prompts):
        drawn = [mdp.responses.index(tuple(c.token_ids)) for c in found[x * draws : (x + 1) * draws]]
        frequency = torch.tensor(drawn).bincount(minlength=mdp.size).double() / draws
        assert ((frequency - exact[x]).abs() <= 4 * (exact[x] * (1 - exact[x]) / draws).sqrt() + 1e-9).all()


def test_sampled_rollouts_estimate_the_exact_value():
    """800 roll-outs a candidate, all at once: the mean within four standard errors; the indirect estimate comes close."""
    mdp = small()
    baseline = third_policy(mdp)
    own = guided_tools(mdp, baseline, {"scorer": mdp.token_reward}, rollouts=800)
    prompts = prompts_of(mdp)
    fork = Fork([Draw(p, i, 0) for i, p in enumerate(prompts)], [[], []], torch.tensor([[0, 1, 2], [2, 1, 0]]))
    exact = values_after(mdp, baseline, mdp.token_reward)[:, 0].gather(-1, fork.candidates)
    with torch.inference_mode():
        prefixes = Prefixes.of(own.model("baseline"), [p.ids for p in prompts], 0)
        found = transfer_q.value(own, fork, prefixes)
    spread = mdp.path_sum(mdp.token_reward).std() / math.sqrt(800)
    assert (found - exact).abs().max() <= 4 * spread
    assert own.model("baseline").forwards == 1 + 1 + (mdp.horizon - 2)  # prompts, candidates, roll-outs: one batch each


def test_weights_belong_to_one_candidate():
    """Worked: owner 0 has values 1 and 3 with weights 1 : 3, owner 1 only 10, at a weight a million times smaller."""
    values = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)
    weights = torch.tensor([0.0, math.log(3), -14.0], dtype=torch.float64)
    found = mean_by_owner(values, weights, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(found, torch.tensor([2.5, 10.0], dtype=torch.float64))
    huge = mean_by_owner(values, weights * 1e4, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(huge, torch.tensor([3.0, 10.0], dtype=torch.float64))


@pytest.mark.parametrize("method", [controlled.decode, transfer_q.decode, args.decode])
def test_a_completion_does_not_depend_on_its_batch(method):
    mdp = TokenMdp(vocabulary=4, horizon=4, prompts=3, seed=5)
    settings = {"per_prompt": 4, "rollouts": 2, "seed": 3}
    together = method(guided_tools(mdp, third_policy(mdp), {"scorer": mdp.token_reward}, **settings), prompts_of(mdp))
    assert len({len(c.token_ids) for c in together}) > 2, "rows leave the batch on the way"
    apart = method(
        guided_tools(mdp, third_policy(mdp), {"scorer": mdp.token_reward}, batch_size=1, **settings), prompts_of(mdp)
    )
    assert apart == together
    backwards = method(
        guided_tools(mdp, third_policy(mdp), {"scorer": mdp.token_reward}, **settings), prompts_of(mdp)[::-1]
    )
    assert backwards == [c for p in (2, 1, 0) for c in together[4 * p : 4 * p + 4]]


def test_candidates_come_from_the_reference_and_temperature_0_takes_the_best():
    """One candidate is the reference's greedy token, whatever the baseline and the rewards say."""
    mdp = small()
    own = guided_tools(
        mdp, aligned(mdp, mdp.token_reward * 9), {"scorer": mdp.token_reward}, candidates=1, per_prompt=1
    )
    for x, completion in enumerate(transfer_q.decode(own, prompts_of(mdp))):
        for at, token in enumerate(completion.token_ids):
            assert token == int(mdp.ref_logits[x, state_of(mdp, completion.token_ids[:at])].argmax())
    greedy = guided_tools(mdp, mdp.ref_logits, {"scorer": mdp.token_reward}, temperature=0, per_prompt=1)
    exact = expected(mdp, values_after(mdp, mdp.ref_logits.log_softmax(-1), mdp.token_reward))
    for x, completion in enumerate(controlled.decode(greedy, prompts_of(mdp), every_rollout)):
        for at, token in enumerate(completion.token_ids):
            assert token == int(exact[x, state_of(mdp, completion.token_ids[:at])].argmax())


def test_a_row_whose_scorer_fails_says_so_and_the_others_go_on():
    mdp = small()
    broken = mdp.token_reward.clone()
    broken[1, 0, 1] = float("nan")
    own = guided_tools(mdp, mdp.ref_logits, {"scorer": broken}, per_prompt=2)
    whole = guided_tools(mdp, mdp.ref_logits, {"scorer": mdp.token_reward}, per_prompt=2)
    found, expected_ = args.decode(own, prompts_of(mdp)), args.decode(whole, prompts_of(mdp))
    assert found[:2] == expected_[:2]
    assert [c.failure for c in found[2:]] == ["the scorer failed on a candidate for token 1"] * 2


@pytest.mark.parametrize(
    ("settings", "message"), [({"rollouts": 1}, "decoding.rollouts"), ({"rollout_temperature": 0}, "cancel")]
)
def test_indirect_transfer_refuses_a_single_rollout(settings, message):
    mdp = small()
    table = {"scorer": mdp.token_reward, "baseline_scorer": mdp.token_reward}
    with pytest.raises(UserError, match=message):
        transfer_q.decode(guided_tools(mdp, mdp.ref_logits, table, **settings), prompts_of(mdp))


def test_rollouts_keep_to_their_length_and_to_the_minimum():
    mdp = TokenMdp(vocabulary=3, horizon=5, seed=2)
    own = guided_tools(mdp, mdp.ref_logits, {}, rollouts=12, rollout_tokens=2, min_new_tokens=3)
    prompt = Prompt([mdp.vocabulary], 0)
    with torch.inference_mode():
        found = roll_out(
            own, Fork([Draw(prompt, 0, 0)], [[]], torch.tensor([[1, 0]])), Prefixes.of(own.model("baseline"), [[3]], 0)
        )
    assert found.owner.tolist() == [0] * 12 + [1]
    assert found.responses[-1] == [0]
    assert all(len(r) == 3 and r[0] == 1 and 0 not in r for r in found.responses[:12])


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_proxy_adds_the_policys_change_to_the_base(weight):
    mdp = small()
    base, policy = third_policy(mdp), aligned(mdp, mdp.token_reward)
    models = {"base": base, "policy": policy, "reference": mdp.ref_logits}
    found = proxy.decode(tools(mdp, models, weight=weight, per_prompt=12, temperature=3.0), prompts_of(mdp))
    exact = (base + weight * (policy - mdp.ref_logits.log_softmax(-1))).log_softmax(-1)
    assert agree(mdp, found, exact, 1e-12) > 8
    if weight == 1.0:
        same = tools(mdp, models | {"base": mdp.ref_logits}, per_prompt=8)
        agree(mdp, proxy.decode(same, prompts_of(mdp)), policy, 1e-12)
