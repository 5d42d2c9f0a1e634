"""What `loop` and evaluation rely on, for every objective and every kind of record it takes."""

from __future__ import annotations



@pytest.mark.parametrize(("objective", "kind"), CASES)
class TestContract:
    """Properties that `loop` and evaluation rely on, for every objective and every kind of record it takes."""

    def test_terms_and_denominators_match(self, objective, kind):
        batch = make_batch(LENGTHS[kind])
        out = as_out(make_logprobs(batch), batch)
        weights, loss = objective.weight(batch), objective(out, batch)
        assert set(weights) == set(loss.terms)
        for tensor in [*weights.values(), *(term.total for term in loss.terms.values())]:
            assert tensor.shape == ()
            assert tensor.isfinite()
        for mean in loss.metrics.values():
            assert isinstance(mean, Mean)
            assert mean.total.shape == mean.weight.shape == ()
            assert not mean.total.requires_grad

    def test_denominators_come_from_masks_alone(self, objective, kind):
        batch = make_batch(LENGTHS[kind])
        other = replace(batch, ref_logprobs=None, input_ids=batch.input_ids * 0, response_ids=batch.response_ids * 0)
        assert objective.weight(batch) == objective.weight(other)
        assert all(weight > 0 for weight in objective.weight(batch).values())

    def test_totals_and_denominators_are_linear_in_the_weight(self, objective, kind):
        batch = make_batch(LENGTHS[kind], weight=[1, 2, 0.5, 1])
        heavier = replace(batch, weight=3 * batch.weight)
        out = as_out(make_logprobs(batch), batch)
        for name, weight in objective.weight(batch).items():
            torch.testing.assert_close(objective.weight(heavier)[name], 3 * weight)
            got, base = objective(out, heavier).terms[name].total, objective(out, batch).terms[name].total
            torch.testing.assert_close(got, 3 * base)
            assert base != 0

    def test_rows_add_up(self, objective, kind):
        batch = make_batch(LENGTHS[kind], weight=[1, 2, 0.5, 1])
        raw = make_logprobs(batch)
        whole, weights = objective(as_out(raw, batch), batch), objective.weight(batch)
        parts = [(rows_of(batch, [b]), raw[b : b + 1]) for b in range(4)]
        losses = [objective(as_out(part_raw, part), part) for part, part_raw in parts]
        for name, term in whole.terms.items():
            torch.testing.assert_close(term.total, sum(loss.terms[name].total for loss in losses))
            torch.testing.assert_close(weights[name], sum(objective.weight(part)[name] for part, _ in parts))
        for name, mean in whole.metrics.items():
            torch.testing.assert_close(mean.total, sum(loss.metrics[name].total for loss in losses))
            torch.testing.assert_close(mean.weight, sum(loss.metrics[name].weight for loss in losses))

    def test_a_row_of_weight_zero_changes_nothing(self, objective, kind):
        batch = make_batch(LENGTHS[kind], weight=[1, 2, 0, 1])
        raw = make_logprobs(batch).detach()
        raw[2] = torch.linspace(-1e4, 1e4, raw[2].numel()).view_as(raw[2])  # no real row looks like this
        raw.requires_grad_()
        loss = objective(as_out(raw, batch), batch)
        total = sum(term.coefficient * term.total for term in loss.terms.values())
        (grad,) = torch.autograd.grad(total, raw)
        kept = rows_of(batch, [0, 1, 3])
        kept_raw = raw.detach()[[0, 1, 3]].requires_grad_()
        kept_loss = objective(as_out(kept_raw, kept), kept)
        kept_total = sum(term.coefficient * term.total for term in kept_loss.terms.values())
        (kept_grad,) = torch.autograd.grad(kept_total, kept_raw)
        torch.testing.assert_close(total, kept_total)
        torch.testing.assert_close(grad[[0, 1, 3]], kept_grad)
        assert torch.equal(grad[2], torch.zeros_like(grad[2]))
        for name, weight in objective.weight(kept).items():
            torch.testing.assert_close(objective.weight(batch)[name], weight)
        for name, mean in kept_loss.metrics.items():
            torch.testing.assert_close(loss.metrics[name].total, mean.total)
            torch.testing.assert_close(loss.metrics[name].weight, mean.weight)

    def test_a_batch_of_fillers_is_zero_and_can_go_backward(self, objective, kind):
        batch = make_batch(LENGTHS[kind], weight=[0, 0, 0, 0])
        raw = make_logprobs(batch)
        assert all(weight == 0 for weight in objective.weight(batch).values())
        total = sum(term.total for term in objective(as_out(raw, batch), batch).terms.values())
        (grad,) = torch.autograd.grad(total, raw)
        assert total.item() == 0
        assert torch.equal(grad, torch.zeros_like(raw))

    def test_a_row_without_any_token_changes_nothing(self, objective, kind):
        batch = make_batch(LENGTHS[kind], weight=[1, 2, 0, 1])
        filled = torch.tensor([True, True, False, True])
        empty = replace(
            batch,
            response_mask=batch.response_mask & filled[:, None, None],
            valid=batch.valid & filled[:, None],
            ref_logprobs=batch.ref_logprobs * filled[:, None, None],
        )
        raw = make_logprobs(batch)
        loss = loss_of(objective, as_out(raw, empty), empty)
        (grad,) = torch.autograd.grad(loss, raw)
        kept = rows_of(batch, [0, 1, 3])
        kept_raw = raw.detach()[filled].requires_grad_()
        kept_loss = loss_of(objective, as_out(kept_raw, kept), kept)
        (kept_grad,) = torch.autograd.grad(kept_loss, kept_raw)
        torch.testing.assert_close(loss, kept_loss)
        torch.testing.assert_close(grad[filled], kept_grad)
        assert objective.implied_reward(as_out(raw, empty), empty).isfinite().all()
        assert (objective.token_reward(as_out(raw, empty), empty)[2] == 0).all()
        assert torch.equal(grad[2], torch.zeros_like(grad[2]))
        for name, mean in objective(as_out(raw, empty), empty).metrics.items():
            torch.testing.assert_close(mean.total, objective(as_out(kept_raw, kept), kept).metrics[name].total)

    def test_gradient_flows_and_only_where_trained(self, objective, kind):
        batch = make_batch(LENGTHS[kind], responses=5, tokens=8)
        raw = make_logprobs(batch)
        (grad,) = torch.autograd.grad(loss_of(objective, as_out(raw, batch), batch), raw)
        assert grad.isfinite().all()
        assert torch.equal(grad[~batch.response_mask], torch.zeros(int((~batch.response_mask).sum())))
        best = grad[:, 0][batch.response_mask[:, 0]]
        assert (best < 0).all(), "a step down the gradient makes each token of the best response likelier"

    def test_padding_changes_nothing(self, objective, kind):
        tight = make_batch(LENGTHS[kind])
        _, k, r = tight.response_mask.shape
        wide = make_batch(LENGTHS[kind], responses=k + (kind == "ranking"), tokens=r + 3)
        wide.ref_logprobs.zero_()[:, :k, :r] = tight.ref_logprobs
        raw = make_logprobs(wide).detach()
        got = loss_of(objective, as_out(raw, wide), wide)
        torch.testing.assert_close(got, loss_of(objective, as_out(raw[:, :k, :r], tight), tight))

    def test_rewards_have_their_shapes_and_zeros(self, objective, kind):
        batch = make_batch(LENGTHS[kind], tokens=7)
        out = as_out(make_logprobs(batch), batch)
        reward, credit = objective.implied_reward(out, batch), objective.token_reward(out, batch)
        assert reward.shape == batch.valid.shape
        assert credit.shape == batch.response_mask.shape
        assert torch.equal(credit[~batch.response_mask], torch.zeros(int((~batch.response_mask).sum())))
        assert (credit[batch.response_mask] != 0).all()

    def test_config_section_round_trips(self, objective, kind):
        plain = objective.model_dump(mode="json")
        assert type(objective)(**plain) == objective


def test_metrics_are_weighted_and_ignore_what_weighs_nothing():
    """(1·1 + 3·2) / 3, whatever stands beside them."""
    mean = Mean.of(torch.tensor([1.0, 3.0, torch.nan, torch.inf]), torch.tensor([1.0, 2.0, 0.0, 0.0]))
    assert (mean.total.item(), mean.weight.item()) == (7.0, 3.0)
