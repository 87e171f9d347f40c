"""What a private run promises, what it has released, and the statement that anyone can check.

The promise is made before the first round and written down as privacy.json. Every release is a line
of a ledger, written before it is made: a resumed run counts on, and nothing resets it.
"""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from silotune.algorithms.base import Algorithm
from silotune.config import RunConfig
from silotune.disk import write_json
from silotune.errors import ConfigError
from silotune.ledger import FILE as LEDGER
from silotune.ledger import lines, write_down
from silotune.own_privacy import own_plan, released
from silotune.privacy.accountant import Epsilon, noise_for, spent, spent_in_all, third_opinion
from silotune.privacy.client_level import guarded
from silotune.privacy.clip import split_noise
from silotune.privacy.gaussian import Noise, secure_noise, seeded_noise
from silotune.sampling import cohort_size
from silotune.seeds import generator
from silotune.store import RunFolder
from silotune.types import BUDGET_SPENT

FILE = "privacy.json"
Promise = dict[str, Any]
"""privacy.json; see `promise_of`."""


def promise_of(run: RunConfig, num_examples: Mapping[str, int]) -> Promise | None:
    """What a recipe promises, if all its rounds are done; None without [privacy].

    Args:
        run: The recipe.
        num_examples: Train rows of every client; 0 where they are not known.

    Returns:
        unit, neighbours, sampling, released, mechanism, clip_norm, num_releases (rounds), delta,
        epsilon (by both accountants), noise, and versions. With noise at the server also
        noise_multiplier, clipping, num_clients, num_planned (clients a round) and epsilon_replace
        (one client replaced by another: the sensitivity is twice as large). With noise at the
        clients `clients`: each one's plan, with its own epsilon; the one above them is the largest,
        and `epsilon_prv` its third opinion.

    Raises:
        ConfigError: dp-accounting is missing, or adaptive clipping cannot have so much noise.
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
NEIGHBOURS_CLIENT = "one client's changes put to zero, or not (add or remove one)"
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
            raise ConfigError(
                f"privacy.clipping: {error}.\n"
                "  Set clipping = 'fixed', ask more clients in a round, or take less noise."
            ) from error
    cost = spent(noise_multiplier=z, num_releases=releases, delta=delta)
    return {
        "unit": UNIT_CLIENT,
        "neighbours": NEIGHBOURS_CLIENT,
        "sampling": "none assumed: a client may be asked in every round",
        "released": "the adapter after every round, to everybody",
        "mechanism": "Gaussian noise on the sum of clipped changes, divided by the planned clients",
        "noise_multiplier": z,
        "clipping": cfg.clipping,
        "num_clients": len(num_examples),
        "num_planned": planned,
        "num_releases": releases,
        "epsilon": _finite(cost),
        "epsilon_replace": _finite(_replaced(z, releases, delta))["pld"],
    }


def _by_clients(run: RunConfig, num_examples: Mapping[str, int]) -> Promise:
    delta, clients, worst = _delta(run), dict[str, Any](), Epsilon(0.0, 0.0)
    third = 0.0
    for name, count in sorted(num_examples.items()):
        if count == 0:
            continue
        plan = own_plan(run, count)
        assert plan is not None, "it is at the client"
        cost = spent_in_all([plan.steps()], delta=delta)
        clients[name] = {**asdict(plan), "epsilon": _finite(cost)}
        if cost.pld >= worst.pld:
            worst, third = cost, third_opinion(plan.steps(), delta=delta)
    return {
        **(OF_RECORDS if run.privacy.unit == "record" else OF_CLIENTS),
        "released": "what each client sends in every round, to everybody, the server included",
        "num_releases": min(run.rounds, run.privacy.max_participations or run.rounds),
        "clients": clients,
        "epsilon": _finite(worst),
        "epsilon_prv": _number(third),
    }


OF_RECORDS = {
    "unit": "record: one row of one client, in all rounds together",
    "neighbours": "one row of one client added or removed",
    "sampling": "Poisson: every step takes each row with the same probability, drawn at the client "
    "and told to nobody",
    "mechanism": "DP-SGD at each client: Gaussian noise on the sum of clipped row gradients of "
    "every step, divided by the expected rows",
}
OF_CLIENTS = {
    "unit": UNIT_CLIENT,
    "neighbours": NEIGHBOURS_CLIENT,
    "sampling": "none assumed: a client may be asked in every round",
    "mechanism": "Gaussian noise at each client on its own clipped change",
}


def _delta(run: RunConfig) -> float:
    assert run.privacy.delta is not None, "RunConfig.contradictions asks for it"
    return run.privacy.delta


def _replaced(noise_multiplier: float, num_releases: int, delta: float) -> Epsilon:
    return spent(noise_multiplier=noise_multiplier / 2, num_releases=num_releases, delta=delta)


def _finite(cost: Epsilon) -> dict[str, float | None]:
    """As JSON: no bound is null."""
    return {"pld": _number(cost.pld), "rdp": _number(cost.rdp)}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def too_few_for(promise: Promise) -> str | None:
    """The units of which one given away whole would keep the promise's delta; None if none are."""
    if "clients" not in promise:
        return (
            None
            if promise["delta"] < 1 / promise["num_clients"]
            else (f"{promise['num_clients']} clients")
        )
    for name, own in promise["clients"].items():
        if own["unit"] == "record" and promise["delta"] >= 1 / own["num_examples"]:
            return f"{own['num_examples']} rows of client '{name}'"
    return None


