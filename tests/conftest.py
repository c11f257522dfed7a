"""What tests of a whole server share."""

from typing import Final

import pytest

from tests.serving import LANE_VARIABLE

#: Ways to serve, and which setting in the environment asks a server for each. Several workers
#: take processes: tests that start such ask for all of these by
#: `parametrize("serving_variant", VARIANTS, indirect=True)`.
VARIANTS: Final = {
    "sweep": (LANE_VARIABLE, "sweep"),
    "stream": (LANE_VARIABLE, "stream"),
    "workers-2": ("IDALLOC_TCP_WORKERS", "2"),
}


@pytest.fixture(params=["sweep", "stream"])
def serving_variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way in which a server can serve, in turn: a client must not tell them apart."""
    variant: str = request.param
    monkeypatch.setenv(*VARIANTS[variant])
    return variant
