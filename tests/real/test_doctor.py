"""What `idalloc-tcp doctor` finds in stores, good ones and bad ones."""

import time
from typing import Any, Final

import pytest

from idalloc_tcp.bridge import asyncio_loop
from idalloc_tcp.doctor.counter import SCAN_KEYS, examine_counter
from idalloc_tcp.doctor.database import examine_database
from idalloc_tcp.doctor.finding import CHECK_SECONDS, Finding, Verdict
from idalloc_tcp.ledger import CLOSED
from idalloc_tcp.ledger.mysql import CREATE_TABLE
from idalloc_tcp.ledger.mysql_url import MysqlUrl
from idalloc_tcp.settings import Settings
from tests.real.mariadb_server import MariaDbServer
from tests.real.redis_server import RedisServer
from tests.real.serving import run_command

DATABASE: Final = "ids"
#: As many checks as can hang before a store is given up, and the start of a process.
PATIENCE_SECONDS: Final = 2 * CHECK_SECONDS + 2.0


@pytest.fixture
def database(mariadb_server_with_grants: MariaDbServer) -> MariaDbServer:
    """One that holds the table, and a user `app` who may do with it what a server must."""
    server = mariadb_server_with_grants
    server.create_database(DATABASE)
    server.query(CREATE_TABLE, database=DATABASE)
    server.query(
        "SET GLOBAL read_only = 0, GLOBAL innodb_flush_log_at_trx_commit = 1;"
        "DROP USER IF EXISTS app@'127.0.0.1'; CREATE USER app@'127.0.0.1';"
        f"GRANT SELECT, INSERT, UPDATE ON {DATABASE}.tbl_alloc_info TO app@'127.0.0.1'"
    )
    return server


async def look_at_database(
    server: MariaDbServer, settings: Settings | None = None, user: str = "app"
) -> dict[str, Finding]:
    """What there is to say of the database, by subject."""
    findings: list[Finding] = []
    url = MysqlUrl("127.0.0.1", server.port, user, "", DATABASE)
    async with asyncio_loop():
        await examine_database(url, settings or Settings(), findings.append)
    return {finding.subject: finding for finding in findings}


async def look_at_redis(server: RedisServer, user: str = "", **settings: Any) -> dict[str, Finding]:
    """What there is to say of the Redis, by subject."""
    findings: list[Finding] = []
    url = f"redis://{user}127.0.0.1:{server.port}/0"
    async with asyncio_loop():
        await examine_counter(url, Settings(**settings), findings.append)
    return {finding.subject: finding for finding in findings}


def failures(found: dict[str, Finding]) -> set[str]:
    """The subjects of what failed."""
    return {subject for subject, finding in found.items() if finding.verdict is Verdict.FAIL}


async def test_a_database_as_it_should_be(database: MariaDbServer) -> None:
    """Every check is well, and nothing was written."""
    found = await look_at_database(database)
    assert {finding.verdict for finding in found.values()} == {Verdict.OK}
    assert list(found) == [
        *("MySQL", "MySQL writable", "MySQL durability", "MySQL create"),
        *("MySQL table", "MySQL privileges", "MySQL rows"),
    ]
    assert database.query("SELECT * FROM tbl_alloc_info", database=DATABASE) == []


@pytest.mark.parametrize("privilege", ["SELECT", "INSERT", "UPDATE"])
async def test_each_missing_privilege_is_named(database: MariaDbServer, privilege: str) -> None:
    """With the GRANT that mends it."""
    database.query(f"REVOKE {privilege} ON {DATABASE}.tbl_alloc_info FROM app@'127.0.0.1'")
    finding = (await look_at_database(database))["MySQL privileges"]
    assert finding.verdict is Verdict.FAIL
    assert f"{privilege} command denied" in finding.text
    grant = "GRANT SELECT, INSERT, UPDATE ON `ids`.tbl_alloc_info TO 'app'@'127.0.0.1'"
    assert grant in finding.text
    database.query(grant)
    assert not failures(await look_at_database(database))


