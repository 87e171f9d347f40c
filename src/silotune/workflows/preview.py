"""Preview a recipe's rows as a model reads them: lengths, truncation, duplicates.

This loads the tokenizer, and examines the base's files without reading its weights. Numbers, client
names and labels may be shown to others. Samples contain rows and are meant only for the machine
that holds these rows.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from silotune.core.errors import ConfigError
from silotune.core.public_call import public
from silotune.core.wording import counted, did_you_mean
from silotune.data.client_rows import ClientRows
from silotune.data.conversations import list_columns
from silotune.data.duplicates import Duplicates, find_duplicates
from silotune.data.files import locate
from silotune.data.partition import PartitionConfig
from silotune.data.preferences import ANSWERS, is_pair, talks_of
from silotune.data.reading import TaskRow
from silotune.federation.client_config import is_client_folder
from silotune.federation.prepared_rows import cut_note
from silotune.federation.recipe_model import give_template, warn_of_template
from silotune.federation.server_scores import server_test_rows
from silotune.federation.server_work import server_rows
from silotune.models.base import ModelConfig, inspect_base, quiet_libraries
from silotune.recipes.preferences import ASKED
from silotune.recipes.schema import RunConfig
from silotune.training.tasks import build_task
from silotune.training.tasks.base import Task
from silotune.training.tasks.instruct import written
from silotune.workflows.check import Checked, check
from silotune.workflows.data_overview import quantiles
from silotune.workflows.in_memory import from_memory

NO_LIMIT = sys.maxsize
"""For `Task.prepare`: nothing is truncated, so that one pass gives both lengths and masks."""


@dataclass(frozen=True)
class Lengths:
    """The lengths of some rows in tokens."""

    tokens: Mapping[str, float]
    """Quantiles of the untruncated lengths, named as in `data_overview.QUANTILES`; of a pair, the
    longer answer with its prompt counts."""
    num_cut: int
    """Rows longer than `train.max_length`: their end is missing."""
    num_dropped: int
    """Rows without any token left to learn: they are not used."""
    trained_share: float | None
    """Share of tokens that count in the loss, over all used rows after truncation. None with the
    task classify, whose loss is one number per row."""


@dataclass(frozen=True)
class ClientPreview:
    """One client's rows in numbers."""

    num_train: int
    num_eval: int
    labels: Mapping[str, int]
    """Number of train rows of each label, most common first; empty without a label column."""
    train: Lengths
    held_out: Lengths
    duplicates: Duplicates
    num_validation: int = 0
    validation: Lengths | None = None
    """None without validation rows."""


Kind = Literal["read", "learned", "rejected", "cut"]
"""What happens to a piece of text: only read, learned, made less likely than a pair's other answer,
or cut off at `train.max_length`."""


@dataclass(frozen=True)
class Sample:
    """One train row as text. Private: keep it out of logs and files."""

    client: str
    row: int
    """Its number among the client's train rows, from 1."""
    num_tokens: int
    """Before truncation."""
    pieces: tuple[tuple[Kind, str], ...]
    """The full text in order; with the task classify, text, pair and label with their names; with
    prefer, both answers behind their prompt."""


@dataclass(frozen=True)
class Preview:
    """A recipe's rows before any training."""

    run: RunConfig
    """The resolved recipe."""
    split: str
    """How the rows were split into clients, in words."""
    clients: Mapping[str, ClientPreview]
    """Sorted by name."""
    num_server: int
    """Number of the server's own train rows."""
    warnings: Sequence[str]
    """What is allowed but may be surprising."""
    samples: Sequence[Sample]
    num_server_test: int = 0
    """Number of rows in the server's test set."""

    def numbers(self) -> dict[str, Any]:
        """Everything except the samples and the recipe, ready for JSON."""
        return {
            "split": self.split,
            "max_length": self.run.train.max_length,
            "num_server": self.num_server,
            "num_server_test": self.num_server_test,
            "clients": {name: asdict(own) for name, own in self.clients.items()},
            "warnings": list(self.warnings),
        }


@public
def preview(
    recipe: str | Path | RunConfig,
    overrides: Sequence[str] = (),
    *,
    num_samples: Annotated[int, Field(ge=0)] = 0,
    client: str | None = None,
    rows: Any = None,
    model: Any = None,
) -> Preview:
    """Check a recipe and show its rows as the model reads them, without loading the model.

    Damaged, incomplete or unsuitable files of the base (or of a teacher) are found here too.

    Args:
        recipe: A shipped recipe's name, a TOML file, or a recipe.
        overrides: Keys to change, such as "train.max_length=256".
        num_samples: Number of train rows to show as text, starting with the first.
        client: The client whose rows to show; by default the first by name.
        rows: Rows in memory, instead of data.path: a list of dicts, a data set, a data frame, an
            iterator, or {client: rows}. They are written to a folder that is removed in the end.
        model: A transformers model and its tokenizer in memory, instead of model.name. It is saved
            like the rows and not changed.

    Returns:
        Numbers of rows and tokens by client, duplicates, and the rows asked for; its `numbers()`
        are ready for JSON and hold no row.

    Raises:
        ConfigError, ModelError, DataError: What is wrong, where, and how to fix it.
    """
    with from_memory(rows, model, overrides) as changed:
        return _preview(check(recipe, changed), num_samples, client)


