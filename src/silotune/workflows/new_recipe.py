"""`silotune new`: a file of rows in, a commented recipe beside it out, with every guess said.

The recipe is checked before it is written, and an existing file is never overwritten. Loads no
model; knows nothing about clients other than what the rows say.
"""

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from silotune.core.atomic_files import writing
from silotune.core.errors import ConfigError, DataError, EmptyRowError
from silotune.core.public_call import public
from silotune.core.safe_text import one_line
from silotune.core.wording import counted
from silotune.data.conversations import TEXT, conversation, list_columns
from silotune.data.files import EXAMPLES, PlacedRow, no_such_file
from silotune.data.labelled_texts import labelled_text
from silotune.data.placed_rows import refuse
from silotune.data.preferences import ANSWERS, is_bad_answer, is_pair, is_unpaired, whole
from silotune.data.reading import DataConfig, TaskRow, convert, read_parts
from silotune.federation.recipe_model import give_template
from silotune.models.base import load_tokenizer
from silotune.models.sources import is_ready
from silotune.recipes.parse import parse
from silotune.recipes.schema import RunConfig
from silotune.training.tasks import build_task
from silotune.workflows.check import Checked, check
from silotune.workflows.column_guesses import (
    Guess,
    describe_columns,
    guess_client,
    guess_unknown,
)
from silotune.workflows.preview import Sample, sample

MODELS = {
    "instruct": "smollm2-135m-instruct",
    "classify": "minilm-l6",
    "text": "smollm2-135m-instruct",
    "prefer": "smollm2-135m-instruct",
}
"""The small named sources: fetched from a package index, and fit for a laptop."""
TASKS = {
    "classify": "a text and its label",
    "text": "texts without questions, of which every word is learned",
    "prefer": "of two answers to a prompt, the chosen one is made likelier",
}
"""What a recipe says about a task that is not the default."""
NUM_SAMPLES = 3
FEWEST_ROWS = 4
"""Two clients need two rows each: one to train on and one to hold out."""


@dataclass(frozen=True)
class NewRecipe:
    """A recipe that was written for somebody's rows."""

    path: Path
    text: str
    """What the file says, comments included."""
    guesses: tuple[str, ...]
    """Everything in it that nobody has said, in words."""
    num_rows: int
    samples: tuple[Sample, ...]
    """A few train rows as the model will read them. Private: keep them out of logs and files. If
    the model's tokenizer is not on this machine, or its template refuses a row, in silotune's plain
    template, with 0 tokens."""
    warnings: tuple[str, ...] = ()
    """What `silotune check` says of the rows that is no mistake, such as two clients whose names
    differ in capitals only."""


@public
def new(rows: str | Path, *, out: str | Path | None = None) -> NewRecipe:
    """Look at a file or folder of rows, and write a commented recipe for it.

    Args:
        rows: A file, a folder with a train file, or a folder with one file per client.
        out: The recipe to create; by default beside the rows, with their name and `.toml`.

    Returns:
        The recipe, what was guessed in it, and a few rows as the model will read them.

    Raises:
        DataError: The rows cannot be read, or it cannot be guessed what they are.
        ConfigError: There already is such a recipe.
        DiskError: It cannot be written.
    """
    source = Path(rows).expanduser()
    if not str(rows).strip() or not source.exists():
        raise no_such_file(source)
    place = Path(out).expanduser() if out is not None else _beside(source)
    if place.exists():
        raise ConfigError(
            f"{place} already exists and is not overwritten.\n  Name another file with --out, or "
            "remove it."
        )
    path = f"./{rows}" if str(rows) in EXAMPLES else str(rows)
    train, _ = read_parts(DataConfig(path=path), "instruct")
    refuse(train.mistakes)
    if len(train.rows) < FEWEST_ROWS:
        raise DataError(
            f"{source}: too few rows: {len(train.rows)}; two clients need two rows each, one to "
            "train on and one to hold out.\n  Add rows."
        )
    _check_paired(train.rows, source)
    guess = _guess(train.rows, source)
    text, checked = _first_that_works(path, guess, train.rows, has_clients=bool(train.files))
    with writing(place):
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    guesses = tuple(
        line.strip().replace("# guess: ", "(guess: ") + ")"
        for line in text.splitlines()
        if "# guess: " in line
    )
    samples, warnings = _samples(checked), tuple(checked.warnings)
    return NewRecipe(place, text, guesses, len(train.rows), samples, warnings)


