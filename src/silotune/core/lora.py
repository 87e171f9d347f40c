"""LoRA's factors by name: which two tensors belong together, their rank, and what comes with them.

A module's product is `left @ right`, times a scaling that is the same for all clients at every
rank, see `AdapterConfig.ranks`. Some algorithms keep the products that the factors have no room
for beside the adapter: frozen factors of the same module, under names of their own. Fed-SB trains a
small matrix between the factors, the core: `left @ core @ right`. This file knows names and shapes
of tensors, but no model and no library.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from silotune.core.types import AdapterState

FROZEN = {"lora_A": "lora_B", "lora_embedding_B": "lora_embedding_A"}
"""The factor that PEFT initialises at random, and the other one, which starts at 0."""
BESIDE = {
    "lora_A": "residual_A",
    "lora_B": "residual_B",
    "lora_embedding_A": "residual_embedding_A",
    "lora_embedding_B": "residual_embedding_B",
}
"""A trained factor's part of the name, and that of the frozen factor beside it."""
CORE = {"lora_B": "lora_core"}
"""The left factor's part of the name, and that of the core between both factors."""
RIGHT = {"lora_A", "lora_embedding_A", "residual_A", "residual_embedding_A"}


@dataclass(frozen=True)
class Pair:
    """The names of one module's factors."""

    random: str
    """Starts at random values; the one that FFA-LoRA freezes."""
    zero: str
    """Starts at 0."""

    @property
    def right(self) -> str:
        """The factor of shape (r, d_in)."""
        return self.random if RIGHT & set(self.random.split(".")) else self.zero

    @property
    def left(self) -> str:
        """The factor of shape (d_out, r)."""
        return self.zero if self.right == self.random else self.random

    @property
    def beside(self) -> "Pair":
        """The frozen factors of the same module."""
        return Pair(_renamed(self.random, BESIDE), _renamed(self.zero, BESIDE))

    @property
    def core(self) -> str:
        """The trained matrix between the factors, of shape (r, r), where an algorithm has one.

        Empty for an embedding, and for factors beside the adapter: they have none.
        """
        name = _renamed(self.left, CORE)
        return "" if name == self.left else name


def _renamed(name: str, new: dict[str, str]) -> str:
    return ".".join(new.get(part, part) for part in name.split("."))


def pairs_of(names: Iterable[str]) -> list[Pair]:
    """The pairs of trained factors among these tensors, in the order of their names."""
    known, found = set(names), list[Pair]()
    for name in sorted(known):
        parts = name.split(".")
        for random, zero in FROZEN.items():
            if random in parts:
                other = ".".join(zero if part == random else part for part in parts)
                if other in known:
                    found.append(Pair(name, other))
    return found


def is_beside(name: str) -> bool:
    """Whether a tensor is a frozen factor beside the adapter."""
    return not set(BESIDE.values()).isdisjoint(name.split("."))


def is_core(name: str) -> bool:
    """Whether a tensor is a core, between two factors."""
    return not set(CORE.values()).isdisjoint(name.split("."))


def without_identities(state: AdapterState) -> dict[str, Tensor]:
    """The state without cores that change nothing, as an algorithm adds them before round 1."""
    return {
        name: tensor
        for name, tensor in state.items()
        if not (
            is_core(name) and tensor.dim() == 2 and torch.equal(tensor, torch.eye(*tensor.shape))
        )
    }


def at_rank(state: AdapterState, rank: int) -> dict[str, Tensor]:
    """The state with the first `rank` columns and rows of all trained factors.

    Factors of a lower rank stay as they are, and so does what is beside them. The tensors are
    views of the given ones.
    """
    cut: dict[str, Tensor] = {}
    for pair in pairs_of(state):
        cut[pair.left] = state[pair.left][:, :rank]
        cut[pair.right] = state[pair.right][:rank]
    return {name: cut.get(name, tensor) for name, tensor in state.items()}


def joined(state: AdapterState) -> dict[str, Tensor]:
    """One plain adapter with the function of a state: two factors per module and nothing else.

    A core is multiplied into the left factor. What is beside the factors is stacked with them,
    `[B L] [A; R] = B A + L R`, so the rank is the sum of both ranks. A plain state comes back as it
    is.
    """
    found = {n: tensor for n, tensor in state.items() if not (is_beside(n) or is_core(n))}
    for pair in pairs_of(found):
        left = found[pair.left]
        if pair.core in state:
            found[pair.left] = (left.double() @ state[pair.core].double()).to(left.dtype)
        if pair.beside.left in state:
            found[pair.left] = torch.cat([found[pair.left], state[pair.beside.left]], dim=1)
            found[pair.right] = torch.cat([state[pair.right], state[pair.beside.right]])
    return found
