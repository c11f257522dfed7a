"""Fixtures that start real servers on this machine and end them for certain."""

import itertools
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from tests.real.mariadb_server import MariaDbDatabase, MariaDbServer
from tests.real.process import MissingServer, find_program
from tests.real.proxy import FaultProxy, open_fault_proxy
from tests.real.redis_server import RedisServer

_database_numbers = itertools.count(1)


@contextmanager
def _installed() -> Iterator[None]:
    """A missing server fails in CI, where no test may vanish unseen, and skips elsewhere."""
    try:
        yield
    except MissingServer as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A Redis of the test's own, to do anything to."""
    with _installed(), RedisServer() as server:
        yield server


@pytest.fixture
def mariadb_server() -> Iterator[MariaDbServer]:
    """A MariaDB of the test's own, to do anything to. Its start takes 0.3 s."""
    with _installed(), MariaDbServer() as server:
        yield server


@pytest.fixture(scope="session")
def shared_mariadb_server() -> Iterator[MariaDbServer]:
    """The MariaDB behind `mariadb_database`: neither kill nor pause it."""
    with _installed(), MariaDbServer() as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server_with_grants() -> Iterator[MariaDbServer]:
    """A MariaDB that checks privileges, for all tests: neither kill nor pause it."""
    with _installed(), MariaDbServer(grants=True) as server:
        yield server


@pytest.fixture
def mariadb_database(shared_mariadb_server: MariaDbServer) -> Iterator[MariaDbDatabase]:
    """An empty database of the test's own, on a server that all tests share."""
    database = shared_mariadb_server.create_database(f"test_{next(_database_numbers)}")
    yield database
    shared_mariadb_server.query(f"DROP DATABASE {database.name}")


@pytest.fixture(scope="session")
def promtool() -> str:
    """The program that judges what is written for Prometheus."""
    with _installed():
        return find_program("promtool", debian_package="prometheus")


@pytest.fixture(scope="session")
def chromium() -> str:
    """A browser."""
    with _installed():
        return find_program("chromium", debian_package="chromium")


@pytest.fixture
async def fault_proxy() -> AsyncIterator[FaultProxy]:
    """A proxy in this test's loop; point its `target_port` at a server."""
    async with open_fault_proxy() as proxy:
        yield proxy
