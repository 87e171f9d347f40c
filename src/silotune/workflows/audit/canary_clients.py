"""Canaries: planted clients that are in or out by a coin, so that a guess can be right or wrong.

Whether a change that only the auditor knows went into the sum must not show in what is released.
Canary clients take part as any client does, so an audit sees what the guard does and not what it
says: clipping, weights, denominator and noise.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", Algorithm 1.
arXiv:2305.08846. That canaries are clients with random directions is Andrew et al. 2023, "One-shot
Empirical Privacy Estimation for Federated Learning", arXiv:2302.03098; their estimate by cosines
bounds nothing, so it is not used.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
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
"""How many clip norms a canary's change is long: that it is scaled down, over all its tensors
together, is part of what is audited."""
NUMBERS = ("train_loss", "num_steps", "num_tokens", "num_targets", "seconds", "seconds_training")
"""What clients report; a canary has trained on nothing."""


def toss(count: int, seed: int) -> tuple[bool, ...]:
    """A fair coin for each canary: whether it is in. No mechanism draws from this generator."""
    drawn = torch.randint(2, (count,), generator=generator(seed, "audit", "coins"))
    return tuple(bool(coin) for coin in drawn)


def num_guesses(num_canaries: int) -> int:
    """How many canaries are guessed, known before any score is: five roots of their number, even.

    Who guesses all is wrong on those in the middle; who guesses few has too few to be sure: even if
    all r are right, the bound is the logit of 0.05^(1/r). For Gaussian noise with signal to noise
    ratios of 0.5 to 4 the best share was a third to a half of 100 canaries, a fifth to a third of
    400, and a tenth to a fifth of 1000 and 2000. This gives 50, 100, 158 and 222.
    """
    return min(num_canaries, math.isqrt(25 * num_canaries)) // 2 * 2


@dataclass(frozen=True)
class Guesses:
    """What an auditor says of canaries, and how often it is right."""

    said: tuple[bool | None, ...]
    """In, out, or no guess, for each canary."""
    num_guesses: int
    num_correct: int


def guess(coins: Sequence[bool], scores: Sequence[float], num_guesses: int) -> Guesses:
    """Say of the highest scores that they are in, and of as many of the lowest that they are out.

    Args:
        coins: Which canaries are in: looked at to count what is right, and for nothing else.
        scores: Of each canary; higher says in.
        num_guesses: How many to guess, even; not chosen by looking at scores.
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
"""(change, client, round) -> what leaves the client, clipped and noised by itself."""


class CanaryClients:
    """Fulfils `Clients`: those of `inner`, and canaries among them.

    A canary that is in sends the same secret random direction in every round, one that is out sends
    zeros: the neighbours of the promise. None is scored, and none has rows.

    Args:
        inner: The real ones.
        count: How many canaries join them.
        clip_norm: Of the guard; what a canary sends is `SIZE` times as long.
        layout: What an update must look like.
        settings: Of the local rule, which every update echoes.
        seed: Names the coins and the directions.
        protect: What a client does to its change before it is sent; then the attack is the
            server's, which sees each client's own. None: the noise is the server's, and the attack
            is that of whoever sees the adapters.
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
        self._shapes = {key: _whole(layout[key]) for key in sorted(layout)}
        self._layout, self._settings, self._seed = layout, settings, seed

    def names(self) -> Sequence[str]:
        """All clients, sorted."""
        return sorted([*self.inner.names(), *self.canaries])

    def train(self, cohort: Sequence[str], broadcast: Broadcast) -> Iterator[Arrival]:
        """The real clients' updates, and the canaries'."""
        real = [name for name in cohort if name not in self._place]
        if real:
            yield from self.inner.train(real, broadcast)
        for name in cohort:
            if name in self._place:
                yield self._update(name, broadcast)

    def evaluate(self, cohort: Sequence[str], broadcast: Broadcast) -> Iterator[Score | Failure]:
        """The real clients' scores."""
        yield from self.inner.evaluate([n for n in cohort if n not in self._place], broadcast)

    def scores(self, first: AdapterState, last: AdapterState) -> list[float]:
        """Of every canary: what the rounds released along its direction, in clip norms.

        Of all together that is how far the adapter moved, as a canary's direction stays.
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
        """Of length 1, all tensors in a row; drawn anew each time, for many fill the memory."""
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


def _whole(spec: TensorSpec) -> tuple[int, ...]:
    shape = tuple(size for size in spec.shape if size is not None)
    assert len(shape) == len(spec.shape), "canaries have one rank"
    return shape


def _free_names(count: int, taken: Collection[str]) -> list[str]:
    word = "canary"
    while any(name.startswith(word) for name in taken):
        word = f"_{word}"
    return [f"{word}-{n:05d}" for n in range(count)]
