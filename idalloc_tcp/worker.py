"""A worker process.

`workers.py` starts it, with the descriptors of its link and of its listening sockets as arguments.
"""

import signal
import socket
import sys
from collections.abc import Sequence

import trio

from idalloc_tcp import composition
from idalloc_tcp.errors import SettingsError, StartRefused
from idalloc_tcp.link import Link
from idalloc_tcp.listeners import Listener
from idalloc_tcp.settings import Settings
from idalloc_tcp.workers import refusal_message


async def work(control: int, listening: Sequence[int]) -> int:
    """Serve as the parent on the other side of the link says; the exit status."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=control)))
    async with Link(stream) as link:
        setup = await link.receive()
        if setup is None:
            return 1
        is_managed = setup["is_managed"]
        listeners = [Listener.adopt(descriptor, is_managed) for descriptor in listening]
        try:
            settings = Settings(**setup["settings"])
            await composition.serve_linked(settings, listeners, link, setup["number"])
        except (StartRefused, SettingsError) as error:
            await link.send(refusal_message(error))
            return 1
    return 0


if __name__ == "__main__":
    # Whoever hangs up on all processes means the parent, which tells us what is new.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    descriptors = [int(argument) for argument in sys.argv[1:]]
    sys.exit(trio.run(work, descriptors[0], descriptors[1:]))
