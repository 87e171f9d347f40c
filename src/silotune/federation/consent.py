"""What a recipe may ask of a client: which columns and tasks, and what may be said about few rows.

Functions of plain values. `client_config` holds the settings, and calls these functions.
"""

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from silotune.core.atomic_files import make_folder, write_atomically
from silotune.core.types import Score
from silotune.data.chat_templates import TEMPLATES
from silotune.data.conversations import TEXT, parse_template
from silotune.data.reading import DataConfig
from silotune.recipes.schema import RunConfig

KEY = "split.key"
"""In a client's state: the secret that decides which rows it holds out under [privacy]."""


def against_consent(
    run: RunConfig,
    own: DataConfig,
    *,
    columns: Sequence[str] | None,
    tasks: Sequence[str] | None,
) -> Iterator[str]:
    """What a recipe asks for that a client does not allow.

    Args:
        run: The recipe.
        own: The client's own [data]; what it sets is not the recipe's to ask for.
        columns: The client's `limits.columns`.
        tasks: The client's `limits.tasks`.
    """
    if tasks is not None and run.task not in tasks:
        yield f"task = '{run.task}' is not in limits.tasks"
    mine = own.model_fields_set
    if columns is not None:
        allowed = allowed_columns(own, columns)
        for key, column in named_columns(run.data, run.task):
            if key not in mine and column not in (allowed or ()):
                yield f"data.{key} uses column '{column}', which is not in limits.columns"
    template = run.data.template
    if "template" not in mine and template not in TEMPLATES and "{" not in template:
        yield "data.template names a file; the recipe must hold the text of the template"


def allowed_columns(own: DataConfig, columns: Sequence[str] | None) -> frozenset[str] | None:
    """`limits.columns` and what the client's own [data] names; None: all columns."""
    if columns is None:
        return None
    named = {column for key, column in named_columns(own, "") if key in own.model_fields_set}
    return frozenset(columns) | named


def named_columns(data: DataConfig, task: str) -> Iterator[tuple[str, str]]:
    """The columns that [data] names, as (key, column), for a task; "" for any."""
    if task in ("instruct", ""):
        for key, template in (("prompt", data.prompt), ("completion", data.completion)):
            for _, column in parse_template(template or ""):
                if column is not None:
                    yield key, column
    if task == "text":
        yield "text", data.text or TEXT
    if task in ("classify", ""):
        label = data.label or ("label" if task else None)
        for key, column in (("text", data.text), ("text_pair", data.text_pair), ("label", label)):
            if column is not None:
                yield key, column


def split_key(state: Path) -> int:
    """The client's secret seed for its held-out rows; made the first time.

    Raises:
        DiskError: It cannot be written.
    """
    path = state / KEY
    if not path.is_file():
        make_folder(state)
        write_atomically(path, secrets.token_hex(8).encode())
    return int(path.read_text(encoding="ascii"), 16)


def is_large_enough(score: Score, min_count: int | None) -> bool:
    """Whether no number of rows in a score is small, nor the number of all others.

    A small cell beside a known total is as good as told: so a score is sent whole or not at all.
    """
    if min_count is None:
        return True
    total = score.num_examples
    cells = [count for label in score.label_counts for count in label]
    cells += [given - hit for hit, given, _ in score.label_counts]
    cells += [true - hit for hit, _, true in score.label_counts]
    if score.label_counts:
        cells.append(score.num_correct)
    rests = [total - cell for cell in cells]
    return total >= min_count and not any(0 < n < min_count for n in [*cells, *rests])
