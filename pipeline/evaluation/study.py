"""One evaluation: what there is to measure on, made at its first use and shared by all evaluators.

    study = Study(config, prepared, weights, …);  study.samples, study.facts, study.passes, …

What is expensive (a pass over the held-out rows, samples of a model, two models' distributions along them) is made once, and only
where an evaluator reads it. What cannot be had is known beforehand: `lacks` says why.

Left out: what is measured (one file an evaluator), and where results go (`jobs.eval`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import ConfigError, RunConfig
from pipeline.evaluation.divergence import Passes, measure_passes, samples_its_own_distribution
from pipeline.evaluation.findings import Need
from pipeline.evaluation.held_out import RowFacts, row_facts
from pipeline.evaluation.samples import Samples, draw

if TYPE_CHECKING:
    from pipeline.driver import Prepared
    from pipeline.prompts import Prompts


@dataclass(frozen=True)  # no slots: cached properties live in __dict__
class Study:
    """The weights under study and everything that is measured on."""

    config: RunConfig
    prepared: Prepared
    weights: str  # exported, as `export.weights_of` gives them
    second: str | None  # weights of evaluation.against
    positions: np.ndarray  # held-out rows
    carried: Mapping[str, float]  # as in `Batch`
    sampling: bool  # whether samples were asked for
    local: bool  # in this process instead of Ray Data

    def lacks(self, need: Need) -> str | None:
        """Why there is no such thing to measure on; None: there is."""
        scores_only = self.config.objective.needed().model == "reward"
        reasons: dict[Need, tuple[bool, str]] = {
            "rows": (False, ""),
            "token rewards": (scores_only, "a reward model scores whole responses, not tokens"),
            "samples": (scores_only, "a reward model writes nothing")
            if scores_only
            else (not self.sampling, "no samples were asked for; set sampling.scorer or give --sample"),
            "plain samples": (
                not samples_its_own_distribution(self.config),
                "sampling is filtered or not at temperature 1: of such samples the estimates would be no KL",
            ),
            "scorer": (self.config.sampling.scorer is None, "no scorer; set sampling.scorer"),
            "second model": (self.second is None, "no second model; set evaluation.against"),
        }
        missing, reason = reasons[need]
        return reason if missing else None

    @property
    def has_second(self) -> bool:
        return self.second is not None

    # ---------------------------------------------------------------------------------------- held-out rows

    @cached_property
    def facts(self) -> list[RowFacts]:
        """Losses, metrics and ordered pairs, row by row."""
        return row_facts(self.config, self.prepared, self.weights, self.positions, self.local, self.carried)

    # ---------------------------------------------------------------------------------------------- samples

    @cached_property
    def prompts(self) -> Prompts:
        """What all models are sampled from."""
        from pipeline.prompts import read_prompts

        return read_prompts(self.config, self.prepared)

    @cached_property
    def samples(self) -> Samples:
        """The policy's own."""
        return self._draw(self.weights, self.prompts)

    @cached_property
    def reference_samples(self) -> Samples:
        """The reference's, of the same prompts."""
        return self._draw(self.prepared.frozen, self.prompts)

    @cached_property
    def second_samples(self) -> Samples:
        """Those of `evaluation.against`, of the same prompts. Raises ConfigError where its tokenizer cannot read them."""
        assert self.second is not None
        return self._draw(self.second, self._second_prompts())

    def _draw(self, model: str, prompts: Prompts) -> Samples:
        return draw(self.config, model, prompts.ids, prompts.texts, sorted(prompts.stop_ids), self.local)

    def _second_prompts(self) -> Prompts:
        """The prompts as tokens of the second model: the same ones, unless its tokenizer is another."""
        from pipeline.data import tokenizer_identity
        from pipeline.pretrained import load_tokenizer
        from pipeline.prompts import read_prompts

        assert self.second is not None
        trust = self.config.model.trust_remote_code
        own, other = (tokenizer_identity(load_tokenizer(p, trust)) for p in (self.prepared.model, self.second))
        if own == other:
            return self.prompts
        if self.config.sampling.prompts is None:
            raise ConfigError(
                "evaluation.against: its tokenizer differs, and held-out rows are tokens; give the prompts as sampling.prompts"
            )
        theirs = read_prompts(self.config, replace(self.prepared, model=self.second))
        if len(theirs.ids) != len(self.prompts.ids):
            raise ConfigError(
                "evaluation.against: its tokenizer cannot use all of sampling.prompts; give shorter prompts"
            )
        return theirs

    # ---------------------------------------------------------------------------- two models' distributions

    @cached_property
    def passes(self) -> Passes:
        """Policy against reference, on the policy's samples."""
        return measure_passes(self.config, self.weights, self.prepared.frozen, self.samples, self.local)

    @cached_property
    def reference_passes(self) -> Passes:
        """Reference against policy, on the reference's samples."""
        return measure_passes(self.config, self.prepared.frozen, self.weights, self.reference_samples, self.local)
