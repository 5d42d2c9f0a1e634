"""Do token rewards find planted errors? Chain arithmetic, misconceptions against random wrong digits: `python -m benchmarks.credit`.

A model that learned from a teacher with firm wrong beliefs (the checkpoint that ships with the tests) is trained with DQO on its
own samples and their outcomes. Then one result digit of a right solution is changed, and later lines go on from it: to the
value that the teacher believes (a misconception), or to a random wrong digit. Asked is which score finds the digit: −token
reward, or surprise under the starting model (−log π_ref) or the trained one (−log π). All of it runs through the pipeline and
its `credit` evaluator, in this process; finished parts are not repeated.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.chain_arithmetic import (
    MID,
    OPERATIONS,
    RESPONSE_TOKENS,
    Fact,
    misconceptions,
    operations,
    result,
)
from benchmarks.reasoning import runs
from benchmarks.reasoning.methods import BLOCKS, merge
from benchmarks.reasoning.records import KIND, write
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.durable import write_json
from pipeline.errors import UserError
from pipeline.evaluation.credit import SUSPICION, find_errors, values_of
from pipeline.evaluation.planted import read_planted
from pipeline.evaluation.results import Auroc

CHECKPOINT = Path(__file__).parents[1] / "tests" / "data" / "chain-arithmetic-mid"
BELIEFS_SEED = 0
"""Of the teacher that the checkpoint learned from."""
Kind = Literal["misconception", "random"]
KINDS: tuple[Kind, ...] = ("misconception", "random")
DIGITS = np.arange(RESPONSE_TOKENS) % 6 == 4
"""Places of results: every line has six characters."""

Table = dict[str, dict[str, dict[str, Any]]]
"""Kind → score → AUROC among all tokens and among result digits, top-1, responses."""


# ------------------------------------------------------------------------------------------------ planting


def plant(prompt: str, kind: Kind, beliefs: Mapping[Fact, int], chance: random.Random) -> dict[str, Any] | None:
    """A right solution with one wrong result, as a record of `evaluation.planted`; later lines go on from it.

    A misconception stands where a right chain meets a fact of `beliefs`; None where it meets none.
    """
    chain = facts_of(prompt)
    places = [i for i, fact in enumerate(chain) if kind == "random" or fact in beliefs]
    if not places:
        return None
    at = chance.choice(places)
    value, written = int(prompt[0]), ""
    for i, (op, operand) in enumerate(operations(prompt)):
        right = result(value, op, operand)
        found = right
        if i == at and kind == "misconception":
            found = beliefs[value, op, operand]
        elif i == at:
            found = chance.choice([digit for digit in range(10) if digit != right])
        written += f"{value}{op}{operand}={found}\n"
        value = found
    return {"prompt": prompt, "response": written, "errors": [[6 * at + 4, 6 * at + 5]]}


def facts_of(prompt: str) -> list[Fact]:
    """The facts that a right solution uses."""
    value, chain = int(prompt[0]), []
    for op, operand in operations(prompt):
        chain.append((value, op, operand))
        value = result(*chain[-1])
    assert len(chain) == OPERATIONS
    return chain


def planted_records(kind: Kind, prompts: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """One record for each prompt that such an error can be planted in."""
    beliefs, chance = misconceptions(MID, BELIEFS_SEED), random.Random(f"planted/{kind}/{seed}")  # noqa: S311
    cases = (plant(prompt, kind, beliefs, chance) for prompt in prompts)
    return [case for case in cases if case is not None]


# ----------------------------------------------------------------------------------------------- measuring


def trained(place: runs.Place, method: str, epochs: int | None) -> tuple[RunConfig, str]:
    """The configuration and the exported weights of the method, trained from the checkpoint on its own samples."""
    block = BLOCKS["mid"]
    plain = merge(block.methods[method].config, {"tracking": {"enabled": False}})
    if epochs is not None:
        plain = merge(plain, {"train": {"epochs": epochs}})
    chosen = block.methods[method]
    folder = place.world("credit", 0)
    data = folder / f"{chosen.data}.jsonl"
    config = runs.configure(place, f"credit-{method}", CHECKPOINT, KIND[chosen.data], data, plain, seed=0)
    runs.sample_data(config, str(CHECKPOINT), folder, block, seed=0)
    scores = runs.fit_and_score(place, config, f"credit/{method}", 0, validation=False)
    print(f"{method}: greedy accuracy {scores['greedy']:.3f} after {scores['steps']} steps")
    return config, scores["model"]


def measure(config: RunConfig, model: str, folder: Path, prompts: Sequence[str], seed: int = 0) -> Table:
    """Both kinds of errors, planted in solutions of `prompts`, under every score."""
    table: Table = {}
    for kind in KINDS:
        file = folder / f"planted-{kind}.jsonl"
        write(file, planted_records(kind, prompts, seed))
        own = validate(merge(config.dump(), {"evaluation": {"planted": {"path": str(file)}}}))
        planted = read_planted(own, str(CHECKPOINT))
        values = values_of(own, model, str(CHECKPOINT), [case.row for case in planted], local=True)
        errors = [np.array(case.errors) for case in planted]
        table[kind] = {}
        for name, (what, sign) in SUSPICION.items():
            scores = [sign * np.array(row["responses"][0]["values"][what]) for row in values]
            everywhere = find_errors(scores, errors)
            digits = find_errors([s[DIGITS] for s in scores], [e[DIGITS] for e in errors])
            table[kind][name] = _cells(everywhere, digits)
    return table


def _cells(everywhere: Auroc, digits: Auroc) -> dict[str, Any]:
    return {
        "all_tokens": everywhere.value,
        "result_digits": digits.value,
        "top_1": everywhere.top_1,
        "responses": everywhere.responses,
    }


def page(table: Table) -> str:
    """The table as Markdown."""
    lines = [
        "| planted error | score | AUROC, all tokens | AUROC, result digits | top-1 | n |",
        "|---|---|---|---|---|---|",
    ]
    for kind, scores in table.items():
        for name, cells in scores.items():
            numbers = " | ".join(f"{cells[key]:.4f}" for key in ("all_tokens", "result_digits", "top_1"))
            lines.append(f"| {kind} | {name} | {numbers} | {cells['responses']} |")
    return "\n".join(lines)


def main() -> int:
    """The command. Errors that a user can mend are one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.credit", description=__doc__)
    parser.add_argument("--storage", default="outputs", help="folder for all files (default: outputs)")
    parser.add_argument("--method", default="dqo", choices=sorted(BLOCKS["mid"].methods), help="default: dqo")
    parser.add_argument("--epochs", type=int, help="default: the reasoning benchmark's")
    parser.add_argument("--prompts", type=int, default=1000, help="test prompts (default 1000)")
    options = parser.parse_args()
    place = runs.Place(options.storage, local=True)
    try:
        config, model = trained(place, options.method, options.epochs)
        folder = place.world("credit", 0)
        table = measure(config, model, folder, runs.test_prompts()[: options.prompts])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(folder / f"credit-{options.method}.json", table)
    print(page(table))
    print(f"written {folder / f'credit-{options.method}.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
