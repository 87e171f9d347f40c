"""Replays of the guard: does the released clip norm say more about a client than is charged?

With an adaptive norm, a round releases two sums. Canaries among many cannot be distinguished by the
second, because all of them move the same norm. So the guard is run alone, many times, with a single
canary that a coin puts in or leaves out, and without a model.

The attacker sees the change along the canary's direction and the next norm, and scores both by
their likelihood ratio. If a mechanism is mu-GDP, no test has `phi(1 - false positives) - phi(false
negatives)` above mu (Dong, Roth and Su 2022, "Gaussian Differential Privacy", arXiv:1905.02383); a
round of noise multiplier z claims mu = 1 / z. Upper bounds on both rates then give a lower bound on
mu (Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning",
arXiv:2302.07956).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.algorithm import Algorithm
from silotune.core.types import ServerState, Update
from silotune.core.wording import counted
from silotune.privacy.base import PrivacyConfig
from silotune.privacy.client_level import PURPOSE, guarded
from silotune.privacy.clip import split_noise
from silotune.privacy.noise import Noise, secure_noise
from silotune.workflows.audit.canary_clients import toss

NUM_REPLAYS, CONFIDENCE = 1000, 0.99


@dataclass(frozen=True)
class Replays:
    """What the replays show, next to what is claimed."""

    num_replays: int
    num_rounds: int
    """Rounds of one replay: the recipe's, or as many as make a correct mechanism reach mu = 2."""
    noise_multiplier: float
    """The claimed one, of the release of a round."""
    noise_multiplier_at_most: float | None
    """The upper bound that the attack shows; None if it shows none."""
    is_refuted: bool


def replay(
    cfg: PrivacyConfig,
    *,
    noise_multiplier: float,
    num_planned: int,
    rounds: int,
    seed: int,
    num_replays: int = NUM_REPLAYS,
    noise: Noise = secure_noise,
) -> Replays:
    """Attack the guard of a recipe with an adaptive norm.

    Args:
        cfg: [privacy], with clipping = "adaptive".
        noise_multiplier: z, above 0.
        num_planned: Number of clients that a round plans to ask.
        rounds: Rounds of the recipe.
        seed: Seeds the coins.
        num_replays: Half of them choose the threshold, the other half are counted.
        noise: Source of the noise, which must not begin again in every replay.
    """
    algorithm = guarded(
        fedavg(FedAvgConfig(weights="uniform")),
        cfg,
        noise_multiplier=noise_multiplier,
        num_planned=num_planned,
        noise=lambda round_: noise,
        write_down=lambda release: None,
    )
    num_rounds = min(rounds, math.ceil((2 * noise_multiplier) ** 2))
    of_change, of_bits = split_noise(noise_multiplier, num_clients=num_planned)
    weights = of_change**-2, 0.5 * of_bits**-2
    coins = toss(num_replays, seed)
    scores = [
        _score(algorithm, cfg, coin, num_planned, num_rounds, weights=weights) for coin in coins
    ]
    mu = _mu_at_least(coins, scores)
    most = math.sqrt(num_rounds) / mu if mu > 0 else None
    refuted = most is not None and most < noise_multiplier
    return Replays(num_replays, num_rounds, noise_multiplier, most, refuted)


def _score(
    algorithm: Algorithm,
    cfg: PrivacyConfig,
    is_in: bool,
    num_planned: int,
    num_rounds: int,
    *,
    weights: tuple[float, float],
) -> float:
    """The log likelihood ratio of all that one replay releases, up to a constant."""
    zero = {"canary": torch.zeros(1)}
    state, score = ServerState(0, zero, algorithm.init(zero, num_planned)), 0.0
    for round_ in range(1, num_rounds + 1):
        norm = float(state.extra[PURPOSE]["clip_norm"])
        # as long as the norm allows: both sums move as far as they can
        mine = Update("canary", round_, {"canary": torch.tensor([norm * (1 - 1e-6)])}, 1, {})
        absent = Update("other", round_, zero, 1, {})
        change = algorithm.combine(state, [mine, absent] if is_in else [absent])
        after = float(change.extra[PURPOSE]["clip_norm"])
        moved = float(change.delta["canary"]) * num_planned / norm
        bits = num_planned * (cfg.quantile - math.log(after / norm) / cfg.clip_lr - 0.5)
        score += weights[0] * moved + weights[1] * bits
        state = algorithm.step(state, change)
    return score


def _mu_at_least(coins: Sequence[bool], scores: Sequence[float]) -> float:
    """A lower bound on mu; the threshold comes from the first half, the counts from the second."""
    stats: Any = import_module("scipy.stats")
    half = len(coins) // 2
    threshold = statistics.median(scores[:half])

    def at_most(wrong: int, total: int) -> float:
        """Clopper and Pearson 1934; both rates together hold with the confidence."""
        error = (1 - CONFIDENCE) / 2
        return 1.0 if wrong == total else float(stats.beta.ppf(1 - error, wrong + 1, total - wrong))

    pairs = list(zip(coins[half:], scores[half:], strict=True))
    num_in = sum(coin for coin, _ in pairs)
    false_negatives = at_most(sum(c and s <= threshold for c, s in pairs), num_in)
    false_positives = at_most(sum(not c and s > threshold for c, s in pairs), half - num_in)
    return float(stats.norm.ppf(1 - false_positives) - stats.norm.ppf(false_negatives))


def norm_lines(found: Mapping[str, Any]) -> list[str]:
    """The replays in words; empty if the clip norm is not released.

    Args:
        found: audit.json.
    """
    if (own := found.get("released_norm")) is None:
        return []
    most = own["noise_multiplier_at_most"]
    shown = "shows nothing" if most is None else f"shows a noise multiplier of at most {most:.3f}"
    verdict = "REFUTED" if own["is_refuted"] else "consistent with the claim"
    return [
        f"released norm: {own['num_replays']} replays of {counted(own['num_rounds'], 'round')}, "
        f"one canary each, scored by change and norm together: {shown}, with {CONFIDENCE:.0%} "
        f"confidence; claimed: {own['noise_multiplier']:g}. {verdict}"
    ]
