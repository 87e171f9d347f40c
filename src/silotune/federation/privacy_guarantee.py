"""What a private run guarantees, and the guard around its algorithm.

The guarantee is given before the first round and saved as privacy.json. Every release is a line of
a ledger, written before it is made: a resumed run continues the count, and nothing resets it.
"""

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from silotune.core.algorithm import Algorithm
from silotune.core.errors import ConfigError
from silotune.core.seeds import generator
from silotune.core.wording import counted
from silotune.federation.client_privacy import ClientPlan, plan_of_client
from silotune.federation.ledger import FILE as LEDGER
from silotune.federation.ledger import write_down
from silotune.federation.privacy_of_sums import guarantee_of_sums
from silotune.federation.run_folder import RunFolder
from silotune.federation.sampling import cohort_size
from silotune.privacy.accountant import Epsilon, noise_for, spent, spent_in_all, third_opinion
from silotune.privacy.client_level import guarded
from silotune.privacy.clip import split_noise
from silotune.privacy.noise import Noise, secure_noise, seeded_noise
from silotune.recipes.schema import RunConfig

FILE = "privacy.json"
Promise = dict[str, Any]
"""privacy.json; see `promise_of`."""


def promise_of(run: RunConfig, num_examples: Mapping[str, int]) -> Promise | None:
    """What a recipe guarantees if all its rounds are run; None without [privacy].

    Args:
        run: The recipe.
        num_examples: Number of training rows of every client; 0 if it is not known.

    Returns:
        unit, neighbours, sampling, released, mechanism, clip_norm, num_releases (rounds), delta,
        epsilon (by both accountants), noise, and versions. With noise at the server, also
        noise_multiplier, clipping, num_clients, num_planned (clients per round) and epsilon_replace
        (one client replaced by another: the sensitivity is twice as large). With noise at the
        clients, also `clients` with each client's plan and epsilon; the top-level epsilon is then
        the largest of these, and `epsilon_prv` is a third opinion on it (null if there is none, as
        for discrete noise); with secure sums, `sums` with what only sums reveal, see
        `guarantee_of_sums`.

    Raises:
        ConfigError: dp-accounting is missing, or the noise is too large for adaptive clipping.
    """
    cfg = run.privacy
    if cfg.unit == "none":
        return None
    make = _by_clients if cfg.is_at_client else _by_server
    own = make(run, num_examples)
    return {
        **own,
        "clip_norm": cfg.clip_norm,
        "delta": cfg.delta,
        "noise": cfg.noise,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES[cfg.unit]},
    }


UNIT_CLIENT = "client: all rows of one client, in all rounds together"
NEIGHBOURS = {
    "client, noise at the server": "the same run, except that one client never answers; the number "
    "of clients that a round plans to ask is public and the same in both",
    "client, noise at the client": "the same run, except that one client's changes are zero; that "
    "it takes part, and its number of rows, are public and the same in both",
    "record": "a client's rows with one row added or removed; its number of rows is public, and "
    "what follows from it (sampling rate, noise, steps, lot size, weight in the mean) is the same "
    "in both",
}
"""Which pairs of runs can hardly be distinguished. Everything that says so prints these words."""
LIBRARIES = {
    "client": ("silotune", "dp-accounting", "torch"),
    "record": ("silotune", "dp-accounting", "opacus", "torch"),
}


def _by_server(run: RunConfig, num_examples: Mapping[str, int]) -> Promise:
    cfg, releases = run.privacy, run.rounds
    planned, delta = cohort_size(run.sampling, len(num_examples)), _delta(run)
    z = cfg.noise_multiplier
    if z is None:
        assert cfg.target_epsilon is not None
        z = noise_for(target_epsilon=cfg.target_epsilon, num_releases=releases, delta=delta)
    if cfg.clipping == "adaptive":
        try:
            split_noise(z, num_clients=planned)
        except ValueError as error:
            raise ConfigError(f"privacy.clipping: {error}") from error
    cost = spent(noise_multiplier=z, num_releases=releases, delta=delta)
    return {
        "unit": UNIT_CLIENT,
        "neighbours": NEIGHBOURS["client, noise at the server"],
        "sampling": "none assumed: a client may be asked in every round",
        "released": "the adapter after every round, to everybody",
        "mechanism": "Gaussian noise on the sum of clipped changes, divided by the number of "
        "planned clients",
        "noise_multiplier": z,
        "clipping": cfg.clipping,
        "num_clients": len(num_examples),
        "num_planned": planned,
        "num_releases": releases,
        "epsilon": as_json(cost),
        "epsilon_replace": as_json(cost_if_replaced(z, releases, delta))["pld"],
    }


