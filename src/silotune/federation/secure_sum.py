"""Secure sums in a run: what a client sends instead of its change, and what is made of the sum.

The masks are those of `privacy/secure_sum`. Here changes become words and the sum of words becomes
one change: their weighted mean, which a linear algorithm treats like the update of one client.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from silotune.core.algorithm import Algorithm, expected_layout
from silotune.core.errors import ConfigError, UpdateError
from silotune.core.seeds import generator
from silotune.core.tree import size_bytes
from silotune.core.types import (
    AdapterState,
    Change,
    Layout,
    ServerState,
    TensorSpec,
    Update,
    Updates,
)
from silotune.federation.client_privacy import ClientPlan, plan_of_client
from silotune.privacy.discrete_gaussian import secure_words, seeded_words
from silotune.privacy.noise import secure_uniform, seeded_uniform
from silotune.privacy.secure_sum.noised import encode_noised
from silotune.privacy.secure_sum.ring import Ring, Uniform, Words
from silotune.recipes.schema import RunConfig

TENSOR = "words"
"""The only tensor of a masked update: all numbers of the change in name order, then its weight."""
CUT = "numbers_cut"
"""The metric that counts the numbers of a change beyond `secure_sum.range`."""


class Sums(Protocol):
    """What a runtime offers: it carries the messages by which a sum is opened."""

    def open(self, round_: int, survivors: Sequence[str], total: Words) -> tuple[Words, int]:
        """The sum of the survivors' words, and the number of clients that the round began with.

        Args:
            round_: The round.
            survivors: Clients whose masked words are in the total.
            total: Their sum in the ring.
        """
        ...


@dataclass(frozen=True)
class Numbers:
    """How the changes of a round become words, and their sum a change."""

    run: RunConfig
    num_clients: int
    """Clients that the round begins with."""

    @property
    def ring(self) -> Ring:
        """The ring of the numbers, which are multiplied by the client's weight."""
        cfg = self.run.secure_sum
        assert cfg.range is not None, "recipes/secure_sums.py requires it"
        weight = cfg.max_examples if self._by_rows else 1
        return Ring(cfg.range * weight, self.num_clients)

    @property
    def _by_rows(self) -> bool:
        return self.run.algorithm.weights == "examples"

    def encode(self, update: Update) -> tuple[Words, int]:
        """An update's words, and how many numbers were cut.

        Rounding draws from the run's seed, so that a resumed run has the same bits; next to noise
        that nobody may predict, nobody may predict the rounding either. A client that is protected
        as a whole gets its noise here.

        Raises:
            UpdateError: The client has more rows than `secure_sum.max_examples`, or noise needs
                finer steps.
        """
        plan = plan_of_client(self.run, update.num_examples, client=update.client)
        if plan is not None and plan.discrete:
            weight = weight_of(self.run, update)
            words, cut = self._with_noise(flat(update.delta), weight, update, plan)
        else:
            values, weight, cut = within_range(self.run, update)
            words, _ = self.ring.encode(values * weight, self._chances(update))
        return np.append(words, np.uint32(weight)), cut

    def _with_noise(
        self, values: NDArray[np.float64], weight: int, update: Update, plan: ClientPlan
    ) -> tuple[Words, int]:
        """The change of a client that is protected as a whole; its weight multiplies the noise."""
        chance = generator(self.run.seed, "privacy", update.client, update.round)
        return encode_noised(
            values * weight,
            self.ring,
            clip_norm=plan.clip_norm * weight,
            noise_multiplier=plan.noise_multiplier,
            uniform=self._chances(update),
            draw=secure_words if self._is_secret else seeded_words(chance),
        )

    @property
    def _is_secret(self) -> bool:
        return self.run.privacy.unit != "none" and self.run.privacy.noise == "secure"

    def _chances(self, update: Update) -> Uniform:
        own = seeded_uniform(generator(self.run.seed, "rounding", update.client, update.round))
        draw = secure_uniform if self._is_secret else own
        return lambda count: draw(count).numpy()

    def decode(self, total: Words, num_survivors: int) -> "Opened":
        """The opened sum of the survivors' words as numbers."""
        values, step = self.ring.decode(total[:-1]), self.ring.step
        return Opened(values, int(total[-1]), num_survivors, step)


@dataclass(frozen=True)
class Opened:
    """What a server learns in a round."""

    values: NDArray[np.float64]
    """The sum of the changes, each times its weight, in name order."""
    weight: int
    """The sum of the weights."""
    num_clients: int
    """Clients in the sum."""
    step: float
    """By how much encoding may have moved a number of one client."""


def weight_of(run: RunConfig, update: Update) -> int:
    """What a client's change is multiplied by before it is hidden.

    Raises:
        UpdateError: The client has more rows than `secure_sum.max_examples`.
    """
    most = run.secure_sum.max_examples
    weight = update.num_examples if run.algorithm.weights == "examples" else 1
    if weight > most:
        raise UpdateError(
            f"client '{update.client}', round {update.round}: {weight} training rows, more than "
            f"secure_sum.max_examples = {most}.\n"
            "  Raise it, or set algorithm.weights = 'uniform'."
        )
    return weight


def within_range(run: RunConfig, update: Update) -> tuple[NDArray[np.float64], int, int]:
    """A change's numbers, cut to `secure_sum.range`; its weight; and how many were cut.

    Raises:
        UpdateError: See `weight_of`.
    """
    weight, values, limit = weight_of(run, update), flat(update.delta), run.secure_sum.range
    assert limit is not None, "recipes/secure_sums.py requires it"
    cut = int(np.count_nonzero(np.abs(values) > limit))
    return np.clip(values, -limit, limit), weight, cut


