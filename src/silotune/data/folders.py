"""Which files of a folder are the train part, the held-out part, or one client each.

Knows file names only. Folders come in three layouts: parts of one data set (as data sets on the hub
have them, a part possibly in several shards), one data set in shards, or one file per client.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from silotune.core.errors import ConfigError, DataError
from silotune.core.wording import did_you_mean
from silotune.data.conversations import list_columns
from silotune.data.file_formats import READERS, is_readable, stem_of, unreadable

TRAIN = ("train", "training")
HELD_OUT = ("eval", "evaluation", "validation", "valid", "val", "dev", "test")
"""Names of held-out parts. If a folder has several, the first of this list is held out."""
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Descriptions that libraries write next to the rows."""
_SHARD = re.compile(r"(.+)-(\d{2,})-of-(\d{2,})(?:-[0-9a-f]{6,})?")
"""`train-00000-of-00002`, of older data sets also with a hash behind it."""
_BEGINS = re.compile(r"(.+?)[-_. ]")


@dataclass(frozen=True)
class Layout:
    """The files of a folder by what they are, each in the order of its shards."""

    train: list[Path]
    """The train part of one data set; empty if there is one client per file."""
    held_out: list[Path]
    """Its held-out part, if it has one."""
    clients: dict[str, list[Path]]
    """Client -> its files; empty if the folder is one data set."""
    notes: tuple[str, ...] = ()
    """What is left alone."""


def layout_of(folder: Path, *, held_out: str | None = None, alone: bool = False) -> Layout:
    """Find out what the files of a folder are.

    Args:
        folder: The folder. If all its files are in a subfolder `data`, as on the hub, that one.
        held_out: The part to hold out, by name; by default the first of `HELD_OUT`.
        alone: Whether a single part, of whatever name, is one data set: for held-out rows that
            have their own folder.

    Raises:
        DataError: A file cannot be read, a shard is missing, or what the files are is ambiguous.
        ConfigError: There is no part with the name `held_out`.
    """
    groups = _grouped(folder)
    parts = {name.lower(): files for name, files in groups.items()}
    train = next((name for name in TRAIN if name in parts), None)
    if len(groups) == 1 and held_out is None:
        (files,) = groups.values()
        is_sharded = _SHARD.fullmatch(stem_of(files[0])) is not None
        if alone or (is_sharded and not parts.keys() & {*HELD_OUT}):
            return Layout(files, [], {})
    if train is None:
        _refuse_parts(folder, groups)
        if held_out is not None:
            raise ConfigError(_no_part(folder, held_out, groups))
        return Layout([], [], {name.strip(): files for name, files in sorted(groups.items())})
    others = [files[0].name for name, files in groups.items() if not is_part(name)]
    if others:
        raise DataError(
            f"{folder}: '{sorted(others)[0]}' is neither a train nor a held-out part.\n"
            f"  A held-out part is called {', '.join(HELD_OUT)}. Move other files away, or set "
            "data.path (and data.eval_path) to single files."
        )
    held = [name for name in HELD_OUT if name in parts]
    if held_out is not None and held_out.lower() not in held:
        raise ConfigError(_no_part(folder, held_out, groups))
    chosen = held_out.lower() if held_out is not None else next(iter(held), None)
    left = [name for name in held if name != chosen]
    note = (
        f"{folder}: the part '{chosen}' is held out, {list_columns(left)} not used; choose with "
        "data.eval_split"
    )
    return Layout(
        parts[train], parts[chosen] if chosen else [], {}, (note,) if left and chosen else ()
    )


def is_part(name: str) -> bool:
    """Whether a file of this name, without its ending, is a part of one data set."""
    return name.lower() in (*TRAIN, *HELD_OUT)


def is_client(name: str) -> bool:
    """Whether a file of this name, without its ending, can be a whole client."""
    return not is_part(name) and _SHARD.fullmatch(name) is None


def _no_part(folder: Path, name: str, groups: Mapping[str, Sequence[Path]]) -> str:
    held = [part for part in groups if part.lower() in HELD_OUT]
    return (
        f"data.eval_split = '{name}': the folder '{folder}' has no such held-out part."
        f"{did_you_mean(name, held)}\n  Its held-out parts: {list_columns(held)}."
    )


