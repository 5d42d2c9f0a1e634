"""Transfer-Q* (arXiv 2405.20495): a candidate is worth what a model already aligned (the baseline ρ_BL) makes of it.

direct, where the baseline was aligned to the reward r that is wanted:    TQ*(s, z) = E_{τ ~ ρ_BL(·|s, z)}[r(s, z, τ)]
indirect, where it was aligned to another reward r_BL (`decoding.baseline_scorer`), both with the leash β:
    TQ*(s, z) = E_{τ ~ ρ_BL}[w · r] / E_{τ ~ ρ_BL}[w],   w = exp((r − r_BL)/β)

The weights' normaliser is a function of (s, z), so that it is each candidate's own; normalised, the sign of r does not matter.
With one roll-out the weight would cancel: indirect needs two. Neither value is the soft Q* of KL-regularised RL: at equal α
the result moves further from the reference than controlled decoding does. Compare decoders at equal KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from pipeline.config import ConfigError
from pipeline.decoding.contract import Completion, Prompt, Tools
from pipeline.decoding.guided import Fork, guided
from pipeline.decoding.prefixes import Prefixes
from pipeline.decoding.rollouts import RollOut, mean_by_owner, roll_out, scored


def decode(tools: Tools, prompts: Sequence[Prompt], rolled: RollOut = roll_out) -> list[Completion]:
    """Completions from the reference, guided by roll-outs of the baseline. Indirect where there is a baseline scorer.

    Raises ConfigError where indirect transfer has one roll-out per candidate, or no β.
    """
    options = tools.decoding
    if "baseline_scorer" in tools.scorers:
        check_indirect(options.rollouts, options.rollout_temperature, tools.beta)
    sequences = options.candidates * options.rollouts
    return guided(tools, prompts, partial(value, rolled=rolled), roller="baseline", sequences=sequences)


def check_indirect(rollouts: int, temperature: float, beta: float | None) -> None:
    """Raises ConfigError for settings in which the weights of indirect transfer would be meaningless."""
    if rollouts < 2 or temperature == 0:
        raise ConfigError(
            "decoding.rollouts: with one roll-out per candidate the weights of indirect transfer cancel; set 2 or more, "
            "and decoding.rollout_temperature above 0"
        )
    if beta is None:
        raise ConfigError("decoding.beta: indirect transfer weighs by exp((r − r_BL)/β); give the β of the baseline")


def value(tools: Tools, fork: Fork, prefixes: Prefixes, rolled: RollOut = roll_out) -> Tensor:
    """TQ*(s, z) of each candidate. [A, k]"""
    found = rolled(tools, fork, prefixes)
    rewards = scored(tools, fork, found)
    log_weight = found.log_share
    if "baseline_scorer" in tools.scorers:
        assert tools.beta is not None
        log_weight = log_weight + (rewards - scored(tools, fork, found, "baseline_scorer")) / tools.beta
    return mean_by_owner(rewards, log_weight, found.owner, fork.candidates.numel()).view(fork.candidates.shape)
