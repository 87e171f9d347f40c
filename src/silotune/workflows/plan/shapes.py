"""A recipe's model without its weights: which tensors it has, from config.json alone.

The model is built on torch's meta device, where tensors have shapes and no memory. If the
config.json of a published model cannot be reached, its known shape is used. This file does not know
message sizes or seconds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from silotune.core.algorithm import Algorithm, starting_state
from silotune.core.errors import ModelError
from silotune.core.types import ServerState
from silotune.models.adapters import put_adapter, trained_parameters
from silotune.models.base import ModelConfig, quiet_libraries
from silotune.models.base_files import check_files
from silotune.models.devices import pick_device, pick_dtype
from silotune.models.heads import Head, find_head, set_head
from silotune.models.known_shapes import KNOWN_SHAPES
from silotune.models.sources import SOURCES, is_hub_id, is_ready, resolve
from silotune.recipes.schema import RunConfig


@dataclass(frozen=True)
class Shapes:
    """A model with its first adapter, on the meta device."""

    model: Any
    """Like `LoadedModel.model`; if the base is quantised, its plain layers in float32."""
    parameters: Mapping[str, nn.Parameter]
    """What is trained and sent, by name."""
    head: frozenset[str]
    """The names that belong to a classification head."""
    notes: tuple[str, ...] = ()
    """What config.json does not say, and what is assumed instead."""


def build_shapes(run: RunConfig) -> Shapes:
    """Build what a recipe trains. No weights are read; of a hub model, only config.json is fetched.

    Of a model whose shape is known, nothing has to be fetched.

    Args:
        run: With the task classify, it names all labels.

    Raises:
        ModelError: There is no such model, or the adapter does not fit it.
    """
    base, notes = _base(run)
    labels, kind = run.task == "classify", run.adapter.kind
    head: Head | None = None
    if labels:
        fresh, more = _fresh_pooler(base, run)
        notes += more
        head = find_head(base, fresh)
    with torch.device("meta"), quiet_libraries():
        if kind != "full":
            # initial values change no shape, and some initializations read the weights
            options = {k: v for k, v in run.adapter.peft.items() if k != "init_lora_weights"}
            base = put_adapter(
                base, run.adapter.model_copy(update={"peft": options}), run.seed, head
            )
        if head is not None:
            set_head(base, head, trained=run.adapter.head != "freeze")
    parameters = _named(base, run)
    mine = (name for name in parameters if head is not None and head.holds(name))
    return Shapes(base.eval(), parameters, frozenset(mine), notes)


def first_state(shapes: Shapes, algorithm: Algorithm, num_clients: int) -> ServerState:
    """The server's state before the first round, on the meta device."""
    with torch.device("meta"):
        adapter = {n: torch.empty(p.shape) for n, p in shapes.parameters.items()}
        return starting_state(algorithm, adapter, num_clients)


def _base(run: RunConfig) -> tuple[Any, tuple[str, ...]]:
    """The plain model, and what has to be said about where its shape is from."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    cfg = run.model
    kind: Any = AutoModelForCausalLM
    more: dict[str, Any] = {}
    if run.task == "classify":
        kind, more = AutoModelForSequenceClassification, {"num_labels": len(run.data.labels or ())}
    dtype = pick_dtype(cfg.dtype, pick_device(run.runtime.device), whole=run.adapter.kind == "full")
    if cfg.quantization != "none":
        dtype = torch.float32  # unquantised layers become float32, and so do the activations
    with quiet_libraries():
        try:
            config, notes = _config(cfg, more)
            with torch.device("meta"):
                base = kind.from_config(config, dtype=dtype)
        except (OSError, ValueError) as error:
            first_line = str(error).strip().split("\n", 1)[0]
            raise ModelError(
                f"model.name = '{cfg.name}': its config.json cannot be read: {first_line}\n"
                "  Give a folder that holds it, or a hub id that this machine can reach."
            ) from error
    return base.requires_grad_(run.adapter.kind == "full"), notes


def _config(cfg: ModelConfig, more: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """The model's own configuration, or else its known shape and a note that says so."""
    from transformers import AutoConfig

    known = KNOWN_SHAPES.get(cfg.name) if cfg.revision is None else None
    if known is not None and not is_fetched(cfg.name):
        return known.config(**more), ()  # a plan downloads no weights
    try:
        place = resolve(cfg.name)
        config = AutoConfig.from_pretrained(
            place, revision=cfg.revision, trust_remote_code=False, **more
        )
    except OSError:
        if known is None or not is_hub_id(cfg.name):
            raise
        note = f"the hub gave no config.json of {cfg.name}: its shape is from {known.source}"
        return known.config(**more), (note,)
    return config, ()


def is_fetched(name: str) -> bool:
    """Whether using the model starts no download of a named source's weights."""
    return name not in SOURCES or is_ready(name)


def _fresh_pooler(base: Any, run: RunConfig) -> tuple[list[str], tuple[str, ...]]:
    """Pooler tensors that the model's files lack, which are then trained with the head; notes."""
    within = f"{base.base_model_prefix}."
    poolers = [n for n, _ in base.named_parameters() if n.startswith(within) and "pool" in n]
    if not poolers:
        return [], ()
    place = resolve(run.model.name) if is_fetched(run.model.name) else None
    files = sorted(place.glob("*.safetensors")) if isinstance(place, Path) else []
    if not files or not isinstance(place, Path):
        return [], (
            "the model's files are not on this machine: they are assumed to contain its pooler",
        )
    from safetensors import safe_open

    check_files(place, f"model.name = '{run.model.name}'")
    held: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:  # reads the names, not the tensors
            held |= set(file.keys())
    return [n for n in poolers if not {n, n.removeprefix(within)} & held], ()


def _named(model: Any, run: RunConfig) -> dict[str, nn.Parameter]:
    if run.adapter.kind == "full":
        return dict(sorted((n, p) for n, p in model.named_parameters() if p.requires_grad))
    with _places(model) as origin:
        found = trained_parameters(model, run.adapter.kind)
        return {name: origin[parameter] for name, parameter in found.items()}


@contextmanager
def _places(model: nn.Module) -> Iterator[dict[Tensor, nn.Parameter]]:
    """Give trained parameters a place in memory, by which PEFT's names are matched to them.

    Memory that is never written to costs nothing. Yields the original of each stand-in.
    """
    origin: dict[Tensor, nn.Parameter] = {}
    twins: dict[nn.Parameter, nn.Parameter] = {}
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in list(model.modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                continue
            if parameter not in twins:
                room = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                twins[parameter] = nn.Parameter(room)
                origin[twins[parameter]] = parameter
            swapped.append((module, key, parameter))
            module.register_parameter(key, twins[parameter])
    try:
        yield origin
    finally:
        for module, key, parameter in swapped:
            module.register_parameter(key, parameter)
