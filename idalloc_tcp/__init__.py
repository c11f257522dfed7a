"""A server that hands out unique, trending-increasing 64-bit IDs over raw TCP.

The modules are layered; a module imports only from those above it:
errors, config, metrics, protocol, pool, ledger, counter, reservation, allocator,
session, connection, server, client, cli.
"""

__version__ = "0.1.0"
