"""Where samples come from: a server's STATS, or the status of its admin pages."""

import http.client
import json
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol, Self, final
from urllib.parse import SplitResult, urlsplit

import attrs
import trio

from idalloc_tcp.address import Address
from idalloc_tcp.client import TIMEOUT_SECONDS, Client
from idalloc_tcp.errors import ConnectionLost, ProtocolViolation
from idalloc_tcp.top.sample import Sample, Values, parsed

STATUS_PATH: Final = "/status.json"
STATUS_BYTES_MAX: Final = 64 * 2**20


class Source(Protocol):
    """Something that can be asked again and again.

    `sample` raises:
        IdallocError: no answer, or not one of ours. Ask again.
    """

    async def sample(self) -> Sample:
        """How things are now."""
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...


@final
@attrs.define(eq=False)
class ServerSource:
    """STATS of a server, and of the services that are named."""

    _address: Address
    _services: Sequence[str]
    _client: Client | None = attrs.field(init=False, default=None)

    async def sample(self) -> Sample:
        """As `Source.sample`; after a failure it connects anew."""
        client, self._client = self._client, None
        if client is None:
            client = await Client.connect(self._address)
        try:
            rows = _parsed(await client.stats())
            services = {name: _parsed(await client.stats(name)) for name in self._services}
        except BaseException:
            with trio.move_on_after(0, shield=True):
                await client.aclose()
            raise
        self._client = client
        return Sample(time.monotonic(), rows, services)

    async def aclose(self) -> None:
        """As `Source.aclose`."""
        if self._client is not None:
            await self._client.aclose()


def _parsed(texts: dict[str, str]) -> Values:
    return {name: parsed(text) for name, text in texts.items()}


@final
@attrs.frozen
class AdminSource:
    """The admin pages of a server: all services, or those that are named."""

    _url: SplitResult
    _services: frozenset[str]

    @classmethod
    def parse(cls, url: str, services: Sequence[str]) -> Self:
        """The admin pages at `url`, which begins with http:// or https://.

        Raises:
            ValueError: it is not such a URL.
        """
        parts = urlsplit(url)
        _ = parts.port  # Of a port that is none, only this says so.
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it is not http://HOST:PORT")
        return cls(parts, frozenset(services))

    async def sample(self) -> Sample:
        """As `Source.sample`."""
        status = await trio.to_thread.run_sync(self._fetch, abandon_on_cancel=True)
        try:
            services = {of["name"]: of for of in status["services"]}
            if self._services:
                services = {name: services.get(name, {}) for name in sorted(self._services)}
            return Sample(time.monotonic(), dict(status["rows"]), services)
        except (LookupError, TypeError, ValueError) as error:
            raise self._foreign() from error

    async def aclose(self) -> None:
        """As `Source.aclose`: nothing stays open."""

    def _fetch(self) -> Any:
        """In a thread."""
        is_plain = self._url.scheme == "http"
        kind = http.client.HTTPConnection if is_plain else http.client.HTTPSConnection
        assert self._url.hostname is not None
        connection = kind(self._url.hostname, self._url.port, timeout=TIMEOUT_SECONDS)
        try:
            connection.request("GET", self._url.path.rstrip("/") + STATUS_PATH)
            with connection.getresponse() as answer:
                if answer.status != http.client.OK:
                    raise self._foreign()
                return json.loads(answer.read(STATUS_BYTES_MAX))
        except OSError as error:
            text = f"cannot ask {self._url.geturl()}: {error.strerror or error}"
            raise ConnectionLost(text) from error
        except (http.client.HTTPException, ValueError) as error:
            raise self._foreign() from error
        finally:
            connection.close()

    def _foreign(self) -> ProtocolViolation:
        return ProtocolViolation(f"{self._url.geturl()} has no {STATUS_PATH} of an idalloc-tcp")
