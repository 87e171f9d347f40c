"""The result of an audit with canaries: guesses, a lower bound, and whether the claim holds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from silotune.workflows.audit.bounds import epsilon_lower_bound
from silotune.workflows.audit.canary_clients import guess, num_guesses
from silotune.workflows.audit.released_norm import norm_lines

CONFIDENCE = 0.95
LOWER = (
    "a lower bound: this attack shows at least this much; it does not show that there is no more",
    "the audit's adapter was trained on canaries, and its rounds are releases: publish neither",
)


def result_of(
    coins: Sequence[bool],
    scores: Sequence[float],
    told: Mapping[str, Any] | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Guess which canaries are in, and compare the result with the claim.

    Args:
        coins: Which canaries are in.
        scores: The attack's score of each; a higher score means in.
        told: The run's privacy statement, if it has one. It gives delta, which is otherwise 0.
        notes: Sentences to show with the numbers.

    Returns:
        Values for audit.json. epsilon_lower_bound_at_most is the bound if all guesses were right.
    """
    claim = claim_of(told)
    delta = claim["delta"] if claim else 0.0
    found = guess(coins, scores, num_guesses(len(coins)))
    counts = {"num_guesses": found.num_guesses, "num_canaries": len(coins), "delta": delta}
    lower, most = (
        epsilon_lower_bound(num_correct=v, **counts, confidence=CONFIDENCE)
        for v in (found.num_correct, found.num_guesses)
    )
    said = zip(coins, scores, found.said, strict=True)
    return {
        "unit": told["promise"]["unit"] if told else None,
        "num_in": sum(coins),
        **counts,
        "num_correct": found.num_correct,
        "confidence": CONFIDENCE,
        "epsilon_lower_bound": lower,
        "epsilon_lower_bound_at_most": most,
        "claim": claim,
        "is_refuted": claim is not None and lower > claim["epsilon"],
        "verdict": _verdict(lower, most, claim),
        "privacy": told,
        "notes": [*notes, *LOWER],
        "canaries": [{"is_in": c, "score": s, "guess": g} for c, s, g in said],
    }


def claim_of(told: Mapping[str, Any] | None) -> dict[str, float] | None:
    """The spent epsilon and its delta; None if nothing was promised."""
    if told is None or told["epsilon"]["pld"] is None:
        return None
    return {"epsilon": told["epsilon"]["pld"], "delta": told["promise"]["delta"]}


def _verdict(lower: float, most: float, claim: Mapping[str, float] | None) -> str:
    if claim is None:
        return "nothing is claimed"
    epsilon = claim["epsilon"]
    if lower > epsilon:
        return (
            f"REFUTED: epsilon is above {lower:.3f}, but {epsilon:.3f} is claimed. By chance, this "
            f"happens to a true claim in at most {1 - CONFIDENCE:.0%} of all audits"
        )
    reach = f"; with this many canaries, no claim above {most:.3f} could have been refuted"
    return "consistent with the claim" + ("" if most > epsilon else reach)


def audit_lines(found: Mapping[str, Any]) -> list[str]:
    """An audit in words. For the numbers of a finished run, see `membership_table`.

    Args:
        found: audit.json.
    """
    notes, claim = [f"note: {text}" for text in found["notes"]], found["claim"]
    claimed = f"epsilon {claim['epsilon']:.3f} at delta {claim['delta']:g}" if claim else "nothing"
    if "epsilon_lower_bound" not in found:
        return [f"claimed: {claimed}", *notes]
    return [
        f"{found['attack']}: {found['num_canaries']}, {found['num_in']} of them in; "
        f"{found['num_correct']} of {found['num_guesses']} guesses right",
        f"epsilon is at least {found['epsilon_lower_bound']:.3f} at delta {found['delta']:g}, with "
        f"{found['confidence']:.0%} confidence; this audit could have shown at most "
        f"{found['epsilon_lower_bound_at_most']:.3f}",
        f"claimed: {claimed}",
        f"verdict: {found['verdict']}",
        *norm_lines(found),
        *(_exposure_line(name, own) for name, own in found.get("exposure", {}).items()),
        *notes,
    ]


def _exposure_line(name: str, own: Mapping[str, Any]) -> str:
    if own["mean_bits"] is None:
        return f"secrets that are {name}: none"
    return (
        f"secrets that are {name}: exposure {own['mean_bits']:.2f} bits on average, at most "
        f"{own['most_bits']:.2f} of {math.log2(own['num_candidates']):.2f}; {own['num_first']} of "
        f"{own['num_secrets']} more likely than all others"
    )
