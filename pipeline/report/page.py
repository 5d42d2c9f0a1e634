"""Writes the pages: charts, tables and texts into one HTML file without a single outside reference.

Every text from a model or its data is escaped (autoescape everywhere, no text reaches the script or the style sheet), and the page's own
security policy lets no script or style run but ours, by hash. The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.durable import write_text
from pipeline.errors import UserError
from pipeline.progress import METRICS_FILE, read_metrics
from pipeline.redaction import redact
from pipeline.report import evaluation, sweep
from pipeline.report.content import Trial
from pipeline.report.curves import curves, last_values
from pipeline.report.falling import FALLING, chosen_falls
from pipeline.report.frontier import frontier
from pipeline.report.parameters import parameter_charts
from pipeline.report.reliability import reliability
from pipeline.report.scales import number
from pipeline.report.tokens import CODES, LEVELS, heatmap

if TYPE_CHECKING:
    from pipeline.evaluation.results import Evaluation


def write_evaluation_report(results: Evaluation, run: Path | None, output: Path) -> Path:
    """The page of one evaluation at `output`.

    run: folder of the run whose weights were evaluated, for its training curves; None where they are no run's.
    Raises UserError where the file cannot be written.
    """
    lines = read_metrics(run / METRICS_FILE) if run is not None else []
    last = last_values(lines)
    metrics = results.metrics
    page = _render(
        "evaluation.html.j2",
        title=results.title,
        cards=evaluation.cards(metrics),
        reliability=_reliability(results),
        curves=curves(lines),
        # Rewards are log-ratios to a reference where log-ratios were logged: the explanation is about these.
        falling=FALLING if "log_ratio" in last and chosen_falls(last) else None,
        diversity=evaluation.diversity_table(metrics),
        metrics=evaluation.metric_table(metrics),
        samples=evaluation.samples(results.samples),
        all_samples=len(results.samples),
        before={"reference": "reference", "against": "other model"}[results.before],
        auroc=evaluation.auroc_table(results.credit_auroc),
        heat=heatmap(results.credit),
        skipped=results.skipped,
    )
    return _write(page, output)


def write_sweep_report(
    title: str, trials: Sequence[Trial], output: Path, metric: str | None = None, mode: sweep.Mode = "max"
) -> Path:
    """The page of one sweep at `output`.

    metric, mode: what the sweep optimised: ranks the trials, and is plotted against every parameter that varied.
    Raises UserError where the file cannot be written.
    """
    best_first = sweep.ranked(trials, metric, mode)
    page = _render(
        "sweep.html.j2",
        title=title,
        cards=sweep.cards(trials, metric, mode),
        frontier=frontier(trials),
        parameters=parameter_charts(trials, metric) if metric else [],
        diversity=sweep.metric_table(best_first, diversity=True),
        trials=sweep.trial_table(best_first, metric),
        metrics=sweep.metric_table(best_first, diversity=False),
    )
    return _write(page, output)


def _reliability(results: Evaluation) -> list[Any]:
    own = reliability(
        results.reliability,
        "reliability",
        "The objective's own preference probability",
        "confidence in the preferred response",
        "How sure the objective is which response is better, and how often that is the data's order.",
    )
    likelihood = reliability(
        results.likelihood_reliability,
        "likelihood-reliability",
        "Length-normalised likelihood",
        "exp(mean log π of the chosen response's tokens)",
        "The confidence of the f-DPO authors. It measures likelihood, not preference, and is shown for comparison with their figures.",
    )
    return [chart for chart in (own, likelihood) if chart]


# ------------------------------------------------------------------------------------------------ rendering


def printable(value: object) -> object:
    """A text with what a reader could not see spelled out, as in ⟨U+001B⟩: control characters, halves of surrogate pairs (which no
    file can hold) and marks that turn the direction of the text around them."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(map(_visible, value))


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in _TURNS
    return f"⟨U+{ord(character):04X}⟩" if hidden and character not in "\n\t" else character


_TURNS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = partial(number, digits=3)
    return environment


def _render(template: str, **content: Any) -> str:
    environment = _environment()
    style = environment.get_template("style.css.j2").render(codes=CODES, levels=LEVELS)
    script = environment.get_template("script.js.j2").render()
    return environment.get_template(template).render(
        style=Markup(style),  # noqa: S704 - ours, no outside text
        script=Markup(script),  # noqa: S704 - ours, no outside text
        style_hash=_hash(style),
        script_hash=_hash(script),
        **content,
    )


def _hash(text: str) -> str:
    """A source expression of a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _write(page: str, output: Path) -> Path:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, redact(page))
    except OSError as error:
        raise UserError(f"{output}: the report cannot be written ({error.strerror}); give another place") from None
    return output
