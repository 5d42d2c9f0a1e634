"""Every objective's configuration as it ships, on a tiny model: trained, resumed, exported, evaluated.

`--local` for all; one of each kind of data through Ray Train as well.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from jobs.cli import main
from pipeline import checkpoint
from pipeline.config import RunConfig
from pipeline.config_file import load
from pipeline.driver import fit
from pipeline.objectives import OBJECTIVES
from pipeline.progress import METRICS_FILE, read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def shipped(name: str, tiny_model: Path, storage: Path, *overrides: str) -> RunConfig:
    """jobs/configs/<name>.yaml on the tiny model, which has a token per byte."""
    tiny = (f"model.path={tiny_model}", f"storage={storage}", "model.dtype=float32", "data.max_length=500")
    short = ("train.max_steps=4", "checkpoint.every=2", "tracking.enabled=false")
    return load(ROOT / "jobs" / "configs" / f"{name}.yaml", [*tiny, *short, *overrides])


def state(run: Path) -> dict[str, torch.Tensor]:
    """Weights of all networks in the newest checkpoint."""
    newest = checkpoint.latest(run)
    assert newest is not None
    assert newest.name == "step-00000004"
    kinds = ("weights", "moments", "critic-weights", "critic-moments")
    return {f"{kind}/{name}": t for kind in kinds for name, t in checkpoint.read_tensors(newest, kind)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_trains_resumes_to_the_bit_and_is_evaluated(
    name, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    whole = fit(shipped(name, tiny_model, tmp_path / "whole"), local=True)
    lines = read_metrics(whole.run / METRICS_FILE)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values()), line
        assert any(line.get(norm, 0) > 0 for norm in ("grad_norm", "critic/grad_norm")), "something is learned"
    for metric, value in lines[-1].items():
        if metric.startswith("eval/"):
            assert metric.removeprefix("eval/") in lines[-1], f"{metric} is logged in training, too"
            assert math.isfinite(value)

    # Stopped after step 2, by a crash, and started again.
    import pipeline.loop as loop

    real, calls = loop.train_step, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", dies)
    broken = shipped(name, tiny_model, tmp_path / "broken")
    with pytest.raises(RuntimeError, match="killed"):
        fit(broken, local=True)
    monkeypatch.setattr(loop, "train_step", real)
    resumed = fit(broken, local=True)
    before, after = state(whole.run), state(resumed.run)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())

    capfd.readouterr()
    tiny = [f"model.path={tiny_model}", f"storage={tmp_path / 'whole'}", "model.dtype=float32", "data.max_length=500"]
    short = ["train.max_steps=4", "tracking.enabled=false"]
    assert main(["eval", f"jobs/configs/{name}.yaml", "--local", *tiny, *short]) == 0
    told = capfd.readouterr().out
    values = {line.split()[0]: float(line.split()[1]) for line in told.splitlines() if line.startswith("eval/")}
    assert values["eval/loss"] == pytest.approx(lines[-1]["eval/loss"], rel=0.05, abs=0.02), "the export is rounded"


@pytest.mark.ray
@pytest.mark.parametrize("name", ["plackett_luce", "dqo"])
def test_it_trains_on_ray_as_it_does_alone(name, tiny_model: Path, tmp_path: Path, ray_cluster, monkeypatch) -> None:
    """A ranking, and a trajectory with a critic; pairs are in test_train_on_ray."""
    monkeypatch.chdir(ROOT)
    alone = fit(shipped(name, tiny_model, tmp_path / "alone"), local=True)
    both = fit(shipped(name, tiny_model, tmp_path / "both", "scaling.workers=2", "scaling.cpus_per_worker=1"))
    for one, two in zip(read_metrics(alone.run / METRICS_FILE), read_metrics(both.run / METRICS_FILE), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3, abs=2e-5)
    weights = state(alone.run)
    assert any(key.startswith("critic-") for key in weights) == (name == "dqo")
    for key, tensor in state(both.run).items():
        if "weights" in key:
            torch.testing.assert_close(tensor, weights[key], atol=5e-4, rtol=1e-3)
