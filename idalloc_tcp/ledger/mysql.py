"""The MySQL ledger, shared by any number of servers.

The safety argument: a lease is one UPDATE of one row, committed by the server before it answers
(autocommit), and the answer itself carries the new value (`LAST_INSERT_ID(expr)`), so nothing is
read that another server could have changed in between. An answer that does not arrive means that
the range is lost: a connection on which anything went wrong is closed and never used again, and no
statement that moves ownership is sent twice.

The table is that of the original idalloc.
"""

import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar, final

import asyncmy
import attrs
import trio
from asyncmy.errors import MySQLError

from idalloc_tcp.bridge import run_unit, turn
from idalloc_tcp.errors import Exhausted, NotOurs, Unavailable
from idalloc_tcp.ledger import CLOSED, Row, Tail
from idalloc_tcp.ledger.mysql_url import MysqlUrl
from idalloc_tcp.pool import MAX_ID, Segment

_T = TypeVar("_T")
#: A unit of work: it gets a cursor and must leave nothing behind.
_Work = Callable[[Any], Awaitable[_T]]

#: Statements at once; further ones wait, for SLOT_SECONDS at most.
CONNECTIONS_MAX: Final = 8
SLOT_SECONDS: Final = 1.0
#: For connecting, and for each read; asyncmy takes whole seconds for the first.
TIMEOUT_SECONDS: Final = 1
#: A connection that was idle for longer is first asked whether it still lives: a lease on a dead
#: one would be a lost range.
FRESH_SECONDS: Final = 2.0
NO_SUCH_TABLE: Final = 1146
#: What the driver raises when the server, the network or a packet is not as it should be.
DRIVER_ERRORS: Final = (
    *(MySQLError, OSError, EOFError, RuntimeError, AttributeError),
    *(struct.error, LookupError, ValueError),
)

#: The driver's escaping relies on backslashes, a number that does not fit must be an error, and
#: that a table is there already is not worth a line in the log.
_INIT_COMMAND: Final = "SET sql_mode = 'STRICT_ALL_TABLES', sql_notes = 0"

CREATE_TABLE: Final = """\
CREATE TABLE IF NOT EXISTS tbl_alloc_info (
    service_name     VARCHAR(64)     NOT NULL PRIMARY KEY,
    last_alloc_value BIGINT UNSIGNED NOT NULL DEFAULT 0,
    data_version     BIGINT UNSIGNED NOT NULL DEFAULT 0
) ENGINE = InnoDB DEFAULT CHARACTER SET = utf8mb4"""

# The version marks a row as ours; one that the original idalloc wrote may be behind. The bound is
# compared against a constant: an unsigned difference may not fall below zero.
_LEASE: Final = f"""\
UPDATE tbl_alloc_info
SET last_alloc_value = LAST_INSERT_ID(GREATEST(last_alloc_value, %(floor)s) + %(size)s)
WHERE service_name = %(service)s AND data_version = {CLOSED}
  AND GREATEST(last_alloc_value, %(floor)s) <= %(highest)s"""

_TAKE_OVER: Final = f"""\
UPDATE tbl_alloc_info
SET last_alloc_value = LAST_INSERT_ID(GREATEST(last_alloc_value, %(floor)s) + %(size)s),
    data_version = {CLOSED}
WHERE service_name = %(service)s AND GREATEST(last_alloc_value, %(floor)s) <= %(highest)s"""

_ADD_ROW: Final = f"""\
INSERT INTO tbl_alloc_info (service_name, data_version) VALUES (%(service)s, {CLOSED})
ON DUPLICATE KEY UPDATE service_name = service_name"""

_MOVE: Final = f"""\
UPDATE tbl_alloc_info
SET last_alloc_value = %(new)s
WHERE service_name = %(service)s AND last_alloc_value = %(old)s AND data_version = {CLOSED}"""

