"""AdamW and its learning rate, on any device: torch's, or DeepSpeed's on the host's processors.

Left out: gradients, their norm, and the sharding of the optimizer's state (`engine`).
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError, OptimizerConfig

logger = logging.getLogger(__name__)

BUILD_SECONDS = 900
"""No build of DeepSpeed's CPU Adam takes longer; a lock that is older guards nothing."""


def lr_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`.

    Rises linearly over the warm-up w (never 0: the first step is not wasted), is `lr` at step w, then falls towards
    `final_lr_fraction` · lr, which it would reach at step `total_steps`.
    """
    warmup = round(config.warmup_fraction * total_steps) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    held = total_steps - config.decay_fraction * total_steps
    shape = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "hold_decay": min(1.0, max(0.0, total_steps - step) / max(1e-9, total_steps - held)),
    }[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.final_lr_fraction
    return config.lr * (floor + (1.0 - floor) * shape)


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerConfig, offload: bool) -> torch.optim.Optimizer:
    """AdamW in two groups: no weight decay on biases and norm vectors. The learning rate comes with each step."""
    kept = list(parameters)
    matrices, vectors = [p for p in kept if p.dim() >= 2], [p for p in kept if p.dim() < 2]
    decays = ((matrices, settings.weight_decay), (vectors, 0.0))
    groups = [{"params": members, "weight_decay": decay} for members, decay in decays if members]
    if offload:
        check_offload()
        _drop_stale_build_lock()
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=0.0, betas=settings.betas, eps=settings.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def step_count(optimizer: torch.optim.Optimizer, master: Tensor, steps: int) -> Tensor | int:
    """The number of steps, in the type that this optimizer keeps it in."""
    if isinstance(optimizer, torch.optim.AdamW):
        return torch.tensor(float(steps), device=master.device)
    return steps  # DeepSpeedCPUAdam


def check_offload() -> None:
    """Raises ConfigError unless this machine can build DeepSpeed's CPU Adam (happens once, at the first use)."""
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    found = {"a C++ compiler": any(map(shutil.which, compilers)), "ninja": shutil.which("ninja") is not None}
    if missing := [name for name, there in found.items() if not there]:
        needs = " and ".join(missing)
        raise ConfigError(
            f"scaling.offload_optimizer: needs {needs}; install it or set scaling.offload_optimizer=false"
        )


def _drop_stale_build_lock() -> None:
    """A build that was killed leaves its lock behind, and every later build waits for it without end."""
    from torch.utils.cpp_extension import get_default_build_root

    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root())).glob("**/cpu_adam/lock"):
        if time.time() - lock.stat().st_mtime > BUILD_SECONDS:
            logger.warning("%s: left by a build that was killed; removed", lock)
            lock.unlink(missing_ok=True)
