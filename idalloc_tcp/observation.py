"""What lanes tell of the requests that they answered: how long they took, and of some everything.

A request with a trace id asks for a line in the log about its whole way: which lane answered it,
whether its IDs were in the pool or had to be fetched, and what the stores took for that.
"""

from collections.abc import Callable, Iterable
from typing import Final, final

import attrs

from idalloc_tcp import log
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.session import Traced

#: Lines in a minute; further ones are summed up. A client must not be able to fill a disk.
LINES_MAX: Final = 1_000


@final
@attrs.frozen
class Observer:
    """Shared by all connections of a server.

    Args:
        refill_of: what is known of the last segment that was fetched for a service, in words.
    """

    _metrics: Metrics
    _refill_of: Callable[[str], str]

    @property
    def answered_total(self) -> int:
        """Requests that were answered without waiting, of all connections."""
        return self._metrics.answered_total

    def took(self, seconds: float, requests: int) -> None:
        """So many requests took so long, from when they were heard until they were answered."""
        if requests:
            self._metrics.took(seconds, requests)

    def tell(self, traced: Iterable[Traced], lane: str, seconds: float) -> None:
        """Log the way of requests with a trace."""
        for one in traced:
            request = one.request
            fields: dict[str, object] = {
                "trace": request.trace,
                "service": request.service,
                "count": request.count,
                "reply": one.reply.decode(),
                "lane": lane,
                "took_ms": round(seconds * 1000, 3),
            }
            if one.is_served:
                fields["pool"] = "empty" if one.has_waited else "hit"
            if one.has_waited:
                fields["refill"] = self._refill_of(request.service)
            log.sparingly(log.INFO, "traced", LINES_MAX, **fields)
