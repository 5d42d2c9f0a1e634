"""The files of the repository: no secret in any, and no service of a default is open to the network."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTSIDE = {".git", ".venv", "outputs", "mlruns", ".pytest_cache", ".ruff_cache", ".hypothesis", "build", "__pycache__"}
CONFIGURATION = {".yaml", ".yml", ".md", ".toml", ".sh", ".json", ".cfg", ".ini", ""}


@cache
def everything() -> list[Path]:
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = set(folders) - OUTSIDE  # not even looked into: .venv alone has tens of thousands
        found += [Path(folder, name) for name in names]
    return sorted(found)


def files(suffixes: set[str]) -> list[Path]:
    found = [path for path in everything() if path.suffix in suffixes and path.is_file()]
    assert len(found) > 5
    return found


SECRET = re.compile(
    r"""
    \b(?:hf_[A-Za-z0-9]{20,} | AKIA[0-9A-Z]{16} | gh[pousr]_[A-Za-z0-9]{30,} | github_pat_\w{20,} | sk-[A-Za-z0-9_-]{20,})
    | -----BEGIN[ ](?:[A-Z]+[ ])?PRIVATE[ ]KEY
    | \b[0-9a-f]{64}\b                                                       # what `ray get-auth-token` makes
    | RAY_AUTH_TOKEN\b["']?[ \t]*[=:][ \t]*["']?(?![ \t"'$<{\n]|…|\.\.\.)\S
    | (?:password|secret|token)["']?[ ]*[=:][ ]*["']?[A-Za-z0-9+/_-]{16,}["']?$
    | ://[^\s/:@"'`<>{}*]+:(?!\.\.\.|…|\*|password@|secret@|PASSWORD@)[^\s/@"'`<>{}*]+@
    """,
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)


@pytest.mark.parametrize(
    "text",
    [
        "token: hf_abcdefghijklmnopqrstuvwxyz",
        "RAY_AUTH_TOKEN=abc",
        "- name: x\n  RAY_AUTH_TOKEN: 'abc'",
        "0123456789abcdef" * 4,
        "uri: postgresql://mlflow:hunter2@db/mlflow",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "password: aaaaaaaaaaaaaaaaaaaa",
    ],
)
def test_the_search_knows_a_secret(text: str) -> None:
    assert SECRET.search(text)


@pytest.mark.parametrize(
    "text", ["RAY_AUTH_TOKEN=$TOKEN", "RAY_AUTH_TOKEN: ${TOKEN}", "RAY_AUTH_TOKEN_PATH=/home/ray/.ray/auth_token", "s3://key:***@b"]
)  # fmt: skip
def test_the_search_knows_what_is_none(text: str) -> None:
    assert not SECRET.search(text)


def test_no_file_holds_a_secret() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files(CONFIGURATION | {".lock"})
        for match in SECRET.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


# Any address of the machine: in a setting, or as an option's value. Sentences may name it.
OPEN = re.compile(r"""(?:0\.0\.0\.0|\[::\]|--host[= ]["']?\*|host["']?\s*[:=]\s*["']?\*)""")
FORBIDDING = re.compile(r"never|not |no |instead of|refuse", re.IGNORECASE)


def test_nothing_listens_on_all_addresses() -> None:
    found = []
    for path in files(CONFIGURATION):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            comment = path.suffix == ".md" or line.lstrip().startswith("#")
            if OPEN.search(line) and not (comment and FORBIDDING.search(line)):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


def test_our_code_binds_no_service_to_all_addresses() -> None:
    for package in ("pipeline", "jobs", "tune", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            assert "0.0.0.0" not in path.read_text(encoding="utf-8"), path


def test_every_call_of_the_mlflow_page_and_of_rays_head_names_the_loopback() -> None:
    seen = 0
    for path in [*files({".md", ".yaml", ".yml"}), *(ROOT / "jobs").glob("*.py")]:
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"mlflow (ui|server)\b", line):
                seen += 1
                assert "--host 127.0.0.1" in line, f"{path.name}: {line}"
            if "ray start --head" in line:
                seen += 1
                assert "--dashboard-host=127.0.0.1" in line, f"{path.name}: {line}"
    assert seen >= 3


def test_ray_is_used_with_its_token_wherever_a_cluster_is_described() -> None:
    for path in files({".md", ".yaml", ".yml"}):
        text = path.read_text(encoding="utf-8")
        describes = path.name != "RESULTS.md"  # tells what was measured
        if describes and re.search(r"\bray (job submit|up|start)\b|kind: Ray(Job|Cluster)", text):
            assert re.search(r"RAY_AUTH_MODE|authOptions", text), f"{path.relative_to(ROOT)} says nothing of the token"
