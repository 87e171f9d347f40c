"""What secure sums add to a guarantee: the noise of all clients hides each of them.

Each client adds its own noise, and its guarantee against everyone holds without trust in anyone. If
only sums are ever opened, whoever reads them faces the noise of the other clients as well: the sum
of n Gaussians has n times the variance, while one row still moves it no further. Kairouz et al.
2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation",
arXiv:2102.06387.

Clients that are protected as a whole add discrete Gaussian noise to whole numbers, as in the paper.
A sum of n such noises is not one of the same kind, but nearly: its Renyi divergences are those of a
Gaussian of n times the variance, up to a term of `10 n exp(-pi^2 sigma^2)` for every number
(Proposition 14, with sigma in steps of the ring). At `COARSE` steps that is below 1e-400, so it is
not added.

Where rows are protected, the noise is added in training, as a continuous Gaussian that is rounded
to the ring afterwards. The account takes it as continuous, so it is given only where the ring's
steps are `FINE` times smaller than the noise.

In both cases nothing may be cut: the range has room for `TAIL` standard deviations.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from silotune.core.wording import counted
from silotune.federation.client_privacy import ClientPlan
from silotune.federation.sampling import cohort_size
from silotune.federation.secure_sum import Numbers
from silotune.privacy.accountant import Epsilon, spent_in_all
from silotune.privacy.secure_sum.ckks import KEYS_NOTE
from silotune.privacy.secure_sum.noised import TAIL
from silotune.recipes.schema import RunConfig

COARSE, FINE = 10, 1000
"""Steps of the ring in a standard deviation of the noise, at least: discrete, and rounded."""


def guarantee_of_sums(run: RunConfig, plans: Mapping[str, ClientPlan]) -> dict[str, Any] | None:
    """What whoever reads the opened sums, and nothing else, can tell; None without secure sums.

    Args:
        run: The recipe, with noise at the clients.
        plans: Each client's mechanism.

    Returns:
        Either why_not, in words, or: num_noisy (clients in the smallest sum whose noise the reader
        does not know), colluding, `clients` (each one's noise multiplier in the sum, and its
        guaranteed epsilon) and epsilon, the largest of these as a pair of both
        accountants' numbers.
    """
    if not run.secure_sum.is_on:
        return None
    if run.secure_sum.kind == "ckks":
        return {"why_not": KEYS_NOTE}
    asked = cohort_size(run.sampling, len(plans))
    # what clients insist on themselves; the quorum is the server's word
    noisy = run.secure_sum.min_cohort - run.secure_sum.colluding
    if reason := _why_not(run, plans, asked, noisy):
        return {"why_not": reason}
    assert run.privacy.delta is not None
    own: dict[str, Any] = {}
    worst = Epsilon(0.0, 0.0)
    # that of the client with the least noise counts for all
    least = min(plan.noise_multiplier * _size(plan) for plan in plans.values())
    for name, plan in sorted(plans.items()):
        z, alone = math.sqrt(noisy) * least / _size(plan), plan.steps()
        cost = spent_in_all([replace(alone, noise_multiplier=z)], delta=run.privacy.delta)
        own[name] = {"noise_multiplier": z, "epsilon": cost.pld}
        worst = cost if cost.pld >= worst.pld else worst
    colluding = run.secure_sum.colluding
    return {"num_noisy": noisy, "colluding": colluding, "clients": own, "epsilon": worst}


def _size(plan: ClientPlan) -> float:
    """How far one unit moves what its client releases, before the learning rate."""
    return plan.clip_norm / (plan.lot_size if plan.unit == "record" else 1.0)


def _why_not(run: RunConfig, plans: Mapping[str, ClientPlan], asked: int, noisy: int) -> str | None:
    """Why the noise of several clients does not add up to one Gaussian; None if it does."""
    records = run.privacy.unit == "record"
    if run.algorithm.weights != "uniform":
        return "algorithm.weights is not 'uniform', so clients add noise of different weights"
    if records and any(plan.num_lots != 1 for plan in plans.values()):
        return "a round has several steps, and each depends on the noise of those before"
    if records and run.train.optimizer != "sgd":
        return f"train.optimizer is '{run.train.optimizer}', not 'sgd', which keeps a Gaussian one"
    if noisy < 2:
        return (
            f"of secure_sum.min_cohort clients in a sum, {counted(max(noisy, 0), 'client')} would "
            "be left whose noise nobody knows"
        )
    if run.privacy.noise == "seeded":
        return "the noise is seeded"
    first = run.train.lr if records else 1.0
    last = first if run.train.schedule == "constant" or not records else run.train.lr_min
    noise = [plan.noise_multiplier * _size(plan) for plan in plans.values()]
    # a step may happen to draw all rows of a client, with gradients that point the same way
    largest = max(plan.clip_norm / plan.sampling_rate for plan in plans.values())
    widest = first * (largest + TAIL * max(noise))
    assert run.secure_sum.range is not None
    if widest > run.secure_sum.range:
        return f"secure_sum.range would cut some of the noise; {widest:.3g} is wide enough"
    least = FINE if records else COARSE
    if last * min(noise) < least * Numbers(run, asked).ring.step:
        return "the steps of secure_sum.range are too coarse for noise this small"
    return None
