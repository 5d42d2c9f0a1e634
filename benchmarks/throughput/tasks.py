"""What one child process is told, as plain values, and where its files lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.throughput.workloads import Entry, Group, Workload, named


@dataclass(frozen=True, slots=True)
class Task:
    """One worker of one contender on one workload."""

    folder: str  # of this workload: models and reference log-probs
    name: str  # the workload's
    entry_name: str
    steps: int  # optimizer steps there are rows for
    threads: int
    quick: bool = False
    rank: int = 0

    @property
    def workload(self) -> Workload:
        return named(self.name, self.quick)

    @property
    def entry(self) -> Entry:
        return self.workload.entry(self.entry_name)

    @property
    def policy(self) -> str:
        return str(Path(self.folder) / "policy")

    @property
    def reference(self) -> str:
        return str(Path(self.folder) / "reference")

    @property
    def reference_logprobs(self) -> Path:
        """Cached per-token log-probs, as JSON: steps × groups × K × [R_k]."""
        return Path(self.folder) / f"reference-{self.entry.precision}.json"

    @property
    def reference_states(self) -> Path:
        """Cached hidden states, [n, D] by "step/row"."""
        return Path(self.folder) / f"states-{self.entry.precision}.safetensors"

    @property
    def has_states(self) -> bool:
        """Whether this entry reads the reference's states: an objective with an exact KL, without a live reference."""
        return self.workload.objective["name"] == "tdpo" and self.entry.reference == "cached"

    def groups(self) -> list[list[Group]]:
        """The rows of each step, as `materials` wrote them: the same token ids for every contender."""
        steps = json.loads((Path(self.folder) / "rows.json").read_text())
        return [[Group(**group) for group in step] for step in steps[: self.steps]]

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Task:
        return cls(**json.loads(text))


def write_rows(folder: Path, workload: Workload, steps: int, timed: int, watched: int) -> None:
    """`rows.json`: the token ids of `steps` steps, and then `watched` times those of the last `timed` ones' middle step
    by size, so that what is seen there can stand beside the median time."""
    rows = workload.steps(steps)
    middle = sorted(rows[-timed:], key=tokens)[timed // 2]
    plain: list[Any] = [[asdict(group) for group in step] for step in [*rows, *[middle] * watched]]
    (folder / "rows.json").write_text(json.dumps(plain))


def tokens(step: list[Group]) -> int:
    """Length of a step's packed rows."""
    return sum(len(group.prompt) + sum(map(len, group.responses)) for group in step)


def digests(sequences: Iterable[tuple[list[int], list[int]]]) -> list[str]:
    """(prompt, response) token ids → sorted hashes without repeats: what a contender really saw in a step."""
    texts = {f"{prompt}|{response}" for prompt, response in sequences}
    return sorted(hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in texts)


def expected(groups: Iterable[Group]) -> list[str]:
    """`digests` of what a step's rows are."""
    return digests((group.prompt, response) for group in groups for response in group.responses)
