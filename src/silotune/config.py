"""The recipe: RunConfig, gathered from the configs of the parts; TOML in and out.

A field is the only home of its default, its help text and its range. This file loads no model and
no data.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast

import tomli_w
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, create_model

from silotune.algorithms import ALGORITHMS
from silotune.algorithms.base import Algorithm, AlgorithmConfig
from silotune.data import DataConfig
from silotune.errors import ConfigError
from silotune.evaluate import EvaluateConfig
from silotune.models import AdapterConfig, ModelConfig
from silotune.partition import PartitionConfig
from silotune.rows import did_you_mean
from silotune.sampling import SamplingConfig
from silotune.train import TrainConfig
from silotune.types import Config


class CheckpointConfig(Config):
    """What is kept of the rounds."""

    every: int = Field(default=1, ge=1)
    """Rounds between checkpoints; the last round always is one. A resumed run starts at the
    newest."""
    keep: Literal["last", "best", "all"] = "last"
    """Which checkpoints stay. best: the one with the lowest held-out loss, which becomes the
    result."""


def usable_threads() -> int:
    """Processors that this process may use, also where a container gives it fewer."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class RuntimeConfig(Config):
    """Where the clients run."""

    name: Literal["in-process"] = "in-process"
    """in-process: one after the other in this process, sharing one base model."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes the first of cuda, mps and cpu that is there."""
    threads: int = Field(default_factory=usable_threads, ge=1)
    """Processor threads; by default all that this process may use. Part of what makes a run
    repeatable."""


def _named(name: str, cfg: type[AlgorithmConfig]) -> type[AlgorithmConfig]:
    """An algorithm's own config with the key that chooses it in a recipe."""
    field: Any = (Literal[name], Field(name, description="Which algorithm; see docs/papers.md."))
    return create_model(cfg.__name__, __base__=cfg, __doc__=cfg.__doc__, name=field)


def _chosen(section: Any) -> str:
    """The algorithm that an [algorithm] table, or a config object, names."""
    if isinstance(section, dict):
        return str(cast(dict[str, Any], section).get("name", "fedavg"))
    return str(getattr(section, "name", ""))


ALGORITHM_CONFIGS = {name: _named(name, cfg) for name, (cfg, _) in ALGORITHMS.items()}

if TYPE_CHECKING:
    AnyAlgorithmConfig = AlgorithmConfig
else:
    _tagged = tuple(Annotated[cfg, Tag(name)] for name, cfg in ALGORITHM_CONFIGS.items())
    AnyAlgorithmConfig = Annotated[Union[_tagged], Discriminator(_chosen)]  # noqa: UP007


class RunConfig(Config):
    """A recipe: everything that decides what a run computes."""

    seed: int = Field(default=17, ge=0)
    """Every random draw of a run derives from it, by name."""
    rounds: int = Field(ge=1)
    """Rounds of training and aggregation."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    partition: PartitionConfig | None = None
    sampling: SamplingConfig = SamplingConfig()
    train: TrainConfig = TrainConfig()
    algorithm: AnyAlgorithmConfig = Field(default_factory=lambda: ALGORITHM_CONFIGS["fedavg"]())
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Every pair (key, why it cannot be) that no single section can see."""
        if self.checkpoint.keep == "best" and self.evaluate.every == 0:
            yield "checkpoint.keep", "'best' needs held-out losses, but evaluate.every is 0"
        if self.adapter.kind == "full" and self.model.dtype in ("float16", "bfloat16"):
            yield (
                "model.dtype",
                f"'{self.model.dtype}' cannot hold the small steps of full training; use float32",
            )


def build_algorithm(cfg: AlgorithmConfig) -> Algorithm:
    """The algorithm that a recipe names."""
    return ALGORITHMS[_chosen(cfg)][1](cfg)


# --- reading ---------------------------------------------------------------------------------


