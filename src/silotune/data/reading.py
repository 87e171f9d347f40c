"""[data]: which rows there are, and what each becomes for its task.

Reads files and the hub, and converts row by row. Knows neither clients nor what is held out.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from silotune.core.errors import ConfigError, DataError, EmptyRowError
from silotune.core.types import Config
from silotune.data.conversations import Conversation, conversation, parse_template
from silotune.data.files import Part, PlacedRow, locate, no_such_file, read_hub, read_place
from silotune.data.labelled_texts import LabelledText, check_all_pairs, labelled_text

HUB_ONLY = ("name", "split", "eval_split", "revision")
"""Settings that only a data set on the hub understands."""


class DataConfig(Config):
    """Which rows are learned, and how they become conversations."""

    path: str = Field(min_length=1)
    """A named example (medquad_mini), a file, a folder, or a data set on the Hugging Face hub."""
    eval_path: str | None = Field(default=None, min_length=1)
    """A file or folder with the held-out rows, laid out like `path`, instead of `eval_fraction`."""
    eval_split: str | None = Field(default=None, min_length=1)
    """Split of a hub data set with the held-out rows, for instance "test", instead of
    `eval_fraction`."""
    eval_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of its rows that each client holds out for scoring, at least one row."""
    name: str | None = Field(default=None, min_length=1)
    """Configuration of a hub data set."""
    split: str = Field(default="train", min_length=1)
    """Split of a hub data set; a slice such as "train[:500]" is fine."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit or tag of a hub data set; a full commit makes a run repeatable."""
    prompt: str | None = Field(default=None, min_length=1)
    """Text with {column} holes that makes the user's turn, for rows in no known format."""
    completion: str | None = Field(default=None, min_length=1)
    """Text with {column} holes that makes the answer; goes with `prompt`."""
    system: str | None = Field(default=None, min_length=1)
    """System text in front of every conversation that has none."""
    template: str = Field(default="auto", min_length=1)
    """How a conversation becomes text, in training, scoring and answers alike. auto: the model's
    own chat template, or plain where it has none. three-block: "### Instruction:" with the system
    text, "### Input:" with the question, "### Response:". alpaca, vicuna and flowertune as these
    write it. Or a file with a Jinja chat template of your own, which the run keeps."""
    max_rows: int | None = Field(default=None, ge=1)
    """At most so many training rows per client, drawn with the seed."""
    max_eval_rows: int | None = Field(default=None, ge=1)
    """At most so many held-out rows per client, drawn with the seed."""
    label: str | None = Field(default=None, min_length=1)
    """A column whose mix at each client the report shows, for instance the kind of question. With
    task = "classify" the column of the classes; "label" when absent."""
    labels: tuple[str, ...] | None = Field(default=None, min_length=2)
    """classify: all classes, in the order of the model's outputs. Absent: those of all rows,
    sorted; real clients, whose rows no one else can read, need them here."""
    text: str | None = Field(default=None, min_length=1)
    """classify: the column of the text; absent: found by the usual names (text, sentence, ...)."""
    text_pair: str | None = Field(default=None, min_length=1)
    """classify: the column of the second text, for pairs; goes with `text`."""
    skip_empty: bool = False
    """Leave out rows that lack a question, an answer or a text, and say how many, instead of
    stopping."""
    split_seed: int | None = Field(default=None, ge=0)
    """Seed of the cut into clients and of the held-out rows; the run's seed when absent. Runs with
    other seeds on the same held-out rows need it."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> "DataConfig":
        mistakes: list[str] = []
        # Compared with the default: a resolved recipe names every field and must stay readable.
        given = [key for key in ("eval_path", "eval_split") if getattr(self, key) is not None]
        given += ["eval_fraction"] * _is_moved(self, "eval_fraction")
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
        holes: dict[str, bool] = {}
        for key, template in (("prompt", self.prompt), ("completion", self.completion)):
            try:
                holes[key] = any(column for _, column in parse_template(template or ""))
            except ValueError as error:
                mistakes.append(f"{key} {error}")
        if self.text_pair is not None and self.text is None:
            mistakes.append("text_pair goes with text; set both")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            mistakes.append("labels names a label twice")
        if self.completion is not None and holes.get("completion") is False:
            mistakes.append("completion has no {column}, so every row would teach the same answer")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self


TaskRow = Any
"""A row as its task wants it, and only the task looks into it: a Conversation to answer, or a
LabelledText to classify."""


def read_parts(cfg: DataConfig, task: str) -> tuple[Part, Part | None]:
    """The train rows, and the held-out rows where these have a place of their own.

    Raises:
        DataError: Files or the hub cannot be read.
        ConfigError: The settings do not fit where the rows are.
    """
    train, held = _read_both(cfg)
    return without_empty(train, cfg, task), held and without_empty(held, cfg, task)


def without_empty(part: Part, cfg: DataConfig, task: str) -> Part:
    """With data.skip_empty: a part without the rows that lack a text.

    Raises:
        DataError: None is left.
    """
    if not cfg.skip_empty:
        return part
    kept = [n for n, row in enumerate(part.rows) if not _is_empty(row, cfg, task)]
    if not kept:
        raise DataError(f"'{cfg.path}' has no row with all texts.\n  Fill some.")
    at = {old: new for new, old in enumerate(kept)}
    files = {name: [at[n] for n in rows if n in at] for name, rows in part.files.items()}
    for name, rows in files.items():
        if not rows:
            raise DataError(f"client '{name}' has no row with all texts.\n  Fill some of its file.")
    return Part([part.rows[n] for n in kept], files, len(part.rows) - len(kept))


def _is_empty(row: PlacedRow, cfg: DataConfig, task: str) -> bool:
    try:
        READERS[task](row, cfg)
    except EmptyRowError:
        return True
    except DataError:
        return False  # another mistake, which has to be told
    return False


def _read_both(cfg: DataConfig) -> tuple[Part, Part | None]:
    place = locate(cfg.path)
    if place is None:
        return _read_hub_parts(cfg)
    foreign = [key for key in HUB_ONLY if _is_moved(cfg, key)]
    if foreign:
        raise ConfigError(
            f"data.{', data.'.join(foreign)}: only for data sets on the hub, but "
            f"'{cfg.path}' is here.\n  Remove the setting, or name a hub data set."
        )
    train, held = read_place(place)
    if held is not None and (cfg.eval_path is not None or _is_moved(cfg, "eval_fraction")):
        key = "eval_path" if cfg.eval_path is not None else "eval_fraction"
        raise ConfigError(
            f"data.{key}: '{cfg.path}' already holds its held-out rows in an eval file.\n"
            f"  Remove data.{key}, or set data.path to the train file alone."
        )
    if cfg.eval_path is None:
        return train, held
    return train, _read_held_out(Path(cfg.eval_path).expanduser(), train)


def read_all(path: str) -> list[PlacedRow]:
    """All rows of a file or folder, train and held-out alike.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise no_such_file(place)
    train, held = read_place(place)
    return [*train.rows, *(held.rows if held else [])]