def _beside(source: Path) -> Path:
    whole = Path(os.path.abspath(source)) if source.name in ("", "..") else source
    return whole.with_name((whole.stem if whole.is_file() else whole.name) + ".toml")


# --- guesses --------------------------------------------------------------------------------------


def _check_paired(rows: Sequence[PlacedRow], source: Path) -> None:
    """Refuse answers that carry a label: as ordinary rows, the bad ones would be learned, too.

    Raises:
        DataError: Says how many are bad.
    """
    if not all(is_unpaired(row.columns) for row in rows):
        return
    if bad := sum(is_bad_answer(row.columns) for row in rows):
        raise DataError(
            f"{source}: every row is one answer with a label (unpaired feedback, as for KTO), and "
            f"{bad} of {counted(len(rows), 'answer')} {'is' if bad == 1 else 'are'} bad.\n"
            "  Keep the rows with good answers only, or put a good and a bad answer to a prompt "
            "into one row,\n  as chosen and rejected."
        )


def _guess(rows: Sequence[PlacedRow], source: Path) -> Guess:
    columns = describe_columns([row.columns for row in rows])
    known = _known_task(rows)
    if known is None:
        # messages are chat rows, whatever is wrong with them
        chat = [row for row in rows[:20] if {"messages", "conversations"} & row.columns.keys()]
        convert(chat, DataConfig(path=str(source)), "instruct")
        try:
            return guess_unknown(columns)
        except DataError as error:
            raise DataError(f"{source}: {error}") from None
    used = [c.name for c in columns if c.is_text and not c.is_group]
    if known == "classify":
        used.append("label")
    client, reason = guess_client(columns, used)
    return Guess(known, {}, {"by": reason}, client)


def _known_task(rows: Sequence[PlacedRow]) -> str | None:
    """The task whose usual columns the first rows have; None if they have others."""
    if rows[0].columns.keys() >= {*ANSWERS}:
        return "prefer"
    for task, read in (("instruct", conversation), ("classify", labelled_text)):
        for row in rows[:20]:
            try:
                read(row.columns, where=row.where)
            except EmptyRowError:
                continue
            except DataError:
                break
            return task
    return None


# --- the recipe -----------------------------------------------------------------------------------


def _first_that_works(
    path: str, guess: Guess, rows: Sequence[PlacedRow], *, has_clients: bool
) -> tuple[str, Checked]:
    """The text of the first recipe that passes the check, and the checked recipe.

    Raises:
        DataError: None passes; of the first that would have used all rows.
    """
    by_column = not has_clients and guess.client is not None
    found: list[DataError] = []
    for client in [guess.client] * by_column + [None]:
        for skip in (False, True):
            text = _text(path, guess, rows, client=client, skip=skip, has_clients=has_clients)
            try:
                return text, check(_run_of(text))
            except DataError as error:
                found.append(error)
    raise found[0]


def _run_of(text: str) -> RunConfig:
    return parse(tomllib.loads(text), name="new")


def _text(
    path: str,
    guess: Guess,
    rows: Sequence[PlacedRow],
    *,
    client: str | None,
    skip: bool,
    has_clients: bool,
) -> str:
    columns = dict.fromkeys(name for row in rows for name in row.columns)
    lines = [
        f"# Written by `silotune new` for {one_line(path)}: {counted(len(rows), 'row')} with the "
        "columns",
        f"# {one_line(list_columns(columns))}.",
        "# Lines marked as a guess follow from names and values alone: read them, and change what",
        "# is wrong. docs/recipe.md lists all other keys.",
        "",
        "rounds = 3",
    ]
    if guess.task in TASKS:
        lines.append(_line("task", guess.task, f"guess: {TASKS[guess.task]}"))
    lines += [
        "",
        "[model]",
        _line("name", MODELS[guess.task], _about_the_model(rows, guess)),
        "",
        "[data]",
        _line("path", path, "relative to the folder in which silotune is started"),
    ]
    for key, value in guess.keys.items():
        lines.append(_line(key, value, f"guess: {guess.reasons[key]}"))
    if skip:
        lacks = "a text or a difference" if guess.task == "prefer" else "a text"
        lines.append(_line("skip_empty", True, f"some rows lack {lacks}; they are skipped"))
    if not has_clients:
        lines += ["", "[partition]", *_partition(guess, client, len(rows))]
    return "\n".join(lines) + "\n"


