"""Alerts and dashboard are written for the metrics of a real server."""

import re
from typing import Final

from tests.admin import ADMIN, ask
from tests.real.mariadb_server import MariaDbDatabase
from tests.real.redis_server import RedisServer
from tests.real.serving import LineClient, start_server
from tests.test_alerts import EXPOSED

_FAMILY: Final = re.compile(r"^# TYPE (idalloc_\w+) ", re.M)
_SAMPLE: Final = re.compile(r"^(idalloc_\w+)(?:\{(.*)\})? ", re.M)
_PART: Final = re.compile("_(bucket|sum|count)$")


def test_a_server_exposes_what_the_list_says(
    mariadb_database: MariaDbDatabase, redis_server: RedisServer
) -> None:
    """Every metric of the list, and no other, with these labels."""
    with start_server(mariadb_database, redis_server, *ADMIN, "--workers", "2") as server:
        with LineClient.connect(server) as client:
            client.alloc(10)
        text = ask(server, "/metrics").text
    families = {_PART.sub("", name) for name in EXPOSED}
    assert set(_FAMILY.findall(text)) == families
    for name, labels in _SAMPLE.findall(text):
        assert set(re.findall(r'(\w+)="', labels)) == EXPOSED[name], name
