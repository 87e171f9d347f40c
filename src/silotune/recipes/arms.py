"""The recipes of a comparison's federated arms: the recipe itself, and variations of it.

A value of "none" removes a key, as on the command line.

Every arm trains on the same rows from the same base, so an arm may change how training works and
what is sent, but nothing that determines rows or tokens.
"""

import tomllib
from collections.abc import Mapping
from typing import Any, cast

from silotune.core.errors import ConfigError
from silotune.recipes.auto import resolve_auto
from silotune.recipes.parse import parse, to_toml
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import CompareConfig

FREE = ("adapter", "train", "algorithm", "server", "distill", "wire")
"""Sections that an arm may change."""
SHARED = {
    "train": ("max_length",),
    "server": ("data_fraction", "data_path"),
}
"""Keys of these sections that determine rows or tokens."""
OWN = "federated"
"""The recipe itself, unchanged."""


def federated_arms(run: RunConfig) -> dict[str, RunConfig]:
    """Name -> recipe of every federated arm; the recipe itself comes first.

    Raises:
        ConfigError: An arm changes what all arms share, repeats another, or its recipe has
            mistakes.
    """
    arms, repeated = _arms(run)
    for key, other in repeated.items():
        raise ConfigError(f"{key}: is the same as '{other}'.\n  Rename, change or remove this arm.")
    return arms


def repeated_arms(run: RunConfig) -> list[str]:
    """A warning for each arm that is the same as another: only a comparison takes notice of it.

    Raises:
        ConfigError: An arm has another mistake; see `federated_arms`.
    """
    return [
        f"{key} is the same as '{other}': silotune compare refuses this recipe"
        for key, other in _arms(run)[1].items()
    ]


def _arms(run: RunConfig) -> tuple[dict[str, RunConfig], dict[str, str]]:
    """All arms, and key -> name of the arm that it repeats."""
    own = run.model_copy(update={"compare": CompareConfig()})
    arms: dict[str, RunConfig] = {OWN: own}
    repeated: dict[str, str] = {}
    for i, algorithm in enumerate(run.compare.algorithms):
        if algorithm == own.algorithm:
            repeated[f"compare.algorithms.{i}"] = OWN
            continue
        name = label = f"{OWN}: {getattr(algorithm, 'name', '')}"
        count = 2
        while name in arms:  # the same algorithm with other settings
            name, count = f"{label} {count}", count + 1
        arms[name] = resolve_auto(own.model_copy(update={"algorithm": algorithm}))
    for label, changes in run.compare.arms.items():
        name = f"{OWN}: {label}"
        recipe = _changed(own, label, changes)
        if name in arms:
            raise ConfigError(
                f"compare.arms.{label}: has the same name as '{name}'.\n  Rename this arm."
            )
        if (same := next((o for o, known in arms.items() if known == recipe), None)) is not None:
            repeated[f"compare.arms.{label}"] = same
        else:
            arms[name] = recipe
    return arms, repeated


def _changed(run: RunConfig, label: str, changes: Mapping[str, Any]) -> RunConfig:
    where = f"compare.arms.{label}"
    table = tomllib.loads(to_toml(run))
    for section, keys in changes.items():
        if section not in FREE:
            raise ConfigError(
                f"{where}: '{section}' is not a section that an arm may change.\n"
                f"  An arm may change {', '.join(FREE)}."
            )
        if not isinstance(keys, Mapping):
            raise ConfigError(
                f"{where}: '{section}' is a section.\n"
                f"  Set individual keys in it, for example {section} = {{ lr = 1e-3 }}."
            )
        given = cast(Mapping[str, Any], keys)
        for key in given:
            if key in SHARED.get(section, ()):
                raise ConfigError(
                    f"{where}: {section}.{key} determines the rows, which all arms share.\n"
                    "  Set it in the recipe itself, or compare two recipes."
                )
        before = cast(Mapping[str, Any], table.get(section, {}))
        # another algorithm has other keys: it starts from its own defaults
        other = section == "algorithm" and given.get("name", before["name"]) != before["name"]
        merged: dict[str, Any] = {**({} if other else before), **given}
        table[section] = {key: value for key, value in merged.items() if value != "none"}
    changed = resolve_auto(parse(table, name=where))
    if ("no-end-token" in changed.train.compat) != ("no-end-token" in run.train.compat):
        raise ConfigError(
            f"{where}: train.compat = 'no-end-token' determines the tokens, which all arms share.\n"
            "  Set it in the recipe itself, or compare two recipes."
        )
    return changed
