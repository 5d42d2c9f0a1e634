"""docs/runbook.md speaks of keys, metrics and messages that there are."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.config_file import describe
from pipeline.gauges import GAUGES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "runbook.md").read_text()
CODE = "".join(path.read_text() for path in (ROOT / "pipeline").rglob("*.py"))


def test_keys_exist() -> None:
    known = {line.partition(" = ")[0] for line in describe().splitlines()}
    named = set(re.findall(r"`((?:data|model|train|optimizer|checkpoint|scaling)\.[a-z_]+)", TEXT))
    assert len(named) > 8
    assert named <= known


def test_metrics_exist_and_all_are_named() -> None:
    named = set(re.findall(r"ray_(qalign_\w+)", TEXT))
    named |= {f"qalign{rest}" for rest in re.findall(r"`(_[a-z_]+)`", TEXT)}
    assert named == set(GAUGES)


def test_messages_are_those_of_the_code() -> None:
    for message in (
        "another driver is training this run",
        "falling back to the checkpoint before",
        "its checksum differs from the manifest's",
        "a worker failed, starting again: ",
        "continuing at step ",
        "the loss is ",
        "the node of rank ",
        "workers of one machine talk through sockets",
    ):
        assert message.strip() in TEXT, message
        assert message in CODE, message


def test_the_readme_leads_there() -> None:
    assert "(docs/runbook.md)" in (ROOT / "README.md").read_text()
