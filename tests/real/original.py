"""The original idalloc server, as Redis and MySQL see it: its commands, sent as it sends them.

It cuts with two HINCRBYs in a pipeline, which is no transaction, and serves at once. The row is
written behind: in a thread of its own, at the first version and at every tenth one, guarded by the
version alone. At its start, at the first version and at every hundredth one the hash is restored
from the row, if the row's version is greater. When a cut fails it tries again without a pause.
"""

import queue
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import BinaryIO, Final, Self, final

import attrs

from tests.real.mariadb_server import MariaDbDatabase, QueryFailed
from tests.real.process import HOST
from tests.real.redis_server import RedisServer
from tests.real.resp import RedisError, encode
from tests.real.serving import KEY_PREFIX, PATIENCE_SECONDS, SERVICE, Range

SEGMENT: Final = 10_000
WRITE_EVERY: Final = 10
RESTORE_EVERY: Final = 100

_RESTORE: Final = """\
local version = tonumber(redis.call('HGET', KEYS[1], 'dataVersion') or '0')
if tonumber(ARGV[2]) > version then
  redis.call('HSET', KEYS[1], 'lastAllocValue', ARGV[1], 'dataVersion', ARGV[2])
end
"""
_KEY: Final = f"{KEY_PREFIX}{SERVICE}"


@final
@attrs.define(eq=False)
class Original:
    """One process of the original, with the one client that it serves. A context manager.

    Attributes:
        taken: what the client got: whole segments.
        failures: how many cuts failed.
    """

    _database: MariaDbDatabase
    _redis: RedisServer
    taken: list[Range] = attrs.field(init=False, factory=list)
    failures: int = attrs.field(init=False, default=0)
    _socket: socket.socket = attrs.field(init=False)
    _lines: BinaryIO = attrs.field(init=False)
    _behind: "queue.SimpleQueue[tuple[int, int] | None]" = attrs.field(
        init=False, factory=queue.SimpleQueue
    )
    _stack: ExitStack = attrs.field(init=False, factory=ExitStack)

    def __enter__(self) -> Self:
        connection = socket.create_connection((HOST, self._redis.port), PATIENCE_SECONDS)
        self._socket = self._stack.enter_context(connection)
        self._lines = self._stack.enter_context(connection.makefile("rb"))
        self.restore()
        writer = threading.Thread(target=self._write_behind)
        writer.start()
        self._stack.callback(writer.join)
        self._stack.callback(self._behind.put, None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def serve(self, wants_more: Callable[[], bool]) -> None:
        """Cut and serve for as long as more is wanted."""
        while wants_more():
            try:
                last = self.begin_cut()
                version = self.end_cut(last)
            except RedisError:
                self.failures += 1
                continue
            if version == 1 or version % WRITE_EVERY == 0 or version % RESTORE_EVERY == 0:
                self._behind.put((last, version))

    def begin_cut(self) -> int:
        """The first command of the pipeline: the last ID of the cut."""
        return self._execute("HINCRBY", _KEY, "lastAllocValue", SEGMENT)

    def end_cut(self, last: int) -> int:
        """The second one; then the cut is served. The cut's version.

        Raises:
            RedisError: it fails, and the cut with it.
        """
        version = self._execute("HINCRBY", _KEY, "dataVersion", 1)
        self.taken.append((SERVICE, last - SEGMENT + 1, SEGMENT))
        return version

    def write(self, last: int, version: int) -> None:
        """Note a cut in the row."""
        self._database.query(
            "INSERT IGNORE INTO tbl_alloc_info (service_name, last_alloc_value, data_version) "
            f"VALUES ('{SERVICE}', {last}, {version}); "
            f"UPDATE tbl_alloc_info SET last_alloc_value = {last}, data_version = {version} "
            f"WHERE service_name = '{SERVICE}' AND data_version < {version}"
        )

    def restore(self) -> None:
        """Let the row overwrite the hash, if its version is the greater one."""
        for last, version in self._database.query(
            "SELECT last_alloc_value, data_version FROM tbl_alloc_info "
            f"WHERE service_name = '{SERVICE}'"
        ):
            self._redis.command("EVAL", _RESTORE, 1, _KEY, last, version)

    def _write_behind(self) -> None:
        while (cut := self._behind.get()) is not None:
            last, version = cut
            with suppress(QueryFailed, RedisError):
                if version == 1 or version % RESTORE_EVERY == 0:
                    self.restore()
                if version == 1 or version % WRITE_EVERY == 0:
                    self.write(last, version)

    def _execute(self, *command: str | int) -> int:
        self._socket.sendall(encode(*command))
        line = self._lines.readline().decode()
        if line.startswith("-"):
            raise RedisError(line[1:].strip())
        return int(line[1:])
