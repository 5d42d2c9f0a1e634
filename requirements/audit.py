"""`make audit`: known vulnerabilities of the pinned packages, by pip-audit, which asks the package index for them.

It says what it could not find out: an index that gives no advisories (a mirror, say), or none at all, is no clean bill of health.
Exit status: 0 all packages audited and none vulnerable, 1 vulnerable ones, 3 not audited, or not all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = ("pip-audit", "--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What pip-audit found out."""

    audited: int
    vulnerable: list[str]  # one line a package and advisory
    skipped: list[str]  # one line a package that nothing could be learned of

    @property
    def status(self) -> int:
        return 1 if self.vulnerable else 3 if self.skipped or not self.audited else 0

    def __str__(self) -> str:
        lines = [*self.vulnerable]
        if self.skipped:
            lines += [f"not audited: {len(self.skipped)} packages, e.g. {self.skipped[0]}"]
        if self.status == 3:
            lines.append("this is no clean bill of health: run it where the package index serves advisories")
        return "\n".join([*lines, f"{self.audited} packages audited, {len(self.vulnerable)} known vulnerabilities"])


def read(report: dict[str, Any]) -> Verdict:
    """pip-audit's JSON → what it says."""
    vulnerable, skipped, audited = [], [], 0
    for package in report["dependencies"]:
        if "skip_reason" in package:
            skipped.append(f"{package['name']}: {package['skip_reason']}")
            continue
        audited += 1
        for found in package["vulns"]:
            mended = ", ".join(found["fix_versions"]) or "no version yet"
            vulnerable.append(f"{package['name']} {package['version']}: {found['id']}, mended in {mended}")
    return Verdict(audited, vulnerable, skipped)


def main(folder: Path, programs: Path) -> int:
    """Audit the lock files in `folder` with the pip-audit in `programs`."""
    files = [argument for lock in sorted(folder.glob("*.lock")) for argument in ("-r", str(lock))]
    command = [str(programs / COMMAND[0]), *COMMAND[1:], *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        verdict = read(json.loads(done.stdout))
    except ValueError:  # it broke off
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        print(f"the audit could not run: {last}", file=sys.stderr)
        return 3
    print(verdict)
    return verdict.status


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, Path(sys.argv[1])))
