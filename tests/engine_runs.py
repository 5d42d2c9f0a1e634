"""Trainings of a tiny model through `engine`, in this process or on two spawned ranks.

Parameter sizes are odd on purpose, every ZeRO-3 parameter is partitioned, and the head is projected in recomputed chunks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pipeline import checkpoint, engine, ops, shared_memory, widening, zero
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.optimizer import lr_at

VOCABULARY, WIDTH, ROWS, TOKENS, STEPS, SAVED = 65, 32, 4, 12, 4, 2
SCALE = ROWS * (TOKENS - 1)
STAGES, DTYPES = (0, 1, 2, 3), ("float32", "bfloat16")


def config(stage: int, dtype: str = "float32", clip: float | None = 0.5, offload: bool = False) -> RunConfig:
    return validate(
        {
            "data": {"kind": "preference", "sources": [{"path": "unused"}]},
            "model": {"path": "unused", "dtype": dtype},
            "objective": {"name": "dpo"},
            "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-5, "clip": clip},
            "scaling": {"zero_stage": stage, "offload_optimizer": offload},
        }
    )


@dataclass(frozen=True)
class Out:
    """As the pipeline's policies return one: before the backward pass DeepSpeed finds no tensors in it."""

    loss: Tensor


class Tiny(nn.Module):
    """A tiny Llama that returns the summed negative log-likelihood of its rows, [B, T] → scalar."""

    def __init__(self, tie: bool = False, seed: int = 0) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        torch.manual_seed(seed)
        shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 47}
        self.lm = LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, tie_word_embeddings=tie, **shape)
        )
        widening.attach(self.lm)
        self.bias = nn.Parameter(torch.zeros(1))  # fewer elements than ranks

    def forward(self, ids: Tensor) -> Out:
        hidden = self.lm.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].reshape(-1, WIDTH) + self.bias
        head = self.lm.get_output_embeddings()
        return Out(-ops.selected_logprobs(hidden, ids[:, 1:].reshape(-1), head, VOCABULARY).sum())


def rows(step: int) -> Tensor:
    return torch.randint(60, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))


def policy_of(tie: bool, seed: int, frozen: str | None) -> Tiny:
    policy = Tiny(tie, seed)
    for name, p in policy.named_parameters():
        p.requires_grad_(frozen is None or frozen not in name)
    return policy


def train(
    settings: RunConfig,
    *,
    start: int = 0,
    micro: tuple[int, ...] = (1,),
    save: Path | None = None,
    resume: Path | None = None,
    tie: bool = False,
    seed: int = 0,
    frozen: str | None = None,
) -> dict[str, Any]:
    """Steps `start` … STEPS; `micro` is the number of micro-batches of successive steps; saves after step SAVED."""
    trainer = engine.Engine(policy_of(tie, seed, frozen), settings, "cpu", resume)
    assert trainer.steps == start
    losses, norms = [], []
    for step in range(start, STEPS):
        mine = rows(step).chunk(trainer.world)[trainer.rank].chunk(micro[step % len(micro)])
        with torch.no_grad():
            trainer(mine[0])  # as evaluation between steps does
        total = torch.zeros(())
        for i, batch in enumerate(mine):
            loss = trainer(batch).loss / SCALE
            trainer.backward(loss, last=i == len(mine) - 1)
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
        norms.append(trainer.step(lr_at(step, STEPS, settings.optimizer)))
        if save is not None and step + 1 == SAVED:
            saved = trainer.steps, list(trainer.parts(copied=True))
    weights = {name: trainer._gather(name, None).clone() for name in trainer._trained}
    moments = {f"{key}/{n}": trainer._gather(n, key).clone() for n in trainer._trained for key in engine.MOMENTS}
    kept = {n: whole(p) for n, p in trainer.module.named_parameters() if not p.requires_grad}
    if save is not None:
        write(trainer, save, *saved)  # as the background does: training went on, and the copy is of its moment
    trainer.close()
    return {"losses": losses, "norms": norms, "weights": weights, "moments": moments, "frozen": kept}


def whole(p: nn.Parameter) -> Tensor:
    """A copy of a parameter, gathered if stage 3 has partitioned it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
        return p.detach().clone()


def write(trainer: engine.Engine, folder: Path, steps: int, parts: list[tuple[str, dict[str, Tensor]]]) -> None:
    if trainer.rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    for name, tensors in parts:
        checkpoint.write_tensors(folder / name, tensors)
    dist.barrier()
    if trainer.rank == 0:
        assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(trainer.files())
        (folder / "state.json").write_text(json.dumps({"step": steps}))
    dist.barrier()


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(zero, "PERSISTENT_NUMEL", 0)  # partition every parameter, however small
    patch.setattr(engine, "PART_BYTES", 40_000)  # several files per rank
    patch.setattr(ops, "LOGIT_CHUNK_BYTES", 4 * VOCABULARY * 5)  # five tokens per chunk
    patch.setattr(zero, "SHARED_BYTES", 0)  # talk through memory, in several pieces
    patch.setattr(shared_memory, "PIECE", 4096)
    patch.setattr(widening, "FEW", 1)  # bfloat16's products in float32, whatever processor this is
    patch.setattr(widening, "_no_matrix_unit", lambda: True)


def work(rank: int, world: int, root: Path, cases: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    shrink(pytest.MonkeyPatch())
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), world), rank=rank, world_size=world)
    results = {name: train(**case) for name, case in cases.items()}
    if rank == 0:
        torch.save(results, root / "results.pt")
    dist.destroy_process_group()


def warm_up() -> None:
    """Start the process that ranks are forked from: it imports the heavy libraries once, and has no threads."""
    forkserver.set_forkserver_preload(["deepspeed", "transformers.models.llama.modeling_llama"])
    forkserver.ensure_running()


def on_two_ranks(root: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    root.mkdir()
    warm_up()
    mp.start_processes(work, (2, root, cases), nprocs=2, start_method="forkserver")
    return torch.load(root / "results.pt")
