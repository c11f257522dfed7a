"""The MySQL ledger's database, looked at over one connection.

Privileges are tried by *preparing* statements: the server checks them as if it were to run the
statement, which it never does.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeVar, final

import asyncmy
import attrs

from idalloc_tcp.bridge import run_unit
from idalloc_tcp.doctor.finding import Outcome, Report, fail, ok, perform, warn
from idalloc_tcp.errors import Unavailable
from idalloc_tcp.ledger import CLOSED
from idalloc_tcp.ledger.mysql import CREATE_TABLE, DRIVER_ERRORS, TIMEOUT_SECONDS
from idalloc_tcp.ledger.mysql_url import MysqlUrl
from idalloc_tcp.settings import Settings

_T = TypeVar("_T")
_Rows = list[tuple[Any, ...]]

_ENGINE: Final = """\
SELECT engine FROM information_schema.tables
WHERE table_schema = DATABASE() AND table_name = 'tbl_alloc_info'"""

_COLUMNS: Final = """\
SELECT column_name, column_type, is_nullable, column_key FROM information_schema.columns
WHERE table_schema = DATABASE() AND table_name = 'tbl_alloc_info'"""

#: Column -> type without its width, nullability, key. Others may stand beside them.
_SHAPE: Final = {
    "service_name": ("varchar", "NO", "PRI"),
    "last_alloc_value": ("bigint unsigned", "NO", ""),
    "data_version": ("bigint unsigned", "NO", ""),
}

#: One for each privilege that a server needs.
_USES: Final = (
    "SELECT last_alloc_value, data_version FROM tbl_alloc_info WHERE service_name = ''",
    "UPDATE tbl_alloc_info SET last_alloc_value = 1 WHERE service_name = '' AND 1 = 0",
    "INSERT INTO tbl_alloc_info (service_name, last_alloc_value, data_version) VALUES ('', 0, 0)",
)

_VARIABLES: Final = """\
SHOW GLOBAL VARIABLES WHERE variable_name IN
('innodb_flush_log_at_trx_commit', 'log_bin', 'sync_binlog', 'read_only')"""

_ROWS: Final = f"SELECT COUNT(*), SUM(data_version < {CLOSED}) FROM tbl_alloc_info"


async def examine_database(url: MysqlUrl, settings: Settings, report: Report) -> None:
    """Could a server use the database? Needs `bridge.asyncio_loop` around it."""
    database = _Database(url)
    try:
        if not await perform("MySQL", database.greet, report):
            return
        await perform("MySQL writable", database.writable, report)
        await perform("MySQL durability", database.durability, report)
        create_table = partial(database.may_create, settings.create_table)
        await perform("MySQL create", create_table, report)
        if await perform("MySQL table", partial(database.table, settings.create_table), report):
            await perform("MySQL privileges", database.privileges, report)
            await perform("MySQL rows", partial(database.rows, settings), report)
    finally:
        database.close()


@final
@attrs.define(eq=False)
class _Database:
    """One connection. What the driver raises leaves it as Unavailable."""

    _url: MysqlUrl
    _connection: Any = attrs.field(init=False, default=None)
    _user: str = attrs.field(init=False, default="")

    async def greet(self) -> Outcome:
        async def connect() -> Any:
            return await asyncmy.connect(
                **self._url.arguments(),
                autocommit=True,
                charset="utf8mb4",
                connect_timeout=TIMEOUT_SECONDS,
                read_timeout=TIMEOUT_SECONDS,
            )

        where = f"{self._url.host}:{self._url.port}"
        try:
            self._connection = await self._translated(connect)
        except Unavailable as error:
            return fail(
                f"{where}: {error}: check the address, the user, the password, the database "
                "and that the server runs"
            )
        [(version, self._user)] = await self._query("SELECT VERSION(), CURRENT_USER()")
        return ok(f"{version} at {where} answers {self._user}")

    async def writable(self) -> Outcome:
        if (await self._variables())["read_only"] in ("ON", "1"):
            return fail("read_only is on: this is a replica, or shut for writing; name the primary")
        return ok("it is not read_only")

    async def durability(self) -> Outcome:
        variables = await self._variables()
        wanted = ["innodb_flush_log_at_trx_commit"]
        if variables.get("log_bin") == "ON":
            wanted.append("sync_binlog")
        weak = [name for name in wanted if variables.get(name) != "1"]
        if weak:
            found = ", ".join(f"{name} = {variables.get(name)}" for name in weak)
            return warn(
                f"{found}: a crash of its machine may lose commits, and then IDs may repeat; set "
                f"{' and '.join(weak)} to 1"
            )
        return ok(f"every commit is flushed ({', '.join(wanted)} = 1)")

    async def may_create(self, create_table: bool) -> Outcome:
        refusal = await self._refusal(CREATE_TABLE)
        if refusal is None:
            return ok("this user may make the table")
        if create_table:
            return fail(f"{refusal}: grant it, or unset create_table once the table is there")
        return ok("this user may not make the table, and need not unless for `init-db`")

    async def table(self, create_table: bool) -> Outcome:
        engines = await self._query(_ENGINE)
        if not engines and create_table:
            return warn(
                "tbl_alloc_info is not there: the server makes it, and every service begins at 1; "
                "if IDs were ever given out, this is the wrong database"
            )
        if not engines:
            return fail(
                "tbl_alloc_info is not there, or this user has no privilege on it: run "
                "`idalloc-tcp init-db` as a user who may CREATE"
            )
        found = {
            str(name).lower(): (_plain(str(kind)), str(nullable), str(key))
            for name, kind, nullable, key in await self._query(_COLUMNS)
        }
        wrong = [name for name, shape in _SHAPE.items() if found.get(name) != shape]
        if wrong:
            return fail(f"tbl_alloc_info is of another shape ({', '.join(wrong)}): see the README")
        if engines != [("InnoDB",)]:
            return fail(
                f"tbl_alloc_info is on {engines[0][0]}, which loses or tears writes in a crash: "
                "ALTER TABLE tbl_alloc_info ENGINE = InnoDB"
            )
        return ok("tbl_alloc_info is there, with its columns, on InnoDB")

    async def privileges(self) -> Outcome:
        refusals = [await self._refusal(statement) for statement in _USES]
        for refusal in refusals:
            if refusal is not None:
                return fail(
                    f"{refusal}: GRANT SELECT, INSERT, UPDATE ON "
                    f"`{self._url.database}`.tbl_alloc_info TO {_quoted(self._user)}"
                )
        return ok("SELECT, INSERT and UPDATE are granted")

    async def rows(self, settings: Settings) -> Outcome:
        [(total, foreign)] = await self._query(_ROWS)
        if not foreign:
            return ok(f"{total} services, none of the original idalloc's")
        found = f"{foreign} of {total} rows are the original idalloc's and may be behind"
        if settings.redis is None:
            return fail(
                f"{found}: their services get ERR unavailable; name the original's Redis, see "
                "Moving from idalloc in the README"
            )
        if settings.take_over:
            return warn(
                f"{found}: take_over makes each ours at its next segment, and an original that "
                "still runs then fails: be sure that none does"
            )
        return warn(
            f"{found}: served beside the original, from its hashes; when the last original has "
            "stopped, restart with take_over = true"
        )

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    async def _variables(self) -> dict[str, str]:
        return {str(name): str(value) for name, value in await self._query(_VARIABLES)}

    async def _refusal(self, statement: str) -> str | None:
        """Why the server would not run it; None if it would."""
        quoted = statement.replace("'", "''")
        try:
            await self._query(f"PREPARE idalloc_doctor FROM '{quoted}'")
        except Unavailable as error:
            return str(error)
        return None

    async def _query(self, statement: str) -> _Rows:
        async def run() -> _Rows:
            async with self._connection.cursor() as cursor:
                await cursor.execute(statement)
                return list(await cursor.fetchall())

        return await self._translated(run)

    async def _translated(self, unit: Callable[[], Awaitable[_T]]) -> _T:
        async def translated() -> _T:
            try:
                return await unit()
            except DRIVER_ERRORS as error:
                # The driver's errors are a number and a text.
                text = str(error.args[-1] if error.args else "") or type(error).__name__
                raise Unavailable(text) from error

        return await run_unit(translated)


def _plain(column_type: str) -> str:
    """Without the width, which newer servers do not tell."""
    kind, _, rest = column_type.lower().partition("(")
    return " ".join((kind, *rest.partition(")")[2].split()))


def _quoted(user: str) -> str:
    """`user@host` as a GRANT takes it."""
    name, _, host = user.rpartition("@")
    return f"'{name}'@'{host}'"
