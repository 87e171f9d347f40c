"""A client's files -> checked, split rows.

Every row is read and converted before a model is loaded, so that a mistake in the last line of a
file costs seconds. Knows clients and the held-out part; not how files are read, tokens or models.
Messages name file, line and column, never a value of a row; client names and labels, which come
from columns, are the exceptions.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from silotune.errors import ConfigError, DataError
from silotune.files import Part, PlacedRow, locate, no_such_file, read_hub, read_place
from silotune.labelled import LabelledText, check_all_pairs, labelled_text
from silotune.partition import PartitionConfig, Shares, by_column, dirichlet, iid, names_in_column
from silotune.rows import (
    Conversation,
    conversation,
    did_you_mean,
    is_missing,
    list_columns,
    parse_template,
)
from silotune.seeds import generator
from silotune.types import Config

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
    template: Literal["auto", "plain", "three-block"] = "auto"
    """How a conversation becomes text, in training, scoring and answers alike. auto: the model's
    own chat template, or plain where it has none. three-block: "### Instruction:" with the system
    text, "### Input:" with the question, "### Response:"."""
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


@dataclass(frozen=True)
class ClientRows:
    """One client's rows, in file order. Neither part is empty."""

    name: str
    train: tuple[TaskRow, ...]
    evaluation: tuple[TaskRow, ...]
    """Held out: scored, never trained on."""
    labels: tuple[str, ...] = ()
    """What data.label, or else partition.label, says of each train row; empty without one."""


def load_clients(
    cfg: DataConfig,
    partition: PartitionConfig | None,
    *,
    seed: int,
    task: str = "instruct",
    server_fraction: float = 0.0,
) -> dict[str, ClientRows]:
    """Read the rows of all clients of a simulation, check them, and hold out each client's part.

    A client's split depends on the seed, its name and its own rows alone: a new client changes no
    other.

    Args:
        cfg: Where the rows are and what they look like.
        partition: How one data set becomes clients; absent when there is one file per client.
        seed: The run's seed.
        task: What rows become: conversations for "instruct", labelled texts for "classify".
        server_fraction: Share of the train rows that the server owns, see `load_server_rows`. They
            go to no client.

    Returns:
        The clients, sorted by name.

    Raises:
        DataError: Files, rows or columns cannot be used.
        ConfigError: The settings do not fit the layout of the files.
    """
    seed = cfg.split_seed if cfg.split_seed is not None else seed
    train, held = _read_parts(cfg)
    train, _ = _set_aside(train, server_fraction, cfg, seed=seed)
    talks, held_talks = _convert_parts(train, held, cfg, task)
    cut = partition is not None and (partition.by is not None or partition.kind is not None)
    if train.files and cut:
        raise ConfigError(
            f"'{cfg.path}' holds one file per client, so [partition] has nothing to cut.\n"
            "  Remove [partition], or set data.path to one file."
        )
    if train.files:
        shares, held_shares = train.files, held.files if held else None
    elif partition is not None and cut:
        shares, held_shares = _cut(train, held, partition, seed=seed)
    else:
        raise _partition_is_needed(cfg, train.rows)
    if server_fraction > 0 and partition is not None and partition.by is not None:
        _check_nobody_lost(cfg, partition, shares)
    labels = _labels(talks, train, cfg, partition)
    return _assemble(talks, shares, held_talks, held_shares, cfg, seed=seed, labels=labels)


def _check_nobody_lost(cfg: DataConfig, partition: PartitionConfig, shares: Shares) -> None:
    """A small client's rows may all have become the server's, which would not be told otherwise."""
    train, _ = _read_parts(cfg)
    assert partition.by is not None
    everyone = _only(by_column(*_column(train, partition.by, "partition.by")), partition.only)
    if lost := sorted(everyone.keys() - shares.keys()):
        raise DataError(
            f"server.data_fraction leaves client '{lost[0]}' no row ({len(lost)} such clients).\n"
            "  Choose a smaller share, or give the server its own rows: server.data_path."
        )


def _labels(
    talks: Sequence[TaskRow], train: Part, cfg: DataConfig, partition: PartitionConfig | None
) -> list[str]:
    if talks and isinstance(talks[0], dict):
        return [row["label"] for row in talks if isinstance(row, dict)]
    if cfg.label is not None:
        return names_in_column(*_column(train, cfg.label, "data.label"))
    if partition is not None and partition.label is not None:
        return names_in_column(*_column(train, partition.label, "partition.label"))
    return []


