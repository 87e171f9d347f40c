"""The base model without an adapter: its configuration, weights, tokenizer and files.

Loads through transformers. Knows names, dtypes and classification labels; does not know adapters,
clients or rounds.
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from silotune.core.errors import ModelError
from silotune.core.safe_text import one_line
from silotune.core.types import Config
from silotune.models.base_files import check_files, folder_at_hand
from silotune.models.causality import check_declared_causal
from silotune.models.completeness import check_complete
from silotune.models.heads import outside_tensors
from silotune.models.quantization import Quantization, loading_options
from silotune.models.sources import resolve
from silotune.models.vocabulary import check_vocabulary

JUDGED = ("LOAD REPORT", "is_decoder=True", "checkpoint seem corrupted", "`id2label` map of length")
"""Parts of transformers' warnings about what this room decides itself: whether files are complete,
whether a model is an encoder, and what becomes of a head for other labels."""


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


class Base(NamedTuple):
    """A plain model as it was loaded."""

    model: Any
    tokenizer: Any
    fresh: list[str]
    """Tensors of a head or pooler that the model's files lack, or that are for other labels."""
    notes: tuple[str, ...]
    """What is allowed but may be surprising."""


def load_base(
    cfg: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    labels: Sequence[str],
    *,
    key: str = "model.name",
) -> Base:
    """Load the plain model and its tokenizer.

    Args:
        cfg: Which base.
        dtype: Type of its weights, or of the computations if they are quantised.
        device: Where it will run; only quantised weights are placed there now.
        labels: Classes to distinguish; with any, the model gets a classification head.
        key: The setting that names the base, for messages.

    Raises:
        ModelError: No such model, only a slow tokenizer, or files that are damaged, incomplete or
            do not fit each other.
    """
    place = resolve(cfg.name)
    _check_at_hand(cfg, key)
    known = _labels_of(place, cfg) if labels else None
    has_foreign_head = known is not None and known != list(labels)  # a head for other labels
    with quiet_libraries() as said:
        tokenizer = _read_tokenizer(cfg, key)
        with _explained(cfg, key):
            how = loading_options(
                cfg.quantization,
                double=cfg.double_quantization,
                dtype=dtype,
                device=device,
                skip=_head_modules(_kind(labels), place, cfg) if labels else [],
            )
            base, found = _from_pretrained(cfg, labels, dtype=dtype, **how)
    fresh, notes = _judge(base, found, tokenizer, cfg, labels, key)
    if labels:  # rows are padded with this token, and a decoder uses it to find a row's last token
        padding = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        base.config.pad_token_id = next((i for i in padding if i is not None), None)
    if has_foreign_head:
        fresh = sorted({*fresh, *outside_tensors(base)})
    return Base(base, tokenizer, fresh, (*notes, *said))


def inspect_base(
    cfg: ModelConfig, labels: Sequence[str], *, key: str = "model.name"
) -> tuple[Any, tuple[str, ...]]:
    """Find what is wrong with a base without reading its weights.

    Args:
        cfg: Which base. Of a hub model that is not on this machine, only the tokenizer is fetched.
        labels: As for `load_base`.
        key: The setting that names the base, for messages.

    Returns:
        The tokenizer, and notes on what is allowed but may be surprising.

    Raises:
        ModelError: As in `load_base`; also without labels, if the model declares itself an encoder.
    """
    folder = _check_at_hand(cfg, key)
    with quiet_libraries() as said:
        tokenizer = _read_tokenizer(cfg, key)
        if folder is None:
            unseen = f"the weights of {cfg.name} are not on this machine, so they were not examined"
            return tokenizer, (*said, unseen)
        if _is_quantised(cfg):
            return tokenizer, (*said, f"the weights of {cfg.name} are quantised: not examined")
        with _explained(cfg, key):
            base, found = _from_pretrained(cfg, labels, device_map={"": "meta"})
    _, notes = _judge(base, found, tokenizer, cfg, labels, key)
    if not labels:
        check_declared_causal(base, f"{key} = '{cfg.name}'")
    return tokenizer, (*notes, *said)


def load_tokenizer(cfg: ModelConfig) -> Any:
    """The base's tokenizer, without the base.

    Raises:
        ModelError: No such model, or only a slow tokenizer.
    """
    with quiet_libraries():  # whoever loads or inspects the base passes the warnings on
        return _read_tokenizer(cfg, "model.name")


