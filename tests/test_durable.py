"""Files are whole or not there, whoever is killed while writing and however full the disk is."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from pipeline import durable
from pipeline.durable import Corrupt, append_line, building, clear_leftovers, read_json, recall_json, replacing

BIG = 300_000  # bytes; more than `no_room` leaves


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def no_room() -> Iterator[None]:
    """No file of this process may grow beyond 64 KiB: the kernel refuses, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def text(path: Path) -> None:
    path.write_text("x" * BIG)


def arrow(path: Path) -> None:
    table = pa.table({"a": list(range(BIG))})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def parquet(path: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(pa.table({"a": torch.rand(BIG).numpy()}), path)


def tensors(path: Path) -> None:
    save_file({"a": torch.zeros(BIG)}, path)


WRITERS = [text, arrow, parquet, tensors]


@pytest.mark.parametrize("write", WRITERS)
def test_where_there_is_no_room_the_old_file_stays_and_the_error_names_it(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with no_room(), pytest.raises(OSError, match="File too large") as caught, replacing(path) as aside:
        write(aside)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    assert names(tmp_path) == ["file"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("write", WRITERS)
def test_where_there_is_no_room_no_folder_is_left(write: Callable[[Path], None], tmp_path: Path) -> None:
    with no_room(), pytest.raises(OSError, match="File too large") as caught, building(tmp_path / "folder") as aside:
        write(aside / "large")
    assert caught.value.filename == str(tmp_path / "folder")
    assert names(tmp_path) == []


def test_a_file_takes_its_place_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_two_writers_never_share_a_temporary_name(tmp_path: Path) -> None:
    """Process ids are not enough: pods on one shared folder have the same ones."""
    with replacing(tmp_path / "file") as one, replacing(tmp_path / "file") as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "file").read_text() == "one", "the last one to end counts"
    assert names(tmp_path) == ["file"]


def test_a_folder_takes_its_place_whole_and_overwrites_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with building(folder) as aside:
        (aside / "deep").mkdir()
        (aside / "deep" / "file").write_text("first")
        assert not folder.exists()
    assert names(folder) == ["deep"]
    with pytest.raises(FileExistsError), building(folder) as aside:
        (aside / "file").write_text("second")
    with building(folder, keep=True) as aside:
        (aside / "file").write_text("third")
    assert names(folder) == ["deep"]
    assert names(tmp_path) == ["folder"]


def test_an_error_of_the_writer_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file"):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "file"):
        (tmp_path / "source").read_text()
    assert caught.value.filename == str(tmp_path / "source")
    assert names(tmp_path) == []


KILLED = """
import os, sys; from pathlib import Path; from pipeline.durable import building, replacing
folder = Path(sys.argv[1])
with replacing(folder / "file") as one, building(folder / "folder") as two:
    one.write_text("half"); (two / "weights").write_text("half")
    print("up", flush=True); sys.stdin.read()
"""


def test_what_a_killed_writer_left_is_cleared_and_what_a_living_one_writes_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "YOUNG_SECONDS", -1.0)
    (tmp_path / ".hidden.tmp").write_text("a person's own")
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "up\n"
        clear_leftovers(tmp_path)
        assert len(names(tmp_path)) == 3
        writer.kill()
    assert len(names(tmp_path)) == 3
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden.tmp"]


def test_a_temporary_name_that_may_not_be_locked_yet_is_left_alone(tmp_path: Path) -> None:
    young = durable._beside(tmp_path / "file")
    young.touch()
    clear_leftovers(tmp_path)
    assert young.exists()
    os.utime(young, (time.time() - 10,) * 2)
    clear_leftovers(tmp_path)
    assert not young.exists()


def test_a_long_name_has_room_for_its_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    durable.write_text(path, "content")
    assert path.read_text() == "content"


def test_a_line_is_not_glued_to_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, b"one")
    with path.open("ab") as file:
        file.write(b"cut of")
    append_line(path, b"two")
    append_line(path, b"three")
    assert path.read_bytes() == b"one\ncut of\ntwo\nthree\n"


def number(value: object) -> int:
    if not isinstance(value, dict):
        raise TypeError(value)
    return value["n"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"n"', b"null", b"[]", b"{}", b"\0" * 64, b"\xff\xfe\x80", b"[" * 10**5]
)
def test_a_damaged_file_is_one_line_or_made_again(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(Corrupt, match=r"^.*/file\.json: damaged; delete it$"):
        read_json(path, number, "delete it")
    assert recall_json(path, number) is None
    assert [record.getMessage() for record in caplog.records] == [f"{path}: damaged; it is made again"]


def test_a_file_that_is_not_there_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert recall_json(tmp_path / "none.json", number) is None
    assert not caplog.records
    durable.write_json(tmp_path / "some.json", {"n": 3})
    assert recall_json(tmp_path / "some.json", number) == read_json(tmp_path / "some.json", number) == 3
