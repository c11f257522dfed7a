"""The counter in a real Redis: its hash, its fence, and what faults leave behind."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final

import pytest
import trio

from idalloc_tcp.bridge import UNIT_SECONDS
from idalloc_tcp.counter import Cut, Reason, Refusal, State
from idalloc_tcp.counter.redis import (
    CONNECTIONS_MAX,
    REPLY_TIMEOUT_SECONDS,
    RedisCounter,
    connect,
)
from idalloc_tcp.errors import Unavailable
from idalloc_tcp.ledger import CLOSED, Tail
from idalloc_tcp.pool import MAX_ID, Segment
from tests.counter.conftest import KEY, open_counter, read_hash, write_hash
from tests.real.process import HOST
from tests.real.proxy import FaultProxy
from tests.real.redis_server import RedisServer
from tests.real.resp import RedisError

LEASE: Final = Segment(101, 100_001)
#: For the machine's own slowness.
SLACK_SECONDS: Final = 2.0


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """What is inside takes no longer, but for the machine's own slowness."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + SLACK_SECONDS


async def take(counter: RedisCounter, size: int = 10) -> Segment:
    """The next segment of `orders`."""
    answer = await counter.take("orders", size, floor=0)
    assert isinstance(answer, Cut)
    return answer.segment


async def reason_of(counter: RedisCounter) -> Reason | None:
    """Why nothing can be cut."""
    answer = await counter.take("orders", 10, floor=0)
    assert isinstance(answer, Refusal)
    return answer.reason


async def seat(counter: RedisCounter, lease: Segment = LEASE) -> Segment:
    """Seat it on a lease; the first ten IDs of it."""
    refusal = await counter.take("orders", 10, floor=0)
    assert isinstance(refusal, Refusal)
    answer = await counter.seat("orders", lease, 10, refusal, floor=0)
    assert isinstance(answer, Cut)
    return answer.segment


@pytest.fixture
async def counter(shared_redis_server: RedisServer) -> AsyncIterator[RedisCounter]:
    """A counter in a Redis without data."""
    shared_redis_server.command("FLUSHALL")
    async with open_counter(shared_redis_server.port) as opened:
        yield opened


@pytest.fixture
async def proxied(
    shared_redis_server: RedisServer, fault_proxy: FaultProxy
) -> AsyncIterator[RedisCounter]:
    """A counter behind a proxy, seated on `LEASE`."""
    shared_redis_server.command("FLUSHALL")
    fault_proxy.target_port = shared_redis_server.port
    async with open_counter(fault_proxy.port) as opened:
        assert await seat(opened) == Segment(101, 111)
        yield opened


# The hash


async def test_hash_shows_its_state(
    shared_redis_server: RedisServer, counter: RedisCounter
) -> None:
    """HGETALL shows the original's two fields and two of ours, all readable."""
    await seat(counter)
    info = shared_redis_server.info()
    assert read_hash(shared_redis_server, "orders") == {
        "lastAllocValue": "110",
        "dataVersion": str(MAX_ID),
        "leaseEnd": "100000",
        "fence": f"{info['run_id']}:{info['master_replid']}",
    }
    assert shared_redis_server.command("KEYS", "*") == ["idalloc:alloc_info_orders"]
    assert shared_redis_server.command("TTL", KEY + "orders") == -1


async def test_prefixes_are_apart(shared_redis_server: RedisServer, counter: RedisCounter) -> None:
    """Counters of other prefixes share a Redis without touching each other."""
    await seat(counter)
    other = RedisCounter(connect(f"redis://{HOST}:{shared_redis_server.port}"), "east:idalloc:")
    assert await seat(other, Segment(1, 11)) == Segment(1, 11)
    await other.aclose()
    assert await take(counter) == Segment(111, 121)
    assert shared_redis_server.command("EXISTS", "east:idalloc:alloc_info_orders") == 1


GARBAGE: Final = (
    *("", "text", "-5", "+5", "1.5", "1e3", "007", " 7", "7\n", "0x10", "nan", str(10**30)),
    *(str(2**63), str(10**19 - 1)),
)


@pytest.mark.parametrize("field", ["lastAllocValue", "leaseEnd"])
@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_is_missing(
    shared_redis_server: RedisServer, counter: RedisCounter, field: str, garbage: str
) -> None:
    """A field that is no ID is never counted with, and the next seat mends it."""
    await seat(counter)
    shared_redis_server.command("HSET", KEY + "orders", field, garbage)
    assert await reason_of(counter) is Reason.MISSING
    state, _ = await counter.inspect("orders")
    assert 0 in (state.last_alloc_value, state.lease_end)
    assert await seat(counter, Segment(200_001, 200_101)) == Segment(200_001, 200_011)


