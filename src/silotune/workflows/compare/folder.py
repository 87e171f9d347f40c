"""A comparison on disk: the paths and contents of its parts.

A part is one arm with one seed; in the arm of lone clients, it is one client with one seed.
`part.json` holds the part's costs and marks it as finished. `scores.jsonl` holds the score of every
held-out row.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from silotune.core.checksums import check_listed
from silotune.core.reading_back import read_object, read_rows
from silotune.federation.client_memory import folder_name
from silotune.federation.metrics import Row, held_out_losses, overall_scores
from silotune.federation.run_folder import RunFolder
from silotune.recipes.arms import federated_arms
from silotune.recipes.personal import kept_by
from silotune.recipes.schema import RunConfig
from silotune.recipes.tuning import federated_points, lone_points, own_points
from silotune.results.run import Run
from silotune.workflows.compare.local_training import Cost
from silotune.workflows.compare.names import (
    EXTENDED,
    INTERPOLATION,
    LOCAL,
    builds_on,
    extension,
    extensions,
)
from silotune.workflows.compare.statistics import Scores

CENTRALIZED = "centralized"
"""The arm that trains on all rows in one place."""
Losses = dict[str, dict[int, dict[str, float]]]
"""Arm -> seed -> client -> loss on its validation rows."""
Places = dict[str, dict[int, dict[str, Path]]]
"""Arm -> seed -> part: by client in the arm of lone clients, else under "" for all clients."""


class ComparisonFolder(RunFolder):
    """One comparison on disk. It is not a run: `silotune run --resume` refuses it."""

    RECIPE = "comparison.toml"
    KIND = "comparison"
    COMMAND = "silotune compare"
    RESULT = "comparison.json"
    MADE_AGAIN = ("comparison.json",)


def seeds_of(run: RunConfig) -> range:
    """The recipe's seed and the ones that follow it."""
    return range(run.seed, run.seed + run.compare.seeds)


def tuning_seed(run: RunConfig) -> int:
    """The seed that all trials share. No arm is compared with it."""
    return run.seed + 10_000


@dataclass(frozen=True)
class Trial:
    """One finished trial of an arm."""

    validation_loss: float
    """Of its best round; infinity if training diverged."""
    cost: Cost


def place_of_trial(arm: str, label: str) -> str:
    """The folder of a trial, inside the comparison's folder."""
    return f"tuning/{'/'.join(map(folder_name, arm.replace(': ', '-').split('/')))}/{label}"


def read_trial(part: Path) -> Trial:
    """A finished trial."""
    about = read_object(_checked(part, "part.json"), fix=_fix(part))
    loss = about["validation_loss"]
    return Trial(math.inf if loss is None else loss, Cost.of(about))


def num_parts(run: RunConfig, num_clients: int) -> int:
    """Parts of a comparison: the base, all trials, and all arms with every seed."""
    federated, tune, each = federated_arms(run), run.compare.tune, int(run.compare.centralized)
    arms = num_clients + each + len(federated)
    trials = 0
    if tune is not False:
        trials = sum(len(federated_points(recipe, tune)) for recipe in federated.values())
        trials += (num_clients + each) * len(lone_points(run, tune))
    own = len(EXTENDED) * num_clients if run.finish.local_steps else 0
    arms += own * (1 + bool(run.finish.interpolate))
    trials += own * len(own_points(run, tune)) if tune is not False else 0
    return 1 + trials + arms * run.compare.seeds


def place_of(arm: str, seed: int) -> str:
    """The folder of an arm's part, inside the comparison's folder."""
    return f"seed-{seed}/{folder_name(arm.replace(': ', '-'))}"


def place_alone(client: str, seed: int) -> str:
    """The folder of a lone client's part, inside the comparison's folder."""
    return f"seed-{seed}/local/{folder_name(client)}"


def place_extended(arm: str, what: str, client: str, seed: int) -> str:
    """The folder of a client's part of an arm that goes on from another one."""
    return f"seed-{seed}/{folder_name(what)}/{arm}/{folder_name(client)}"


def places(root: Path, run: RunConfig, clients: Iterable[str]) -> Places:
    """The folders of all parts.

    Args:
        root: The comparison's folder.
        run: Its recipe.
        clients: The names of all clients.
    """
    seeds, names = seeds_of(run), list(clients)
    alone = {seed: {client: root / place_alone(client, seed) for client in names} for seed in seeds}
    arms: Places = {
        "base": {run.seed: {"": root / "base"}},
        LOCAL: alone,
    }
    for client in run.compare.only:
        arms[f"only {client}"] = {s: {"": parts[client]} for s, parts in alone.items()}
    pooled = [CENTRALIZED] if run.compare.centralized else []
    for arm in (*federated_arms(run), *pooled):
        arms[arm] = {seed: {"": root / place_of(arm, seed)} for seed in seeds}
    for name, (arm, what) in extensions(run).items():
        arms[name] = {
            seed: {client: root / place_extended(arm, what, client, seed) for client in names}
            for seed in seeds
        }
    return arms


