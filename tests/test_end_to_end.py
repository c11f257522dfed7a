"""The server as its users meet it: a real process, real sockets, netcat and telnet."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from idalloc_tcp.signals import ECHO_SECONDS
from tests.abuse import abuse
from tests.conftest import VARIANTS
from tests.hammer import hammer
from tests.processes import ServerProcess

CONVERSATION: Final = (
    b"ALLOC orders 3\nALLOC orders\nalloc Orders 2 @t1\nPING\nNOPE\nALLOC orders 0\nALLOC orders 7"
)
RSS_MIB_MAX: Final = 32.0

pytestmark = [
    pytest.mark.usefixtures("serving_variant"),
    pytest.mark.parametrize("serving_variant", VARIANTS, indirect=True),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data file that does not exist yet."""
    return tmp_path / "ids.sqlite3"


@pytest.fixture
def server(data: Path) -> Iterator[ServerProcess]:
    """A server on a new data file."""
    with ServerProcess.start(data=data) as running:
        yield running


def program(name: str, package: str) -> str:
    """The path of a program that a user would type with."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is missing: install the Debian package {package}")
    return path


def ask(server: ServerProcess, request: bytes) -> bytes:
    """All that the server answers to `request` before it closes."""
    with socket.create_connection(server.endpoint, timeout=10) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65_536), b""))


def idalloc_tcp(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "idalloc_tcp", *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_netcat_gets_ids_with_plain_line_ends(server: ServerProcess) -> None:
    """The conversation of the README through netcat: every reply ends in LF alone, then the end."""
    host, port = server.endpoint
    netcat = [program("nc", "netcat-openbsd"), "-N", host, str(port)]
    said = subprocess.run(netcat, input=CONVERSATION, capture_output=True, timeout=10, check=True)
    lines = said.stdout.split(b"\n")
    assert lines[:4] == [b"OK 1 3", b"OK 4 1", b"OK 5 2 @t1", b"OK PONG"]
    assert lines[4].startswith(b"ERR unknown ")
    assert lines[5].startswith(b"ERR badcount ")
    assert lines[6:] == [b""]
    assert b"\r" not in said.stdout


def recording_relay(target: tuple[str, int], sent: bytearray, replied: bytearray) -> int:
    """A port that leads to `target` once, and keeps what passes: telnet's screen hides CRs."""
    listening = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
        while data := source.recv(65_536):
            record.extend(data)
            sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def relay() -> None:
        with listening, listening.accept()[0] as client, socket.create_connection(target) as server:
            back = threading.Thread(target=pump, args=(server, client, replied))
            back.start()
            pump(client, server, sent)
            back.join()

    threading.Thread(target=relay, daemon=True).start()
    port: int = listening.getsockname()[1]
    return port


