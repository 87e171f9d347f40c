"""A finished run for others to load: a PEFT folder, a plain model folder, a GGUF file.

Knows what lies in a run folder, and not how its model is loaded: `Run.export` gives that as a
function.
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
from silotune.models.gguf_write import GgufType, check_llama, check_tokenizer, write_llama
from silotune.models.loading import LoadedModel, quiet_libraries
from silotune.recipes.schema import RunConfig
from silotune.results.export_card import ExportKind, base_name, export_card, gguf_name, licence_of

LOGIT_TOLERANCE = 1e-3
"""How far merging may move a logit, of the largest one; in float32 it is rounding, some 1e-6."""
GGUF_DEFAULT: GgufType = "f16"

PROBE = "A question for both, the merged model and its parts: what is 1 + 1?"


# --- what is asked for


def check_order(
    run: RunConfig,
    kind: ExportKind,
    *,
    gguf_type: GgufType | None,
    push: str | None,
    public: bool,
) -> None:
    """Find what cannot be exported, before anything is loaded.

    Raises:
        ConfigError: A kind, type or repository that cannot be, or arguments without an effect.
        ModelError: The run's adapter, or its task, has no such export.
    """
    for given, known, option in (
        (kind, get_args(ExportKind), "--as"),
        (gguf_type, get_args(GgufType), "--type"),
    ):
        if given is not None and given not in known:
            raise ConfigError(
                f"{option} = '{given}' is unknown.{did_you_mean(given, known)}\n"
                f"  There are: {', '.join(known)}."
            )
    if gguf_type is not None and kind != "gguf":
        raise ConfigError("--type has an effect with --as gguf only.\n  Leave it out.")
    if public and push is None:
        raise ConfigError("--public has an effect with --push only.\n  Leave it out.")
    if push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise ConfigError(f"--push '{push}' is no repository.\n  Write its owner too: OWNER/NAME.")
    adapter = run.adapter.kind
    if kind == "peft" and adapter == "full":
        raise ModelError(
            "all weights were trained, so there is no adapter to export.\n  Add --as merged."
        )
    if kind != "peft" and adapter in PROMPT_KINDS:
        raise ModelError(
            f"adapter.kind = '{adapter}' is vectors in front of the text, which cannot be merged "
            "into the base's weights.\n  Export it with --as peft."
        )
    if kind == "gguf" and run.task == "classify":
        raise ModelError(
            "GGUF files are written of language models, and this run gives labels.\n"
            "  Export it with --as merged."
        )


def plain_recipe(run: RunConfig, dtype: str) -> RunConfig:
    """A run's recipe with its base as it is before any quantisation, on the processor.

    Args:
        run: The recipe.
        dtype: Of the base in training, by its name; "auto" would be another on another machine.
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
    load: Callable[[RunConfig], LoadedModel],
    progress: Progress,
) -> Path:
    """Write one export of a finished run; it appears whole or not at all.

    Args:
        path: The run folder.
        kind: What is written; see `check_order`.
        place: The folder to create, with its parents. Never overwritten.
        gguf_type: How a GGUF file stores matrices.
        load: Puts the run's result on the base of a recipe.
        progress: Told what happens.

    Returns:
        `place`.

    Raises:
        RunFolderError: Something is there.
        DiskError: The disk does not take it.
        ModelError: The result cannot be merged, or the model not be written as GGUF.
    """
    _check_free(place)
    folder = RunFolder.open(path)
    run, summary = folder.run, folder.read_json("summary.json")
    provenance = folder.read_json("provenance.json")
    moved = None
    if kind == "peft" or (kind == "merged" and run.adapter.kind == "full"):
        write = _copier(path / "adapter", base_name(run))
    else:
        progress.note(f"loading {run.model.name}")
        loaded = load(plain_recipe(run, provenance["dtype"]))
        if kind == "gguf":  # before minutes of merging
            check_llama(loaded.model.config)
            check_tokenizer(loaded.tokenizer, loaded.model.config.vocab_size)
        model, moved = merge(loaded)
        if kind == "merged":
            model.to(getattr(torch, provenance["dtype"]))  # rounded once, at the end
            write = _model_writer(model, loaded.tokenizer)
        else:
            about = {"name": f"{base_name(run)}, fine-tuned by silotune"}
            about["description"] = f"adapter sha256 {summary['adapter_sha256']}"
            if licence := licence_of(run):
                about["license"] = licence
            write = _gguf_writer(model, loaded.tokenizer, gguf_type, about)
    card = export_card(run, summary, provenance, kind=kind, gguf_type=gguf_type, moved=moved)

    def fill(part: Path) -> None:
        write(part)
        (part / "README.md").write_text(card, encoding="utf-8")

    progress.note(f"writing {place}")
    return _build(place, fill)


def merge(loaded: LoadedModel) -> tuple[Any, float | None]:
    """Merge an adapter into its base, in float32.

    Args:
        loaded: Not to be used afterwards.

    Returns:
        The plain model in float32, and how far a logit of a probe was moved, at most, as a share of
        the largest; None where there was no adapter to merge.

    Raises:
        ModelError: PEFT cannot merge this adapter, or the merged model says something else.
    """
    model = loaded.model.float()
    if not loaded.has_adapter:
        return model, None
    ids = loaded.tokenizer(PROBE, return_tensors="pt")
    with torch.inference_mode():
        apart = model(**ids).logits
    try:
        with quiet_libraries():
            plain = model.merge_and_unload(safe_merge=True)
        with torch.inference_mode():
            merged = plain(**ids).logits
        moved = float((merged - apart).abs().max() / apart.abs().max())
        why = "the merged model's logits are not those of base and adapter"
    except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        moved, why, plain = float("inf"), str(error), None
    if not moved <= LOGIT_TOLERANCE:  # NaN is not
        raise ModelError(
            f"this adapter cannot be merged into its base: {why}\n  Export it with --as peft."
        )
    return plain, moved


def _copier(adapter: Path, base: str) -> Callable[[Path], None]:
    def write(part: Path) -> None:
        for file in adapter.iterdir():
            shutil.copyfile(file, part / file.name)
        config = part / "adapter_config.json"
        if config.is_file():
            table = json.loads(config.read_text(encoding="utf-8"))
            write_json(config, table | {"base_model_name_or_path": base})

    return write


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
            f"{place} exists and is not overwritten.\n  Remove it, or give another --to."
        )


def _build(place: Path, fill: Callable[[Path], None]) -> Path:
    """`build_folder`, which leaves nothing behind where it cannot be done."""
    _check_free(place)  # again: merging takes its time
    new = [parent for parent in place.parents if not parent.exists()]
    try:
        return build_folder(place, fill)
    except BaseException:
        shutil.rmtree(place.with_name(f".{place.name}.part"), ignore_errors=True)
        for parent in new:
            with contextlib.suppress(OSError):  # somebody else's export is in it by now
                parent.rmdir()
        raise