def load_server_rows(
    cfg: DataConfig, *, seed: int, task: str, fraction: float, path: str | None
) -> tuple[TaskRow, ...]:
    """Read the rows that the server owns and trains on itself. No client has them.

    Args:
        cfg: Where the rows are and what they look like.
        seed: The run's seed.
        task: As in `load_clients`.
        fraction: Share of the train rows, drawn with the seed.
        path: The server's own file, of the same columns, instead.

    Raises:
        DataError: Files, rows or columns cannot be used, or the share comes to no row.
        ConfigError: A share is asked of data that lies at the clients.
    """
    seed = cfg.split_seed if cfg.split_seed is not None else seed
    if path is not None:
        place = Path(path).expanduser()
        if not place.exists():
            raise no_such_file(place)
        train, held = read_place(place)
        rows = [*train.rows, *(held.rows if held else [])]
    else:
        rows = _set_aside(_read_parts(cfg)[0], fraction, cfg, seed=seed)[1]
    return tuple(_convert(rows, cfg, task))


def _set_aside(
    train: Part, fraction: float, cfg: DataConfig, *, seed: int
) -> tuple[Part, list[PlacedRow]]:
    """The train rows without the server's, and the server's: drawn, as files are often sorted."""
    if fraction == 0:
        return train, []
    if train.files:
        raise ConfigError(
            f"server.data_fraction: '{cfg.path}' holds one file per client, and these are theirs.\n"
            "  Give the server its own rows: server.data_path."
        )
    size = round(fraction * len(train.rows))
    if not 0 < size < len(train.rows):
        raise DataError(
            f"server.data_fraction = {fraction:g} of {len(train.rows)} rows leaves the server or "
            "the clients without any.\n  Choose another share, or bring more rows."
        )
    everything = list(range(len(train.rows)))
    drawn, rest = _draw(everything, size, generator(seed, "server-rows"))
    return Part([train.rows[n] for n in rest]), [train.rows[n] for n in drawn]


def load_client(cfg: DataConfig, name: str, *, seed: int, task: str = "instruct") -> ClientRows:
    """Read the rows of one real client, to which the whole data set belongs.

    The held-out part is drawn as in `load_clients`, so a real client gets the split of its
    simulation.

    Raises:
        DataError: Files, rows or columns cannot be used.
        ConfigError: The settings do not fit the layout of the files.
    """
    seed = cfg.split_seed if cfg.split_seed is not None else seed
    train, held = _read_parts(cfg)
    talks, held_talks = _convert_parts(train, held, cfg, task)
    shares = {name: list(range(len(talks)))}
    held_shares = None if held_talks is None else {name: list(range(len(held_talks)))}
    labels = _labels(talks, train, cfg, None)
    return _assemble(talks, shares, held_talks, held_shares, cfg, seed=seed, labels=labels)[name]


def fingerprint(clients: Mapping[str, ClientRows]) -> str:
    """SHA-256 over all rows in order, as 64 hex digits: what a run really saw."""
    digest = hashlib.sha256()
    for name in sorted(clients):
        rows = clients[name]
        digest.update(json.dumps([name, rows.train, rows.evaluation], sort_keys=True).encode())
    return digest.hexdigest()


# --- reading --------------------------------------------------------------------------------------


def _read_parts(cfg: DataConfig) -> tuple[Part, Part | None]:
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


# --- converting and cutting -----------------------------------------------------------------------


def _convert_parts(
    train: Part, held: Part | None, cfg: DataConfig, task: str
) -> tuple[list[TaskRow], list[TaskRow] | None]:
    rows = [*train.rows, *(held.rows if held else [])]
    talks = _convert(rows, cfg, task)
    return talks[: len(train.rows)], talks[len(train.rows) :] if held else None


def _convert(rows: Sequence[PlacedRow], cfg: DataConfig, task: str) -> list[TaskRow]:
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


def _cut(
    train: Part, held: Part | None, partition: PartitionConfig, *, seed: int
) -> tuple[Shares, Shares | None]:
    if partition.by is not None:
        shares = by_column(*_column(train, partition.by, "partition.by"))
        held_shares = by_column(*_column(held, partition.by, "partition.by")) if held else None
        return (
            _only(shares, partition.only),
            None if held_shares is None else _only(held_shares, partition.only),
        )
    count = partition.num_clients or 1
    at_least = 1 if held else 2  # each client needs a row to learn and one to hold out
    if partition.label is None or partition.alpha is None:
        return (
            iid(len(train.rows), count, generator(seed, "partition"), at_least=at_least),
            iid(len(held.rows), count, generator(seed, "partition", "held-out")) if held else None,
        )
    labels = names_in_column(*_column(train, partition.label, "partition.label"))
    if held is None:
        gen = generator(seed, "partition")
        return dirichlet(labels, count, partition.alpha, gen, at_least=at_least), None
    held_labels = names_in_column(*_column(held, partition.label, "partition.label"))
    # One generator name for both: a client is to be scored on the mix of labels that it learns.
    return (
        dirichlet(labels, count, partition.alpha, generator(seed, "partition"), known=held_labels),
        dirichlet(held_labels, count, partition.alpha, generator(seed, "partition"), known=labels),
    )


