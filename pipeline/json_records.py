"""JSON bytes to records. What cannot be one gets a short reason without the record's text, so that reasons can be counted.

Left out: files and their lines (`sources`).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

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
    except (ValueError, RecursionError) as error:
        return None, _why(error)


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "bad UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg}"
    if isinstance(error, _NotFinite):
        return "broken JSON: NaN or Infinity"
    return f"broken JSON: {'nested too deeply' if isinstance(error, RecursionError) else 'number too long'}"


def parse_line(data: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The object on a line, or the reason why there is none."""
    value, error = _parse_json(data)
    return (None, error) if error else _checked(value, b"\\ud" in data or b"\\uD" in data)


def too_large(most: int) -> str:
    """Why a record is not even parsed."""
    return f"larger than data.max_record_bytes ({most:,} bytes)"


class BrokenArray(ValueError):
    """A file that begins like an array and is none: why."""


Element = tuple[dict[str, Any] | None, str | None, str]
"""An array's element, or why it is no record; and its beginning."""


def array_elements(stream: BinaryIO, most: int) -> Iterator[Element]:
    """Elements of a file that is one array; memory holds one at a time, and of one larger than `most` bytes only its beginning.

    Raises BrokenArray where the file turns out not to be JSON, behind the elements before.
    """
    text = _Window(stream)
    if text.next_character() != "[":
        raise BrokenArray("broken JSON: Expecting value")
    text.place += 1
    first = True
    while not (first and text.next_character() == "]"):
        first = False
        text.next_character()
        yield _element(text, most)
        if (mark := text.next_character()) not in (",", "]"):
            raise BrokenArray("broken JSON: Expecting ',' delimiter")
        if mark == "]":
            break
        text.place += 1
    text.place += 1
    if text.next_character():
        raise BrokenArray("broken JSON: Extra data")


class _Window:
    """Text of a stream from `place` on, as far as it has been read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.place, self.ended = "", 0, False

    def more(self) -> None:
        """Read on, twice as far each time: what is parsed again from its beginning stays linear in its length."""
        block = self._stream.read(max(_BLOCK, len(self.text) - self.place))
        self.ended = not block
        try:
            self.text = self.text[self.place :] + self._decoder.decode(block, self.ended)
        except UnicodeDecodeError:
            raise BrokenArray("bad UTF-8") from None
        self.place = 0

    def next_character(self) -> str:
        """The next one that is no white space, at `place`; empty at the end."""
        while True:
            self.place = _SPACE.match(self.text, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self.text):
                return self.text[self.place]
            if self.ended:
                return ""
            self.more()


_BLOCK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_MARK = re.compile(r'["\[\]{},]')
_IN_STRING = re.compile(r'["\\]')
_NEAR = 16
"""Longer than any literal or escape: an error further from the end than this is one, and not text that has not been read yet."""


def _element(text: _Window, most: int) -> Element:
    """The element at the window's place, which moves behind it."""
    while True:
        try:
            value, end = _DECODER.raw_decode(text.text, text.place)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated") or error.pos > len(text.text) - _NEAR
            if text.ended or not cut:
                raise BrokenArray(f"broken JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise BrokenArray(_why(error)) from None
        else:
            if end < len(text.text) or text.ended:
                break
        if len(text.text) - text.place > most:
            beginning = text.text[text.place : text.place + EXCERPT]
            _skip(text)
            return None, too_large(most), beginning
        text.more()
    raw = text.text[text.place : end]
    text.place = end
    if len(raw) > most or (4 * len(raw) > most and len(raw.encode("utf-8", "surrogatepass")) > most):
        return None, too_large(most), raw[:EXCERPT]
    return *_checked(value, "\\ud" in raw or "\\uD" in raw), excerpt(value)


def _skip(text: _Window) -> None:
    """Move behind an element without keeping it: up to the comma or bracket that follows."""
    depth, quoted = 0, False
    while True:
        found = (_IN_STRING if quoted else _MARK).search(text.text, text.place)
        if found is None or (quoted and found.group() == "\\" and found.end() == len(text.text)):
            text.place = len(text.text) if found is None else found.start()
            text.more()
            if text.ended:
                raise BrokenArray("broken JSON: Unterminated element")
            continue
        mark, text.place = found.group(), found.end()
        if quoted:
            quoted = mark != '"'
            text.place += mark == "\\"
        elif mark == '"':
            quoted = True
        elif depth == 0 and mark in ",]}":
            text.place = found.start()
            return
        elif mark != ",":
            depth += 1 if mark in "[{" else -1


def _checked(value: Any, escaped: bool) -> tuple[dict[str, Any] | None, str | None]:
    """`value` if it is an object whose strings can be encoded again. escaped: it may have been written with `\\ud…`."""
    if not isinstance(value, dict):
        return None, "not a JSON object"
    if escaped:
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