def read_scores(parts: Places) -> Scores:
    """The rows of all parts by arm, seed and client."""
    return {
        arm: {seed: _read_rows(own) for seed, own in by_seed.items()}
        for arm, by_seed in parts.items()
    }


def read_costs(parts: Places) -> dict[str, dict[str, Any]]:
    """The cost of each arm, summed over all seeds; with that of the arm that it goes on from."""
    found: dict[str, dict[str, Any]] = {}
    for arm, by_seed in parts.items():
        before = builds_on(arm)  # which comes first
        total = Cost() if before is None else Cost.of(found[before])
        for part in (place for own in by_seed.values() for place in own.values()):
            total += Cost.of(read_object(_checked(part, "part.json"), fix=_fix(part)))
        found[arm] = asdict(total)
    return found


def read_rounds(parts: Places) -> dict[str, dict[str, list[int]]]:
    """Arm -> client, or "" for all -> the round whose adapter counts, by seed."""
    return _by_owner({a: p for a, p in parts.items() if builds_on(a) is None}, "round")


def read_shares(parts: Places) -> dict[str, dict[str, list[float]]]:
    """Arm -> client -> the share of its own steps that it has chosen, by seed."""
    mixed = {extension(arm, INTERPOLATION) for arm in EXTENDED}
    return _by_owner({a: p for a, p in parts.items() if a in mixed}, "share")


def _by_owner(parts: Places, key: str) -> dict[str, dict[str, list[Any]]]:
    found: dict[str, dict[str, list[Any]]] = {}
    for arm, by_seed in parts.items():
        for owner, part in (item for own in by_seed.values() for item in own.items()):
            about = read_object(_checked(part, "part.json"), fix=_fix(part))
            found.setdefault(arm, {}).setdefault(owner, []).append(about[key])
    return found


def read_validation(parts: Places, run: RunConfig) -> Losses:
    """The validation losses of every client's choices, see `choices`.

    A loss that is not finite, or unknown, is infinite.
    """
    found: Losses = {}
    for arm, by_seed in parts.items():
        if arm in choices(run):
            found[arm] = {seed: _validation(own) for seed, own in by_seed.items()}
    return found


def choices(run: RunConfig) -> tuple[str, ...]:
    """The arms that a client chooses from.

    Alone, federated, those that keep a part of the adapter at each client, and what extends the
    first two.
    """
    personal = [arm for arm, recipe in federated_arms(run).items() if kept_by(recipe)]
    return tuple(dict.fromkeys([*EXTENDED, *personal, *extensions(run)]))


def _validation(parts: Mapping[str, Path]) -> dict[str, float]:
    """Client -> validation loss of one arm and seed."""
    found: dict[str, float] = {}
    for owner, part in parts.items():
        about = read_object(_checked(part, "part.json"), fix=_fix(part))
        if owner:
            found[owner] = about["validation_loss"]
            continue
        for row in Run(part / "run").metrics:  # a federation's, which scores all of its clients
            if row["event"] == "evaluate" and row["round"] == about["round"] and "loss" in row:
                found[row["client"]] = row["loss"]
    return {
        client: loss if loss is not None and math.isfinite(loss) else math.inf
        for client, loss in found.items()
    }


def results(root: Path, run: RunConfig, result: Mapping[str, Any]) -> dict[str, Any]:
    """results.json: the entire experiment as one table for other programs.

    It holds the configuration, the cost of each arm, the scores over all clients by seed and scored
    round, and the numbers of the comparison.
    """
    history: dict[str, dict[int, list[Row]]] = {}
    for arm in federated_arms(run):
        for seed in seeds_of(run):
            rows = Run(root / place_of(arm, seed) / "run").metrics
            losses, labels = held_out_losses(rows), overall_scores(rows)
            history.setdefault(arm, {})[seed] = [
                {"round": r, "loss": loss, **labels.get(r, {})} for r, loss in losses.items()
            ]
    return {
        "configuration": run.model_dump(mode="json", serialize_as_any=True),
        "history": history,
        **{key: result[key] for key in ("seeds", "arms", "overall", "clients", "notes")},
    }


def _checked(part: Path, name: str) -> Path:
    """A file of a finished part, compared with its SHA-256."""
    check_listed(part, name, fix=_fix(part))
    return part / name


def _fix(part: Path) -> str:
    return f"Remove {part} and resume the comparison: it is trained again."


def _read_rows(parts: Mapping[str, Path]) -> dict[str, list[Row]]:
    """Client -> rows. In the arm of lone clients, a part counts only for its own client."""
    found: dict[str, list[Row]] = {}
    for owner, part in parts.items():
        for row in read_rows(_checked(part, "scores.jsonl"), fix=_fix(part)):
            if owner in ("", row["client"]):
                found.setdefault(row["client"], []).append(row)
    return found
