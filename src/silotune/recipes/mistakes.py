"""A recipe's mistakes in words: the key, what is wrong, and the key that was probably meant."""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from pydantic import BaseModel

from silotune.algorithms import ALGORITHMS
from silotune.algorithms.base import AlgorithmConfig
from silotune.compression.config import WireConfig
from silotune.core.wording import did_you_mean, shortened
from silotune.data.partition import PartitionConfig
from silotune.data.reading import DataConfig
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.privacy.base import PrivacyConfig
from silotune.privacy.secure_sum.config import SecureSumConfig
from silotune.recipes.algorithm import (
    ALGORITHM_CONFIGS,
    FLOWER,
    FLOWER_EXAMPLE,
    PYTHON,
    PYTHON_EXAMPLE,
    FlowerStrategyConfig,
    chosen_algorithm,
)
from silotune.recipes.other_tools import SECTIONS, known_elsewhere
from silotune.recipes.sections import (
    BudgetConfig,
    CheckpointConfig,
    CompareConfig,
    FinishConfig,
    PlanConfig,
    ReportConfig,
    RuntimeConfig,
    SamplingConfig,
    StopConfig,
    SweepConfig,
)
from silotune.training.loop import TrainConfig
from silotune.training.scoring import EvaluateConfig
from silotune.training.server_training import DistillConfig, ServerConfig
from silotune.training.tasks.prefer import PreferConfig

LISTS = {
    "": '["one", "two"]',
    "adapter.targets": '["q_proj", "v_proj"]',
    "compare.algorithms": '["fedprox"]',
    "finish.interpolate": "[0.0, 0.5, 1.0]",
    "sweep.keys": '["train.lr=1e-4,1e-3"]',
    "sweep.runs": '["train.lr=1e-3 adapter.rank=8"]',
}
"""Examples of lists, by key."""
MOST_INSIDE = 5
"""Keys of an unknown section that are explained."""


def explain(where: tuple[str, ...], item: Any, table: Mapping[str, Any]) -> str:
    """One mistake as `key: what is wrong`, from one item of a pydantic ValidationError.

    Args:
        where: The key, from `where` in parse.py.
        item: The error as pydantic reports it.
        table: The entire recipe, which says which algorithm was chosen.
    """
    key = shortened(".".join(where))
    match item["type"]:
        case "extra_forbidden":
            chosen = chosen_algorithm(table.get("algorithm", {}))
            others = [n for n, cfg in ALGORITHM_CONFIGS.items() if where[-1] in cfg.model_fields]
            if where[0] == "algorithm" and chosen in (FLOWER, PYTHON):
                near = did_you_mean(where[-1], FlowerStrategyConfig.model_fields)
                whose = "strategy" if chosen == FLOWER else "function"
                return (
                    f"{key}: unknown key.{near} Put the {whose}'s arguments in algorithm.options."
                )
            if where[0] == "algorithm" and others:
                return f"{key}: is a key of {', '.join(others)}, not of {chosen}."
            return f"{key}: unknown key.{_guess('.'.join(where), item['input'], chosen)}"
        case "missing":
            return f"{key}: is missing."
        case "union_tag_invalid":
            section = item["input"]
            if not isinstance(section, dict):
                return f"{key}: is a section. Name the algorithm with {key}.name."
            chosen = chosen_algorithm(cast(dict[str, Any], section))
            return (
                f"{key}.name: there is no algorithm '{chosen}'.{did_you_mean(chosen, ALGORITHMS)} "
                f"There are: {', '.join(ALGORITHM_CONFIGS)}."
                + (f" {FLOWER_EXAMPLE}" if re.match("flower|flwr", chosen.lower()) else "")
                + (f" {PYTHON_EXAMPLE}" if re.match("py", chosen.lower()) else "")
            )
        case "string_pattern_mismatch":
            names_function = not key.startswith(("algorithm", "compare"))
            if names_function or str(item["input"]).startswith("python:"):
                return f"{key}: is not the path of a function. {PYTHON_EXAMPLE}"
            return f"{key}: is not the path of a class. {FLOWER_EXAMPLE}"
        case "model_type" | "dict_type":
            return f"{key}: is a section; set individual keys in it, for example {key}.key = value."
        case "tuple_type":
            return f"{key}: should be a list, for example {LISTS.get(key, LISTS[''])}."
        case "value_error":
            return f"{key}: {item['ctx']['error']}."
        case _:
            given = item["input"]
            is_plain = isinstance(given, (str, int, float, bool))
            shown = f", got {shortened(repr(given))}" if is_plain else ""
            return f"{key}: {item['msg'].replace('Input should', 'should')}{shown}."


def _guess(key: str, given: object, algorithm: str) -> str:
    """What an unknown key was probably meant to be; for an unknown section, also its keys."""
    near = nearest_key(key, algorithm)
    if isinstance(given, Mapping):
        near = SECTIONS.get(key.lower(), near)
    other = known_elsewhere(key)
    remark = (
        f" ({other.remark})" if other is not None and other.key == near and other.remark else ""
    )
    said = "" if near is None else f" Did you mean {near}{remark}?"
    if not isinstance(given, Mapping) or "." in key:
        return said
    meant = {
        name: known.key
        for name in cast(Mapping[str, object], given)
        if (known := known_elsewhere(name)) is not None
    }
    inside = ", ".join(f"{name} is {own}" for name, own in list(meant.items())[:MOST_INSIDE])
    return f"{said} In it, {inside}." if inside else said


def nearest_key(key: str, algorithm: str) -> str | None:
    """The known key that a mistyped one most likely means; dotted if the mistyped one is."""
    if len(key) > 200:
        return None  # no key is so long, and comparing takes long
    keys, last = list(known_keys(algorithm)), key.rsplit(".", 1)[-1].replace("-", "_")
    if (other := known_elsewhere(key)) is not None:
        return other.key
    if elsewhere := [k for k in keys if k.rsplit(".", 1)[-1] == last]:  # in the wrong section
        return difflib.get_close_matches(key, elsewhere, n=1, cutoff=0)[0]
    known = [k for k in keys if ("." in k) == ("." in key)]
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return close[0]
    by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    return by_last[close[0]] if close else None


def known_keys(algorithm: str = "fedavg") -> Iterator[str]:
    """Every key that a recipe with this algorithm may have, dotted."""
    for name, cls in sections(algorithm).items():
        yield from (f"{name}.{key}" for key in cls.model_fields)
    yield from ("seed", "rounds", "task", "track", *sections(algorithm))


def sections(algorithm: str = "fedavg") -> dict[str, type[BaseModel]]:
    """The tables of a recipe and the models that describe them, in the order of docs/recipe.md."""
    return {
        "model": ModelConfig,
        "adapter": AdapterConfig,
        "data": DataConfig,
        "partition": PartitionConfig,
        "sampling": SamplingConfig,
        "train": TrainConfig,
        "prefer": PreferConfig,
        "server": ServerConfig,
        "distill": DistillConfig,
        "algorithm": ALGORITHM_CONFIGS.get(algorithm, AlgorithmConfig),
        "privacy": PrivacyConfig,
        "secure_sum": SecureSumConfig,
        "wire": WireConfig,
        "evaluate": EvaluateConfig,
        "checkpoint": CheckpointConfig,
        "finish": FinishConfig,
        "runtime": RuntimeConfig,
        "budget": BudgetConfig,
        "stop": StopConfig,
        "plan": PlanConfig,
        "report": ReportConfig,
        "compare": CompareConfig,
        "sweep": SweepConfig,
    }
