"""A worker process. `workers.py` starts it, with the descriptor of its link as the argument."""

import socket
import sys

import trio

from idalloc_tcp import composition
from idalloc_tcp.config import Settings
from idalloc_tcp.errors import SettingsError, StartRefused
from idalloc_tcp.link import Link
from idalloc_tcp.listeners import Listener
from idalloc_tcp.workers import refusal_message


def main(descriptor: int) -> int:
    """Serve as the parent on the other side says; the exit status."""
    return trio.run(_work, socket.socket(fileno=descriptor))


async def _work(control: socket.socket) -> int:
    async with Link(trio.SocketStream(trio.socket.from_stdlib_socket(control))) as link:
        setup = await link.receive()
        if setup is None:
            return 1
        listeners = [Listener.adopt(number) for number in setup["descriptors"]]
        try:
            settings = Settings(**setup["settings"])
            await composition.serve_linked(settings, listeners, link, setup["number"])
        except (StartRefused, SettingsError) as error:
            await link.send(refusal_message(error))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
