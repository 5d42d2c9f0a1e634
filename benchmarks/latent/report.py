"""The benchmark's results as a Markdown page: accuracies, thoughts, and the paper's claims beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.latent.methods import DECODED, METHODS, NUMBERS, USUAL
from benchmarks.reasoning.claims import mean, verdict
from benchmarks.reasoning.report import machine

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""Method → scores, one per seed; `before` is the starting model."""
BEFORE = "before"
PAPER, SOFTCOT = "LTA-Thinker, arXiv 2509.12875", "SoftCoT, arXiv 2502.12134"
CLAIMS = (
    ("thoughts lift a frozen model", PAPER, "lta", BEFORE),
    ("thoughts of a frozen assistant lift a frozen model", SOFTCOT, "softcot", BEFORE),
    ("LTA is ahead of SoftCoT", PAPER, "lta", "softcot"),
    ("the block alone is ahead of the assistant", PAPER, "nll", "softcot"),
    ("the focus helps", PAPER, "lta", "no_focus"),
    ("the alignment helps", PAPER, "lta", "no_align"),
    ("the likelihood is needed", PAPER, "lta", "no_nll"),
    ("aligning the mean, which keeps the variance, helps (ours)", "–", "lta_mean", "lta"),
    ("two thoughts are ahead of one (90.9 → 93.3 %)", PAPER, "lta_2", "lta_1"),
    ("two thoughts are ahead of eight (93.3 → 88.1 %)", PAPER, "lta_2", "lta_8"),
    ("moving all weights is ahead of thoughts alone", "–", "sft", "lta"),
)


def page(rows: Rows, seeds: Sequence[int], command: str) -> str:
    """The whole report of what there is."""
    parts = [f"`{command}`\n", f"{machine()}\n", table(rows, seeds), fewer(rows), votes(rows)]
    return "\n".join([*filter(None, parts), claims_table(rows)])


def table(rows: Rows, seeds: Sequence[int]) -> str:
    """Greedy accuracy per seed, then means over seeds."""
    head = ["method", *(f"s{seed}" for seed in seeds), "mean", "strict", "sampled"]
    head += ["within", "between", "cosine", "key step", "trained", "steps", "train s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    titles = {BEFORE: "starting model (before)"} | {name: method.title for name, method in METHODS.items()}
    for name, scores in rows.items():
        cells = [f"{titles[name]} (`{name}`)", *(f"{score['greedy']:.3f}" for score in scores)]
        cells += [f"**{mean(scores):.3f}**", f"{mean(scores, 'strict'):.3f}", f"{mean(scores, 'sampled'):.3f}"]
        cells += [_cell(scores, key) for key in ("within", "between", "latent_cosine", "focus_hit")]
        cells += [
            _cell(scores, "parameters", ",.0f"),
            _cell(scores, "steps", ".0f"),
            _cell(scores, "train_seconds", ".0f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(scores: Sequence[Mapping[str, Any]], key: str, form: str = ".3f") -> str:
    return format(mean(scores, key), form) if all(key in score for score in scores) else "–"


def fewer(rows: Rows) -> str:
    """Trained with most thoughts, decoded with fewer."""
    found = [score["fewer"] for score in rows.get(DECODED, ())]
    if not found:
        return ""
    cells = ", ".join(f"{n}: {sum(f[str(n)] for f in found) / len(found):.3f}" for n in (0, *NUMBERS))
    return f"Trained with {max(NUMBERS)} thoughts, decoded with: {cells}.\n"


def votes(rows: Rows) -> str:
    """Majority votes of sampled responses, with and without sampled thoughts."""
    scores = rows.get("lta", ())
    if not scores:
        return ""
    plain, noisy = mean(scores, "vote"), mean(scores, "vote_noise")
    return f"Vote of 8 samples (n = {USUAL}): {plain:.3f}; each with thoughts of its own (noise 0.5): {noisy:.3f}.\n"


def claims_table(rows: Rows) -> str:
    """Markdown; claims whose rows are not there are left out."""
    lines = ["| claim | says | here: mean greedy accuracy | |", "|---|---|---|---|"]
    for text, source, better, worse in CLAIMS:
        if better in rows and worse in rows:
            numbers = f"`{better}` {mean(rows[better]):.3f}, `{worse}` {mean(rows[worse]):.3f}"
            lines.append(f"| {text} | {source} | {numbers} | **{verdict(rows[better], rows[worse])}** |")
    return "\n".join(lines) + "\n"
