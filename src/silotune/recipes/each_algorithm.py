"""Every algorithm that a recipe names: its own, and those of [compare]."""

from silotune.recipes.algorithm import (
    AnyAlgorithmConfig,
    FlowerStrategyConfig,
    OwnAlgorithmConfig,
)
from silotune.recipes.schema import RunConfig


def each_algorithm(run: RunConfig) -> dict[str, AnyAlgorithmConfig]:
    """The sections of all algorithms by their keys in the recipe."""
    arms = {f"compare.algorithms.{i}": arm for i, arm in enumerate(run.compare.algorithms)}
    return {"algorithm": run.algorithm, **arms}


def foreign(arm: AnyAlgorithmConfig) -> str:
    """What an algorithm without known facts is, in words; empty for those of this house."""
    if isinstance(arm, FlowerStrategyConfig):
        return "a Flower strategy"
    return "own code" if isinstance(arm, OwnAlgorithmConfig) else ""
