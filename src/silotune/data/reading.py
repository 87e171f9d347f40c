"""[data]: where the rows come from, and what each becomes for its task.

Reads files and the hub, and converts row by row. Knows neither clients nor what they hold out.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from silotune.core.errors import ConfigError, DataError, EmptyRowError
from silotune.core.types import Config
from silotune.data.conversations import (
    CONVERSATIONS,
    Conversation,
    conversation,
    parse_template,
)
from silotune.data.file_formats import no_such_file
from silotune.data.files import locate, read_hub, read_place, search_place
from silotune.data.labelled_texts import FORMATS, LabelledText, check_all_pairs, labelled_text
from silotune.data.placed_conversation import PlacedConversation
from silotune.data.placed_rows import Mistake, Part, PlacedRow, moved, refuse

HUB_ONLY = ("name", "split", "eval_split", "revision")
"""Settings that only apply to a data set on the hub."""


class DataConfig(Config):
    """Which rows to train on, and how they become conversations."""

    path: str = Field(min_length=1)
    """A named example (medquad_mini), a file, a folder, or a data set on the Hugging Face hub."""
    eval_path: str | None = Field(default=None, min_length=1)
    """A file or folder with the held-out rows, in the same layout as `path`; replaces
    `eval_fraction`."""
    eval_split: str | None = Field(default=None, min_length=1)
    """Split with the held-out rows, for example "test": of a hub data set, or of a local folder
    with parts such as train and test; replaces `eval_fraction`."""
    eval_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of its rows that each client holds out for scoring. A keyed hash decides each row by
    itself, so the number varies around this share; at least one row."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of its remaining rows that each client sets aside for choices, decided row by row like
    the held-out part. If above 0, a run scores these rows instead of the held-out ones, which
    `silotune compare` and `silotune evaluate` score once, at the end."""
    name: str | None = Field(default=None, min_length=1)
    """Configuration of a hub data set."""
    split: str = Field(default="train", min_length=1)
    """Split of a hub data set; a slice such as "train[:500]" is fine."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit or tag of a hub data set; a full commit makes a run repeatable."""
    prompt: str | None = Field(default=None, min_length=1)
    """Template with {column} placeholders for the user's turn, for rows in an unknown format."""
    completion: str | None = Field(default=None, min_length=1)
    """Template with {column} placeholders for the answer; goes with `prompt`."""
    system: str | None = Field(default=None, min_length=1)
    """System text for every conversation that has none."""
    template: str = Field(default="auto", min_length=1)
    """How a conversation becomes text, for training, scoring and answers alike. auto: the model's
    own chat template, or plain if it has none. three-block: "### Instruction:" with the system
    text, "### Input:" with the question, "### Response:". alpaca, vicuna and flowertune: the
    templates of these projects. Or a file with your own Jinja chat template, which is saved with
    the run."""
    date: str | None = None
    """The day, as YYYY-MM-DD, for chat templates that write today's date. If absent, the day on
    which the run starts; the run keeps it."""
    max_rows: int | None = Field(default=None, ge=1)
    """Maximum number of training rows per client, chosen by a keyed hash of each row."""
    max_eval_rows: int | None = Field(default=None, ge=1)
    """Maximum number of held-out rows per client, chosen by a keyed hash of each row."""
    label: str | None = Field(default=None, min_length=1)
    """A column whose distribution at each client is shown in the report, for example the kind of
    question. With task = "classify", the column of the classes; "label" if absent."""
    labels: tuple[str, ...] | None = Field(default=None, min_length=2)
    """classify: all classes, in the order of the model's outputs. If absent, the classes of all
    rows, sorted. Required with real clients, because no one else can read their rows."""
    text: str | None = Field(default=None, min_length=1)
    """classify: the column of the text; if absent, found by the usual names (text, sentence,
    ...)."""
    text_pair: str | None = Field(default=None, min_length=1)
    """classify: the column of the second text, for pairs; goes with `text`."""
    skip_empty: bool = False
    """Skip rows that lack a question, an answer or a text, and report how many, instead of
    stopping."""
    split_seed: int | None = Field(default=None, ge=0)
    """Seed for the partition into clients and the held-out rows; the run's seed if absent. Set it
    to run several seeds on the same held-out rows."""

    @field_validator("date", mode="before")
    @classmethod
    def _day_as_text(cls, value: object) -> object:
        return value.isoformat() if isinstance(value, date) else value  # TOML has dates

    @model_validator(mode="after")
    def _no_contradiction(self) -> "DataConfig":
        mistakes: list[str] = []
        # Compared with the default: a resolved recipe sets every field and must remain valid.
        given = [key for key in ("eval_path", "eval_split") if getattr(self, key) is not None]
        given += ["eval_fraction"] * _is_changed(self, "eval_fraction")
        if len(given) > 1:
            count = "both" if len(given) == 2 else "all"
            mistakes.append(f"give {' or '.join(given)}, not {count}")
        if self.eval_path == self.path:
            mistakes.append("eval_path is the same as path; held-out rows must not be trained on")
        if self.eval_split is not None and _overlap(self.split, self.eval_split):
            mistakes.append(
                "eval_split shares rows with split; held-out rows must not be trained on"
            )
        if (self.prompt is None) != (self.completion is None):
            mistakes.append("prompt and completion belong together; set both")
        has_placeholder: dict[str, bool] = {}
        for key, template in (("prompt", self.prompt), ("completion", self.completion)):
            try:
                has_placeholder[key] = any(column for _, column in parse_template(template or ""))
            except ValueError as error:
                mistakes.append(f"{key} {error}")
        if self.date is not None and not _is_day(self.date):
            mistakes.append("date is no day of the calendar; write it as YYYY-MM-DD")
        if self.text_pair is not None and self.text is None:
            mistakes.append("text_pair goes with text; set both")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            mistakes.append("labels contains a label twice")
        if self.completion is not None and has_placeholder.get("completion") is False:
            mistakes.append("completion has no {column}, so every row would teach the same answer")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


