"""What a limit of [budget] or [stop] did to a run, in words."""

from collections.abc import Mapping
from typing import Any

from silotune.core.wording import human_seconds
from silotune.federation.budget import end_note
from silotune.recipes.sections import StopConfig


def budget_warnings(summary: Mapping[str, Any]) -> list[str]:
    """A warning if the run took longer than budget.hours."""
    budget = summary.get("budget")
    if not budget or budget["hours"] is None or budget["seconds"] <= 3600 * budget["hours"]:
        return []
    one = f", and round 1 alone took {human_seconds(budget['longest_round_seconds'])}"
    return [
        f"budget.hours = {budget['hours']:g} was exceeded: the run took "
        f"{human_seconds(budget['seconds'])} until the last score"
        f"{one if budget['rounds'] == 1 else ''}."
    ]


def budget_lines(summary: Mapping[str, Any]) -> list[str]:
    """Which limit ended the run, and after which round; empty if none did."""
    budget = summary.get("budget")
    if not budget or budget["ended_by"] is None:
        return []
    after = f"{budget['rounds']} of {budget['planned_rounds']}"
    stop = StopConfig.model_validate(budget.get("stop", {}))  # earlier versions had none
    return [end_note(budget["ended_by"], after, stop, ends="ended")]
