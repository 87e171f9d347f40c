"""The classification head of a model: its modules, its initial values, and how it is trained.

Most bases have no head for the classes of a recipe, so it starts at random values: drawn by name
from the run's seed, the same at every client and in every process. This file knows modules, but not
adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from silotune.core.errors import ModelError
from silotune.core.seeds import generator


@dataclass(frozen=True)
class Head:
    """The modules of a classification head, by their names in the plain model."""

    modules: tuple[str, ...]
    fresh: tuple[str, ...]
    """Tensors of the model that its files do not contain."""

    def holds(self, name: str) -> bool:
        """Whether a tensor belongs to the head, whatever wraps its module."""
        return any(f".{module}." in f".{name}" for module in self.modules)


def find_head(base: Any, fresh: Sequence[str]) -> Head:
    """Find the modules outside the encoder or decoder, and those inside that its files lack.

    A pooler that a checkpoint lacks also starts at random values, so it is trained with the head.

    Args:
        base: A plain model for classification.
        fresh: Its tensors that its files do not contain; see `completeness.check_complete`.
    """
    within = f"{base.base_model_prefix}."
    outside = dict.fromkeys(name.split(".", 1)[0] for name in outside_tensors(base))
    inside = {f"{within}{name.split('.')[1]}" for name in fresh if name.startswith(within)}
    return Head((*outside, *sorted(inside)), tuple(fresh))


def check_length(base: Any, max_length: int) -> None:
    """Refuse rows with more tokens than the encoder has learned positions.

    Raises:
        ModelError: Rows may be too long; the message says how many tokens fit.
    """
    room = num_positions(base)
    if room is not None and max_length > room:
        raise ModelError(
            f"train.max_length = {max_length}: the model has {room} positions.\n"
            f"  Set train.max_length = {room} or less."
        )


def num_positions(base: Any) -> int | None:
    """How many tokens an encoder has learned positions for; None if it has not learned any."""
    tables = [
        module.num_embeddings
        - (0 if module.padding_idx is None else module.padding_idx + 1)  # as in RoBERTa
        for name, module in base.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    return min(tables, default=None)


def outside_tensors(base: Any) -> list[str]:
    """Names of the tensors outside the encoder or decoder."""
    within = f"{base.base_model_prefix}."
    return [name for name, _ in base.named_parameters() if not name.startswith(within)]


@torch.no_grad()
def draw_head(base: Any, head: Head, seed: int) -> None:
    """Set the initial values of new tensors, the same at every client and in every process."""
    gen = generator(seed, "head")
    spread = getattr(base.config, "initializer_range", 0.02)
    for name in head.fresh:
        parameter = base.get_parameter(name)
        drawn = torch.zeros(parameter.shape)
        if parameter.dim() > 1:
            drawn.normal_(0.0, spread, generator=gen)
        elif "norm" in name.lower() and name.endswith("weight"):
            drawn.fill_(1.0)
        parameter.copy_(drawn)


def head_as_loaded(model: Any, head: Head) -> dict[str, Tensor]:
    """The head's tensors as they were before training, by their names in the plain model."""
    plain = model.get_base_model()
    return {
        name.replace("original_module.", ""): tensor.detach().clone()
        for name, tensor in plain.named_parameters()
        if ".original_module." in name and head.holds(name)
    }


def set_head(model: Any, head: Head, *, trained: bool) -> None:
    """Train the head in float32, or not at all."""
    for name, parameter in model.named_parameters():
        if head.holds(name) and ".original_module." not in name:
            parameter.requires_grad_(trained)
    for name, module in model.named_modules():
        leaf = not list(module.children()) and any(True for _ in module.parameters())
        if leaf and head.holds(f"{name}.") and ".original_module" not in name:
            module.float()
            module.register_forward_pre_hook(_in_own_dtype)


def _in_own_dtype(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast the features of a half-precision body for a float32 head."""
    wanted = next(module.parameters()).dtype
    return tuple(a.to(wanted) if isinstance(a, Tensor) else a for a in args)
