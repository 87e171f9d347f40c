"""Base model and adapter through PEFT: the only calls that read or write adapter weights.

The base is loaded once per process and never per client or round; only the adapter's tensors are
swapped. This file knows nothing of clients, rounds or the network.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from silotune.core.errors import ModelError
from silotune.core.tree import check_same_layout, layout_of
from silotune.core.types import AdapterState, Config
from silotune.models.adapters import (
    AdapterConfig,
    Kind,
    check_adapter,
    put_adapter,
    trained_parameters,
)
from silotune.models.devices import pick_device, pick_dtype
from silotune.models.heads import (
    Head,
    draw_head,
    find_head,
    head_as_loaded,
    outside_tensors,
    set_head,
)
from silotune.models.quantization import (
    Quantization,
    check_quantization,
    loading_options,
    prepare_for_training,
)
from silotune.models.sources import resolve


class ModelConfig(Config):
    """The base model."""

    name: str = "smollm2-135m-instruct"
    """A named source, a folder in Hugging Face format, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base weights, or with quantised weights of the computations. auto: bfloat16 where
    the processor has it, else float32."""
    quantization: Quantization = "none"
    """Hold the base's linear layers in 4 bits (nf4: Dettmers et al. 2023, arXiv:2305.14314; or fp4)
    or in 8 (int8: Dettmers et al. 2022, arXiv:2208.07339), through bitsandbytes. 4 and 8 are short
    for nf4 and int8."""
    double_quantization: bool = True
    """nf4 and fp4: quantise the scales of the blocks too, 0.4 bit per weight less."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a fifth more time."""


@dataclass(frozen=True)
class LoadedModel:
    """A base model with its adapter, ready to train or answer."""

    model: Any
    """The PEFT model, or the plain model when all weights are trained."""
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    parameters: Mapping[str, nn.Parameter]
    """The trained tensors by the name under which they are saved and sent."""
    kind: Kind
    """Of adapter."""
    quantization: Quantization = "none"
    """How the base's linear layers are held."""
    head: frozenset[str] = frozenset()
    """The trained tensors that belong to a classification head, by the same names."""
    head_modules: Head | None = None
    """Where that head lies in the model."""

    @property
    def has_adapter(self) -> bool:
        """False when all weights are trained."""
        return self.kind != "full"


_num_base_loads = 0


def num_base_loads() -> int:
    """How often this process has loaded a base model."""
    return _num_base_loads


def folder_of_base(cfg: ModelConfig) -> Path:
    """Where the base's files lie: a folder, or what the hub library keeps of a hub id."""
    place = resolve(cfg.name)
    if isinstance(place, Path):
        return place
    from transformers.utils.hub import cached_file

    config = cached_file(place, "config.json", revision=cfg.revision)
    assert config is not None, "the model was loaded a moment ago"
    return Path(config).parent


def load_model(
    model_cfg: ModelConfig,
    adapter_cfg: AdapterConfig,
    *,
    seed: int,
    device: str = "auto",
    labels: Sequence[str] = (),
) -> LoadedModel:
    """Load a base model and put a fresh adapter on it.

    Args:
        model_cfg: Which base.
        adapter_cfg: Which adapter.
        seed: The adapter's first factors are drawn from (seed, "adapter"), the same at every
            client.
        device: "auto", "cpu", "cuda" or "mps".
        labels: Classes to tell apart; then the model gets a classification head, whose tensors,
            where the base brings none, are drawn from (seed, "head").

    Returns:
        The model in evaluation mode on its device; adapter tensors are float32.

    Raises:
        ModelError: No such model, or no module of the targets' names in it.
        ConfigError: This machine cannot quantise.
    """
    global _num_base_loads
    where = pick_device(device)
    check_quantization(model_cfg.quantization, where, "model.quantization")
    check_adapter(adapter_cfg, model_cfg.quantization, where)
    dtype = pick_dtype(model_cfg.dtype, where, whole=adapter_cfg.kind == "full")
    with torch.random.fork_rng(devices=[]):  # transformers draws a head that is drawn anew here
        base, tokenizer, fresh = _load_base(model_cfg, dtype, where, labels)
    _num_base_loads += 1
    quantised = model_cfg.quantization != "none"
    if quantised:
        base = prepare_for_training(base)
    head = find_head(base, fresh) if labels else None
    if head is not None:
        draw_head(base, head, seed)
    if model_cfg.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    if not quantised:  # those were put there while they were loaded
        base.to(where)
    return _dressed(
        base, tokenizer, where, dtype, adapter_cfg, seed, head, quantization=model_cfg.quantization
    )


