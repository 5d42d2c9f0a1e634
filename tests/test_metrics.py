"""Shared metrics by worked numbers: which pairs are pairs, which responses count, and for whom."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.contracts import Batch, Mean, Objective, PolicyOut
from pipeline.metrics import METRICS, Sums, batch_metrics
from pipeline.objectives import OBJECTIVES
from pipeline.objectives.dpo import Dpo
from pipeline.objectives.dqo import Dqo
from pipeline.objectives.kto import Kto
from pipeline.objectives.plackett_luce import PlackettLuce
from pipeline.objectives.reward_model import RewardModel
from pipeline.objectives.sft import Sft
from tests.batches import as_out, as_unpaired, batch_of, make_batch, make_raw, padded, with_ratios


def sum_up(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    sums, (one, two) = Sums(), torch.tensor([1.0, 2.0])
    sums.add({"both": Mean(one + rank, two), f"rank {rank}": Mean(one, two)} if rank else {"both": Mean(one, two)})
    (folder / f"{rank}.json").write_text(json.dumps(sums.reduce()))
    dist.destroy_process_group()


def test_ranks_need_not_have_the_same_metrics(tmp_path: Path) -> None:
    """As where one has rows of one response only."""
    mp.start_processes(sum_up, (tmp_path,), nprocs=2, start_method="forkserver")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {"both": 0.75, "rank 1": 0.5}


def means(objective: Objective, out: PolicyOut, batch: Batch) -> dict[str, float]:
    found = batch_metrics(objective, out, batch)
    return {name: (mean.total / mean.weight).item() for name, mean in found.items() if mean.weight}


def with_returns(log_ratios: list[list[float]], returns: list[list[float]]) -> tuple[Batch, PolicyOut]:
    batch, raw = with_ratios(log_ratios)
    return replace(batch, token_rewards=torch.tensor(returns)[..., None]), PolicyOut(raw)


def test_pairs_worked():
    """ℓ = (2, −3) and (1, 1), weights 1 and 3: margins 0.5 and 0, the tie counts one half."""
    batch, raw = with_ratios([[2.0, -3.0], [1.0, 1.0]])
    batch = replace(batch, weight=torch.tensor([1.0, 3.0]))
    assert means(Dpo(beta=0.1), PolicyOut(raw), batch) == pytest.approx(
        {
            "reward/chosen": (0.2 + 3 * 0.1) / 4,
            "reward/rejected": (-0.3 + 3 * 0.1) / 4,
            "reward/margin": 0.5 / 4,
            "accuracy": (1 + 3 * 0.5) / 4,
            "logprob/chosen": (1 + 0) / 4,
            "logprob/rejected": -4 / 4,
            "log_ratio": (2 - 3 + 3 * (1 + 1)) / 8,
        },
        abs=1e-6,
    )


def test_rankings_count_all_pairs_and_compare_best_with_worst():
    """ℓ = (3, 1, 2) has 2 of 3 pairs right; (0, 4) none; both prompts count alike."""
    batch, raw = with_ratios([[3.0, 1.0, 2.0], [0.0, 4.0, 99.0]])
    batch = replace(batch, valid=torch.tensor([[True, True, True], [True, True, False]]))
    found = means(PlackettLuce(beta=1.0), PolicyOut(raw), batch)
    assert found["accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["reward/margin"] == pytest.approx((3 - 2 + 0 - 4) / 2)


def test_equal_returns_are_no_pairs():
    """Returns 1, 1, 0 and ℓ = (1, 5, 2): of the pairs (1, 3) and (2, 3) one is right; the second prompt orders nothing."""
    batch, out = with_returns([[1.0, 5.0, 2.0], [9.0, -9.0, 0.0]], [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    out = replace(out, values=torch.zeros_like(out.logprobs))
    found = means(Dqo(beta=1.0), out, batch)
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["reward/chosen"] == pytest.approx(1.0), "the second prompt has no best response"
    assert found["reward/margin"] == pytest.approx(-1.0)
    assert found["return"] == pytest.approx(5 / 6)


def test_returns_that_differ_by_rounding_are_equal():
    """0.1 + 0.2 against 0.3 in float32, summed in another order."""
    batch = make_batch([[3, 3]])
    rewards = torch.tensor([[[0.7, 0.1, 0.2], [0.1, 0.2, 0.7]]])
    rewards[0, 0, 0] += 1e-7
    batch = replace(batch, token_rewards=rewards)
    assert batch.returns[0, 0] > batch.returns[0, 1], "the case is what it claims to be"
    assert batch_metrics(Dqo(), PolicyOut(torch.zeros(1, 2, 3)), batch)["accuracy"].weight == 0


def test_mismatched_responses_count_nowhere():
    batch, raw = with_ratios([[2.0, 50.0], [-1.0, 70.0]])
    batch = as_unpaired(batch)
    assert means(Kto(), PolicyOut(raw), batch) == pytest.approx(
        {"logprob/chosen": (1 - 2) / 2, "log_ratio": (2 - 1) / 2, "return": 0.0}, abs=1e-6
    )


def test_responses_without_a_trained_token_are_neither_best_nor_worst():
    """The first and the last of four have none: ℓ = 3 and 1 are compared."""
    batch, out = with_returns([[9.0, 3.0, 1.0, -9.0]], [[3.0, 2.0, 1.0, 0.0]])
    batch = replace(batch, valid=torch.tensor([[False, True, True, False]]))
    found = means(Dqo(beta=1.0), out, batch)
    assert (found["reward/chosen"], found["reward/rejected"], found["return"]) == pytest.approx((3.0, 1.0, 1.5))
    assert found["logprob/chosen"] == pytest.approx(2.0)


def test_a_reward_model_has_no_log_probs_to_report():
    batch = make_batch([[3, 1]])
    out = PolicyOut(torch.zeros(1, 2, 3), scores=torch.tensor([[2.0, 0.5]]))
    assert means(RewardModel(), out, batch) == pytest.approx(
        {"reward/chosen": 2.0, "reward/rejected": 0.5, "reward/margin": 1.5, "accuracy": 1.0}
    )


def test_lone_responses_have_no_preference_metrics():
    batch = batch_of("demonstration")
    assert means(Sft(), PolicyOut(batch.ref_logprobs), batch).keys() == {"logprob/chosen", "log_ratio"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_and_fillers_change_no_metric_and_all_are_defined(name):
    objective = OBJECTIVES[name]()
    for kind in sorted(objective.needed().records):
        batch = batch_of(kind, weight=[1, 2, 0, 0.5])
        raw = make_raw(padded(batch, 2, 3))
        small = as_out(raw[:, : batch.valid.shape[1], : batch.response_mask.shape[2]], batch, objective.needed())
        wide = padded(batch, 2, 3)
        want = means(objective, small, batch)
        assert means(objective, as_out(raw, wide, objective.needed()), wide) == pytest.approx(want, rel=1e-5, abs=1e-6)
        assert want.keys() <= METRICS.keys()
