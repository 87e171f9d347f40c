"""Several clients' LoRA factors on one frozen base: each row is multiplied by its own client's.

The base's product runs once over the rows of all clients; what is added to it is a batched product
of low rank. PEFT's layers stay in the model, and only their forward is replaced for a while. The
idea is known from serving (S-LoRA, Sheng et al. 2023, arXiv:2311.03285) and from training several
adapters on a GPU. This file knows PEFT's layers, but neither rounds nor optimizers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from silotune.core.lora import Pair, is_core
from silotune.core.types import AdapterState
from silotune.models.beside import TRAINED, lora_layers
from silotune.models.loading import LoadedModel


@dataclass(frozen=True)
class Part:
    """One client's rows in a joint batch; they follow those of the part before."""

    client: int
    """Its place in the group."""
    num_rows: int
    length: int
    """Of its rows in a batch of its own. What is behind it is padding for the others' sake."""


class StackedAdapters:
    """The adapters of a group of clients, and their sources of dropout."""

    def __init__(
        self, loaded: LoadedModel, starts: Sequence[AdapterState], seeds: Sequence[int]
    ) -> None:
        """Stack the clients' tensors.

        Args:
            loaded: A model for which `why_not_stacked` finds nothing. What stands beside its
                adapter is used for all clients.
            starts: Each client's trained tensors, of the same names and shapes.
            seeds: Each client's seed of dropout. On a CPU, its masks are those that a loop draws
                which is seeded with it.
        """
        device = loaded.device
        self.loaded = loaded
        self.stacks: dict[str, nn.Parameter] = {
            name: nn.Parameter(torch.stack([start[name].to(p) for start in starts]))
            for name, p in loaded.parameters.items()
        }
        """(clients, *shape) by name."""
        self.clients: list[dict[str, nn.Parameter]] = [
            {name: nn.Parameter(stack.detach()[k]) for name, stack in self.stacks.items()}
            for k in range(len(starts))
        ]
        """Each client's tensors: views of the stacks, so that both change together."""
        self._chances = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._parts: Sequence[Part] = ()
        self._groups: Tensor | None = None
        self._masks: dict[int, Tensor] = {}
        self._keeps_masks = _recomputes(loaded)
        self.drops_out = True

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the model's adapted layers use these adapters instead of their own."""
        layers = list(lora_layers(self.loaded.model, self.loaded.parameters))
        for _, pair, layer in layers:
            layer.forward = _Forward(self, pair, layer)
        try:
            yield
        finally:
            for _, _, layer in layers:
                del layer.forward  # the class has its own

    def expect(self, parts: Sequence[Part]) -> None:
        """Say whose rows the next batch holds."""
        counts = {part.num_rows for part in parts}
        owners = [part.client for part in parts]
        if len(counts) > 1:  # every row is a group of its own
            owners = [part.client for part in parts for _ in range(part.num_rows)]
        self._parts, self._masks = parts, {}
        everyone = owners == list(range(len(self.clients)))
        self._groups = None if everyone else torch.tensor(owners, device=self.loaded.device)

    def gradients(self, client: int, learning: Mapping[str, nn.Parameter]) -> None:
        """Give a client's tensors their part of the stacks' gradients."""
        for name, p in learning.items():
            whole = self.stacks[name].grad
            p.grad = None if whole is None else whole[client]

    def clear(self) -> None:
        """Drop the gradients of the stacks."""
        for stack in self.stacks.values():
            stack.grad = None

    # --- for the layers

    def add(self, pair: Pair, layer: Any, x: Tensor) -> Tensor:
        """What the clients' factors add to a layer's output: (rows, length, d_out).

        Args:
            pair: The names of the layer's factors.
            layer: PEFT's.
            x: The layer's input in the factors' dtype, (rows, length, d_in).
        """
        num_rows = sum(part.num_rows for part in self._parts)
        if x.dim() != 3 or x.shape[0] != num_rows:
            raise _OtherRows(tuple(x.shape))
        right, left = self._of(pair.right), self._of(pair.left)  # (groups, r, d_in), (.., d_out, r)
        dropped = self._dropped(layer, x).reshape(right.shape[0], -1, x.shape[2])
        inside = torch.bmm(dropped, right.transpose(1, 2))  # (groups, tokens, r)
        if pair.core in self.stacks:
            inside = torch.bmm(inside, self._of(pair.core).transpose(1, 2))
        out = torch.bmm(inside, left.transpose(1, 2))
        return out.reshape(*x.shape[:2], -1) * layer.scaling[TRAINED]

    def _of(self, name: str) -> Tensor:
        stack = self.stacks[name]
        return stack if self._groups is None else stack.index_select(0, self._groups)

    def _dropped(self, layer: Any, x: Tensor) -> Tensor:
        """The input after dropout, each client's from its own generator, in the loop's order."""
        rate = getattr(layer.lora_dropout[TRAINED], "p", 0.0) if self.drops_out else 0.0
        if rate == 0.0:
            return x
        kept = self._masks.get(id(layer))
        if kept is not None:  # a checkpointed layer, run again in the backward pass
            return x * kept
        mask, at = torch.zeros_like(x), 0
        for part in self._parts:
            drawn = x.new_empty(part.num_rows, part.length, x.shape[2])
            drawn.bernoulli_(1 - rate, generator=self._chances[part.client])
            mask[at : at + part.num_rows, : part.length] = drawn
            at += part.num_rows
        mask.div_(1 - rate)
        if self._keeps_masks:
            self._masks[id(layer)] = mask
        return x * mask


