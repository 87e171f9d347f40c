"""The base model without an adapter: its configuration, weights, tokenizer and files.

Loads through transformers. Knows names, dtypes and classification labels; does not know adapters,
clients or rounds.
"""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from silotune.core.errors import ModelError
from silotune.core.types import Config
from silotune.models.heads import outside_tensors
from silotune.models.quantization import Quantization, loading_options
from silotune.models.sources import resolve


class ModelConfig(Config):
    """The base model."""

    name: str = "smollm2-135m-instruct"
    """A named source, a folder in Hugging Face format, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base weights, or of the computations if the weights are quantised. auto: bfloat16
    if the hardware supports it natively, otherwise float32."""
    quantization: Quantization = "none"
    """Hold the base's linear layers in 4 bits (nf4: Dettmers et al. 2023, arXiv:2305.14314; or fp4)
    or in 8 (int8: Dettmers et al. 2022, arXiv:2208.07339), through bitsandbytes. 4 and 8 are short
    for nf4 and int8."""
    double_quantization: bool = True
    """nf4 and fp4: also quantise the scales of the blocks, which saves 0.4 bits per weight."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a fifth more time."""


def folder_of_base(cfg: ModelConfig) -> Path:
    """The folder with the base's files; for a hub id, the one in the hub library's cache."""
    place = resolve(cfg.name)
    if isinstance(place, Path):
        return place
    from transformers.utils.hub import cached_file

    config = cached_file(place, "config.json", revision=cfg.revision)
    assert config is not None, "the model was loaded a moment ago"
    return Path(config).parent


def load_base(
    cfg: ModelConfig, dtype: torch.dtype, device: torch.device, labels: Sequence[str]
) -> tuple[Any, Any, list[str]]:
    """Load the plain model and its tokenizer.

    Args:
        cfg: Which base.
        dtype: Type of its weights, or of the computations if they are quantised.
        device: Where it will run; only quantised weights are placed there now.
        labels: Classes to distinguish; with any, the model gets a classification head.

    Returns:
        The model, the tokenizer, and the names of the tensors that the model's files do not contain
        or that belong to a head for other labels.

    Raises:
        ModelError: No such model, or only a slow tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    place = resolve(cfg.name)
    kind: Any = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    known = _labels_of(place, cfg) if labels else None
    has_foreign_head = known is not None and known != list(labels)  # a head for other labels
    options = _label_options(labels)
    tokenizer = load_tokenizer(cfg)
    with quiet_libraries():
        try:
            options |= loading_options(
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
                **options,
            )
        except (OSError, ValueError) as error:
            raise _cannot_load(cfg, error) from error
    if labels:  # rows are padded with this token, and a decoder uses it to find a row's last token
        padding = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        base.config.pad_token_id = next((i for i in padding if i is not None), None)
    fresh = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    if has_foreign_head:
        fresh |= set(outside_tensors(base))
    return base, tokenizer, sorted(fresh)


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
        except (OSError, ValueError, ImportError) as error:
            raise needs_sentencepiece(cfg, error) or _cannot_load(cfg, error) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.name = '{cfg.name}' has no fast tokenizer (tokenizer.json).\n"
            "  The loss mask needs character offsets, which only fast tokenizers provide. Use a "
            "model with a fast tokenizer."
        )
    return tokenizer


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Load without the progress bars of the libraries: a run shows its own progress."""
    from transformers.utils import logging

    was_on, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a new classification head is intended and needs no table
    try:
        with warnings.catch_warnings():
            # peft 0.21.2 still reads the old name of this attribute from transformers 5.23
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            yield
    finally:
        logging.set_verbosity(level)
        if was_on:
            logging.enable_progress_bar()


def _cannot_load(cfg: ModelConfig, error: Exception) -> ModelError:
    first_line = str(error).strip().split("\n", 1)[0]
    return ModelError(
        f"model.name = '{cfg.name}' cannot be loaded: {first_line}\n"
        "  Use a named source (smollm2-135m-instruct), a folder that contains config.json\n"
        "  and safetensors, or a hub id that this machine can reach."
    )


def _head_modules(kind: Any, place: str | Path, cfg: ModelConfig) -> list[str]:
    """Modules that are trained in full and must not be quantised: the head, and any pooler."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(place, revision=cfg.revision, trust_remote_code=False)
    with torch.device("meta"):
        empty = kind.from_config(config)
    return [*dict.fromkeys(name.split(".", 1)[0] for name in outside_tensors(empty)), r".*\bpooler"]


def _label_options(labels: Sequence[str]) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a classification head; none without labels."""
    if not labels:
        return {}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: n for n, label in enumerate(labels)},
        "ignore_mismatched_sizes": True,  # a head for other classes is replaced by a fresh one
    }


def _labels_of(place: str | Path, cfg: ModelConfig) -> list[str] | None:
    """The labels of a checkpoint's own head; None if they have no names."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(place, revision=cfg.revision, trust_remote_code=False)
    except (OSError, ValueError):
        return None  # loading the model reports the reason
    names = [str(name) for name in (config.id2label or {}).values()]
    return None if all(name.startswith("LABEL_") for name in names) else names


def needs_sentencepiece(cfg: ModelConfig, error: Exception) -> ModelError | None:
    """The error for a tokenizer that only that library can read, if this is why loading failed.

    transformers 5 falls back to tiktoken without a word, and then asks for that.
    """
    asked_for = str(error).lower()
    wanted = "sentencepiece" in asked_for or "tiktoken" in asked_for
    if not wanted or importlib.util.find_spec("sentencepiece") is not None:
        return None
    return ModelError(
        f"model.name = '{cfg.name}': its tokenizer is a SentencePiece file, and the library that "
        "reads it is not installed.\n"
        "  Run `make env EXTRAS=sentencepiece`, or use a model with a tokenizer.json."
    )
