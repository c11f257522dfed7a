"""What tests of a whole server share."""

import pytest

from tests.serving import LANE_VARIABLE


@pytest.fixture(params=["sweep", "stream"])
def serving_variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way in which a server can serve, in turn: a client must not tell them apart."""
    variant: str = request.param
    monkeypatch.setenv(LANE_VARIABLE, variant)
    return variant