def _preview(checked: Checked, num_samples: int, client: str | None) -> Preview:
    run, rows = checked.run, dict(sorted(checked.rows.items()))
    chosen = _chosen(client, rows)
    tokenizer, notes = _inspect(run)
    warnings = [*checked.warnings, *notes]
    if run.task != "classify" and give_template(tokenizer, run) and run.task in ASKED:
        warnings.append(f"{run.model.name} has no chat template: the plain one is used")
    task, limit, own = (
        build_task(run.task, run.data.labels, run.prefer),
        run.train.max_length,
        server_rows(run),
    )
    with quiet_libraries():  # the numbers already show rows that exceed the model's own limit
        clients = describe_rows(rows, tokenizer, task, limit, server=own)
        samples = [
            sample(row, tokenizer, task, limit, client=chosen, number=n)
            for n, row in enumerate(rows[chosen].train[:num_samples], start=1)
        ]
        warnings += [*data_warnings(clients, limit), *warn_of_template(tokenizer, run, rows, own)]
    split, num_test = describe_partition(run), len(server_test_rows(run))
    return Preview(run, split, clients, len(own), warnings, samples, num_test)


def _inspect(run: RunConfig) -> tuple[Any, list[str]]:
    """The base's tokenizer, and notes on base and teacher, whose weights are not read."""
    labels = (run.data.labels or ()) if run.task == "classify" else ()
    tokenizer, found = inspect_base(run.model, labels)
    notes = list(found)
    if run.distill.teacher is not None:
        teacher = ModelConfig(name=run.distill.teacher)
        notes += inspect_base(teacher, labels, key="distill.teacher")[1]
    return tokenizer, notes


def _chosen(client: str | None, rows: Mapping[str, ClientRows]) -> str:
    if client is None:
        return next(iter(rows))
    if client not in rows:
        raise ConfigError(
            f"there is no client '{client}'.{did_you_mean(client, rows)}\n"
            f"  The clients are {list_columns(rows)}."
        )
    return client


def describe_rows(
    rows: Mapping[str, ClientRows],
    tokenizer: Any,
    task: Task,
    max_length: int,
    *,
    server: Sequence[TaskRow] = (),
) -> dict[str, ClientPreview]:
    """Describe all clients' rows in numbers. Every row is tokenised once.

    Args:
        rows: All clients' rows, as far as this machine may read them.
        tokenizer: The base's tokenizer, with its chat template.
        task: The recipe's task.
        max_length: Maximum length of a row, in tokens.
        server: The server's own train rows.
    """
    duplicates = find_duplicates(rows, server)
    return {
        name: ClientPreview(
            num_train=len(own.train),
            num_validation=len(own.validation),
            num_eval=len(own.evaluation),
            labels=dict(Counter(own.labels).most_common()),
            train=measure(own.train, tokenizer, task, max_length),
            validation=measure(own.validation, tokenizer, task, max_length)
            if own.validation
            else None,
            held_out=measure(own.evaluation, tokenizer, task, max_length),
            duplicates=duplicates[name],
        )
        for name, own in sorted(rows.items())
    }


# --- lengths --------------------------------------------------------------------------------------


def measure(rows: Sequence[TaskRow], tokenizer: Any, task: Task, max_length: int) -> Lengths:
    """Lengths of rows, and what `task.prepare` keeps at `max_length`. Needs at least one row."""
    if task.labels:
        lengths = task.num_tokens(rows, tokenizer)
        num_cut = sum(length > max_length for length in lengths)
        return Lengths(quantiles(lengths), num_cut, 0, None)
    if task.reference is not None:
        lengths, kept = task.num_tokens(rows, tokenizer), task.prepare(rows, tokenizer, max_length)
        num_read = sum(e.trained.numel() for e in kept.examples)
        share = sum(int(e.trained.sum()) for e in kept.examples) / max(1, num_read)
        return Lengths(quantiles(lengths), kept.num_cut, kept.num_dropped, share)
    full = task.prepare(rows, tokenizer, NO_LIMIT)
    lengths = [e.ids.numel() for e in full.examples]
    if full.num_dropped:  # rows without any token to learn; a template can cause this
        kept = set(full.rows)
        lost = [row for n, row in enumerate(rows) if n not in kept]
        lengths += task.num_tokens(lost, tokenizer)
    used = [mask for e in full.examples if (mask := e.trained[:max_length]).any()]
    num_read = sum(mask.numel() for mask in used)
    num_trained = sum(int(mask.sum()) for mask in used)
    return Lengths(
        tokens=quantiles(lengths),
        num_cut=sum(length > max_length for length in lengths),
        num_dropped=len(rows) - len(used),
        trained_share=num_trained / num_read if used else 0.0,
    )


