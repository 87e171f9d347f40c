"""How a client protects what it sends: its noise, its lots and its ledger.

Every client makes its own plan, from the recipe and its number of rows, so that nobody else has to
be trusted with it. This module trains no model and knows nothing about the network.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from silotune.core.errors import BudgetSpent, DataError
from silotune.core.seeds import generator
from silotune.core.tree import subtract
from silotune.core.types import AdapterState
from silotune.core.wording import counted
from silotune.federation.ledger import lines, write_down
from silotune.privacy.accountant import Steps, noise_for, spent_in_all
from silotune.privacy.client_level import noised
from silotune.privacy.noise import (
    Noise,
    secure_noise,
    secure_seeds,
    secure_uniform,
    seeded_noise,
    seeded_seeds,
    seeded_uniform,
)
from silotune.privacy.record_level import RowGuard, draw_lots
from silotune.privacy.row_dropout import Seeds
from silotune.recipes.schema import RunConfig


@dataclass(frozen=True)
class ClientPlan:
    """One client's mechanism, which is the same in every round."""

    unit: str
    """record: each row of the client. client: all of its rows together."""
    num_examples: int
    clip_norm: float
    noise_multiplier: float
    sampling_rate: float
    """Probability that a step takes a row; 1 if the unit is the client."""
    lot_size: float
    """Expected number of rows in a step; all rows if the unit is the client."""
    num_lots: int
    """Releases per round: its steps, or one change if the unit is the client."""
    num_rounds: int
    """Maximum number of rounds in which the client may take part."""
    discrete: bool = False
    """Whether its noise is discrete, on the whole numbers of a secure sum."""

    def steps(self, num_rounds: int | None = None) -> Steps:
        """The releases of `num_rounds` rounds; of all planned rounds if absent."""
        count = self.num_lots * (self.num_rounds if num_rounds is None else num_rounds)
        return Steps(self.noise_multiplier, count, self.sampling_rate, self.discrete)


def plan_of_client(
    run: RunConfig, num_examples: int, *, client: str, count: int | None = None
) -> ClientPlan | None:
    """Make a client's plan; None if the recipe asks for no noise at the client.

    Args:
        run: The recipe.
        num_examples: Number of training rows of the client.
        client: Its name, for messages.
        count: Average number of rows to train on in a round; the recipe's number if absent.

    Raises:
        DataError: Rows are protected, and there is only one.
        ConfigError: dp-accounting is not installed.
    """
    cfg, train = run.privacy, run.train
    if not cfg.is_at_client:
        return None
    assert cfg.delta is not None, "recipes/contradictions.py requires it"
    whole = cfg.unit == "client"
    if not whole and num_examples < 2:
        # it may be the one that is left if all would be held out, which depends on the other rows
        raise DataError(
            f"client '{client}' has 1 row to train on, which privacy.unit = 'record' cannot "
            "protect.\n"
            "  Add rows, or set a smaller data.eval_fraction."
        )
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
    discrete = whole and run.secure_sum.kind == "masks"
    if z is None:
        assert cfg.target_epsilon is not None
        z = _noise(cfg.target_epsilon, num_lots * num_rounds, cfg.delta, rate, discrete)
    return ClientPlan(
        *(cfg.unit, num_examples, cfg.clip_norm, z, rate, lot_size, num_lots, num_rounds),
        discrete=discrete,
    )


@functools.lru_cache(maxsize=1024)
def _noise(
    target_epsilon: float, num_releases: int, delta: float, sampling_rate: float, discrete: bool
) -> float:
    return noise_for(
        target_epsilon=target_epsilon,
        num_releases=num_releases,
        delta=delta,
        sampling_rate=sampling_rate,
        discrete=discrete,
    )


