"""Export a finished run for others to load: a PEFT folder, a plain model folder, a GGUF file.

This file knows the contents of a run folder. It does not know how to load the run's model:
`Run.export` passes in a function for that.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from silotune.core.atomic_files import build_folder, write_json
from silotune.core.errors import ConfigError, ModelError, RunFolderError
from silotune.core.wording import did_you_mean
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.models.adapters import PROMPT_KINDS
from silotune.models.base import folder_of_base, quiet_libraries
from silotune.models.base_files import MODEL_FILES, commit_of, public_name, public_reference
from silotune.models.gguf_write import GgufType, check_llama, check_tokenizer, write_llama
from silotune.models.heads import num_positions
from silotune.models.loading import LoadedModel, save_adapter, save_labels
from silotune.recipes.schema import RunConfig
from silotune.results.export_card import (
    BASE,
    ExportKind,
    export_card,
    gguf_name,
    licence_of,
    rounding_note,
)

LOGIT_TOLERANCE = 1e-3
"""How far merging may move a logit, as a share of the largest. Rounding in float32 is near 1e-6."""
GGUF_DEFAULT: GgufType = "f16"

PROBE = "A question for both, the merged model and its parts: what is 1 + 1?"


# --- the request


def check_request(
    run: RunConfig,
    kind: ExportKind,
    *,
    gguf_type: GgufType | None,
    with_base: bool = False,
    push: str | None,
    public: bool,
    client: str | None = None,
) -> None:
    """Refuse what cannot be exported, before anything is loaded.

    Raises:
        ConfigError: An invalid kind, type or repository, or an argument without effect.
        ModelError: The run's adapter or task cannot be exported this way.
    """
    for given, known, option in (
        (kind, get_args(ExportKind), "--as"),
        (gguf_type, get_args(GgufType), "--type"),
    ):
        if given is not None and given not in known:
            raise ConfigError(
                f"{option} = '{given}' is unknown.{did_you_mean(given, known)}\n"
                f"  Choose one of: {', '.join(known)}."
            )
    if gguf_type is not None and kind != "gguf":
        raise ConfigError("--type has an effect only with --as gguf.\n  Leave it out.")
    if with_base and kind != "peft":
        raise ConfigError(
            "--with-base has an effect only with --as peft: the others contain the base.\n"
            "  Leave it out."
        )
    if public and push is None:
        raise ConfigError("--public has an effect only with --push.\n  Leave it out.")
    if push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise ConfigError(f"--push '{push}' is not a repository.\n  Include the owner: OWNER/NAME.")
    if client is not None and push is not None:
        raise ConfigError(
            "--client has no effect with --push: what a client has learned by itself is not "
            "published.\n  Leave out one of the two."
        )
    adapter = run.adapter.kind
    if kind == "peft" and adapter == "full":
        raise ModelError(
            "all weights were trained, so there is no adapter to export.\n  Use --as merged."
        )
    if kind != "peft" and adapter in PROMPT_KINDS:
        raise ModelError(
            f"adapter.kind = '{adapter}' trains vectors in front of the text, which cannot be "
            "merged into the base's weights.\n  Export it with --as peft."
        )
    if kind == "gguf" and run.task == "classify":
        raise ModelError(
            "GGUF export supports only language models, and this run is a classifier.\n"
            "  Export it with --as merged."
        )


def plain_recipe(run: RunConfig, dtype: str) -> RunConfig:
    """A run's recipe with an unquantised base on the CPU.

    Args:
        run: The recipe.
        dtype: The base's dtype in training, by name; "auto" may differ from machine to machine.
    """
    how = {"quantization": "none", "dtype": dtype, "gradient_checkpointing": False}
    return run.model_copy(
        update={
            "model": run.model.model_copy(update=how),
            "runtime": run.runtime.model_copy(update={"device": "cpu"}),
        }
    )


# --- the export


def export_run(
    path: Path,
    kind: ExportKind,
    place: Path,
    *,
    gguf_type: GgufType,
    client: str | None = None,
    with_base: bool = False,
    load: Callable[[RunConfig], LoadedModel],
    progress: Progress,
) -> Path:
    """Write one export of a finished run; it appears complete or not at all.

    Args:
        path: The run folder.
        kind: What to write; see `check_request`.
        place: The folder to create, with its parents. Never overwritten.
        gguf_type: How a GGUF file stores matrices.
        client: Whose own adapter `load` puts in; None for the result of the federation.
        with_base: peft: also copy the base, into the folder `BASE`.
        load: Loads a recipe's base with the run's result in it.
        progress: Receives progress messages.

    Returns:
        `place`.

    Raises:
        RunFolderError: The folder exists.
        DiskError: The folder cannot be written.
        ModelError: The result cannot be merged, or the model cannot be written as GGUF.
    """
    _check_free(place)
    folder = RunFolder.open(path)
    run, summary = folder.run, folder.read_json("summary.json")
    provenance = folder.read_json("provenance.json")
    moved = None
    is_whole = kind == "peft" or (kind == "merged" and run.adapter.kind == "full")
    if is_whole and client is None:
        write = _copier(path / "adapter", run, with_base=with_base)
    elif is_whole:
        progress.note(f"loading {run.model.name}")
        write = _saver(load(plain_recipe(run, provenance["dtype"])), run, with_base=with_base)
    else:
        progress.note(f"loading {run.model.name}")
        loaded = load(plain_recipe(run, provenance["dtype"]))
        if kind == "gguf":  # before merging, which takes minutes
            check_llama(loaded.model.config)
            check_tokenizer(loaded.tokenizer, loaded.model.config.vocab_size)
        model, moved = merge(loaded)
        if kind == "merged":
            model.to(getattr(torch, provenance["dtype"]))  # rounded once, at the end
            write = _model_writer(model, loaded.tokenizer)
        else:
            about = {"name": f"{public_name(run.model.name)}, fine-tuned by silotune"}
            about["description"] = f"adapter sha256 {summary['adapter_sha256']}"
            if client is not None:
                about["description"] += ", after further training by one client"
            if licence := licence_of(run):
                about["license"] = licence
            write = _gguf_writer(model, loaded.tokenizer, gguf_type, about)
    card = export_card(
        *(run, summary, provenance),
        kind=kind,
        gguf_type=gguf_type,
        moved=moved,
        client=client,
        with_base=with_base,
    )
    if note := rounding_note(provenance["dtype"], kind, gguf_type, is_merged=moved is not None):
        progress.note(f"note: {note}")

    def fill(part: Path) -> None:
        write(part)
        (part / "README.md").write_text(card, encoding="utf-8")

    progress.note(f"writing {place}")
    return _build(place, fill)


def merge(loaded: LoadedModel) -> tuple[Any, float | None]:
    """Merge an adapter into its base, in float32.

    Args:
        loaded: Not usable afterwards.

    Returns:
        The plain model in float32, and the largest change of a logit of a probe, as a share of the
        largest logit; None if there was no adapter to merge.

    Raises:
        ModelError: PEFT cannot merge this adapter, or the merged model answers differently.
    """
    model = loaded.model.float()
    if not loaded.has_adapter:
        return model, None
    room = (num_positions(model), getattr(model.config, "max_position_embeddings", None))
    longest = min((n for n in room if n is not None), default=None)
    ids = loaded.tokenizer(
        PROBE, return_tensors="pt", truncation=longest is not None, max_length=longest
    )
    with torch.inference_mode():
        expected = model(**ids).logits
    try:
        with quiet_libraries():
            plain = model.merge_and_unload(safe_merge=True)
        with torch.inference_mode():
            merged = plain(**ids).logits
        moved = float((merged - expected).abs().max() / expected.abs().max())
        why = "the merged model's logits are not those of base and adapter"
    except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        moved, why, plain = float("inf"), str(error), None
    if not moved <= LOGIT_TOLERANCE:  # NaN is not
        raise ModelError(
            f"this adapter cannot be merged into its base: {why}\n  Export it with --as peft."
        )
    return plain, moved


def _copier(adapter: Path, run: RunConfig, *, with_base: bool) -> Callable[[Path], None]:
    def write(part: Path) -> None:
        if with_base:
            _copy_base(folder_of_base(run.model), part / BASE)
        for file in adapter.iterdir():
            shutil.copyfile(file, part / file.name)
        _point_to_base(part, run, with_base=with_base)
        if (part / CONFIG).is_file() and run.task == "classify":
            save_labels(part, run.data.labels or ())

    return write


def _saver(loaded: LoadedModel, run: RunConfig, *, with_base: bool) -> Callable[[Path], None]:
    def write(part: Path) -> None:
        if with_base:
            _copy_base(folder_of_base(run.model), part / BASE)
        save_adapter(loaded, part, base=run.model)
        _point_to_base(part, run, with_base=with_base)

    return write


CONFIG = "adapter_config.json"


def _point_to_base(part: Path, run: RunConfig, *, with_base: bool) -> None:
    """Name the base in PEFT's configuration; an earlier version's names a path, and no commit."""
    if (part / CONFIG).is_file():
        table = json.loads((part / CONFIG).read_text(encoding="utf-8"))
        there = f"./{BASE}" if with_base else public_reference(run.model.name)
        table["base_model_name_or_path"] = there
        table["revision"] = None if with_base else commit_of(run.model.name, run.model.revision)
        write_json(part / CONFIG, table)


def _copy_base(folder: Path, to: Path) -> None:
    """Copy the files that loading a base reads; the run has been compared with them before."""
    to.mkdir()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in MODEL_FILES:
            shutil.copyfile(file, to / file.name)  # of a link, what it points to


def _model_writer(model: Any, tokenizer: Any) -> Callable[[Path], None]:
    def write(part: Path) -> None:
        with quiet_libraries():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)

    return write


def _gguf_writer(
    model: Any, tokenizer: Any, kind: GgufType, about: Mapping[str, str]
) -> Callable[[Path], None]:
    return lambda part: write_llama(
        model, tokenizer, part / gguf_name(kind), kind=kind, about=about
    )


def _check_free(place: Path) -> None:
    if place.exists():
        raise RunFolderError(
            f"{place} exists and is not overwritten.\n  Remove it, or choose another --to."
        )


def _build(place: Path, fill: Callable[[Path], None]) -> Path:
    """`build_folder`, but it leaves nothing behind if it fails."""
    _check_free(place)  # again, because merging takes a while
    new = [parent for parent in place.parents if not parent.exists()]
    try:
        return build_folder(place, fill)
    except BaseException:
        shutil.rmtree(place.with_name(f".{place.name}.part"), ignore_errors=True)
        for parent in new:
            with contextlib.suppress(OSError):  # another export may be in it by now
                parent.rmdir()
        raise
