"""Base model and adapter through PEFT: the only calls that read or write adapter weights.

The base is loaded once per process, never per client or round; only the adapter's tensors are
swapped. This file knows nothing about clients, rounds or the network.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from silotune.core.atomic_files import write_json
from silotune.core.lora import is_beside, is_core, joined
from silotune.core.tree import check_same_layout, layout_of
from silotune.core.types import AdapterState
from silotune.models.adapters import (
    AdapterConfig,
    Kind,
    check_adapter,
    put_adapter,
    trained_parameters,
)
from silotune.models.base import ModelConfig, load_base, quiet_libraries
from silotune.models.base_files import commit_of, public_reference
from silotune.models.beside import (
    described_ranks,
    read_beside,
    set_cores,
    set_ranks,
    write_beside,
)
from silotune.models.causality import check_causal
from silotune.models.devices import pick_device, pick_dtype
from silotune.models.heads import Head, draw_head, find_head, head_as_loaded, set_head
from silotune.models.quantization import Quantization, check_quantization, prepare_for_training
from silotune.models.start import fitted, is_told

LABELS = "labels.json"
"""The file next to a classifier's adapter with the names of its classes, in order."""


@dataclass(frozen=True)
class LoadedModel:
    """A base model with its adapter, ready to train or answer."""

    model: Any
    """The PEFT model, or the plain model when all weights are trained."""
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    parameters: dict[str, nn.Parameter]
    """The trained tensors, by the names under which they are saved and sent. `write_adapter` adds
    the cores of a state that has any, and removes them."""
    kind: Kind
    """The kind of adapter."""
    quantization: Quantization = "none"
    """How the base's linear layers are held."""
    head: frozenset[str] = frozenset()
    """The trained tensors that belong to a classification head, by the same names."""
    head_modules: Head | None = None
    """The modules of that head in the model."""
    notes: tuple[str, ...] = ()
    """What is allowed about the base but may be surprising."""
    start: AdapterState | None = None
    """The adapter that training starts from, if it is not a fresh one and is known here."""
    is_started: bool = False
    """Whether training starts from such an adapter, even if only the server knows it."""

    @property
    def has_adapter(self) -> bool:
        """False when all weights are trained."""
        return self.kind != "full"


_num_base_loads = 0


def num_base_loads() -> int:
    """How often this process has loaded a base model."""
    return _num_base_loads


def load_model(
    model_cfg: ModelConfig,
    adapter_cfg: AdapterConfig,
    *,
    seed: int,
    device: str = "auto",
    labels: Sequence[str] = (),
    key: str = "model.name",
) -> LoadedModel:
    """Load a base model and put a fresh adapter on it.

    Args:
        model_cfg: Which base.
        adapter_cfg: Which adapter.
        seed: The adapter's first factors are drawn from (seed, "adapter"), the same at every
            client; unless `adapter_cfg.start` names an adapter to start from.
        device: "auto", "cpu", "cuda" or "mps".
        labels: Classes to distinguish; with any, the model gets a classification head. Tensors of
            the head that the base does not have are drawn from (seed, "head").
        key: The setting that names the base, for messages.

    Returns:
        The model in evaluation mode on its device; adapter tensors are float32.

    Raises:
        ModelError: No such model, its files are damaged or incomplete, it is an encoder and there
            are no labels, or it has no modules with the names in `targets`.
        ConfigError: This machine cannot quantise.
    """
    global _num_base_loads
    where = pick_device(device)
    check_quantization(model_cfg.quantization, where, "model.quantization")
    check_adapter(adapter_cfg, model_cfg.quantization, where)
    dtype = pick_dtype(model_cfg.dtype, where, whole=adapter_cfg.kind == "full")
    with torch.random.fork_rng(devices=[]):  # transformers draws a head, which is redrawn here
        base, tokenizer, fresh, notes = load_base(model_cfg, dtype, where, labels, key=key)
    _num_base_loads += 1
    quantised = model_cfg.quantization != "none"
    if quantised:
        base = prepare_for_training(base)
    head = find_head(base, fresh) if labels else None
    if head is not None:
        draw_head(base, head, seed)
    if not quantised:  # quantised weights were placed there while loading
        base.to(where)
    if not labels:
        check_causal(base, f"{key} = '{model_cfg.name}'")
    if model_cfg.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    loaded = _with_adapter(
        base, tokenizer, where, dtype, adapter_cfg, seed, head, quantization=model_cfg.quantization
    )
    return replace(loaded, notes=notes)


