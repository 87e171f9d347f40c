"""LoRA's factors in a live model: their rank, cores between them, frozen factors beside them.

Frozen factors are a second adapter of PEFT on the same layers, always active next to the trained
one and with its scaling, but without dropout. A core is a small linear layer in front of the left
factor. The base's weights, quantised or not, are not touched. This file knows PEFT's layers, but
neither clients nor rounds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from silotune.core.errors import UpdateError
from silotune.core.lora import Pair, pairs_of
from silotune.core.types import AdapterState

TRAINED, BESIDE = "default", "residual"
"""PEFT's names of the two adapters."""
HOLDERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
"""Attributes of a LoRA layer with a factor by the adapter's name."""


Parameters = Mapping[str, nn.Parameter]
"""The trained tensors of a model, by the names under which they are saved and sent."""


def lora_layers(model: Any, parameters: Parameters) -> Iterator[tuple[str, Pair, Any]]:
    """Name in the plain model, pair of factors and PEFT's layer of every adapted module."""
    pairs = {id(parameters[pair.left]): pair for pair in pairs_of(parameters)}
    pairs |= {id(parameters[pair.right]): pair for pair in pairs.values()}
    if not pairs:
        return
    for name, layer in model.get_base_model().named_modules():
        own = (_factor(layer, holder, TRAINED) for holder in HOLDERS)
        found = [pairs[id(factor)] for factor in own if id(factor) in pairs]
        if found:
            yield name, found[0], layer


def _factor(layer: Any, holder: str, adapter: str) -> nn.Parameter | None:
    held = getattr(layer, holder, {})
    if adapter not in held:
        return None
    factor = held[adapter]
    return factor if isinstance(factor, nn.Parameter) else factor.weight


@torch.no_grad()
def set_ranks(parameters: Parameters, state: AdapterState) -> None:
    """Give each pair of factors the rank that it has in `state`; their values become 0.

    The scaling of the layers stays. A pair whose shapes differ in more than the rank is left as it
    is.
    """
    for pair in pairs_of(parameters):
        left, right = parameters[pair.left], parameters[pair.right]
        if pair.left not in state or pair.right not in state:
            continue
        new_left, new_right = state[pair.left], state[pair.right]
        if new_right.shape == right.shape:
            continue
        if _fit(new_left, new_right, left, right):
            for factor, new in ((left, new_left), (right, new_right)):
                factor.grad = None  # of the old shape
                factor.data = factor.data.new_zeros(new.shape)


def set_cores(model: Any, parameters: dict[str, nn.Parameter], state: AdapterState) -> None:
    """Put a core between the factors of each module that has one in `state`; remove all others.

    Args:
        model: A PEFT model with LoRA.
        parameters: What is trained: new cores are added, with a core's values still to be written,
            and those that are removed are taken out.
        state: Its names decide. A name that belongs to no linear layer is left for the caller to
            refuse.
    """
    for _, pair, layer in list(lora_layers(model, parameters)):
        found = dict(layer.lora_B).get(TRAINED)
        has_room = isinstance(found, nn.Linear)
        if not has_room or (pair.core in state) == (pair.core in parameters):
            continue
        left = cast(Any, found)
        if pair.core in parameters:
            del parameters[pair.core]
            left.in_front.remove()
            del left.in_front, left.core
            continue
        rank, like = len(parameters[pair.right]), parameters[pair.left]
        with torch.random.fork_rng(devices=[]):  # values are drawn, and overwritten
            core = nn.Linear(rank, rank, bias=False, device=like.device, dtype=like.dtype)
        # a hook, because PEFT and Opacus know the factor's layer by its class
        left.core, left.in_front = core, left.register_forward_pre_hook(_through_core)
        parameters[pair.core] = cast(nn.Parameter, core.weight)


