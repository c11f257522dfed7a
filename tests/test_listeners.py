"""Listening sockets: where they are opened, and why they are refused."""

import os
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
import trio

from idalloc_tcp.address import Address, TcpAddress, UnixAddress, parse_address
from idalloc_tcp.errors import StartRefused
from idalloc_tcp.listeners import (
    Listener,
    close_listeners,
    open_listeners,
    open_shared_listeners,
)

#: Set aside for documentation: no machine has it.
NOT_LOCAL: Final = "192.0.2.1"
ANY_PORT: Final = TcpAddress("127.0.0.1", 0)


async def refusal(*addresses: Address) -> str:
    """The text with which listening on these is refused."""
    with trio.fail_after(5), pytest.raises(StartRefused) as refused:
        await open_listeners(addresses)
    return str(refused.value)


def close(listeners: Iterable[Listener]) -> None:
    """Close them, and leave the names of Unix sockets behind, as a crash does."""
    for listener in listeners:
        listener.socket.close()


@contextmanager
def listening_on(path: Path, backlog: int = 1) -> Iterator[socket.socket]:
    """Another server's live Unix socket."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(os.fspath(path))
        other.listen(backlog)
        yield other


async def test_port_0_is_reported_as_the_port_that_it_became(tmp_path: Path) -> None:
    """What a listener is said to listen on is where a client reaches it."""
    wanted: list[Address] = [ANY_PORT, ANY_PORT, UnixAddress(str(tmp_path / "a.sock"))]
    listeners = await open_listeners(wanted)
    bound = [parse_address(listener.address) for listener in listeners]
    assert bound[2] == wanted[2]
    assert len(set(bound)) == 3
    for address in bound[:2]:
        assert isinstance(address, TcpAddress)
        assert address.port > 0
        await (await trio.open_tcp_stream(address.host, address.port)).aclose()
    close(listeners)


async def test_a_name_with_several_addresses_listens_on_each() -> None:
    """`localhost` is served on every address that it has."""
    listeners = await open_listeners([TcpAddress("localhost", 0)])
    resolved = socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    assert len(listeners) == len(resolved)
    close(listeners)


async def test_an_ipv6_address_is_reported_in_brackets() -> None:
    """An IPv6 listener's address can be read back as an address."""
    try:
        listeners = await open_listeners([TcpAddress("::1", 0)])
    except StartRefused:
        pytest.skip("this machine has no ::1")
    address = parse_address(listeners[0].address)
    assert isinstance(address, TcpAddress)
    assert address.host == "::1"
    close(listeners)