def _only(shares: Shares, names: Sequence[str] | None) -> Shares:
    if names is None:
        return shares
    for name in names:
        if name not in shares:
            raise DataError(
                f"partition.only: there are no rows of '{name}'.{did_you_mean(name, shares)}\n"
                f"  The clients are {list_columns(shares)}."
            )
    return {name: rows for name, rows in shares.items() if name in names}


def _column(part: Part, column: str, setting: str) -> tuple[Sequence[object], str, list[str]]:
    columns = dict.fromkeys(name for row in part.rows for name in row.columns)
    if column not in columns:
        raise DataError(
            f"{setting} = '{column}': {part.rows[0].where} and the rows after it have no such "
            f"column.{did_you_mean(column, columns)}\n  The columns are {list_columns(columns)}."
        )
    values = [row.columns.get(column) for row in part.rows]
    return values, column, [row.where for row in part.rows]


def _partition_is_needed(cfg: DataConfig, rows: Sequence[PlacedRow]) -> DataError:
    fitting = _columns_for_clients(rows)
    columns = f" (of these: {list_columns(fitting)})" if fitting else ""
    return DataError(
        f"'{cfg.path}' is one data set, and nothing says how it becomes clients.\n"
        f'  Set [partition] by = "a column"{columns}, or kind = "iid" with num_clients,\n'
        "  or set data.path to a folder with one file per client."
    )


def _columns_for_clients(rows: Sequence[PlacedRow]) -> list[str]:
    """Columns with 2 to 100 values and at least two rows a value, as each client needs."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for column, value in row.columns.items():
            values.setdefault(column, set()).add("" if is_missing(value) else str(value).strip())
    most = min(100, len(rows) // 2)
    return [c for c, seen in values.items() if 2 <= len(seen) <= most and "" not in seen]


def _assemble(
    talks: Sequence[TaskRow],
    shares: Shares,
    held_talks: Sequence[TaskRow] | None,
    held_shares: Shares | None,
    cfg: DataConfig,
    *,
    seed: int,
    labels: Sequence[str],
) -> dict[str, ClientRows]:
    if held_shares is not None:
        _check_same_clients(shares, held_shares)
    clients: dict[str, ClientRows] = {}
    for name in sorted(shares):
        own = shares[name]
        if held_talks is None or held_shares is None:
            own, aside = _hold_out(own, name, cfg.eval_fraction, generator(seed, "held-out", name))
            held = [talks[n] for n in aside]
        else:
            held = [held_talks[n] for n in held_shares[name]]
        if cfg.max_rows is not None:
            own, _ = _draw(own, cfg.max_rows, generator(seed, "max-rows", name))
        if cfg.max_eval_rows is not None:
            gen = generator(seed, "max-eval-rows", name)
            kept, _ = _draw(list(range(len(held))), cfg.max_eval_rows, gen)
            held = [held[n] for n in kept]
        clients[name] = ClientRows(
            name,
            tuple(talks[n] for n in own),
            tuple(held),
            tuple(labels[n] for n in own) if labels else (),
        )
    return clients


def _check_same_clients(shares: Shares, held_shares: Shares) -> None:
    only_train = sorted(shares.keys() - held_shares.keys())
    only_held = sorted(held_shares.keys() - shares.keys())
    for names, has, lacks in (
        (only_train, "train", "held-out"),
        (only_held, "held-out", "train"),
    ):
        if names:
            more = f" ({len(names)} clients lack them)" if len(names) > 1 else ""
            raise DataError(
                f"client '{names[0]}' has {has} rows, but no {lacks} rows{more}.\n"
                "  Give each client both, or remove data.eval_path so that each holds out its own."
            )


def _hold_out(
    own: list[int], name: str, fraction: float, gen: torch.Generator
) -> tuple[list[int], list[int]]:
    if len(own) < 2:
        raise DataError(
            f"client '{name}' has {len(own)} row, but needs at least 2: one to learn, one to hold "
            "out.\n  Bring more rows for it, cut into fewer clients, or give data.eval_path."
        )
    # at least one, and never all: round(0.9 * 2) is 2
    size = min(len(own) - 1, max(1, round(fraction * len(own))))
    aside, rest = _draw(own, size, gen)
    return rest, aside


def _draw(rows: list[int], size: int, gen: torch.Generator) -> tuple[list[int], list[int]]:
    """Draw `size` rows, or all if there are fewer. Both parts keep the order of the file."""
    order = torch.randperm(len(rows), generator=gen).tolist()
    chosen = set(order[:size])
    drawn = [row for n, row in enumerate(rows) if n in chosen]
    return drawn, [row for n, row in enumerate(rows) if n not in chosen]
