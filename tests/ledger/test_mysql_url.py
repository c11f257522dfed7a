"""The address of a database: what it may say, and how it says what is wrong."""

import ssl

import attrs
import pytest

from idalloc_tcp.ledger.mysql_url import MysqlUrl


def test_whole_url_is_read() -> None:
    """Every part has its place."""
    assert MysqlUrl.parse("mysql://ids:secret@db.example:3307/numbers?ssl=verify") == MysqlUrl(
        "db.example", 3307, "ids", "secret", "numbers", "verify"
    )


def test_only_host_and_database_are_needed() -> None:
    """The rest has the usual defaults."""
    url = MysqlUrl.parse("mysql://localhost/ids")
    assert url == MysqlUrl("localhost", 3306, "root", "", "ids", "off")


def test_escapes_are_undone_once() -> None:
    """User, password and database may hold any character, percent-encoded."""
    url = MysqlUrl.parse("mysql://a%40b:p%2525%3A%2F%23%C3%B6+@[::1]:3306/id%20s")
    assert (url.user, url.password, url.database) == ("a@b", "p%25:/#ö+", "id s")
    assert url.host == "::1"


def test_password_is_not_shown() -> None:
    """Whoever logs an address does not log the password."""
    assert "secret" not in repr(MysqlUrl.parse("mysql://ids:secret@localhost/ids"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is not mysql://"),
        ("localhost/ids", "it is not mysql://"),
        ("postgres://localhost/ids", "it is not mysql://"),
        ("mysql:///ids", "it is not mysql://"),
        ("mysql://u:sec/ret@localhost/ids", "it is not mysql://"),
        ("mysql://u:secret\uff0f@localhost/ids", "it is not mysql://"),
        ("mysql://u:secret@localhost:99999/ids", "it is not mysql://"),
        ("mysql://u:secret@localhost:port/ids", "it is not mysql://"),
        ("mysql://u:secret@[::1/ids", "it is not mysql://"),
        ("mysql://u:secret@localhost", "it names no database"),
        ("mysql://u:secret@localhost/", "it names no database"),
        ("mysql://u:secret@localhost/ids/more", "it names no database"),
        ("mysql://u:secret@localhost/ids?ssl=maybe", "its ssl= is none of off, on, verify"),
        ("mysql://u:secret@localhost/ids?ssl=", "its ssl= is none of off, on, verify"),
        ("mysql://u:secret@localhost/ids?charset=latin1", "its option charset is unknown"),
    ],
)
def test_wrong_url_is_refused(text: str, reason: str) -> None:
    """What is wrong is said in one line, which does not quote the password."""
    with pytest.raises(ValueError, match=f"^{reason}") as caught:
        MysqlUrl.parse(text)
    assert "sec" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "verify_mode", "check_hostname"),
    [("on", ssl.CERT_NONE, False), ("verify", ssl.CERT_REQUIRED, True)],
)
def test_encryption(mode: str, verify_mode: ssl.VerifyMode, check_hostname: bool) -> None:
    """`on` encrypts to whoever answers, `verify` to who it should be."""
    context = MysqlUrl.parse(f"mysql://localhost/ids?ssl={mode}").arguments()["ssl"]
    assert (context.verify_mode, context.check_hostname) == (verify_mode, check_hostname)


def test_no_encryption() -> None:
    """`off` and nothing mean the same."""
    url = MysqlUrl.parse("mysql://localhost/ids")
    assert url == MysqlUrl.parse("mysql://localhost/ids?ssl=off")
    assert url.arguments()["ssl"] is None


def test_address_is_a_value() -> None:
    """Two equal addresses are one, and none is changed."""
    url = MysqlUrl.parse("mysql://localhost/ids")
    assert hash(url) == hash(attrs.evolve(url))
