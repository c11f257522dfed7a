"""Addresses as people write them: HOST:PORT, [IPv6]:PORT, unix:PATH."""

import re
import socket
from typing import Final, TypeAlias, final

import attrs

PORT_MAX: Final = 65_535

#: What a socket's name in the file system may hold; the kernel's 108 bytes end with a NUL.
UNIX_PATH_BYTES_MAX: Final = 107

_TCP: Final = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\]|(?P<host>[A-Za-z0-9_.-]{1,253}))"
    r":(?P<port>[0-9]{1,5})"
)
_IPV4_LIKE: Final = re.compile(r"[0-9.]+")


@final
@attrs.frozen
class TcpAddress:
    """A host (a name, an IPv4 address, an IPv6 address without its brackets) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@final
@attrs.frozen
class UnixAddress:
    """The path of a Unix socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address: TypeAlias = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """The address that `text` names. Port 0 means any free port, which only a listener can use.

    Raises:
        ValueError: with the reason, in one line that does not repeat `text`.
    """
    if text.startswith("unix:"):
        return _parse_unix(text.removeprefix("unix:"))
    parts = _TCP.fullmatch(text)
    if parts is None:
        if text.count(":") > 1 and "[" not in text:
            raise ValueError("an IPv6 address stands in brackets, as in [::1]:8642")
        raise ValueError("it is none of HOST:PORT, [IPv6]:PORT and unix:PATH")
    host, port = parts["ipv6"] or parts["host"], int(parts["port"])
    if port > PORT_MAX:
        raise ValueError(f"a port is at most {PORT_MAX}")
    if parts["ipv6"]:
        _check_ip(socket.AF_INET6, host.partition("%")[0], "IPv6")
    elif _IPV4_LIKE.fullmatch(host):
        _check_ip(socket.AF_INET, host, "IPv4")
    return TcpAddress(host, port)


def _check_ip(family: socket.AddressFamily, host: str, kind: str) -> None:
    try:
        socket.inet_pton(family, host)
    except OSError:
        raise ValueError(f"its host is not an {kind} address") from None


def _parse_unix(path: str) -> UnixAddress:
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise ValueError("a socket's path is UTF-8") from None
    if not 1 <= size <= UNIX_PATH_BYTES_MAX or "\0" in path:
        raise ValueError(f"a socket's path is 1 to {UNIX_PATH_BYTES_MAX} bytes, none of them NUL")
    return UnixAddress(path)
