"""Asking a server's admin pages, as a browser or a probe does."""

import json
from collections.abc import Iterator, Mapping
from email.message import Message
from typing import Any, Final, final
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import attrs
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import ServerProcess

PATIENCE_SECONDS: Final = 10.0
ADMIN: Final = ("--admin", "127.0.0.1:0")


@final
@attrs.frozen
class Reply:
    """What came back."""

    status: int
    text: str
    headers: Message

    @property
    def json(self) -> Any:
        """As JSON."""
        return json.loads(self.text)


def ask(server: ServerProcess, path: str, method: str = "GET", body: bytes | None = None) -> Reply:
    """Ask for a page; any status is a reply."""
    request = Request(f"http://{server.admin}{path}", body, method=method)
    try:
        with urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            return Reply(answer.status, answer.read().decode(), answer.headers)
    except HTTPError as error:
        with error:
            return Reply(error.code, error.read().decode(), error.headers)


#: A sample's name and its labels.
Key = tuple[str, frozenset[tuple[str, str]]]


def samples(server: ServerProcess) -> "Samples":
    """What `/metrics` says."""
    return Samples(dict(parse(ask(server, "/metrics").text)))


def parse(exposition: str) -> Iterator[tuple[Key, float]]:
    """The samples in a text for Prometheus."""
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            yield (sample.name, frozenset(sample.labels.items())), sample.value


@final
@attrs.frozen
class Samples:
    """Samples by name and labels."""

    values: Mapping[Key, float]

    def get(self, name: str, **labels: str) -> float | None:
        """One of them; None: it is not there."""
        return self.values.get((f"idalloc_{name}", frozenset(labels.items())))
