"""The log: what its lines look like, and that a flood of events is none of lines."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from idalloc_tcp import log

PERIOD = f"within_seconds={log.PERIOD_SECONDS}"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """What a test configures is gone after it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was logged since the last look, without the times."""
    return [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]


def test_the_first_of_a_kind_is_logged_at_once_and_the_others_as_a_sum(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A flood is one line, and one a period with the number of the others and the last of them."""
    repeats = log.configure("info", "console")
    for number in range(1000):
        log.sparingly(log.WARNING, "a store is odd", number=number)
    assert lines(capsys) == ["warning a store is odd number=0"]
    repeats.sum_up()
    assert lines(capsys) == [f"warning a store is odd number=999 repeated=999 {PERIOD}"]
    log.sparingly(log.WARNING, "a store is odd", number=1000)
    assert lines(capsys) == []
    repeats.sum_up()
    assert lines(capsys) == [f"warning a store is odd number=1000 repeated=1 {PERIOD}"]


def test_the_first_few_may_be_logged_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is news as long as they are few; a flood is still none."""
    repeats = log.configure("info", "console")
    for number in range(100):
        log.sparingly(log.INFO, "it is back", 3, number=number)
    assert lines(capsys) == [f"info it is back number={number}" for number in range(3)]
    for _ in range(2):
        repeats.sum_up()
    assert lines(capsys) == [f"info it is back number=99 repeated=97 {PERIOD}"]
    for _ in range(3):
        log.sparingly(log.INFO, "it is back", 3)
    assert lines(capsys) == ["info it is back"] * 3


def test_what_was_not_repeated_for_a_period_is_news_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A quiet period ends the counting, without a line."""
    repeats = log.configure("info", "console")
    for _ in range(2):
        log.sparingly(log.INFO, "it happened")
        assert lines(capsys) == ["info it happened"]
        repeats.sum_up()
        repeats.sum_up()
        assert lines(capsys) == []


def test_kinds_are_counted_by_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    """One event's flood hides no other event, and what is not marked is always logged."""
    repeats = log.configure("info", "console")
    for _ in range(3):
        log.limiting("connections", max=7)
        log.limiting("requests", of="orders")
        log.warning("always")
    expected = [
        "warning limiting connections max=7",
        "warning limiting requests of=orders",
        *["warning always"] * 3,
    ]
    assert sorted(lines(capsys)) == sorted(expected)
    repeats.sum_up()
    assert lines(capsys) == [
        f"warning limiting connections max=7 repeated=2 {PERIOD}",
        f"warning limiting requests of=orders repeated=2 {PERIOD}",
    ]


def test_only_the_first_exception_of_a_kind_shows_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A bug that every connection meets is explained once, and then counted."""
    repeats = log.configure("info", "console")
    for _ in range(5):
        try:
            raise ZeroDivisionError("a bug")
        except ZeroDivisionError:
            log.sparingly(log.ERROR, "a connection failed")
    assert capsys.readouterr().err.count("Traceback") == 1
    repeats.sum_up()
    assert lines(capsys) == [f"error a connection failed repeated=4 {PERIOD}"]


def test_the_level_may_change(capsys: pytest.CaptureFixture[str]) -> None:
    """Sums obey the level in effect; an answer is for whoever asked, and always logged."""
    repeats = log.configure("info", "console")
    for _ in range(2):
        log.sparingly(log.INFO, "it happened")
    log.set_level("error")
    log.event("hidden")
    repeats.sum_up()
    log.answer("status", services=3)
    assert lines(capsys) == ["info it happened", "info status services=3"]
    log.set_level("info")
    log.event("seen")
    assert lines(capsys) == ["info seen"]


def test_lines_for_programs_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is an object: what happened, how severe, when, the fields, common ones too."""
    repeats = log.configure("info", "json", worker=2)
    for _ in range(2):
        log.sparingly(log.WARNING, "limiting requests", of="orders")
    repeats.sum_up()
    first, summed = map(json.loads, capsys.readouterr().err.splitlines())
    expected = {"event": "limiting requests", "level": "warning", "of": "orders", "worker": 2}
    assert first.pop("timestamp") <= summed.pop("timestamp")
    assert first == expected
    assert summed == {**expected, "repeated": 1, "within_seconds": log.PERIOD_SECONDS}


def test_lines_for_people_need_no_structlog() -> None:
    """The console's lines are made without the library that brings asyncio with it."""
    program = """
import sys
from idalloc_tcp import log
log.configure("info", "console")
log.sparingly(log.INFO, "it happened")
print("structlog" in sys.modules, "asyncio" in sys.modules)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    assert done.stdout == "False False\n"