_RAISE: Final = f"""\
UPDATE tbl_alloc_info
SET last_alloc_value = GREATEST(last_alloc_value, %(lease_end)s)
WHERE service_name = %(service)s AND data_version = {CLOSED}"""

# In this order: an assignment sees what those before it have assigned.
_COMMIT_BESIDE: Final = f"""\
INSERT INTO tbl_alloc_info (service_name, last_alloc_value, data_version)
VALUES (%(service)s, %(last)s, %(version)s)
ON DUPLICATE KEY UPDATE
    last_alloc_value = IF(data_version = {CLOSED}, last_alloc_value,
                          GREATEST(last_alloc_value, %(last)s)),
    data_version = GREATEST(data_version, %(version)s)"""

_READ: Final = """\
SELECT last_alloc_value, data_version FROM tbl_alloc_info WHERE service_name = %(service)s"""


@final
@attrs.define(eq=False)
class MysqlLedger:
    """The ledger in a MySQL or MariaDB database. Needs `bridge.asyncio_loop` around it.

    Args:
        url: where the database is.
        create_table: make the table, on the first connection ever, if it is missing.
    """

    _url: MysqlUrl
    _create_table: bool = False
    _is_closed: bool = attrs.field(init=False, default=False)
    _idle: list[tuple[Any, float]] = attrs.field(init=False, factory=list)
    _slots: trio.CapacityLimiter = attrs.field(
        init=False, factory=lambda: trio.CapacityLimiter(CONNECTIONS_MAX)
    )

    async def prepare(self) -> None:
        """Make the table if it is missing.

        Raises:
            Unavailable: the database does not answer, or refuses.
        """

        async def create(cursor: Any) -> None:
            await cursor.execute(CREATE_TABLE)

        await self._run(create)

    async def lease(self, service: str, size: int, *, floor: int, ceiling: int) -> Segment:
        """As `SharedLedger.lease`."""
        return await self._lease(_LEASE, service, size, floor, ceiling)

    async def take_over(self, service: str, size: int, *, floor: int, ceiling: int) -> Segment:
        """As `SharedLedger.take_over`."""
        return await self._lease(_TAKE_OVER, service, size, floor, ceiling)

    async def _lease(
        self, statement: str, service: str, size: int, floor: int, ceiling: int
    ) -> Segment:
        values = {"service": service, "size": size, "floor": floor, "highest": ceiling - size}
        if floor + size > ceiling:
            raise _exhausted(service, size, ceiling, floor)

        async def take(cursor: Any) -> int | Row | None:
            if await cursor.execute(statement, values) == 0:
                # Certain: nothing was taken. Once more, for there may have been no row; another
                # server may be adding it at the same moment.
                await cursor.execute(_ADD_ROW, values)
                if await cursor.execute(statement, values) == 0:
                    return await _row(cursor, service)
            return int(cursor.lastrowid)

        taken = await self._run(take)
        match taken:
            case int(last):
                return Segment(last - size + 1, last + 1)
            case Row(is_ours=False) if statement is _LEASE:
                raise NotOurs(f"{service}: its row is the original idalloc's and may be behind")
        last = taken.last_alloc_value if taken else 0
        raise _exhausted(service, size, ceiling, max(last, floor))

    async def give_back(self, tails: Sequence[Tail]) -> list[bool]:
        """As `Ledger.give_back`."""

        async def return_all(cursor: Any) -> list[bool]:
            returned = []
            for tail in tails:
                old, new = tail.segment.last, tail.segment.start - 1
                values = {"service": tail.service, "old": old, "new": new}
                returned.append(await cursor.execute(_MOVE, values) == 1)
            return returned

        return await self._run(return_all)

    async def extend(self, service: str, old_end: int, new_end: int) -> bool:
        """As `SharedLedger.extend`."""
        assert old_end < new_end <= MAX_ID
        values = {"service": service, "old": old_end, "new": new_end}

        async def move(cursor: Any) -> bool:
            return bool(await cursor.execute(_MOVE, values) == 1)

        return await self._run(move)

    async def commit_beside(self, service: str, last: int, version: int) -> bool:
        """As `SharedLedger.commit_beside`."""
        values = {"service": service, "last": last, "version": version}

        async def commit(cursor: Any) -> bool:
            await cursor.execute(_COMMIT_BESIDE, values)
            row = await _row(cursor, service)
            return row is not None and not row.is_ours and row.last_alloc_value >= last

        return await self._run(commit)

    async def raise_to(self, service: str, lease_end: int) -> None:
        """As `SharedLedger.raise_to`."""

        async def lift(cursor: Any) -> None:
            await cursor.execute(_RAISE, {"service": service, "lease_end": lease_end})

        await self._run(lift)

    async def read(self, service: str) -> Row | None:
        """As `SharedLedger.read`."""

        async def select(cursor: Any) -> Row | None:
            return await _row(cursor, service)

        return await self._run(select)

    async def aclose(self) -> None:
        """As `Ledger.aclose`."""
        self._is_closed = True
        connections = [connection for connection, _ in self._idle]
        self._idle.clear()
        # Shielded, for `run_unit` has a deadline. It is over either way.
        with trio.CancelScope(shield=True), suppress(Unavailable, *DRIVER_ERRORS):
            await run_unit(_close_all, connections)

    async def _run(self, work: _Work[_T]) -> _T:
        async with turn(self._slots, SLOT_SECONDS):
            return await run_unit(self._unit, work)

    async def _unit(self, work: _Work[_T]) -> _T:
        """On asyncio's side: a connection, the work, and the connection back or closed."""
        try:
            connection = await self._connection()
            try:
                async with connection.cursor() as cursor:
                    if self._create_table:
                        await cursor.execute(CREATE_TABLE)
                        self._create_table = False
                    result = await work(cursor)
            except BaseException:
                connection.close()
                raise
        except DRIVER_ERRORS as error:
            raise Unavailable(f"MySQL: {_reason(error)}") from error
        if self._is_closed:
            connection.close()
        else:
            self._idle.append((connection, time.monotonic()))
        return result

    async def _connection(self) -> Any:
        if self._is_closed:
            raise Unavailable("MySQL: closed")
        while self._idle:
            connection, used_at = self._idle.pop()
            if time.monotonic() - used_at < FRESH_SECONDS or await _lives(connection):
                return connection
        return await asyncmy.connect(
            **self._url.arguments(),
            autocommit=True,
            charset="utf8mb4",
            connect_timeout=TIMEOUT_SECONDS,
            read_timeout=TIMEOUT_SECONDS,
            init_command=_INIT_COMMAND,
        )


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if error.args[:1] == (NO_SUCH_TABLE,):
        return "the table tbl_alloc_info is missing: run `idalloc-tcp init-db`"
    # The driver's errors are a number and a text.
    return " ".join(str(error.args[-1] if error.args else "").split()) or type(error).__name__


def _exhausted(service: str, size: int, ceiling: int, last: int) -> Exhausted:
    text = f"{service}: a lease of {size} would pass its ceiling {ceiling}"
    return Exhausted(text, max(0, ceiling - last))


async def _row(cursor: Any, service: str) -> Row | None:
    await cursor.execute(_READ, {"service": service})
    row = await cursor.fetchone()
    return None if row is None else Row(int(row[0]), int(row[1]))


async def _close_all(connections: list[Any]) -> None:
    """Say goodbye where somebody listens; encryption has an end that takes a round trip, too."""
    try:
        for connection in connections:
            await connection.ensure_closed()
    finally:
        for connection in connections:
            connection.close()


async def _lives(connection: Any) -> bool:
    """Does it answer? Asking moves nothing, so here a failure may simply be tried again."""
    try:
        await connection.ping(reconnect=False)
    except DRIVER_ERRORS:
        connection.close()
        return False
    except BaseException:
        connection.close()
        raise
    return True
