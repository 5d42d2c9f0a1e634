"""What `make audit` makes of pip-audit's report: nothing found out is not nothing found."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from requirements import audit

ROOT = Path(__file__).parents[1]
SOUND = {"name": "a", "version": "1", "vulns": []}
VULNERABLE = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "status", "told"),
    [
        ([SOUND], 0, "1 packages audited, 0 known"),
        ([SOUND, VULNERABLE, UNKNOWN], 1, "b 2: CVE-1, mended in 3"),
        ([SOUND, UNKNOWN], 3, "not audited: 1 packages, e.g. c: not found on PyPI"),
        ([], 3, "no clean bill of health"),
    ],
)
def test_the_verdict(packages: list, status: int, told: str) -> None:
    verdict = audit.read({"dependencies": packages})
    assert verdict.status == status
    assert told in str(verdict)


@pytest.mark.parametrize(
    ("script", "status", "told"),
    [
        ("echo 'Traceback …' >&2; echo 'no network' >&2; exit 1", 3, "the audit could not run: no network"),
        ("""echo '{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}'""", 0, "1 packages audited"),
    ],
)
def test_an_audit_that_cannot_run_says_so(tmp_path: Path, capsys, script: str, status: int, told: str) -> None:
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert audit.main(ROOT / "requirements", tmp_path) == status
    assert told in "".join(capsys.readouterr())


def test_every_lock_file_is_audited(tmp_path: Path, capsys) -> None:
    program = tmp_path / "pip-audit"
    program.write_text('#!/bin/sh\necho "$@" >&2; exit 1\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    audit.main(ROOT / "requirements", tmp_path)
    told = capsys.readouterr().err
    assert "--no-deps --disable-pip" in told
    assert all(f"-r {lock}" in told for lock in (ROOT / "requirements").glob("*.lock"))
