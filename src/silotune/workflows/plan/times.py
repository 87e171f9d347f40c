"""How long a run takes on this machine, extrapolated from one measured step."""

from dataclasses import dataclass

from silotune.core.wording import human_seconds
from silotune.federation.budget import has_time
from silotune.recipes.schema import RunConfig
from silotune.workflows.plan.measure import Measurement


@dataclass(frozen=True)
class Times:
    """Seconds of a run on this machine, with its clients one after another."""

    start: float
    """Importing libraries, loading the model, tokenizing rows."""
    client: float
    """The steps of one client in one round, on average."""
    round: float
    """The steps of one round, on average."""
    training: float
    """The steps of all rounds."""
    score: float
    """Scoring all clients' held-out rows once."""
    scoring: float
    """Scoring held-out rows as often as `evaluate.every` says."""

    @property
    def total(self) -> float:
        """Time until the last score, without the server's own training and sample answers."""
        return self.start + self.training + self.scoring


def expected_times(run: RunConfig, rounds: int, num_asked: int, found: Measurement) -> Times:
    """Estimate the seconds of a run's first `rounds` rounds from a measurement.

    Args:
        run: The recipe.
        rounds: Rounds of the run: fewer than the recipe's if budget.bytes ends it early.
        num_asked: Clients that train in a round.
        found: A measurement of this recipe with at least this many rounds.
    """
    share = rounds / len(found.train_tokens)
    steps = sum(found.train_tokens[:rounds]) * found.seconds_per_token
    training = steps + share * found.seconds_building
    scored = [r for r in range(rounds) if run.evaluate.due(r, run.rounds)]
    once = sum(found.scored_tokens.values()) * found.seconds_per_scored_token
    return Times(
        start=found.seconds_start,
        client=training / rounds / num_asked,
        round=training / rounds,
        training=training,
        score=once,
        scoring=(len(scored) + 1) * once,  # the last adapter too
    )


def rounds_within(run: RunConfig, times: Times, rounds: int) -> int:
    """After how many of `rounds` rounds budget.hours ends the run, by the run's own rule.

    One exception: a run always does its first round, but this may return 0.
    """
    spent, longest = times.start, 0.0
    for done in range(rounds):
        this = times.round + times.score * run.evaluate.due(done, run.rounds)
        longest = max(longest, this)
        if not has_time(run.budget.hours, spent, round_s=longest, last_s=times.score):
            return done
        spent += this
    return rounds


def too_short(run: RunConfig, times: Times) -> str:
    """Say that budget.hours is too short for even one round, and how long that round takes."""
    first = times.start + times.round + 2 * times.score  # scores of the base and of the result
    return (
        f"budget.hours = {run.budget.hours:g}, but one round takes about {human_seconds(first)}, "
        "including loading and scores"
    )
