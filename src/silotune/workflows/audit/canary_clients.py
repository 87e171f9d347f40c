"""Canaries: planted clients that a coin puts in or leaves out, so a guess can be right or wrong.

The released values must not reveal whether a change that only the auditor knows is in the sum.
Canary clients take part like any client, so an audit tests what the guard does (clipping, weights,
denominator and noise) and not what it says.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", Algorithm 1.
arXiv:2305.08846. Canary clients with random directions are from Andrew et al. 2023, "One-shot
Empirical Privacy Estimation for Federated Learning", arXiv:2302.03098. Their estimate from cosines
is not a bound, so it is not used.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from silotune.core.seeds import generator
from silotune.core.tree import l2_norm, size_bytes
from silotune.core.types import (
    AdapterState,
    Arrival,
    Broadcast,
    Clients,
    Failure,
    Layout,
    Score,
    Settings,
    TensorSpec,
    Update,
)

SIZE = 10.0
"""The norm of a canary's change, in clip norms. The audit also tests that such a change is scaled
down over all its tensors together."""
NUMBERS = ("train_loss", "num_steps", "num_tokens", "num_targets", "seconds", "seconds_training")
"""What clients report; a canary reports zeros because it has not trained."""


def toss(count: int, seed: int) -> tuple[bool, ...]:
    """Toss a fair coin for each canary: is it in? No mechanism draws from this generator."""
    drawn = torch.randint(2, (count,), generator=generator(seed, "audit", "coins"))
    return tuple(bool(coin) for coin in drawn)


def num_guesses(num_canaries: int) -> int:
    """How many canaries to guess, fixed before any score is known: 5 sqrt(number), rounded to even.

    Guessing all includes wrong guesses on the uncertain ones in between. Guessing few gives little
    certainty: even if all r guesses are right, the bound is the logit of 0.05^(1/r). For Gaussian
    noise with signal-to-noise ratios of 0.5 to 4, the best share was a third to a half of 100
    canaries, a fifth to a third of 400, and a tenth to a fifth of 1000 and 2000. This function
    gives 50, 100, 158 and 222.
    """
    return min(num_canaries, math.isqrt(25 * num_canaries)) // 2 * 2


@dataclass(frozen=True)
class Guesses:
    """An auditor's guesses about canaries, and how many are right."""

    said: tuple[bool | None, ...]
    """In, out, or no guess, for each canary."""
    num_guesses: int
    num_correct: int


def guess(coins: Sequence[bool], scores: Sequence[float], num_guesses: int) -> Guesses:
    """Guess that the highest scores are in, and that as many of the lowest are out.

    Args:
        coins: Which canaries are in; used only to count right guesses.
        scores: The score of each canary; a higher score means in.
        num_guesses: How many to guess, an even number that does not depend on the scores.
    """
    order = np.argsort(np.asarray(scores, float), kind="stable").tolist()
    half = num_guesses // 2
    said: list[bool | None] = [None] * len(coins)
    for n in order[:half]:
        said[n] = False
    for n in order[len(order) - half :]:
        said[n] = True
    right = sum(own is not None and own == coin for own, coin in zip(said, coins, strict=True))
    return Guesses(tuple(said), 2 * half, right)


Protect = Callable[[dict[str, Tensor], str, int], dict[str, Tensor]]
"""(change, client, round) -> what leaves the client, after its own clipping and noise."""


