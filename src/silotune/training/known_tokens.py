"""Rows as the tokens of a loaded model, each of which it has an embedding for.

It does not know clients or files, only the place of a row.
"""

from collections.abc import Sequence

from silotune.data.placed_conversation import place_of
from silotune.data.reading import TaskRow
from silotune.models.loading import LoadedModel
from silotune.models.vocabulary import check_tokens
from silotune.training.tasks.base import Prepared, Task


def prepare_rows(
    rows: Sequence[TaskRow], task: Task, loaded: LoadedModel, max_length: int, *, whose: str = ""
) -> Prepared:
    """Tokenize rows, and refuse tokens without an embedding before the model meets them.

    Args:
        rows: In the form that the task needs.
        task: Makes examples of them.
        loaded: The model, with its tokenizer.
        max_length: Maximum length of a row in tokens.
        whose: Begins the place of a row that does not know its own, for example "the server's ".

    Raises:
        DataError: Names the row's place.
    """
    found = task.prepare(rows, loaded.tokenizer, max_length)
    for n, example in zip(found.rows, found.examples, strict=True):
        where = place_of(rows[n]) or f"{whose}row {n + 1}"
        check_tokens([int(example.ids.max())], loaded.model, loaded.tokenizer, where)
    return found
