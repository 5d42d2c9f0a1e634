"""Run a callable class over items: as a Ray Data actor pool over the whole cluster, or in this process.

Both ways call the same class with the same items, so `local=True` is the fast path of tests and of `--local`, not another
implementation. Items and results are plain dicts; large data goes through files that the workers write themselves.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from pipeline.errors import ConfigError, UserError
from pipeline.redaction import redact
from pipeline.terminal import guard, leaving_without_secrets

Item = dict[str, Any]

_REFUSED = "qalign/refused"  # the column of a row that tells a worker's UserError instead of its result


@dataclass(frozen=True, slots=True)
class Resources:
    """What one actor gets, and how many there may be at most (None: what the cluster holds)."""

    cpus: float = 1
    gpus: float = 0
    actors: int | None = None


def run_stage(
    worker: Callable[..., Callable[[Item], Item]],
    arguments: dict[str, Any],
    items: Sequence[Item],
    *,
    label: str,
    resources: Resources,
    local: bool,
    unit: str = "part",
    sizes: Sequence[int] | None = None,
) -> Iterator[Item]:
    """Yield `worker(**arguments)(item)` for each item, in the items' order, under a progress bar that counts `sizes` (default: items).

    The class is built once per actor. With Ray, blocks are single items: an actor that is free takes the next one, an item whose actor
    dies is given to another. A worker's UserError is raised here with its one line.
    """
    results = _in_process(worker, arguments, items) if local else _on_ray(worker, arguments, items, resources)
    sizes = sizes or [1] * len(items)
    large = max(sizes, default=1) > 1
    with tqdm(
        total=sum(sizes), desc=label, unit=unit, unit_scale=large, mininterval=1.0, disable=not items, leave=None
    ) as bar:
        for result, size in zip(results, sizes, strict=True):
            bar.update(size)
            yield result


def _in_process(
    worker: Callable[..., Callable[[Item], Item]], arguments: dict[str, Any], items: Sequence[Item]
) -> Iterator[Item]:
    if not items:
        return
    call = worker(**arguments)
    for item in items:
        yield call(item)


class _Threaded:
    """The worker inside its actor: as many threads as the actor has CPUs, one item per block."""

    def __init__(self, worker: Callable[..., Callable[[Item], Item]], arguments: dict[str, Any], threads: int) -> None:
        import torch

        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the parallelism is the actors'
        torch.set_num_threads(threads)
        guard()
        self._build, self._call = partial(worker, **arguments), None
        self._refusal: Item | None = None

    def __call__(self, row: Item) -> Item:
        if self._refusal is not None:  # the first one ends the stage: what is left is not worked on
            return self._refusal
        try:
            with leaving_without_secrets():
                if self._call is None:  # not before: of an error in a constructor Ray tells only that the actor died
                    self._call = self._build()
                return self._call(row)
        except UserError as error:
            # As a row: where an actor raises, Ray prints its traceback, and its executor keeps actors (and their CPUs) for a while.
            self._refusal = {_REFUSED: type(error).__name__, "message": redact(str(error))}
            return self._refusal


def _on_ray(
    worker: Callable[..., Callable[[Item], Item]],
    arguments: dict[str, Any],
    items: Sequence[Item],
    resources: Resources,
) -> Iterator[Item]:
    import ray

    if not items:
        return
    now = min(resources.actors or _room(resources, ray.cluster_resources()), len(items))
    most = max(now, min(resources.actors or _room(resources, _promised()), len(items)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts items, whatever Ray's operators are
    context.print_on_execution_start = False
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that there are no bars
    context.execution_options.preserve_order = True
    stage = ray.data.from_items(list(items), override_num_blocks=len(items)).map(
        _Threaded,
        fn_constructor_kwargs={"worker": worker, "arguments": arguments, "threads": max(1, math.floor(resources.cpus))},
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=most, initial_size=now, max_tasks_in_flight_per_actor=2
        ),
    )
    # Not iter_rows(): its threads outlive an iteration that ends early, and Ray ends a process that one of them reaches it from after
    # ray.shutdown().
    bundles, ended = stage.iter_internal_ref_bundles(), False
    try:
        for bundle in bundles:
            for reference in bundle.block_refs:
                for row in ray.data.block.BlockAccessor.for_block(ray.get(reference)).iter_rows(public_row_format=True):
                    if _REFUSED in row:
                        raise (ConfigError if row[_REFUSED] == ConfigError.__name__ else UserError)(row["message"])
                    yield row
        ended = True
    finally:
        if not ended:  # Ray Data's executor hangs in a cycle, with actors whose CPUs a later stage would wait for
            del bundles, stage
            gc.collect()


def left_beside(one: Resources, workers: int) -> int:
    """Actors that the cluster, as large as it may grow, holds beside so many workers with as much each."""
    import ray

    totals = (ray.cluster_resources(), _promised())
    return max(0, max(_room(one, total) for total in totals) - workers)


def _promised() -> dict[str, float]:
    """What an autoscaler could make the cluster hold; nothing where there is none."""
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}


def _room(resources: Resources, total: Mapping[str, float]) -> int:
    """Actors that so much holds; at least one, so that an autoscaler has something to grow for."""
    by_cpu = int(total.get("CPU", 0) // resources.cpus) if resources.cpus else 1
    by_gpu = int(total.get("GPU", 0) // resources.gpus) if resources.gpus else by_cpu
    return max(1, min(by_cpu, by_gpu))
