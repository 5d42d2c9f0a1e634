"""The matrix products of a step: recorded as they happen, then timed alone at their shapes, layouts and number formats.

Products inside attention kernels are counted as what they are: QKᵀ and PV forward, and five in the backward pass (both
again for the probabilities, and the gradients of P, V, Q and K). A causal kernel skips half of each.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MATRIX_OPERANDS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Operation → position of the first of its two matrices."""
REPEATS, SECONDS = 5, 0.1
"""Each product is repeated at least so often and so long; its least time counts."""


class Layout(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tuple(tensor.shape), tuple(tensor.stride()))


class Product(NamedTuple):
    """One kind of matrix product, and what share of it is really computed."""

    left: Layout
    right: Layout
    dtype: torch.dtype
    share: float = 1.0


class Recorder(TorchDispatchMode):
    """Counts every matrix product below autograd while it is active, those of backward passes too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in MATRIX_OPERANDS:
            left, right = args[MATRIX_OPERANDS[name] :][:2]
            self.calls[Product(Layout.of(left), Layout.of(right), left.dtype)] += 1
        elif name.startswith("_scaled_dot_product_") and "attention" in name:
            self.calls.update(_of_attention(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _of_attention(func: Any, args: Any, kwargs: Any) -> list[Product]:
    """The products of one attention kernel. Its tensors are [B, H, T, D], in a backward pass behind the gradient."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    query, key, value = given["query"], given["key"], given["value"]
    heads, (rows, keys) = query.shape[0] * query.shape[1], (query.shape[2], key.shape[2])
    share = 0.5 if given.get("is_causal") else 1.0

    def product(height: int, inner: int, width: int) -> Product:
        left, right = (heads, height, inner), (heads, inner, width)
        return Product(_dense(left), _dense(right), query.dtype, share)

    scores, mixed = product(rows, query.shape[3], keys), product(rows, keys, value.shape[3])
    if not func.overloadpacket.__name__.endswith("backward"):
        return [scores, mixed]
    by_probability = product(rows, value.shape[3], keys)
    by_query, by_key = product(rows, keys, query.shape[3]), product(keys, rows, query.shape[3])
    return [scores, by_probability, by_query, by_key, product(keys, rows, value.shape[3])]


def _dense(shape: tuple[int, int, int]) -> Layout:
    return Layout(shape, (shape[1] * shape[2], shape[2], 1))


def seconds_alone(calls: Counter[Product]) -> dict[str, Any]:
    """The time of all these products one after another, and the dearest of them."""
    rows = []
    for product, count in calls.items():
        seconds = _time(product) * product.share
        shape = f"{list(product.left.shape)} × {list(product.right.shape)}"
        rows.append({"shape": shape, "dtype": str(product.dtype), "calls": count, "seconds": count * seconds})
    rows.sort(key=lambda row: -row["seconds"])
    total = sum(row["seconds"] for row in rows)
    return {"seconds": total, "calls": calls.total(), "distinct": len(rows), "dearest": rows[:12]}


@torch.no_grad()
def _time(product: Product) -> float:
    """Seconds of one product with warm caches and its result's memory at hand."""
    left, right = (_filled(layout, product.dtype) for layout in (product.left, product.right))
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    out = multiply(left, right)
    best, spent, repeats = float("inf"), 0.0, 0
    while repeats < REPEATS or spent < SECONDS:
        started = time.perf_counter()
        multiply(left, right, out=out)
        seconds = time.perf_counter() - started
        best, spent, repeats = min(best, seconds), spent + seconds, repeats + 1
    return best


def _filled(layout: Layout, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty_strided(layout.shape, layout.stride, dtype=dtype)
    # A broadcast operand has strides of 0: filled through its own memory.
    memory = tensor.untyped_storage().nbytes() // tensor.element_size()
    torch.as_strided(tensor, (memory,), (1,)).normal_()
    return tensor
