"""The parts of a comparison on disk: where each lies, and what it says.

A part is one arm with one seed; of the arm of lone clients, one client's. `part.json` holds its
costs and says that it is finished, `scores.jsonl` every held-out row's score.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from silotune.federation.client_memory import folder_name
from silotune.federation.metrics import Row, held_out_losses, overall_scores
from silotune.recipes.arms import federated_arms
from silotune.recipes.schema import RunConfig
from silotune.results.run import Run
from silotune.workflows.compare.local_training import Cost
from silotune.workflows.compare.statistics import LOCAL, Scores

Places = dict[str, dict[int, dict[str, Path]]]
"""Arm -> seed -> part, by client in the arm of lone clients, else by "" for all."""


def seeds_of(run: RunConfig) -> range:
    """The recipe's seed and those after it."""
    return range(run.seed, run.seed + run.compare.seeds)


def place_of(arm: str, seed: int) -> str:
    """The folder of an arm's part, inside the comparison's."""
    return f"seed-{seed}/{folder_name(arm.replace(': ', '-'))}"


def place_alone(client: str, seed: int) -> str:
    """The folder of a lone client's part, inside the comparison's."""
    return f"seed-{seed}/local/{folder_name(client)}"


def places(root: Path, run: RunConfig, clients: Iterable[str]) -> Places:
    """The folders of all parts.

    Args:
        root: The comparison's.
        run: Its recipe.
        clients: All of them.
    """
    seeds, names = seeds_of(run), list(clients)
    alone = {seed: {client: root / place_alone(client, seed) for client in names} for seed in seeds}
    arms: Places = {
        "base": {run.seed: {"": root / "base"}},
        LOCAL: alone,
    }
    for client in run.compare.only:
        arms[f"only {client}"] = {s: {"": parts[client]} for s, parts in alone.items()}
    for arm in (*federated_arms(run), "centralized"):
        arms[arm] = {seed: {"": root / place_of(arm, seed)} for seed in seeds}
    return arms


def read_scores(parts: Places) -> Scores:
    """All parts' rows by arm, seed and client."""
    return {
        arm: {seed: _read_rows(own) for seed, own in by_seed.items()}
        for arm, by_seed in parts.items()
    }


def read_costs(parts: Places) -> dict[str, dict[str, Any]]:
    """What each arm took, over all seeds."""
    found: dict[str, dict[str, Any]] = {}
    for arm, by_seed in parts.items():
        total = Cost()
        for part in (place for own in by_seed.values() for place in own.values()):
            total += Cost(**json.loads((part / "part.json").read_text(encoding="utf-8")))
        found[arm] = asdict(total)
    return found


def results(root: Path, run: RunConfig, result: Mapping[str, Any]) -> dict[str, Any]:
    """results.json: the whole experiment as one table for other programs.

    Its configuration, what each arm took, its scores over all clients after every scored round
    by seed, and the numbers of the comparison.
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


def _read_rows(parts: Mapping[str, Path]) -> dict[str, list[Row]]:
    """Client -> rows. Of the arm of lone clients, each client's own part counts for it alone."""
    found: dict[str, list[Row]] = {}
    for owner, part in parts.items():
        for line in (part / "scores.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if owner in ("", row["client"]):
                found.setdefault(row["client"], []).append(row)
    return found
