"""bfloat16 on x86 processors without a matrix unit (AMX): products and attention in float32, rounded once.

Where there is none, torch multiplies bfloat16 at two thirds of float32's speed (with AVX512-BF16) or at a sixth of it (emulated).
A product of two bfloat16 numbers is exact in float32, and its sums are float32 in either case: what is widened, multiplied and
rounded at the end differs by the order of a sum.

Left out: other devices and processors, and products of few rows, which cost what reading their weights costs.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW = 32
"""Rows from which on a product is widened: below, as in decoding, it would read its weights three times instead of once. An output
head's always is: what a row's log-probs are must not depend on how many there are beside it."""


def attach(lm: nn.Module) -> None:
    """Make a model's linear layers widen what they multiply, and its output head leave logits in float32; calling it again changes
    nothing."""
    head = lm.get_output_embeddings()
    for module in lm.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.forward = _Widened(module, rounds=module is not head)


def widens(x: Tensor) -> bool:
    """Whether products of `x` are to be computed in float32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and _no_matrix_unit()


def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has a unit that multiplies matrices of bfloat16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@cache
def _no_matrix_unit() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and not multiplies_bfloat16()


class _Widened:
    """In place of the `forward` of a linear layer."""

    def __init__(self, module: nn.Linear, rounds: bool) -> None:
        self._module, self._rounds = module, rounds

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self._module.weight, self._module.bias
        few = self._rounds and x.shape[:-1].numel() < FEW
        if few or not (widens(x) and widens(weight)):
            return nn.Linear.forward(self._module, x)
        return _Linear.apply(x, weight, bias, self._rounds)


class _Linear(torch.autograd.Function):
    """x · weightᵀ + bias of bfloat16: [..., D], [E, D], [E] or None → [..., E], bfloat16 where it `rounds`, else float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rounds: bool) -> Tensor:
        ctx.save_for_backward(x, weight)  # the parameter itself: ZeRO-3 fills it again before the backward pass
        out = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return out.to(x.dtype) if rounds else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        grad = grad.float()
        rows = grad.reshape(-1, grad.shape[-1])
        by_x = (grad @ weight.float()).to(x.dtype) if for_x else None
        by_weight = (rows.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype) if for_weight else None
        return by_x, by_weight, rows.sum(0).to(weight.dtype) if for_bias else None, None
