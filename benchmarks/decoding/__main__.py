"""Run the benchmark: `python -m benchmarks.decoding [--quick]`. The same command again continues where it was stopped.

A small review model, aligned by DPO to VADER's sentiment, is decoded from in every way that `jobs.decode` knows, on held-out
prompts. Results: `<storage>/decoding/<full or quick>/report.md` and `results.json`, and each decoder's completions beside them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.decoding import report
from benchmarks.decoding.beams import arithmetic, tabular
from benchmarks.decoding.measures import Embedder, Measured, measure, read_rows
from benchmarks.decoding.points import Point, points
from benchmarks.decoding.world import FULL, QUICK, Size, World, make_world
from jobs.decode import decoded
from pipeline.durable import write_json
from pipeline.errors import UserError


def main() -> int:
    """The command. Errors that a user can mend are one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model, a few prompts, fewer settings")
    parser.add_argument("--storage", default="outputs", help="folder for all files (default: outputs)")
    parser.add_argument("--threads", type=int, help="of this process (default: torch's)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    size = QUICK if options.quick else FULL
    command = "python -m benchmarks.decoding" + (" --quick" if options.quick else "")
    try:
        folder = run(options.storage, size, command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"written {folder}")
    return 0


def run(storage: str, size: Size, command: str) -> Path:
    """All of it; the folder of the results."""
    embed = Embedder()
    world = make_world(storage, size)
    found = decode_all(world, embed)
    exact = tabular(20 if size.quick else 400)
    sums = arithmetic(storage, 40 if size.quick else 400, align=not size.quick)
    (world.folder / "report.md").write_text(report.page(found, exact, sums, command), encoding="utf-8")
    write_json(world.folder / "results.json", _plain(found) | {"tabular": exact, "arithmetic": sums})
    return world.folder


def decode_all(world: World, embed: Embedder) -> dict[str, tuple[Point, Measured]]:
    """Every point's completions, measured. Pieces that are there already are not decoded again."""
    found = {}
    with tqdm(points(world), desc="decoders", unit="setting", mininterval=0) as bar:
        for point in bar:
            bar.set_postfix_str(point.name)
            task, _ = decoded(world.config(point.name, point.changes), local=True)
            rows = read_rows(task.output)
            found[point.name] = point, measure(rows, task.facts()["seconds"], point.kl, embed)
    return found


def _plain(found: Mapping[str, tuple[Point, Measured]]) -> dict[str, dict[str, object]]:
    return {"points": {name: m._asdict() | {"curve": p.curve, "setting": p.setting} for name, (p, m) in found.items()}}


if __name__ == "__main__":
    from benchmarks.decoding import __main__ as program

    sys.exit(program.main())
