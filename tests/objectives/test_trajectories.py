"""DQO, OREO and DRO: soft Bellman residuals by worked numbers, by each other, and by their written-out sums."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.contracts import Batch, PolicyOut
from pipeline.objectives.bellman import bellman_residuals
from pipeline.objectives.dqo import Dqo
from pipeline.objectives.dro import Dro, dro_residual
from pipeline.objectives.oreo import Oreo
from tests.batches import LOGPROB, VALUE, as_out, assert_same_update, batch_of, loss_of, make_raw

BETA = 0.1


def worked() -> tuple[Batch, PolicyOut]:
    """One trajectory: policy, environment, policy; rewards 0, ½, 1; βρ = 0.2 and −0.3; V = 0.4 and 0.6; KL = 1 and 3."""
    batch = batch_of("trajectory")
    row = replace(batch, **{name: getattr(batch, name)[:1, :1, :3] for name in ("response_mask", "ref_logprobs")})
    row = replace(
        row,
        valid=batch.valid[:1, :1],
        weight=torch.ones(1),
        token_rewards=torch.tensor([[[0.0, 0.5, 1.0]]]),
        behaviour_logprobs=row.ref_logprobs.sum(-1) + 0.5,
    )
    assert row.response_mask.tolist() == [[[True, False, True]]]
    logprobs = (row.ref_logprobs + torch.tensor([2.0, 0.0, -3.0])).requires_grad_()
    values = torch.tensor([[[0.4, 0.0, 0.6]]], requires_grad=True)
    return row, PolicyOut(logprobs, kl=torch.tensor([[[1.0, 0.0, 3.0]]], requires_grad=True), values=values)


def plain(objective, terms: str = "q value") -> dict[str, float]:
    """Each term's mean before its coefficient."""
    batch, out = worked()
    return {name: objective(out, batch).terms[name].total.item() for name in terms.split()}


@pytest.mark.parametrize("objective", [Dqo(beta=BETA), Oreo(beta=BETA), Dro(beta=BETA)])
def test_implied_rewards_worked(objective):
    """β times the log-ratios 2 and −3."""
    batch, out = worked()
    torch.testing.assert_close(objective.token_reward(out, batch), torch.tensor([[[0.2, 0.0, -0.3]]]))
    torch.testing.assert_close(objective.implied_reward(out, batch), torch.tensor([[-0.1]]))


# --------------------------------------------------------------------------------------------------- DQO


def test_dqo_worked_at_lambda_half():
    """G₃ = 1 + 0.3 = 1.3, G₁ = −0.2 + ½ + ½·0.6 + ½·1.3 = 1.25. βρ − A: 0.2 − (½ + 1.3 − 0.4) = −1.2 and
    −0.3 − (1 − 0.6) = −0.7; V − G: −0.85 and −0.7."""
    terms = plain(Dqo(beta=BETA, lam=0.5))
    assert terms == pytest.approx({"q": (1.44 + 0.49) / 2, "value": (0.7225 + 0.49) / 2})


def test_dqo_worked_with_the_value_as_target():
    """X = V: the first token's advantage is ½ + 0.6 − 0.4 = 0.7, so its residual is −½."""
    terms = plain(Dqo(beta=BETA, lam=0.5, q_target="value"))
    assert terms == pytest.approx({"q": (0.25 + 0.49) / 2, "value": (0.7225 + 0.49) / 2})


def test_dqo_loss_divides_the_policy_term_by_beta():
    batch, out = worked()
    loss = loss_of(Dqo(beta=BETA, lam=0.5), out, batch)
    assert loss.item() == pytest.approx((1.44 + 0.49) / 2 / BETA + (0.7225 + 0.49) / 2)
    ratio, value = torch.autograd.grad(loss, [out.logprobs, out.values])
    torch.testing.assert_close(ratio, torch.tensor([[[-1.2, 0.0, -0.7]]]))  # 2 · residual / 2 tokens
    torch.testing.assert_close(value, torch.tensor([[[-0.85, 0.0, -0.7]]]))


def test_dqo_metrics_worked():
    """Advantages 1.4 and 0.4, |V − G| 0.85 and 0.7, ℓ = −1."""
    batch, out = worked()
    metrics = Dqo(beta=BETA, lam=0.5)(out, batch).metrics
    means = {name: (mean.total / mean.weight).item() for name, mean in metrics.items()}
    assert means == pytest.approx(
        {"value": 0.5, "advantage": 0.9, "value_error": 0.775, "sequence_log_ratio": -1.0, "importance_weight": 1.0}
    )
    assert (metrics["value"].weight.item(), metrics["sequence_log_ratio"].weight.item()) == (2, 1)


