"""A disk that is full ends a run in one line, leaves nothing half written, and costs no bit once there is space again."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SIZE = 6 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of six megabytes; skipped where nothing may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("left_kib", [0, 20, 60, 120, 400, 900], ids=lambda kib: f"{kib} KiB left")
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_space(
    qalign, small_disk: Path, tmp_path: Path, left_kib: int
) -> None:
    settings = ("checkpoint.patience=0.5", "checkpoint.every=1", "train.epochs=2", "data.eval_fraction=0.2")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(SIZE - (left_kib << 10)))
    status, _, told = qalign("train", f"storage={small_disk}/outputs", *settings)
    assert status == 2
    assert "Traceback" not in told
    (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "No space left on device: '" in error and str(small_disk) in error
    assert len(told.splitlines()) < 20
    assert [path for path in small_disk.rglob(".*") if path.name != ".writer"] == [], "nothing half written stays"
    filler.unlink()
    status, _, told = qalign("train", f"storage={small_disk}/outputs", *settings)
    assert status == 0, told
    assert qalign("train", f"storage={tmp_path}/undisturbed", *settings)[0] == 0
    exports = [next(folder.glob("runs/*/export")) for folder in (small_disk / "outputs", tmp_path / "undisturbed")]
    assert len({(export / "model.safetensors").read_bytes() for export in exports}) == 1
    steps = [json.loads(line)["step"] for line in (exports[0].parent / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert os.stat(exports[0] / "model.safetensors").st_size > 0