async def test_bytes_that_are_no_text_are_missing(
    shared_redis_server: RedisServer, counter: RedisCounter
) -> None:
    """Fields of any bytes are a state to look at, not an error."""
    script = r"for _, name in ipairs(ARGV) do redis.call('HSET', KEYS[1], name, '\255\0') end"
    fields = ("lastAllocValue", "dataVersion", "leaseEnd", "fence")
    shared_redis_server.command("EVAL", script, 1, KEY + "orders", *fields)
    assert await reason_of(counter) is Reason.MISSING
    assert await seat(counter) == Segment(101, 111)


@pytest.mark.parametrize("garbage", [*GARBAGE, None])
async def test_garbage_of_the_original_is_missing(
    shared_redis_server: RedisServer, counter: RedisCounter, garbage: str | None
) -> None:
    """A hash without our fields is the original's only if it holds a number."""
    fields = {"dataVersion": "7"} | ({} if garbage is None else {"lastAllocValue": garbage})
    write_hash(shared_redis_server, "orders", **fields)
    assert await reason_of(counter) is Reason.MISSING
    answer = await counter.cut_beside("orders", 10)
    assert isinstance(answer, Refusal)
    assert answer.reason is Reason.MISSING
    assert (await counter.take_over("orders")).reason is None
    assert read_hash(shared_redis_server, "orders") == fields


async def test_key_of_another_type_is_unavailable(
    shared_redis_server: RedisServer, counter: RedisCounter
) -> None:
    """Something else at our key is an error, and stays as it is."""
    shared_redis_server.command("SET", KEY + "orders", "mine")
    with pytest.raises(Unavailable, match="WRONGTYPE"):
        await take(counter)
    assert shared_redis_server.command("GET", KEY + "orders") == "mine"


@pytest.mark.parametrize("lease", [Segment(MAX_ID - 15, MAX_ID + 1), Segment(2**53 - 8, 2**53 + 8)])
async def test_hash_is_exact_at_the_end_of_a_lease(
    shared_redis_server: RedisServer, counter: RedisCounter, lease: Segment
) -> None:
    """A step that overflows, or would pass the end, leaves just the end in the hash."""
    await seat(counter, lease)
    assert await take(counter, MAX_ID) == Segment(lease.start + 10, lease.stop)
    assert read_hash(shared_redis_server, "orders")["lastAllocValue"] == str(lease.last)
    assert await reason_of(counter) is Reason.SPENT


# The original idalloc beside us


async def test_original_fails_on_a_hash_of_ours(
    shared_redis_server: RedisServer, counter: RedisCounter
) -> None:
    """What a server of the original sends moves us on, and fails before it serves anything."""
    write_hash(shared_redis_server, "orders", lastAllocValue=50, dataVersion=7)
    await counter.take_over("orders")
    await seat(counter)
    assert shared_redis_server.command("HINCRBY", KEY + "orders", "lastAllocValue", 40) == 150
    with pytest.raises(RedisError, match="overflow"):
        shared_redis_server.command("HINCRBY", KEY + "orders", "dataVersion", 1)
    assert await take(counter) == Segment(151, 161)


async def test_original_may_push_a_lease_to_its_end(
    shared_redis_server: RedisServer, counter: RedisCounter
) -> None:
    """What the original burns of a lease is a gap, and nothing above the lease is cut."""
    await seat(counter, Segment(1, 101))
    shared_redis_server.command("HINCRBY", KEY + "orders", "lastAllocValue", 1_000)
    assert await reason_of(counter) is Reason.SPENT
    assert await seat(counter, Segment(2_001, 2_101)) == Segment(2_001, 2_011)


async def test_cut_beside_is_as_the_original_cuts(
    shared_redis_server: RedisServer, counter: RedisCounter
) -> None:
    """Its cuts and ours take turns on one hash, which keeps just its two fields."""
    write_hash(shared_redis_server, "orders", lastAllocValue=2**53, dataVersion=7)
    assert await counter.cut_beside("orders", 10) == Cut(
        Segment(2**53 + 1, 2**53 + 11), State(2**53 + 10, 8)
    )
    shared_redis_server.command("HINCRBY", KEY + "orders", "dataVersion", 1)
    shared_redis_server.command("HINCRBY", KEY + "orders", "lastAllocValue", 10)
    answer = await counter.cut_beside("orders", 10)
    assert answer == Cut(Segment(2**53 + 21, 2**53 + 31), State(2**53 + 30, 10))
    assert read_hash(shared_redis_server, "orders") == {
        "lastAllocValue": str(2**53 + 30),
        "dataVersion": "10",
    }


