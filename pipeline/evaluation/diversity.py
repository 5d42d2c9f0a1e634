"""How unlike each other a model's completions are: distinct-n, self-BLEU, entropy; and how long they are.

The same for the reference beside the policy, since all of these depend on prompts and lengths. Words are what white space
separates. Self-BLEU is sacrebleu's sentence BLEU, with its tokenisation and smoothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import ConfigError
from pipeline.evaluation.divergence import samples_its_own_distribution
from pipeline.evaluation.estimates import mean, metric, share
from pipeline.evaluation.findings import Findings
from pipeline.evaluation.results import Metric, Skipped
from pipeline.evaluation.samples import Samples

if TYPE_CHECKING:
    from pipeline.evaluation.study import Study

ORDERS = (1, 2, 3)
ACROSS = 64
"""Prompts that self-BLEU across prompts compares: its cost grows with their square."""


def measure(study: Study) -> Findings:
    """`<who>/length, empty, distinct_n, self_bleu, self_bleu_across, entropy` for policy and reference, and samples side by side."""
    from pipeline.evaluation.rewards import side_by_side

    check_library()
    before = study.second_samples if study.has_second else study.reference_samples
    found = Findings(samples=side_by_side(before, study.samples, study.config.evaluation.samples_shown))
    for who, samples in (("samples", study.samples), ("reference", study.reference_samples)):
        found.metrics.update({f"{who}/{name}": value for name, value in of_samples(samples).items()})
    if samples_its_own_distribution(study.config):
        for who, passes in (("samples", study.passes), ("reference", study.reference_passes)):
            found.metrics[f"{who}/entropy"] = passes.per_token("entropy")
    else:
        found.skipped.append(Skipped(what="samples/entropy", reason="sampling changes the distribution"))
    return found


def of_samples(samples: Samples) -> dict[str, Metric]:
    """What can be told from completions alone."""
    texts = [[c["text"] for c in group] for group in samples.completions]
    empty = [float(np.mean([not text.strip() for text in group])) for group in texts]
    found = {"length": mean(samples.lengths()), "empty": share(float(np.mean(empty)), len(empty))}
    for n in ORDERS:
        if (value := distinct(texts, n)) is not None:
            found[f"distinct_{n}"] = value
    within = [self_bleu(group) for group in texts]
    if any(value is not None for value in within):
        found["self_bleu"] = mean([value for value in within if value is not None], 0.0, 100.0)
    across = [group[0] for group in texts[:ACROSS]]
    if (value := self_bleu(across)) is not None:
        found["self_bleu_across"] = Metric(value=value, n=len(across))
    return found


def distinct(texts: Sequence[Sequence[str]], n: int) -> Metric | None:
    """Different word n-grams over all n-grams, of the completions of all prompts together; None where there is no n-gram.

    texts: completions by prompt. The standard error is the delete-one jackknife's over prompts.
    """
    by_prompt = [Counter(gram for text in group for gram in _grams(text.split(), n)) for group in texts]
    owners = Counter(gram for own in by_prompt for gram in own)  # how many prompts have it
    sizes = np.array([own.total() for own in by_prompt])
    count, different = int(sizes.sum()), len(owners)
    if not count:
        return None
    exclusive = np.array([sum(owners[gram] == 1 for gram in own) for own in by_prompt])
    kept, m = sizes < count, len(texts)
    if m < 2 or not kept.all():
        return Metric(value=different / count, n=m)
    without = (different - exclusive) / (count - sizes)
    error = math.sqrt((m - 1) / m * float(((without - without.mean()) ** 2).sum()))
    return metric(different / count, error, m, 0.0, 1.0)


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean sentence BLEU, 0 … 100, of each text against all others; None for fewer than two texts with words."""
    from sacrebleu.metrics import BLEU

    written = [text for text in texts if text.strip()]
    if len(written) < 2:
        return None
    bleu = BLEU(effective_order=True)  # shorter texts are scored by the n-grams that they have
    scores = [bleu.sentence_score(text, written[:i] + written[i + 1 :]).score for i, text in enumerate(written)]
    return float(np.mean(scores))


def check_library() -> None:
    """Raises ConfigError where sacrebleu is not installed."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"evaluation.evaluators: diversity needs sacrebleu ({error}); pip install sacrebleu"
        ) from None
