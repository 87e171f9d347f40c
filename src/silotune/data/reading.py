"""[data]: where the rows come from, and what each becomes for its task.

Reads files and the hub, and converts row by row. Knows neither clients nor what they hold out.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from silotune.core.errors import ConfigError, DataError, EmptyRowError
from silotune.data.config import HUB_ONLY, DataConfig, is_changed
from silotune.data.conversations import (
    CONVERSATIONS,
    OPTIONAL,
    TEXT,
    Conversation,
    conversation,
    plain_text,
)
from silotune.data.file_formats import no_such_file
from silotune.data.files import locate, read_hub, read_place, search_place
from silotune.data.labelled_texts import FORMATS, LabelledText, check_all_pairs, labelled_text
from silotune.data.placed_conversation import PlacedConversation
from silotune.data.placed_rows import Mistake, Part, PlacedRow, moved, refuse
from silotune.data.preferences import ANSWERS, PROMPTS, PlacedPreference, preference

TaskRow = Any
"""A row in the form that its task needs, and only the task looks inside: a Conversation to answer,
a LabelledText to classify, a text as the only turn of a Conversation, or a Preference."""


def seed_of_split(cfg: DataConfig, seed: int) -> int:
    """The seed for partitions and held-out rows: data.split_seed, or else the run's seed."""
    return cfg.split_seed if cfg.split_seed is not None else seed


def chooses_rows(cfg: DataConfig) -> bool:
    """Whether silotune chooses a client's train or held-out rows, as far as its config tells."""
    stored = cfg.eval_path is not None or cfg.eval_split is not None
    return not stored or cfg.max_rows is not None or cfg.max_eval_rows is not None


def read_parts(
    cfg: DataConfig,
    task: str,
    columns: Collection[str] | None = None,
    *,
    complete: bool = True,
) -> tuple[Part, Part | None]:
    """The train rows, and the held-out rows if these are stored separately.

    Single rows that cannot be read are among the parts' mistakes: pass the parts to
    `convert_parts`, or the mistakes to `refuse`.

    Args:
        cfg: Where the rows are.
        task: What rows become.
        columns: The only columns that are kept; None for all.
        complete: As in `read_file`. If not, whether a row can be used depends on that row alone.

    Raises:
        DataError: Files or the hub cannot be read.
        ConfigError: The settings do not fit where the rows are.
    """
    train, held = _read_both(cfg, complete=complete)
    if columns is not None:
        train, held = _only_columns(train, columns), held and _only_columns(held, columns)
    return without_empty(train, cfg, task), held and without_empty(held, cfg, task)


def _only_columns(part: Part, columns: Collection[str]) -> Part:
    """The same rows with only these columns."""
    rows = [
        PlacedRow(row.where, {k: v for k, v in row.columns.items() if k in columns})
        for row in part.rows
    ]
    return replace(part, rows=rows)


def without_empty(part: Part, cfg: DataConfig, task: str) -> Part:
    """With data.skip_empty, a part without the rows that lack a text.

    Raises:
        DataError: No row is left.
    """
    if not cfg.skip_empty:
        return part
    kept = [n for n, row in enumerate(part.rows) if not _is_empty(row, cfg, task)]
    if not kept:
        refuse(part.mistakes)
        what = "lacks a text or a difference" if task == "prefer" else "lacks a text"
        raise DataError(f"every row of '{cfg.path}' {what}.\n  Fill in what is missing.")
    renumbered = {old: new for new, old in enumerate(kept)}
    files = {
        name: [renumbered[n] for n in rows if n in renumbered] for name, rows in part.files.items()
    }
    for name, rows in files.items():
        if not rows:
            what = "lacks a text or a difference" if task == "prefer" else "lacks a text"
            raise DataError(
                f"every row of client '{name}' {what}.\n  Fill in what is missing in its file."
            )
    mistakes = [Mistake(bisect_left(kept, old.row), old.text) for old in part.mistakes]
    return replace(
        part,
        rows=[part.rows[n] for n in kept],
        files=files,
        num_empty=len(part.rows) - len(kept),
        mistakes=tuple(mistakes),
    )


def _is_empty(row: PlacedRow, cfg: DataConfig, task: str) -> bool:
    try:
        READERS[task](row, cfg)
    except EmptyRowError:
        return True
    except DataError:
        return False  # a different mistake, which has to be reported
    return False


def _read_both(cfg: DataConfig, *, complete: bool) -> tuple[Part, Part | None]:
    place = locate(cfg.path)
    if place is None:
        return _read_hub_parts(cfg, complete=complete)
    # a folder with parts has splits, too
    only = [key for key in HUB_ONLY if key != "eval_split" or not place.is_dir()]
    hub_keys = [key for key in only if is_changed(cfg, key)]
    if hub_keys:
        raise ConfigError(
            f"data.{', data.'.join(hub_keys)}: only for data sets on the hub, but '{cfg.path}' is "
            "local.\n  Remove the setting, or set data.path to a hub data set."
        )
    train, held = search_place(place, held_out=cfg.eval_split, complete=complete)
    if held is not None and (cfg.eval_path is not None or is_changed(cfg, "eval_fraction")):
        key = "eval_path" if cfg.eval_path is not None else "eval_fraction"
        raise ConfigError(
            f"data.{key}: '{cfg.path}' already holds its held-out rows in an eval file.\n"
            f"  Remove data.{key}, or set data.path to the train file alone."
        )
    if cfg.eval_path is None:
        return train, held
    return train, _read_held_out(Path(cfg.eval_path).expanduser(), train, complete=complete)