class _Forward:
    """The forward of a LoRA layer for the rows of several clients; otherwise as PEFT's."""

    def __init__(self, stacked: StackedAdapters, pair: Pair, layer: Any) -> None:
        self.stacked, self.pair, self.layer = stacked, pair, layer

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        result = layer.base_layer(x, *args, **kwargs)
        wanted = result.dtype
        for name in layer.active_adapters:
            if name == TRAINED:
                own = x.to(self.stacked.stacks[self.pair.right].dtype)
                result = result + self.stacked.add(self.pair, layer, own)
            elif name in layer.lora_A:  # beside the adapter: the same factors for everyone
                right, left = layer.lora_A[name], layer.lora_B[name]
                own = layer.lora_dropout[name](x.to(right.weight.dtype))
                result = result + left(right(own)) * layer.scaling[name]
        return result.to(wanted)


class _OtherRows(Exception):
    """An adapted layer does not see the batch's rows, so it is unknown whose tokens it sees."""


# --- what it can be used for


def why_not_stacked(loaded: LoadedModel) -> str | None:
    """Why the clients of this model cannot be trained in one batch; None if they can be.

    Two rows that are made up are run side by side and alone, without gradients.

    Args:
        loaded: The model. Not changed.
    """
    if loaded.kind != "lora" or loaded.quantization != "none":
        return "only LoRA on a base that is not quantised is trained in one batch"
    from peft.tuners.lora import Linear

    known: set[str] = set()
    for name, pair, layer in lora_layers(loaded.model, loaded.parameters):
        if not isinstance(layer, Linear) or TRAINED in layer.lora_variant:
            return f"'{name}' is not a plain linear layer with LoRA"
        known |= {pair.left, pair.right, pair.core}
    if others := [n for n in loaded.parameters if n not in known and not is_core(n)]:
        return f"'{others[0]}' is trained too, and only LoRA's factors are stacked"
    return _why_rows_meet(loaded)


def _recomputes(loaded: LoadedModel) -> bool:
    return bool(getattr(loaded.model.get_base_model(), "is_activation_checkpointing", False))


@torch.no_grad()
def _why_rows_meet(loaded: LoadedModel) -> str | None:
    """Whether a row's output depends on the rows beside it, or on chance outside the adapter."""
    size = loaded.model.get_input_embeddings().weight.shape[0]
    short, long = (torch.arange(at, at + n) % size for at, n in ((20, 5), (3, 9)))
    both = torch.zeros(2, 9, dtype=torch.int64)
    both[0, :5], both[1] = short, long
    start = {name: p.detach() for name, p in loaded.parameters.items()}
    stacked = StackedAdapters(loaded, [start, start], [0, 0])
    stacked.drops_out = False
    cuda = [loaded.device] if loaded.device.type == "cuda" else []

    def run(ids: Tensor, *parts: Part) -> Tensor:
        stacked.expect(parts)
        return loaded.model(input_ids=ids.to(loaded.device), use_cache=False).logits.float()

    was_training = loaded.model.training
    try:
        with stacked.attached(), torch.random.fork_rng(devices=cuda):
            loaded.model.train()
            before = _chance(loaded.device)
            joint = run(both, Part(0, 1, 5), Part(1, 1, 9))
            if not torch.equal(before, _chance(loaded.device)):
                return "the base itself has dropout, and draws it for all rows at once"
            alone = [run(short[None], Part(0, 1, 5))[0], run(long[None], Part(1, 1, 9))[0]]
    except _OtherRows as error:
        return f"an adapted layer sees its tokens out of their rows, as {error.args[0]}"
    finally:
        loaded.model.train(was_training)
    # as in check_packing: half precision moves such senseless texts by a few per cent
    share = 0.01 if loaded.dtype in (torch.float32, torch.float64) else 0.3
    for row, own in zip((joint[0, :5], joint[1]), alone, strict=True):
        if not (row - own).norm() <= share * own.norm():
            return "in this model, a row's output depends on the rows beside it"
    return None


def _chance(device: torch.device) -> Tensor:
    """The state of torch's own source of chance on a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
