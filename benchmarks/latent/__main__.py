"""Run the benchmark: `python -m benchmarks.latent [--quick]`. The same command again continues where it was stopped.

Two runs go on at a time, each in a process of its own with one thread; their output is in `<storage>/latent/log`. Results:
`<storage>/latent/report.md` and `results.json`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.latent.methods import METHODS, QUICK, SEEDS
from benchmarks.latent.report import BEFORE, page
from benchmarks.latent.runs import make_world, run_method
from benchmarks.processes import processes
from benchmarks.reasoning.runs import Place
from pipeline.durable import write_json
from pipeline.errors import UserError

Scores = dict[str, Any]


def main() -> int:
    """The command. Errors that a user can mend are one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latent", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"one seed, {' and '.join(QUICK)} alone")
    parser.add_argument("--storage", default="outputs", help="folder for all files (default: outputs)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, one CPU each (default: 2)")
    options = parser.parse_args()
    names, seeds = (QUICK, SEEDS[:1]) if options.quick else (tuple(METHODS), SEEDS)
    folder = Path(options.storage).absolute() / "latent" / ("quick" if options.quick else "full")
    command = "python -m benchmarks.latent" + (" --quick" if options.quick else "")
    try:
        rows = run(names, seeds, Place(options.storage, local=True), options.at_once, folder)
    except BrokenProcessPool:
        print("error: a process died; see the logs, and repeat the command to continue", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = page(rows, seeds, command)
    (folder / "report.md").write_text(report, encoding="utf-8")
    write_json(folder / "results.json", rows)
    print(f"{report}\nwritten {folder}")
    return 0


def run(
    names: Sequence[str], seeds: Sequence[int], place: Place, at_once: int, folder: Path
) -> dict[str, list[Scores]]:
    """Worlds first, then all methods in all of them: method → scores of each seed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        processes(at_once, folder.parent / "log") as pool,
        tqdm(total=len(seeds) * (1 + len(names)), desc="runs", unit="run", mininterval=0) as bar,
    ):
        worlds = _all(pool, bar, {(BEFORE, seed): (make_world, place, seed) for seed in seeds})
        starts = {seed: worlds[BEFORE, seed]["model"] for seed in seeds}
        asked = {(name, seed): (run_method, place, name, starts[seed], seed) for seed in seeds for name in names}
        found = worlds | _all(pool, bar, asked)
    return {name: [found[name, seed] for seed in seeds] for name in (BEFORE, *names)}


def _all(
    pool: ProcessPoolExecutor, bar: tqdm, calls: Mapping[tuple[str, int], tuple[Callable[..., Scores], Any]]
) -> dict[tuple[str, int], Scores]:
    """Wait for all calls, moving the bar. A failure stops the benchmark; what is finished stays."""
    futures = {pool.submit(*call): key for key, call in calls.items()}
    found = {}
    for future in as_completed(futures):
        if future.exception() is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        key = futures[future]
        found[key] = future.result()
        bar.update()
        bar.set_postfix_str(f"{key[0]}/{key[1]} {found[key]['greedy']:.3f}")
    return found


if __name__ == "__main__":
    from benchmarks.latent import __main__ as program

    sys.exit(program.main())
