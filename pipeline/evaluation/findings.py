"""What evaluators find, what they need, and what every number of theirs means.

    evaluator.measure(study) -> Findings;    many Findings -> one `results.Evaluation`

Left out: the study they measure on (`study`), and the evaluators (one file each, `EVALUATORS`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pipeline.evaluation.results import Auroc, Bin, CreditRow, Evaluation, Metric, SamplePair, Skipped

if TYPE_CHECKING:
    from pipeline.evaluation.study import Study

Need = Literal["rows", "samples", "plain samples", "scorer", "second model", "token rewards"]
"""What an evaluator measures on; `Study.lacks` says why something is not there."""

METRICS: dict[str, str] = {
    "eval/<metric>": "a metric of training (`pipeline.metrics`) on the held-out rows; the standard error is over rows",
    "ece": "expected calibration error of the objective's own preference probability σ(Δ reward): mean gap of "
    "confidence and accuracy over bins of confidence 0.5 … 1, weighted by the pairs in them; each row counts as one",
    "brier": "mean squared distance of that probability from 1, over the pairs in the data's order",
    "ece_likelihood": "the f-DPO authors' ECE: confidence is exp(mean log π per token) of the better response, right is "
    "a pair whose better response has the higher one; says how likely responses are, not how sure the preference is",
    "<who>/reward": "mean score of the completions under sampling.scorer",
    "<who>/length": "mean tokens of a completion, with the token that ended it",
    "<who>/kl": "KL of the model that sampled to the other one (samples: policy ‖ reference; reference: reference ‖ policy), nats "
    "per completion: the exact KL of the two next-token distributions, summed over the steps of the sampled completions",
    "<who>/kl_monte_carlo": "the same from the log-ratio of the sampled completions alone: noisier, same expectation",
    "<who>/kl_per_token": "<who>/kl divided by the tokens of the completions",
    "<who>/entropy": "mean exact entropy of the next-token distribution along the completions, nats per token",
    "<who>/distinct_<n>": "different n-grams of words over all n-grams of words, in all completions together; falls with their "
    "number, so compare equal numbers only; the standard error is a jackknife over prompts",
    "<who>/self_bleu": "mean BLEU (sacrebleu, 0 … 100) of a completion against the others of the same prompt; high = alike",
    "<who>/self_bleu_across": "the same of one completion per prompt against those of other prompts (at most 64)",
    "<who>/empty": "share of completions without any text",
    "samples/win_rate_over_reference": "chance that a completion of the policy scores above one of the reference to the same prompt; ties half",
    "samples/win_rate": "the same against the samples of evaluation.against",
    "scorer/failed": "completions of policy and reference that the scorer raised on or gave no finite number for; they count nowhere",
    "scorer/failed_second": "the same of the second model",
    "credit/auroc/<score>": "chance that a planted error's token has a higher score than a sound token",
}
"""Definitions by name. <who> is `samples` (the policy), `reference`, or `second` (evaluation.against)."""


class Unmeasurable(Exception):
    """There is nothing to measure here: the message says why, and goes to the results."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What one evaluator found; the fields are those of `results.Evaluation`."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    reliability: list[Bin] = field(default_factory=list)
    likelihood_reliability: list[Bin] = field(default_factory=list)
    credit: list[CreditRow] = field(default_factory=list)
    samples: list[SamplePair] = field(default_factory=list)
    credit_auroc: dict[str, Auroc] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """One entry of `EVALUATORS`: what it measures, and on what."""

    measure: Callable[[Study], Findings]
    needs: frozenset[Need]


def combine(title: str, found: Sequence[Findings]) -> Evaluation:
    """All findings as one evaluation."""
    return Evaluation(
        title=title,
        metrics={name: metric for part in found for name, metric in part.metrics.items()},
        reliability=[line for part in found for line in part.reliability],
        likelihood_reliability=[line for part in found for line in part.likelihood_reliability],
        credit=[row for part in found for row in part.credit],
        samples=[pair for part in found for pair in part.samples],
        credit_auroc={name: value for part in found for name, value in part.credit_auroc.items()},
        skipped=[skipped for part in found for skipped in part.skipped],
    )
