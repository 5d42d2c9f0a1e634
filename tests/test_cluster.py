"""What Ray says on standard error while it starts."""

from __future__ import annotations

import os

import pytest

from jobs.cli import main
from pipeline import cluster
from pipeline.cluster import _without_line


def test_one_line_is_left_out_and_everything_else_is_shown(capfd):
    with _without_line(b"level"):
        os.write(2, b"[I] Set ray log level\nfrom C++\n")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "from C++\nafterwards\n"


def test_what_was_said_before_an_error_is_shown(capfd):
    def fail() -> None:
        with _without_line(b"level"):
            os.write(2, b"the reason")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert capfd.readouterr().err == "the reason"


def test_imports_begin_early_for_what_needs_ray_and_for_nothing_else(monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(cluster, "begin_imports", lambda: begun.append(True))
    for argv in (["train", "--dry-run"], ["train", "--status"], ["train", "--local"], ["prepare", "--dry-run"]):
        assert main([argv[0], "missing.yaml", *argv[1:]]) == 2
    assert not begun
    assert main(["train", "missing.yaml"]) == 2
    assert begun == [True]