def _read_tokenizer(cfg: ModelConfig, key: str) -> Any:
    from transformers import AutoTokenizer

    with _explained(cfg, key):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve(cfg.name), revision=cfg.revision, trust_remote_code=False
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"{key} = '{cfg.name}' has no fast tokenizer (tokenizer.json).\n"
            "  The loss mask needs character offsets, which only fast tokenizers provide. Use a "
            "model with a fast tokenizer."
        )
    return tokenizer


def _kind(labels: Sequence[str]) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if labels else AutoModelForCausalLM


def _from_pretrained(cfg: ModelConfig, labels: Sequence[str], **how: Any) -> tuple[Any, Any]:
    """The model, and what transformers reports about its files."""
    return _kind(labels).from_pretrained(
        resolve(cfg.name),
        revision=cfg.revision,
        use_safetensors=True,  # other formats are pickles, which run code when read
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported, and judged by `check_complete`
        **_label_options(labels),
        **how,
    )


def _judge(
    base: Any, found: Any, tokenizer: Any, cfg: ModelConfig, labels: Sequence[str], key: str
) -> tuple[list[str], tuple[str, ...]]:
    """Refuse weights that are not the model's; returns the tensors of a new head, and notes."""
    what = f"{key} = '{cfg.name}'"
    if getattr(base, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{what} is an adapter on top of a base.\n  Merge it first (merge_and_unload in PEFT), "
            "or use the base."
        )
    fresh, notes = check_complete(base, found, what, classifier=bool(labels))
    check_vocabulary(tokenizer, base.get_input_embeddings().weight.shape[0], what)
    return fresh, notes


def _check_at_hand(cfg: ModelConfig, key: str) -> Path | None:
    """The folder of a base that is on this machine, after a look at its files."""
    folder = folder_at_hand(cfg.name, cfg.revision)
    if folder is not None:
        check_files(folder, f"{key} = '{cfg.name}'")
    return folder


@contextmanager
def quiet_libraries() -> Iterator[list[str]]:
    """Load without the libraries' progress bars and tables: a run shows its own progress.

    Yields:
        A list that fills with the warnings of transformers, for the caller to pass on. Errors are
        shown as always.
    """
    from transformers.utils import logging as settings

    said: list[str] = []
    root, was_on, level = (
        logging.getLogger("transformers"),
        settings.is_progress_bar_enabled(),
        settings.get_verbosity(),
    )
    shown = root.handlers[:]
    settings.disable_progress_bar()
    settings.set_verbosity(max(level, logging.WARNING))
    root.handlers = [_Collector(said, shown)]
    try:
        with warnings.catch_warnings():
            # peft 0.21.2 still reads the old name of this attribute from transformers 5.23
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            yield said
    finally:
        root.handlers = shown
        settings.set_verbosity(level)
        if was_on:
            settings.enable_progress_bar()


class _Collector(logging.Handler):
    """Keeps warnings as text, and passes errors on."""

    def __init__(self, said: list[str], shown: Sequence[logging.Handler]) -> None:
        super().__init__(logging.WARNING)
        self._said, self._shown = said, shown

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            for handler in self._shown:
                handler.handle(record)
            return
        text = f"transformers: {one_line(record.getMessage(), longest=400)}"
        if text not in self._said and not any(part in text for part in JUDGED):
            self._said.append(text)


@contextmanager
def _explained(cfg: ModelConfig, key: str) -> Iterator[None]:
    """Whatever the libraries raise at files from elsewhere, in one line."""
    try:
        yield
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged JSON, a wrong type in it, code that is not installed, ...
        _check_at_hand(cfg, key)  # what was fetched just now may be damaged
        lines = str(error).strip().split("\n", 1)
        first_line = one_line(lines[0], longest=300) or type(error).__name__
        revision = f" at revision '{cfg.revision}'" if cfg.revision else ""
        raise needs_sentencepiece(cfg, error) or ModelError(
            f"{key} = '{cfg.name}'{revision} cannot be loaded: {first_line}\n"
            "  Use a named source (smollm2-135m-instruct), a folder that contains config.json\n"
            "  and safetensors, or a hub id that this machine can reach."
        ) from error


def _is_quantised(cfg: ModelConfig) -> bool:
    """Whether the files themselves are quantised, for which libraries need the hardware."""
    from transformers import AutoConfig

    with _explained(cfg, "model.name"):
        config = AutoConfig.from_pretrained(
            resolve(cfg.name), revision=cfg.revision, trust_remote_code=False
        )
    return getattr(config, "quantization_config", None) is not None


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
    }


def _labels_of(place: str | Path, cfg: ModelConfig) -> list[str] | None:
    """The labels of a checkpoint's own head; None if they have no names."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(place, revision=cfg.revision, trust_remote_code=False)
    except Exception:
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