def _about_the_model(rows: Sequence[PlacedRow], guess: Guess) -> str:
    if guess.task == "instruct" and not guess.keys and any(map(_has_tools, rows[:20])):
        return "its chat template writes no tools: choose a folder or hub id of a model that does"
    return "small enough for a laptop; or a folder, or a hub id"


def _has_tools(row: PlacedRow) -> bool:
    try:
        talk = conversation(row.columns, where=row.where)
    except DataError:
        return False
    return any(turn["role"] == "tool" or {"tools", "tool_calls"} & turn.keys() for turn in talk)


def _partition(guess: Guess, client: str | None, num_rows: int) -> list[str]:
    if client is not None:
        return [_line("by", client, f"guess: the client; {guess.reasons['by']}")]
    why = guess.reasons["by"]
    if guess.client is not None:
        why = f"column {list_columns([guess.client])} gives a client too few rows"
    number = max(2, min(5, num_rows // 20))
    return [
        _line("kind", "iid", f"guess: {why}, so rows are dealt out at random"),
        _line("num_clients", number, "guess: a simulation needs some clients"),
    ]


def _line(key: str, value: Any, comment: str) -> str:
    return f"{tomli_w.dumps({key: value}).strip():<31} # {one_line(comment)}"


# --- rows as text ---------------------------------------------------------------------------------


def _samples(checked: Checked) -> tuple[Sample, ...]:
    """The first train row of each of the first clients; more of them if there are few clients."""
    run, rows = checked.run, dict(sorted(checked.rows.items()))
    most = max(len(own.train) for own in rows.values())
    chosen = [(n, name) for n in range(most) for name in rows if n < len(rows[name].train)]
    tokenizer = None
    if is_ready(run.model.name):
        tokenizer = load_tokenizer(run.model)
        if run.task != "classify":
            give_template(tokenizer, run)
    task, limit = build_task(run.task, run.data.labels, run.prefer), run.train.max_length

    def shown(row: TaskRow, name: str, number: int) -> Sample:
        if tokenizer is None:
            return _plain(row, name, number)
        try:
            return sample(row, tokenizer, task, limit, client=name, number=number)
        except DataError:  # of this model's template: `silotune data` says what to do about it
            return _plain(row, name, number)

    return tuple(shown(rows[name].train[n], name, n + 1) for n, name in chosen[:NUM_SAMPLES])


def _plain(row: TaskRow, client: str, number: int) -> Sample:
    """A row in the plain template, without a tokenizer."""
    if is_pair(row):
        row = whole(row, "chosen")
    if isinstance(row, Mapping):
        texts = "".join(f"text: {row[key]}\n" for key in ("text", "text_pair") if key in row)
        return Sample(client, number, 0, (("read", f"{texts}label: "), ("learned", row["label"])))
    if row[0]["role"] == TEXT:
        return Sample(client, number, 0, (("learned", row[0]["content"]),))
    pieces: list[Any] = []
    for turn in row:
        is_answer = turn["role"] == "assistant"
        pieces.append(("read", f"### {turn['role'].capitalize()}:\n"))
        calls = [json.dumps(call, ensure_ascii=False) for call in turn.get("tool_calls", ())]
        text = "\n".join([turn["content"], *calls]).strip("\n")
        pieces.append(("learned" if is_answer else "read", text))
        pieces.append(("read", "\n\n"))
    return Sample(client, number, 0, tuple(pieces[:-1]))
