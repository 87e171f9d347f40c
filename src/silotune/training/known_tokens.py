"""Rows as the tokens of a loaded model, each of which it has an embedding for.

It does not know clients or files, only the place of a row.
"""

from collections.abc import Sequence
from dataclasses import replace

from silotune.data.placed_conversation import place_of
from silotune.data.reading import TaskRow
from silotune.models.loading import LoadedModel
from silotune.models.vocabulary import check_tokens
from silotune.training.references import with_references
from silotune.training.tasks.base import Prepared, Task


def prepare_rows(
    rows: Sequence[TaskRow],
    task: Task,
    loaded: LoadedModel,
    max_length: int,
    *,
    whose: str = "",
    batch_size: int = 8,
) -> Prepared:
    """Tokenize rows, and refuse tokens without an embedding before the model meets them.

    Pairs also get what the reference says about them, see `with_references`.

    Args:
        rows: In the form that the task needs.
        task: Makes examples of them.
        loaded: The model, with its tokenizer.
        max_length: Maximum length of a row in tokens.
        whose: Begins the place of a row that does not know its own, for example "the server's ".
        batch_size: Rows in one forward pass of the reference.

    Raises:
        DataError: Names the row's place.
    """
    found = task.prepare(rows, loaded.tokenizer, max_length)
    for n, example in zip(found.rows, found.examples, strict=True):
        where = place_of(rows[n]) or f"{whose}row {n + 1}"
        check_tokens([int(example.ids.max())], loaded.model, loaded.tokenizer, where)
    known = with_references(found.examples, task, loaded, batch_size=batch_size)
    return replace(found, examples=known)
