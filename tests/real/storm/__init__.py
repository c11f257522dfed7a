"""A storm: real servers, real stores, continuous load, and every fault in turn.

    python -m tests.real.storm --seconds 60 --seed 1

Two servers share a MariaDB and a Redis with a replica, and reach them through proxies of their
own. Eight clients take IDs in mixed counts all the while and keep every range. A script of faults
goes through in an order that the seed decides. In the end all ranges are laid side by side.

`clients` makes the load, `faults` the weather, `verdict` the sum; `__main__` puts them together.
"""
