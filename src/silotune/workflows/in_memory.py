"""Rows and a model that are in memory: written to disk once, and then they go the ordinary way.

So a run from Python has the same provenance, fingerprints, engines and resume as one from files.
What is written is named by its content and never changed; the caller's objects are not changed
either. This file does not know what a row means.
"""

import copy
import datetime
import decimal
import json
import re
import tempfile
import unicodedata
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import tomli_w

from silotune.core.atomic_files import make_folder, owner_only, writing
from silotune.core.errors import ConfigError, DataError, ModelError
from silotune.core.safe_text import one_line
from silotune.data.folders import TRAIN, is_client, is_part
from silotune.data.reading import HUB_ONLY
from silotune.models.sources import content_hash

ROWS, MODELS = "rows-in-memory", "models-in-memory"
"""Folders beside the run folders."""


@contextmanager
def from_memory(rows: Any, model: Any, overrides: Sequence[str]) -> Iterator[list[str]]:
    """Overrides that point to rows and a model in memory, for as long as the context lasts."""
    if rows is None and model is None:
        yield list(overrides)
        return
    with tempfile.TemporaryDirectory(prefix="silotune-") as scratch:
        yield keep(rows, model, overrides, Path(scratch))


def keep_beside(
    out: Path | str | None, rows: Any, model: Any, overrides: Sequence[str], resume: object = None
) -> list[str]:
    """Overrides that point to rows and a model in memory, kept beside the run folder `out`.

    Raises:
        ConfigError: A resumed run has its own rows and model.
        DataError, ModelError: They cannot be used.
        DiskError: They cannot be written.
    """
    if rows is None and model is None:
        return list(overrides)
    if resume is not None:
        raise ConfigError(
            "a resumed run keeps its rows and its model, so they cannot be given again.\n"
            "  Leave them out: they are kept beside the run folder."
        )
    return keep(rows, model, overrides, Path(out).parent if out is not None else Path("runs"))


def keep(rows: Any, model: Any, overrides: Sequence[str], beside: Path) -> list[str]:
    """Write rows and model below a folder, and return the overrides that point to them."""
    found = list(overrides)
    if rows is not None:
        place, has_clients = _keep_rows(rows, beside)
        found.append(_override("data.path", str(place)))
        found += [f"data.{key}=none" for key in HUB_ONLY]
        if has_clients:
            found.append("partition=none")
    if model is not None:
        found += [_override("model.name", str(_keep_model(model, beside))), "model.revision=none"]
    return found


def keep_rows(rows: Any, beside: Path) -> Path:
    """Write rows that belong to nobody in particular below a folder, and return their file.

    Raises:
        DataError: They cannot be used, or are given by client.
    """
    place, _ = _keep_rows(rows, beside)
    if place.is_dir():
        raise DataError(
            "rows are given by name, but should be one list.\n"
            '  Write [{"question": "...", "answer": "..."}, ...].'
        )
    return place


def _override(key: str, text: str) -> str:
    return f"{key}={tomli_w.dumps({'x': text}).strip().removeprefix('x = ')}"


# --- rows -----------------------------------------------------------------------------------------


def _keep_rows(rows: Any, beside: Path) -> tuple[Path, bool]:
    """A file, or a folder of files by name; and whether each file is a client."""
    named, has_clients = _parts_of(rows)
    files = {f"{name}.jsonl": _lines(part, name) for name, part in named.items()}
    digest = sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    place = (beside / ROWS / digest.hexdigest()[:16]).absolute()
    if not place.exists():
        make_folder(place.parent)
        with writing(place), tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            part = Path(scratch) / "rows"
            part.mkdir(mode=0o700)
            for name, data in files.items():
                with open(part / name, "wb", opener=owner_only) as file:
                    file.write(data)
            _rename(part, place)
    for name, data in files.items():
        if not (place / name).is_file() or (place / name).read_bytes() != data:
            raise DataError(
                f"{place / name} has changed since it was written.\n  Remove {place} and try again."
            )
    return (place / "rows.jsonl" if set(files) == {"rows.jsonl"} else place), has_clients


def _rename(part: Path, place: Path) -> None:
    try:
        part.rename(place)
    except OSError:
        if not place.is_dir():  # otherwise another process was faster, with the same content
            raise


def _parts_of(rows: Any) -> tuple[dict[str, Any], bool]:
    """Rows by the name of their file, and whether the names are clients."""
    if isinstance(rows, str | bytes | Path):
        raise DataError(
            f"rows has the type {type(rows).__name__}, but should hold rows.\n"
            '  To read a file, set data.path: silotune.run(recipe, ["data.path=rows.csv"]).'
        )
    if not isinstance(rows, Mapping):
        return {"rows": rows}, False
    given = {_client_name(key): part for key, part in cast(Mapping[Any, Any], rows).items()}
    if not given or len(given) < len(cast(Mapping[Any, Any], rows)):
        raise DataError("rows has no clients, or a name twice.\n  Write {client: its rows, ...}.")
    trains = [name for name in given if name.lower() in TRAIN]
    if len(trains) == 1 and len(given) <= 2 and all(map(is_part, given)):
        return {("train" if k in trains else "eval"): v for k, v in given.items()}, False
    folded = [unicodedata.normalize("NFC", name).casefold() for name in given]
    for name, key in zip(given, folded, strict=True):
        if not is_client(key) or folded.count(key) > 1 or not _is_file_name(name):
            raise DataError(
                f"client '{one_line(name, longest=100)}' cannot be kept under its name: it is that "
                "of a part of a data set, differs from another only in case, or is no file name.\n"
                "  Give the rows as one list, with a column that names the client: partition.by."
            )
    return given, True


