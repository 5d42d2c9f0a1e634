"""The parts of an evaluation's page that are not charts: headline, tables, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.report.charts import Table
from pipeline.report.definitions import definition
from pipeline.report.scales import Z95, number, range_text

if TYPE_CHECKING:
    from pipeline.evaluation.results import Auroc, Metric, SamplePair

MOST_SAMPLES, MOST_CHARACTERS = 30, 1500
"""Samples on a page, and characters of each."""


@dataclass(frozen=True, slots=True)
class Card:
    """A headline number."""

    title: str
    value: str
    interval: str
    meaning: str


HEADLINE: dict[str, tuple[str, str, str]] = {
    "eval/accuracy": ("Preference accuracy", "of held-out pairs in the data's order", ""),
    "eval/reward/margin": ("Reward margin", "chosen minus rejected implicit reward, held-out", ""),
    "samples/reward": ("Mean reward", "own samples, under the scorer", "reference/reward"),
    "samples/win_rate_over_reference": ("Wins over the reference", "same prompts, ties count half", ""),
    "samples/win_rate": ("Wins over the other model", "same prompts, ties count half", ""),
    "samples/kl": ("KL(π ‖ π_ref)", "nats per response, exact at each step, own samples", ""),
    "ece": ("Calibration error", "ECE of the objective's preference probability", ""),
}
"""Metrics on top of the page, in this order, where they were measured: title, meaning, and the metric to compare with."""
WHO = {"samples": "policy", "reference": "reference", "second": "other model"}
"""First part of a metric's name → whose samples it is about."""
DIVERSITY = ("entropy", "distinct", "self_bleu", "length", "empty")
"""A metric of samples whose name starts with one of these belongs to the diversity table."""


def cards(metrics: Mapping[str, Metric]) -> list[Card]:
    """The headline; of an evaluation that measured none of it, the first metrics."""
    named = {name: words for name, words in HEADLINE.items() if name in metrics}
    named = named or {name: (name, "", "") for name in list(metrics)[:6]}
    return [_card(metrics, name, *words) for name, words in named.items()]


def _card(metrics: Mapping[str, Metric], name: str, title: str, meaning: str, beside: str) -> Card:
    own, parts = metrics[name], [meaning] if meaning else []
    if beside in metrics:
        parts.append(f"{WHO[beside.partition('/')[0]]} {number(metrics[beside].value, 3)}")
    return Card(title, number(own.value, 3), interval(own), "; ".join([*parts, f"n = {own.n}"]))


def interval(metric: Metric) -> str:
    """The 95 % interval in words: as measured, else from the standard error; empty where neither is known."""
    if metric.low is not None and metric.high is not None:
        return range_text(metric.low, metric.high)
    if metric.standard_error is None:
        return ""
    half = Z95 * metric.standard_error
    return range_text(metric.value - half, metric.value + half)


def is_diversity(name: str) -> bool:
    """Whether a metric belongs to the diversity table."""
    who, _, rest = name.partition("/")
    return who in WHO and rest.startswith(DIVERSITY)


def diversity_table(metrics: Mapping[str, Metric]) -> Table:
    """Diversity of the policy's samples beside that of the others'; without rows where none was measured."""
    split = [name.partition("/") for name in metrics if is_diversity(name)]
    whose = [who for who in WHO if any(who == first for first, _, _ in split)]
    measures = dict.fromkeys(rest for _, _, rest in split)
    rows = [[rest, *(_with_interval(metrics.get(f"{who}/{rest}")) for who in whose)] for rest in measures]
    return Table(["measure", *(f"{WHO[who]} (95 %)" for who in whose)], rows)


def _with_interval(found: Metric | None) -> str:
    if found is None:
        return "–"
    return number(found.value) + (f"  ({interval(found)})" if interval(found) else "")


def metric_table(metrics: Mapping[str, Metric]) -> Table:
    """Metrics with their 95 % intervals and what they mean."""
    rows = [
        [name, number(m.value), interval(m) or "–", number(m.standard_error, 2), str(m.n), definition(name)]
        for name, m in metrics.items()
    ]
    return Table(["metric", "value", "95 % interval", "s.e.", "n", "meaning"], rows)


def auroc_table(found: Mapping[str, Auroc]) -> Table:
    """How well each score finds planted errors, best first."""
    ordered = sorted(found.items(), key=lambda item: -item[1].value)
    rows = [
        [name, number(a.value), number(a.top_1, 3), str(a.errors), str(a.sound), str(a.responses)]
        for name, a in ordered
    ]
    columns = ["score", "AUROC", "top token is an error", "error tokens", "sound tokens", "responses"]
    return Table(columns, rows)


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with two completions, cut to what fits."""

    prompt: str
    before: str
    after: str
    score_before: str  # "" where it was not scored
    score_after: str
    change: str  # better | worse | same | ""


def samples(found: Sequence[SamplePair]) -> list[Sample]:
    """The first `MOST_SAMPLES` pairs, ready to show."""
    return [_sample(pair) for pair in found[:MOST_SAMPLES]]


def _sample(pair: SamplePair) -> Sample:
    change = ""
    if pair.score_before is not None and pair.score_after is not None:
        gain = pair.score_after - pair.score_before
        change = "better" if gain > 0 else "worse" if gain < 0 else "same"
    scores = ("" if s is None else number(s, 3) for s in (pair.score_before, pair.score_after))
    return Sample(*map(_cut, (pair.prompt, pair.before, pair.after)), *scores, change)


def _cut(text: str) -> str:
    rest = len(text) - MOST_CHARACTERS
    return text if rest <= 0 else f"{text[:MOST_CHARACTERS]} … ({rest} more characters)"
