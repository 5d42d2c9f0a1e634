"""A stage on Ray: items in order, an actor that dies is replaced, and an error that a user can mend stays one line."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, UserError
from pipeline.stage import Item, Resources, run_stage


class Adds:
    def __init__(self, number: int, trace: str | None = None) -> None:
        self.number, self.trace = number, trace

    def __call__(self, item: Item) -> Item:
        if item["n"] == 3 and self.trace and not Path(self.trace).exists():
            Path(self.trace).touch()
            os._exit(1)  # the actor's process, once
        return {"sum": self.number + item["n"], "pid": os.getpid()}


class RefusesItem(Adds):
    def __call__(self, item: Item) -> Item:
        raise UserError("decoding.alpha: no such thing; set it")


class RefusesLater(Adds):
    def __call__(self, item: Item) -> Item:
        if item["n"] >= 4:
            raise UserError("decoding.alpha: no such thing; set it")
        return super().__call__(item)


class Fails(Adds):
    def __call__(self, item: Item) -> Item:
        raise ZeroDivisionError("a bug")


class RefusesToStart(Adds):
    def __init__(self, number: int) -> None:
        raise ConfigError("checkpoint_from: it holds no critic; name another")


def run(worker: type, local: bool = False, **arguments: object) -> list[Item]:
    items = [{"n": n} for n in range(6)]
    resources = Resources(cpus=1, actors=2)
    return list(run_stage(worker, arguments, items, label="x", resources=resources, local=local))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_items_come_in_order_and_those_of_a_dead_actor_again(tmp_path: Path) -> None:
    found = run(Adds, number=2, trace=str(tmp_path / "trace"))
    assert [item["sum"] for item in found] == [2, 3, 4, 5, 6, 7]
    assert (tmp_path / "trace").exists() and os.getpid() not in {item["pid"] for item in found}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("local", [False, True])
def test_an_error_that_a_user_can_mend_stays_what_it_is_and_leaves_no_thread_behind(local: bool) -> None:
    run(Adds, local, number=1)  # Ray's own and the progress bar's threads are there
    threads = set(threading.enumerate())
    with pytest.raises(UserError, match=r"^decoding\.alpha: no such thing; set it$"):
        run(RefusesItem, local, number=1)
    with pytest.raises(ConfigError, match=r"^checkpoint_from: it holds no critic; name another$"):
        run(RefusesToStart, local, number=1)
    # One that reached Ray after its shutdown would end this process.
    wait_until(lambda: set(threading.enumerate()) <= threads)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_what_ends_early_hands_out_what_was_done_and_gives_its_actors_back() -> None:
    import ray

    items, resources = [{"n": n} for n in range(6)], Resources(cpus=1, actors=2)
    stage = run_stage(RefusesLater, {"number": 1}, items, label="x", resources=resources, local=False)
    assert [next(stage)["sum"] for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="no such thing"):
        next(stage)
    wait_until(lambda: ray.available_resources().get("CPU") == 2)
    stage = run_stage(Adds, {"number": 1}, items, label="x", resources=resources, local=False)
    assert next(stage)["sum"] == 1
    stage.close()
    wait_until(lambda: ray.available_resources().get("CPU") == 2)
    with pytest.raises(Exception, match="a bug"):
        run(Fails, number=1)


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