# --- rows as text ---------------------------------------------------------------------------------


def sample(
    row: TaskRow, tokenizer: Any, task: Task, max_length: int, *, client: str, number: int
) -> Sample:
    """One row as the model reads it, and which parts of it are learned.

    Args:
        row: One of `client`'s train rows.
        tokenizer: The base's tokenizer, with its chat template.
        task: The recipe's task.
        max_length: Maximum length of a row, in tokens.
        client: The client that holds the row.
        number: Its number among the client's train rows, from 1.
    """
    if task.labels:
        (num_tokens,) = task.num_tokens([row], tokenizer)
        names = {"text": "text", "text_pair": "pair"}
        texts = [f"{name}: {row[part]}\n" for part, name in names.items() if part in row]
        read = "".join(texts) + "label: "
        return Sample(client, number, num_tokens, (("read", read), ("learned", row["label"])))
    how = task.written or written  # a pair is two conversations
    sequences = how(talks_of(row), tokenizer)
    pieces: list[tuple[Kind, str]] = []
    for one, name in zip(sequences, ANSWERS, strict=False):
        if is_pair(row):
            pieces.append(("read", f"{name}:\n"))
        end = one.starts[max_length] if len(one.ids) > max_length else len(one.text)
        trained = "rejected" if is_pair(row) and name == "rejected" else "learned"
        pieces += _pieces(one.text, one.spans, end, trained)
    return Sample(client, number, max(len(one.ids) for one in sequences), tuple(pieces))


def _pieces(
    text: str, spans: Sequence[tuple[int, int]], end: int, trained: Kind
) -> tuple[tuple[Kind, str], ...]:
    """Split a text at the edges of its trained spans, and at `end`, where reading stops."""

    def kind(at: int) -> Kind:
        if at >= end:
            return "cut"
        return trained if any(start <= at < stop for start, stop in spans) else "read"

    edges = sorted({0, end, len(text), *(edge for span in spans for edge in span if edge < end)})
    return tuple((kind(a), text[a:b]) for a, b in pairwise(edges))


# --- words ----------------------------------------------------------------------------------------


def describe_partition(run: RunConfig) -> str:
    """How the rows of a recipe are split into clients, in words."""
    split = run.partition or PartitionConfig()
    if split.by is not None:
        only = "" if split.only is None else f", of which only {list_columns(split.only)}"
        return f"one client for each value of column '{split.by}'{only}"
    if split.kind is not None:
        seed = run.data.split_seed if run.data.split_seed is not None else run.seed
        words = {
            "iid": "parts of equal size, drawn at random (iid)",
            "dirichlet": f"labels of column '{split.label}' distributed unevenly (dirichlet, "
            f"alpha {split.alpha})",
            "length": "parts of equal size, from short rows to long ones (length)",
            "cluster": "rows grouped by topic (cluster)",
            "flwr-datasets": f"split by {split.partitioner} (flwr-datasets)",
        }
        return f"{words[split.kind]}, seed {seed}"
    place = locate(run.data.path)
    if place is not None and is_client_folder(place):
        return "one configuration file for each client"
    return "one file for each client"


def data_warnings(clients: Mapping[str, ClientPreview], max_length: int) -> list[str]:
    """What spoils a run or its scores: training on held-out rows, rows without answers."""
    warnings: list[str] = []
    if leaks := name_counts(clients, lambda own: own.duplicates.num_leaked):
        warnings.append(
            f"some held-out rows are also train rows, which inflates scores: {leaks}; "
            "remove them from one of the parts"
        )
    for name, own in clients.items():
        parts = [("train", own.train, own.num_train), ("held-out", own.held_out, own.num_eval)]
        if own.validation is not None:
            parts.insert(1, ("validation", own.validation, own.num_validation))
        dropped = sum(lengths.num_dropped for _, lengths, _ in parts)
        num_cut = sum(lengths.num_cut for _, lengths, _ in parts)
        note = cut_note(name, num_cut=num_cut, num_dropped=dropped)
        if note is not None and dropped:
            warnings.append(note)
        for part, lengths, size in parts:
            if lengths.num_dropped == size:
                warnings.append(
                    f"client '{name}': no {part} row has an answer within {max_length} tokens, so "
                    "a run will refuse to start; raise train.max_length or shorten the prompts"
                )
    return warnings


def name_counts(
    clients: Mapping[str, ClientPreview], count: Callable[[ClientPreview], int], most: int = 5
) -> str:
    """'north 3, south 1': the clients with the largest counts; empty if all counts are 0."""
    counts = sorted((-count(own), name) for name, own in clients.items() if count(own))
    rest = len(counts) - most
    more = f" and {counted(rest, 'more client')}" if rest > 0 else ""
    return ", ".join(f"{name} {-n}" for n, name in counts[:most]) + more
