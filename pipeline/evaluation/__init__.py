"""What a policy is worth: `EVALUATORS`, one file each. Adding one: a file beside this one and a line here.

An evaluator is a function `measure(study) -> Findings` and what it needs; `findings.METRICS` defines each number, `results` is the
form of `evaluation.json`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.evaluation import calibration, credit, divergence, diversity, held_out, rewards
from pipeline.evaluation.findings import Evaluator, Findings, Unmeasurable
from pipeline.evaluation.results import Skipped

if TYPE_CHECKING:
    from pipeline.evaluation.study import Study

EVALUATORS: dict[str, Evaluator] = {
    "held_out": Evaluator(held_out.measure, frozenset({"rows"})),
    "calibration": Evaluator(calibration.measure, frozenset({"rows"})),
    "rewards": Evaluator(rewards.measure, frozenset({"samples", "scorer"})),
    "second_model": Evaluator(rewards.measure_second, frozenset({"samples", "scorer", "second model"})),
    "divergence": Evaluator(divergence.measure, frozenset({"samples", "plain samples"})),
    "diversity": Evaluator(diversity.measure, frozenset({"samples"})),
    "credit": Evaluator(credit.measure, frozenset({"rows", "token rewards"})),
}


def measure_all(study: Study) -> list[Findings]:
    """The findings of each evaluator that the configuration names (default: all), or why it was skipped."""
    default = [name for name in EVALUATORS if name != "second_model" or study.has_second]
    found = []
    for name in study.config.evaluation.evaluators or default:
        evaluator = EVALUATORS[name]
        reason = next((why for need in sorted(evaluator.needs) if (why := study.lacks(need))), None)
        try:
            found.append(evaluator.measure(study) if reason is None else _skipped(name, reason))
        except Unmeasurable as error:
            found.append(_skipped(name, str(error)))
    return found


def _skipped(name: str, reason: str) -> Findings:
    return Findings(skipped=[Skipped(what=name, reason=reason)])
