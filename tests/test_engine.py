"""Engine: the same update whatever the stage, rank count and micro-batches; checkpoints that change nothing.

World size 1 runs in this process, world size 2 in two spawned ones (gloo), all their cases in one go. Parameter sizes are
odd on purpose, every ZeRO-3 parameter is partitioned, and the head is projected in recomputed chunks.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import checkpoint, engine, ops, zero
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
        self.bias = nn.Parameter(torch.zeros(1))  # fewer elements than ranks

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.lm.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].reshape(-1, WIDTH) + self.bias
        head = self.lm.get_output_embeddings()
        return -ops.selected_logprobs(hidden, ids[:, 1:].reshape(-1), head, VOCABULARY).sum()


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
            loss = trainer(batch) / SCALE
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


def plain(steps: int = STEPS) -> dict[str, Any]:
    """The same training in plain PyTorch."""
    policy, settings = Tiny(), config(0).optimizer
    named = dict(policy.named_parameters())
    vectors = [p for name, p in named.items() if "norm" in name or name == "bias"]
    matrices = [p for name, p in named.items() if "norm" not in name and name != "bias"]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-5,
    )
    losses, norms = [], []
    for step in range(steps):
        loss = policy(rows(step)) / SCALE
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(policy.parameters(), 0.5).item())
        for group in adam.param_groups:
            group["lr"] = lr_at(step, STEPS, settings)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": {n: p.detach() for n, p in named.items()}}


# ------------------------------------------------------------------------------------------------ processes


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(zero, "PERSISTENT_NUMEL", 0)  # partition every parameter, however small
    patch.setattr(engine, "PART_BYTES", 40_000)  # several files per rank
    patch.setattr(ops, "LOGIT_CHUNK_BYTES", 4 * VOCABULARY * 5)  # five tokens per chunk


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


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """World size 1 in this process; yields a folder."""
    root, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), 1), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield root
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one(alone: Path) -> dict[str, dict[str, Any]]:
    """One rank, float32: whole runs by stage, saved in the middle."""
    warm_up()  # for `two`, meanwhile
    stages = {f"stage {stage}": train(config(stage), save=alone / f"{stage}") for stage in (0, 2, 3)}
    return stages | {"tied": train(config(0), tie=True)}


@pytest.fixture(scope="module")
def two(alone: Path, one: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Two ranks, float32, stages 2 and 3."""
    root = tmp_path_factory.mktemp("two")
    cases: dict[str, dict[str, Any]] = {}
    for stage in (2, 3):
        cases[f"stage {stage}"] = {"save": root / f"{stage}"}
        cases[f"micro {stage}"] = {"micro": (2, 1)}
        cases[f"resumed {stage}"] = {"resume": root / f"{stage}", "start": SAVED, "seed": 9}
    cases["from one rank 2"] = {"resume": alone / "2", "start": SAVED, "seed": 9}
    cases = {name: {"settings": config(int(name[-1]))} | case for name, case in cases.items()}
    cases["tied"] = {"settings": config(3), "tie": True}
    cases["2 to 3"] = {"settings": config(3), "resume": root / "2", "start": SAVED, "seed": 9}
    return on_two_ranks(root / "ranks", cases) | {"root": {"path": root}}


