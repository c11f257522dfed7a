"""What is measured and logged of requests: how long they take, and of a traced one all."""

import logging
import re
from typing import Final

import pytest
import trio

from idalloc_tcp.metrics import Metrics, duration_bucket
from idalloc_tcp.observation import LINES_MAX, Observer
from idalloc_tcp.protocol import Alloc
from idalloc_tcp.session import Traced
from tests.fakes import FakeLedger
from tests.serving import serving

pytestmark = pytest.mark.usefixtures("serving_variant")

SLOW_SECONDS: Final = 0.02


def ways(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    """The fields of every line about a traced request."""
    return [record.__dict__["fields"] for record in caplog.records if record.message == "traced"]


async def test_a_traced_request_leaves_its_whole_way_in_the_log(
    caplog: pytest.LogCaptureFixture, serving_variant: str
) -> None:
    """Lane, pool or refill, the times of stores and its own; without a trace there is none."""
    caplog.set_level(logging.INFO)
    ledger = FakeLedger(delay_seconds=SLOW_SECONDS)
    async with serving(ledger=ledger) as running, await running.connect() as peer:
        assert await peer.ask(b"ALLOC orders 2 @first-1\n") == b"OK 1 2 @first-1\n"
        assert await peer.ask(b"ALLOC orders\n") == b"OK 3 1\n"
        assert await peer.ask(b"ALLOC orders @second-2\n") == b"OK 4 1 @second-2\n"
    fetched, hit = ways(caplog)
    assert fetched["trace"] == "@first-1"
    assert fetched["reply"] == "OK 1 2 @first-1"
    assert fetched["pool"] == "empty"
    assert fetched["lane"] == "own task"
    assert re.fullmatch(r"ledger \d+\.\d\d ms", str(fetched["refill"]))
    assert float(str(fetched["took_ms"])) >= SLOW_SECONDS * 1000
    assert hit["trace"] == "@second-2"
    assert hit["pool"] == "hit"
    assert hit["lane"] == ("sweep" if serving_variant == "sweep" else "own task")
    assert float(str(hit["took_ms"])) < SLOW_SECONDS * 1000


async def test_a_traced_request_that_is_refused_is_logged_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the error that the client got."""
    caplog.set_level(logging.INFO)
    async with serving() as running, await running.connect() as peer:
        running.ledger.fail_next(1)
        reply = await peer.ask(b"ALLOC orders @id\n")
    [way] = ways(caplog)
    assert reply.startswith(b"ERR unavailable")
    assert way["reply"] == reply.decode().strip()
    assert "pool" not in way
    assert str(way["refill"]).startswith("unavailable, ledger ")


def test_a_flood_of_traces_does_not_fill_the_log() -> None:
    """So many lines a minute, and a sum of the rest."""
    observer = Observer(Metrics(), lambda _service: "")
    traced = [Traced(Alloc("orders", 1, "@t"), b"OK 1 1 @t", has_waited=False)] * (LINES_MAX + 5)
    records: list[logging.LogRecord] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    logger, keeper = logging.getLogger("idalloc_tcp"), Keeper()
    logger.addHandler(keeper)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        observer.tell(traced, "sweep", 0.0)
    finally:
        logger.setLevel(level)
        logger.removeHandler(keeper)
    assert {record.__dict__["at_once"] for record in records} == {LINES_MAX}


async def test_every_answer_is_timed_once() -> None:
    """Whether it came at once, one of many, after a wait or as an error."""
    ledger = FakeLedger(delay_seconds=SLOW_SECONDS)
    async with serving(ledger=ledger) as running, await running.connect() as peer:
        metrics = running.metrics
        assert await peer.ask(b"ALLOC orders 2\n") == b"OK 1 2\n"
        assert metrics.latency_buckets.total() == 1
        assert metrics.latency_seconds_total >= SLOW_SECONDS
        assert min(metrics.latency_buckets) >= f"{duration_bucket(SLOW_SECONDS):02}"
        await peer.say(b"ALLOC orders\n" * 5 + b"NONSENSE\nSTATS\n")
        while await peer.hear() != b"END\n":
            pass
        await trio.lowlevel.checkpoint()
        assert await peer.ask(b"PING\n") == b"OK PONG\n"
        await trio.lowlevel.checkpoint()
        assert metrics.latency_buckets.total() == metrics.requests_total == 9
