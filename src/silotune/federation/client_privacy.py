"""What a client does by itself to protect what it sends: its noise, its lots, its ledger.

A client plans by itself, from the recipe and the number of its rows, so that nobody else has to be
trusted with it. It trains no model and knows no network.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from silotune.core.errors import BudgetSpent
from silotune.core.seeds import generator
from silotune.core.types import AdapterState
from silotune.federation.ledger import lines, write_down
from silotune.privacy.accountant import Steps, noise_for, spent_in_all
from silotune.privacy.client_level import noised
from silotune.privacy.noise import Noise, secure_noise, secure_uniform, seeded_noise, seeded_uniform
from silotune.privacy.record_level import RowGuard, draw_lots
from silotune.recipes.schema import RunConfig


@dataclass(frozen=True)
class OwnPlan:
    """One client's mechanism: the same in every round."""

    unit: str
    """record: a row of the client. client: all of them together."""
    num_examples: int
    clip_norm: float
    noise_multiplier: float
    sampling_rate: float
    """Probability with which a step takes a row; 1 for the client as a whole."""
    lot_size: float
    """Rows that a step is expected to take; all for the client as a whole."""
    num_lots: int
    """Releases of a round: its steps, or the one change."""
    num_rounds: int
    """Rounds in which the client may take part."""

    def steps(self, num_rounds: int | None = None) -> Steps:
        """The releases of so many rounds; of all that are planned when absent."""
        count = self.num_lots * (self.num_rounds if num_rounds is None else num_rounds)
        return Steps(self.noise_multiplier, count, self.sampling_rate)


def own_plan(run: RunConfig, num_examples: int, *, count: int | None = None) -> OwnPlan | None:
    """A client's plan; None where the recipe asks for no noise at the client.

    Args:
        run: The recipe.
        num_examples: Rows of the client's train part.
        count: Rows to train on in a round, on average; the recipe's number when absent.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    cfg, train = run.privacy, run.train
    if not cfg.is_at_client:
        return None
    assert cfg.delta is not None, "recipes/contradictions.py asks for it"
    whole = cfg.unit == "client"
    lot_size = num_examples if whole else min(train.batch_size * train.accumulation, num_examples)
    if whole:
        num_lots = 1
    elif count is None and train.local_steps is not None:
        num_lots = train.local_steps
    else:
        rows = (train.local_epochs or 1) * num_examples if count is None else count
        num_lots = math.ceil(rows / (train.batch_size * train.accumulation))
    num_rounds = min(run.rounds, cfg.max_participations or run.rounds)
    rate, z = lot_size / num_examples, cfg.noise_multiplier
    if z is None:
        assert cfg.target_epsilon is not None
        z = _noise(cfg.target_epsilon, num_lots * num_rounds, cfg.delta, rate)
    return OwnPlan(cfg.unit, num_examples, cfg.clip_norm, z, rate, lot_size, num_lots, num_rounds)


@functools.lru_cache(maxsize=1024)
def _noise(target_epsilon: float, num_releases: int, delta: float, sampling_rate: float) -> float:
    return noise_for(
        target_epsilon=target_epsilon,
        num_releases=num_releases,
        delta=delta,
        sampling_rate=sampling_rate,
    )


def own_noise(run: RunConfig, *, client: str, round_: int) -> Noise:
    """Where this client's noise of this round comes from."""
    if run.privacy.noise == "secure":
        return secure_noise
    return seeded_noise(generator(run.seed, "privacy", client, round_))


def protected(
    run: RunConfig, plan: OwnPlan, delta: AdapterState, *, client: str, round_: int
) -> dict[str, Tensor]:
    """What leaves a client that protects itself as a whole: its change, clipped and noised.

    Raises:
        UpdateError: A tensor holds NaN or infinity.
    """
    return noised(
        delta,
        clip_norm=plan.clip_norm,
        noise_multiplier=plan.noise_multiplier,
        noise=own_noise(run, client=client, round_=round_),
        who=f"client '{client}'",
    )


