"""Code comes in from installed modules alone: not from the current folder, not from data, not from Python's own library."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline import dotted

CODE = "from pathlib import Path\nPath({trace!r}).touch()\ndef score(prompt, response): return 1.0\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path, as the current folder is."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("planted_")]:
        del sys.modules[name]


def plant(folder: Path, name: str) -> Path:
    """A module that leaves a trace when it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{name}.trace"
    (folder / f"{name}.py").write_text(CODE.format(trace=str(trace)))
    return trace


def test_a_module_of_the_current_folder_is_refused_before_it_runs(place: Path) -> None:
    trace = plant(place, "planted_a")
    with pytest.raises(ImportError, match=rf"planted_a, found at {place}/planted_a\.py, is not installed.*PYTHONPATH"):
        dotted.load("planted_a:score")
    assert not trace.exists()


def test_a_folder_of_data_is_no_package(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = plant(place / "planted_data" / "deep", "evil")
    with pytest.raises(ImportError, match="is not installed"):
        dotted.load("planted_data.deep.evil:score")
    monkeypatch.setenv("PYTHONPATH", str(place))
    with pytest.raises(ImportError, match="is not installed"):  # no __init__.py: any folder would be a package
        dotted.load("planted_data.deep.evil:score")
    assert not trace.exists()


def test_a_folder_that_pythonpath_names_is_the_persons_word(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = plant(place, "planted_b")
    monkeypatch.setenv("PYTHONPATH", "")  # to Python: the current folder
    monkeypatch.chdir(place)
    with pytest.raises(ImportError, match="is not installed"):
        dotted.load("planted_b:score")
    monkeypatch.setenv("PYTHONPATH", f"/nowhere:{place}")
    assert dotted.load("planted_b:score")("p", "r") == 1.0
    assert trace.exists()


def test_an_editable_project_is_installed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    note = site / "mine-1.0.dist-info"
    note.mkdir(parents=True)
    (note / "METADATA").write_text("Name: mine\nVersion: 1.0\n")
    (note / "direct_url.json").write_text(json.dumps({"url": f"file://{place}", "dir_info": {"editable": True}}))
    monkeypatch.setattr(dotted, "_site_folders", lambda: (site,))
    dotted._editable_projects.cache_clear()
    plant(place, "planted_c")
    assert dotted.load("planted_c:score")("p", "r") == 1.0
    (note / "direct_url.json").write_text(json.dumps({"url": f"file://{place}", "dir_info": {}}))
    dotted._editable_projects.cache_clear()
    with pytest.raises(ImportError, match="is not installed"):
        dotted.load("planted_c:score")
    monkeypatch.undo()
    dotted._editable_projects.cache_clear()


@pytest.mark.parametrize("name", ["os:execlp", "builtins:exec", "subprocess:call", "shutil:copy"])
def test_python_itself_is_no_place_for_scorers(name: str) -> None:
    with pytest.raises(ImportError, match="is not installed"):
        dotted.load(name)


def test_what_pip_installed_loads() -> None:
    import xxhash

    assert dotted.load("xxhash:xxh64") is xxhash.xxh64


@pytest.mark.parametrize("path", ["data/pairs.jsonl", "../evil:f", "a.b", "a:b.c", "/tmp/x.py:f", ":f", "a:", "a..b:c"])
def test_a_path_of_a_file_is_no_dotted_path(path: str) -> None:
    assert not dotted.is_dotted(path)
