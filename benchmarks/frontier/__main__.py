"""Run the benchmark: `python -m benchmarks.frontier [--quick]`. The same command again does what is missing.

Two sweeps go on at a time: two processes without Ray, one thread each (both for the model
that they start from). Their output is in `<storage>/frontier/…/log`.
Results: `<storage>/frontier/…/report.md`, `results.json` and `frontier.html`; every fit is in MLflow below its sweep.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.frontier import report
from benchmarks.frontier.claims import judge
from benchmarks.frontier.curves import Policy, run_curve
from benchmarks.frontier.methods import FULL, METHODS, QUICK, Size
from benchmarks.frontier.worlds import Place, make_held_out, make_world
from benchmarks.processes import processes
from benchmarks.reviews import review_model
from pipeline.durable import write_json
from pipeline.errors import UserError


def main() -> int:
    """The command. Errors that a user can mend are one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four curves of two points in one small world")
    parser.add_argument("--storage", default="outputs", help="folder for all files (default: outputs)")
    parser.add_argument("--at-once", type=int, default=2, help="sweeps at a time, one thread each (default: 2)")
    options = parser.parse_args()
    name, size = ("quick", QUICK) if options.quick else ("full", FULL)
    command = "python -m benchmarks.frontier" + (" --quick" if options.quick else "")
    folder = Path(options.storage).absolute() / "frontier" / name
    try:
        run(size, folder, str(Path(options.storage).absolute()), options.at_once, command)
    except BrokenProcessPool:
        print("error: a process died; see the logs, and repeat the command to continue", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(size: Size, folder: Path, storage: str, at_once: int, command: str) -> None:
    """All of `size`, with the results in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with processes(at_once, folder / "log") as pool:
        model = pool.submit(_review_model, storage, size is QUICK, at_once).result()
        place = Place(storage, str(folder), str(model))
        pool.submit(make_held_out, place, size).result()
        sft = any(METHODS[name].after_sft for name in size.methods)
        worlds = [pool.submit(make_world, place, size, seed, sft) for seed in size.seeds]
        records = {seed: world.result() for seed, world in zip(size.seeds, worlds, strict=True)}
        print("; ".join(f"world {seed}: {found['pairs']} pairs" for seed, found in records.items()), file=sys.stderr)
        curves = _all(
            {(n, s): pool.submit(run_curve, place, size, n, s) for n in size.methods for s in size.seeds}, pool
        )
    page = report.markdown(curves, size.seeds, command)
    (folder / "report.md").write_text(page, encoding="utf-8")
    write_json(folder / "results.json", results(curves, records))
    print(page)
    print(f"written {folder}\npage    {report.write_page(curves, folder)}")


def _review_model(storage: str, quick: bool, threads: int) -> Path:
    """The pool's other processes have nothing to do yet: it gets their threads."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        return review_model(storage, quick=quick)
    finally:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def results(
    curves: Mapping[tuple[str, int], Sequence[Policy]], records: Mapping[int, Mapping[str, int]]
) -> dict[str, Any]:
    """What results.json holds."""
    claims = [
        {
            "claim": j.claim.text,
            "source": j.claim.source,
            "where": j.where,
            "gaps": j.gaps,
            "se": j.error,
            "verdict": j.verdict,
        }
        for j in judge(curves)
    ]
    policies = [asdict(policy) for own in curves.values() for policy in own]
    return {
        "records": {str(seed): dict(found) for seed, found in records.items()},
        "policies": policies,
        "claims": claims,
    }


def _all(
    futures: dict[tuple[str, int], Future[list[Policy]]], pool: ProcessPoolExecutor
) -> dict[tuple[str, int], list[Policy]]:
    """Wait for all sweeps under a bar. A failure stops the benchmark; what is finished stays."""
    keys = {future: key for key, future in futures.items()}
    with tqdm(total=len(keys), desc="sweeps", unit="sweep", mininterval=0) as bar:
        for future in as_completed(keys):
            if future.exception() is not None:
                pool.shutdown(wait=False, cancel_futures=True)
            policies = future.result()
            bar.update()
            measured = [p.numbers["samples/reward"] for p in policies if p.measured]
            bar.set_postfix_str(
                f"{keys[future][0]}/{keys[future][1]} reward ≤ {max(measured, default=float('nan')):.3f}"
            )
    return {key: future.result() for key, future in futures.items()}


if __name__ == "__main__":
    from benchmarks.frontier import __main__ as program

    sys.exit(program.main())
