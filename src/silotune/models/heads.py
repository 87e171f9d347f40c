"""The classification head of a model: which modules it is, its first values, and how it trains.

Most bases bring no head for the classes of a recipe, so it begins at random: drawn by name from the
run's seed, the same at every client and in every process. This file knows modules, not adapters.
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
    """Tensors of the model that its files do not hold."""

    def holds(self, name: str) -> bool:
        """Whether a tensor, by whatever wraps its module, belongs to the head."""
        return any(f".{module}." in f".{name}" for module in self.modules)


def find_head(base: Any, fresh: Sequence[str]) -> Head:
    """What lies outside the encoder or decoder, and inside it what its files do not hold.

    A pooler that a checkpoint lacks begins at random too, so it has to be learned with the head.

    Args:
        base: A plain model for classification.
        fresh: Its tensors that its files do not hold.

    Raises:
        ModelError: Its files lack more than a head and a pooler.
    """
    within = f"{base.base_model_prefix}."
    lost = [name for name in fresh if name.startswith(within) and "pool" not in name]
    if lost:
        raise ModelError(
            f"model.name: its files lack '{lost[0]}', or have it in another shape ({len(lost)} "
            "tensors), so the model is not whole.\n"
            "  Name a folder or hub id that holds all weights of the model."
        )
    outside = dict.fromkeys(name.split(".", 1)[0] for name in outside_tensors(base))
    inside = {f"{within}{name.split('.')[1]}" for name in fresh if name.startswith(within)}
    return Head((*outside, *sorted(inside)), tuple(fresh))


def check_length(base: Any, max_length: int) -> None:
    """Refuse rows that are longer than the encoder has learned positions.

    Raises:
        ModelError: Says how many tokens fit.
    """
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            before = 0 if module.padding_idx is None else module.padding_idx + 1  # as in RoBERTa
            room = module.num_embeddings - before
            if max_length > room:
                raise ModelError(
                    f"train.max_length = {max_length}: the model has places for {room} tokens.\n"
                    f"  Set train.max_length = {room} or less."
                )


def outside_tensors(base: Any) -> list[str]:
    """Names of the tensors that lie outside the encoder or decoder."""
    within = f"{base.base_model_prefix}."
    return [name for name, _ in base.named_parameters() if not name.startswith(within)]


@torch.no_grad()
def draw_head(base: Any, head: Head, seed: int) -> None:
    """Give the new tensors their first values, the same at every client and in every process."""
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
    """The head's tensors from before its training, by their names in the plain model."""
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
    """A half-precision body hands its features to a float32 head."""
    wanted = next(module.parameters()).dtype
    return tuple(a.to(wanted) if isinstance(a, Tensor) else a for a in args)
