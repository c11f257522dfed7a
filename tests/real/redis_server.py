"""A real Redis server to break: crashes, stale backups, failovers."""

import contextlib
import shutil
from pathlib import Path
from typing import Final, final

import attrs

from tests.real.process import HOST, LocalServer, find_program, wait_until
from tests.real.resp import RedisError, Reply, call

#: For one command; a healthy server on an idle machine needs a thousandth of it.
COMMAND_TIMEOUT_SECONDS: Final = 5.0
_PING_TIMEOUT_SECONDS: Final = 0.5
SYNC_TIMEOUT_SECONDS: Final = 10.0
_FLAGS: Final = (
    *("--bind", HOST),
    *("--save", ""),
    *("--appendonly", "no"),
    # A first replica is served at once, not after waiting five seconds for more of them.
    *("--repl-diskless-sync-delay", "0"),
)


@final
@attrs.define(eq=False)
class RedisServer(LocalServer):
    """A Redis that keeps nothing on disk except what `snapshot` saves.

    Args:
        flags: further ones for the command line; they win over the usual ones.
    """

    flags: tuple[str, ...] = ()

    def _prepare(self) -> None:
        self._data.mkdir()

    def _command_line(self) -> list[str]:
        program = find_program("redis-server", debian_package="redis-server")
        place = ("--port", str(self.port), "--dir", str(self._data))
        return [program, *place, *_FLAGS, *self.flags]

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, RedisError):
            return self.command("PING", timeout_seconds=_PING_TIMEOUT_SECONDS) == "PONG"
        return False

    def command(self, *args: str | int, timeout_seconds: float = COMMAND_TIMEOUT_SECONDS) -> Reply:
        """One command over a connection of its own, past any proxy.

        Raises:
            RedisError: the server refused it.
            TimeoutError: no reply in time; a paused server executes it when it is resumed.
            OSError: no connection, or it broke.
        """
        return call(self.port, *args, timeout_seconds=timeout_seconds)

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _dump(self) -> Path:
        return self._data / "dump.rdb"

    def info(self) -> dict[str, str]:
        """The fields of INFO, of all default sections."""
        text = self.command("INFO")
        assert isinstance(text, str)
        return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    def restart_empty(self) -> None:
        """Crash it and start it again without any data."""
        self._restart_on(None)

    def snapshot(self) -> bytes:
        """Save all data now: a backup for `restart_from`, and what a plain `restart` loads."""
        self.command("SAVE")
        return self._dump.read_bytes()

    def restart_from(self, snapshot: bytes) -> None:
        """Crash it and start it again on an earlier snapshot, of this or of another server."""
        self._restart_on(snapshot)

    def _restart_on(self, snapshot: bytes | None) -> None:
        self.kill()
        shutil.rmtree(self._data)
        self._data.mkdir()
        if snapshot is not None:
            self._dump.write_bytes(snapshot)
        self.start()

    def promote(self) -> None:
        """Make it a master, with whatever it has received so far."""
        self.command("REPLICAOF", "NO", "ONE")

    def replicate_from(self, master_port: int) -> None:
        """Make it a replica of the master behind that port: a server's own, or a proxy's.

        To hold a replica back, put a proxy with a delay before its master. Pausing it does not
        do: once resumed, it may read what has piled up in its socket before it obeys anybody.
        """
        self.command("REPLICAOF", HOST, master_port)

    def wait_for_sync(
        self, replica: "RedisServer", *, timeout_seconds: float = SYNC_TIMEOUT_SECONDS
    ) -> None:
        """Wait until `replica` has everything that was written to this master.

        Raises:
            TimeoutError: it did not catch up in time.
        """
        wait_until(
            lambda: self._is_synced(replica),
            timeout_seconds=timeout_seconds,
            what=f"the replica on port {replica.port} catches up with port {self.port}",
        )

    def _is_synced(self, replica: "RedisServer") -> bool:
        ours, theirs = self.info(), replica.info()
        return (
            theirs.get("master_link_status") == "up"
            and theirs["master_replid"] == ours["master_replid"]
            and int(theirs["slave_repl_offset"]) >= int(ours["master_repl_offset"])
        )