# The fence


async def test_restart_makes_it_stale(redis_server: RedisServer) -> None:
    """A Redis that comes back with old data does not cut from it, even with the newest."""
    async with open_counter(redis_server.port) as counter:
        await seat(counter)
        backup = redis_server.snapshot()
        assert await take(counter) == Segment(111, 121)
        await trio.to_thread.run_sync(redis_server.restart_from, backup)
        assert await reason_of(counter) is Reason.STALE
        assert (await counter.inspect("orders"))[0].last_alloc_value == 110
        assert await seat(counter, Segment(200_001, 200_101)) == Segment(200_001, 200_011)


async def test_restart_costs_no_failed_take(redis_server: RedisServer) -> None:
    """A connection that died meanwhile is replaced before anything is sent."""
    async with open_counter(redis_server.port) as counter:
        await seat(counter)
        await trio.to_thread.run_sync(redis_server.restart_empty)
        assert await reason_of(counter) is Reason.MISSING


@asynccontextmanager
async def replica_of(master: RedisServer) -> AsyncIterator[RedisServer]:
    """A replica in sync."""
    with RedisServer() as replica:
        replica.replicate_from(master.port)
        await trio.to_thread.run_sync(master.wait_for_sync, replica)
        yield replica


async def test_promoted_replica_is_stale(redis_server: RedisServer) -> None:
    """A replica that becomes a master does not go on with the data that it received."""
    async with open_counter(redis_server.port) as counter, replica_of(redis_server) as replica:
        # The first replica has changed the replication history, harmlessly.
        await seat(counter)
        await trio.to_thread.run_sync(redis_server.wait_for_sync, replica)
        async with open_counter(replica.port) as other:
            replica.promote()
            assert await reason_of(other) is Reason.STALE
            assert not await other.extend("orders", LEASE.last, LEASE.last + 10)
            assert not await other.give_back(Tail("orders", Segment(105, 111)))
        assert await take(counter) == Segment(111, 121)


async def test_master_that_was_a_replica_meanwhile_is_stale(redis_server: RedisServer) -> None:
    """A master that was demoted and promoted again keeps its run_id, and yet is another one."""
    async with open_counter(redis_server.port) as counter, replica_of(redis_server) as replica:
        await seat(counter)
        await trio.to_thread.run_sync(redis_server.wait_for_sync, replica)
        run_id = redis_server.info()["run_id"]
        replica.promote()
        redis_server.replicate_from(replica.port)
        await trio.to_thread.run_sync(replica.wait_for_sync, redis_server)
        redis_server.promote()
        assert redis_server.info()["run_id"] == run_id
        assert await reason_of(counter) is Reason.STALE


@pytest.mark.parametrize("kind", ["ours", "original", "nothing"])
async def test_replica_is_unavailable(shared_redis_server: RedisServer, kind: str) -> None:
    """A replica answers nothing at all, whatever it holds, so that no lease is spent on it."""
    refusal = Refusal(Reason.MISSING, State())
    tail = Tail("orders", Segment(105, 111))
    with RedisServer() as replica:
        async with open_counter(replica.port) as counter:
            if kind == "ours":
                await seat(counter)
            elif kind == "original":
                write_hash(replica, "orders", lastAllocValue=110, dataVersion=7)
            before = read_hash(replica, "orders")
            # To nowhere: so it keeps what it has.
            replica.replicate_from(1)
            for call in (
                lambda: counter.take("orders", 10, floor=0),
                lambda: counter.seat("orders", LEASE, 10, refusal, floor=0),
                lambda: counter.extend("orders", LEASE.last, LEASE.last + 10),
                lambda: counter.give_back(tail),
                lambda: counter.inspect("orders"),
                lambda: counter.cut_beside("orders", 10),
                lambda: counter.take_over("orders"),
            ):
                with pytest.raises(Unavailable, match="this is a replica"):
                    await call()
            replica.promote()
            assert read_hash(replica, "orders") == before


# Faults


async def test_lost_reply_is_a_gap(proxied: RedisCounter, fault_proxy: FaultProxy) -> None:
    """A cut whose reply was lost is never made again: the next one lies above it."""
    fault_proxy.swallow_replies(1)
    with pytest.raises(Unavailable):
        await take(proxied)
    fault_proxy.heal()
    assert await take(proxied) == Segment(121, 131)


