"""A model of the lease hierarchy, run under random schedules.

The rules of uniqueness are about what may happen between machines. Here they are run as small
state machines, with every message and every fault in the hands of a scheduler, and checked
after every step:

* no ID is served twice, by anybody;
* what one process serves only ever increases;
* the ledger's row covers every ID that was served (the ledger leads).

Modelled: two Redis nodes with asynchronous replication (a replica lags by any number of
writes), `run_id` and `master_replid` as a real Redis changes them, promotion, split brain,
demotion, resync, failback, restart from a snapshot of any age, flush; a ledger that may be down,
and in one scenario loses commits that every worker remembers; workers that crash, stop
cleanly or go idle; a network that loses requests, loses replies and executes requests long
after their sender gave up; the original idalloc server on the same stores, with its trailing
row and its restore, and the take-over from it.

Not modelled: time, sizes that adapt, the ceiling, the bytes of any protocol, more than one
service (services share nothing but the stores), and a replica made writable. Each script and each
statement is one atomic step, as Redis and the ledger promise. The model proves nothing; it
looks where people do not, and it finds a duplicate for every rule that is switched off.

    python -m tests.model --schedules 20000 --seed 1
    python -m tests.model --without fence

`stores` are Redis and the ledger, `world` the network and the checks, `worker` the procedures,
`original` the original's; `run` is what can happen and `schedule` when.
"""
