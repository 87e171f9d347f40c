"""What a private run has spent, in words, and in numbers that anyone can recompute."""

from collections.abc import Mapping, Sequence
from typing import Any

from silotune.core.types import AWAITS_CONSENT, BUDGET_SPENT
from silotune.core.wording import counted
from silotune.federation.client_privacy import released
from silotune.federation.ledger import FILE as LEDGER
from silotune.federation.ledger import lines
from silotune.federation.privacy_guarantee import FILE, Promise, as_json, cost_if_replaced
from silotune.federation.run_folder import RunFolder
from silotune.privacy.accountant import Epsilon, spent, spent_in_all
from silotune.recipes.personal import what_is_kept
from silotune.recipes.schema import RunConfig


def releases(folder: RunFolder) -> list[dict[str, Any]]:
    """Every release that was made or started, in order.

    With noise at the server, this is the run's ledger. With noise at the clients, it is each
    client's own ledger if any is available, otherwise what the server recorded about the rounds;
    `client` names the client. In the server's records, a message without a usable answer counts as
    what the client had planned, because it may have been a release all the same.
    """
    if not folder.run.privacy.is_at_client:
        return lines(folder.path / LEDGER)
    clients: Mapping[str, Any] = (folder.read_json(FILE) or {}).get("clients", {})
    discrete = {name: plan.get("discrete", False) for name, plan in clients.items()}
    own = {name: lines(folder.client_folder(name) / LEDGER) for name in clients}
    if any(own.values()):
        return [{"client": name, **line} for name, found in own.items() for line in found]
    return [
        {**row, "discrete": discrete.get(row["client"], False)}
        if "num_lots" in row
        else {**clients[row["client"]], **row}
        for row in folder.metrics()
        if row["event"] == "train"
        if "num_lots" in row or (row["client"] in clients and row["status"] not in NOT_TRAINED)
    ]


NOT_TRAINED = ("declined", AWAITS_CONSENT, BUDGET_SPENT, "not connected", "not reachable", "late")
"""Statuses that do not count as a release. A late answer was already counted at its deadline."""


def num_released(folder: RunFolder) -> int:
    """Number of the server's releases that count.

    A round that was repeated after a crash counts twice, because its first noise may have been
    seen. Seeded noise is the same both times, so it counts once.
    """
    rows = releases(folder)
    return (
        len({row["round"] for row in rows}) if folder.run.privacy.noise == "seeded" else len(rows)
    )