def with_privacy(
    algorithm: Algorithm, run: RunConfig, folder: RunFolder, num_examples: Mapping[str, int]
) -> Algorithm:
    """The algorithm with the recipe's guard around it, and the promise written down.

    The same algorithm where there is no guard at the server: each client protects its own rows.

    Args:
        algorithm: The recipe's.
        run: The recipe.
        folder: Of the run.
        num_examples: As in `promise_of`.

    Raises:
        ConfigError: See `promise_of`.
    """
    # a client's own plan follows from what it has; what the server adds is promised once
    promise = None if run.privacy.is_at_client else folder.read_json(FILE)
    if promise is None:
        promise = promise_of(run, num_examples)
        if promise is not None:
            write_json(folder.path / FILE, promise)
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


def releases(folder: RunFolder) -> list[dict[str, Any]]:
    """Every release that was made, or begun, in order.

    Of noise at the server the run's ledger. Of noise at the clients each one's own, where it is at
    hand, else what the server took down of the rounds; `client` names whose it is. There a message
    without a usable answer counts as its client's plan: it may have been a release all the same.
    """
    if not folder.run.privacy.is_at_client:
        return lines(folder.path / LEDGER)
    clients: Mapping[str, Any] = (folder.read_json(FILE) or {}).get("clients", {})
    own = {name: lines(folder.client_folder(name) / LEDGER) for name in clients}
    if any(own.values()):
        return [{"client": name, **line} for name, found in own.items() for line in found]
    return [
        row if "num_lots" in row else {**clients[row["client"]], **row}
        for row in folder.metrics()
        if row["event"] == "train"
        if "num_lots" in row or (row["client"] in clients and row["status"] not in NOT_TRAINED)
    ]


NOT_TRAINED = ("declined", BUDGET_SPENT, "not connected", "not reachable", "late")
"""Failures before a client trains. What came late has failed before, by its deadline."""


def num_released(folder: RunFolder) -> int:
    """Releases of the server that count.

    A round that was done again after a crash counts twice: its first noise may have been seen.
    Seeded noise is the same both times.
    """
    rows = releases(folder)
    return (
        len({row["round"] for row in rows}) if folder.run.privacy.noise == "seeded" else len(rows)
    )


def statement(run: RunConfig, folder: RunFolder) -> dict[str, Any] | None:
    """What a run has spent, beside its promise; None for a run without [privacy].

    Returns:
        promise, num_released (of the client that released most), epsilon (by both accountants;
        null is no bound), with noise at the server epsilon_replace, at the clients each one's own
        epsilon, and not_protected, as sentences.
    """
    promise: Promise | None = folder.read_json(FILE)
    if promise is None:
        return None
    spent_by = _spent_by_clients if run.privacy.is_at_client else _spent_by_server
    return {
        "promise": promise,
        **spent_by(folder, promise),
        "not_protected": list(_not_protected(run, promise)),
    }


def _spent_by_server(folder: RunFolder, promise: Promise) -> dict[str, Any]:
    z, delta = promise["noise_multiplier"], promise["delta"]
    count = num_released(folder)
    cost = spent(noise_multiplier=z, num_releases=count, delta=delta)
    return {
        "num_released": count,
        "epsilon": _finite(cost),
        "epsilon_replace": _finite(_replaced(z, count, delta))["pld"],
    }


def _spent_by_clients(folder: RunFolder, promise: Promise) -> dict[str, Any]:
    by_client: dict[str, list[Mapping[str, Any]]] = {name: [] for name in promise["clients"]}
    for row in releases(folder):
        by_client.setdefault(row["client"], []).append(row)
    costs = {
        name: spent_in_all(released(rows), delta=promise["delta"])
        for name, rows in by_client.items()
    }
    worst = max(costs.values(), key=lambda cost: cost.pld, default=Epsilon(0.0, 0.0))
    return {
        "num_released": max(map(len, by_client.values()), default=0),
        "epsilon": _finite(worst),
        "clients": {
            name: {"num_released": len(by_client[name]), "epsilon": _finite(cost)}
            for name, cost in costs.items()
        },
    }