def row_guard(run: RunConfig, plan: OwnPlan, *, client: str, round_: int) -> RowGuard:
    """What clips and noises every step of this client's training in this round."""
    return RowGuard(
        clip_norm=plan.clip_norm,
        noise_multiplier=plan.noise_multiplier,
        lot_size=plan.lot_size,
        noise=own_noise(run, client=client, round_=round_),
    )


def lots(run: RunConfig, plan: OwnPlan, *, client: str, round_: int) -> list[list[int]]:
    """The rows of every step of a round. Drawn in secret, but for seeded noise."""
    seeded = run.privacy.noise == "seeded"
    chance = generator(run.seed, "lots", client, round_)
    return draw_lots(
        plan.num_examples,
        sampling_rate=plan.sampling_rate,
        num_lots=plan.num_lots,
        uniform=seeded_uniform(chance) if seeded else secure_uniform,
    )


# --- the client's own ledger ------------------------------------------------------------------


@dataclass(frozen=True)
class Ledger:
    """Where a client writes down what it releases, and how much it allows."""

    path: Path
    """A file of the client's own. It may hold the lines of many runs on the same rows, and those of
    other clients that keep their state in the same folder."""
    run_id: str = ""
    """Tells this run's lines from others'."""
    epsilon: float | None = None
    """What all lines together may come to; None: the recipe's plan is the only limit."""
    delta: float = 0.0
    """The delta of that epsilon."""

    def begin(self, plan: OwnPlan, *, client: str, round_: int, seeded: bool) -> None:
        """Write a round's releases down, before they are made.

        Raises:
            BudgetSpent: They would go beyond the plan, or beyond what the client allows. Nothing is
                written or released.
        """
        before = [line for line in lines(self.path) if line.get("client", client) == client]
        now = {"run": self.run_id, "client": client, "round": round_, "seeded": seeded}
        now |= asdict(plan)
        if seeded and any(_same(line, now) for line in before):
            return  # the same noise again tells nothing new
        mine = [line for line in before if line.get("run") == self.run_id]
        who = f"client '{client}', round {round_}"
        if len(mine) >= plan.num_rounds:
            raise BudgetSpent(
                f"{who}: its privacy budget is for {plan.num_rounds} round(s), and all are spent."
                "\n  Start a new run with more, at a larger epsilon or with more noise."
            )
        if self.epsilon is not None:
            cost = spent_in_all(released(_per_row([*before, now])), delta=self.delta).pld
            if not cost <= self.epsilon:
                # the numbers are for this client's own log: other runs are not the server's affair
                numbers = ValueError(
                    f"epsilon would be {cost:.3f}, limits.epsilon {self.epsilon:g}"
                )
                raise BudgetSpent(
                    f"{who}: its own limit for privacy allows no further round.\n"
                    "  Only this client's own people can raise limits.epsilon."
                ) from numbers
        write_down(self.path, now)


def _per_row(ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A ledger of one unit as it is; one of both as what it tells about a single row.

    What a release of the whole client hides is that change or none. A row more turns one clipped
    change into another, up to two norms away, so for a row the noise is half of what it is called.
    """
    if len({line.get("unit") for line in ledger}) == 1:
        return ledger
    return [
        {**line, "noise_multiplier": line["noise_multiplier"] / 2}
        if line.get("unit") == "client"
        else line
        for line in ledger
    ]


def _same(line: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return all(line.get(key) == now[key] for key in ("run", "round", "seeded"))


def released(ledger: Iterable[Mapping[str, Any]]) -> list[Steps]:
    """A ledger's lines, or the rows of a run's metrics, as releases to be added up.

    A line without numbers is the worst that can be: a release without noise.
    """
    return [
        Steps(
            float(line.get("noise_multiplier", 0.0)),
            int(line.get("num_lots", 1)),
            float(line.get("sampling_rate", 1.0)),
        )
        for line in ledger
    ]