def _by_clients(run: RunConfig, num_examples: Mapping[str, int]) -> Promise:
    delta, clients, worst = _delta(run), dict[str, Any](), Epsilon(0.0, 0.0)
    third, plans = 0.0, dict[str, ClientPlan]()
    for name, count in sorted(num_examples.items()):
        if count == 0:
            continue
        plan = plan_of_client(run, count, client=name)
        assert plan is not None, "the noise is at the client"
        plans[name] = plan
        cost = spent_in_all([plan.steps()], delta=delta)
        clients[name] = {**asdict(plan), "epsilon": as_json(cost)}
        if cost.pld >= worst.pld:
            worst = cost
            # that accountant knows continuous noise only
            third = math.inf if plan.discrete else third_opinion(plan.steps(), delta=delta)
    return {
        **(_of_records(run) if run.privacy.unit == "record" else _of_clients(run)),
        "released": "what each client sends in every round, to everybody, including the server",
        "num_releases": min(run.rounds, run.privacy.max_participations or run.rounds),
        "clients": clients,
        "epsilon": as_json(worst),
        "epsilon_prv": _number(third),
        **of_sums_as_json(guarantee_of_sums(run, plans)),
    }


def _of_records(run: RunConfig) -> Promise:
    seeded = run.privacy.noise == "seeded"
    whence = "from the recipe's seed" if seeded else "at the client and revealed to nobody"
    return {
        "unit": "record: one row of one client, in all rounds together",
        "neighbours": NEIGHBOURS["record"],
        "sampling": "Poisson: every step takes each row with the same probability, drawn "
        f"independently, {whence}",
        "mechanism": "DP-SGD at each client: Gaussian noise on the sum of clipped row gradients in "
        "every step, divided by the expected number of rows",
    }


def _of_clients(run: RunConfig) -> Promise:
    discrete = run.secure_sum.kind == "masks"
    kind = "Discrete Gaussian noise on whole numbers" if discrete else "Gaussian noise"
    return {
        "unit": UNIT_CLIENT,
        "neighbours": NEIGHBOURS["client, noise at the client"],
        "sampling": "none assumed: a client may be asked in every round",
        "mechanism": f"{kind} at each client, on its own clipped change",
    }


def _delta(run: RunConfig) -> float:
    assert run.privacy.delta is not None, "recipes/contradictions.py requires it"
    return run.privacy.delta


def cost_if_replaced(noise_multiplier: float, num_releases: int, delta: float) -> Epsilon:
    """The epsilon if one client is replaced by another, which may move the sum twice as far."""
    return spent(noise_multiplier=noise_multiplier / 2, num_releases=num_releases, delta=delta)


def of_sums_as_json(found: Mapping[str, Any] | None) -> Promise:
    """What `guarantee_of_sums` has found, for a promise or a statement."""
    if found is None:
        return {}
    if "why_not" in found:
        return {"sums": dict(found)}
    return {"sums": {**found, "epsilon": as_json(found["epsilon"])}}


def as_json(cost: Epsilon) -> dict[str, float | None]:
    """As JSON. If there is no bound, the value is null."""
    return {"pld": _number(cost.pld), "rdp": _number(cost.rdp)}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def too_few_for(promise: Promise) -> str | None:
    """The units of which delta would allow one to be revealed completely; None if none are."""
    if "clients" not in promise:
        count = promise["num_clients"]
        return None if promise["delta"] < 1 / count else counted(count, "client")
    for name, own in promise["clients"].items():
        if own["unit"] == "record" and promise["delta"] >= 1 / own["num_examples"]:
            return f"{counted(own['num_examples'], 'row')} of client '{name}'"
    return None


def with_privacy(
    algorithm: Algorithm, run: RunConfig, folder: RunFolder, num_examples: Mapping[str, int]
) -> Algorithm:
    """Wrap the recipe's guard around the algorithm, and save the guarantee.

    If there is no guard at the server, the algorithm is returned unchanged: each client protects
    its own rows.

    Args:
        algorithm: The algorithm of the recipe.
        run: The recipe.
        folder: The run folder.
        num_examples: As in `promise_of`.

    Raises:
        ConfigError: See `promise_of`.
    """
    # each client plans from its own rows; what the server adds is guaranteed once
    promise = None if run.privacy.is_at_client else folder.read_json(FILE)
    if promise is None:
        promise = promise_of(run, num_examples)
        if promise is not None:
            folder.write_json(FILE, promise)
    if promise is None or run.privacy.is_at_client:
        return algorithm
    return guarded(
        algorithm,
        run.privacy,
        noise_multiplier=promise["noise_multiplier"],
        num_planned=promise["num_planned"],
        noise=lambda round_: _noise(run, round_),
        write_down=lambda release: write_down(folder.path / LEDGER, asdict(release)),
    )


def _noise(run: RunConfig, round_: int) -> Noise:
    if run.privacy.noise == "secure":
        return secure_noise
    return seeded_noise(generator(run.seed, "privacy", round_))
