"""What a private run promises, what it has released, and the statement that anyone can check.

The promise is made before the first round and written down as privacy.json. Every release is a line
of privacy.jsonl, written before it is made: a resumed run counts on, and nothing resets it.
"""

import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from silotune.algorithms.base import Algorithm
from silotune.config import RunConfig
from silotune.disk import write_json, writing
from silotune.errors import ConfigError
from silotune.privacy.accountant import noise_for, spent
from silotune.privacy.client_level import Release, guarded
from silotune.privacy.clip import split_noise
from silotune.privacy.gaussian import Noise, secure_noise, seeded_noise
from silotune.sampling import cohort_size
from silotune.seeds import generator
from silotune.store import RunFolder

FILE, LEDGER = "privacy.json", "privacy.jsonl"
Promise = dict[str, Any]
"""privacy.json; see `promise_of`."""


def promise_of(run: RunConfig, num_clients: int) -> Promise | None:
    """What a recipe promises, if all its rounds are done; None without [privacy].

    Args:
        run: The recipe.
        num_clients: How many there are.

    Returns:
        unit, neighbours, sampling, released, mechanism, noise_multiplier, clip_norm, clipping,
        num_planned (clients a round), num_releases, delta, epsilon (by both accountants),
        epsilon_replace (one client replaced by another: the sensitivity is twice as large), noise,
        and versions.

    Raises:
        ConfigError: dp-accounting is missing, or adaptive clipping cannot have so much noise.
    """
    cfg = run.privacy
    if cfg.unit == "none":
        return None
    assert cfg.delta is not None, "RunConfig.contradictions asks for it"
    planned, delta, releases = cohort_size(run.sampling, num_clients), cfg.delta, run.rounds
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
    replaced = spent(noise_multiplier=z / 2, num_releases=releases, delta=delta)
    return {
        "unit": "client: all rows of one client, in all rounds together",
        "neighbours": "one client's changes put to zero, or not (add or remove one)",
        "sampling": "none assumed: a client may be asked in every round",
        "released": "the adapter after every round, to everybody",
        "mechanism": "Gaussian noise on the sum of clipped changes, divided by the planned clients",
        "noise_multiplier": z,
        "clip_norm": cfg.clip_norm,
        "clipping": cfg.clipping,
        "num_planned": planned,
        "num_releases": releases,
        "delta": delta,
        "epsilon": asdict(cost),
        "epsilon_replace": replaced.pld,
        "noise": cfg.noise,
        "versions": {name: importlib.metadata.version(name) for name in ("dp-accounting", "torch")},
    }


def with_privacy(
    algorithm: Algorithm, run: RunConfig, folder: RunFolder, num_clients: int
) -> Algorithm:
    """The algorithm with the recipe's guard around it; the same where there is none.

    Raises:
        ConfigError: See `promise_of`.
    """
    promise = folder.read_json(FILE)
    if promise is None:
        promise = promise_of(run, num_clients)
        if promise is None:
            return algorithm
        write_json(folder.path / FILE, promise)
    return guarded(
        algorithm,
        run.privacy,
        noise_multiplier=promise["noise_multiplier"],
        num_planned=promise["num_planned"],
        noise=lambda round_: _noise(run, round_),
        write_down=lambda release: _write_down(folder, release),
    )


def _noise(run: RunConfig, round_: int) -> Noise:
    if run.privacy.noise == "secure":
        return secure_noise
    return seeded_noise(generator(run.seed, "privacy", round_))