def _not_protected(run: RunConfig, promise: Mapping[str, Any]) -> list[str]:
    record, at_client = run.privacy.unit == "record", run.privacy.is_at_client
    found = [
        "numbers of rows that can be used, sizes and times of messages, who took part, and whether "
        "a client's rows made it fail",
        "the SHA-256 of all rows in this folder's provenance.json: whoever knows the others can "
        "try out a row by it. Do not publish it",
    ]
    if run.runtime.name != "flower":
        found.append(
            "losses, norms and other numbers about clients, of training and of held-out rows: they "
            "have no noise, and are in this folder's metrics, report and card. Do not publish them"
        )
    elif not at_client:
        found.append("norms of clients' changes: they are in this folder's metrics, without noise")
    if record:
        found.insert(
            0, "a client as a whole: what many of its rows have in common is learned, and shows"
        )
        found.append("a person with several rows: each row more adds its own epsilon")
    elif not at_client:
        found.insert(0, "from whoever runs the server: it sees each client's own change")
    if promise["noise"] == "seeded":
        found.insert(
            0, "ANYTHING: the noise is seeded, so whoever knows the recipe can take it off"
        )
    if promise["epsilon"]["pld"] is None:
        found.insert(0, "ANYTHING: the noise multiplier is 0")
    if run.adapter.head == "local" and not record:
        found.append("each client's own head, which stays with it and has no noise")
    return found


def privacy_lines(found: Mapping[str, Any]) -> list[str]:
    """A statement in words, for terminal, report and card.

    Args:
        found: From `statement`.
    """
    promise = found["promise"]
    return [
        f"{guarantee(found['epsilon'], promise)} after {found['num_released']} release(s)"
        f"; promised for {promise['num_releases']}: {guarantee(promise['epsilon'], promise)}",
        *(_lines_by_clients(found) if "clients" in promise else _lines_by_server(found)),
        f"unit: {promise['unit']}",
        f"neighbours: {promise['neighbours']}",
        f"sampling: {promise['sampling']}",
        f"released: {promise['released']}",
        f"mechanism: {promise['mechanism']}; {_mechanism(promise)}, {promise['noise']} noise",
        *(f"not protected: {text}" for text in found["not_protected"]),
    ]


def _lines_by_server(found: Mapping[str, Any]) -> list[str]:
    return [
        f"by the RDP accountant {_epsilon(found['epsilon']['rdp'])}; where one client is replaced "
        f"by another {_epsilon(found['epsilon_replace'])}"
    ]


def _lines_by_clients(found: Mapping[str, Any]) -> list[str]:
    own = found["clients"].items()
    each = ", ".join(f"{name} {_epsilon(cost['epsilon']['pld'])}" for name, cost in own)
    return [
        f"by the RDP accountant {_epsilon(found['epsilon']['rdp'])}, all promised rounds by the "
        f"PRV accountant {_epsilon(found['promise']['epsilon_prv'])}; one replaced by another "
        "counts as two",
        f"spent by each client: {each}",
    ]


def _mechanism(promise: Promise) -> str:
    if "clients" not in promise:
        return (
            f"noise multiplier {promise['noise_multiplier']:g}, {promise['clipping']} clip norm "
            f"{promise['clip_norm']:g}, {promise['num_planned']} planned clients"
        )
    own = promise["clients"].values()
    noise = _range([plan["noise_multiplier"] for plan in own])
    rates = _range([plan["sampling_rate"] for plan in own])
    return f"noise multiplier {noise}, clip norm {promise['clip_norm']:g}, sampling rate {rates}"


def _range(values: Sequence[float]) -> str:
    low, high = min(values, default=0.0), max(values, default=0.0)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def guarantee(epsilon: Mapping[str, float | None], promise: Promise) -> str:
    """As papers write it, with the unit."""
    unit = promise["unit"].split(":", 1)[0]
    return f"({_epsilon(epsilon['pld'])}, {promise['delta']:g})-DP per {unit}"


def _epsilon(value: float | None) -> str:
    return "no bound" if value is None else f"{value:.3f}"


def check_lines(promise: Promise) -> Sequence[str]:
    """What `silotune check` says before anything runs."""
    first = (
        f"privacy: {guarantee(promise['epsilon'], promise)} after "
        f"{promise['num_releases']} rounds; {_mechanism(promise)}"
    )
    if "clients" in promise:
        return [
            first,
            *(
                f"privacy: client '{name}': {_epsilon(own['epsilon']['pld'])} with a noise "
                f"multiplier of {own['noise_multiplier']:g} at {own['num_lots']} release(s) a "
                f"round, each of {own['lot_size']:g} out of {own['num_examples']} rows"
                for name, own in promise["clients"].items()
            ),
        ]
    std = promise["noise_multiplier"] * promise["clip_norm"] / promise["num_planned"]
    return [
        first,
        f"privacy: the noise on the mean change has a standard deviation of {std:.3g} in "
        "every number of the adapter",
    ]
