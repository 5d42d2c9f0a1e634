"""Names from data and configurations stay in their folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.config import ConfigError, Source
from pipeline.files import resolve
from pipeline.mlflow_run import _folder_name
from tests.conftest import write_pairs


def found(path: Path | str, work: Path) -> list[str]:
    return [file.label for file in resolve(Source(path=str(path)), "data.sources.0", work)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data that somebody unpacked, beside what is private."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "keys.jsonl").write_text('{"secret": 1}\n')
    (tmp_path / "data").mkdir()
    write_pairs(tmp_path / "data" / "a.jsonl", 2)
    return tmp_path / "data"


@pytest.mark.parametrize("pattern", ["", "/*.jsonl", "/**/*.jsonl"])
def test_links_out_of_a_folder_of_data_are_refused(folder: Path, tmp_path: Path, pattern: str) -> None:
    (folder / "b.jsonl").symlink_to("../private/keys.jsonl")
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.path: .*b\.jsonl is a link to .*keys\.jsonl, outside of"):
        found(f"{folder}{pattern}", tmp_path)


def test_links_within_and_links_that_a_person_names_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "c.jsonl").symlink_to("a.jsonl")
    (tmp_path / "link").symlink_to(folder)
    assert found(tmp_path / "link", tmp_path) == ["a.jsonl", "c.jsonl"]
    (tmp_path / "single.jsonl").symlink_to("private/keys.jsonl")
    assert found(tmp_path / "single.jsonl", tmp_path) == ["single.jsonl"]


def test_the_hubs_cache_is_made_of_links(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_pairs(blobs / "ab12", 2)
    (snapshot / "train.jsonl").symlink_to("../../blobs/ab12")
    assert found(snapshot, tmp_path) == ["train.jsonl"]
    (snapshot / "evil.jsonl").symlink_to("../../../private/keys.jsonl")
    with pytest.raises(ConfigError, match="outside of"):
        found(snapshot, tmp_path)


@pytest.mark.parametrize(
    ("description", "content"),
    [
        ("dataset_dict.json", {"splits": ["../private"]}),
        ("state.json", {"_data_files": [{"filename": "../private/keys.jsonl"}]}),
        ("state.json", {"_data_files": [{"filename": "/etc/passwd"}]}),
        ("state.json", {"_data_files": 3}),
    ],
)
def test_a_saved_data_set_cannot_name_files_elsewhere(folder: Path, tmp_path: Path, description: str, content) -> None:
    (folder / description).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.path: .*(outside of its folder|cannot be read)"):
        found(folder, tmp_path)


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", ".hidden", "..", "a\nb", "", "a b"])
def test_a_runs_name_is_one_folder(make_config, name: str) -> None:
    with pytest.raises(ConfigError, match="name: "):
        make_config(f"name='{name}'")


@pytest.mark.parametrize(
    "name", ["../../etc", "..", "/abs/olute", "a/../../b", "~root", ".hidden", "../", "plain name-1.0"]
)
def test_an_experiments_artifacts_stay_beside_the_database(name: str) -> None:
    base = Path("/storage/mlartifacts")
    place = (base / _folder_name(name)).resolve()
    assert place.parent == base


def test_a_label_shows_no_signature_of_its_url(tmp_path: Path) -> None:
    import fsspec

    with fsspec.filesystem("memory").open("/signed/a.jsonl?token=swordfish", "wb") as file:
        file.write(b"{}\n")
    source = Source(path="memory://signed/a.jsonl?token=swordfish", format="jsonl")
    assert [file.label for file in resolve(source, "k", tmp_path)] == ["a.jsonl?token=***"]


def test_pages_link_nowhere() -> None:
    """But within themselves: the templates have no other links, and texts are escaped (see tests/report)."""
    templates = Path(__file__).parents[2] / "pipeline" / "report" / "templates"
    links = [
        link
        for file in templates.glob("*.j2")
        for link in re.findall(r'(?:href|src|action)="([^"]*)"', file.read_text())
    ]
    assert len(links) > 5
    assert all(link.startswith("#") for link in links), links
