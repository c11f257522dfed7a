"""The way into a database: addresses, accounts, privileges and encryption."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from idalloc_tcp.bridge import UNIT_SECONDS
from idalloc_tcp.ledger import mysql as module
from idalloc_tcp.ledger.mysql import MysqlLedger
from idalloc_tcp.ledger.mysql_url import MysqlUrl
from idalloc_tcp.pool import Segment
from tests.ledger.conftest import url_of
from tests.ledger.test_mysql import bounded, lease, opened, problem
from tests.real import mariadb_server as mariadb_server_module
from tests.real.mariadb_server import MariaDbDatabase, MariaDbServer
from tests.real.process import HOST, find_program


async def test_wrong_host_and_port(mariadb_database: MariaDbDatabase) -> None:
    """An address where nobody listens, or that is none, is an error in one line, at once."""
    url = url_of(mariadb_database)
    with bounded(UNIT_SECONDS):
        assert "Can't connect to MySQL server on '127.0.0.1'" in await problem(
            attrs.evolve(url, port=1)
        )
        for host in ("nowhere.invalid", "x" * 64 + ".invalid", "a..b"):
            assert (await problem(attrs.evolve(url, host=host))).startswith("MySQL: ")


@pytest.fixture(scope="module")
def guarded_server() -> Iterator[MariaDbServer]:
    """A MariaDB that checks passwords and privileges, with a database and two users."""
    with MariaDbServer(grants=True) as server:
        server.create_database("guarded")
        server.query(
            "CREATE USER ids IDENTIFIED BY 'gehe1m\\\\ ''ö€'; GRANT ALL ON guarded.* TO ids;"
            "CREATE USER leaser IDENTIFIED BY 'pass';"
            "GRANT SELECT, INSERT, UPDATE ON guarded.* TO leaser"
        )
        yield server


def guarded_url(server: MariaDbServer, user: str, password: str, database: str) -> MysqlUrl:
    """A way in, or not."""
    return MysqlUrl(HOST, server.port, user, password, database)


async def test_password_may_have_any_characters(guarded_server: MariaDbServer) -> None:
    """A password is what the server was told, whatever alphabet it is in."""
    url = guarded_url(guarded_server, "ids", "gehe1m\\ 'ö€", "guarded")
    async with opened(url) as ledger:
        assert (await lease(ledger, 10)).size == 10


async def test_wrong_account_and_database(guarded_server: MariaDbServer) -> None:
    """Who is not let in is told so, by the server's own words and without the password."""
    for user, password in (("ids", "secret"), ("nobody", "secret"), ("ids", "secrét€")):
        text = await problem(guarded_url(guarded_server, user, password, "guarded"))
        assert text.startswith(f"MySQL: Access denied for user '{user}'@")
        assert "secr" not in text
    text = await problem(guarded_url(guarded_server, "root", "", "elsewhere"))
    assert text == "MySQL: Unknown database 'elsewhere'"


async def test_user_who_may_not_create(guarded_server: MariaDbServer) -> None:
    """Without the privilege the table is not made, and the error says what was denied."""
    guarded_server.query("DROP TABLE IF EXISTS guarded.tbl_alloc_info")
    url = guarded_url(guarded_server, "leaser", "pass", "guarded")
    assert "CREATE command denied to user 'leaser'@" in await problem(url, create_table=True)
    guarded_server.query(module.CREATE_TABLE, database="guarded")
    async with opened(url, create_table=False) as ledger:
        assert await lease(ledger, 10) == Segment(1, 11)


@pytest.mark.parametrize(
    "junk",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x05\x00\x00\x00\x0aabcd",
        b"\x01\x00\x00\x00\x0a",
        b"\x00\x00\x00\x00",
        b"\x17\x00\x00\x01\xff\x10\x04Too many connections",
        b"\x17\x00\x00\x00\xff\x10\x04Too many connections",
        b"\x0a" * 200,
        b"\x50\x00\x00\x00\x0a" + b"abc\x00" * 40,
        b"",
    ],
)
async def test_wrong_server_is_unavailable(junk: bytes) -> None:
    """Whatever answers in the place of a database, the error is ours and comes in time."""

    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(junk)
        await trio.sleep(0.01)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host=HOST)
        nursery.start_soon(trio.serve_listeners, answer, [listener])
        url = MysqlUrl(HOST, listener.socket.getsockname()[1], "root", "", "ids")
        with bounded(UNIT_SECONDS):
            assert (await problem(url)).startswith("MySQL: ")
        nursery.cancel_scope.cancel()


# Encryption


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-made certificate and its key, `cert.pem` and `key.pem`, in a directory."""
    directory = tmp_path_factory.mktemp("tls")
    openssl = find_program("openssl", debian_package="openssl")
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    key = ("-newkey", "rsa:2048", "-nodes", "-keyout", str(directory / "key.pem"))
    subprocess.run(
        [openssl, "req", "-x509", *key, "-out", str(directory / "cert.pem"), *subject],
        check=True,
        capture_output=True,
        timeout=30,
    )
    return directory


@pytest.fixture(scope="module")
def encrypted_server(certificate: Path) -> Iterator[MariaDbServer]:
    """A MariaDB with that certificate."""
    flags = (f"--ssl-cert={certificate}/cert.pem", f"--ssl-key={certificate}/key.pem")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mariadb_server_module, "_FLAGS", (*mariadb_server_module._FLAGS, *flags))
        with MariaDbServer() as server:
            server.create_database("ids")
            yield server


async def cipher(ledger: MysqlLedger) -> str:
    """What the ledger's own connection is encrypted with; empty if it is not."""

    async def ask(cursor: Any) -> str:
        await cursor.execute("SHOW STATUS LIKE 'Ssl_cipher'")
        return str((await cursor.fetchone())[1])

    return await ledger._run(ask)


@pytest.mark.parametrize("mode", ["off", "on"])
async def test_encryption_is_as_asked_for(encrypted_server: MariaDbServer, mode: str) -> None:
    """`on` encrypts to a certificate of anybody, `off` does not encrypt."""
    url = MysqlUrl(HOST, encrypted_server.port, "root", "", "ids", mode)
    async with opened(url) as ledger:
        assert (await lease(ledger, 10)).size == 10
        assert bool(await cipher(ledger)) == (mode == "on")


async def test_certificate_is_verified(
    encrypted_server: MariaDbServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify` refuses a certificate that nobody vouches for, and takes one that is trusted."""
    url = MysqlUrl(HOST, encrypted_server.port, "root", "", "ids", "verify")
    assert "certificate verify failed" in await problem(url)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    async with opened(url) as ledger:
        assert (await lease(ledger, 10)).size == 10
        assert await cipher(ledger)


async def test_encryption_is_not_given_up(mariadb_database: MariaDbDatabase) -> None:
    """A server that cannot encrypt is refused where encryption was asked for."""
    url = attrs.evolve(url_of(mariadb_database), ssl_mode="on")
    assert (await problem(url)).startswith("MySQL: ")
