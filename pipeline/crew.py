"""Actors that outlive a stage: an evaluation has many short ones, and starting a process that imports torch takes longer.

    with standing_actors():
        …run_stage(…)… run_stage(…)      # the first starts them, the others find them

A member holds the worker of one stage at a time, and keeps it for a later stage of the same worker and arguments. Between stages
members go on holding their CPUs and GPUs: nothing else that needs them may be started inside of the block.

Left out: growing with the cluster in the middle of a stage, which Ray Data's actor pools do (`stage`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from pipeline.stage import Item, Resources

RETRIES = 3
"""How often a member that died is started again, and its item repeated."""


@dataclass(slots=True)
class Crew:
    """The members that stand ready, all with the same resources; none before the first stage."""

    resources: Resources | None = None
    members: list[ActorHandle] = field(default_factory=list)

    def run(
        self,
        worker: Callable[..., Callable[[Item], Item]],
        arguments: dict[str, Any],
        items: Sequence[Item],
        resources: Resources,
        most: int,
    ) -> Iterator[Item]:
        """`worker(**arguments)(item)` for each item, in order, by up to `most` members."""
        import ray
        from ray.util import ActorPool

        if resources != self.resources:
            self.end()
            self.resources = resources
        self.members += [_start(resources) for _ in range(most - len(self.members))]
        task = ray.put(pickle.dumps((worker, arguments)))
        yield from ActorPool(self.members[:most]).map(lambda member, item: member.work.remote(task, item), items)

    def end(self) -> None:
        """Release the members."""
        import ray

        for member in self.members:
            ray.kill(member)
        self.members = []


_STANDING: ContextVar[Crew | None] = ContextVar("standing", default=None)


def standing() -> Crew | None:
    """The crew of the surrounding `standing_actors`, if there is one."""
    return _STANDING.get()


@contextmanager
def standing_actors() -> Iterator[None]:
    """Stages on Ray inside of this block share their actors, which end with it."""
    crew = Crew()
    token = _STANDING.set(crew)
    try:
        yield
    finally:
        _STANDING.reset(token)
        crew.end()


class Member:
    """The actor: whatever the stage at hand is."""

    def __init__(self, threads: int) -> None:
        from pipeline.stage import prepare_process

        prepare_process(threads)
        self._task, self._call = b"", None

    def work(self, task: bytes, item: Item) -> Item:
        """One item of a stage; task: its worker and arguments, pickled."""
        if task != self._task:
            self._task, self._call = b"", None  # the old worker's memory is free before the new one's is taken
            worker, arguments = pickle.loads(task)  # noqa: S301
            self._task, self._call = task, worker(**arguments)
        return self._call(item)


def _start(resources: Resources) -> ActorHandle:
    import ray

    from pipeline.stage import threads_of

    options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus or None}
    actor = ray.remote(Member).options(**options, max_restarts=RETRIES, max_task_retries=RETRIES)
    return actor.remote(threads_of(resources))
