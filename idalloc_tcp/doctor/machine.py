"""What the machine must give: addresses to listen on, and files to open."""

import errno
import os
import resource
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from idalloc_tcp.address import Address, TcpAddress, UnixAddress
from idalloc_tcp.composition import SPARE_FILES
from idalloc_tcp.doctor.finding import Outcome, fail, ok, warn
from idalloc_tcp.protocol import LINE_BYTES_MAX, Hello, encode

#: For who listens there to say who it is.
ANSWER_SECONDS: Final = 1.0
_OURS: Final = b"OK idalloc/"


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


async def listen(address: Address) -> Outcome:
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
    said = await _greet(address)
    if said.startswith(_OURS):
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


async def _greet(address: Address) -> bytes:
    """What who listens there says to a HELLO; nothing if it says nothing."""
    with suppress(OSError, trio.BrokenResourceError):
        with trio.move_on_after(ANSWER_SECONDS):
            async with await _connect(address) as stream:
                await stream.send_all(encode(Hello()))
                return bytes(await stream.receive_some(LINE_BYTES_MAX))
    return b""


async def _connect(address: Address) -> trio.SocketStream:
    match address:
        case TcpAddress(host, port):
            return await trio.open_tcp_stream(host, port)
        case UnixAddress(path):
            return await trio.open_unix_socket(path)