@pytest.mark.parametrize(("importance", "log_ratio"), [("none", 0.0), ("reference", -1.0), ("behaviour", -1.5)])
def test_importance_multiplies_both_terms_and_passes_no_gradient(importance, log_ratio):
    """ℓ = −1; the behaviour policy gave the trajectory e^½ times the reference's probability."""
    batch, out = worked()
    once, weighed = Dqo(beta=BETA), Dqo(beta=BETA, importance=importance)
    weight = math.exp(log_ratio)
    leaves = [out.logprobs, out.values]
    want = torch.autograd.grad(loss_of(once, out, batch), leaves)
    got = torch.autograd.grad(loss_of(weighed, out, batch), leaves)
    for term in ("q", "value"):
        assert plain(weighed)[term] == pytest.approx(weight * plain(once)[term])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, weight * b)
    assert weighed.weight(batch) == once.weight(batch), "not divided by the sum of weights"
    assert weighed(out, batch).metrics["importance_weight"].total.item() == pytest.approx(weight)


def test_importance_is_capped():
    batch, out = worked()
    surprising = replace(batch, behaviour_logprobs=batch.behaviour_logprobs - 100.0)
    weight = Dqo(importance="behaviour")(out, surprising).metrics["importance_weight"]
    assert weight.total.item() == pytest.approx(math.e)
    weight = Dqo(importance="behaviour", importance_cap=3.5)(out, surprising).metrics["importance_weight"]
    assert weight.total.item() == pytest.approx(3.5)


def test_missing_behaviour_log_probs_are_no_ones():
    """The pipeline refuses such data; were it to fail, the loss would not quietly be another one."""
    batch, out = worked()
    unlogged = replace(batch, behaviour_logprobs=torch.full((1, 1), torch.nan))
    assert loss_of(Dqo(importance="behaviour"), out, unlogged).isnan()


def test_behaviour_log_probs_are_asked_for_where_they_are_used():
    assert Dqo(importance="behaviour").needed().behaviour
    assert not Dqo(importance="reference").needed().behaviour
    assert not Dqo().needed().behaviour


def test_alarms_watch_metrics_that_exist():
    batch, out = worked()
    assert {alarm.metric for alarm in Dqo.alarms} <= Dqo()(out, batch).metrics.keys()
    bounds = {alarm.metric: alarm.low for alarm in Dqo.alarms}
    assert bounds == {"importance_weight": 0.05, "sequence_log_ratio": -8.0}


def test_one_step_form():
    """λ = 0 and X = V: βρ − (r + V′ − V) and V − (r − βρ + V′), V′ the next policy token's or 0."""
    beta_rho, values, reward = torch.randn(3, 1, 1, 5, dtype=torch.float64)
    left = bellman_residuals(beta_rho, reward, values, torch.ones(1, 1, 5, dtype=torch.bool), 0.0, "value")
    following = torch.cat([values[..., 1:], torch.zeros(1, 1, 1)], -1)
    torch.testing.assert_close(left.q, beta_rho + values - reward - following)
    torch.testing.assert_close(left.value, beta_rho + values - reward - following)


# --------------------------------------------------------------------------------------------------- OREO


def _by_hand(beta_rho: list[float], reward: list[float], values: list[float], mask: list[bool]) -> list[float]:
    """V_t − R_t + βρ_t + β Σ_later ρ, summed as OREO's Eq. 9 is written."""
    return [
        values[t]
        - sum(reward[t:])
        + beta_rho[t]
        + sum(r for r, m in zip(beta_rho[t + 1 :], mask[t + 1 :], strict=True) if m)
        for t in range(len(mask))
        if mask[t]
    ]


def test_oreo_residual_is_equation_9():
    batch = batch_of("trajectory")
    raw = make_raw(batch).detach().double()
    out = as_out(raw, batch, Oreo.needs)
    beta_rho = BETA * (out.logprobs - batch.ref_logprobs)
    rewards = batch.token_rewards.double()
    left = bellman_residuals(beta_rho, rewards, out.values, batch.response_mask)
    for b, k in batch.valid.nonzero().tolist():
        mask = batch.response_mask[b, k]
        want = _by_hand(beta_rho[b, k].tolist(), rewards[b, k].tolist(), out.values[b, k].tolist(), mask.tolist())
        assert left.q[b, k][mask].tolist() == pytest.approx(want)
        assert left.value[b, k][mask].tolist() == pytest.approx(want), "one number, two gradients"


def test_oreo_without_kl_is_dqo():
    batch = batch_of("trajectory", weight=[1, 2, 0.5, 0])
    assert_same_update(Oreo(beta=0.3, kl_weight=0.0), Dqo(beta=0.3), batch, make_raw(batch))


