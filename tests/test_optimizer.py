"""Learning rates by hand, and what building DeepSpeed's Adam may run into. (`test_engine` trains with both Adams.)"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import torch

from pipeline import optimizer
from pipeline.config import ConfigError, OptimizerConfig
from pipeline.optimizer import check_offload, lr_at


def test_learning_rate_by_hand() -> None:
    cosine = OptimizerConfig(lr=1.0, warmup_steps=3, final_lr_fraction=0.2)
    assert [lr_at(i, 11, cosine) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_at(7, 11, cosine) == pytest.approx(0.6)  # half way from 3 to 11: (1 + 0.2) / 2
    assert lr_at(5, 11, cosine) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_at(11, 11, cosine) == pytest.approx(0.2)
    linear = OptimizerConfig(lr=2.0, schedule="linear", warmup_fraction=0.2)  # 10 steps: 2 of warm-up
    assert [lr_at(i, 10, linear) for i in (0, 1, 2, 4, 6, 9)] == pytest.approx([2 / 3, 4 / 3, 2, 1.5, 1, 0.25])
    constant = OptimizerConfig(lr=3.0, schedule="constant", warmup_steps=0, final_lr_fraction=0.1)
    assert {lr_at(i, 5, constant) for i in range(6)} == {3.0}
    assert lr_at(0, 1, OptimizerConfig(lr=1.0)) == 1.0


def test_offload_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"^scaling\.offload_optimizer: needs a C\+\+ compiler and ninja; .*=false$"):
        check_offload()
    for name in ("g++", "ninja"):
        (tmp_path / name).touch(0o755)
    check_offload()


def test_a_lock_that_a_killed_build_left_does_not_block_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    optimizer._drop_stale_build_lock()
    assert lock.exists()  # somebody may be building now
    os.utime(lock, (time.time() - optimizer.BUILD_SECONDS - 1,) * 2)
    optimizer._drop_stale_build_lock()
    assert not lock.exists()


def test_biases_and_norms_do_not_decay() -> None:
    """Their gradient is 0: what moves them is decay alone."""
    matrix, norm, bias = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (2,)))
    made = optimizer.adamw([matrix, norm, bias], OptimizerConfig(lr=1.0, weight_decay=0.25), offload=False)
    for group in made.param_groups:
        group["lr"] = 1.0
    for p in (matrix, norm, bias):
        p.grad = torch.zeros_like(p)
    made.step()
    assert torch.equal(matrix.detach(), torch.full((2, 2), 0.75))
    assert torch.equal(norm.detach(), torch.ones(2)) and torch.equal(bias.detach(), torch.ones(2))
