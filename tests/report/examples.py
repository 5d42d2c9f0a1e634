"""Results and trials that the report's tests share, with hostile text wherever a model or its data could put it."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.evaluation.results import Auroc, Bin, CreditResponse, CreditRow, Evaluation, Metric, SamplePair, Skipped
from pipeline.report import Point, Trial

ATTACK = (
    "<script>document.title='owned'</script>\"'><img src=x onerror=\"document.title='owned'\">{{ 7 * 7 }}</style>&amp;"
)


def evaluation(text: str = ATTACK) -> Evaluation:
    """A small evaluation that fills every section of the page, all of its texts being `text`."""
    tokens = [text, " ok", "\n"]
    response = CreditResponse(
        label=text, tokens=tokens, values={"implicit reward": [0.5, -0.25, None], text: [1.0, 2.0, 3.0]}, planted=[True, False, False]
    )  # fmt: skip
    return Evaluation(
        title=text,
        metrics={
            "eval/accuracy": Metric(value=0.75, low=0.6, high=0.86, n=40),
            "samples/reward": Metric(value=0.5, standard_error=0.1, n=20),
            "reference/reward": Metric(value=0.25, standard_error=0.1, n=20),
            "samples/entropy": Metric(value=2.5, standard_error=0.1, n=20),
            "reference/entropy": Metric(value=3.0, standard_error=0.1, n=20),
            text: Metric(value=1.0, n=1),
        },
        reliability=[
            Bin(low=0.5, high=0.6, confidence=0.55, accuracy=0.5, n=30),
            Bin(low=0.9, high=1.0, confidence=0.95, accuracy=0.9, n=10),
        ],
        credit=[CreditRow(row_id=3, prompt=text, responses=[response, response])],
        samples=[SamplePair(prompt=text, before=text, after=text, score_before=0.1, score_after=0.4)],
        credit_auroc={text: Auroc(value=0.9, errors=3, sound=9, top_1=0.5, responses=3)},
        skipped=[Skipped(what=text, reason=text)],
    )


def trials(text: str = ATTACK) -> list[Trial]:
    """A sweep of two objectives and two β with a trial that failed, all of its texts being `text`."""
    points = {("dpo", 0.1): (4.0, 0.6), ("dpo", 1.0): (1.0, 0.2), (text, 0.1): (5.0, 0.5), (text, 1.0): (2.0, 0.1)}
    done = [
        Trial(
            label=text,
            objective=objective,
            parameters={"objective.beta": beta, text: text if beta < 1 else "other"},
            metrics={"samples/reward": reward, "samples/reward_se": 0.05, "samples/entropy": 2.0, text: 1.0},
            points=(Point(kl=kl, reward=reward, kl_error=0.2, reward_error=0.05, label=f"{beta:g} {text}"),),
        )
        for (objective, beta), (kl, reward) in points.items()
    ]
    return [*done, Trial(label="last", objective=text, parameters={}, status="failed", reason=text)]


def run(folder: Path, steps: int = 30) -> Path:
    """A run's folder whose chosen reward falls while the margin grows."""
    lines = [
        {"step": s, "loss": 1 / s, "reward/chosen": -0.1 * s, "reward/rejected": -0.3 * s, "reward/margin": 0.2 * s, "log_ratio": -0.1}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
