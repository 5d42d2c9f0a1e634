"""Sections of the configuration about data: which records, and how they become token rows."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.records import FIELDS, RecordKind
from pipeline.sections.base import Count, Fraction, Name, Place, Section


def check_answer_pattern(pattern: str) -> None:
    """Raises ValueError unless it is a regular expression with one group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"answer_pattern: no regular expression ({error})") from None
    if groups != 1:
        raise ValueError(f"answer_pattern: needs one group (…) around the answer, has {groups}")


class TrajectoryColumns(Section):
    """Where one trajectory lies in a record of another layout; columns may be dotted: `model_a.solution`."""

    steps: Name
    """Column with the text (cut into steps at `separator`) or a list of steps."""
    separator: str | None = "\n"
    """Ends each step of a text, and stays with it; null: the text is one step."""
    reward: float | str | None = None
    """Terminal reward: a column with a number or true/false (1 or 0), or a number for all records."""
    answer: Name | None = None
    """Column with the right answer: the terminal reward is 1 where the trajectory's answer matches, else 0."""
    answer_pattern: str = r"(?:####|\bA:|(?i:\banswer)(?: is)?:?|\\boxed\{)\s*([^\n]+)"
    """Regular expression whose group, at its last match, is the answer (the whole text where it has no match)."""
    step_rewards: Name | None = None
    """Column with one reward per step."""
    step_logprobs: Name | None = None
    """Column with one log-probability per step, under the policy that wrote it."""

    @model_validator(mode="after")
    def _one_reward(self) -> TrajectoryColumns:
        if self.reward is not None and self.answer is not None:
            raise ValueError("answer: remove it, or remove reward (only one can be the terminal reward)")
        check_answer_pattern(self.answer_pattern)
        return self


class Source(Section):
    """One place records come from."""

    path: Place
    """File, glob or folder of jsonl / parquet files, a folder saved by `datasets`, or a data set's hub name."""
    format: Literal["auto", "jsonl", "parquet", "huggingface"] = "auto"
    """`auto` goes by the file ending; `huggingface` reads a saved folder or a hub name."""
    columns: dict[str, str] = Field(default={})
    """Our field: your column (dotted where nested), e.g. {prompt: question, chosen: best_answer}."""
    subset: str | None = None
    """Configuration name of a Hugging Face data set."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    trajectories: tuple[TrajectoryColumns, ...] = ()
    """For data.kind=trajectory: where each trajectory of a record lies, when the columns are not ours."""
    limit: Count | None = None
    """Read no more than so many records, from the beginning; default: `data.limit`."""
    share: Annotated[float, Field(gt=0)] | None = None
    """Share of this source in the mix. Set it on all sources or none (= every row of every source is used)."""


def _around_prompt(template: str) -> str:
    if template.count("{prompt}") != 1:
        raise ValueError("needs {prompt} once, where the prompt goes")
    return template


class DataConfig(Section):
    """Which records, and how they become token rows."""

    kind: RecordKind
    """What one record is; has to fit the objective."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Training records."""
    eval_sources: tuple[Source, ...] = ()
    """Held-out records. Empty: `eval_fraction` of the training prompts is held out."""
    limit: Count | None = None
    """Read no more than so many records of each source, from its beginning: to try something out."""
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the training prompts to hold out (by prompt, so that no prompt is on both sides)."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens of prompt + one response. Prompts are cut first, from the left, of dialogues whole turns where that is enough; then
    responses from the right. All is counted."""
    max_prompt_length: Annotated[int, Field(ge=1)] | None = None
    """A tighter bound on the prompt alone."""
    min_prompt_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens of a prompt that stay, however long the responses are; default: a quarter of max_length. For responses that do not fit
    beside so much a prompt is cut to half of max_length at most."""
    prompt_template: Annotated[str, AfterValidator(_around_prompt)] | None = None
    """Text around plain-text prompts, e.g. "Question: {prompt}\\nAnswer:". Dialogues have their chat template."""
    chat_template: str | None = None
    """Jinja template that replaces the tokenizer's own for message lists."""
    append_eos: bool = True
    """End each response with the tokenizer's EOS (never when a chat template already ended the turn, nor after a cut)."""
    ties: Literal["refuse", "first"] = "refuse"
    """Tied ranks: quarantine the record, or take the order in the file."""
    max_record_bytes: Annotated[int, Field(ge=1, le=2**40)] = 16 * 2**20
    """A record that is larger in its file is quarantined unread: text takes some seventy times its size in memory as it is tokenised."""
    max_bad_fraction: Fraction = 0.1
    """Stop when more than this share of the records is unusable."""

    @model_validator(mode="after")
    def _known_columns(self) -> DataConfig:
        known = FIELDS[self.kind]
        for key, sources in (("sources", self.sources), ("eval_sources", self.eval_sources)):
            for i, source in enumerate(sources):
                for name in sorted(source.columns.keys() - known):
                    near = get_close_matches(name, known, n=1)
                    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
                    raise ValueError(f"{key}.{i}.columns.{name}: no field of a {self.kind}; {hint}")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        shares = [source.share is None for source in self.sources]
        if any(shares) and not all(shares):
            raise ValueError("sources: set `share` on all sources or on none")
        if self.eval_sources and self.eval_fraction:
            raise ValueError("eval_fraction: remove it, or remove eval_sources (only one can name the held-out rows)")
        if self.min_prompt_length is not None and self.min_prompt_length >= self.max_length:
            raise ValueError("min_prompt_length: must be below max_length, or no room is left for a response")
        if self.min_prompt_length is not None and self.min_prompt_length > (self.max_prompt_length or self.max_length):
            raise ValueError("min_prompt_length: must not exceed max_prompt_length")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length: must be below max_length, or no room is left for a response")
        return self
