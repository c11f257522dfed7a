"""A Redis that forgets, returns older data, fails over or is slow: no ID comes twice."""

from contextlib import ExitStack
from functools import partial
from typing import Final

import pytest
import trio

from tests.processes import ServerProcess
from tests.real.mariadb_server import MariaDbDatabase
from tests.real.proxy import open_fault_proxy
from tests.real.redis_server import RedisServer
from tests.real.serving import (
    SERVICE,
    SMALL,
    LineClient,
    Range,
    duplicates,
    hash_of,
    is_well,
    last_cut,
    load_for,
    start_server,
)

#: One lease for a whole test, so that nothing but the fence tells older data from newer.
LONG_LEASE: Final = ("--lease-segments", "10000", "--write-db-every-n-versions", "1000000")


@pytest.mark.parametrize("fault", ["flush", "restart-empty", "restart-older"])
def test_a_redis_that_forgets_repeats_nothing(
    fault: str, mariadb_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """Neither a server that was there nor one that is new, and remembers nothing, is misled."""
    with ExitStack() as stack:

        def start() -> ServerProcess:
            flags = (*SMALL, *LONG_LEASE)
            return stack.enter_context(start_server(mariadb_database, redis_server, *flags))

        old = start()
        taken = load_for([old], 50)
        older, cut = redis_server.snapshot(), last_cut(redis_server)
        taken += load_for([old], 50)
        assert last_cut(redis_server) > cut
        match fault:
            case "flush":
                redis_server.command("FLUSHALL")
            case "restart-empty":
                redis_server.restart_empty()
            case "restart-older":
                redis_server.restart_from(older)
        new = start()
        taken += load_for([new], 50)
        taken += load_for([old, new], 100)
        with LineClient.connect(new) as client:
            assert is_well(client)
    assert duplicates(taken) == 0
    assert hash_of(redis_server)["fence"].startswith(redis_server.info()["run_id"])


@pytest.mark.parametrize("replica_is_used", [True, False], ids=["used", "not-used"])
async def test_a_failover_and_back_repeats_nothing(
    replica_is_used: bool, mariadb_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """A replica that lacks the last cuts is promoted; then the old master, with its data."""
    block = trio.to_thread.run_sync
    with ExitStack() as stack:
        replica = stack.enter_context(RedisServer())
        async with (
            open_fault_proxy(redis_server.port) as to_master,
            open_fault_proxy(redis_server.port) as to_redis,
        ):

            async def start() -> ServerProcess:
                flags = (*SMALL, *LONG_LEASE)
                starting = partial(start_server, mariadb_database, to_redis.port, *flags)
                return stack.enter_context(await block(starting))

            old = await start()
            await block(replica.replicate_from, to_master.port)
            taken = await block(load_for, [old], 50)
            await block(redis_server.wait_for_sync, replica)
            to_master.delay(to_client_seconds=float("inf"))
            taken += await block(load_for, [old], 50)
            await block(replica.promote)
            assert last_cut(replica) < last_cut(redis_server), "the replica does not lag"
            if replica_is_used:
                to_redis.target_port = replica.port
                taken += await block(load_for, [await start()], 50)
            await block(redis_server.replicate_from, replica.port)
            await block(replica.wait_for_sync, redis_server)
            await block(redis_server.promote)
            to_redis.target_port = redis_server.port
            to_redis.cut()
            new = await start()
            taken += await block(load_for, [new], 50)
            taken += await block(load_for, [old, new], 100)
    assert duplicates(taken) == 0


async def test_a_lease_grows_while_it_is_cut(
    mariadb_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """However slow Redis is, a lease is lengthened in time, and none of it is left behind."""
    flags = ("--segment-size", "1000", "--pool-seconds", "0", "--write-db-every-n-versions", "1")

    def take_all(port: int) -> tuple[list[Range], dict[str, str]]:
        with (
            start_server(mariadb_database, port, *flags) as server,
            LineClient.connect(server) as client,
        ):
            for _ in range(200):
                client.alloc(500)
            return client.taken, client.stats()

    async with open_fault_proxy(redis_server.port) as to_redis:
        to_redis.delay(to_client_seconds=0.01)
        taken, stats = await trio.to_thread.run_sync(take_all, to_redis.port)
    assert taken == [(SERVICE, first, 500) for first in range(1, 100_001, 500)]
    assert stats["seats_total"] == "1"
