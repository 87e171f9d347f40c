"""The adapter that training starts from, where a recipe names one: a PEFT folder or a finished run.

Reads safetensors only, never a pickle. What the folder says about itself has to be what the recipe
asks for: factors of another rank or scaling would be another function. Knows no clients or rounds.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from silotune.core.errors import ConfigError, UpdateError
from silotune.core.tree import check_representable, sha256

TOLD = "sha256:"
"""Begins an adapter.start as real clients are told it: the hash, in place of the server's path."""
PART = "part of sha256:"
"""Begins that of a client that trains at a lower rank: what it receives first is a part of it."""
RESULT, SUMMARY = "adapter", "summary.json"
"""In a run folder: the result, and the file whose presence says that the run is finished."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BY_KIND = {"lora": "LORA", "ia3": "IA3", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
"""PEFT's names of our kinds of adapter."""


def is_told(start: str | None) -> bool:
    """Whether `adapter.start` is a hash: the adapter itself comes from the server."""
    return start is not None and start.startswith((TOLD, PART))


def folder_of_start(start: str) -> Path:
    """The PEFT folder that `adapter.start` means.

    Raises:
        ConfigError: It is neither such a folder nor a finished run.
    """
    place = Path(start).expanduser()
    if (place / RESULT / CONFIG).is_file():
        if not (place / SUMMARY).is_file():
            raise ConfigError(
                f"adapter.start = '{start}': the run is not finished.\n"
                f"  Finish it: silotune run --resume {place}"
            )
        place = place / RESULT
    if (place / CONFIG).is_file() and (place / WEIGHTS).is_file():
        return place
    why = "there is no such folder"
    if (place / "adapter_model.bin").is_file():
        why = "it holds a pickle, which is not read because it could run code; save it again"
    elif (place / "config.json").is_file() or (place / RESULT).is_dir():
        why = "it holds a model with all its weights, and no adapter"
    elif place.is_dir():
        why = f"it holds no {CONFIG} with {WEIGHTS}"
    raise ConfigError(
        f"adapter.start = '{start}': {why}.\n"
        "  Name a finished run, or a folder that PEFT's save_pretrained wrote."
    )


def read_start(start: str) -> dict[str, Tensor]:
    """The tensors of an adapter to start from, float32, by the names under which they are saved.

    Raises:
        ConfigError: See `folder_of_start`; or a file is damaged, or holds values that are no
            weights.
    """
    path = folder_of_start(start) / WEIGHTS
    try:
        state = {name: t.float() for name, t in load_file(path).items()}
        check_representable(state, who=str(path))
    except (SafetensorError, OSError, UpdateError) as error:
        raise ConfigError(
            f"adapter.start: {path} cannot be used: {error}\n  Restore it from a copy."
        ) from error
    return state


def hash_of_start(start: str) -> str:
    """SHA-256 of the adapter's names, shapes and values."""
    if is_told(start):
        return start.removeprefix(PART).removeprefix(TOLD)
    return sha256(read_start(start))


def check_start(start: str, cfg: Mapping[str, Any]) -> None:
    """Refuse an adapter that is not of the kind that the recipe trains.

    Args:
        start: A PEFT folder or a finished run.
        cfg: The recipe's [adapter].

    Raises:
        ConfigError: Names every key that differs, and the value to set.
    """
    path = folder_of_start(start) / CONFIG
    try:
        its = json.loads(path.read_text(encoding="utf-8"))
        differences = list(_differences(its, cfg))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"adapter.start: {path} is damaged.\n  Restore it from a copy."
        ) from error
    if differences:
        raise ConfigError(
            f"adapter.start = '{start}' is another adapter than the recipe's:\n  "
            + "\n  ".join(differences)
        )


def _differences(its: Mapping[str, Any], cfg: Mapping[str, Any]) -> Iterator[str]:
    kind, wanted = its.get("peft_type"), BY_KIND.get(str(cfg["kind"]))
    wanted = wanted or str(cfg["peft"].get("peft_type", "")).upper()
    if kind != wanted:
        name = next((ours for ours, theirs in BY_KIND.items() if theirs == kind), "peft")
        yield f"it is of the kind {kind}: set adapter.kind = '{name}'"
        return
    if kind == "LORA":
        for theirs, ours in (
            ("r", "rank"),
            ("lora_alpha", "alpha"),
            ("use_rslora", "rslora"),
            ("use_dora", "dora"),
        ):
            if (value := its.get(theirs, False)) != cfg[ours]:
                shown = json.dumps(value)
                yield f"its {theirs} is {shown}: set adapter.{ours} = {shown}"
        if its.get("rank_pattern") and not cfg["peft"].get("rank_pattern"):
            yield "it has ranks of single modules: set adapter.peft.rank_pattern"
    if kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
        count = its.get("num_virtual_tokens")
        if count != cfg["virtual_tokens"]:
            yield f"it has {count} virtual tokens: set adapter.virtual_tokens = {count}"


def fitted(start: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to start from, checked against those that the recipe trains.

    Args:
        start: A PEFT folder or a finished run.
        expected: The trained tensors of the recipe's fresh adapter.

    Raises:
        ConfigError: Names or shapes differ; says which modules the adapter has.
    """
    state = read_start(start)
    lacks, more = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if lacks or more:
        its = sorted({_module(name) for name in state})
        raise ConfigError(
            f"adapter.start = '{start}' does not have the tensors of this recipe: "
            f"{f'{lacks[0]} is missing' if lacks else f'{more[0]} is not trained here'}.\n"
            f"  It adapts: {', '.join(its)}. Set adapter.targets to these, and model.name to its "
            "base."
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ConfigError(
                f"adapter.start = '{start}': {name} has the shape {tuple(state[name].shape)}, and "
                f"{tuple(tensor.shape)} on this base.\n  Set model.name to the base that it was "
                "trained on."
            )
    return {name: state[name].to(torch.float32) for name in expected}


def _module(name: str) -> str:
    """The last name of the module that a saved tensor belongs to."""
    parts = [p for p in name.split(".") if p != "weight" and not p.startswith(("lora_", "ia3_"))]
    return parts[-1] if parts else name