def read_all(path: str) -> list[PlacedRow]:
    """All rows of a file or folder, train and held-out alike.

    Raises:
        DataError: It does not exist, or cannot be read.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise no_such_file(place)
    train, held = read_place(place)
    return [*train.rows, *(held.rows if held else [])]


def _read_hub_parts(cfg: DataConfig, *, complete: bool) -> tuple[Part, Part | None]:
    def read(split: str) -> Part:
        return Part(read_hub(cfg.path, name=cfg.name, split=split, revision=cfg.revision))

    train = read(cfg.split)
    if cfg.eval_split is not None:
        return train, read(cfg.eval_split)
    if cfg.eval_path is not None:
        return train, _read_held_out(Path(cfg.eval_path).expanduser(), train, complete=complete)
    return train, None


def _read_held_out(place: Path, train: Part, *, complete: bool) -> Part:
    if not place.exists():
        raise no_such_file(place)
    held, second_part = search_place(place, alone=not train.files, complete=complete)
    if second_part is not None or bool(held.files) != bool(train.files):
        layout = "a folder with one file per client" if train.files else "one file or its shards"
        raise ConfigError(
            f"data.eval_path: '{place}' does not have the same layout as data.path.\n"
            f"  Use {layout}."
        )
    return held


# --- converting ---------------------------------------------------------------------------------


def convert_parts(
    train: Part,
    held: Part | None,
    cfg: DataConfig,
    task: str,
    others: Sequence[Mistake] = (),
) -> tuple[list[TaskRow], list[TaskRow] | None]:
    """Convert the rows of both parts, and report the mistakes of both together.

    Args:
        train: The train rows.
        held: The held-out rows, or None.
        cfg: What the rows look like.
        task: What rows become.
        others: Mistakes that were found elsewhere; rows are counted through both parts.

    Raises:
        DataError: Names the rows that cannot be read or used.
    """
    rows = [*train.rows, *(held.rows if held else [])]
    unread = [*train.mistakes, *moved(held.mistakes if held else (), len(train.rows))]
    converted = convert(rows, cfg, task, [*unread, *others])
    return converted[: len(train.rows)], converted[len(train.rows) :] if held else None


def convert(
    rows: Sequence[PlacedRow], cfg: DataConfig, task: str, others: Sequence[Mistake] = ()
) -> list[TaskRow]:
    """Convert rows for a task.

    Raises:
        DataError: Names the rows that cannot be used, and how to fix them, with the other mistakes.
    """
    read = READERS[task]
    found: list[TaskRow] = []
    mistakes = list(others)
    for n, row in enumerate(rows):
        try:
            found.append(read(row, cfg))
        except DataError as error:
            mistakes.append(Mistake(n, str(error)))
    refuse(mistakes, len(rows) if not others else None)
    if task == "classify":
        check_all_pairs(found, [row.where for row in rows])
    return found


def convert_quietly(
    rows: Sequence[PlacedRow], cfg: DataConfig, task: str
) -> tuple[list[TaskRow | None], str]:
    """Convert rows one by one. None stands for a row that cannot be used.

    Whether a row can be used depends on that row alone, so that it changes nothing for the others:
    a text without its pair is left out if `text_pair` is set, and a pair if it is not.

    Returns:
        The rows, and what is wrong with the first that cannot be used; "" if nothing is.
    """
    read, problems = READERS[task], list[str]()
    found: list[TaskRow | None] = []
    for row in rows:
        try:
            one = read(row, cfg)
        except DataError as error:
            problems.append(str(error))
            one = None
        if task == "classify" and one is not None:
            is_pair = "text_pair" in one
            if is_pair != (cfg.text_pair is not None):
                problems.append(f"{row.where}: a pair needs data.text and data.text_pair.")
                one = None
        found.append(one)
    return found, problems[0] if problems else ""


def usual_columns(columns: Collection[str]) -> list[str]:
    """Those of a file's columns that a known format uses; none if no format fits."""
    if {*ANSWERS} <= {*columns}:
        return [column for column in (*PROMPTS, *ANSWERS, "tools") if column in columns]
    answered = [names for names in CONVERSATIONS if {*names} - {*OPTIONAL} <= {*columns}]
    labelled = [names for names in FORMATS if {*names, "label"} <= {*columns}]
    names = answered[0] if answered else (*max(labelled, key=len), "label") if labelled else (TEXT,)
    return [column for column in names if column in columns]


def _as_conversation(row: PlacedRow, cfg: DataConfig) -> Conversation:
    turns = conversation(
        row.columns,
        where=row.where,
        prompt=cfg.prompt,
        completion=cfg.completion,
        system=cfg.system,
    )
    return PlacedConversation(turns, row.where)


def _as_labelled(row: PlacedRow, cfg: DataConfig) -> LabelledText:
    return labelled_text(
        row.columns,
        where=row.where,
        text=cfg.text,
        text_pair=cfg.text_pair,
        label=cfg.label,
        labels=cfg.labels,
    )


def _as_text(row: PlacedRow, cfg: DataConfig) -> Conversation:
    turns = (plain_text(row.columns, where=row.where, column=cfg.text or TEXT),)
    return PlacedConversation(turns, row.where)


def _as_preference(row: PlacedRow, cfg: DataConfig) -> PlacedPreference:
    pair = preference(row.columns, where=row.where, system=cfg.system)
    return PlacedPreference.of(pair, row.where)


READERS: dict[str, Callable[[PlacedRow, DataConfig], TaskRow]] = {
    "instruct": _as_conversation,
    "classify": _as_labelled,
    "text": _as_text,
    "prefer": _as_preference,
}
"""Task -> the function that converts a row for it."""
