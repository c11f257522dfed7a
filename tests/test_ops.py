"""The files for those who run it: what they say is what the server understands."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from idalloc_tcp import cli, config, workers
from idalloc_tcp.address import parse_address
from idalloc_tcp.settings import Settings

ROOT: Final = Path(__file__).parent.parent
OPS: Final = ROOT / "ops"
UNITS: Final = ("idalloc-tcp.service", "idalloc-tcp.socket")
#: A score of `systemd-analyze security`, in tenths: 0 is a service that may do nothing at all.
EXPOSURE_MAX: Final = 15


def unit(name: str) -> configparser.ConfigParser:
    """The sections of a unit; of a key that stands there twice the last one."""
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters="=")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(OPS / name)
    return parser


def container() -> dict[str, list[str]]:
    """Instruction -> what follows it, each time."""
    text = (OPS / "Containerfile").read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            instruction, _, rest = line.partition(" ")
            found.setdefault(instruction, []).append(rest)
    return found


def test_the_service_starts_what_there_is() -> None:
    """Its command is one of ours, and its flags are settings with values that fit."""
    service = unit("idalloc-tcp.service")["Service"]
    program, *arguments = shlex.split(service["ExecStart"].replace("%S", "/var/lib"))
    assert Path(program).name == "idalloc-tcp"
    options = cli._parser().parse_args(arguments)
    assert options.run is cli._serve
    given = config.load(config.given_flags(options), None, {}).settings
    state = Path("/var/lib", service["StateDirectory"])
    assert given.data_path().parent == state


def test_the_service_speaks_with_its_manager() -> None:
    """Readiness, reload, watchdog; and a stop has all the time that it may take."""
    service = unit("idalloc-tcp.service")["Service"]
    assert service["Type"] == "notify"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert service["KillMode"] == "mixed"
    assert int(service["WatchdogSec"]) > 10
    assert int(service["TimeoutStopSec"]) > Settings().drain_seconds + workers.STOP_SECONDS
    assert int(service["LimitNOFILE"]) > Settings().max_connections


def test_the_sockets_are_those_of_the_defaults() -> None:
    """With them the server listens where it would without, and more."""
    addresses = {
        value
        for line in (OPS / "idalloc-tcp.socket").read_text().splitlines()
        for key, _, value in [line.partition("=")]
        if key == "ListenStream"
    }
    assert set(Settings().listen) <= addresses
    for address in addresses:
        parse_address(f"unix:{address}" if address.startswith("/") else address)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_knows_every_directive(tmp_path: Path) -> None:
    """It has nothing to say against the units, and finds the service well shut in."""
    for name in UNITS:
        text = (OPS / name).read_text()
        (tmp_path / name).write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", text))
    command = ["systemd-analyze", "verify", *UNITS]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, check=False, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE_MAX}"]
    subprocess.run([*command, UNITS[0]], cwd=tmp_path, capture_output=True, check=True, timeout=30)


def test_the_container_runs_what_there_is() -> None:
    """Its variables are settings; it is not root; data, port, stop and health are declared."""
    said = container()
    assert set(said["FROM"]) == {"python:3.13-slim AS build", "python:3.13-slim"}
    [variables] = said["ENV"]
    environ = dict(one.split("=", 1) for one in shlex.split(variables))
    environ = {name: value for name, value in environ.items() if name.startswith(config.PREFIX)}
    given = config.load({}, None, environ).settings
    assert [str(given.data_path().parent)] == said["VOLUME"]
    assert [address.rpartition(":")[2] for address in given.listen] == said["EXPOSE"]
    assert int(said["USER"][0]) > 0
    assert said["STOPSIGNAL"] == ["SIGTERM"]
    entry, command = (json.loads(said[name][0]) for name in ("ENTRYPOINT", "CMD"))
    health = json.loads(said["HEALTHCHECK"][0].partition("CMD ")[2])
    assert entry == ["idalloc-tcp"] == health[:1]
    for arguments in (command, health[1:]):
        cli._parser().parse_args(arguments)


def test_the_container_copies_what_is_there() -> None:
    """All that the build needs, and no more: neither history nor local files get into an image."""
    sources = [name for line in container()["COPY"][:2] for name in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in sources)
    assert "." not in sources


def test_the_health_check_fails_without_a_server() -> None:
    """A server that does not answer is one that is not well."""
    command = [sys.executable, "-m", "idalloc_tcp", "stats", "--server", "127.0.0.1:1"]
    assert subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 1
