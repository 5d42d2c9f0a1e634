"""What `loop` and evaluation rely on, for every objective and every kind of record it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.contracts import Batch, Mean, Objective, PolicyOut
from pipeline.objectives import OBJECTIVES
from pipeline.objectives.dpo import Dpo
from pipeline.objectives.dqo import Dqo
from pipeline.objectives.f_dpo import FDpo
from pipeline.objectives.ipo import Ipo
from pipeline.objectives.lta import Lta
from pipeline.objectives.oreo import Oreo
from pipeline.objectives.rejection_sft import RejectionSft
from pipeline.objectives.reward_model import RewardModel
from pipeline.objectives.tdpo import Tdpo
from tests.batches import KL, LOGPROB, SCORE, VALUE, as_out, batch_of, loss_of, make_raw, padded, rows_of

VARIANTS = [
    *(objective() for objective in OBJECTIVES.values()),
    Dpo(label_smoothing=0.2, nll_weight=0.7),
    *(
        FDpo(divergence=divergence, label_smoothing=0.1)
        for divergence in ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")
    ),
    Ipo(length_normalised=True),
    RejectionSft(keep_fraction=1.0),
    RejectionSft(min_reward=0.0),
    Tdpo(variant=1, alpha=1.0),
    Dqo(lam=0.7, importance="behaviour"),
    Dqo(lam=0.0, q_target="value", importance="reference"),
    Oreo(kl_weight=0.0),
    Lta(focus_weight=0.0, alignment="mean"),
    Lta(align_weight=0.0, anchor="thoughts"),
    Lta(nll_weight=0.0),
    RewardModel(center_weight=0.1),
]
CASES = [
    pytest.param(objective, kind, id=f"{type(objective).__name__}{i}-{kind}")
    for i, objective in enumerate(VARIANTS)
    for kind in sorted(objective.needed().records)
]


RANKED = [case for case in CASES if case.values[1] not in ("trajectory", "unpaired")]
"""Where the first response is known to be better than the others."""


def outputs(objective: Objective, raw: Tensor, batch: Batch) -> PolicyOut:
    """What the pipeline supplies to this objective, and nothing else."""
    return as_out(raw, batch, objective.needed())


def gradient(loss: Tensor, raw: Tensor) -> Tensor:
    """0 where a loss does not depend on an output at all."""
    return torch.autograd.grad(loss, raw)[0]


def own_tokens(batch: Batch) -> Tensor:
    """Trained tokens of responses that count. [B, K, R]"""
    return batch.response_mask & batch.valid[..., None]


def assert_silent_where_masked(grad: Tensor, batch: Batch) -> None:
    for channel in (LOGPROB, KL, VALUE):
        assert (grad[..., channel][~own_tokens(batch)] == 0).all()
    assert (grad[..., SCORE][~batch.valid] == 0).all()


def assert_same_means(first: dict[str, Mean], second: dict[str, Mean]) -> None:
    assert first.keys() == second.keys()
    for name, mean in first.items():
        torch.testing.assert_close(mean.total, second[name].total, msg=name)
        torch.testing.assert_close(mean.weight, second[name].weight, msg=name)


@pytest.mark.parametrize(("objective", "kind"), CASES)
class TestContract:
    def test_terms_and_denominators_match(self, objective, kind):
        batch = batch_of(kind)
        out = outputs(objective, make_raw(batch), batch)
        weights, loss = objective.weight(batch), objective(out, batch)
        assert set(weights) == set(loss.terms)
        for tensor in [*weights.values(), *(term.total for term in loss.terms.values())]:
            assert tensor.shape == ()
            assert tensor.isfinite()
        for mean in loss.metrics.values():
            assert isinstance(mean, Mean)
            assert mean.total.shape == mean.weight.shape == ()
            assert mean.total.isfinite()
            assert not mean.total.requires_grad

    def test_denominators_come_from_masks_and_rewards_alone(self, objective, kind):
        batch = batch_of(kind)
        other = replace(
            batch,
            ref_logprobs=None,
            behaviour_logprobs=None,
            input_ids=batch.input_ids * 0,
            response_ids=batch.response_ids * 0,
        )
        assert objective.weight(batch) == objective.weight(other)
        assert all(weight > 0 for weight in objective.weight(batch).values())

    def test_totals_and_denominators_are_linear_in_the_weight(self, objective, kind):
        batch = batch_of(kind, weight=[1, 2, 0.5, 1])
        heavier = replace(batch, weight=3 * batch.weight)
        out = outputs(objective, make_raw(batch), batch)
        for name, weight in objective.weight(batch).items():
            torch.testing.assert_close(objective.weight(heavier)[name], 3 * weight)
            got, base = objective(out, heavier).terms[name].total, objective(out, batch).terms[name].total
            torch.testing.assert_close(got, 3 * base)
            assert base != 0

    def test_rows_add_up_in_any_order(self, objective, kind):
        batch = batch_of(kind, weight=[1, 2, 0.5, 1])
        raw = make_raw(batch)
        whole, weights = objective(outputs(objective, raw, batch), batch), objective.weight(batch)
        order = [2, 0, 3, 1]
        parts = [(rows_of(batch, [b]), raw[b : b + 1]) for b in order]
        losses = [objective(outputs(objective, part_raw, part), part) for part, part_raw in parts]
        for name, term in whole.terms.items():
            torch.testing.assert_close(term.total, sum(loss.terms[name].total for loss in losses))
            torch.testing.assert_close(weights[name], sum(objective.weight(part)[name] for part, _ in parts))
        for name, mean in whole.metrics.items():
            torch.testing.assert_close(mean.total, sum(loss.metrics[name].total for loss in losses))
            torch.testing.assert_close(mean.weight, sum(loss.metrics[name].weight for loss in losses))
        shuffled = rows_of(batch, order)
        loss = loss_of(objective, outputs(objective, raw[order], shuffled), shuffled)
        torch.testing.assert_close(loss, loss_of(objective, outputs(objective, raw, batch), batch))

    @pytest.mark.parametrize("how", ["weightless", "empty"])
    def test_a_filler_changes_nothing(self, objective, kind, how):
        """Row 2 weighs nothing; its outputs, its reference and its behaviour log-probs are such as no real row has."""
        batch, kept = batch_of(kind, weight=[1, 2, 0, 1]), [0, 1, 3]
        raw = make_raw(batch).detach()
        raw[2] = torch.linspace(-1e4, 1e4, raw[2].numel()).view_as(raw[2])
        if batch.behaviour_logprobs is not None:
            batch.behaviour_logprobs[2] = torch.nan
        if how == "empty":
            batch.response_mask[2], batch.valid[2], batch.ref_logprobs[2] = False, False, 0.0
        raw.requires_grad_()
        result = objective(outputs(objective, raw, batch), batch)
        grad = gradient(loss_of(objective, outputs(objective, raw, batch), batch), raw)
        small, small_raw = rows_of(batch, kept), raw.detach()[kept].requires_grad_()
        small_loss = loss_of(objective, outputs(objective, small_raw, small), small)
        torch.testing.assert_close(loss_of(objective, outputs(objective, raw, batch), batch), small_loss)
        torch.testing.assert_close(grad[kept], gradient(small_loss, small_raw))
        assert torch.equal(grad[2], torch.zeros_like(grad[2]))
        assert_same_means(result.metrics, objective(outputs(objective, small_raw, small), small).metrics)
        assert objective.implied_reward(outputs(objective, raw, batch), batch).isfinite().all()
        credit = objective.token_reward(outputs(objective, raw, batch), batch)
        assert how != "empty" or (credit[2] == 0).all()

    def test_a_batch_of_fillers_is_zero_and_can_go_backward(self, objective, kind):
        batch = batch_of(kind, weight=[0, 0, 0, 0])
        raw = make_raw(batch)
        assert all(weight == 0 for weight in objective.weight(batch).values())
        total = sum(term.total for term in objective(outputs(objective, raw, batch), batch).terms.values())
        assert total.item() == 0
        assert torch.equal(gradient(total, raw), torch.zeros_like(raw))

    def test_terms_move_their_own_group_alone(self, objective, kind):
        """Policy terms reach log-probs, KLs and scores, critic terms values; both only where something is trained."""
        batch = padded(batch_of(kind), 1, 3)
        raw = make_raw(batch)
        for name in objective.weight(batch):
            term = objective(outputs(objective, raw, batch), batch).terms[name]
            grad = gradient(term.total, raw)
            assert grad.isfinite().all()
            assert_silent_where_masked(grad, batch)
            moved = {channel for channel in (LOGPROB, KL, VALUE, SCORE) if grad[..., channel].any()}
            if term.group == "critic":
                assert moved == {VALUE}, name
            elif objective.needed().model == "reward":
                assert moved == {SCORE}, name
            else:
                latent = {SCORE} if objective.needed().latent != "none" else set()  # what thoughts grow from
                assert moved, name
                assert moved <= {LOGPROB, KL} | latent, name

    def test_padding_changes_nothing(self, objective, kind):
        tight = batch_of(kind)
        wide = padded(tight, 2, 3)
        raw = make_raw(wide)
        _, k, r = tight.response_mask.shape
        tight_out = outputs(objective, raw[:, :k, :r], tight)
        wide_out = outputs(objective, raw, wide)
        torch.testing.assert_close(loss_of(objective, wide_out, wide), loss_of(objective, tight_out, tight))
        assert_same_means(objective(wide_out, wide).metrics, objective(tight_out, tight).metrics)

    def test_rewards_have_their_shapes_and_zeros(self, objective, kind):
        batch = padded(batch_of(kind), 0, 2)
        out = outputs(objective, make_raw(batch), batch)
        reward, credit = objective.implied_reward(out, batch), objective.token_reward(out, batch)
        assert reward.shape == batch.valid.shape
        assert credit.shape == batch.response_mask.shape
        assert (credit[~batch.response_mask] == 0).all()
        if objective.needed().model == "reward":
            torch.testing.assert_close(credit.sum(-1), reward)
            assert ((credit != 0).sum(-1) == batch.valid).all(), "one token bears the whole score"
        else:
            assert (credit[batch.response_mask] != 0).all()

    def test_config_section_round_trips(self, objective, kind):
        plain = objective.model_dump(mode="json")
        assert type(objective)(**plain) == objective


@pytest.mark.parametrize(("objective", "kind"), RANKED)
def test_the_best_response_becomes_likelier(objective, kind):
    """Starting at the reference, where no margin is too large yet."""
    batch = batch_of(kind)
    raw = make_raw(batch).detach()
    raw[..., LOGPROB] = batch.ref_logprobs
    raw.requires_grad_()
    grad = gradient(loss_of(objective, outputs(objective, raw, batch), batch), raw)
    if objective.needed().model == "reward":
        assert (grad[:, 0, 0, SCORE] < 0).all()
    else:
        assert (grad[:, 0, :, LOGPROB][batch.response_mask[:, 0]] < 0).all()


def test_metrics_are_weighted_and_ignore_what_weighs_nothing():
    """(1·1 + 3·2) / 3, whatever stands beside them."""
    mean = Mean.of(torch.tensor([1.0, 3.0, torch.nan, torch.inf]), torch.tensor([1.0, 2.0, 0.0, 0.0]))
    assert (mean.total.item(), mean.weight.item()) == (7.0, 3.0)
