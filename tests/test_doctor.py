"""What `idalloc-tcp doctor` finds on the machine itself; the stores are in tests/real."""

import os
import resource
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest
import trio

from idalloc_tcp.address import UnixAddress, parse_address
from idalloc_tcp.assembly import SPARE_FILES
from idalloc_tcp.config import load
from idalloc_tcp.doctor import Tally, data_file, examine
from idalloc_tcp.doctor.data_file import examine_data_file
from idalloc_tcp.doctor.finding import CHECK_SECONDS, Finding, Outcome, Verdict, ok, perform
from idalloc_tcp.doctor.machine import listen, open_files
from idalloc_tcp.errors import Unavailable
from idalloc_tcp.ledger.sqlite import LeaseRequest, LedgerFile
from tests.processes import ServerProcess
from tests.serving import serving

OURS: Final = "an idalloc-tcp runs there already"


def look(path: Path) -> dict[str, Finding]:
    """What there is to say of a data file, by subject."""
    findings: list[Finding] = []
    trio.run(examine_data_file, path, findings.append)
    return {finding.subject: finding for finding in findings}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data file in which `orders` has been used."""
    path = tmp_path / "ids"
    file = LedgerFile.open(path)
    file.lease_all([LeaseRequest("orders", 10, 0, 1000)])
    file.close()
    return path


async def test_a_check_ends_in_time(autojump_clock: trio.testing.MockClock) -> None:
    """One that hangs has failed after three seconds, and says so."""
    findings: list[Finding] = []

    async def hang() -> Outcome:
        await trio.sleep(10 * CHECK_SECONDS)
        return ok("it came back")

    assert not await perform("it", hang, findings.append)
    assert trio.current_time() == CHECK_SECONDS
    assert list(map(str, findings)) == ["FAIL  it                 no answer within 3 s"]


async def test_a_store_that_does_not_answer_has_failed() -> None:
    """In its words, in one line."""
    findings: list[Finding] = []

    async def refuse() -> Outcome:
        raise Unavailable("no\nroute")

    await perform("it", refuse, findings.append)
    assert findings == [Finding(Verdict.FAIL, "it", "no route")]


def test_the_tally_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Each verdict by itself; only a failure fails."""
    tally = Tally()
    tally.report(Finding(Verdict.OK, "a", "fine"))
    tally.report(Finding(Verdict.WARN, "b", "see to it"))
    had_failed = tally.has_failed
    tally.report(Finding(Verdict.FAIL, "c", "broken"))
    assert (had_failed, tally.has_failed) == (False, True)
    assert tally.summary() == "1 failed, 1 to look at, 1 fine"
    assert capsys.readouterr().out.splitlines()[2] == "FAIL  c                  broken"


def test_a_sound_file_is_well_and_left_as_it_is(data: Path) -> None:
    """Its services are counted; not a byte and not a name beside it changes."""
    before = data.read_bytes(), os.listdir(data.parent), data.stat().st_mtime_ns
    found = look(data)
    assert found["data file"].verdict is Verdict.OK
    assert "sound and writable; 1 services" in found["data file"].text
    assert found["file system"].verdict is not Verdict.FAIL
    assert (data.read_bytes(), os.listdir(data.parent), data.stat().st_mtime_ns) == before


def test_a_file_in_use_is_not_read_through(data: Path) -> None:
    """Nor is its log touched."""
    file = LedgerFile.open(data)
    try:
        found = look(data)
    finally:
        file.close()
    assert found["data file"].verdict is Verdict.OK
    assert "in use" in found["data file"].text


def test_a_missing_file_is_no_failure_but_worth_a_look(tmp_path: Path) -> None:
    """It would begin at 1; neither it nor its directory is made."""
    found = look(tmp_path / "new" / "ids")
    assert found["data file"].verdict is Verdict.WARN
    assert "begins at 1" in found["data file"].text
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_used_has_failed(data: Path, tmp_path: Path) -> None:
    """Cut short, of another program, of another format, by two names, a log without its file."""
    sound = data.read_bytes()

    def failure() -> str:
        finding = look(data)["data file"]
        assert finding.verdict is Verdict.FAIL
        return finding.text

    data.write_bytes(sound[:50])
    assert "cut short" in failure()
    data.write_bytes(sound[:60] + b"\0\0\0\x07" + sound[64:])
    assert "format 7" in failure()
    data.write_bytes(sound[:4096] + b"\xff" * (len(sound) - 4096))
    assert "damaged" in failure()
    data.unlink()
    with closing(sqlite3.connect(data)) as db:
        db.execute("CREATE TABLE notes (text)")
    assert "another program" in failure()
    data.write_bytes(sound)
    os.link(data, tmp_path / "other")
    assert "more than one name" in failure()
    data.unlink()
    Path(f"{data}-wal").touch()
    assert "is missing but" in failure()
    data.mkdir()
    assert "not a regular file" in failure()


