"""The decoders and their settings: one `Point` is one call of `jobs.decode`.

Decoders that have a knob for their distance from the SFT model are run at several settings, so that rewards can be compared at
equal KL. Guided decoders draw from their distribution (temperature 1), since a greedy choice has no KL that could be matched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.decoding.world import EMOTION, World

GREEDY = {"temperature": 0.0}
ALPHAS = (0.4, 0.15, 0.05, 0.02)
QUICK_ALPHAS = (0.15, 0.02)
BEAMS = (2, 5, 10)
ROLLOUTS = {"candidates": 10, "rollouts": 2}
"""Of the guided decoders: two sampled roll-outs, to the response's end, behind each of the reference's 10 likeliest tokens."""


@dataclass(frozen=True, slots=True)
class Point:
    """A decoder at one setting."""

    curve: str  # what it belongs to: settings of one curve differ in one knob
    setting: str  # the knob's, for people
    changes: Mapping[str, Any]  # of the configuration
    kl: Literal["draws", "point", "bound"] = "draws"  # how its KL is known: see `measures`

    @property
    def name(self) -> str:
        """For file names."""
        plain = f"{self.curve} {self.setting}".strip().replace("α", "alpha")
        return plain.translate(str.maketrans({" ": "-", "=": None, "*": None}))


def points(world: World) -> list[Point]:
    """All of them, the cheap ones first."""
    return [*_sampled(world), *_best_of_n(world), *_proxy(world), *_guided(world)]


def _sampled(world: World) -> Iterator[Point]:
    many = {"per_prompt": world.size.copies, "batch_size": 512}
    for curve, model in (("SFT", world.reference), ("aligned", world.sentiment)):
        yield Point(f"{curve} sampled", "", _call("sampling", model, many))
        yield Point(f"{curve} greedy", "", _call("sampling", model, GREEDY), kl="point")
        for beams in BEAMS:
            yield Point(f"{curve} beam", f"beams={beams}", _call("beam", model, {}, beams=beams), kl="point")


def _best_of_n(world: World) -> Iterator[Point]:
    for n in (2, 8) if world.size.quick else (2, 4, 8, 16, 64):
        changes = _call("best_of_n", world.reference, {"batch_size": 512}, n=n)
        yield Point("best of n", f"n={n}", changes, kl="bound")


def _proxy(world: World) -> Iterator[Point]:
    many = {"per_prompt": world.size.copies, "batch_size": 256}
    for weight in (1.0,) if world.size.quick else (0.5, 1.0, 1.5, 2.0):
        yield Point("proxy", f"w={weight:g}", _call("proxy", world.sentiment, many, weight=weight))


def _guided(world: World) -> Iterator[Point]:
    """ARGS costs no roll-outs; indirect transfer starts from the model that was aligned to the other reward."""
    batch = {"batch_size": 1280}
    for alpha in QUICK_ALPHAS if world.size.quick else ALPHAS:
        args = _call("args", world.reference, {"batch_size": 64}, alpha=alpha, candidates=ROLLOUTS["candidates"])
        yield Point("ARGS", f"α={alpha:g}", args)
        yield Point("CD", f"α={alpha:g}", _call("controlled", world.reference, batch, alpha=alpha, **ROLLOUTS))
        direct = _call("transfer_q", world.reference, batch, alpha=alpha, baseline=world.sentiment, **ROLLOUTS)
        yield Point("TQ* direct", f"α={alpha:g}", direct)
        other = {"baseline": world.emotional, "baseline_scorer": EMOTION}
        indirect = _call("transfer_q", world.reference, batch, alpha=alpha, **other, **ROLLOUTS)
        yield Point("TQ* indirect", f"α={alpha:g}", indirect)


def _call(method: str, model: str, sampling: Mapping[str, Any], **decoding: Any) -> dict[str, Any]:
    return {"checkpoint_from": model, "sampling": dict(sampling), "decoding": {"method": method, **decoding}}