def _read_hub_parts(cfg: DataConfig) -> tuple[Part, Part | None]:
    def read(split: str) -> Part:
        return Part(read_hub(cfg.path, name=cfg.name, split=split, revision=cfg.revision))

    train = read(cfg.split)
    if cfg.eval_split is not None:
        return train, read(cfg.eval_split)
    if cfg.eval_path is not None:
        return train, _read_held_out(Path(cfg.eval_path).expanduser(), train)
    return train, None


def _is_moved(cfg: DataConfig, key: str) -> bool:
    return getattr(cfg, key) != DataConfig.model_fields[key].default


def _overlap(split: str, other: str) -> bool:
    """Whether two splits of the hub surely share rows: the same one, or the whole and a slice."""
    return split == other or split.startswith(f"{other}[") or other.startswith(f"{split}[")


def _read_held_out(place: Path, train: Part) -> Part:
    if not place.exists():
        raise no_such_file(place)
    held, beside = read_place(place)
    if beside is not None or bool(held.files) != bool(train.files):
        layout = "a folder with one file per client" if train.files else "one file"
        raise ConfigError(
            f"data.eval_path: '{place}' is not laid out like data.path.\n  Give {layout}."
        )
    return held


# --- converting ---------------------------------------------------------------------------------


def convert_parts(
    train: Part, held: Part | None, cfg: DataConfig, task: str
) -> tuple[list[TaskRow], list[TaskRow] | None]:
    """What both parts' rows become; the mistakes of both are told together.

    Raises:
        DataError: Names the first rows that cannot be used.
    """
    rows = [*train.rows, *(held.rows if held else [])]
    talks = convert(rows, cfg, task)
    return talks[: len(train.rows)], talks[len(train.rows) :] if held else None


def convert(rows: Sequence[PlacedRow], cfg: DataConfig, task: str) -> list[TaskRow]:
    """What rows become for a task.

    Raises:
        DataError: Names the first rows that cannot be used, and how to mend them.
    """
    read = READERS[task]
    found: list[TaskRow] = []
    problems: list[str] = []
    for row in rows:
        try:
            found.append(read(row, cfg))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(_join_problems(problems))
    if task == "classify":
        check_all_pairs(found, [row.where for row in rows])
    return found


def _as_conversation(row: PlacedRow, cfg: DataConfig) -> Conversation:
    return conversation(
        row.columns,
        where=row.where,
        prompt=cfg.prompt,
        completion=cfg.completion,
        system=cfg.system,
    )


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
"""What a row becomes, by task."""


def _join_problems(problems: Sequence[str], shown: int = 5) -> str:
    """The first lines of the first problems, then each way to mend them once."""
    parts = [problem.partition("\n") for problem in problems[:shown]]
    heads = [head for head, _, _ in parts]
    if len(problems) > shown:
        heads.append(f"and {len(problems) - shown} more rows")
    return "\n".join([*heads, *dict.fromkeys(mend for _, _, mend in parts)])
