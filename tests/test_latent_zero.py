"""A prior beside a frozen backbone, with adapters or with an assistant, through DeepSpeed at every stage of ZeRO.

Two ranks against one; saved in the middle, gone on from to the bit. Every parameter that can be partitioned is, as in `test_engine`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import checkpoint, engine, ops, zero
from pipeline.collate import collate
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.learner import Learner
from pipeline.loop import train_step
from tests.conftest import save_tiny_llama
from tests.engine_runs import warm_up
from tests.test_layout import config_of, rows_of

pytestmark = pytest.mark.slow
STEPS, SAVED = 4, 2
KINDS: dict[str, dict[str, Any]] = {
    "block": {},
    "lora": {"model": {"lora": {"r": 2, "alpha": 4}}},
    "assistant": {"latent": {"assistant": "assistant"}},
    "whole": {"latent": {"backbone": "trained"}},
}
CASES = [*(("block", stage) for stage in (0, 1, 2, 3)), ("lora", 3), ("assistant", 3), ("whole", 3)]


def settings(root: Path, kind: str, stage: int) -> RunConfig:
    plain = config_of("lta", "trajectory", root / "model").dump()
    for section, changes in KINDS[kind].items():
        plain[section] = plain[section] | changes
    if plain["latent"]["assistant"]:
        plain["latent"]["assistant"] = str(root / "assistant")
    plain["scaling"]["zero_stage"] = stage
    return validate(plain)


def train(
    config: RunConfig, layout: Sequence[Sequence[int]], save: Path | None = None, resume: Path | None = None
) -> dict:
    """Steps (from SAVED on, where resumed) over this rank's micro-batches → metrics of each step, and all trained weights."""
    torch.manual_seed(0)  # adapters start at random
    learner = Learner.start(config, config.model.path, None, torch.device("cpu"), resume)
    rows, lines = rows_of("trajectory"), []
    for step in range(SAVED if resume else 0, STEPS):
        batches = [collate([rows[i] for i in micro]) for micro in layout]
        lines.append(train_step(learner, config.objective, batches, step, STEPS))
        if save is not None and step + 1 == SAVED:
            if learner.rank == 0:
                save.mkdir(parents=True)
            dist.barrier()
            for name, tensors in learner.parts(copied=False):
                checkpoint.write_tensors(save / name, tensors)
            if learner.rank == 0:
                (save / "state.json").write_text(json.dumps({"step": SAVED, "updates": learner.updates()}))
            dist.barrier()
    weights = {name: learner.policy._gather(name, None).clone() for name in learner.policy._trained}
    learner.close()
    return {"metrics": lines, "weights": weights}


def work(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    zero.PERSISTENT_NUMEL, engine.PART_BYTES = 0, 40_000
    # Of the two ranks one has more chunks of tokens than the other; some are projected again in the backward pass.
    ops.LOGIT_CHUNK_BYTES, ops.KEPT_BYTES = 4 * 259 * 5, 4 * 259 * 10
    os.environ["LOCAL_RANK"] = str(rank)  # as Ray Train sets it; DeepSpeed reads it at stage 3
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), 2), rank=rank, world_size=2)
    layout, found = [[0, 1]] if rank == 0 else [[2, 3]], {}
    for kind, stage in CASES:
        config, saved = settings(root, kind, stage), root / f"{kind}-{stage}"
        found[kind, stage] = train(config, layout, save=saved)
        found["resumed", kind, stage] = train(config, layout, resume=saved)
    if rank == 0:
        torch.save(found, root / "two.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    root = tmp_path_factory.mktemp("zero")
    save_tiny_llama(root / "model")
    save_tiny_llama(root / "assistant", seed=2, hidden_size=16)
    warm_up()
    ranks = mp.start_processes(work, (root,), nprocs=2, start_method="forkserver", join=False)
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "alone"), 1), rank=0, world_size=1)
    alone = {("alone", kind): train(settings(root, kind, 0), [[0, 1, 2, 3]]) for kind in KINDS}
    dist.destroy_process_group()
    while not ranks.join():
        pass
    return torch.load(root / "two.pt") | alone | {"root": root}


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_two_ranks_at_any_stage_are_one(runs, kind: str, stage: int) -> None:
    alone, two = runs["alone", kind], runs[kind, stage]
    for one, other in zip(alone["metrics"], two["metrics"], strict=True):
        assert other == pytest.approx(one, rel=2e-4, abs=2e-5)
    assert alone["metrics"][0]["grad_norm"] > 1e-3
    assert alone["metrics"][-1]["loss"] < alone["metrics"][0]["loss"]
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(two["weights"][name], tensor, rtol=2e-4, atol=5e-6)


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_going_on_is_bit_equal_and_a_checkpoint_holds_what_learns(runs, kind: str, stage: int) -> None:
    through, resumed = runs[kind, stage], runs["resumed", kind, stage]
    assert through["metrics"][SAVED:] == resumed["metrics"]
    assert all(torch.equal(tensor, resumed["weights"][name]) for name, tensor in through["weights"].items())
    saved = {name for name, _ in checkpoint.read_weights(runs["root"] / f"{kind}-{stage}")}
    assert saved == through["weights"].keys()
    first = {name.partition(".")[0] for name in saved}
    assert first == ({"prior"} if kind in ("block", "assistant") else {"prior", "lm"})
    if kind == "assistant":
        assert saved == {"prior.project.weight", "prior.project.bias"}
    if kind == "lora":
        assert all("lora_" in name for name in saved if name.startswith("lm."))