class CanaryClients:
    """Implements `Clients`: the clients of `inner`, with canaries among them.

    A canary that is in sends the same secret random direction in every round. One that is out never
    answers if the noise is at the server, and so is not asked; otherwise it sends zeros. These two
    are neighbours in the guarantee. Canaries have no rows and are not scored.

    Args:
        inner: The real clients.
        count: The number of canaries.
        clip_norm: The guard's clip norm; a canary's change has `SIZE` times this norm.
        layout: What an update must look like.
        settings: The local rule's settings, which every update echoes.
        seed: Seeds the coins and the directions.
        protect: What a client does to its change before sending it; then the attacker is the
            server, which sees each client's change. None: the server adds the noise, and the
            attacker is anyone who sees the adapters.
    """

    def __init__(
        self,
        inner: Clients,
        *,
        count: int,
        clip_norm: float,
        layout: Layout,
        settings: Settings,
        seed: int,
        protect: Protect | None = None,
    ) -> None:
        self.inner = inner
        self._protect = protect
        self._seen = [0.0] * count
        self.coins = toss(count, seed)
        self.canaries = _free_names(count, inner.names())
        self._place = {name: n for n, name in enumerate(self.canaries)}
        self._norm = SIZE * clip_norm
        self._shapes = {key: _fixed_shape(layout[key]) for key in sorted(layout)}
        self._layout, self._settings, self._seed = layout, settings, seed

    def names(self) -> Sequence[str]:
        """All clients that answer, sorted."""
        pairs = zip(self.canaries, self.coins, strict=True)
        present = [name for name, coin in pairs if coin or self._protect is not None]
        return sorted([*self.inner.names(), *present])

    def num_rows(self) -> Mapping[str, Mapping[str, int]]:
        """The real clients' rows, and one for each canary: the weight of its update."""
        canaries = {name: {"num_train": 1, "num_eval": 0} for name in self.canaries}
        return {**self.inner.num_rows(), **canaries}

    def train(self, messages: Mapping[str, Broadcast]) -> Iterator[Arrival]:
        """The real clients' updates, and the canaries'."""
        real = {name: sent for name, sent in messages.items() if name not in self._place}
        if real:
            yield from self.inner.train(real)
        for name, broadcast in messages.items():
            if name in self._place:
                yield self._update(name, broadcast)

    def evaluate(self, messages: Mapping[str, Broadcast]) -> Iterator[Score | Failure]:
        """The real clients' scores."""
        real = {name: sent for name, sent in messages.items() if name not in self._place}
        yield from self.inner.evaluate(real)

    def scores(self, first: AdapterState, last: AdapterState) -> list[float]:
        """For every canary: what the rounds released along its direction, in clip norms.

        Without `protect`, this is how far the adapter moved, because a canary's direction is fixed.
        """
        if self._protect is not None:
            return list(self._seen)
        moved = torch.cat(
            [(last[n].double() - first[n].double()).reshape(-1) for n in self._shapes]
        )
        return [
            float(moved @ self._direction(n).double()) / (self._norm / SIZE)
            for n in range(len(self.coins))
        ]

    def _direction(self, n: int) -> Tensor:
        """A vector of length 1 over all tensors; drawn again each time to save memory."""
        gen = generator(self._seed, "audit", "direction", n)
        drawn = torch.randn(sum(map(math.prod, self._shapes.values())), generator=gen)
        return drawn / l2_norm({"all": drawn})

    def _update(self, name: str, broadcast: Broadcast) -> Update:
        n = self._place[name]
        sent = self._direction(n) * (self._norm if self.coins[n] else 0.0)
        delta, at = dict[str, Tensor](), 0
        for key, shape in self._shapes.items():
            size = math.prod(shape)
            delta[key] = sent[at : at + size].reshape(shape).to(self._layout[key].dtype)
            at += size
        if self._protect is not None:
            delta = self._protect(delta, name, broadcast.round)
            released = torch.cat([delta[key].double().reshape(-1) for key in self._shapes])
            seen = float(released @ self._direction(n).double())
            self._seen[n] += seen / (self._norm / SIZE)
        return Update(
            client=name,
            round=broadcast.round,
            delta=delta,
            num_examples=1,
            metrics=dict.fromkeys(NUMBERS, 0.0),
            settings=dict(self._settings),
            bytes_up=size_bytes(delta),
        )


def _fixed_shape(spec: TensorSpec) -> tuple[int, ...]:
    shape = tuple(size for size in spec.shape if size is not None)
    assert len(shape) == len(spec.shape), "canaries have one rank"
    return shape


def _free_names(count: int, taken: Collection[str]) -> list[str]:
    word = "canary"
    while any(name.startswith(word) for name in taken):
        word = f"_{word}"
    return [f"{word}-{n:05d}" for n in range(count)]
