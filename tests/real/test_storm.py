"""One short storm. A whole one takes a minute: `python -m tests.real.storm`."""

from typing import Final

import pytest

from tests.conftest import VARIANTS
from tests.real.storm.__main__ import storm

SECONDS: Final = 17.0


@pytest.mark.parametrize("serving_variant", VARIANTS, indirect=True)
# They know what to do where no such server is installed.
@pytest.mark.usefixtures("shared_mariadb_server", "redis_server", "serving_variant")
async def test_a_short_storm_leaves_no_damage() -> None:
    """Under load and fault after fault, nothing repeats, order holds, and the ledger leads.

    How soon anybody is served depends on the machine, and is for the command to judge.
    """
    verdict = await storm(SECONDS, seed=1, is_short=True)
    print(verdict)
    damage = (verdict.duplicates, verdict.order_violations, verdict.rows_behind)
    assert damage == (0, 0, 0), str(verdict)
    assert verdict.faults == 5
    assert verdict.ids > 100_000
