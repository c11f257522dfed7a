"""What may be written as an address, and what it stands for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idalloc_tcp.address import (
    UNIX_PATH_BYTES_MAX,
    Address,
    TcpAddress,
    UnixAddress,
    parse_address,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8642", TcpAddress("127.0.0.1", 8642)),
        ("0.0.0.0:0", TcpAddress("0.0.0.0", 0)),
        ("localhost:65535", TcpAddress("localhost", 65535)),
        ("ids_1.example.com:80", TcpAddress("ids_1.example.com", 80)),
        ("[::1]:8642", TcpAddress("::1", 8642)),
        ("[::ffff:10.0.0.1]:1", TcpAddress("::ffff:10.0.0.1", 1)),
        ("[fe80::1%eth0]:1", TcpAddress("fe80::1%eth0", 1)),
        ("unix:/run/ids.sock", UnixAddress("/run/ids.sock")),
        ("unix:ids:8642", UnixAddress("ids:8642")),
        ("unix:8642", UnixAddress("8642")),
    ],
)
def test_the_three_forms(text: str, address: Address) -> None:
    """Each form gives its address, and the address is written in the same way again."""
    assert parse_address(text) == address
    assert str(address) == text


def test_zeros_before_a_port_are_dropped() -> None:
    """An address has one spelling, whatever the port was written like."""
    assert str(parse_address("localhost:00080")) == "localhost:80"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "none of HOST:PORT"),
        ("localhost", "none of HOST:PORT"),
        ("localhost:", "none of HOST:PORT"),
        ("localhost:http", "none of HOST:PORT"),
        ("localhost:-1", "none of HOST:PORT"),
        ("localhost:٨", "none of HOST:PORT"),
        ("localhost:80\n", "none of HOST:PORT"),
        (":8642", "none of HOST:PORT"),
        ("[]:8642", "none of HOST:PORT"),
        ("[::1]", "none of HOST:PORT"),
        ("[localhost]:80", "none of HOST:PORT"),
        ("a host:80", "none of HOST:PORT"),
        ("localhost:65536", "at most 65535"),
        ("::1:8642", "[::1]:8642"),
        ("::1", "[::1]:8642"),
        ("[:::1]:80", "not an IPv6 address"),
        ("[1.2.3.4]:80", "not an IPv6 address"),
        ("1.2.3:80", "not an IPv4 address"),
        ("1.2.3.256:80", "not an IPv4 address"),
        ("unix:", "1 to 107 bytes"),
        ("unix:/a\0b", "1 to 107 bytes"),
        ("unix:/\udcff", "UTF-8"),
        ("unix:" + "é" * 54, "1 to 107 bytes"),
    ],
)
def test_what_is_no_address(text: str, reason: str) -> None:
    """Anything else is refused, with what is wrong about it."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is looked at below
        parse_address(text)
    assert reason in str(caught.value)


def test_the_longest_path_of_a_socket_is_taken() -> None:
    """The limit is the kernel's: what it can bind is allowed to the last byte."""
    path = "/" + "x" * (UNIX_PATH_BYTES_MAX - 1)
    assert parse_address(f"unix:{path}") == UnixAddress(path)


@given(st.text() | st.from_regex(r"[\[\]:.0-9a-z%]{0,20}:[0-9]{1,6}", fullmatch=True))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    """Parsing gives an address that is written and parsed alike, or ValueError; nothing else."""
    try:
        address = parse_address(text)
    except ValueError as error:
        reason = str(error)
        assert reason.isprintable()
    else:
        assert parse_address(str(address)) == address
