"""Real databases for the tests of ledgers."""

from idalloc_tcp.ledger.mysql_url import MysqlUrl
from tests.real.conftest import (
    fault_proxy,
    mariadb_database,
    mariadb_server,
    shared_mariadb_server,
)
from tests.real.mariadb_server import MariaDbDatabase
from tests.real.process import HOST

__all__ = ["fault_proxy", "mariadb_database", "mariadb_server", "shared_mariadb_server"]


def url_of(database: MariaDbDatabase) -> MysqlUrl:
    """The way in; the server takes any user and password."""
    return MysqlUrl(HOST, database.port, "root", "", database.name)
