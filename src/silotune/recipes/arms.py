"""The recipes of a comparison's federated arms: the recipe itself, and variations of it.

A value of "none" removes a key, as on the command line.

Every arm trains on the same rows from the same base, so an arm may change how training works and
what is sent, but nothing that determines rows or tokens.
"""

import tomllib
from collections.abc import Mapping
from typing import Any, cast

from silotune.core.errors import ConfigError
from silotune.recipes.parse import parse, to_toml
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import CompareConfig

FREE = ("adapter", "train", "algorithm", "server", "distill")
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
        ConfigError: An arm changes what all arms share, or its recipe has mistakes.
    """
    own = run.model_copy(update={"compare": CompareConfig()})
    arms: dict[str, RunConfig] = {OWN: own}
    for algorithm in run.compare.algorithms:
        name = label = f"{OWN}: {getattr(algorithm, 'name', '')}"
        count = 2
        while name in arms:  # the same algorithm with other settings
            name, count = f"{label} {count}", count + 1
        arms[name] = own.model_copy(update={"algorithm": algorithm})
    for label, changes in run.compare.arms.items():
        name = f"{OWN}: {label}"
        recipe = _changed(own, label, changes)
        same = next((other for other, known in arms.items() if known == recipe), None)
        if name in arms or same is not None:
            what = f"has the same name as '{name}'" if name in arms else f"is the same as '{same}'"
            raise ConfigError(
                f"compare.arms.{label}: {what}.\n  Rename, change or remove this arm."
            )
        arms[name] = recipe
    return arms


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
    changed = parse(table, name=where)
    if ("no-end-token" in changed.train.compat) != ("no-end-token" in run.train.compat):
        raise ConfigError(
            f"{where}: train.compat = 'no-end-token' determines the tokens, which all arms share.\n"
            "  Set it in the recipe itself, or compare two recipes."
        )
    return changed
