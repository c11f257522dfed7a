"""Load on a MariaDB, for `bench.peers`: one UPDATE at a time on each connection."""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

import asyncmy

from bench.processor import cpu_seconds

#: Logging in is work for both ends, so not everybody does it at once.
LOGINS_AT_ONCE: Final = 16
UPDATE: Final = "UPDATE sequence SET value = LAST_INSERT_ID(value + 1) WHERE name = %s"


class Counted:
    """How many statements came to their end, of all connections."""

    requests = 0


async def _connect(port: int, turn: asyncio.Semaphore) -> Any:
    async with turn:
        return await asyncmy.connect(
            host="127.0.0.1", port=port, user="root", db="bench", autocommit=True
        )


async def _ask_on(connection: Any, service: str, counted: Counted) -> None:
    async with connection.cursor() as cursor:
        while True:
            await cursor.execute(UPDATE, (service,))
            counted.requests += 1


async def main(arguments: dict[str, str], services: list[str]) -> None:
    """Measure one window."""
    turn = asyncio.Semaphore(LOGINS_AT_ONCE)
    count, port = int(arguments["connections"]), int(arguments["port"])
    connections = await asyncio.gather(*(_connect(port, turn) for _ in range(count)))
    counted = Counted()
    tasks = [
        asyncio.create_task(_ask_on(connection, services[i % len(services)], counted))
        for i, connection in enumerate(connections)
    ]
    await asyncio.sleep(float(arguments["warm_seconds"]))
    pids = [int(pid) for pid in arguments["pids"].split(",")]
    began, requests, cpu = time.monotonic(), counted.requests, cpu_seconds(pids)
    await asyncio.sleep(float(arguments["seconds"]))
    result = {
        "cpu_seconds": cpu_seconds(pids) - cpu,
        "requests": counted.requests - requests,
        "seconds": time.monotonic() - began,
        "unexpected": 0,
        "unanswered": 0,
    }
    for task in tasks:
        if task.done():
            task.result()  # It never ends but with an error.
        task.cancel()
    await asyncio.wait(tasks)
    print(json.dumps(result))


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    asyncio.run(main(given, Path(given["requests"]).read_text().split("\0")[:-1]))