def _dressed(
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
    """A plain model with a fresh adapter on it."""
    with quiet_libraries():
        model = base if cfg.kind == "full" else put_adapter(base, cfg, seed, head)
    if head is not None:
        set_head(model, head, trained=cfg.head != "freeze")
    parameters = trained_parameters(model, cfg.kind)
    model.eval()
    return LoadedModel(
        model,
        tokenizer,
        device,
        dtype,
        parameters,
        kind=cfg.kind,
        quantization=quantization,
        head=frozenset(name for name in parameters if head is not None and head.holds(name)),
        head_modules=head,
    )


def is_renewable(loaded: LoadedModel, cfg: AdapterConfig) -> bool:
    """Whether `renew_adapter` can change what is on this base into another adapter.

    Weights that were trained are not the base's any more. And PEFT puts a new adapter of most kinds
    beside an old one of another kind, and cannot take IA3 off quantised layers.
    """
    return loaded.kind == cfg.kind == "lora"


def renew_adapter(loaded: LoadedModel, cfg: AdapterConfig, *, seed: int) -> LoadedModel:
    """Another seed's first adapter on the base that is already in memory.

    Args:
        loaded: From `load_model`; not to be used afterwards, since its adapter is taken off.
        cfg: The adapter's configuration; see `is_renewable`.
        seed: The new adapter's.

    Returns:
        What `load_model` with this seed would give, bit for bit, without loading anything.
    """
    assert is_renewable(loaded, cfg)
    head = loaded.head_modules
    before = {} if head is None else head_as_loaded(loaded.model, head)
    base = loaded.model.unload()
    if head is not None:
        if loaded.quantization == "none":
            for module in head.modules:  # as loaded: what trained in it was float32
                base.get_submodule(module).to(loaded.dtype)
        base.load_state_dict(before, strict=False)
        draw_head(base, head, seed)
    return _dressed(
        base,
        loaded.tokenizer,
        loaded.device,
        loaded.dtype,
        cfg,
        seed,
        head,
        quantization=loaded.quantization,
    )


def load_tokenizer(cfg: ModelConfig) -> Any:
    """The base's tokenizer, without the base.

    Raises:
        ModelError: No such model, or only a slow tokenizer.
    """
    from transformers import AutoTokenizer

    place = resolve(cfg.name)
    with quiet_libraries():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                place, revision=cfg.revision, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise _cannot_load(cfg, error) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.name = '{cfg.name}' has no fast tokenizer (tokenizer.json).\n"
            "  The loss mask is placed by character offsets, which only fast tokenizers give."
        )
    return tokenizer


def _cannot_load(cfg: ModelConfig, error: Exception) -> ModelError:
    first_line = str(error).strip().split("\n", 1)[0]
    return ModelError(
        f"model.name = '{cfg.name}' cannot be loaded: {first_line}\n"
        "  Give a named source (smollm2-135m-instruct), a folder that holds config.json\n"
        "  and safetensors, or a hub id that this machine can reach."
    )


