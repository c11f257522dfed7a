"""A real MariaDB server to break, driven through its own command-line client."""

import contextlib
import getpass
import socket
import subprocess
from pathlib import Path
from typing import Final, final

import attrs

from tests.real.process import (
    HOST,
    LOG_TAIL_CHARACTERS,
    LocalServer,
    StartFailed,
    find_program,
)

QUERY_TIMEOUT_SECONDS: Final = 5.0
INSTALL_TIMEOUT_SECONDS: Final = 30.0
_GREETING_TIMEOUT_SECONDS: Final = 0.5
_PACKAGE: Final = "mariadb-server"
_FLAGS: Final = (
    f"--bind-address={HOST}",
    "--skip-log-bin",
    "--skip-name-resolve",
    "--innodb-buffer-pool-size=32M",
    "--innodb-log-file-size=8M",
    "--performance-schema=OFF",
)


class QueryFailed(Exception):
    """The server refused the SQL, or no server answered. The text is the client's."""


@final
@attrs.define(eq=False)
class MariaDbServer(LocalServer):
    """A MariaDB that keeps what it has committed over crashes and restarts.

    Args:
        grants: check users, passwords and privileges; `root` then has no password and may do
            everything. Otherwise any user with any password may.
    """

    grants: bool = False

    def _prepare(self) -> None:
        self._data.mkdir()
        if self.grants:
            self._install_grant_tables()
        else:
            # Without a first orderly run, a kill soon after the start leaves a folder that
            # does not start again.
            self._run([*self._command_line(), "--bootstrap"], sql="CREATE DATABASE bootstrapped;")

    def _install_grant_tables(self) -> None:
        program = find_program("mariadb-install-db", debian_package=_PACKAGE)
        self._run(
            [
                *(program, "--no-defaults", f"--user={getpass.getuser()}"),
                *(f"--datadir={self._data}", "--skip-test-db", *_FLAGS),
                "--auth-root-authentication-method=normal",
            ]
        )

    def _run(self, command: list[str], *, sql: str = "") -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            input=sql,
            capture_output=True,
            check=False,
            text=True,
            timeout=INSTALL_TIMEOUT_SECONDS,
        )
        if done.returncode != 0:
            said = (done.stdout + done.stderr)[-LOG_TAIL_CHARACTERS:]
            raise StartFailed(f"{command[0]} failed\n{said}")

    def _command_line(self) -> list[str]:
        program = find_program("mariadbd", debian_package=_PACKAGE)
        return [
            *(program, "--no-defaults", f"--user={getpass.getuser()}"),
            *(f"--datadir={self._data}", f"--socket={self._socket}", f"--port={self.port}"),
            *(f"--pid-file={self.folder / 'pid'}", *_FLAGS),
            *(() if self.grants else ("--skip-grant-tables",)),
        ]

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _socket(self) -> Path:
        return self.folder / "socket"

    def _answers(self) -> bool:
        """Does it greet? It listens a little before it does."""
        with (
            contextlib.suppress(OSError),
            socket.create_connection((HOST, self.port), _GREETING_TIMEOUT_SECONDS) as connection,
        ):
            return bool(connection.recv(1))
        return False

    def create_database(self, name: str) -> "MariaDbDatabase":
        """An empty database of that name, whatever there was before."""
        self.query(f"DROP DATABASE IF EXISTS {name}; CREATE DATABASE {name}")
        return MariaDbDatabase(self, name)

    def query(
        self,
        sql: str,
        *,
        database: str = "",
        user: str = "root",
        password: str = "",
        timeout_seconds: float = QUERY_TIMEOUT_SECONDS,
    ) -> list[tuple[str, ...]]:
        """Run one or more statements, past any proxy; the rows of all of them.

        Values are as the client's batch mode prints them: NULL as `NULL`, a tab as `\\t`.

        Raises:
            QueryFailed: the server refused it, or none runs.
            TimeoutError: no answer in time. Whether it was executed is not known.
        """
        program = find_program("mariadb", debian_package=_PACKAGE)
        account = ("--no-defaults", f"--user={user}", f"--password={password}")
        place = (f"--socket={self._socket}", f"--database={database}")
        form = ("--batch", "--skip-column-names", "--default-character-set=utf8mb4")
        command = [program, *account, *place, *form, f"--execute={sql}"]
        try:
            done = subprocess.run(
                command, capture_output=True, check=False, text=True, timeout=timeout_seconds
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"no answer within {timeout_seconds} s: {sql}") from error
        if done.returncode != 0:
            raise QueryFailed(done.stderr.strip())
        return [tuple(line.split("\t")) for line in done.stdout.split("\n")[:-1]]


@final
@attrs.frozen
class MariaDbDatabase:
    """One database on a server that others may be using: not to be killed or paused."""

    server: MariaDbServer
    name: str

    @property
    def port(self) -> int:
        """The server's."""
        return self.server.port

    def query(self, sql: str) -> list[tuple[str, ...]]:
        """As `MariaDbServer.query`, in this database."""
        return self.server.query(sql, database=self.name)
