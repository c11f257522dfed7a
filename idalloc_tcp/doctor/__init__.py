"""Will a server with these settings serve, and safely? Looks, and changes nothing.

No check takes an ID, makes a file or a table, or writes to a store; where a permission can only
be tried, it is tried with a statement that the store refuses for another reason, or never runs.
"""

from collections import Counter
from functools import partial
from typing import final

import attrs

from idalloc_tcp.config import Loaded
from idalloc_tcp.doctor.data_file import examine_data_file
from idalloc_tcp.doctor.finding import Finding, Outcome, Report, Verdict, ok, perform
from idalloc_tcp.doctor.machine import ADMIN, listen, open_files
from idalloc_tcp.stores import mysql_url


@final
@attrs.define
class Tally:
    """Prints findings, and counts them."""

    _counts: Counter[Verdict] = attrs.field(factory=Counter)

    def report(self, finding: Finding) -> None:
        """Print a finding."""
        self._counts[finding.verdict] += 1
        print(finding, flush=True)

    def summary(self) -> str:
        """All of them in a few words."""
        fine, doubtful, failed = (self._counts[verdict] for verdict in Verdict)
        return f"{failed} failed, {doubtful} to look at, {fine} fine"

    @property
    def has_failed(self) -> bool:
        """Did any check fail?"""
        return self._counts[Verdict.FAIL] > 0


async def examine(loaded: Loaded, report: Report) -> None:
    """Look at everything that a server with these settings would use.

    Raises:
        SettingsError: a URL does not say what it should.
    """
    settings = loaded.settings
    url = None if settings.mysql is None else mysql_url(settings)

    async def found() -> Outcome:
        return _where_from(loaded)

    await perform("settings", found, report)
    for address in settings.addresses():
        await perform("listen", partial(listen, address), report)
    for address in settings.admin_addresses():
        await perform("admin", partial(listen, address, ADMIN), report)
    await perform("open files", partial(open_files, settings.max_connections), report)
    if url is None:
        await examine_data_file(settings.data_path().absolute(), report)
        return
    # As late as that: they bring the drivers.
    from idalloc_tcp.bridge import asyncio_loop  # noqa: PLC0415
    from idalloc_tcp.doctor.database import examine_database  # noqa: PLC0415

    async with asyncio_loop():
        await examine_database(url, settings, report)
        if settings.redis is not None:
            from idalloc_tcp.doctor.counter import examine_counter  # noqa: PLC0415

            await examine_counter(settings.redis, settings, report)


def _where_from(loaded: Loaded) -> Outcome:
    """How many settings came from where; the environment's and the flags' by their names."""
    origins = Counter(loaded.sources.values())
    defaults = origins.pop("default", 0)
    given = ", ".join(
        f"{count} from {source}" if source.startswith("file ") else source
        for source, count in origins.items()
    )
    return ok(f"{given or 'none given'}; {defaults} by default")