def _load_base(
    cfg: ModelConfig, dtype: torch.dtype, device: torch.device, labels: Sequence[str]
) -> tuple[Any, Any, list[str]]:
    """The plain model, its tokenizer, and the names of tensors that its files do not hold."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    place = resolve(cfg.name)
    foreign = False  # whether the files bring a head for labels of other names
    kind: Any = AutoModelForCausalLM
    more: dict[str, Any] = {}
    if labels:
        kind, own = AutoModelForSequenceClassification, _labels_of(place, cfg)
        foreign = own is not None and own != list(labels)
        more = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: n for n, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,  # a head for other classes is replaced by a fresh one
        }

    tokenizer = load_tokenizer(cfg)
    with quiet_libraries():
        try:
            more |= loading_options(
                cfg.quantization,
                double=cfg.double_quantization,
                dtype=dtype,
                device=device,
                skip=_head_modules(kind, place, cfg) if labels else [],
            )
            base, found = kind.from_pretrained(
                place,
                revision=cfg.revision,
                dtype=dtype,
                use_safetensors=True,  # other formats are pickles, which run code when read
                trust_remote_code=False,
                output_loading_info=True,
                **more,
            )
        except (OSError, ValueError) as error:
            raise _cannot_load(cfg, error) from error
    if labels:  # a decoder looks for a row's last token by it, and rows are padded with it
        padding = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        base.config.pad_token_id = next((i for i in padding if i is not None), None)
    fresh = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    if labels and foreign:
        fresh |= set(outside_tensors(base))
    return base, tokenizer, sorted(fresh)


def _head_modules(kind: Any, place: str | Path, cfg: ModelConfig) -> list[str]:
    """What is trained whole and must not be quantised: the head, and a pooler that may be new."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(place, revision=cfg.revision, trust_remote_code=False)
    with torch.device("meta"):
        empty = kind.from_config(config)
    return [*dict.fromkeys(name.split(".", 1)[0] for name in outside_tensors(empty)), r".*\bpooler"]


def _labels_of(place: str | Path, cfg: ModelConfig) -> list[str] | None:
    """The labels that a checkpoint's own head tells apart; None where they have no names."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(place, revision=cfg.revision, trust_remote_code=False)
    except (OSError, ValueError):
        return None  # the model's own loading says why
    names = [str(name) for name in (config.id2label or {}).values()]
    return None if all(name.startswith("LABEL_") for name in names) else names


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Loading without progress bars of the libraries: a run shows its own progress."""
    from transformers.utils import logging

    was_on, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a classification head is new by design, and not worth a table
    try:
        with warnings.catch_warnings():
            # peft 0.21.2 still reads the old name of this attribute from transformers 5.23
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            yield
    finally:
        logging.set_verbosity(level)
        if was_on:
            logging.enable_progress_bar()


def read_adapter(loaded: LoadedModel) -> dict[str, Tensor]:
    """A float32 copy of the trained tensors, on the CPU."""
    return {
        name: p.detach().to("cpu", torch.float32, copy=True)
        for name, p in loaded.parameters.items()
    }


@torch.no_grad()
def write_adapter(loaded: LoadedModel, state: AdapterState) -> None:
    """Overwrite the trained tensors. Names and shapes must be the model's own.

    Raises:
        UpdateError: They are not.
    """
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
    """The untouched base: inside, the adapter is off. Not for models trained as a whole."""
    # PEFT lets every head learn when the adapter is switched on again, a frozen one too
    learning = {name: p.requires_grad for name, p in loaded.model.named_parameters()}
    try:
        with loaded.model.disable_adapter():
            yield
    finally:
        for name, p in loaded.model.named_parameters():
            p.requires_grad_(learning[name])


@contextmanager
def untrained(loaded: LoadedModel) -> Iterator[None]:
    """The base as it came, for the scores from before the first round.

    Not every fresh adapter leaves the base as it is: trained vectors in front of the text begin at
    random. A classifier keeps its adapter on, for its head is in it.
    """
    with base_only(loaded) if loaded.has_adapter and not loaded.head_modules else nullcontext():
        yield


def save_adapter(loaded: LoadedModel, folder: Path, *, base_name: str) -> None:
    """Write what the model now holds: a PEFT folder, or with full fine-tuning a plain model folder.

    Args:
        loaded: The model with the adapter to save already written into it.
        folder: Created; `PeftModel.from_pretrained(base, folder)` reads it.
        base_name: What the folder calls its base: the recipe's `model.name`, never a path of this
            machine.
    """
    with quiet_libraries():
        if loaded.has_adapter:
            for config in loaded.model.peft_config.values():
                config.base_model_name_or_path = base_name
                config.inference_mode = True
            loaded.model.save_pretrained(folder, save_embedding_layers=False)
        else:
            loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    # PEFT writes a card full of empty headings; the run's own card stands one level up
    (folder / "README.md").unlink(missing_ok=True)
