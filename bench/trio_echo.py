"""The least that a server on Trio's streams can do: send back what came. Prints its port."""

from typing import Final

import trio

READ_BYTES: Final = 65_536


async def _echo(stream: trio.SocketStream) -> None:
    try:
        while data := await stream.receive_some(READ_BYTES):
            await stream.send_all(data)
    except trio.BrokenResourceError:
        pass  # The client has gone.


async def main() -> None:
    """Serve until killed."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(listeners[0].socket.getsockname()[1], flush=True)
    await trio.serve_listeners(_echo, listeners)


if __name__ == "__main__":
    trio.run(main)