async def test_create_matters_only_where_the_server_does_it(database: MariaDbServer) -> None:
    """Who may not make the table fails with `create_table`, at every start."""
    assert failures(await look_at_database(database, Settings(create_table=True))) == {
        "MySQL create"
    }
    assert not failures(await look_at_database(database, Settings(create_table=True), "root"))


async def test_a_table_that_is_missing_or_wrong(database: MariaDbServer) -> None:
    """Missing, of another shape, on an engine that forgets. The doctor makes none."""
    for change, reason in {
        "ALTER TABLE tbl_alloc_info ENGINE = MyISAM": "ENGINE = InnoDB",
        "ALTER TABLE tbl_alloc_info MODIFY last_alloc_value INT UNSIGNED NOT NULL": (
            "another shape (last_alloc_value)"
        ),
        "DROP TABLE tbl_alloc_info": "run `idalloc-tcp init-db`",
    }.items():
        database.query(change, database=DATABASE)
        found = await look_at_database(database, user="root")
        assert failures(found) == {"MySQL table"}
        assert reason in found["MySQL table"].text
    assert not failures(await look_at_database(database, Settings(create_table=True), "root"))
    assert database.query("SHOW TABLES", database=DATABASE) == []


async def test_a_database_that_may_lose_commits_or_is_shut(database: MariaDbServer) -> None:
    """A weak flush is a warning; a server that is read-only has failed."""
    database.query("SET GLOBAL innodb_flush_log_at_trx_commit = 2, GLOBAL read_only = 1")
    try:
        found = await look_at_database(database)
    finally:
        database.query("SET GLOBAL innodb_flush_log_at_trx_commit = 1, GLOBAL read_only = 0")
    assert failures(found) == {"MySQL writable"}
    assert found["MySQL durability"].verdict is Verdict.WARN
    assert "innodb_flush_log_at_trx_commit = 2" in found["MySQL durability"].text


async def test_rows_of_the_original_are_counted(database: MariaDbServer) -> None:
    """What becomes of them depends on Redis and `take_over`."""
    database.query(
        f"INSERT INTO tbl_alloc_info VALUES ('ours', 10, {CLOSED}), ('old', 7, 3), ('older', 7, 0)",
        database=DATABASE,
    )
    mysql, redis = f"mysql://127.0.0.1:{database.port}/ids", "redis://127.0.0.1:1/0"
    for settings, verdict, text in (
        (Settings(mysql=mysql), Verdict.FAIL, "ERR unavailable"),
        (Settings(mysql=mysql, redis=redis), Verdict.WARN, "beside the original"),
        (Settings(mysql=mysql, redis=redis, take_over=True), Verdict.WARN, "be sure that none"),
    ):
        finding = (await look_at_database(database, settings))["MySQL rows"]
        assert finding.verdict is verdict
        assert "2 of 3 rows" in finding.text
        assert text in finding.text


async def test_a_user_who_is_not_let_in(database: MariaDbServer) -> None:
    """The first check fails, in the server's words, and is the last."""
    found = await look_at_database(database, user="nobody")
    assert list(found) == ["MySQL"]
    assert "Access denied for user 'nobody'" in found["MySQL"].text


async def test_a_redis_as_it_should_be(redis_server: RedisServer) -> None:
    """Every check is well, and no key was made."""
    found = await look_at_redis(redis_server)
    assert {finding.verdict for finding in found.values()} == {Verdict.OK}
    assert list(found) == ["Redis", "Redis role", "Redis scripts", "Redis memory", "Redis hashes"]
    assert redis_server.command("DBSIZE") == 0


@pytest.mark.parametrize(
    ("rules", "subject", "text"),
    [
        ("~idalloc:* +@scripting +@hash +@connection", "Redis", "+info"),
        ("~idalloc:* +@all -@scripting", "Redis scripts", "+@scripting"),
        ("~idalloc:* +@all -hincrby", "Redis scripts", "(HINCRBY: "),
        ("~idalloc:* +@all -hset", "Redis scripts", "+@hash"),
        ("~other:* +@all", "Redis scripts", "~idalloc:*"),
    ],
)
async def test_what_a_user_of_redis_may_not(
    redis_server: RedisServer, rules: str, subject: str, text: str
) -> None:
    """The missing permission is named."""
    redis_server.command("ACL", "SETUSER", "app", "on", "nopass", *rules.split())
    found = await look_at_redis(redis_server, "app:x@")
    assert subject in failures(found)
    assert text in found[subject].text


