"""A short, seeded part of `make fuzz` and `make kills`, before a release."""

import pytest

from tests.fuzz.__main__ import faults, fuzz
from tests.fuzz.cases import KINDS
from tests.fuzz.kills import KINDS as COMMANDS
from tests.fuzz.kills import kill_and_resume

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_input_is_an_error_or_makes_no_difference(tmp_path, kind):
    found = fuzz(tmp_path / "fuzz", seed=2026, per_kind=20, kinds=[kind])
    assert len(found) == 20
    assert not faults(found), "\n".join(faults(found))
    ends = {outcome.end for _, _, outcome in found}
    assert ends & {"clear", "terse"}, "nothing was damaged"


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_kill_at_a_random_moment_costs_nothing(tmp_path, kind):
    found = kill_and_resume(tmp_path / "kills", kills=4, seed=2026, kinds=[kind])
    assert found[kind].kills == 4
    assert not found[kind].problems
