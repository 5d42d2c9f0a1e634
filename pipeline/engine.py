"""DeepSpeed behind four calls: forward, backward, step, parts (to save).

Nobody else imports it, but for `zero`, which starts it, and `optimizer`, which takes its Adam for the host.

    engine = Engine(policy, config, device, resume)
    engine.backward(loss, last=…)  per micro-batch;  engine.step(lr)  per optimizer step

ZeRO stages 0 to 3, float32 or bfloat16 with float32 master weights, any number of ranks, CPU (gloo) and GPU (nccl).
Only parameters with `requires_grad` are trained, saved and loaded.

A checkpoint knows neither stage nor rank count: parameters and their Adam moments are gathered one at a time in float32
and dealt out to the ranks as writers. At the same stage and rank count, to go on from one is bit-equal to not having stopped, where
ranks also sum in the same order: three or more on one machine do so through memory (`shared_memory`), over several as gloo does.

Left out: the learning rate, which comes with each step (`optimizer`), what a loss is (`objectives`), and when to save and
who may (`loop`, `fencing`).
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import checkpoint
from pipeline.config import OptimizerConfig, RunConfig
from pipeline.optimizer import adamw, step_count
from pipeline.pretrained import precision
from pipeline.zero import destroy, initialize, settings_of

MOMENTS = ("exp_avg", "exp_avg_sq")
PART_BYTES = 2**29
"""Weights in one checkpoint file, about: what a rank holds beside its own state while saving (with moments, three times)."""


class Engine:
    """A policy under training, on one rank of the process group. Every method is collective.

    Args:
        policy: any module; moved to `device`, converted to the configuration's precision, and partitioned at stage 3.
        config: scaling, model.dtype and the role's optimizer are read.
        device: this rank's device; torch.distributed has to be initialised.
        resume: a verified checkpoint to go on from. Raises ValueError when it is another model's.
        role: whose optimizer settings it takes, and under which names it saves.
    """

    def __init__(
        self,
        policy: nn.Module,
        config: RunConfig,
        device: torch.device | str,
        resume: Path | None = None,
        role: Literal["policy", "critic"] = "policy",
    ) -> None:
        assert dist.is_initialized(), "an engine lives in a process group"
        self.module = policy
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.steps: int = 0
        self.device = torch.device(device)
        self.optimizer: OptimizerConfig = config.critic.optimizer if role == "critic" else config.optimizer
        self._role, self._prefix = role, "critic-" if role == "critic" else ""
        bf16 = precision(config.model.dtype) == torch.bfloat16
        self._stage, self._clip = config.scaling.zero_stage, self.optimizer.clip
        self._plain = self._stage == 0 and not bf16  # no wrapper: parameters are their own masters, gradients whole
        self._trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self._sizes = {name: p.numel() for name, p in self._trained.items()}
        if resume is not None:
            # Before DeepSpeed copies them: what `_load` does to the masters reaches the weights at the next step only.
            checkpoint.load_into(self._trained, resume, self._prefix)
        optimizer = adamw(self._trained.values(), self.optimizer, config.scaling.offload_optimizer)
        settings = settings_of(config, self._clip, bf16, self.device, sum(self._sizes.values()))
        # Set by Ray; DeepSpeed asks for it also in a process alone, at stage 3 in the first forward again.
        self._alone = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))
        self._engine = initialize(policy, optimizer, settings, self.device)
        if self._plain and self.world == 1:
            self._engine.enable_backward_allreduce = False  # it would copy all gradients there and back, for nobody
        self._inner, self._masters = self._create_state()
        if resume is not None:
            self._load(resume)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The policy's forward, with DeepSpeed's hooks around it."""
        return self._engine(*inputs, **named)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of one micro-batch; `last` ends the step's accumulation and starts its reduction.

        `loss` is already divided by the weight of the whole step (all ranks and micro-batches), so what `step` applies is
        the plain sum of all gradients. The number of calls may vary from step to step, but not between ranks.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        # Stage 3 averages over ranks, and has no switch for sums: take the division back.
        self._engine.backward(loss * self.world if self._stage == 3 else loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Clip, update all weights with this learning rate, clear the gradients. Returns the global norm before clipping.

        Raises FloatingPointError, on all ranks alike and with unchanged weights, when the norm is not finite.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._plain:
            for p in self._trained.values():
                if p.grad is None:  # of a parameter that nothing used: a zero, as among several ranks
                    p.grad = torch.zeros_like(p)
            norm = float(nn.utils.get_total_norm([p.grad for p in self._trained.values()]))
            if math.isfinite(norm):
                too_long = norm / self._clip if self._clip else 0.0
                # Divided by in the update itself, which spares a pass over all gradients.
                self._inner.grad_scale = torch.tensor(too_long, device=self.device) if too_long > 1 else None
                self._engine.step()
        else:
            self._engine.step()  # leaves the weights alone when the norm is not finite
            norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            self._engine.zero_grad()
            raise FloatingPointError(f"the gradient's norm is {norm}; lower optimizer.lr or check this step's rows")
        self.steps += 1
        return norm

    def parts(self, copied: bool = False) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """This rank's share of a checkpoint: (file name, float32 tensors on the CPU), file by file. Collective.

        copied: the tensors do not change when training goes on, and may be kept: 12 bytes a parameter over all ranks. Else
        they are good until the next file is asked for: a rank holds about three times `PART_BYTES` beside its own state.
        """
        parts = self._dealt()
        for first in range(0, len(parts), self.world):
            weights: dict[str, Tensor] = {}
            moments: dict[str, Tensor] = {}
            for owner, names in enumerate(parts[first : first + self.world]):
                for name in names:
                    for key in (None, *MOMENTS):
                        full = self._gather(name, key)  # collective: all ranks come by here
                        if owner == self.rank:
                            target, label = (weights, name) if key is None else (moments, f"{key}/{name}")
                            own = full.to("cpu", torch.float32).contiguous()
                            # What is gathered over ranks is new; a master of this rank's own may be the very one.
                            same = bool(self._masters) and own.data_ptr() == full.data_ptr()
                            target[label] = own.clone() if copied and same else own
            for kind, tensors in (("weights", weights), ("moments", moments)):
                yield self._file(kind, first + self.rank, len(parts)), tensors

    def files(self) -> list[str]:
        """The names of all ranks' files of a checkpoint."""
        count = len(self._dealt())
        return [self._file(kind, part, count) for part in range(count) for kind in ("weights", "moments")]

    def _dealt(self) -> list[list[str]]:
        """Parameters in as many parts as there are ranks, or a multiple: rank r writes parts r, r + world, …"""
        rounds = max(1, math.ceil(4 * sum(self._sizes.values()) / (PART_BYTES * self.world)))
        return checkpoint.deal(self._sizes, rounds * self.world)

    def _file(self, kind: str, part: int, parts: int) -> str:
        return f"{self._prefix}{kind}-{part + 1:05d}-of-{parts:05d}.safetensors"

    def close(self) -> None:
        """Release everything that DeepSpeed holds. Neither the engine nor its policy can be used afterwards."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        destroy(self._engine)
        if self._alone:  # others take it for a launcher's
            os.environ.pop("LOCAL_RANK", None)
        FWD_MODULE_STACK[:] = [m for m in FWD_MODULE_STACK if m is not self.module]  # stage 3 never takes it off
        del self._engine, self._inner, self._masters, self._trained, self.module
        gc.collect()

    # -------------------------------------------------------------------------------------------- state

    def _create_state(self) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
        """Adam's state at step 0 → (the AdamW that steps, at stage 0 the float32 masters by name).

        DeepSpeed would create it in the first step, and at stages 1 and 2 link it for the first parameter group only.
        What its wrappers already did to the optimizer (a step with zero gradients, at stage 0) is forgotten.
        """
        wrapper = self._engine.optimizer
        inner = getattr(wrapper, "optimizer", wrapper)
        flat = getattr(wrapper, "fp32_partitioned_groups_flat", None)  # stage 3; its groups are empty between steps
        masters = [p for group in inner.param_groups for p in group["params"]] if flat is None else flat
        for master in masters:
            moments = {key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS}
            inner.state[master] = {"step": step_count(inner, master, 0), **moments}
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._lazy_init_hp_params_optimizer_state()
        if self._stage > 0:
            return inner, {}
        if self._plain:
            return inner, dict(self._trained)
        pairs = zip(chain(*wrapper.fp16_groups), chain(*wrapper.fp32_groups), strict=True)
        master_of = {id(working): master for working, master in pairs}
        return inner, {name: master_of[id(p)] for name, p in self._trained.items()}

    def _gather(self, name: str, key: str | None) -> Tensor:
        """A parameter's whole float32 master (key None) or moment. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if (master := self._masters.get(name)) is not None:
            return master.detach() if key is None else self._inner.state[master][key]
        p = self._trained[name]
        return safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)

    @torch.no_grad()
    def _scatter(self, name: str, key: str | None, value: Tensor) -> None:
        """The reverse of `_gather`: keep this rank's share of a whole master or moment."""
        from deepspeed import utils

        p, master = self._trained[name], self._masters.get(name)
        if master is not None:
            (master if key is None else self._inner.state[master][key]).copy_(value)
        elif self._stage == 3:
            # safe_set_full_* fails where a parameter's size is no multiple of the rank count: cut the share here.
            share = p.partition_numel()
            padded = nn.functional.pad(value.flatten(), (0, share * self.world - value.numel()))
            own = padded[share * self.rank : share * (self.rank + 1)]
            if key is None:
                utils.safe_set_local_fp32_param(p, own)
            else:
                utils.safe_set_local_optimizer_state(p, own, key)
        elif key is None:
            utils.safe_set_full_fp32_param(p, value)
        else:
            utils.safe_set_full_optimizer_state(p, value, key)

    def _load(self, folder: Path) -> None:
        """Masters, moments and step count of a checkpoint, whose weights are already in the module."""
        for name, tensor in checkpoint.read_tensors(folder, f"{self._prefix}weights"):
            self._scatter(name, None, tensor)
        missing = {f"{key}/{name}": p for name, p in self._trained.items() for key in MOMENTS}
        for name, tensor in checkpoint.read_tensors(folder, f"{self._prefix}moments"):
            if missing.pop(name, None) is None:
                raise checkpoint.Corrupt(f"{folder}: has {name}, this model does not; it is of another model")
            key, _, parameter = name.partition("/")
            self._scatter(parameter, key, tensor)
        if missing:
            raise checkpoint.Corrupt(f"{folder}: lacks {min(missing)}; it is of another model")
        state = checkpoint.read_state(folder)
        self.steps = int(state.get("updates", {}).get(self._role, state["step"]))
        for master, state in self._inner.state.items():
            state["step"] = step_count(self._inner, master, self.steps)
