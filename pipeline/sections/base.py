"""What all sections of the configuration share: strictness, ranges, and the error about mistakes in them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

FLOAT32_SMALLEST, FLOAT32_LARGEST = 1.1754944e-38, 3.4028235e38
"""Positive numbers that float32 holds in full precision lie between them."""
INT64_LARGEST = 2**63 - 1


def representable(value: Any) -> Any:
    """The value itself. Raises ValueError for a number, alone or in a list, that training could not compute with: an integer
    beyond 64 bits, or a number so large or so close to zero that float32 makes it infinite or loses it."""
    for number in value if isinstance(value, tuple | list) else [value]:
        if isinstance(number, int) and abs(number) > INT64_LARGEST:
            raise ValueError("does not fit 64 bits; take a smaller number")
        if isinstance(number, float) and number and not FLOAT32_SMALLEST <= abs(number) <= FLOAT32_LARGEST:
            raise ValueError(f"{number:g} is beyond float32 ({FLOAT32_SMALLEST:.2g} … {FLOAT32_LARGEST:.2g})")
    return value


class Section(BaseModel):
    """A part of the configuration: frozen, and refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    _numbers = field_validator("*")(representable)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Copies = Annotated[int, Field(ge=1, le=100_000)]
"""How often something is done for each prompt: far beyond what anyone waits for, and yet a list of them fits the memory."""
Name = Annotated[str, Field(min_length=1)]
LONGEST_PART, LONGEST_PATH = 255, 3000
"""Bytes of one name and of a whole path that file systems take; beneath the path there has to be room for what a run writes."""


def _printable(text: str) -> str:
    if found := re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text):
        raise ValueError(f"holds the control character {found.group()!r}; remove it")
    return text


def _place(path: str) -> str:
    """Raises ValueError where no file system or server has such a place."""
    _printable(path)
    if len(path.encode()) > LONGEST_PATH:
        raise ValueError(f"has {len(path.encode()):,} bytes; shorten it to {LONGEST_PATH:,}")
    longest = 0 if "://" in path else max(len(part.encode()) for part in path.split("/"))
    if longest > LONGEST_PART:
        raise ValueError(f"has a name of {longest:,} bytes in it; shorten it to {LONGEST_PART}")
    return path


Place = Annotated[str, Field(min_length=1), AfterValidator(_place)]
"""A file, a folder, a URL, or the name of a model or of data."""
Title = Annotated[str, Field(min_length=1, max_length=250), AfterValidator(_printable)]
"""What people and servers know a thing by."""
ModelName = Annotated[Title, Field(pattern=r"^[^/:]*$")]
"""What MLflow takes as the name of a registered model."""
Precision = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "sdpa", "eager", "flex_attention"]
