"""Pickles that leave a trace when they are read: for tests that nothing reads them."""

from __future__ import annotations

import io
import pickle
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import torch


class Bomb:
    """Creates `trace` when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def pickled(trace: Path) -> bytes:
    """Plain pickle."""
    return pickle.dumps({"weight": Bomb(trace)})


def saved(trace: Path) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    torch.save({"lm_head.weight": torch.zeros(2), "x": Bomb(trace)}, buffer)
    return buffer.getvalue()


class Pickled(pa.ExtensionType):
    """Unpickles its values as somebody looks at them, as Ray Data's type for Python objects does."""

    def __init__(self) -> None:
        super().__init__(pa.large_binary(), "tests.pickled")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Pickled:
        return cls()

    def __arrow_ext_scalar_class__(self) -> type:
        return PickledScalar


class PickledScalar(pa.ExtensionScalar):
    def as_py(self, **_: object) -> object:
        return pickle.loads(self.value.as_py())


def armed_column(trace: Path, rows: int, kind: pa.ExtensionType | None = None) -> pa.Array:
    """A column of bombs. kind: the extension type; default: our own, which is registered as an imported library's would be."""
    if kind is None:
        kind = Pickled()
        with suppress(pa.ArrowKeyError):  # it is registered already
            pa.register_extension_type(kind)
    return pa.ExtensionArray.from_storage(kind, pa.array([pickled(trace)] * rows, type=pa.large_binary()))