def shipped_recipes() -> dict[str, Path]:
    """The recipes in the package, by name."""
    folder = Path(str(resources.files("silotune") / "recipes"))
    return {p.stem: p for p in sorted(folder.glob("*.toml"))}


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply `key=value` overrides.

    Args:
        recipe: A shipped name, or the path of a TOML file.
        overrides: Dotted keys, for instance "train.lr=5e-4". A value is read as TOML, and as text
            where it is none; `none` takes a key out.

    Raises:
        ConfigError: All mistakes together, each with its key and its mend.
    """
    path = _find(recipe)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: not valid TOML: {error}.\n"
            '  Mend the line. A recipe holds lines such as: rounds = 3, or data.path = "rows.csv".'
        ) from error
    problems: list[str] = []
    for override in overrides:
        problem = _apply(table, override)
        if problem:
            problems.append(problem)
    return parse(table, name=path.stem, problems=problems)


def _find(recipe: str | Path) -> Path:
    shipped = shipped_recipes()
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    beside = sorted(p.name for p in path.parent.glob("*.toml"))
    near = did_you_mean(path.name, [*shipped, *beside])
    raise ConfigError(
        f"recipe '{recipe}': no such file and no shipped recipe.{near}\n"
        f"  Give the path of a TOML file, or a shipped name: {', '.join(shipped)}."
    )


def _apply(table: dict[str, Any], override: str) -> str | None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(part.strip() for part in key.split(".")):
        return f"override '{override}': write key=value, for instance train.lr=5e-4"
    *sections, last = key.split(".")
    here = table
    for section in sections:
        inner = here.setdefault(section, {})
        if not isinstance(inner, dict):
            return f"override '{key}': '{section}' is a value, not a section"
        here = cast(dict[str, Any], inner)
    if text.strip() == "none":
        here.pop(last, None)
    else:
        here[last] = _value(text.strip())
    return None


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse(
    table: Mapping[str, Any], *, name: str = "recipe", problems: Sequence[str] = ()
) -> RunConfig:
    """Check a recipe's table. `problems` found before are reported with the others.

    Raises:
        ConfigError: All mistakes together.
    """
    found, bad, rest = list(problems), set[tuple[str, ...]](), _copy(table)
    # What is wrong is taken out and the rest is read again: a wrong type in a section would
    # otherwise hide the contradictions of that section, and those of the whole recipe.
    while True:
        before = _copy(rest)
        try:
            config = RunConfig.model_validate(rest)
            break
        except ValidationError as error:
            for item in error.errors():
                where = _where(item["loc"])
                if not _follows_from(item, where, bad):
                    found.append(_explain(where, item, table))
                bad |= {where, _meant(where, item, table)}
                _take_out(rest, where)
            assert rest != before, "a required field has no stand-in"
    keys = {".".join(where) for where in bad}
    found += [f"{key}: {why}" for key, why in config.contradictions() if key not in keys]
    if found:
        count = "1 mistake" if len(found) == 1 else f"{len(found)} mistakes"
        raise ConfigError("\n  ".join([f"{count} in recipe '{name}':", *found]))
    return config


def _meant(where: tuple[str, ...], item: Any, table: Mapping[str, Any]) -> tuple[str, ...]:
    """The key that a misspelt one most likely stands for; it is missing, so it is suspect too."""
    if item["type"] != "extra_forbidden":
        return where
    near = nearest_key(".".join(where), _chosen(table.get("algorithm", {})))
    return tuple(near.split(".")) if near else where


def _follows_from(item: Any, where: tuple[str, ...], bad: Collection[tuple[str, ...]]) -> bool:
    """Whether a mistake only shows because another key was taken out before."""
    names = {key[-1] for key in bad if key[:-1] == where}
    return item["type"] == "value_error" and any(
        re.search(rf"\b{name}\b", str(item["ctx"]["error"])) for name in names
    )


STAND_INS: dict[tuple[str, ...], Any] = {
    ("rounds",): 1,
    ("data",): {"path": "medquad_mini"},
    ("data", "path"): "medquad_mini",
}
"""What a recipe must have, where reading has to go on without it."""


def _take_out(table: dict[str, Any], where: tuple[str, ...]) -> None:
    """Remove a key, or the list that a wrong item stands in; put in what a recipe must have."""
    here = table
    for depth, part in enumerate(where, start=1):
        inner = here.get(part)
        if depth == len(where) or not isinstance(inner, dict):
            here.pop(part, None)
            if where[:depth] in STAND_INS:
                here[part] = deepcopy(STAND_INS[where[:depth]])
            return
        here = cast(dict[str, Any], inner)


def _where(loc: Sequence[int | str]) -> tuple[str, ...]:
    """A pydantic location as a recipe's key: without the tag of a chosen algorithm."""
    parts = [str(part) for part in loc]
    if parts[:1] == ["algorithm"] and len(parts) > 1 and parts[1] in ALGORITHMS:
        del parts[1]
    return tuple(parts)


