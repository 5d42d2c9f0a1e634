"""Lines of JSON in files of any size: cut into pieces, and read, with the memory of one record.

A line larger than a bound is passed over in blocks, never held: what a file unpacks to, or a line's length, can fill no memory.

Left out: what a line holds (`json_records`), and finding and opening files (`files`).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from fsspec.spec import AbstractBufferedFile

from pipeline.files import compression, open_binary
from pipeline.json_records import BYTE_ORDER_MARK, EXCERPT, excerpt, parse_line, too_large

BLOCK = 1 << 20
"""Bytes that are read at a time of what is not kept."""
# A line that holds nothing but white space; the lookahead leaves its end to be the next line's beginning.
_BLANK_LINE = re.compile(rb"\n[ \t\r\x0b\x0c]*(?=\n)")
_BLANK_START = re.compile(rb"[ \t\r\x0b\x0c]*\n")

Part = tuple[int, dict[str, Any] | None, str | None, str]
"""Line, value, error, excerpt."""


class Refused:
    """Which lines of a file are too large: where there are some, the bound changes what the file holds."""

    def __init__(self, most: int) -> None:
        self.most, self._places, self._any = most, hashlib.blake2b(digest_size=8), False

    def note(self, place: int) -> None:
        self._places.update(f"{place},".encode())
        self._any = True

    def name(self) -> list[str]:
        return [self._places.hexdigest()] if self._any else []


def cut_lines(path: str, chunk_bytes: int, content: Any, refused: Refused) -> Iterator[tuple[int, int, int, int]]:
    """start, stop, first line and number of records of pieces that end with a line; the bytes are fed to the hash `content`."""
    start, line = 0, 1
    with _open(path) as stream:
        while block := stream.read(chunk_bytes):
            content.update(block)
            lines = block.count(b"\n")
            blank = len(_BLANK_LINE.findall(block)) + (_BLANK_START.match(block) is not None)
            for place in _long_lines(block, refused.most):
                refused.note(start + place)
            length, last = len(block), block[block.rfind(b"\n") + 1 :]
            if last:  # the block ends within a line, whose rest is looked at and not kept
                size, empty, piece = len(last), not last.strip(), last
                while not piece.endswith(b"\n") and (piece := stream.readline(BLOCK)):
                    content.update(piece)
                    size, empty = size + len(piece), empty and not piece.strip()
                length += size - len(last)
                lines, blank = lines + 1, blank + empty
                if size - piece.endswith(b"\n") > refused.most and not empty:
                    refused.note(start + len(block) - len(last))
            yield start, start + length, line, lines - blank
            start += length
            line += lines


def _long_lines(block: bytes, most: int) -> Iterator[int]:
    """Places of whole lines with more than `most` bytes, blank ones left out; a few looks where lines are short."""
    start = 0
    while len(block) - start > most:
        end = block.rfind(b"\n", start, start + most + 1)
        if end < 0:
            end = block.find(b"\n", start + most + 1)
            if end < 0:
                return
            if block[start:end].strip():
                yield start
        start = end + 1


def read_lines(path: str, start: int, stop: int, number: int, most: int) -> Iterator[Part]:
    """What the lines between two places hold; `number` is the first one's. Blank ones are left out."""
    with _open(path) as stream:
        if not compression(path):
            stream.seek(start)
        position = start
        while position < stop and (line := stream.readline(most + 1)):
            size, empty, piece = len(line), not line.strip(), line
            if whole := size <= most or line.endswith(b"\n"):
                line = line if position else line.removeprefix(BYTE_ORDER_MARK)
            else:
                line = line[: 4 * EXCERPT]
            while not whole and not piece.endswith(b"\n") and (piece := stream.readline(BLOCK)):
                size, empty = size + len(piece), empty and not piece.strip()
            if not empty:
                yield number, *(parse_line(line) if whole else (None, too_large(most))), excerpt(line)
            position += size
            number += 1


def _open(path: str) -> BinaryIO:
    """A stream that gives a line in pieces. (Those of some file systems give it whole only.)"""
    stream = open_binary(path)
    return io.BufferedReader(stream) if isinstance(stream, AbstractBufferedFile) else stream  # type: ignore[type-var]