async def test_a_user_with_just_what_the_readme_says(redis_server: RedisServer) -> None:
    """It is enough; SCAN is not needed."""
    rules = ("~idalloc:*", "+@scripting", "+@hash", "+@connection", "+info")
    redis_server.command("ACL", "SETUSER", "app", "on", "nopass", *rules)
    found = await look_at_redis(redis_server, "app:x@")
    assert not failures(found)
    assert "may not SCAN" in found["Redis hashes"].text


async def test_a_replica_is_not_a_counter(redis_server: RedisServer) -> None:
    """Its master is named; a script could not write there either."""
    redis_server.replicate_from(1)
    found = await look_at_redis(redis_server)
    assert failures(found) == {"Redis role", "Redis scripts"}
    assert "127.0.0.1:1" in found["Redis role"].text


async def test_a_redis_that_evicts_or_is_full(redis_server: RedisServer) -> None:
    """Eviction is a warning; without room nothing can be cut."""
    redis_server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    assert (await look_at_redis(redis_server))["Redis memory"].verdict is Verdict.OK
    redis_server.command("CONFIG", "SET", "maxmemory", "100mb")
    assert (await look_at_redis(redis_server))["Redis memory"].verdict is Verdict.WARN
    redis_server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    redis_server.command("CONFIG", "SET", "maxmemory", "1")
    found = await look_at_redis(redis_server)
    assert failures(found) == {"Redis scripts"}
    assert "OOM" in found["Redis scripts"].text


async def test_hashes_of_the_original_are_named(redis_server: RedisServer) -> None:
    """Those without a fence, below the prefix alone, whatever characters that has."""
    prefix = "a[b]*:"
    for service in ("old", "older"):
        redis_server.command("HSET", f"{prefix}alloc_info_{service}", "lastAllocValue", 7)
    redis_server.command("HSET", f"{prefix}alloc_info_ours", "fence", "x")
    redis_server.command("HSET", "ab:alloc_info_other", "lastAllocValue", 7)
    redis_server.command("SET", f"{prefix}alloc_info_text", "7")
    finding = (await look_at_redis(redis_server, redis_key_prefix=prefix))["Redis hashes"]
    assert finding.verdict is Verdict.WARN
    assert finding.text.startswith("2 of the original idalloc's (old, older): ")


async def test_the_search_for_hashes_is_bounded(redis_server: RedisServer) -> None:
    """It says that it did not see all."""
    script = (
        "for i = 1, ARGV[1] do redis.call('HSET', 'idalloc:alloc_info_' .. i, 'fence', 'x') end"
    )
    redis_server.command("EVAL", script, 0, 5 * SCAN_KEYS)
    finding = (await look_at_redis(redis_server))["Redis hashes"]
    assert finding.verdict is Verdict.OK
    assert "more keys than were looked through" in finding.text


def test_stores_that_hang_are_given_up(
    mariadb_server: MariaDbServer, redis_server: RedisServer
) -> None:
    """The command ends in time, with 1, and says which did not answer, but no password."""
    mariadb_server.pause()
    redis_server.pause()
    began_at = time.monotonic()
    done = run_command(
        *("doctor", "--listen", "127.0.0.1:0"),
        *("--mysql", f"mysql://u:s3cret@127.0.0.1:{mariadb_server.port}/ids"),
        *("--redis", f"redis://:s3cret@127.0.0.1:{redis_server.port}/0"),
    )
    assert time.monotonic() - began_at < PATIENCE_SECONDS
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("FAIL")] == ["MySQL", "Redis"]
    assert "s3cret" not in done.stdout + done.stderr
