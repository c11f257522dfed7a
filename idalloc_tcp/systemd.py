"""What a service manager hands over and wants to hear: the protocol of systemd, in short.

NOTIFY_SOCKET names a socket for messages to it, WATCHDOG_USEC says how often it has to hear that
we are alive, LISTEN_FDS how many sockets it opened for us. All of them are meant for one process.
"""

import os
import socket
import time
from collections.abc import Mapping, MutableMapping
from typing import Final, Self, final

import attrs
import trio

from idalloc_tcp import log
from idalloc_tcp.errors import StartRefused

VARIABLES: Final = (
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
    *("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"),
)
#: The first of the sockets that it opened; the others follow it.
FIRST_DESCRIPTOR: Final = 3
#: How long a message to it may take, and hold up all else. It reads them at once, or is in
#: trouble itself.
SEND_SECONDS: Final = 0.5


@final
@attrs.define(eq=False)
class ServiceManager:
    """The service manager that started this process, if one did; else nobody hears anything.

    Attributes:
        watchdog_seconds: within this time it has to hear of us; None: it does not care.
        descriptors: of the sockets that it opened for us, with their names.
    """

    _address: str = ""
    watchdog_seconds: float | None = None
    descriptors: Mapping[int, str] = attrs.field(factory=dict)
    _is_ready: bool = attrs.field(init=False, default=False)

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Self:
        """What the environment says of it. Children are not to see that: it is taken out.

        Raises:
            StartRefused: what it says makes no sense.
        """
        taken = {name: environ.pop(name, "") for name in VARIABLES}
        ours = ("", str(os.getpid()))
        seconds, descriptors = None, {}
        if taken["WATCHDOG_USEC"] and taken["WATCHDOG_PID"] in ours:
            seconds = _number(taken, "WATCHDOG_USEC") / 1e6
        if taken["LISTEN_FDS"] and taken["LISTEN_PID"] == ours[1]:
            names = dict(enumerate(taken["LISTEN_FDNAMES"].split(":"), FIRST_DESCRIPTOR))
            last = FIRST_DESCRIPTOR + _number(taken, "LISTEN_FDS")
            descriptors = {n: names.get(n) or "unnamed" for n in range(FIRST_DESCRIPTOR, last)}
        return cls(taken["NOTIFY_SOCKET"], seconds, descriptors)

    def ready(self) -> None:
        """Tell it that the server serves."""
        self._is_ready = True
        self._tell("READY=1")

    def reloading(self) -> None:
        """Tell it that settings are read again; `reloaded` follows."""
        if self._is_ready:
            now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            self._tell("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def reloaded(self) -> None:
        """Tell it that this is over, whatever came of it."""
        if self._is_ready:
            self._tell("READY=1")

    def stopping(self) -> None:
        """Tell it that the server has begun to stop."""
        self._is_ready = False
        self._tell("STOPPING=1")

    async def keep_alive(self) -> None:
        """Tell it that this event loop still turns, as often as it wants, until cancelled."""
        if self.watchdog_seconds is None:
            return
        while True:
            self._tell("WATCHDOG=1", within_seconds=0)  # Another one follows.
            await trio.sleep(self.watchdog_seconds / 2)

    def _tell(self, *assignments: str, within_seconds: float = SEND_SECONDS) -> None:
        if not self._address:
            return
        # A name that begins with @ is an abstract one: not in the file system.
        is_abstract = self._address.startswith("@")
        address = f"\0{self._address[1:]}" if is_abstract else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(within_seconds)
                sender.sendto("\n".join(assignments).encode(), address)
        except OSError as error:
            text = "the service manager cannot be told"
            log.sparingly(log.WARNING, text, message=assignments[0], reason=str(error))


def _number(taken: Mapping[str, str], name: str) -> int:
    text = taken[name]
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        raise StartRefused(f"{name}: expected a number above 0, found {text!r}")
    return int(text)
