"""What `evaluation.json` holds: the numbers of one evaluation, and what its pictures are drawn from.

    evaluation.json = Evaluation(title, metrics, reliability, credit, samples, credit_auroc, skipped)

The structure is plain JSON; `read` and `Evaluation.write` are the only ways in and out. Numbers that are not finite never
reach the file: a metric that could not be measured is left out, with its reason under `skipped`.

Left out: how any number is measured (one file an evaluator beside this one), and drawing (the report).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.config import ConfigError
from pipeline.durable import Corrupt, read_json, write_json

FILE = "evaluation.json"


class Part(BaseModel):
    """A part of the results: frozen, refuses unknown keys and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Metric(Part):
    """A measured number with what is known of its error."""

    value: float
    standard_error: float | None = None
    """Of the mean over `n` independent units (prompts or rows); null where it has none."""
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    n: int
    """Independent units behind the value: rows, prompts, pairs or tokens, as the metric's definition says."""


class Bin(Part):
    """One bin of a reliability diagram: how sure the model was, and how often it was right."""

    low: float
    high: float
    confidence: float
    """Mean confidence in the bin."""
    accuracy: float
    """Share of the bin's pairs that were ordered rightly."""
    n: int


class CreditResponse(Part):
    """One response, token by token; each list of `values` is as long as `tokens`, null where a token has none."""

    label: str
    """chosen, rejected, or its rank and return."""
    tokens: list[str]
    values: dict[str, list[float | None]]
    """By name: "implicit reward", "-log π_ref", and with a critic "advantage" and "V"."""
    planted: list[bool] | None = None
    """True at tokens that hold a planted error; null where none was planted."""


class CreditRow(Part):
    """The responses to one prompt, side by side."""

    row_id: int
    prompt: str
    responses: list[CreditResponse]


class SamplePair(Part):
    """One prompt's first completion by the reference (or the second model) and by the policy."""

    prompt: str
    before: str
    after: str
    score_before: float | None = None
    score_after: float | None = None


class Auroc(Part):
    """How well a score finds the tokens that hold an error: the chance that it ranks one above a sound token."""

    value: float
    errors: int
    """Tokens that hold an error."""
    sound: int
    """Tokens that do not."""
    top_1: float
    """Share of the responses whose highest-ranked token holds an error."""
    responses: int


class Skipped(Part):
    """Something that was not measured, and why."""

    what: str
    reason: str


class Evaluation(Part):
    """All of one evaluation."""

    title: str
    metrics: dict[str, Metric]
    reliability: list[Bin] = []
    """Of the objective's own preference probability; empty where it has none."""
    likelihood_reliability: list[Bin] = []
    """Of the length-normalised likelihood, the confidence of the f-DPO authors."""
    credit: list[CreditRow] = []
    samples: list[SamplePair] = []
    before: Literal["reference", "against"] = "reference"
    """Whose completions `samples.before` are: the reference's, or those of `evaluation.against`."""
    credit_auroc: dict[str, Auroc] = {}
    """By score: "-implicit reward", "-log π_ref", …; measured on planted errors."""
    skipped: list[Skipped] = []

    def numbers(self) -> dict[str, float]:
        """Each metric's value, and its standard error as `<name>_se` where it is known."""
        values = {name: metric.value for name, metric in self.metrics.items()}
        errors = {f"{name}_se": metric.standard_error for name, metric in self.metrics.items()}
        return values | {name: error for name, error in errors.items() if error is not None}

    def write(self, path: Path) -> Path:
        """Write the file at once or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.model_dump(mode="json"))
        return path


def read(path: Path) -> Evaluation:
    """The evaluation in a file. Raises ConfigError where there is none, or another structure."""
    try:
        return read_json(path, Evaluation.model_validate, "it is no evaluation of this version: run qalign eval again")
    except Corrupt as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); run qalign eval first") from None