def _with_adapter(
    base: Any,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
    cfg: AdapterConfig,
    seed: int,
    head: Head | None,
    *,
    quantization: Quantization,
) -> LoadedModel:
    """Put a fresh adapter on a plain model."""
    with quiet_libraries():
        model = base if cfg.kind == "full" else put_adapter(base, cfg, seed, head)
    if head is not None:
        set_head(model, head, trained=cfg.head != "freeze")
    parameters = trained_parameters(model, cfg.kind)
    model.eval()
    made = LoadedModel(
        model,
        tokenizer,
        device,
        dtype,
        parameters,
        kind=cfg.kind,
        quantization=quantization,
        head=frozenset(name for name in parameters if head is not None and head.holds(name)),
        head_modules=head,
        is_started=cfg.start is not None,
    )
    if cfg.start is None or is_told(cfg.start):
        return made
    start = fitted(cfg.start, parameters)
    write_adapter(made, start)
    return replace(made, start=start)


def is_renewable(loaded: LoadedModel, cfg: AdapterConfig) -> bool:
    """Whether `renew_adapter` can replace the adapter on this base with another one.

    If all weights were trained, the base is gone. For most kinds, PEFT adds a new adapter next to
    an old one of another kind, and it cannot remove IA3 from quantised layers.
    """
    return loaded.kind == cfg.kind == "lora"


def renew_adapter(loaded: LoadedModel, cfg: AdapterConfig, *, seed: int) -> LoadedModel:
    """Put another seed's initial adapter on the base that is already in memory.

    Args:
        loaded: From `load_model`; must not be used afterwards, because its adapter is removed.
        cfg: The adapter's configuration; see `is_renewable`.
        seed: Seed of the new adapter.

    Returns:
        What `load_model` with this seed would return, bit for bit, without loading anything.
    """
    assert is_renewable(loaded, cfg)
    head = loaded.head_modules
    before = {} if head is None else head_as_loaded(loaded.model, head)
    base = loaded.model.unload()
    if head is not None:
        if loaded.quantization == "none":
            for module in head.modules:  # as loaded: the trained part was float32
                base.get_submodule(module).to(loaded.dtype)
        left = base.load_state_dict(before, strict=False)  # strict: the head is not all of it
        assert not left.unexpected_keys, left.unexpected_keys
        draw_head(base, head, seed)
    return _with_adapter(
        base,
        loaded.tokenizer,
        loaded.device,
        loaded.dtype,
        cfg,
        seed,
        head,
        quantization=loaded.quantization,
    )


def read_adapter(loaded: LoadedModel) -> dict[str, Tensor]:
    """A float32 copy of the trained tensors and of what stands beside them, on the CPU."""
    return {
        name: p.detach().to("cpu", torch.float32, copy=True)
        for name, p in {**loaded.parameters, **_beside(loaded)}.items()
    }


def _beside(loaded: LoadedModel) -> dict[str, Tensor]:
    return read_beside(loaded.model, loaded.parameters) if loaded.kind == "lora" else {}


@torch.no_grad()
def write_adapter(loaded: LoadedModel, state: AdapterState) -> None:
    """Overwrite the trained tensors, and replace what stands beside them.

    LoRA's factors take the rank that they have in `state`. Their scaling stays as it was loaded,
    so that equal factors are equal functions at every rank. A core of `state` becomes a trained
    tensor between its factors.

    Raises:
        UpdateError: Names differ from the model's, or shapes in more than the rank.
    """
    given_beside = {name: t for name, t in state.items() if is_beside(name)}
    if loaded.kind == "lora":
        set_ranks(loaded.parameters, state)
        set_cores(loaded.model, loaded.parameters, state)
        write_beside(loaded.model, loaded.parameters, given_beside)
        state = {name: t for name, t in state.items() if name not in given_beside}
    expected = layout_of(loaded.parameters)
    given = {
        name: t.to(loaded.parameters[name].dtype) if name in expected else t
        for name, t in state.items()
    }
    check_same_layout(given, expected, who="adapter for this model")
    for name, p in loaded.parameters.items():
        p.copy_(given[name])


