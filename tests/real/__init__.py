"""Tests against real servers, and the harness that starts and breaks them.

    with RedisServer() as redis, MariaDbServer() as mariadb:          # or the fixtures
        async with open_fault_proxy(redis.port) as proxy:             # connect to proxy.port
            backup = redis.snapshot()
            proxy.swallow_replies(1)                                  # ... then proxy.heal()
            await trio.to_thread.run_sync(redis.restart_from, backup)

Servers: `kill`, `pause`, `resume`, `stop`, `start`, `restart`; both keep port and folder. They
block, for a bounded while, so call them in a thread where this loop must go on. `command` and
`query` go past the driver under test. A Redis is also emptied, restored, promoted and demoted;
a replica is held back by a proxy with a delay before its master. Nothing outlives this process.
"""
