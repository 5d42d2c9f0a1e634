"""The results as a Markdown page, which is what the terminal shows, too. Left out: computing them (`verdicts`)."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.throughput.race import WARM_UP, Result
from benchmarks.throughput.verdicts import (
    TOLERANCE,
    Ratio,
    Verdict,
    agreement,
    agrees,
    judge,
    ratios,
    seconds,
)
from benchmarks.throughput.workloads import Target, Workload

VERSIONS = ("torch", "transformers", "deepspeed", "ray", "trl", "accelerate", "datasets")
GIB = 2**30


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    shown = (" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(f"| {line} |" for line in shown) + "\n"


def section(workload: Workload, results: Mapping[str, Result], steps: int, threads: int) -> str:
    """All about one workload."""
    parts = [f"## {workload.name}: {workload.title}\n", _contenders(workload, results, steps, threads)]
    if not all(result.peak_since_first_step for result in results.values()):
        parts.append("Peak resident memory counts from the process's start: this system cannot reset it.\n")
    if found := ratios(results, steps):
        parts += ["How many times faster, round by round; equal precision first:\n", _ratios(found)]
    if workload.targets:
        parts.append(_targets(judge(workload, results, steps)))
    if differences := agreement(workload, results):
        assert workload.agreement is not None
        parts.append(_agreement(differences, workload.agreement))
    parts += [_products(result, steps) for result in results.values() if result.products is not None]
    return "\n".join(parts)


def _contenders(workload: Workload, results: Mapping[str, Result], steps: int, threads: int) -> str:
    unit = "pairs" if workload.kind == "preference" else "groups"
    head = ["contender", "precision", "activation checkpointing", "reference", "workers × threads"]
    head += ["s a step", "min–max", f"{unit}/s", "peak RSS, GiB", "tree PSS, GiB"]
    rows = []
    for name, result in results.items():
        entry, spread = result.entry, seconds(result, steps)
        rows.append(
            [
                name,
                _precision(result),
                "yes" if entry.checkpointing else "no",
                entry.reference,
                f"{entry.workers} × {entry.threads(threads)}",
                f"{spread.median:.3f}",
                f"{spread.low:.3f}–{spread.high:.3f}",
                f"{workload.groups_per_step / spread.median:.2f}",
                f"{result.peak_rss / GIB:.2f}",
                f"{result.tree_pss / GIB:.2f}",
            ]
        )
    return table(head, rows)


def _precision(result: Result) -> str:
    """In words: who keeps what in bfloat16 differs."""
    if result.entry.precision == "float32":
        return "fp32"
    return "bf16, fp32 masters" if result.entry.contender == "ours" else "bf16 autocast, fp32 weights"


def _ratios(found: Sequence[Ratio]) -> str:
    head = ["ours", "against", "same precision", "times faster", "min–max", "memory, ours / theirs"]
    rows = [
        [
            r.ours,
            r.other,
            "yes" if r.alike else "no",
            f"{r.time.median:.2f}",
            f"{r.time.low:.2f}–{r.time.high:.2f}",
            f"{r.memory:.2f}",
        ]
        for r in found
    ]
    return table(head, rows)


def _targets(verdicts: Sequence[Verdict]) -> str:
    rows = [[_wording(v.target), f"{v.value:.2f}", "met" if v.met else "missed"] for v in verdicts]
    return table(["target", "measured", ""], rows)


def _wording(target: Target) -> str:
    return {
        "time": f"{target.ours} ≥ {target.bound:g} × as fast as {target.other}",
        "memory": f"{target.ours} ≤ {target.bound:g} × the peak memory of {target.other}",
        "products": f"{target.ours}: own matrix products ≥ {target.bound:.0%} of the step",
    }[target.measure]


def _agreement(differences: Mapping[str, float], names: tuple[str, str]) -> str:
    verdict = "agree" if agrees(differences) else "DISAGREE"
    rows = [[what, f"{value:.1e}", "yes" if agrees({what: value}) else "NO"] for what, value in differences.items()]
    said = f"{names[0]} and {names[1]} {verdict} (largest relative difference, below {TOLERANCE:g}?):\n\n"
    return said + table(["", "difference", "within"], rows)


def _products(result: Result, steps: int) -> str:
    assert result.products is not None
    found, median = result.products, seconds(result, steps).median
    said = (
        f"{result.entry.name}: {found['calls']} matrix products of {found['distinct']} shapes take {found['seconds']:.3f} s "
        f"when timed alone at their best, {found['seconds'] / min(result.again):.0%} of a step of these shapes at its best "
        f"({min(result.again):.3f} s of {len(result.again)} tries) and {found['seconds'] / median:.0%} of the median step. The dearest:\n\n"
    )
    rows = [
        [p["shape"], p["dtype"].removeprefix("torch."), str(p["calls"]), f"{p['seconds']:.4f}"]
        for p in found["dearest"]
    ]
    return said + table(["product", "", "calls", "seconds"], rows)


def heading(command: str, steps: int) -> str:
    """Command, machine and how it was measured."""
    return (
        f"# Throughput\n\n`{command}`\n\n{machine()}\n\nMedians of {steps} steps after at least {WARM_UP} of warm-up; "
        "contenders take turns, one step each, on the same token ids. Peak RSS is the process's own since its first step, "
        "tree PSS that of the process and all below it in one step.\n"
    )


def machine() -> str:
    """Processor, cores, what it does with bfloat16, and versions, on one line."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    models = [line for line in text.splitlines() if line.startswith("model name")]
    processor = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    units = [unit for flag, unit in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if flag in text]
    cores = len(os.sched_getaffinity(0))
    return f"{processor}, {cores} cores, bfloat16 with {' and '.join(units) or 'no unit for it'}; Python {platform.python_version()}, {_versions()}."


def _versions() -> str:
    found = []
    for package in VERSIONS:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def plain(workload: Workload, results: Mapping[str, Result], steps: int) -> dict[str, Any]:
    """The same as JSON types, with every step."""
    verdicts = [asdict(verdict) for verdict in judge(workload, results, steps)]
    return {
        "workload": asdict(workload),
        "timed_steps": steps,
        "results": {name: asdict(result) for name, result in results.items()},
        "seconds": {name: asdict(seconds(result, steps)) for name, result in results.items()},
        "ratios": [asdict(ratio) for ratio in ratios(results, steps)],
        "targets": verdicts,
        "agreement": agreement(workload, results),
    }
