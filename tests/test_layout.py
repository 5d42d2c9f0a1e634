"""The same update whatever the layout: one rank with four rows = two micro-batches of two = two ranks with two each.

For every objective, through DeepSpeed, on ragged rows, some of which have nothing to train on. The learning rate and Adam's
ε are huge, so that an update is proportional to its gradient: sign-like steps would blow rounding up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.collate import collate
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.contracts import Batch, Row
from pipeline.learner import Learner
from pipeline.loop import train_step
from pipeline.objectives import OBJECTIVES
from pipeline.records import RecordKind
from tests.conftest import save_tiny_llama
from tests.engine_runs import warm_up

pytestmark = pytest.mark.slow
STEPS = 2
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"nll_weight": 0.5},
    "dqo": {"beta": 0.5, "lam": 0.7, "importance": "behaviour"},
    "lta": {"nll_weight": 0.5, "align_weight": 5.0},
    "oreo": {"beta": 0.5, "kl_weight": 0.3},
    "reward_model": {"center_weight": 0.1},
    "tdpo": {"beta": 0.5},
}
"""Settings under which every term of an objective's loss counts."""
BY_KIND: dict[tuple[str, str], dict[str, Any]] = {("rejection_sft", "unpaired"): {"min_reward": 0.0}} | {
    ("lta", kind): {"focus_weight": 0.0} for kind in ("demonstration", "preference", "ranking")
}
"""Settings that a kind of data asks for."""


def config_of(name: str, kind: RecordKind, model: Path) -> RunConfig:
    optimizer = {"lr": 0.3, "eps": 1.0, "clip": None, "schedule": "constant", "warmup_steps": 0}
    return validate(
        {
            "data": {"kind": kind, "sources": [{"path": "unused"}]},
            "model": {"path": str(model), "dtype": "float32"},
            "objective": {"name": name} | SETTINGS.get(name, {}) | BY_KIND.get((name, kind), {}),
            "optimizer": optimizer,
            "critic": {"optimizer": optimizer},
        }
    )


def rows_of(kind: RecordKind) -> list[Row]:
    """Four rows: ragged K and lengths; where the kind allows, one without any trained token and one of weight 0."""
    rng = torch.Generator().manual_seed(len(kind))
    lengths = {
        "demonstration": [[5], [1], [8], [3]],
        "preference": [[5, 2], [1, 7], [4, 4], [6, 3]],
        "ranking": [[5, 2, 3], [1, 7], [4, 4, 2, 6], [6, 3]],
        "unpaired": [[5, 2], [1, 7], [4, 4], [6, 3]],
        "trajectory": [[2], [7], [6, 4, 2, 6], [6, 3]],  # of two ranks one knows no groups of several
    }[kind]

    def numbers(n: int, scale: float) -> list[float]:
        return (scale * torch.rand(n, generator=rng)).tolist()

    rows = []
    for i, row in enumerate(lengths):
        ids = [torch.randint(3, 259, (n,), generator=rng).tolist() for n in (2 + 3 * i, *row)]
        rewarded, trajectory = kind in ("unpaired", "trajectory"), kind == "trajectory"
        # The environment speaks second in the longer trajectories; row 1 is nothing but environment.
        trained = [[n < 5 or t not in (1, 2) for t in range(n)] if i != 1 else [False] * n for n in row]
        rewards = [[0.0] * (n - 1) + [1.0 if (i + k) % 2 else -1.0] for k, n in enumerate(row)]
        rows.append(
            Row(
                row_id=i,
                prompt_ids=ids[0],
                response_ids=ids[1:],
                ref_logprobs=[numbers(n, -4.0) for n in row],
                weight=0.0 if i == 3 else 1.0 + i,
                trained=trained if trajectory else None,
                token_rewards=rewards if rewarded else None,
                behaviour_logprobs=numbers(len(row), -9.0) if trajectory else None,
                mismatched=kind == "unpaired",
                step_ends=[[*range(0, n - 1, 2), n - 1] for n in row] if trajectory else None,
            )
        )
    return rows


def update(config: RunConfig, folder: Path, layout: Sequence[Sequence[int]]) -> dict[str, Any]:
    """`STEPS` optimizer steps over the micro-batches of this rank → metrics of each step, and all weights."""
    rows = rows_of(config.data.kind)
    learner = Learner.start(config, config.model.path, str(folder / "frozen"), torch.device("cpu"), None)
    with torch.no_grad():  # a zero value head would hide the critic's trunk from its loss
        for module in (learner.critic.module.head,) if learner.critic else ():
            module.weight.copy_(torch.linspace(-0.3, 0.3, module.weight.numel())[None])
    lines = []
    for step in range(STEPS):
        carried = {"mismatched_log_ratio": 0.3}
        batches: list[Batch] = [replace(collate([rows[i] for i in micro]), carried=carried) for micro in layout]
        lines.append(train_step(learner, config.objective, batches, step, STEPS))
    weights = {
        f"{group}/{name}": engine._gather(name, None).clone()
        for group, engine in learner._engines.items()
        for name in engine._trained
    }
    learner.close()
    return {"metrics": lines, "weights": weights}


CASES = [(name, kind) for name, objective in OBJECTIVES.items() for kind in sorted(objective.needs.records)]


def all_cases(folder: Path, layout: Sequence[Sequence[int]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(name, kind): update(config_of(name, kind, folder / "model"), folder, layout) for name, kind in CASES}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    found = all_cases(folder, [[0, 1]] if rank == 0 else [[2, 3]])
    if rank == 0:
        torch.save(found, folder / "two.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("layout")
    save_tiny_llama(folder / "model")
    save_tiny_llama(folder / "frozen", seed=1)
    warm_up()
    ranks = mp.start_processes(work, (folder,), nprocs=2, start_method="forkserver", join=False)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "alone"), 1), rank=0, world_size=1)
    found = {"whole": all_cases(folder, [[0, 1, 2, 3]]), "accumulated": all_cases(folder, [[0, 1], [2, 3]])}
    dist.destroy_process_group()
    while not ranks.join():
        pass
    return found | {"two ranks": torch.load(folder / "two.pt")}


@pytest.mark.parametrize("layout", ["accumulated", "two ranks"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_update_does_not_depend_on_the_layout(updates, name: str, kind: str, layout: str) -> None:
    whole, other = updates["whole"][name, kind], updates[layout][name, kind]
    for one, two in zip(whole["metrics"], other["metrics"], strict=True):
        assert one.keys() == two.keys()
        for metric, value in one.items():
            assert two[metric] == pytest.approx(value, rel=2e-4, abs=2e-5), metric
    assert whole["metrics"][0]["grad_norm"] > 1e-3
    for parameter, tensor in whole["weights"].items():
        torch.testing.assert_close(other["weights"][parameter], tensor, rtol=1e-4, atol=2e-6)
