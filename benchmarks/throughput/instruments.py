"""What a step can be watched with, on steps whose time does not count: torch's profiler, and its matrix products alone.

Each instrument is a context manager around one step; what it finds goes into the step's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

PROFILE_ROWS = 15


@contextmanager
def profile(found: dict[str, Any], path: str | None) -> Iterator[None]:
    """torch.profiler: the operations with the most CPU time of their own, as a text file at `path`."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    assert path is not None
    with profiler(activities=[ProfilerActivity.CPU]) as seen:
        yield
    Path(path).write_text(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=PROFILE_ROWS))
    found["profile"] = path


@contextmanager
def products(found: dict[str, Any], path: str | None) -> Iterator[None]:
    """The step's matrix products, each distinct one timed alone afterwards (see `products`)."""
    from benchmarks.throughput.products import Recorder, seconds_alone

    with Recorder() as recorder:
        yield
    found["products"] = seconds_alone(recorder.calls)


INSTRUMENTS: dict[str, Callable[[dict[str, Any], str | None], AbstractContextManager[None]]] = {
    "profile": profile,
    "products": products,
}