def test_a_draft_that_was_left_is_no_second_name(data: Path) -> None:
    """A server that died while making the file has done no harm."""
    draft = data.parent / ".idalloc-x" / "ledger"
    draft.parent.mkdir()
    os.link(data, draft)
    assert look(data)["data file"].verdict is Verdict.OK
    assert draft.exists()


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [("ext4", Verdict.OK), ("nfs4", Verdict.FAIL), ("tmpfs", Verdict.WARN)],
)
def test_the_file_system_has_to_be_local_and_lasting(
    data: Path, monkeypatch: pytest.MonkeyPatch, kind: str, verdict: Verdict
) -> None:
    """The deepest mount above the file decides."""
    mounts = data.parent / "mounts"
    mounts.write_text(
        "27 1 254:0 / / rw - xfs /dev/vda rw\n"
        f"28 27 0:1 / {os.path.realpath(data.parent)} rw shared:1 - {kind} somewhere rw\n"
        "29 27 0:2 / /proc rw - proc proc rw\n"
    )
    monkeypatch.setattr(data_file, "_MOUNTS", mounts)
    finding = look(data)["file system"]
    assert finding.verdict is verdict
    assert f"{os.path.realpath(data.parent)} is {kind}" in finding.text


def test_a_file_that_is_mounted_by_itself_has_failed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers outside of that mount would not see its log."""
    mounts = data.parent / "mounts"
    mounts.write_text(f"28 27 0:1 / {os.path.realpath(data)} rw - ext4 somewhere rw\n")
    monkeypatch.setattr(data_file, "_MOUNTS", mounts)
    assert look(data)["file system"].verdict is Verdict.FAIL


async def test_an_address_is_free_or_ours_or_somebody_elses(tmp_path: Path) -> None:
    """Who listens there already is asked."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = parse_address(f"127.0.0.1:{other.getsockname()[1]}")
        verdict, text = await listen(taken)
        assert verdict is Verdict.FAIL
        assert "by another program" in text
    assert await listen(taken) == ok(f"{taken} is free")
    path = tmp_path / "socket"
    async with serving("127.0.0.1:0", f"unix:{path}") as running:
        for address in running.addresses:
            verdict, text = await listen(address)
            assert verdict is Verdict.OK
            assert OURS in text


async def test_an_address_that_cannot_be_had(tmp_path: Path) -> None:
    """Not this machine's, not a name, not a place for a socket."""
    (tmp_path / "file").touch()
    for text, reason in {
        "192.0.2.1:80": "Cannot assign",
        "a..b:80": "not a host name",
        f"unix:{tmp_path}/file": "not a socket",
        f"unix:{tmp_path}/none/socket": "not writable, or missing",
    }.items():
        verdict, said = await listen(parse_address(text))
        assert verdict is Verdict.FAIL, text
        assert reason in said


async def test_a_socket_that_a_dead_server_left_is_free(tmp_path: Path) -> None:
    """And stays where it is, as does the place of one that is not there yet."""
    path = tmp_path / "socket"
    assert (await listen(UnixAddress(str(path))))[0] is Verdict.OK
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    assert (await listen(UnixAddress(str(path))))[0] is Verdict.OK
    assert path.exists()


async def test_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below what the connections need, the server would allow fewer: a warning says how many."""
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (100, 1000))
    fitting = 1000 - SPARE_FILES
    assert await open_files(fitting) == ok(f"{fitting} connections fit the limit")
    verdict, text = await open_files(fitting + 1)
    assert verdict is Verdict.WARN
    assert f"1000 allows {fitting} connections" in text
    assert "raise it to 1001" in text


async def test_the_settings_are_said_to_be_from_where_they_are(tmp_path: Path) -> None:
    """A file by how many it gave, a variable and a flag by name."""
    config = tmp_path / "settings.toml"
    config.write_text('listen = ["127.0.0.1:0"]\nmax_count = 5\n')
    findings: list[Finding] = []
    flags = {"data": str(tmp_path / "ids")}
    await examine(load(flags, config, {"IDALLOC_TCP_CEILING": "9"}), findings.append)
    assert findings[0].subject == "settings"
    given = f"2 from file {config}, flag --data, environment IDALLOC_TCP_CEILING;"
    assert findings[0].text.startswith(given)


def doctor(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "idalloc_tcp", "doctor", *flags],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_command_beside_a_running_server(tmp_path: Path) -> None:
    """Its exit status says whether anything failed; no ID is taken, and wrong settings are 2."""
    data = tmp_path / "ids"
    with ServerProcess.start("--admin", "127.0.0.1:0", data=data) as server:
        flags = ("--data", str(data), "--listen", server.address, "--admin", server.admin)
        well = doctor(*flags)
        assert (well.returncode, well.stderr) == (0, "")
        assert well.stdout.count(OURS) == 2
        assert well.stdout.splitlines()[-1].startswith("0 failed, ")
        server.terminate()
    with closing(sqlite3.connect(data)) as db:
        assert db.execute("SELECT * FROM tbl_alloc_info").fetchall() == []
    data.write_text("something else")
    ill = doctor(*flags)
    assert ill.returncode == 1
    assert "FAIL  data file" in ill.stdout
    assert ill.stderr.startswith("idalloc-tcp: 1 failed, ")
    assert doctor("--max-count", "0").returncode == 2
    assert doctor("--mysql", "mysql://host").returncode == 2
