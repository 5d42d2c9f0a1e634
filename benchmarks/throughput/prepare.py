"""Tokenise and write: the pipeline's `prepare` on a private Ray cluster against `datasets.map` in two processes.

Both read the same jsonl file with the same tokenizer and leave the same token ids on disk, which is checked. Each runs in a
process of its own whose tree's memory is sampled. The clock starts when the cluster, or the library, is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.throughput.memory import PeakPss
from benchmarks.throughput.race import RaceError
from benchmarks.throughput.report import GIB, table

SIDES = {
    "ours": "qalign prepare",
    "map": "datasets.map(num_proc=2), row by row",
    "map_batched": "datasets.map(num_proc=2, batched=True)",
}
SAMPLED_EVERY = 2.0
"""Seconds between looks at the memory: a look at a cluster's processes costs a tenth of one."""
QUICK_ROWS = 300
SENTENCES = 2000
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "han", "jer", "kil", "lom", "mun", "nar", "pes", "qui", "ros", "sta", "vor")


def run(counts: list[int], output: Path, quick: bool) -> tuple[str, dict[str, Any]]:
    """Markdown and results for each number of rows. Raises RaceError where a side fails or the token ids differ."""
    found: dict[str, Any] = {}
    sizes = [QUICK_ROWS] if quick else sorted(counts)
    with tqdm(total=len(sizes) * len(SIDES), desc="prepare", unit="run", mininterval=0) as bar:
        for count in sizes:
            with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
                write_records(Path(folder) / "pairs.jsonl", count)
                found[str(count)] = {}
                for side in SIDES:
                    bar.set_postfix_str(f"{count} rows, {side}")
                    found[str(count)][side] = _measure(side, Path(folder), output, quick)
                    bar.update()
            _check(found[str(count)])
    return page(found), found


def write_records(path: Path, count: int, seed: int = 0) -> None:
    """Preference pairs of pseudo-English: prompts of two sentences, answers of two or three."""
    rng = np.random.default_rng(seed)

    def picks(of: Sequence[str], count: int) -> list[str]:
        return [of[i] for i in rng.integers(len(of), size=count)]

    words = ["".join(picks(SYLLABLES, n)) for n in rng.integers(1, 4, size=3000)]
    sentences = [" ".join(picks(words, n)).capitalize() + "." for n in rng.integers(6, 24, size=SENTENCES)]
    with path.open("w") as lines:
        for i in range(count):
            text = picks(sentences, 7)
            record = {
                "prompt": f"{i}: {' '.join(text[:2])}",
                "chosen": f" {' '.join(text[2:5])}",
                "rejected": f" {' '.join(text[5:])}",
            }
            lines.write(json.dumps(record) + "\n")


def _measure(side: str, folder: Path, output: Path, quick: bool) -> dict[str, Any]:
    """Runs one side in a process of its own → its answer, with the peak of its tree's memory."""
    log = output / f"prepare-{side}.log"
    command = [sys.executable, "-m", "benchmarks.throughput.tokenise", side, str(folder), *(["quick"] if quick else [])]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        with PeakPss([process.pid], every=0.2 if quick else SAMPLED_EVERY) as peak:
            said, _ = process.communicate()
    if process.returncode:
        lines = log.read_text().strip().splitlines() or ["it said nothing"]
        raise RaceError(f"prepare, {side}: {lines[-1]} (see {log})")
    return json.loads(said.strip().splitlines()[-1]) | {"tree_pss": peak.bytes}


def _check(sides: dict[str, dict[str, Any]]) -> None:
    """All sides made the same tokens: their number, and the ids of the first rows."""
    if len({(found["tokens"], found["digest"]) for found in sides.values()}) > 1:
        raise RaceError("prepare: the sides made different tokens of the same texts")


def page(found: dict[str, Any]) -> str:
    """A table per number of rows, and how memory grew between the smallest and the largest."""
    head = ["", "rows/s", "seconds", "of these loading the file", "ours is faster by", "…not counting its loading"]
    parts = []
    for count, sides in found.items():
        ours, rows = sides["ours"]["seconds"], []
        for side, numbers in sides.items():
            alone = numbers["seconds"] - numbers["loading"]
            rows.append(
                [
                    SIDES[side],
                    f"{int(count) / numbers['seconds']:.0f}",
                    f"{numbers['seconds']:.1f}",
                    f"{numbers['loading']:.1f}" if side != "ours" else "–",
                    f"{numbers['seconds'] / ours:.2f} ×" if side != "ours" else "",
                    f"{alone / ours:.2f} ×" if side != "ours" else "",
                    f"{numbers['tree_pss'] / GIB:.2f}",
                ]
            )
        parts += [f"## {count} rows, {sides['ours']['tokens']} tokens\n", table([*head, "peak tree PSS, GiB"], rows)]
    parts.append("Target: qalign prepare at least as fast as datasets.map, with memory flat as rows grow.\n")
    if len(found) > 1:
        (low, first), *_, (high, last) = found.items()
        growth = last["ours"]["tree_pss"] / first["ours"]["tree_pss"]
        parts.append(f"Memory of qalign prepare from {low} to {high} rows: {growth:.2f} ×.\n")
    return "\n".join(parts)