def _explain(where: tuple[str, ...], item: Any, table: Mapping[str, Any]) -> str:
    key = ".".join(where)
    match item["type"]:
        case "extra_forbidden":
            others = [n for n, cfg in ALGORITHM_CONFIGS.items() if where[-1] in cfg.model_fields]
            if where[0] == "algorithm" and others:
                return f"{key}: is a key of {', '.join(others)}, not of {_chosen(table[where[0]])}."
            near = nearest_key(key, _chosen(table.get("algorithm", {})))
            return f"{key}: unknown key." + (f" Did you mean {near}?" if near else "")
        case "missing":
            return f"{key}: is missing."
        case "union_tag_invalid":
            section = item["input"]
            if not isinstance(section, dict):
                return f"{key}: is a section. Name the algorithm with {key}.name."
            chosen = _chosen(cast(dict[str, Any], section))
            return (
                f"{key}.name: there is no algorithm '{chosen}'.{did_you_mean(chosen, ALGORITHMS)} "
                f"There are: {', '.join(ALGORITHMS)}."
            )
        case "model_type":
            return f"{key}: is a section; set single keys of it, as in {key}.key = value."
        case "tuple_type":
            return f'{key}: should be a list, for instance ["q_proj", "v_proj"].'
        case "value_error":
            return f"{key}: {item['ctx']['error']}."
        case _:
            given = item["input"]
            shown = f", got {given!r}" if isinstance(given, (str, int, float, bool)) else ""
            return f"{key}: {item['msg'].replace('Input should', 'should')}{shown}."


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: _copy(cast(Mapping[str, Any], v)) if isinstance(v, Mapping) else v
        for k, v in table.items()
    }


def nearest_key(key: str, algorithm: str) -> str | None:
    """The known key that a mistyped one most likely means; a dotted one for a dotted one."""
    keys, last = list(known_keys(algorithm)), key.rsplit(".", 1)[-1]
    if elsewhere := [k for k in keys if k.rsplit(".", 1)[-1] == last]:  # in the wrong section
        return difflib.get_close_matches(key, elsewhere, n=1, cutoff=0)[0]
    known = [k for k in keys if ("." in k) == ("." in key)]
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return close[0]
    by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    return by_last[close[0]] if close else None


def known_keys(algorithm: str = "fedavg") -> Iterator[str]:
    """Every key that a recipe with this algorithm may hold, dotted."""
    for name, cls in sections(algorithm).items():
        yield from (f"{name}.{key}" for key in cls.model_fields)
    yield from ("seed", "rounds", *sections(algorithm))


def sections(algorithm: str = "fedavg") -> dict[str, type[BaseModel]]:
    """The tables of a recipe and the models that describe them."""
    return {
        "model": ModelConfig,
        "adapter": AdapterConfig,
        "data": DataConfig,
        "partition": PartitionConfig,
        "sampling": SamplingConfig,
        "train": TrainConfig,
        "algorithm": ALGORITHM_CONFIGS.get(algorithm, AlgorithmConfig),
        "evaluate": EvaluateConfig,
        "checkpoint": CheckpointConfig,
        "runtime": RuntimeConfig,
    }


# --- writing ---------------------------------------------------------------------------------


def to_toml(run: RunConfig) -> str:
    """The resolved recipe: every value spelt out; `parse` of it gives an equal RunConfig."""
    return tomli_w.dumps(run.model_dump(mode="json", exclude_none=True, serialize_as_any=True))
