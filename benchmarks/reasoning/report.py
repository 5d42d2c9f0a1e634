"""The benchmark's results as a Markdown page and a plot. Left out: computing them (`runs`), judging them (`claims`)."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.reasoning.claims import ENOUGH_SEEDS, Rows, Scores, claims_table, mean
from benchmarks.reasoning.methods import BLOCKS

VERSIONS = ("torch", "ray", "deepspeed", "transformers", "mlflow")
BEFORE = "SFT on the teacher's demonstrations (before)"


def page(
    results: Mapping[str, Rows],
    titles: Mapping[str, Mapping[str, str]],
    tuning: Mapping[str, Mapping[str, float]],
    seeds: Sequence[int],
    command: str,
) -> str:
    """The whole report. results: block → method → scores per seed; titles: block → method → its name in the table;
    tuning: block → setting → validation accuracy."""
    parts = [f"`{command}`\n", f"{machine()}\n"]
    for block, rows in results.items():
        parts += [f"### {BLOCKS[block].title}\n", table(rows, titles[block], seeds)]
        if tuning.get(block):
            shown = ", ".join(f"{setting} {value:.3f}" for setting, value in tuning[block].items())
            parts += [f"Tuned on the validation prompts of another seed: {shown}.\n"]
    if len(seeds) >= ENOUGH_SEEDS:
        parts += ["### Claims\n", claims_table(results)]
    return "\n".join(parts)


def table(rows: Rows, titles: Mapping[str, str], seeds: Sequence[int]) -> str:
    """One block: greedy accuracy per seed, then means over seeds."""
    head = ["method", *(f"s{seed}" for seed in seeds), "mean", "strict", "sampled", "steps", "train s", "whole s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method, scores in rows.items():
        cells = [f"{titles[method]} (`{method}`)", *(f"{score['greedy']:.3f}" for score in scores)]
        cells += [f"**{mean(scores):.3f}**", f"{mean(scores, 'strict'):.3f}", f"{mean(scores, 'sampled'):.3f}"]
        cells += [_steps(scores), f"{mean(scores, 'train_seconds'):.0f}", f"{mean(scores, 'total_seconds'):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _steps(scores: Sequence[Scores]) -> str:
    low, high = (int(bound(score["steps"] for score in scores)) for bound in (min, max))
    return f"{low}" if low == high else f"{low}–{high}"


def machine() -> str:
    """Processor, cores and versions, on one line."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    processor = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in VERSIONS)
    return f"{processor}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}."


def plot(results: Mapping[str, Rows], titles: Mapping[str, Mapping[str, str]], folder: Path) -> list[Path]:
    """accuracy.svg and accuracy.png: each method's mean as a bar, its seeds as dots, the start as a line."""
    from matplotlib.figure import Figure

    most = max(len(rows) for rows in results.values())
    figure = Figure(figsize=(7.5 * len(results), 1.4 + 0.42 * most), layout="constrained")
    for axes, (block, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        ordered = sorted((name for name in rows if name != "sft"), key=lambda name: mean(rows[name]))
        for place, name in enumerate(ordered):
            axes.barh(place, mean(rows[name]), color="#4c78a8" if name.startswith("dqo") else "#b8c4d0")
            axes.plot([score["greedy"] for score in rows[name]], [place] * len(rows[name]), "o", color="black", ms=4)
        axes.axvline(mean(rows["sft"]), color="#e45756", linestyle="--", label="before")
        axes.set_yticks(range(len(ordered)), [titles[block][name] for name in ordered])
        axes.set_xlim(0, 1)
        axes.set_xlabel("greedy accuracy on 1000 test prompts (bar: mean, dots: seeds)")
        axes.set_title(BLOCKS[block].title)
        axes.legend(loc="lower left")
    files = [folder / "accuracy.svg", folder / "accuracy.png"]
    for file in files:
        figure.savefig(file, dpi=150)
    return files
