"""Engine: the same update whatever the stage, rank count and micro-batches; checkpoints that change nothing.

World size 1 runs in this process, world size 2 in two spawned ones (gloo), all their cases in one go.
"""

from __future__ import annotations

import gc
import math
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from pipeline import checkpoint, engine
from pipeline.optimizer import adamw, lr_at
from tests.engine_runs import (
    DTYPES,
    SAVED,
    SCALE,
    STAGES,
    STEPS,
    Tiny,
    config,
    on_two_ranks,
    rows,
    shrink,
    train,
    warm_up,
)


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
        loss = policy(rows(step)).loss / SCALE
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(policy.parameters(), 0.5).item())
        for group in adam.param_groups:
            group["lr"] = lr_at(step, STEPS, settings)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": {n: p.detach() for n, p in named.items()}}


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
            loss = trainer(rows(0)).loss / SCALE
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


def test_a_step_that_needs_no_clipping_after_one_that_did(alone: Path) -> None:
    trainer, policy = engine.Engine(Tiny(), config(0), "cpu"), Tiny()
    optimizer = adamw(policy.parameters(), config(0).optimizer, offload=False)
    for part in (1.0, 1e-3):
        loss = trainer(rows(0)).loss / SCALE * part
        trainer.backward(loss, last=True)
        norm = trainer.step(1e-2)
        (policy(rows(0)).loss / SCALE * part).backward()
        assert norm == pytest.approx(nn.utils.clip_grad_norm_(policy.parameters(), 0.5).item(), rel=1e-5)
        assert (norm > 0.5) == (part == 1.0)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
        optimizer.step()
        optimizer.zero_grad()
    for name, expected in policy.named_parameters():
        torch.testing.assert_close(trainer.module.get_parameter(name), expected, atol=1e-6, rtol=1e-5, msg=name)
    trainer.close()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_same_update_whatever_stage_ranks_and_micro_batches(
    stage: int, one: dict[str, Any], two: dict[str, Any]
) -> None:
    for other in (one[f"stage {stage}"], two[f"stage {stage}"], two[f"micro {stage}"]):
        assert other["norms"] == pytest.approx(one["stage 0"]["norms"], rel=1e-5)
        assert_close(other, one["stage 0"], 2e-6, 2e-5)


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_micro_batches_add_up_in_bfloat16(stage: int, alone: Path) -> None:
    whole, cut = (train(config(stage, "bfloat16"), micro=(pieces,)) for pieces in (1, 4))
    assert cut["norms"] == pytest.approx(whole["norms"], rel=0.03)
    assert cut["losses"] == pytest.approx(whole["losses"], rel=0.01)


@pytest.mark.parametrize("frozen", [None, "mlp", "lm."])
def test_widened_products_of_partitioned_weights(frozen: str | None, alone: Path) -> None:
    """Of frozen ones as well, in layers between which a gradient passes, or with nothing but a bias left to learn."""
    whole, parted = (train(config(stage, "bfloat16", clip=None), frozen=frozen) for stage in (1, 3))
    assert parted["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    assert parted["norms"] == pytest.approx(whole["norms"], rel=1e-3)
    for name, tensor in whole["weights"].items():
        torch.testing.assert_close(parted["weights"][name], tensor, atol=1e-6, rtol=0, msg=name)


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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (2, "float32"), (3, "float32"), *((stage, "bfloat16") for stage in STAGES)]
)
def test_non_finite_gradient_is_refused(stage: int, dtype: str, bad: float, alone: Path) -> None:
    trainer = engine.Engine(Tiny(), config(stage, dtype), "cpu")
    before = {name: trainer._gather(name, None).clone() for name in trainer._trained}
    trainer.backward(trainer(rows(0)).loss * bad, last=True)
    with pytest.raises(FloatingPointError, match=r"^the gradient's norm is (nan|inf); .*$"):
        trainer.step(1.0)
    assert all(torch.equal(trainer._gather(name, None), tensor) for name, tensor in before.items())
    loss = trainer(rows(0)).loss
    trainer.backward(loss / SCALE, last=True)
    assert math.isfinite(trainer.step(1e-2))
    assert trainer.steps == 1
    assert trainer(rows(0)).loss < loss
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
