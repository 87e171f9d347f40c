"""What the algorithms share: their common settings, and the weighted mean of the deltas."""

from typing import ClassVar, Literal

from torch import Tensor

from silotune.core.tree import weighted_mean
from silotune.core.types import Config, Update, Updates


class AlgorithmConfig(Config):
    """Settings that every algorithm has; each algorithm adds its own."""

    weights: Literal["examples", "uniform"] = "examples"
    """Weight of a client in the mean: its number of training rows, or the same for every client."""
    needs_lora: ClassVar[bool] = False
    """Whether it needs LoRA's two factors, so that other kinds of adapter are refused."""


def weight_of(update: Update, cfg: AlgorithmConfig) -> float:
    """A client's weight before normalisation."""
    return float(update.num_examples) if cfg.weights == "examples" else 1.0


def mean_delta(updates: Updates, cfg: AlgorithmConfig) -> dict[str, Tensor]:
    """The weighted mean of the deltas: `sum_i p_i D_i` with `p_i = w_i / sum_j w_j`."""
    return weighted_mean((weight_of(u, cfg), u.delta) for u in updates)