def _through_core(left: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (left.core(*inputs),)


def _fit(left: Tensor, right: Tensor, own_left: Tensor, own_right: Tensor) -> bool:
    """Whether factors differ from a module's own in no more than the rank, which is not 0."""
    return (
        left.dim() == own_left.dim()
        and right.shape[1:] == own_right.shape[1:]
        and (left.shape[0], *left.shape[2:]) == (own_left.shape[0], *own_left.shape[2:])
        and left.shape[1] == right.shape[0] > 0
    )


def read_beside(model: Any, parameters: Parameters) -> dict[str, Tensor]:
    """The frozen factors beside the adapter, by the names under which they are saved and sent."""
    found: dict[str, Tensor] = {}
    for _, pair, layer in lora_layers(model, parameters):
        for name, holder in _holders(pair).items():
            if (factor := _factor(layer, holder, BESIDE)) is not None:
                found[name] = factor.detach()
    return found


@torch.no_grad()
def write_beside(model: Any, parameters: Parameters, state: AdapterState) -> None:
    """Replace all frozen factors beside the adapter; none are left that `state` does not have.

    Args:
        model: A PEFT model with LoRA.
        parameters: What is trained. Whether it has a gradient stays as it is.
        state: Tensors by the names that `read_beside` gives, of any rank.

    Raises:
        UpdateError: A name or a shape that does not fit the model.
    """
    layers = {pair: layer for _, pair, layer in lora_layers(model, parameters)}
    known = {name for pair in layers for name in _holders(pair)}
    if unknown := sorted(state.keys() - known):
        raise UpdateError(
            f"adapter for this model: '{unknown[0]}' belongs to no module that it adapts.\n"
            "  Use the same model, adapter and algorithm at this client as at the server."
        )
    learning = [p.requires_grad for p in parameters.values()]
    for pair, layer in layers.items():
        left, right = (state.get(name) for name in (pair.beside.left, pair.beside.right))
        if left is None or right is None:
            if _is_beside(layer):
                layer.delete_adapter(BESIDE)
            continue
        _check_shapes(parameters, pair, left, right)
        if not _is_beside(layer):
            _add_layer(layer)
        for name, holder in _holders(pair).items():
            factor = _factor(layer, holder, BESIDE)
            assert factor is not None
            like = parameters[pair.left]
            factor.data = state[name].detach().to(like.device, torch.float32, copy=True)
    for parameter, learns in zip(parameters.values(), learning, strict=True):
        parameter.requires_grad_(learns)  # PEFT lets all active adapters learn


def _holders(pair: Pair) -> dict[str, str]:
    """The frozen factors' names -> the attributes of PEFT's layer that hold them."""
    return {
        new: next(part for part in old.split(".") if part in HOLDERS)
        for new, old in ((pair.beside.left, pair.left), (pair.beside.right, pair.right))
    }


def _is_beside(layer: Any) -> bool:
    return any(_factor(layer, holder, BESIDE) is not None for holder in HOLDERS)


def _add_layer(layer: Any) -> None:
    """A second adapter on a layer, frozen, active, and scaled like the first."""
    from peft import LoraConfig

    config = LoraConfig(r=1, lora_alpha=1, lora_dropout=0.0, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):  # PEFT draws values, which are overwritten
        layer.update_layer(BESIDE, r=1, lora_alpha=1, config=config)
    layer.scaling[BESIDE] = layer.scaling[TRAINED]
    layer.set_adapter([TRAINED, BESIDE])
    for holder in HOLDERS:
        if (factor := _factor(layer, holder, BESIDE)) is not None:
            factor.requires_grad_(False)


def _check_shapes(parameters: Parameters, pair: Pair, left: Tensor, right: Tensor) -> None:
    """Refuse factors that are not of this module."""
    own = (parameters[pair.left], parameters[pair.right])
    if not _fit(left, right, *own):
        raise UpdateError(
            f"adapter for this model: '{pair.beside.left}' and '{pair.beside.right}' have the "
            f"shapes {tuple(left.shape)} and {tuple(right.shape)}, which do not fit the module.\n"
            "  Use the same model, adapter and algorithm at this client as at the server."
        )


@contextmanager
def described_ranks(model: Any, parameters: Parameters, config: Any) -> Iterator[None]:
    """Inside, PEFT's configuration says the ranks and scalings that the live factors have.

    Args:
        model: A PEFT model with LoRA; nothing stands beside its adapter.
        parameters: What is trained.
        config: PEFT's configuration of the trained adapter.
    """
    layers = list(lora_layers(model, parameters))
    ranks = {name: len(parameters[pair.right]) for name, pair, _ in layers}
    if all(ranks[name] == layer.r[TRAINED] for name, _, layer in layers):
        yield
        return
    alphas = {name: layer.scaling[TRAINED] * ranks[name] for name, _, layer in layers}
    rank, alpha = max(ranks.values()), max(alphas.values())
    new = {
        "use_rslora": False,  # PEFT then scales by alpha / rank
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
    }
    before = {key: getattr(config, key) for key in new}
    try:
        for key, value in new.items():
            setattr(config, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)