TaskRow = Any
"""A row in the form that its task needs, and only the task looks inside: a Conversation to answer,
or a LabelledText to classify."""


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
        raise DataError(f"every row of '{cfg.path}' lacks a text.\n  Fill in the missing texts.")
    renumbered = {old: new for new, old in enumerate(kept)}
    files = {
        name: [renumbered[n] for n in rows if n in renumbered] for name, rows in part.files.items()
    }
    for name, rows in files.items():
        if not rows:
            raise DataError(
                f"every row of client '{name}' lacks a text.\n"
                "  Fill in the missing texts in its file."
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
    hub_keys = [key for key in only if _is_changed(cfg, key)]
    if hub_keys:
        raise ConfigError(
            f"data.{', data.'.join(hub_keys)}: only for data sets on the hub, but '{cfg.path}' is "
            "local.\n  Remove the setting, or set data.path to a hub data set."
        )
    train, held = search_place(place, held_out=cfg.eval_split, complete=complete)
    if held is not None and (cfg.eval_path is not None or _is_changed(cfg, "eval_fraction")):
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


def _is_changed(cfg: DataConfig, key: str) -> bool:
    return getattr(cfg, key) != DataConfig.model_fields[key].default


def _overlap(split: str, other: str) -> bool:
    """Whether two hub splits certainly share rows: the same split, or a split and its slice."""
    return split == other or split.startswith(f"{other}[") or other.startswith(f"{split}[")


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
    refuse(mistakes)
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
    answered = [names for names in CONVERSATIONS if {*names} - {"input"} <= {*columns}]
    labelled = [names for names in FORMATS if {*names, "label"} <= {*columns}]
    names = answered[0] if answered else (*max(labelled, key=len), "label") if labelled else ()
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


READERS: dict[str, Callable[[PlacedRow, DataConfig], TaskRow]] = {
    "instruct": _as_conversation,
    "classify": _as_labelled,
}
"""Task -> the function that converts a row for it."""