def flat(delta: AdapterState) -> NDArray[np.float64]:
    """All numbers of a change, in name order."""
    parts = [delta[name].detach().cpu().double().reshape(-1) for name in sorted(delta)]
    return torch.cat(parts).numpy()


def as_sent(update: Update, hidden: AdapterState, cut: int) -> Update:
    """The update with what hides its change, whose norm nobody is told."""
    metrics = {**update.metrics, CUT: cut}
    return replace(update, delta=hidden, bytes_up=size_bytes(hidden), metrics=metrics)


def as_tensors(words: Words) -> dict[str, torch.Tensor]:
    """Masked words as they travel."""
    return {TENSOR: torch.from_numpy(words.view(np.int32))}


def count_of(algorithm: Algorithm, state: ServerState) -> int:
    """How many numbers a client's change has in the next round."""
    specs = expected_layout(algorithm, state).values()
    return sum(math.prod(s for s in spec.shape if s is not None) for spec in specs)


def mean_of(run: RunConfig, opened: Opened, layout: Layout) -> dict[str, torch.Tensor]:
    """The weighted mean of the changes, float32.

    Args:
        run: The recipe.
        opened: The sum.
        layout: Of a change before it was hidden.

    Raises:
        UpdateError: The sum is larger than clients that keep to the protocol could make it.
    """
    cfg, weight, num = run.secure_sum, opened.weight, opened.num_clients
    most = num * (cfg.max_examples if run.algorithm.weights == "examples" else 1)
    assert cfg.range is not None
    largest = weight * cfg.range + num * opened.step
    if not num <= weight <= most or np.abs(opened.values).max(initial=0) > largest:
        raise UpdateError(
            "the sum of a round is larger than its clients' changes can be, so at least one "
            "client does not keep to the protocol. A secure sum cannot say which.\n"
            "  The last checkpoint is kept. Ask the clients for their versions, then resume."
        )
    shapes = {n: tuple(s for s in layout[n].shape if s is not None) for n in sorted(layout)}
    sizes = [*map(math.prod, shapes.values())]
    parts = torch.from_numpy(opened.values / weight).float().split(sizes)
    return {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def whole(algorithm: Algorithm, run: RunConfig, state: ServerState, opened: Opened) -> Change:
    """What a linear algorithm makes of the sum: that of one client, which holds all weight.

    Raises:
        UpdateError: See `mean_of`.
    """
    only = Update(
        client=f"the sum over {opened.num_clients} clients",
        round=state.round + 1,
        delta=mean_of(run, opened, expected_layout(algorithm, state)),
        num_examples=opened.weight,
        metrics={},
        settings=dict(algorithm.local.settings),
    )
    return algorithm.combine(state, [only])


def as_words(algorithm: Algorithm) -> Algorithm:
    """The algorithm with updates of the shape that masked ones have."""

    def layout(state: ServerState, client: str | None) -> Layout:  # noqa: ARG001
        return {TENSOR: TensorSpec((count_of(algorithm, state) + 1,), torch.int32)}

    return replace(algorithm, layout=layout)


def summed(algorithm: Algorithm, run: RunConfig, sums: Sums) -> Algorithm:
    """An algorithm that learns the sum of the changes only.

    Args:
        algorithm: Linear, and nothing but the delta is sent.
        run: The recipe.
        sums: Opens the sum of a round.
    """
    check_sums_suffice(algorithm)

    def combine(state: ServerState, updates: Updates) -> Change:
        total, survivors = np.zeros(0, dtype=np.uint32), list[str]()
        for update in updates:
            words = update.delta[TENSOR].numpy().view(np.uint32)
            total = words + total if len(survivors) else words.copy()
            survivors.append(update.client)
        words, num_clients = sums.open(state.round + 1, survivors, total)
        opened = Numbers(run, num_clients).decode(words, len(survivors))
        return whole(algorithm, run, state, opened)

    return replace(as_words(algorithm), combine=combine)


def check_sums_suffice(algorithm: Algorithm) -> None:
    """What the recipe's check has made sure of."""
    assert algorithm.linear, "only a weighted sum of changes can do without single ones"
    assert algorithm.layout is None, "all changes have the same shape"
    assert algorithm.extra_layout is None, "what is sent besides the delta is not hidden"


def check_cohort(run: RunConfig, num_clients: int) -> None:
    """Refuse rounds of too few clients for `secure_sum.min_cohort`, or of too many for the ring.

    Raises:
        ConfigError: Says how many are asked.
    """
    smallest = run.secure_sum.min_cohort
    if num_clients < smallest:
        raise ConfigError(
            f"a round asks {num_clients} clients, and secure_sum.min_cohort is {smallest}.\n"
            "  Ask more clients per round, or lower it; 3 is the least."
        )
    if run.secure_sum.kind == "masks":
        _ = Numbers(run, num_clients).ring


def num_numbers(algorithm: Algorithm, adapter: Mapping[str, torch.Tensor], round_: int) -> int:
    """How many numbers a client's change has in a round."""
    rule = algorithm.local
    sent = [t for n, t in adapter.items() if rule.trains(n, round_) and not rule.personal(n)]
    return sum(tensor.numel() for tensor in sent)