async def test_every_lost_reply_of_many_is_a_gap(
    proxied: RedisCounter, fault_proxy: FaultProxy
) -> None:
    """Whatever is lost while many cut at once, nothing is cut twice."""
    segments: list[Segment] = []
    failures = 0

    async def take_some() -> None:
        nonlocal failures
        for _ in range(10):
            try:
                segments.append(await take(proxied))
            except Unavailable:
                failures += 1

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(take_some)
        await trio.sleep(0.01)
        fault_proxy.swallow_replies(2)
        await trio.sleep(0.02)
        fault_proxy.cut()
    assert len(segments) + failures == 40
    starts = sorted(segment.start for segment in segments)
    assert len(set(starts)) == len(starts)
    assert all(start % 10 == 1 for start in starts)
    # A connection that was cut while it idled is noticed only by the next who uses it.
    for _ in range(CONNECTIONS_MAX):
        with suppress(Unavailable):
            assert await take(proxied) > max(segments)
            return
    pytest.fail("no connection is good any more")


async def test_cancelled_take_leaves_nothing_to_be_misread(
    proxied: RedisCounter, fault_proxy: FaultProxy
) -> None:
    """The reply to a take that was cancelled never reaches the next one."""
    for round_number in range(3):
        fault_proxy.delay(to_client_seconds=0.1)
        with trio.move_on_after(0.03) as scope:
            await take(proxied)
        assert scope.cancelled_caught
        fault_proxy.heal()
        assert await take(proxied, 5) == Segment(121 + 15 * round_number, 126 + 15 * round_number)


async def test_hung_redis_is_unavailable_soon(redis_server: RedisServer) -> None:
    """A Redis that stopped costs a second; what it executes later is cut once."""
    async with open_counter(redis_server.port) as counter:
        await seat(counter)
        redis_server.pause()
        with bounded(REPLY_TIMEOUT_SECONDS), pytest.raises(Unavailable, match="Timeout"):
            await take(counter)
        redis_server.resume()
        # The command that timed out lies in the socket of a connection that is gone.
        assert (await take(counter)).start in (111, 121)


async def test_many_on_a_hung_redis_end_soon(redis_server: RedisServer) -> None:
    """Many who wait for a Redis that stopped do not queue up behind each other."""
    async with open_counter(redis_server.port) as counter:
        await seat(counter)
        redis_server.pause()

        async def fail() -> None:
            with pytest.raises(Unavailable):
                await take(counter)

        with bounded(UNIT_SECONDS):
            async with trio.open_nursery() as nursery:
                for _ in range(3 * CONNECTIONS_MAX):
                    nursery.start_soon(fail)
        redis_server.resume()
        assert (await take(counter)).start % 10 == 1


async def test_refused_connection_is_unavailable_at_once(redis_server: RedisServer) -> None:
    """Where nobody listens the answer comes at once, and closing is quiet."""
    redis_server.kill()
    async with open_counter(redis_server.port) as counter:
        with bounded(0), pytest.raises(Unavailable, match="Redis: Error 111"):
            await take(counter)


async def test_unloaded_scripts_are_loaded_again(
    shared_redis_server: RedisServer, counter: RedisCounter
) -> None:
    """A Redis that forgets its scripts costs no failed take and no gap."""
    await seat(counter)
    shared_redis_server.command("SCRIPT", "FLUSH")
    assert await take(counter) == Segment(111, 121)


async def test_connections_are_bounded(
    shared_redis_server: RedisServer, counter: RedisCounter
) -> None:
    """However many cut at once, Redis sees no more than the limit."""
    await seat(counter)
    before = int(shared_redis_server.info()["total_connections_received"])
    async with trio.open_nursery() as nursery:
        for _ in range(5 * CONNECTIONS_MAX):
            nursery.start_soon(take, counter)
    after = int(shared_redis_server.info()["total_connections_received"])
    assert after - before <= CONNECTIONS_MAX  # One was open, and one was for asking.


@pytest.mark.parametrize(
    "junk",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b":1e5\r\n",
        b"$x\r\n",
        b"*-5\r\n",
        b"\xff\xfe\r\n",
        b"",
    ],
)
async def test_wrong_server_is_unavailable(junk: bytes) -> None:
    """Whatever answers in the place of a Redis, the error is ours and comes in time."""

    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(junk)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host=HOST)
        nursery.start_soon(trio.serve_listeners, answer, [listener])
        async with open_counter(listener.socket.getsockname()[1]) as counter:
            with bounded(REPLY_TIMEOUT_SECONDS), pytest.raises(Unavailable, match="Redis: "):
                await take(counter)
        nursery.cancel_scope.cancel()


def test_closed_version_is_the_greatest_number() -> None:
    """The version in the scripts is the one of a row that is ours."""
    assert CLOSED == MAX_ID == 2**63 - 1