def assert_close(a: dict[str, Any], b: dict[str, Any], tolerance: float, weights: float) -> None:
    """Losses (from the later start on) and final weights agree."""
    common = min(len(a["losses"]), len(b["losses"]))
    assert a["losses"][-common:] == pytest.approx(b["losses"][-common:], abs=tolerance)
    assert a["weights"].keys() == b["weights"].keys()
    for name, tensor in a["weights"].items():
        torch.testing.assert_close(tensor, b["weights"][name], atol=weights, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def assert_equal(through: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Bit for bit: losses, norms, masters and moments."""
    assert through["losses"][SAVED:] == resumed["losses"]
    assert through["norms"][SAVED:] == resumed["norms"]
    for kind in ("weights", "moments"):
        assert through[kind].keys() == resumed[kind].keys()
        assert all(torch.equal(tensor, resumed[kind][name]) for name, tensor in through[kind].items())


# ------------------------------------------------------------------------------------------------- one by one


@pytest.mark.slow
def test_engines_one_after_another_release_everything(tmp_path: Path) -> None:
    """Also over two process groups, as when a worker process is used again. Comes first: `alone` keeps one to the end."""
    gone, losses = [], []
    for turn in range(2):
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / f"{turn}"), 1), rank=0, world_size=1)
        for stage in (2, 3):
            trainer = engine.Engine(Tiny(), config(stage), "cpu")
            loss = trainer(rows(0)) / SCALE
            trainer.backward(loss, last=True)
            trainer.step(1e-2)
            losses.append(loss.item())
            gone += [weakref.ref(trainer.module), weakref.ref(trainer._engine), weakref.ref(trainer._inner)]
            trainer.close()
            del trainer, loss
        dist.destroy_process_group()
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    assert len(set(losses)) == 1


# --------------------------------------------------------------------------------------------------- update


def test_stage_0_equals_plain_pytorch(one: dict[str, Any]) -> None:
    expected = plain()
    assert min(expected["norms"]) > 0.5, "clipping has to be at work"
    assert one["stage 0"]["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert_close(one["stage 0"], expected, 1e-6, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_same_update_whatever_stage_ranks_and_micro_batches(
    stage: int, one: dict[str, Any], two: dict[str, Any]
) -> None:
    for other in (one[f"stage {stage}"], two[f"stage {stage}"], two[f"micro {stage}"]):
        assert other["norms"] == pytest.approx(one["stage 0"]["norms"], rel=1e-5)
        assert_close(other, one["stage 0"], 2e-6, 2e-5)


@pytest.mark.slow
def test_tied_embeddings_under_zero_3(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert not any("lm_head" in name for name in two["tied"]["weights"])
    assert two["tied"]["norms"] == pytest.approx(one["tied"]["norms"], rel=1e-5)
    assert_close(two["tied"], one["tied"], 2e-6, 2e-5)


def test_no_clipping(alone: Path, one: dict[str, Any]) -> None:
    for stage in (0, 2):
        free = train(config(stage, clip=None))
        assert free["norms"][0] == pytest.approx(one["stage 0"]["norms"][0], rel=1e-5)
        assert free["losses"][-1] != pytest.approx(one["stage 0"]["losses"][-1], abs=1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_non_finite_gradient_is_refused(stage: int, alone: Path) -> None:
    trainer = engine.Engine(Tiny(), config(stage), "cpu")
    before = {name: trainer._gather(name, None).clone() for name in trainer._trained}
    trainer.backward(trainer(rows(0)) * math.nan, last=True)
    with pytest.raises(FloatingPointError, match=r"^the gradient's norm is (nan|inf); .*$"):
        trainer.step(1.0)
    assert all(torch.equal(trainer._gather(name, None), tensor) for name, tensor in before.items())
    loss = trainer(rows(0))
    trainer.backward(loss / SCALE, last=True)
    assert math.isfinite(trainer.step(1e-2))
    assert trainer.steps == 1
    assert trainer(rows(0)) < loss
    trainer.close()


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_resume_is_bit_equal(stage: int, two: dict[str, Any]) -> None:
    assert_equal(two[f"stage {stage}"], two[f"resumed {stage}"])


@pytest.mark.slow
def test_resume_at_another_rank_count(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert_close(two["from one rank 2"], one["stage 2"], 1e-6, 2e-5)
    back = train(config(3), start=SAVED, seed=9, resume=two["root"]["path"] / "3")
    assert_close(back, two["stage 3"], 1e-6, 2e-5)


@pytest.mark.slow
def test_resume_at_another_stage(alone: Path, one: dict[str, Any], two: dict[str, Any]) -> None:
    assert_close(two["2 to 3"], two["stage 2"], 1e-6, 2e-5)
    assert_close(train(config(0), start=SAVED, seed=9, resume=alone / "3"), one["stage 3"], 1e-6, 2e-5)


@pytest.mark.slow
def test_files_hold_each_parameter_once(two: dict[str, Any]) -> None:
    folder: Path = two["root"]["path"] / "3"
    for kind, per_parameter in (("weights", 1), ("moments", 2)):
        files = sorted(folder.glob(f"{kind}-*.safetensors"))
        assert len(files) > 2
        assert files[-1].name == f"{kind}-{len(files):05d}-of-{len(files):05d}.safetensors"
        tensors = [(name, t) for path in files for name, t in load_file(path).items()]
        assert len(tensors) == len(dict(tensors)) == per_parameter * len(two["stage 3"]["weights"])
        assert {t.dtype for _, t in tensors} == {torch.float32}
        sizes = [path.stat().st_size for path in files]
        assert max(sizes) < 2 * sum(sizes) / len(sizes)


@pytest.mark.parametrize(
    "stage", [0, 2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_frozen_parameters_stay_out(stage: int, alone: Path) -> None:
    untouched, folder = dict(Tiny().named_parameters()), alone / f"frozen {stage}"
    result = train(config(stage), frozen="mlp", save=folder)
    names = {name for name, _ in checkpoint.read_weights(folder)}
    assert names == {name for name in untouched if "mlp" not in name}
    assert result["frozen"].keys() == untouched.keys() - names
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in result["frozen"].items())
    assert not torch.equal(result["weights"]["lm.lm_head.weight"], untouched["lm.lm_head.weight"])
    assert_equal(result, train(config(stage), frozen="mlp", resume=folder, start=SAVED))


def test_checkpoint_of_another_model_is_refused(alone: Path, one: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"has lm\.lm_head\.weight \[65, 32\], this model does not"):
        engine.Engine(Tiny(tie=True), config(2), "cpu", alone / "2")


def test_moments_that_are_missing_are_not_taken_for_zero(alone: Path, one: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(alone / "0", tmp_path / "copy"))
    for path in sorted(folder.glob("moments-*"))[:1]:
        path.unlink()
    with pytest.raises(ValueError, match=r"copy: lacks exp_avg/.*; it is of another model"):
        engine.Engine(Tiny(), config(0), "cpu", folder)


# ----------------------------------------------------------------------------------------------- wide matrix


@pytest.mark.slow
def test_wide_matrix(tmp_path: Path) -> None:
    """Every stage and precision at two ranks: bit-equal resume, every stage from every other's checkpoint."""
    tolerance = {"float32": 1e-6, "bfloat16": 5e-4}
    cases: dict[str, dict[str, Any]] = {}
    for dtype in DTYPES:
        for stage in STAGES:
            key, settings = f"{stage} {dtype}", config(stage, dtype)
            cases[key] = {"settings": settings, "save": tmp_path / key}
            cases[f"resumed {key}"] = {"settings": settings, "resume": tmp_path / key, "start": SAVED, "seed": 9}
    for dtype in DTYPES:
        for stage in STAGES:
            for source in STAGES:
                resume = {"resume": tmp_path / f"{source} {dtype}", "start": SAVED, "seed": 9}
                cases[f"{source} to {stage} {dtype}"] = {"settings": config(stage, dtype)} | resume
    results = on_two_ranks(tmp_path / "ranks", cases)
    for dtype in DTYPES:
        for stage in STAGES:
            assert_equal(results[f"{stage} {dtype}"], results[f"resumed {stage} {dtype}"])
            for source in STAGES:
                ahead, crossed = results[f"{source} {dtype}"], results[f"{source} to {stage} {dtype}"]
                assert crossed["losses"] == pytest.approx(ahead["losses"][SAVED:], abs=tolerance[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizer(stage: int, dtype: str, alone: Path) -> None:
    """Builds DeepSpeed's CPU Adam. The same update as torch's AdamW, and bit-equal resume."""
    settings, folder = config(stage, dtype, offload=True), alone / f"offload {stage} {dtype}"
    result = train(settings, save=folder)
    assert_equal(result, train(settings, resume=folder, start=SAVED, seed=9))
    expected = train(config(stage, dtype))
    assert result["losses"] == pytest.approx(expected["losses"], abs=1e-5 if dtype == "float32" else 2e-3)
