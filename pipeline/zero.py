"""DeepSpeed as an engine starts it: imported without what it would drag in, quiet, told the stage and little else.

Left out: everything after the start (`engine`).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.pretrained import precision
from pipeline.shared_memory import SharedMemory

PERSISTENT_NUMEL = 100_000
"""ZeRO-3 keeps parameters below this size gathered between uses: partitioning them costs more time than it saves memory."""
BUCKET_NUMEL = 200_000_000
"""Gradient elements reduced at a time, at most."""
SHARED_BYTES = 2**16
"""Smaller tensors go through sockets also where processes have memory together: that is as fast."""


def unshared(config: RunConfig, workers: int) -> RunConfig:
    """As so many workers train by it. One without offload has nothing to share: at stage 0, float32 is spared ZeRO's flat copies.
    bfloat16 needs stage 1, which sums gradients in float32, and is spared the buckets of those above."""
    scaling, bf16 = config.scaling, precision(config.model.dtype) == torch.bfloat16
    if workers > 1 or scaling.offload_optimizer:
        return config
    stage = min(scaling.zero_stage, 1 if bf16 else 0)
    return config.model_copy(update={"scaling": scaling.model_copy(update={"zero_stage": stage})})


def settings_of(config: RunConfig, clip: float | None, bf16: bool, device: torch.device, numel: int) -> dict[str, Any]:
    """What DeepSpeed is told."""
    stage = config.scaling.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": min(BUCKET_NUMEL, numel),
        "stage3_param_persistence_threshold": PERSISTENT_NUMEL,
        # True does not scatter at stages 1 and 2: it sums the whole bucket, too, but in a copy.
        "reduce_scatter": stage == 3,
    }
    if config.scaling.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # a formality: micro-batches vary, and `Engine.backward` divides by nothing
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        # At stage 1 DeepSpeed adds what a parameter's `grad` holds to the float32 sum after each micro-batch, and clears it before the
        # next one only if it found tensors in the forward's output: the first of n would count n times. Immediately, it is added
        # and gone.
        "bf16": {"enabled": bf16, "immediate_grad_update": True},
        "communication_data_type": "fp32",
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",  # see `Engine.backward`
        "data_types": {"grad_accum_dtype": "fp32" if stage > 0 else None},  # stage 0 knows only the working type
        "gradient_clipping": (clip or 0.0) if stage > 0 or bf16 else 0.0,  # `Engine.step` clips
        "steps_per_print": None,
    }


def import_deepspeed() -> Any:
    """DeepSpeed, without the MLflow that its autotuner would import: half of the time that importing it takes."""
    absent = "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # to Python: not installed
    try:
        import deepspeed
    finally:
        if absent:
            del sys.modules["mlflow"]
    return deepspeed


def initialize(policy: nn.Module, optimizer: torch.optim.Optimizer, settings: dict, device: torch.device) -> Any:
    """DeepSpeed's engine on this device, quietly, and with nothing left of an earlier process group."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # it would take a GPU wherever there is one
    deepspeed = import_deepspeed()
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import groups, logger

    # At stage 3 it also warns that it sees no tensors in our batches: it need not, the layers within have its hooks.
    logger.setLevel(logging.ERROR if settings["zero_optimization"]["stage"] == 3 else logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    # Otherwise its communication layer compiles a shared-memory kernel (for inference) on first use.
    deepspeed.ops.__compatible_ops__ = {}
    if groups._WORLD_GROUP is not None:
        try:
            dist.get_global_rank(groups._WORLD_GROUP, 0)
        except ValueError:  # destroyed since: this process has joined another group
            groups._release_process_group_references()
    bf16_optimizer.see_memory_usage = lambda *_, **__: None  # stage 1 in bfloat16 prints a table at every move
    _talk_through_sockets()
    engine = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)[0]
    if device.type == "cpu" and dist.get_world_size() > 1:
        memory = SharedMemory.open()
        if memory is not None:
            _talk_through(memory)
    return engine


def destroy(engine: Any) -> None:
    """Release what the engine holds, and the memory that its processes had together."""
    _talk_through_sockets()
    engine.destroy()


def _talk_through_sockets() -> None:
    from deepspeed.comm import comm

    for name in ("all_reduce", "all_gather_into_tensor") if comm.cdb is not None else ():
        vars(comm.cdb).pop(name, None)


def _talk_through(memory: SharedMemory) -> None:
    """Have DeepSpeed sum and gather large tensors of the whole group in `memory`, all others through torch.distributed."""
    from deepspeed.comm import comm

    backend = comm.cdb
    sums, gathers = backend.all_reduce, backend.all_gather_into_tensor

    def fits(tensor: Tensor, group: Any, async_op: bool) -> bool:
        whole = dist.get_world_size(group) == memory.world
        large = tensor.numel() * tensor.element_size() >= SHARED_BYTES
        return whole and large and not async_op and tensor.is_contiguous() and tensor.device.type == "cpu"

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if fits(tensor, group, async_op) and backend._reduce_op(op) == dist.ReduceOp.SUM:
            return memory.all_reduce(tensor)
        return sums(tensor, op, group, async_op)

    def all_gather_into_tensor(
        output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if fits(input_tensor, group, async_op) and fits(output_tensor, group, async_op):
            return memory.all_gather(output_tensor, input_tensor)
        return gathers(output_tensor, input_tensor, group, async_op)

    backend.all_reduce, backend.all_gather_into_tensor = all_reduce, all_gather_into_tensor