def test_telnet_gets_carriage_returns(server: ServerProcess) -> None:
    """Through telnet, which sends CR LF, every reply ends in CR LF."""
    sent, replied = bytearray(), bytearray()
    port = recording_relay(server.endpoint, sent, replied)
    telnet = subprocess.Popen(
        [program("telnet", "telnet"), "127.0.0.1", str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with telnet:
        assert telnet.stdin is not None
        assert telnet.stdout is not None
        # Its input stays open: telnet leaves as soon as that ends. QUIT makes the server close.
        telnet.stdin.write(CONVERSATION + b"\nQUIT\n")
        telnet.stdin.flush()
        screen = telnet.stdout.read()
    assert b"OK 5 2 @t1" in screen
    assert sent.endswith(b"QUIT\r\n")
    lines = bytes(replied).split(b"\r\n")
    assert lines[:4] == [b"OK 1 3", b"OK 4 1", b"OK 5 2 @t1", b"OK PONG"]
    assert [line.split()[0] for line in lines[4:-1]] == [b"ERR", b"ERR", b"OK", b"OK"]
    assert replied.count(b"\n") == replied.count(b"\r\n") == 8


def test_a_clean_stop_is_quick_and_leaves_no_gap(data: Path) -> None:
    """SIGTERM with an idle client connected: status 0 within 2 s, and the next start goes on."""
    with ServerProcess.start(data=data) as server:
        assert ask(server, b"ALLOC orders 6\n") == b"OK 1 6\n"
        with socket.create_connection(server.endpoint):
            began = time.monotonic()
            assert server.terminate() == 0
            assert time.monotonic() - began < 2
    assert [path.name for path in data.parent.iterdir()] == [data.name]
    with ServerProcess.start(data=data) as server:
        assert ask(server, b"ALLOC orders\n") == b"OK 7 1\n"


def test_ctrl_c_is_a_clean_stop_too(server: ServerProcess) -> None:
    """SIGINT ends it with status 0."""
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(10) == 0


def test_a_second_signal_does_not_wait(data: Path) -> None:
    """While a stop waits for a busy client, a second SIGTERM ends the process at once."""
    with (
        ServerProcess.start("--drain-seconds", "30", data=data) as server,
        socket.create_connection(server.endpoint) as client,
    ):
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client.send(b"HELP\n" * 10_000)
        server.process.send_signal(signal.SIGTERM)
        while not any(" info draining " in line for line in server.lines):
            assert server.process.poll() is None
            time.sleep(0.01)
        time.sleep(2 * ECHO_SECONDS)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 130


def test_a_large_range_continues_a_nearly_empty_pool(data: Path) -> None:
    """With 5 IDs left in the pool, a million more neither repeat nor reorder any."""
    with ServerProcess.start("--segment-size", "10", data=data) as server:
        replies = ask(server, b"ALLOC big 5\nALLOC big 1000000\nALLOC big\n").splitlines()
        assert replies[0] == b"OK 1 5"
        word, first, count = replies[1].split()
        assert (word, count) == (b"OK", b"1000000")
        assert int(first) > 5
        word, after, _ = replies[2].split()
        assert int(after) >= int(first) + 1_000_000


def test_crashes_under_load_repeat_nothing(serving_variant: str) -> None:
    """Two servers on one file, killed again and again under load: no ID twice, order kept."""
    workers = 2 if serving_variant == "workers-2" else 1
    verdict = hammer(servers=2, workers=workers, clients=4, ids=100_000, kills=3, seed=7)
    assert verdict.ids >= 4 * 100_000
    assert verdict.lost_connections > 0
    assert (verdict.duplicates, verdict.order_violations) == (0, 0)


def test_hostile_clients_harm_nobody() -> None:
    """Junk, endless lines, silence and floods: the server lives, stays small, serves the honest."""
    lines: list[str] = []
    abuse(lines.append)
    print("\n".join(lines))
    assert len(lines) == 7


def test_the_idle_server_is_small(server: ServerProcess) -> None:
    """An idle embedded server needs at most 32 MiB, and so does each process of several."""
    print(f"resident memory: {server.rss_mib:.1f} MiB")
    assert server.rss_mib <= RSS_MIB_MAX


def test_no_driver_is_imported_by_the_embedded_server(data: Path) -> None:
    """The drivers for Redis and MySQL, and the bridge to them, are loaded only when configured."""
    code = (
        "import sys, idalloc_tcp.cli, idalloc_tcp.composition;"
        "print([m for m in ('redis', 'asyncmy', 'trio_asyncio', 'asyncio') if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_alloc_prints_first_and_count(server: ServerProcess) -> None:
    """`idalloc-tcp alloc` is a one-line client."""
    said = idalloc_tcp("alloc", "orders", "3", "--server", server.address)
    assert (said.returncode, said.stdout) == (0, "1 3\n")
    said = idalloc_tcp("alloc", "orders", "0", "--server", server.address)
    assert said.returncode == 1
    assert said.stderr.startswith("idalloc-tcp: badcount: ")
    assert len(said.stderr.splitlines()) == 1


def test_alloc_says_when_nobody_answers() -> None:
    """Without a server `idalloc-tcp alloc` is one clear line and status 1."""
    said = idalloc_tcp("alloc", "orders", "--server", "127.0.0.1:1")
    assert said.returncode == 1
    assert said.stderr.startswith("idalloc-tcp: cannot connect to 127.0.0.1:1: ")
    assert len(said.stderr.splitlines()) == 1


def test_stats_are_for_people_and_for_programs(server: ServerProcess) -> None:
    """`idalloc-tcp stats` aligns its values, and --json gives numbers as numbers."""
    assert ask(server, b"ALLOC orders 3\n") == b"OK 1 3\n"
    said = idalloc_tcp("stats", "Orders", "--server", server.address)
    columns = {line.index(line.split()[1], 1) for line in said.stdout.splitlines()}
    assert len(columns) == 1
    said = idalloc_tcp("stats", "orders", "--json", "--server", server.address)
    assert json.loads(said.stdout)["served_ids"] == 3


def test_settings_that_are_wrong_end_with_two(tmp_path: Path) -> None:
    """An unknown key, a wrong type: one line that names the key, and status 2."""
    file = tmp_path / "settings.toml"
    file.write_text("segment_sise = 5\n")
    for said, key in (
        (idalloc_tcp("config", "--config", str(file)), "segment_sise"),
        (idalloc_tcp("serve", "--max-count", "many"), "max_count"),
        (idalloc_tcp("serve", IDALLOC_TCP_POOL_SECONDS="soon"), "pool_seconds"),
    ):
        assert said.returncode == 2
        assert key in said.stderr
        assert len(said.stderr.splitlines()) == 1


def test_config_shows_values_with_their_sources(tmp_path: Path) -> None:
    """`idalloc-tcp config` says what is in effect and why; flags win over the environment."""
    file = tmp_path / "settings.toml"
    file.write_text("segment_size = 20_000\nmax_count = 5\n")
    said = idalloc_tcp(
        "config", "--config", str(file), "--max-count", "7", IDALLOC_TCP_MAX_COUNT="6"
    )
    assert f"segment_size = 20_000  # file {file}" in said.stdout
    assert "max_count = 7  # flag --max-count" in said.stdout


def test_a_taken_port_is_one_line(server: ServerProcess, tmp_path: Path) -> None:
    """A second server on the same port says so and ends with 1."""
    said = idalloc_tcp(
        "serve", "--listen", server.address, "--data", str(tmp_path / "other.sqlite3")
    )
    assert said.returncode == 1
    assert said.stderr.startswith(f"idalloc-tcp: cannot listen on {server.address}: ")
    assert len(said.stderr.splitlines()) == 1


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    """A data file that is not one says so and ends with 1; it is not touched."""
    data = tmp_path / "ids.sqlite3"
    data.write_bytes(b"not a database, but somebody's letter " * 100)
    before = data.read_bytes()
    said = idalloc_tcp("serve", "--data", str(data), "--listen", "127.0.0.1:0")
    assert said.returncode == 1
    assert str(data) in said.stderr
    assert len(said.stderr.splitlines()) == 1
    assert data.read_bytes() == before


def test_the_default_file_lies_where_state_belongs(tmp_path: Path) -> None:
    """Without --data the file is under the platform's state directory, which the start prints."""
    server = subprocess.Popen(
        [sys.executable, "-m", "idalloc_tcp", "serve", "--listen", "127.0.0.1:0"],
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    with server:
        try:
            assert server.stderr is not None
            path = str(tmp_path / "idalloc-tcp" / "ids.sqlite3")
            warning, serving = server.stderr.readline(), server.stderr.readline()
            assert f"warning a new data file: every service begins at 1 data={path}" in warning
            assert " info serving " in serving
            assert f" data={path} " in serving
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 0
        finally:
            server.kill()


def test_ipv6_and_unix_sockets(data: Path, tmp_path: Path) -> None:
    """--listen is repeatable, and takes IPv6 addresses and Unix sockets."""
    path = tmp_path / "socket"
    flags = ["--listen", f"unix:{path}"]
    if socket.has_ipv6 and Path("/proc/net/if_inet6").exists():
        flags += ["--listen", "[::1]:0"]
    with ServerProcess.start(*flags, data=data) as server:
        for address in server.addresses:
            said = idalloc_tcp("alloc", "orders", "--server", address)
            assert said.returncode == 0, (address, said.stderr)
        assert server.terminate() == 0
    assert not path.exists()


def test_version_and_help() -> None:
    """--version and --help answer without a server."""
    assert idalloc_tcp("--version").stdout.startswith("idalloc-tcp ")
    assert "nc -N 127.0.0.1 8642" in idalloc_tcp("--help").stdout
    assert "--segment-size" in idalloc_tcp("serve", "--help").stdout