def _client_name(key: object) -> str:
    if isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool)):
        return str(key)
    raise DataError(
        f"rows: a client's name has the type {type(key).__name__}, but should be a text.\n"
        "  Write {client: its rows, ...}."
    )


def _is_file_name(name: str) -> bool:
    whole = name.strip() == name and not name.startswith(".") and 0 < len(name.encode()) <= 200
    return whole and not re.search(r'[/\\<>:"|?*\x00-\x1f\x7f]', name)


def _lines(rows: Any, name: str) -> bytes:
    """JSON lines: row n of the rows is line n of the file."""
    lines = [json.dumps(row) for row in _records(rows, f"client '{name}'")]
    if not lines:
        raise DataError(f"{_of(name)} are empty.\n  Add rows.")
    return ("\n".join(lines) + "\n").encode()


def _of(name: str) -> str:
    return "the rows" if name == "rows" else f"the rows of '{one_line(name, longest=100)}'"


def _records(rows: Any, who: str) -> Iterator[dict[str, Any]]:
    """Plain rows from a list, a data set, a data frame or an iterator."""
    who = "" if who == "client 'rows'" else f"{one_line(who, longest=100)}, "
    if isinstance(rows, str | bytes | Path | Mapping) or not isinstance(rows, Iterable):
        raise DataError(
            f"{who or 'rows '}has the type {type(rows).__name__}, but should be rows: a list of "
            "dicts, a data set, a data frame or an iterator.\n"
            '  Write [{"question": "...", "answer": "..."}, ...].'
        )
    if hasattr(rows, "columns") and hasattr(rows, "to_dict"):  # pandas
        frame: Any = rows
        if len(set(frame.columns)) < len(frame.columns):
            raise DataError(f"{who}a column name occurs twice.\n  Give each column another name.")
        rows = frame.to_dict(orient="records")
    elif hasattr(rows, "to_dicts"):  # polars
        rows = cast(Any, rows).to_dicts()
    for n, row in enumerate(cast(Iterable[Any], rows), start=1):
        where = f"{who}row {n}"
        if not isinstance(row, Mapping):
            raise DataError(
                f"{where} has the type {type(row).__name__}, but should be a dict.\n"
                '  Write {"question": "...", "answer": "..."}.'
            )
        yield _plain(row, where, depth=0)


def _plain(value: Any, where: str, *, depth: int) -> Any:
    """A value as JSON has it: numbers and arrays of other libraries, times as text."""
    if depth > 50:
        raise DataError(f"{where} is nested too deeply.\n  Give texts, numbers and short lists.")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise DataError(f"{where} has a name that is not a text.\n  Name columns by texts.")
        return {
            key: _plain(v, f"{where}, '{one_line(key, longest=40)}'", depth=depth + 1)
            for key, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth=depth + 1) for item in value]
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' missing values
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist(), where, depth=depth + 1)
    raise DataError(
        f"{where} has the type {type(value).__name__}, which cannot be written as JSON.\n"
        "  Give a text or a number, or leave the column out."
    )


# --- a model --------------------------------------------------------------------------------------


def _keep_model(given: Any, beside: Path) -> Path:
    """Save a model and its tokenizer as a folder named by their content."""
    model, tokenizer = _checked_model(given)
    # saving writes names and types into the configuration: into that of a twin, which shares the
    # weights
    twin = copy.copy(model)
    twin.config = copy.deepcopy(model.config)
    twin.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    parent = make_folder((beside / MODELS).absolute())
    with writing(parent), tempfile.TemporaryDirectory(dir=parent) as scratch:
        part = Path(scratch) / "model"
        try:
            twin.save_pretrained(part)
            copy.deepcopy(tokenizer).save_pretrained(part)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise ModelError(
                f"model cannot be saved: {one_line(str(error), longest=300)}\n"
                "  Save it yourself with save_pretrained, and set model.name to its folder."
            ) from error
        digest = sha256(content_hash(part).encode())
        for path in sorted(part.iterdir()):
            if path.suffix != ".safetensors":
                digest.update(f"{path.name}\0".encode() + path.read_bytes())
        place = parent / digest.hexdigest()[:16]
        if not place.exists():
            _rename(part, place)
    return place


def _checked_model(given: Any) -> tuple[Any, Any]:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    pair: Any = given if isinstance(given, tuple | list) else (given,)
    if len(pair) != 2 or not isinstance(pair[1], PreTrainedTokenizerBase):
        raise ConfigError(
            "model should be a pair of a transformers model and its tokenizer.\n"
            "  Write model=(model, tokenizer). For a model by name or folder, set model.name."
        )
    model, tokenizer = pair
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        raise ModelError(
            f"model has the type {kind}, but should be a transformers model without an adapter.\n"
            "  With a PEFT model, pass what merge_and_unload() returns."
        )
    if getattr(model, "is_quantized", False) or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            "model is quantised, or has an adapter in it, so it cannot be saved as a plain base.\n"
            "  Load it without, and set model.quantization in the recipe."
        )
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ModelError(
            "model has weights on the meta device, which holds no values.\n  Load its weights."
        )
    return model, tokenizer
