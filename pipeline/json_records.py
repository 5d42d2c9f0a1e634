"""JSON bytes to records. What cannot be one gets a short reason without the record's text, so that reasons can be counted.

Left out: files and their lines (`sources`).
"""

from __future__ import annotations

import json
from typing import Any

EXCERPT = 500
"""Characters of a record that the quarantine file shows."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""What Windows programs write at the beginning of a file."""


class _NotFinite(ValueError):
    """NaN or Infinity, which Python's parser would take."""


def _refuse_constant(name: str) -> None:
    raise _NotFinite(name)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _parse_json(data: bytes) -> tuple[Any, str | None]:
    """Any JSON value, or the reason why there is none."""
    try:
        return _DECODER.decode(data.decode("utf-8")), None
    except UnicodeDecodeError:
        return None, "bad UTF-8"
    except json.JSONDecodeError as error:
        return None, f"broken JSON: {error.msg}"
    except _NotFinite:
        return None, "broken JSON: NaN or Infinity"
    except RecursionError:
        return None, "broken JSON: nested too deeply"
    except ValueError:
        return None, "broken JSON: number too long"


def parse_line(data: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The object on a line, or the reason why there is none."""
    value, error = _parse_json(data)
    return (None, error) if error else _checked(value, data)


def parse_array(data: bytes) -> list[tuple[dict[str, Any] | None, str | None, str]]:
    """Elements of a file that is one array. It is one JSON value: broken anywhere, it counts as one broken record."""
    value, error = _parse_json(data.removeprefix(BYTE_ORDER_MARK))
    if error:
        return [(None, error, excerpt(data))]
    assert isinstance(value, list), "a file that begins with [ is an array or broken"
    return [(*_checked(element, data), excerpt(element)) for element in value]


def _checked(value: Any, data: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """`value`, parsed from `data`, if it is an object whose strings can be encoded again."""
    if not isinstance(value, dict):
        return None, "not a JSON object"
    if b"\\ud" in data or b"\\uD" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return None, "bad Unicode: half of a surrogate pair"
    return value, None


def excerpt(value: Any) -> str:
    """The beginning of a record, of the bytes of a line or of a parsed value."""
    if isinstance(value, bytes):
        return value[: 4 * EXCERPT].decode("utf-8", "replace").strip()[:EXCERPT]
    return json.dumps(value, default=str)[:EXCERPT]