def _write_down(folder: RunFolder, release: Release) -> None:
    path = folder.path / LEDGER
    with writing(path), path.open("a", encoding="utf-8") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # a crash cut the last line off: it stays a line of its own
        file.write(json.dumps(asdict(release)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def releases(folder: RunFolder) -> list[dict[str, Any]]:
    """The ledger: every release that was made, or begun, in order.

    A line that a crash cut off counts too: as one more like the one before.
    """
    path, found = folder.path / LEDGER, list[dict[str, Any]]()
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            found.append({**(found[-1] if found else {}), "round": len(found) + 1})
    return found


def num_released(run: RunConfig, folder: RunFolder) -> int:
    """Releases that count.

    A round that was done again after a crash counts twice: its first noise may have been seen.
    Seeded noise is the same both times.
    """
    rows = releases(folder)
    return len({row["round"] for row in rows}) if run.privacy.noise == "seeded" else len(rows)


def statement(run: RunConfig, folder: RunFolder) -> dict[str, Any] | None:
    """What a run has spent, beside its promise; None for a run without [privacy].

    Returns:
        promise, num_released, epsilon (by both accountants), epsilon_replace, and not_protected, as
        sentences.
    """
    promise: Promise | None = folder.read_json(FILE)
    if promise is None:
        return None
    z, delta = promise["noise_multiplier"], promise["delta"]
    count = num_released(run, folder)
    cost = spent(noise_multiplier=z, num_releases=count, delta=delta)
    replaced = spent(noise_multiplier=z / 2, num_releases=count, delta=delta)
    return {
        "promise": promise,
        "num_released": count,
        "epsilon": asdict(cost),
        "epsilon_replace": replaced.pld,
        "not_protected": list(_not_protected(run, promise)),
    }


def _not_protected(run: RunConfig, promise: Mapping[str, Any]) -> list[str]:
    found = [
        "from whoever runs the server: it sees each client's own change",
        "numbers of rows, sizes and times of messages, and who took part",
        "losses, norms and other numbers about clients, of training and of held-out rows: they "
        "have no noise, and are in this folder's metrics, report and card. Do not publish them",
    ]
    if promise["noise"] == "seeded":
        found.insert(
            0, "ANYTHING: the noise is seeded, so whoever knows the recipe can take it off"
        )
    if promise["noise_multiplier"] == 0:
        found.insert(0, "ANYTHING: the noise multiplier is 0")
    if run.adapter.head == "local":
        found.append("each client's own head, which stays with it and has no noise")
    return found


def privacy_lines(found: Mapping[str, Any]) -> list[str]:
    """A statement in words, for terminal, report and card.

    Args:
        found: From `statement`.
    """
    promise = found["promise"]
    return [
        f"{guarantee(found['epsilon'], promise['delta'])} after {found['num_released']} release(s)"
        f"; promised for {promise['num_releases']}: "
        f"{guarantee(promise['epsilon'], promise['delta'])}",
        f"by the RDP accountant {_epsilon(found['epsilon']['rdp'])}; where one client is replaced "
        f"by another {_epsilon(found['epsilon_replace'])}",
        f"unit: {promise['unit']}",
        f"neighbours: {promise['neighbours']}",
        f"sampling: {promise['sampling']}",
        f"released: {promise['released']}",
        f"mechanism: {promise['mechanism']}; noise multiplier {promise['noise_multiplier']:g}, "
        f"{promise['clipping']} clip norm {promise['clip_norm']:g}, {promise['num_planned']} "
        f"planned clients, {promise['noise']} noise",
        *(f"not protected: {text}" for text in found["not_protected"]),
    ]


def guarantee(epsilon: Mapping[str, float], delta: float) -> str:
    """As papers write it."""
    return f"({_epsilon(epsilon['pld'])}, {delta:g})-DP per client"


def _epsilon(value: float) -> str:
    return "no bound" if math.isinf(value) else f"{value:.3f}"


def check_lines(promise: Promise) -> Sequence[str]:
    """What `silotune check` says before anything runs."""
    return [
        f"privacy: {guarantee(promise['epsilon'], promise['delta'])} after "
        f"{promise['num_releases']} rounds, with a noise multiplier of "
        f"{promise['noise_multiplier']:g} and a clip norm of {promise['clip_norm']:g}",
        f"privacy: the noise on the mean change has a standard deviation of "
        f"{promise['noise_multiplier'] * promise['clip_norm'] / promise['num_planned']:.3g} in "
        "every number of the adapter",
    ]