@contextmanager
def base_only(loaded: LoadedModel) -> Iterator[None]:
    """Switch the adapter off inside the context. Not for models whose weights are all trained."""
    # when PEFT switches the adapter on again, it makes every head trainable, even a frozen one
    learning = {name: p.requires_grad for name, p in loaded.model.named_parameters()}
    try:
        with loaded.model.disable_adapter():
            yield
    finally:
        for name, p in loaded.model.named_parameters():
            p.requires_grad_(learning[name])


@contextmanager
def untrained(loaded: LoadedModel) -> Iterator[None]:
    """The untrained model, which holds its first adapter: for the scores before the first round.

    A fresh adapter is switched off. Not every one leaves the base's output unchanged: trained
    vectors in front of the text start at random values. A classifier keeps its adapter on, because
    the adapter holds its head; so does a model that starts from another adapter.
    """
    is_fresh = loaded.has_adapter and not loaded.head_modules and not loaded.is_started
    with base_only(loaded) if is_fresh else nullcontext():
        yield


@contextmanager
def as_started(loaded: LoadedModel) -> Iterator[None]:
    """The model as its training starts, whatever it holds now: the base, or the first adapter.

    Not for models whose weights are all trained, nor for those with a head.
    """
    if not loaded.is_started:
        with base_only(loaded):
            yield
        return
    assert loaded.start is not None, "the recipe's check refuses it where only the server knows it"
    now = read_adapter(loaded)
    write_adapter(loaded, loaded.start)
    try:
        yield
    finally:
        write_adapter(loaded, now)


def save_adapter(loaded: LoadedModel, folder: Path, *, base: ModelConfig) -> None:
    """Save the model's current state: a PEFT folder, or a plain model folder if all weights learn.

    The folder says which base it belongs to, as far as others can use that: no path of this
    machine, the commit of a hub model, and a classifier's labels in the order of its classes. The
    folder is one plain adapter: what stands beside the factors is stacked with them, to a higher
    rank, and a core is multiplied into one of them.

    Args:
        loaded: The model, which already holds the adapter to save.
        folder: Created; `PeftModel.from_pretrained(base, folder)` reads it.
        base: The base that `loaded` was made of.
    """
    if _beside(loaded) or any(map(is_core, loaded.parameters)):
        now = read_adapter(loaded)
        write_adapter(loaded, joined(now))
        try:
            save_adapter(loaded, folder, base=base)
        finally:
            write_adapter(loaded, now)
        return
    with quiet_libraries():  # warnings are about options that were checked when it was loaded
        if loaded.has_adapter:
            for config in loaded.model.peft_config.values():
                config.base_model_name_or_path = public_reference(base.name)
                config.revision = commit_of(base.name, base.revision)
                config.inference_mode = True
                _sort_sets(config)
            with _described(loaded):
                loaded.model.save_pretrained(folder, save_embedding_layers=False)
            if loaded.head_modules is not None:
                save_labels(folder, list(loaded.model.config.id2label.values()))
        else:
            loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    # PEFT writes a card full of empty headings; the run's own card is one level up
    (folder / "README.md").unlink(missing_ok=True)


def _described(loaded: LoadedModel) -> AbstractContextManager[None]:
    """PEFT's configuration as the live factors are, which may have another rank."""
    if loaded.kind != "lora":
        return nullcontext()
    config = loaded.model.peft_config["default"]
    return described_ranks(loaded.model, loaded.parameters, config)


def save_labels(folder: Path, labels: Sequence[str]) -> None:
    """Write a classifier's labels next to its adapter, in the order of its classes."""
    write_json(folder / LABELS, list(labels))


def _sort_sets(config: Any) -> None:
    """Make the order of names in adapter_config.json independent of Python's hash seed."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (set, frozenset)):
            setattr(config, field.name, sorted(cast(set[str], value)))
