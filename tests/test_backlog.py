"""What a service that is away could not be told: kept in order, told later."""

from __future__ import annotations

import logging

from pipeline.backlog import Backlog


class Outage(Exception):
    """What a server that is away looks like."""


def test_order_is_kept_and_a_failing_service_left_alone(caplog):
    sent, down, calls = [], [True], [0]

    def send(name: str):
        def attempt(_: object) -> None:
            calls[0] += 1
            if down[0]:
                raise Outage("line one\nline two")
            sent.append(name)

        return attempt

    backlog = Backlog("service", lambda: "connection", lambda error: False, interval=0, retry=1e6)
    with caplog.at_level(logging.WARNING):
        for name in "abc":
            backlog.add(name, send(name))
    assert calls == [1], "one attempt, then the service is left alone"
    down[0] = False
    backlog.add("d", send("d"))
    assert sent == []
    backlog.close()
    assert sent == ["a", "b", "c", "d"]
    assert [record.getMessage() for record in caplog.records] == [
        "service fails, training goes on: Outage: line one line two"
    ]


def test_an_entry_that_always_fails_is_passed_over(caplog):
    sent = []

    def fail(_: object) -> None:
        raise Outage("never")

    backlog = Backlog("service", lambda: "connection", lambda error: False, interval=0, retry=0)
    backlog.add("bad", fail)
    backlog.add("good", sent.append)
    backlog.add("better", sent.append)
    assert sent, "already while it is open"
    backlog.close()
    assert sent == ["connection", "connection"]
    assert caplog.records[-1].getMessage() == "service was not told: bad (Outage: never)"
