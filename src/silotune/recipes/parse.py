"""Read a recipe: TOML and overrides in, a checked RunConfig out; and back to TOML."""

import re
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import tomli_w
from pydantic import ValidationError

from silotune.core.errors import ConfigError
from silotune.core.public_call import public
from silotune.core.reading_back import parse_toml, reason
from silotune.core.wording import counted, did_you_mean
from silotune.recipes.algorithm import ALGORITHM_CONFIGS, chosen_algorithm
from silotune.recipes.contradictions import contradictions
from silotune.recipes.local_data import drop_hub_keys
from silotune.recipes.mistakes import explain, nearest_key
from silotune.recipes.schema import RunConfig
from silotune.recipes.shipped import shipped_recipes

MOST_SHOWN = 30
"""Mistakes of one recipe that are explained; the others are counted."""


@public
def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply `key=value` overrides.

    Args:
        recipe: A shipped name, or the path of a TOML file.
        overrides: Dotted keys, for example "train.lr=5e-4". A value is read as TOML, or as text if
            it is not valid TOML; `none` removes a key. With a local `data.path`, keys that belong
            to the recipe's own data set on the hub fall away, with a note on stderr.

    Raises:
        ConfigError: All mistakes together, each with its key and a fix.
    """
    path = _find(recipe)
    try:
        table = parse_toml(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{path}: not valid TOML: {reason(error)}.\n"
            '  Fix the line. A recipe has lines such as rounds = 3 or data.path = "rows.csv".'
        ) from error
    problems = [problem for override in overrides if (problem := _apply(table, override))]
    note = drop_hub_keys(table, _keys(overrides))
    run = parse(table, name=path.stem, problems=problems)
    if note is not None:
        sys.stderr.write(f"note: {note}\n")
    return run


def resolve_recipe(recipe: str | Path | RunConfig, overrides: Sequence[str] = ()) -> RunConfig:
    """A recipe by name, file or value, with `key=value` overrides.

    Raises:
        ConfigError: All mistakes together.
    """
    if not isinstance(recipe, RunConfig):
        return load_recipe(recipe, overrides)
    if overrides:
        return with_overrides(recipe, overrides)
    if found := [f"{key}: {why}" for key, why in contradictions(recipe)]:
        raise _mistakes(found, "recipe")
    return recipe


def with_overrides(run: RunConfig, overrides: Sequence[str], *, name: str = "recipe") -> RunConfig:
    """A recipe with some keys changed, checked like one that is read from a file.

    Args:
        run: The recipe.
        overrides: As in `load_recipe`, without its note. Another algorithm starts from its own
            defaults.
        name: What an error calls the recipe.

    Raises:
        ConfigError: All mistakes together.
    """
    table = tomllib.loads(to_toml(run))
    problems = [problem for text in overrides if (problem := _apply(table, text))]
    drop_hub_keys(table, _keys(overrides))
    if chosen_algorithm(table["algorithm"]) != chosen_algorithm(run.algorithm):
        table["algorithm"] = {}
        for text in overrides:
            if text.strip().startswith("algorithm."):
                _apply(table, text)
    return parse(table, name=name, problems=problems)


def _find(recipe: str | Path) -> Path:
    shipped = shipped_recipes()
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    nearby = sorted(p.name for p in path.parent.glob("*.toml"))
    near = did_you_mean(path.name, [*shipped, *nearby])
    raise ConfigError(
        f"recipe '{recipe}': no such file or shipped recipe.{near}\n"
        f"  Give the path of a TOML file, or a shipped name: {', '.join(shipped)}."
    )


def _keys(overrides: Sequence[str]) -> set[str]:
    return {override.partition("=")[0].strip() for override in overrides}


def _apply(table: dict[str, Any], override: str) -> str | None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(part.strip() for part in key.split(".")) or key.count(".") > 9:
        return f"override '{override}': write key=value, for example train.lr=5e-4"
    *sections, last = key.split(".")
    here = table
    for section in sections:
        inner = here.setdefault(section, {})
        if not isinstance(inner, dict):
            return f"override '{key}': '{section}' is a value, not a section"
        here = cast(dict[str, Any], inner)
    if text.strip() == "none":
        here.pop(last, None)
        return None
    try:
        here[last] = _value(text.strip())
    except ValueError as error:
        return f"override '{key}': {error}"
    return None


def _value(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse(
    table: Mapping[str, Any], *, name: str = "recipe", problems: Sequence[str] = ()
) -> RunConfig:
    """Check a recipe's table. `problems` found earlier are reported with the others.

    Raises:
        ConfigError: All mistakes together.
    """
    found, bad, rest = list(problems), set[tuple[str, ...]](), _copy(table)
    # Whatever is wrong is removed and the rest is read again. Otherwise a wrong type in a section
    # would hide the contradictions in that section and across the recipe.
    while True:
        before = _copy(rest)
        try:
            config = RunConfig.model_validate(rest)
            break
        except ValidationError as error:
            for item in error.errors():
                where = _where(item["loc"])
                # near names are sought for the mistakes that are shown only: each search is slow
                is_shown = len(found) < MOST_SHOWN
                if not _follows_from(item, where, bad):
                    found.append(explain(where, item, table) if is_shown else ".".join(where))
                bad |= {where, _meant(where, item, table)} if is_shown else {where}
                _remove(rest, where)
            # as text, because true equals 1
            assert repr(rest) != repr(before), "a required field has no placeholder"
    keys = {".".join(where) for where in bad}
    found += [f"{key}: {why}" for key, why in contradictions(config) if key not in keys]
    if found:
        raise _mistakes(found, name)
    return config


def _mistakes(found: Sequence[str], name: str) -> ConfigError:
    head = f"{counted(len(found), 'mistake')} in recipe '{name}':"
    more = len(found) - MOST_SHOWN
    rest = [f"and {counted(more, 'more mistake')}."] if more > 0 else []
    return ConfigError("\n  ".join([head, *found[:MOST_SHOWN], *rest]))


def _meant(where: tuple[str, ...], item: Any, table: Mapping[str, Any]) -> tuple[str, ...]:
    """The key that a misspelt one was probably meant to be; it is missing, so it is suspect too."""
    if item["type"] != "extra_forbidden":
        return where
    near = nearest_key(".".join(where), chosen_algorithm(table.get("algorithm", {})))
    return tuple(near.split(".")) if near else where


def _follows_from(item: Any, where: tuple[str, ...], bad: Collection[tuple[str, ...]]) -> bool:
    """Whether a mistake only appears because another key was removed before."""
    if item["type"] != "value_error":
        return False
    names = {key[-1] for key in bad if key[:-1] == where}
    return any(re.search(rf"\b{name}\b", str(item["ctx"]["error"])) for name in names)


PLACEHOLDERS: dict[tuple[str, ...], Any] = {
    ("rounds",): 1,
    ("data",): {"path": "medquad_mini"},
    ("data", "path"): "medquad_mini",
}
"""Values for required keys that are missing or wrong, so that reading can continue."""


def _remove(table: dict[str, Any], where: tuple[str, ...]) -> None:
    """Remove a key, or the list that contains a wrong item; fill in placeholders."""
    here = table
    for depth, part in enumerate(where, start=1):
        inner = here.get(part)
        if depth == len(where) or not isinstance(inner, dict):
            here.pop(part, None)
            if where[:depth] in PLACEHOLDERS:
                here[part] = deepcopy(PLACEHOLDERS[where[:depth]])
            return
        here = cast(dict[str, Any], inner)


def _where(loc: Sequence[int | str]) -> tuple[str, ...]:
    """A pydantic location as a recipe's key, without the tag of a chosen algorithm."""
    parts = [str(part) for part in loc]
    tag = {"algorithm": 1, "compare": 3}.get(parts[0])  # compare.algorithms.0.<tag>
    if tag is not None and len(parts) > tag and parts[tag] in ALGORITHM_CONFIGS:
        del parts[tag]
    return tuple(parts)


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: _copy(cast(Mapping[str, Any], v)) if isinstance(v, Mapping) else v
        for k, v in table.items()
    }


def to_toml(run: RunConfig) -> str:
    """The resolved recipe with every value spelt out; `parse` turns it into an equal RunConfig."""
    return tomli_w.dumps(run.model_dump(mode="json", exclude_none=True, serialize_as_any=True))