def _refuse_parts(folder: Path, groups: Mapping[str, Sequence[Path]]) -> None:
    """Ask back if the files are called like parts: nobody's held-out rows become a client.

    Raises:
        DataError: They are.
    """
    exact = [name for name in groups if is_part(name)]
    begins = {name: found[1].lower() for name in groups if (found := _BEGINS.match(name))}
    both = {word in HELD_OUT for word in begins.values() if word in (*TRAIN, *HELD_OUT)}
    like = exact or ([n for n, word in begins.items() if word in HELD_OUT] if len(both) > 1 else [])
    if like:
        name = groups[sorted(like)[0]][0].name
        raise DataError(
            f"{folder}: '{name}' is called like a held-out part, but there is no train part.\n"
            "  If the files are one data set, name its parts train and test (or set data.path and "
            "data.eval_path\n  to single files). If each file is a client, rename those that are "
            "called like a part."
        )


def _grouped(folder: Path) -> dict[str, list[Path]]:
    """Name -> its file, or its shards in order. Names keep their spelling."""
    files = _data_files(folder)
    if not files and (folder / "data").is_dir():
        files = _data_files(folder / "data")
    if not files:
        inside = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir()]
        below = f" Its subfolders are not searched: {list_columns(inside)}." if inside else ""
        raise DataError(
            f"{folder}: the folder contains no data file ({', '.join(READERS)}).{below}\n"
            "  Put a train file (and an eval file) there, or one file per client."
        )
    groups: dict[str, list[Path]] = {}
    for path in files:
        shard = _SHARD.fullmatch(stem_of(path))
        groups.setdefault(shard[1] if shard else stem_of(path), []).append(path)
    for name, group in groups.items():
        _check_whole(folder, name, group)
    _check_distinct(folder, groups)
    return groups


def _data_files(folder: Path) -> list[Path]:
    files: list[Path] = []
    names = {path.name for path in folder.iterdir()}
    for path in sorted(folder.iterdir()):
        # Texts about the data may be next to it. Anything else could be a client, which would be
        # lost silently.
        about = path.name in ABOUT or (path.name == "state.json" and "dataset_info.json" in names)
        if path.is_dir() or path.name.startswith(".") or about:
            continue
        if path.suffix.lower() in ("", ".md", ".txt"):
            continue
        if not is_readable(path):
            raise unreadable(path, ", or move it out of the folder")
        files.append(path)
    return files


def _check_whole(folder: Path, name: str, group: Sequence[Path]) -> None:
    """Refuse two files of one name, and shards of which some are missing."""
    shards = [_SHARD.fullmatch(stem_of(path)) for path in group]
    totals = {int(shard[3]) for shard in shards if shard}
    numbers = [int(shard[2]) for shard in shards if shard]
    if len(group) > 1 and (None in shards or len(totals) > 1 or len({*numbers}) < len(numbers)):
        what = "part" if is_part(name) else "client"
        raise DataError(
            f"{folder}: '{group[0].name}' and '{group[1].name}' would be the same {what}.\n"
            "  Keep one of them, or rename one."
        )
    missing = sorted({*range(max(totals, default=0))} - {*numbers})
    if missing:
        raise DataError(
            f"{folder}: of the {max(totals)} shards of '{name}', number {missing[0]} is missing"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}.\n"
            "  Copy all shards to the folder; they are counted from 0."
        )


def _check_distinct(folder: Path, groups: Mapping[str, Sequence[Path]]) -> None:
    """Refuse two spellings of one part: Test and test, train and training."""
    parts: dict[str, str] = {}
    for name, files in groups.items():
        if not is_part(name):
            continue
        word = "train" if name.lower() in TRAIN else name.lower()
        if word in parts:
            raise DataError(
                f"{folder}: '{groups[parts[word]][0].name}' and '{files[0].name}' would be the "
                "same part.\n  Keep one of them, or rename one."
            )
        parts[word] = name