async def test_a_taken_port_is_refused() -> None:
    """Two servers cannot have one port, and the second is told which."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        text = await refusal(TcpAddress("127.0.0.1", port))
    assert text == f"cannot listen on 127.0.0.1:{port}: Address already in use"


async def test_an_address_of_another_machine_is_refused() -> None:
    """Only local addresses can be listened on."""
    text = await refusal(TcpAddress(NOT_LOCAL, 80))
    assert text == "cannot listen on 192.0.2.1:80: Cannot assign requested address"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may have any port")
async def test_a_privileged_port_is_refused() -> None:
    """A low port that this user may not have is refused in plain words."""
    text = await refusal(TcpAddress("127.0.0.1", 1))
    assert text == "cannot listen on 127.0.0.1:1: Permission denied"


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example"])
async def test_what_cannot_be_a_host_name_is_refused(host: str) -> None:
    """A host with an empty or over-long label gets the same one-line refusal as any other."""
    assert await refusal(TcpAddress(host, 1)) == f"cannot listen on {host}:1: not a host name"


async def test_an_unknown_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that the look-up does not find is refused with the look-up's own words."""

    async def find_nothing(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", find_nothing)
    text = await refusal(TcpAddress("nobody.invalid", 1))
    assert text == "cannot listen on nobody.invalid:1: Name or service not known"


async def test_a_file_that_is_not_a_socket_is_refused_and_kept(tmp_path: Path) -> None:
    """A mistaken path never costs anybody a file."""
    path = tmp_path / "precious"
    path.write_text("data")
    text = await refusal(UnixAddress(str(path)))
    assert text == f"cannot listen on unix:{path}: exists and is not a socket"
    assert path.read_text() == "data"


async def test_a_live_unix_socket_is_refused_and_kept(tmp_path: Path) -> None:
    """Another server's socket is not taken from it."""
    path = tmp_path / "ids.sock"
    with listening_on(path) as other:
        text = await refusal(UnixAddress(str(path)))
        assert text == f"cannot listen on unix:{path}: another server listens there"
        other.accept()[0].close()  # What was refused had knocked.
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(os.fspath(path))


async def test_a_live_unix_socket_that_is_too_busy_to_accept_is_refused(tmp_path: Path) -> None:
    """A full queue of connections is a sign of life, and is not waited for."""
    path = tmp_path / "ids.sock"
    with listening_on(path, backlog=0), socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        text = await refusal(UnixAddress(str(path)))
    assert text == f"cannot listen on unix:{path}: another server listens there"


async def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    """Directories are not made."""
    path = tmp_path / "nowhere" / "ids.sock"
    text = await refusal(UnixAddress(str(path)))
    assert text == f"cannot listen on unix:{path}: No such file or directory"


async def test_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    """What a dead server left behind does not keep the next one from starting."""
    address = UnixAddress(str(tmp_path / "ids.sock"))
    close(await open_listeners([address]))
    assert stat.S_ISSOCK(os.lstat(address.path).st_mode)
    listeners = await open_listeners([address])
    await (await trio.open_unix_socket(address.path)).aclose()
    close(listeners)


async def test_nothing_is_left_open_after_a_refusal(tmp_path: Path) -> None:
    """If one address cannot be had, the others are closed again, and no socket file is left."""
    before = set(os.listdir("/proc/self/fd"))
    path = tmp_path / "ids.sock"
    await refusal(ANY_PORT, UnixAddress(str(path)), TcpAddress(NOT_LOCAL, 80))
    assert not path.exists()
    assert set(os.listdir("/proc/self/fd")) <= before


async def test_nothing_is_left_open_after_a_cancellation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that is given up half-way closes what it has opened."""

    async def hang(*_: object, **__: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(trio.socket, "getaddrinfo", hang)
    before = set(os.listdir("/proc/self/fd"))
    path = tmp_path / "ids.sock"
    with trio.move_on_after(0.02) as scope:
        await open_listeners([UnixAddress(str(path)), TcpAddress("slow.example", 0)])
    assert scope.cancelled_caught
    assert not path.exists()
    assert set(os.listdir("/proc/self/fd")) <= before


async def test_removing_the_names_of_unix_sockets_never_fails(tmp_path: Path) -> None:
    """Each goes if it can; one that somebody removed before is no reason to fail a stop."""
    addresses = [UnixAddress(str(tmp_path / name)) for name in ("a.sock", "b.sock")]
    listeners = await open_listeners([*addresses, ANY_PORT])
    os.unlink(addresses[0].path)
    close_listeners(listeners)
    assert os.listdir(tmp_path) == []


async def test_shares_of_an_address_are_the_same_address(tmp_path: Path) -> None:
    """Each process gets a socket on every port, port 0 included, and all get one Unix socket."""
    path = tmp_path / "ids.sock"
    shares = await open_shared_listeners([ANY_PORT, UnixAddress(str(path))], 3)
    ports, names = zip(*shares, strict=True)
    assert len({listener.address for listener in ports}) == 1
    assert len({listener.socket.fileno() for listener in ports}) == 3
    assert set(names) == {names[0]}
    close_listeners({listener for share in shares for listener in share})
    assert not path.exists()


async def test_a_shared_port_is_shared_with_no_other_server() -> None:
    """Whether a server shares its port among its own processes or not, a second one is refused."""
    shared = await open_shared_listeners([ANY_PORT], 2)
    alone = await open_listeners([ANY_PORT])
    for taken in (shared[0][0], alone[0]):
        text = f"cannot listen on {taken.address}: Address already in use"
        address = parse_address(taken.address)
        assert await refusal(address) == text
        with pytest.raises(StartRefused, match=text):
            await open_shared_listeners([address], 2)
    close([*shared[0], *shared[1], *alone])


async def test_connections_are_dealt_out_to_all_shares() -> None:
    """Many clients of a shared port do not all end in one queue."""
    shares = await open_shared_listeners([ANY_PORT], 2)
    host, port = shares[0][0].socket.getsockname()
    clients = [socket.create_connection((host, port), timeout=5) for _ in range(64)]
    accepted: list[list[socket.socket]] = [[], []]
    for share, heap in zip(shares, accepted, strict=True):
        assert share[0].accept_waiting(heap.append)
    assert sum(map(len, accepted)) == len(clients)
    assert all(accepted)
    for sock in [*clients, *accepted[0], *accepted[1]]:
        sock.close()
    close([*shares[0], *shares[1]])
