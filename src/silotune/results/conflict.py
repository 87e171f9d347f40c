"""What a run says about clients whose preferences are opposed."""

from collections.abc import Mapping
from typing import Any


def conflict_lines(summary: Mapping[str, Any]) -> list[str]:
    """Who learns the opposite of whom, in one sentence; empty if nobody does."""
    if (found := summary.get("conflict")) is None:
        return []
    one, other = (", ".join(side) for side in found["sides"])
    return [
        f"Opposed preferences: what {other} learned points against what {one} learned (mean cosine "
        f"{found['cosine']:.2f}), so it cancels in the mean. docs/preference.md says what helps."
    ]
