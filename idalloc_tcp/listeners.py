"""Listening sockets from addresses, and accepting from them."""

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final, Self, final

import attrs
import trio

from idalloc_tcp import log
from idalloc_tcp.address import Address, TcpAddress, UnixAddress
from idalloc_tcp.errors import StartRefused

#: Connections that may wait to be accepted; the kernel may allow fewer.
BACKLOG: Final = 4096
#: Connections accepted before others have their turn: a crowd is in soon, and nobody waits for it.
ACCEPT_BATCH: Final = 64
#: No file or memory is left for another connection: that passes when some have ended.
_FULL: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
FULL_PAUSE_SECONDS: Final = 0.1
_FAMILIES: Final = frozenset({socket.AF_INET, socket.AF_INET6, socket.AF_UNIX})

#: What is done with a new connection's socket, which does not block.
Welcome = Callable[[socket.socket], None]


@final
@attrs.frozen(eq=False)
class Listener:
    """A socket that listens, and does not block."""

    socket: socket.socket
    #: Device and inode of a Unix socket's name that is ours to remove.
    _name_identity: tuple[int, int] | None = None
    #: A service manager keeps it open: who is still in its queue at a stop waits for the next
    #: server.
    is_managed: bool = False

    @classmethod
    def adopt(cls, descriptor: int, is_managed: bool) -> Self:
        """A socket that another process opened, which also looks after its name.

        Raises:
            OSError: the descriptor is not that of a socket.
        """
        listening = socket.socket(fileno=descriptor)
        listening.setblocking(False)
        return cls(listening, is_managed=is_managed)

    @property
    def address(self) -> str:
        """Where it really listens, as a client would write it."""
        name = self.socket.getsockname()
        if isinstance(name, tuple):
            host, port = name[:2]
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return f"unix:{name}"

    async def accept(self, welcome: Welcome) -> None:
        """Welcome whoever connects, until cancelled."""
        had_room = True
        while True:
            await trio.lowlevel.wait_readable(self.socket)
            has_room = self.accept_waiting(welcome)
            if had_room and not has_room:
                text = "no file or memory is left for more connections"
                log.sparingly(log.WARNING, text, listen=self.address)
            had_room = has_room
            if not has_room:
                await trio.sleep(FULL_PAUSE_SECONDS)

    def accept_waiting(self, welcome: Welcome, most: int = ACCEPT_BATCH) -> bool:
        """Welcome those who wait now. False: there is no room for more before some leave."""
        for _ in range(most):
            try:
                client, _name = self.socket.accept()
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno in _FULL:
                    return False
                continue  # That client has left already.
            client.setblocking(False)
            welcome(client)
        return True

    def twin(self) -> "Listener":
        """Another socket on the same port: the kernel deals new connections out to both.

        The first was bound as one that shares with nobody, so a port that another server has,
        even one that would share it, was refused. A Unix socket is its own twin.

        Raises:
            OSError: it cannot be had.
        """
        if self.socket.family == socket.AF_UNIX:
            return self
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening = socket.socket(self.socket.family, self.socket.type)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _set_options(listening)
            _listen(listening, self.socket.getsockname())
            return Listener(listening)
        except BaseException:
            listening.close()
            raise

    def remove_name(self) -> None:
        """Take a Unix socket's name out of the file system, unless it is somebody else's now."""
        if self._name_identity is None:
            return
        with suppress(OSError):  # It is gone already, or must stay: no reason to fail.
            path = self.socket.getsockname()
            if _identity_of(path) == self._name_identity:
                os.unlink(path)


async def open_listeners(addresses: Sequence[Address]) -> list[Listener]:
    """Listen on every address; a host name with several addresses gets a socket for each.

    Raises:
        StartRefused: one of them cannot be had; none is left open.
    """
    listeners: list[Listener] = []
    try:
        for address in addresses:
            await _open(address, listeners)
    except BaseException:
        close_listeners(listeners)
        raise
    return listeners


async def open_shared_listeners(addresses: Sequence[Address], shares: int) -> list[list[Listener]]:
    """As `open_listeners`, for several processes: for each its share of every address.

    Raises:
        StartRefused: one of the addresses cannot be had; none is left open.
    """
    first = await open_listeners(addresses)
    rest = [list[Listener]() for _ in range(shares - 1)]
    try:
        for share in rest:
            for listener in first:
                share.append(listener.twin())
    except OSError as error:
        close_listeners({listener for share in (first, *rest) for listener in share})
        raise StartRefused(f"cannot share a port: {error.strerror or error}") from error
    return [first, *rest]


def managed_listeners(descriptors: Mapping[int, str]) -> list[Listener]:
    """The sockets, with their names, that a service manager opened for this process.

    Raises:
        StartRefused: one of them is not a stream socket that listens; none is left open.
    """
    listeners: list[Listener] = []
    for descriptor, name in descriptors.items():
        try:
            os.set_inheritable(descriptor, False)
            listeners.append(Listener.adopt(descriptor, is_managed=True))
            _check_listening(listeners[-1].socket)
        except OSError as error:
            close_listeners(listeners)
            reason = error.strerror or error
            text = f"cannot listen on descriptor {descriptor} ({name}): {reason}"
            raise StartRefused(text) from error
    return listeners


def _check_listening(opened: socket.socket) -> None:
    if (
        opened.family not in _FAMILIES
        or opened.type != socket.SOCK_STREAM
        or not opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        raise OSError(errno.EINVAL, "it is not a stream socket that listens")


def close_listeners(listeners: Iterable[Listener]) -> None:
    """Listen no more, and leave no name behind."""
    for listener in listeners:
        listener.remove_name()
        listener.socket.close()


async def _open(address: Address, listeners: list[Listener]) -> None:
    try:
        match address:
            case TcpAddress(host, port):
                await _open_tcp(host, port, listeners)
            case UnixAddress(path):
                listeners.append(_open_unix(path))
    except UnicodeError as error:  # From the look-up: a label that is empty or too long.
        raise StartRefused(f"cannot listen on {address}: not a host name") from error
    except OSError as error:
        raise StartRefused(f"cannot listen on {address}: {error.strerror or error}") from error


async def _open_tcp(host: str, port: int, listeners: list[Listener]) -> None:
    resolved = await trio.socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    opened, unsupported = 0, None
    for family, kind, number, _, name in resolved:
        try:
            listening = socket.socket(family, kind, number)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:
                raise
            unsupported = error  # Its name may have an address of another family.
            continue
        listeners.append(Listener(listening))
        opened += 1
        _set_options(listening)
        _listen(listening, name)
    if unsupported is not None and not opened:
        raise unsupported


def _set_options(listening: socket.socket) -> None:
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listening.family == socket.AF_INET6:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


def _listen(listening: socket.socket, name: object) -> None:
    listening.setblocking(False)
    listening.bind(name)  # type: ignore[arg-type]  # whatever the look-up gave
    listening.listen(BACKLOG)


def _open_unix(path: str) -> Listener:
    _clear_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _listen(listening, path)
        return Listener(listening, _identity_of(path))
    except BaseException:
        listening.close()
        raise


def _identity_of(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


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