def statement(run: RunConfig, folder: RunFolder) -> dict[str, Any] | None:
    """What a run has spent, along with its guarantee; None for a run without [privacy].

    Returns:
        promise, num_released (of the client with the most releases), epsilon (by both accountants;
        null if there is no bound), and not_protected, as sentences. With noise at the server, also
        epsilon_replace; with noise at the clients, each client's own epsilon.
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
        "epsilon": as_json(cost),
        "epsilon_replace": as_json(cost_if_replaced(z, count, delta))["pld"],
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
        "epsilon": as_json(worst),
        "clients": {
            name: {"num_released": len(by_client[name]), "epsilon": as_json(cost)}
            for name, cost in costs.items()
        },
    }


def _not_protected(run: RunConfig, promise: Mapping[str, Any]) -> list[str]:
    record, at_client = run.privacy.unit == "record", run.privacy.is_at_client
    found = [
        "numbers of usable rows, sizes and times of messages, who took part, and whether "
        "a client's rows made it fail",
        "the SHA-256 of all rows in this folder's provenance.json: anyone who knows all other rows "
        "can use it to check a guess at the remaining one. Do not publish it",
    ]
    if run.runtime.name != "flower":
        found.append(
            "losses, norms and other numbers about clients, from training and held-out rows: they "
            "have no noise, and are in this folder's metrics.jsonl, summary.json and samples.json, "
            "and with report.tracker also there, but neither in its report nor in its card. Do not "
            "publish them"
        )
    elif not at_client:
        found.append(
            "norms of clients' changes: they are in this folder's metrics.jsonl, without noise. Do "
            "not publish it"
        )
    if record:
        found.insert(
            0, "a client as a whole: what many of its rows have in common is learned and visible"
        )
        found.append("a person with several rows: every additional row adds its own epsilon")
    elif not at_client:
        found.insert(
            0, "a client, from whoever runs the server: the server sees each client's own change"
        )
    if promise["noise"] == "seeded":
        found.insert(
            0, "ANYTHING: the noise is seeded, so anyone who knows the recipe can subtract it"
        )
    if promise["epsilon"]["pld"] is None:
        found.insert(0, "ANYTHING: the noise multiplier is 0")
    if (kept := what_is_kept(run)) and not record:
        found.append(f"each client's own {kept}, which stays at the client and has no noise")
    if run.finish.local_steps:
        found.append(
            "what each client learns in its own steps after the last round: it stays at the client "
            "and has no noise"
        )
    return found


def privacy_lines(found: Mapping[str, Any]) -> list[str]:
    """The statement in words, for the terminal, the report and the card.

    Args:
        found: From `statement`.
    """
    promise = found["promise"]
    return [
        f"{guarantee(found['epsilon'], promise)} after {counted(found['num_released'], 'release')}"
        f"; guaranteed for {promise['num_releases']}: {guarantee(promise['epsilon'], promise)}",
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
        f"epsilon by the RDP accountant: {_epsilon(found['epsilon']['rdp'])}; if one client is "
        f"replaced by another: {_epsilon(found['epsilon_replace'])}"
    ]


def _lines_by_clients(found: Mapping[str, Any]) -> list[str]:
    own = found["clients"].items()
    sums = [_of_sums(found["promise"])] if "sums" in found["promise"] else []
    each = ", ".join(f"{name} {_epsilon(cost['epsilon']['pld'])}" for name, cost in own)
    discrete = any(plan.get("discrete") for plan in found["promise"]["clients"].values())
    others = (
        "epsilon by Renyi divergences, the one bound that is known for discrete noise"
        if discrete
        else f"epsilon by the RDP accountant: {_epsilon(found['epsilon']['rdp'])}; of all "
        "guaranteed rounds by the PRV accountant: "
        f"{_epsilon(found['promise']['epsilon_prv'])}"
    )
    return [
        f"{others}; replacing one unit by another counts as two (one removed, one added)",
        f"epsilon spent by each client: {each}",
        *sums,
    ]


def _of_sums(promise: Promise) -> str:
    """What the sums alone reveal, in words: for all guaranteed rounds."""
    sums = promise["sums"]
    if "why_not" in sums:
        return f"the sums have no stronger guarantee: {sums['why_not']}"
    rounds, noisy = counted(promise["num_releases"], "round"), counted(sums["num_noisy"], "client")
    return (
        "whoever reads opened sums only, and knows the noise of at most "
        f"{counted(sums['colluding'], 'client')}: {guarantee(sums['epsilon'], promise)} for "
        f"{rounds}, by the noise of {noisy}"
    )


def check_lines(promise: Promise) -> Sequence[str]:
    """The lines that `silotune check` prints before anything runs."""
    first = (
        f"privacy: {guarantee(promise['epsilon'], promise)} after "
        f"{counted(promise['num_releases'], 'round')}; {_mechanism(promise)}"
    )
    if "clients" in promise:
        sums = [f"privacy: {_of_sums(promise)}"] if "sums" in promise else []
        return [
            first,
            *sums,
            *(
                f"privacy: client '{name}': {guarantee(own['epsilon'], promise)} with a noise "
                f"multiplier of {own['noise_multiplier']:g} and "
                f"{counted(own['num_lots'], 'release')} per round, each of {own['lot_size']:g} "
                f"out of {counted(own['num_examples'], 'row')}"
                for name, own in promise["clients"].items()
            ),
        ]
    std = promise["noise_multiplier"] * promise["clip_norm"] / promise["num_planned"]
    return [
        first,
        f"privacy: the noise on the mean change has a standard deviation of {std:.3g} in "
        "every number of the adapter",
    ]


def _mechanism(promise: Promise) -> str:
    if "clients" not in promise:
        return (
            f"noise multiplier {promise['noise_multiplier']:g}, {promise['clipping']} clip norm "
            f"{promise['clip_norm']:g}, {counted(promise['num_planned'], 'planned client')}"
        )
    own = promise["clients"].values()
    noise = _range([plan["noise_multiplier"] for plan in own])
    rates = _range([plan["sampling_rate"] for plan in own])
    return f"noise multiplier {noise}, clip norm {promise['clip_norm']:g}, sampling rate {rates}"


def _range(values: Sequence[float]) -> str:
    low, high = min(values, default=0.0), max(values, default=0.0)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def guarantee(epsilon: Mapping[str, float | None], promise: Promise) -> str:
    """The guarantee as papers write it, with its unit."""
    unit = promise["unit"].split(":", 1)[0]
    return f"({_epsilon(epsilon['pld'])}, {promise['delta']:g})-DP per {unit}"


def _epsilon(value: float | None) -> str:
    return "no bound" if value is None else f"{value:.3f}"
