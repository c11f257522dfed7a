"""Listening sockets from addresses."""

import errno
import os
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import trio

from idalloc_tcp.address import Address, TcpAddress, UnixAddress
from idalloc_tcp.errors import StartRefused

#: Connections that may wait to be accepted; the kernel may allow fewer.
BACKLOG: Final = 4096


async def open_listeners(addresses: Sequence[Address]) -> list[trio.SocketListener]:
    """Listen on every address; a host name with several addresses gets a socket for each.

    Raises:
        StartRefused: one of them cannot be had; none is left open.
    """
    listeners: list[trio.SocketListener] = []
    try:
        for address in addresses:
            listeners += await _open(address)
    except BaseException:
        remove_unix_sockets(listeners)
        for listener in listeners:
            listener.socket.close()
        raise
    return listeners


async def _open(address: Address) -> Sequence[trio.SocketListener]:
    try:
        match address:
            case TcpAddress(host, port):
                return await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
            case UnixAddress(path):
                return [await _open_unix(path)]
    except UnicodeError as error:  # From the look-up: a label that is empty or too long.
        raise StartRefused(f"cannot listen on {address}: not a host name") from error
    except OSError as error:
        raise StartRefused(f"cannot listen on {address}: {error.strerror or error}") from error


async def _open_unix(path: str) -> trio.SocketListener:
    _clear_stale(path)
    listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await listening.bind(path)
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return trio.SocketListener(listening)


def _clear_stale(path: str) -> None:
    """Remove a socket that a dead server left behind; one that answers is in use."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # Somebody listens, with a full queue.
    raise OSError(errno.EADDRINUSE, "another server listens there")


def bound_address(listener: trio.SocketListener) -> str:
    """Where a listener really listens, as a client would write it."""
    name = listener.socket.getsockname()
    if isinstance(name, tuple):
        host, port = name[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"unix:{name}"


def remove_unix_sockets(listeners: Sequence[trio.SocketListener]) -> None:
    """Take the names of Unix sockets back out of the file system, before they are closed."""
    for listener in listeners:
        if listener.socket.family == socket.AF_UNIX:
            with suppress(OSError):  # It is gone already, or must stay: no reason to fail.
                os.unlink(listener.socket.getsockname())
