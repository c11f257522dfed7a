"""What the machine must give: addresses to listen on, and files to open."""

import errno
import os
import resource
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, final

import attrs
import trio

from idalloc_tcp.address import Address, TcpAddress, UnixAddress
from idalloc_tcp.assembly import SPARE_FILES
from idalloc_tcp.doctor.finding import Outcome, fail, ok, warn
from idalloc_tcp.protocol import Hello, encode

#: For who listens there to say who it is.
ANSWER_SECONDS: Final = 1.0
#: What a program that is not ours may say before it is given up.
ANSWER_BYTES_MAX: Final = 4_096


@final
@attrs.frozen
class Greeting:
    """How to tell who listens on an address of a server's: what to say, and what ours answers."""

    request: bytes
    answer: bytes


IDS: Final = Greeting(encode(Hello()), b"OK idalloc/")
ADMIN: Final = Greeting(b"GET /healthz HTTP/1.0\r\n\r\n", b"alive\n")


async def open_files(max_connections: int) -> Outcome:
    """May a process open a file for each connection?"""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + SPARE_FILES
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        return ok(f"{max_connections} connections fit the limit")
    return warn(
        f"the limit of {hard} allows {max(1, hard - SPARE_FILES)} connections, not the "
        f"{max_connections} of max_connections: raise it to {wanted} (systemd: LimitNOFILE, "
        "else ulimit -Hn), or lower max_connections"
    )


async def listen(address: Address, greeting: Greeting = IDS) -> Outcome:
    """Can a server listen there?"""
    try:
        match address:
            case TcpAddress(host, port):
                is_free = await _is_free(host, port)
            case UnixAddress(path):
                is_free = _is_free_path(Path(path))
    except UnicodeError:  # From the look-up: a label that is empty or too long.
        return fail(f"{address}: not a host name")
    except OSError as error:
        return fail(f"{address}: {error.strerror or error}: choose another address")
    if is_free:
        return ok(f"{address} is free")
    if await _is_ours(address, greeting):
        return ok(f"{address}: an idalloc-tcp runs there already; stop it before the next starts")
    return fail(f"{address} is in use by another program: stop it, or choose another address")


async def _is_free(host: str, port: int) -> bool:
    """Can it be bound? It is let go at once, and nobody could connect meanwhile.

    Raises:
        OSError: it cannot be had at all.
    """
    for family, kind, number, _, name in await trio.socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        with socket.socket(family, kind, number) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind(name)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return False
    return True


def _is_free_path(path: Path) -> bool:
    """Could a socket be made there? One that nobody listens on is no obstacle.

    Raises:
        OSError: it cannot be had at all.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, f"{path.parent} is not writable, or missing") from None
        return True
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except BlockingIOError:
            pass  # Somebody listens, with a full queue.
    return False


async def _is_ours(address: Address, greeting: Greeting) -> bool:
    """Does who listens there answer as a server of ours does?"""
    heard = b""
    with suppress(OSError, trio.BrokenResourceError), trio.move_on_after(ANSWER_SECONDS):
        async with await _connect(address) as stream:
            await stream.send_all(greeting.request)
            while greeting.answer not in heard and len(heard) < ANSWER_BYTES_MAX:
                data = await stream.receive_some(ANSWER_BYTES_MAX)
                if not data:
                    break
                heard += data
    return greeting.answer in heard


async def _connect(address: Address) -> trio.SocketStream:
    match address:
        case TcpAddress(host, port):
            return await trio.open_tcp_stream(host, port)
        case UnixAddress(path):
            return await trio.open_unix_socket(path)