def test_oreo_kl_worked():
    """Mean KL (1 + 3) / 2 = 2; with α 0.01 and the policy's loss divided by β = 0.1 it adds 0.2."""
    batch, out = worked()
    extra = loss_of(Oreo(beta=BETA), out, batch) - loss_of(Oreo(beta=BETA, kl_weight=0.0), out, batch)
    assert extra.item() == pytest.approx(0.01 * 2 / BETA, rel=1e-4)
    assert Oreo(beta=BETA)(out, batch).terms["kl"].group == "policy"
    kl = Oreo(beta=BETA)(out, batch).metrics["kl"]
    assert (kl.total.item(), kl.weight.item()) == (4.0, 2.0)


def test_oreo_asks_for_the_reference_only_where_it_uses_it():
    assert Oreo().needed().kl == "reverse"
    assert Oreo(kl_weight=0.0).needed().kl == "none"


# ---------------------------------------------------------------------------------------------------- DRO


def test_dro_worked():
    """R = 1.5, V = 0.4, βℓ = −0.1: residual 1.2, squared 1.44; the policy's term is divided by β."""
    torch.testing.assert_close(dro_residual(*torch.tensor([1.5, 0.4, -0.1])), torch.tensor(1.2))
    batch, out = worked()
    loss = loss_of(Dro(beta=BETA), out, batch)
    assert loss.item() == pytest.approx(1.44 / BETA + 1.44)
    ratio, value = torch.autograd.grad(loss, [out.logprobs, out.values])
    torch.testing.assert_close(ratio[batch.response_mask], torch.tensor([-2.4, -2.4]))
    torch.testing.assert_close(value, torch.tensor([[[-2.4, 0.0, 0.0]]]))
    metrics = Dro(beta=BETA)(out, batch).metrics
    means = {name: (mean.total / mean.weight).item() for name, mean in metrics.items()}
    assert means == pytest.approx({"value": 0.4, "value_error": 1.2, "sequence_log_ratio": -1.0})
    error = Dro(beta=BETA)(replace(out, values=out.values + 2.0), batch).metrics["value_error"]
    assert error.total.item() == pytest.approx(0.8), "1.2 − 2, without its sign"


def test_dro_values_the_state_before_the_policys_first_token():
    """A trajectory that the environment begins: token 0 has no value, token 1's is V(x)."""
    batch, _ = worked()
    batch = replace(batch, response_mask=torch.tensor([[[False, True, True]]]), ref_logprobs=torch.zeros(1, 1, 3))
    values = torch.tensor([[[0.0, 0.4, 0.6]]], requires_grad=True)
    loss = loss_of(Dro(), PolicyOut(torch.zeros(1, 1, 3, requires_grad=True), values=values), batch)
    (grad,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(grad, torch.tensor([[[0.0, -2 * (1.5 - 0.4), 0.0]]]))


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_dqo_of_one_token_is_dro(lam):
    batch = batch_of("trajectory", weight=[1, 2, 0.5, 0])
    one = slice(None), slice(None), slice(0, 1)
    names = ("predictor", "response_ids", "response_mask", "ref_logprobs", "token_rewards")
    batch = replace(batch, **{name: getattr(batch, name)[one] for name in names})
    assert_same_update(Dqo(beta=0.3, lam=lam), Dro(beta=0.3), batch, make_raw(batch))


@pytest.mark.parametrize("objective", [Dqo(), Oreo(), Dro()])
def test_a_reward_moves_what_came_before_it_alone(objective):
    """Credit runs backwards: more reward on a token changes no gradient behind it, but for DRO, which sees the whole."""
    batch = batch_of("trajectory")
    grads = [_gradient(objective, with_reward) for with_reward in (batch, _more_reward_at(batch, 3))]
    changed = (grads[0] != grads[1])[1, 2]  # the seven-token trajectory; tokens 1 and 4 are the environment's
    whole = [True, False, True, True, False, True, True]
    assert changed[..., LOGPROB].tolist() == (
        whole if isinstance(objective, Dro) else [True, False, True, True] + [False] * 3
    )
    assert not changed[4:, VALUE].any()


def _more_reward_at(batch: Batch, token: int) -> Batch:
    rewards = batch.token_rewards.clone()
    rewards[1, 2, token] += 1.0
    return replace(batch, token_rewards=rewards)


def _gradient(objective, batch: Batch) -> Tensor:
    raw = make_raw(batch)
    return torch.autograd.grad(loss_of(objective, as_out(raw, batch, objective.needed()), batch), raw)[0]
