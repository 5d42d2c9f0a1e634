"""Standing actors: several stages in the same processes, a member that dies is replaced, and nothing is left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.crew import standing, standing_actors
from pipeline.errors import UserError
from pipeline.stage import Item, Resources, run_stage

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
TWO = Resources(cpus=1, actors=2)


class Adds:
    """Says who it is and since when."""

    def __init__(self, number: int) -> None:
        self.number, self.built = number, time.time_ns()

    def __call__(self, item: Item) -> Item:
        return {"sum": self.number + item["n"], "pid": os.getpid(), "built": self.built}


class Multiplies(Adds):
    def __call__(self, item: Item) -> Item:
        return super().__call__(item) | {"product": self.number * item["n"]}


class DiesOnce(Adds):
    """The process ends at item 3, unless it has done so before."""

    def __init__(self, number: int, trace: str) -> None:
        super().__init__(number)
        self.trace = Path(trace)

    def __call__(self, item: Item) -> Item:
        if item["n"] == 3 and not self.trace.exists():
            self.trace.touch()
            os._exit(1)
        return super().__call__(item)


class Refuses(Adds):
    def __call__(self, item: Item) -> Item:
        raise UserError("decoding.alpha: no such thing")


def run(worker: type, count: int = 6, resources: Resources = TWO, **arguments: object) -> list[Item]:
    items = [{"n": n} for n in range(count)]
    return list(run_stage(worker, arguments, items, label="x", resources=resources, local=False))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_stages_share_their_actors(tmp_path: Path):
    with standing_actors():
        first, second, again = run(Adds, number=1), run(Multiplies, number=5), run(Multiplies, number=5)
        other = run(Multiplies, number=6)
        died = run(DiesOnce, number=2, trace=str(tmp_path / "trace"))
        with pytest.raises(UserError, match=r"decoding\.alpha"):
            run(Refuses, number=1)
        after = run(Adds, number=7, count=1)
        assert [item["sum"] for item in first] == [1, 2, 3, 4, 5, 6], "in order"
        assert [item["product"] for item in second] == [0, 5, 10, 15, 20, 25]
        pids = {item["pid"] for item in first}
        assert len(pids) == 2
        assert {item["pid"] for item in second} | {item["pid"] for item in other} == pids
        assert {item["built"] for item in again} == {item["built"] for item in second}, "the same workers go on"
        assert not {item["built"] for item in other} & {item["built"] for item in second}, "other arguments"
        assert [item["sum"] for item in died] == [2, 3, 4, 5, 6, 7], "the item of a dead member is repeated"
        assert {item["pid"] for item in died} - pids, "by its successor"
        assert after[0]["sum"] == 7
        assert run(Adds, number=0, resources=Resources(cpus=2, actors=1))[5]["sum"] == 5, (
            "other resources, other actors"
        )
    assert standing() is None
    deadline = time.monotonic() + 30
    while any(alive(item["pid"]) for item in [*first, *died]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(alive(item["pid"]) for item in [*first, *died])