@dataclass(frozen=True)
class Protection:
    """What one client does in one round so that what it sends reveals less about its rows.

    Built once per round. If the recipe asks for no noise at the client, every method does nothing.
    """

    run: RunConfig
    client: str
    round: int
    plan: ClientPlan | None
    """The client's mechanism; None if the recipe asks for no noise at the client."""

    @property
    def protects_rows(self) -> bool:
        """Whether the unit of protection is a single row of this client."""
        return self.plan is not None and self.plan.unit == "record"

    @property
    def protects_client(self) -> bool:
        """Whether the unit of protection is the client as a whole."""
        return self.plan is not None and self.plan.unit == "client"

    @classmethod
    def of(
        cls, run: RunConfig, *, client: str, round_: int, num_examples: int, count: int | None
    ) -> "Protection":
        """What the recipe asks of a client with this number of rows; see `plan_of_client`."""
        return cls(
            run, client, round_, plan_of_client(run, num_examples, client=client, count=count)
        )

    def begin(self, ledger: "Ledger") -> None:
        """Record the round's releases before they are made: a crash must not hide one.

        Raises:
            BudgetSpent: No budget is left for this round.
        """
        if self.plan is not None:
            seeded = self.run.privacy.noise == "seeded"
            ledger.begin(self.plan, client=self.client, round_=self.round, seeded=seeded)

    def lots(self) -> list[list[int]] | None:
        """The rows of every step, drawn in secret unless the noise is seeded.

        None if single rows are not protected: the client then trains on its plain stream.
        """
        if self.plan is None or not self.protects_rows:
            return None
        seeded = self.run.privacy.noise == "seeded"
        chance = generator(self.run.seed, "lots", self.client, self.round)
        return draw_lots(
            self.plan.num_examples,
            sampling_rate=self.plan.sampling_rate,
            num_lots=self.plan.num_lots,
            uniform=seeded_uniform(chance) if seeded else secure_uniform,
        )

    def guard(self) -> RowGuard | None:
        """What clips and noises every training step; None if single rows are not protected."""
        if self.plan is None or not self.protects_rows:
            return None
        return RowGuard(
            clip_norm=self.plan.clip_norm,
            noise_multiplier=self.plan.noise_multiplier,
            lot_size=self.plan.lot_size,
            noise=self.noise(),
            seeds=self._seeds(),
        )

    def _seeds(self) -> Seeds:
        """The source of the seeds from which rows draw their dropout masks."""
        chance = generator(self.run.seed, "masks", self.client, self.round)
        return seeded_seeds(chance) if self.run.privacy.noise == "seeded" else secure_seeds

    def hide_failure(self, after: AdapterState, before: AdapterState) -> AdapterState:
        """The adapter after training, or the one before if training ended in NaN or infinity.

        This applies only if the unit is the client: whether its training fails depends on its rows,
        and an error would reveal that without any noise. Otherwise `after` is returned unchanged.
        """
        if self.protects_client and not all(
            bool(t.isfinite().all()) for t in subtract(after, before).values()
        ):
            return before
        return after

    def protect(self, delta: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clip and noise the change of a client that is protected as a whole.

        With secure sums, the change comes back as it is: its noise is added to the whole numbers
        that are masked, by `Numbers.encode`.

        Raises:
            UpdateError: A tensor holds NaN or infinity.
        """
        if self.plan is None or not self.protects_client or self.plan.discrete:
            return delta
        return noised(
            delta,
            clip_norm=self.plan.clip_norm,
            noise_multiplier=self.plan.noise_multiplier,
            noise=self.noise(),
            who=f"client '{self.client}'",
        )

    def mechanism(self) -> dict[str, float]:
        """The round's releases, for adding up epsilons. Says nothing about the rows."""
        if self.plan is None:
            return {}
        return {key: float(getattr(self.plan, key)) for key in MECHANISM}

    def noise(self) -> Noise:
        """The source of this client's noise in this round."""
        if self.run.privacy.noise == "secure":
            return secure_noise
        return seeded_noise(generator(self.run.seed, "privacy", self.client, self.round))


MECHANISM = ("noise_multiplier", "sampling_rate", "num_lots")
"""The part of its plan that a client reports with every update."""


# --- the client's own ledger ------------------------------------------------------------------


@dataclass(frozen=True)
class Ledger:
    """A client's record of what it releases, and the limit that it sets."""

    path: Path
    """A file of the client. It may hold lines of many runs on the same rows, and lines of other
    clients that keep their state in the same folder."""
    run_id: str = ""
    """Distinguishes this run's lines from those of other runs."""
    epsilon: float | None = None
    """Maximum epsilon of all lines together; None: the recipe's plan is the only limit."""
    delta: float = 0.0
    """The delta of that epsilon."""

    def begin(self, plan: ClientPlan, *, client: str, round_: int, seeded: bool) -> None:
        """Record a round's releases before they are made.

        Raises:
            BudgetSpent: They would exceed the plan or what the client allows. Nothing is written or
                released.
        """
        before = [line for line in lines(self.path) if line.get("client", client) == client]
        now = {"run": self.run_id, "client": client, "round": round_, "seeded": seeded}
        now |= asdict(plan)
        if seeded and any(_same(line, now) for line in before):
            return  # the same noise again reveals nothing new
        mine = [line for line in before if line.get("run") == self.run_id]
        who = f"client '{client}', round {round_}"
        if len(mine) >= plan.num_rounds:
            raise BudgetSpent(
                f"{who}: its privacy budget is for {counted(plan.num_rounds, 'round')}, and it is "
                "spent.\n"
                "  Start a new run for more rounds, with a larger epsilon or more noise."
            )
        if self.epsilon is not None:
            cost = spent_in_all(released(_per_row([*before, now])), delta=self.delta).pld
            if not cost <= self.epsilon:
                # the numbers are only for this client's log: they are about other runs too
                numbers = ValueError(
                    f"epsilon would be {cost:.3f}; limits.epsilon is {self.epsilon:g}"
                )
                raise BudgetSpent(
                    f"{who}: its own privacy limit allows no further round.\n"
                    "  Only the people who run this client can raise limits.epsilon."
                ) from numbers
        write_down(self.path, now)


def spent_so_far(path: Path, *, delta: float) -> float:
    """Epsilon of everything in a client's ledger together, as `Ledger.begin` counts it."""
    return spent_in_all(released(_per_row(lines(path))), delta=delta).pld


def _per_row(ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert a ledger with both units to what it reveals about a single row.

    A release of the whole client hides whether there was a change or none. An additional row turns
    one clipped change into another, up to two clip norms away, so the noise multiplier for a row is
    half of the one in the ledger. A ledger with a single unit is returned unchanged.
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
    """Convert lines of a ledger, or rows of a run's metrics, to releases that can be added up.

    A line without numbers counts as the worst case: a release without noise.
    """
    return [
        Steps(
            float(line.get("noise_multiplier", 0.0)),
            int(line.get("num_lots", 1)),
            float(line.get("sampling_rate", 1.0)),
            bool(line.get("discrete", False)),
        )
        for line in ledger
    ]
