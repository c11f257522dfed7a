"""What each path answers: an ASGI application."""

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib import resources
from typing import Any, Final, Protocol, TypeAlias, final
from urllib.parse import parse_qsl

import attrs
import trio

from idalloc_tcp.admin.exposition import CONTENT_TYPE, SERVICES_MAX, Exposition
from idalloc_tcp.admin.inspection import SECONDS_MAX, Finding, Inspection, Kind
from idalloc_tcp.admin.status import readiness_text, status, unreadiness
from idalloc_tcp.snapshot import Snapshot

#: Whoever asks within this time sees the same: however many ask, measuring costs little.
REUSE_SECONDS: Final = 0.5
PROFILE_SECONDS: Final = 5.0
PROFILE_SECONDS_MIN: Final = 1.0
QUERY_FIELDS_MAX: Final = 8

_TEXT: Final = "text/plain; charset=utf-8"
_HTML: Final = "text/html; charset=utf-8"
_JSON: Final = "application/json"
#: The page brings all that it needs in itself, and asks this server alone.
_PAGE_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Scope: TypeAlias = Mapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]


class Watched(Protocol):
    """What the pages show: a server of one process, or of several."""

    async def gather_all(self, services_max: int, /) -> Snapshot:
        """What it measured, and its busiest services, most IDs first."""
        ...

    async def inspect(self, wanted: Inspection, worker: int | None, /) -> Finding | None:
        """What one of its processes is doing; None: there is no such process."""
        ...


@final
@attrs.frozen
class Answer:
    """What is sent back."""

    body: bytes | str
    content_type: str = _TEXT
    status: int = 200
    headers: Mapping[str, str] = attrs.field(factory=dict)


class _Refused(Exception):
    """The query of the request does not say what it should; the text says why."""


@final
@attrs.define(eq=False)
class Pages:
    """The application.

    Args:
        may_inspect: are there pages about the processes themselves?
    """

    _watched: Watched
    _may_inspect: bool
    _exposition: Exposition = attrs.field(init=False, factory=Exposition)
    _page: bytes = attrs.field(init=False)
    _pages: dict[str, Callable[[Scope], Awaitable[Answer]]] = attrs.field(init=False)
    _gathering: trio.Lock = attrs.field(init=False, factory=trio.Lock)
    _gathered: tuple[Snapshot, float] | None = attrs.field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self._page = resources.files(__package__).joinpath("page.html").read_bytes()
        self._pages = {
            "/": self._index,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/status.json": self._status,
            "/metrics": self._metrics,
        }
        if self._may_inspect:
            self._pages["/debug/profile"] = partial(self._inspect, "profile")
            self._pages["/debug/tasks"] = partial(self._inspect, "tasks")

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        answer = await self._answer(scope)
        body = answer.body.encode() if isinstance(answer.body, str) else answer.body
        headers = {
            "content-type": answer.content_type,
            "content-length": str(len(body)),
            "cache-control": "no-store",
            "connection": "close",
            "x-content-type-options": "nosniff",
            **answer.headers,
        }
        fields = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": fields})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope) -> Answer:
        if scope["method"] not in ("GET", "HEAD"):
            only = {"allow": "GET, HEAD"}
            return Answer("There is nothing here but to look at.\n", status=405, headers=only)
        page = self._pages.get(scope["path"])
        if page is None:
            return Answer("There is no such page.\n", status=404)
        try:
            return await page(scope)
        except _Refused as refusal:
            return Answer(f"{refusal}\n", status=400)

    async def _index(self, _scope: Scope) -> Answer:
        return Answer(self._page, _HTML, headers={"content-security-policy": _PAGE_POLICY})

    async def _healthz(self, _scope: Scope) -> Answer:
        return Answer("alive\n")

    async def _readyz(self, _scope: Scope) -> Answer:
        snapshot, _ = await self._gather()
        return Answer(readiness_text(snapshot), status=503 if unreadiness(snapshot) else 200)

    async def _status(self, _scope: Scope) -> Answer:
        return Answer(json.dumps(status(*await self._gather())), _JSON)

    async def _metrics(self, _scope: Scope) -> Answer:
        snapshot, _ = await self._gather()
        return Answer(self._exposition.render(snapshot), CONTENT_TYPE)

    async def _gather(self) -> tuple[Snapshot, float]:
        """A snapshot, and when it was taken."""
        async with self._gathering:
            if self._gathered is None or time.monotonic() - self._gathered[1] > REUSE_SECONDS:
                snapshot = await self._watched.gather_all(SERVICES_MAX)
                self._gathered = snapshot, time.monotonic()
            return self._gathered

    async def _inspect(self, kind: Kind, scope: Scope) -> Answer:
        query = _query(scope)
        seconds = _in_range(
            query.get("seconds", str(PROFILE_SECONDS)), PROFILE_SECONDS_MIN, SECONDS_MAX
        )
        worker = query.get("worker")
        if worker is not None and not (worker.isascii() and worker.isdecimal()):
            raise _Refused("worker: expected the number of a worker; 0 is their parent")
        found = await self._watched.inspect(
            Inspection(kind, seconds), None if worker is None else int(worker)
        )
        if found is None:
            raise _Refused("worker: there is no such process, or it did not answer")
        policy = {"content-security-policy": _PAGE_POLICY}  # It would ask others for its fonts.
        return Answer(found.text, _HTML if found.is_html else _TEXT, found.status, policy)


def _query(scope: Scope) -> dict[str, str]:
    try:
        text = scope["query_string"].decode("ascii")
        return dict(parse_qsl(text, max_num_fields=QUERY_FIELDS_MAX))
    except ValueError as error:
        raise _Refused(f"query: {error}") from None


def _in_range(text: str, least: float, most: float) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not least <= seconds <= most:
        raise _Refused(f"seconds: expected a number from {least:g} to {most:g}")
    return seconds
