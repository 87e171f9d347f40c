"""The held-out rows of a comparison: prepared once, and scored row by row for every arm."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from silotune.core.errors import DataError
from silotune.data.client_rows import ClientRows
from silotune.data.conversations import Conversation
from silotune.federation.metrics import Row
from silotune.models.loading import LoadedModel
from silotune.recipes.schema import RunConfig
from silotune.training.generate import answers
from silotune.training.known_tokens import prepare_rows
from silotune.training.scoring import score_each
from silotune.training.tasks.base import Example, Task
from silotune.workflows.compare.statistics import Scores
from silotune.workflows.evaluate.text_scores import judge, question_of


@dataclass(frozen=True)
class HeldOut:
    """A client's held-out rows."""

    examples: tuple[Example, ...]
    talks: tuple[Conversation, ...]
    """The same rows as conversations."""
    groups: tuple[str, ...] = ()
    """Each row's group, if compare.group names a column."""


def prepare_held_out(
    rows: ClientRows, groups: Sequence[str], task: Task, loaded: LoadedModel, run: RunConfig
) -> HeldOut:
    """Tokenize a client's held-out rows.

    Args:
        rows: The client's.
        groups: The group of each held-out row; empty if rows are not grouped.
        task: Makes examples of rows.
        loaded: Has the tokenizer.
        run: Says how long a row may be.

    Raises:
        DataError: None has an answer within `train.max_length` tokens, or one has a token without
            an embedding.
    """
    limit = run.train.max_length
    size = run.evaluate.batch_size
    prepared = prepare_rows(rows.evaluation, task, loaded, limit, batch_size=size)
    if not prepared.examples:
        raise DataError(
            f"client '{rows.name}': no held-out row has an answer within {limit} tokens.\n"
            "  Raise train.max_length or shorten the prompts."
        )
    return HeldOut(
        prepared.examples,
        tuple(rows.evaluation[row] for row in prepared.rows),
        tuple(groups[row] for row in prepared.rows) if groups else (),
    )


def score_held_out(
    loaded: LoadedModel, task: Task, run: RunConfig, held: HeldOut, *, is_shown: bool
) -> list[Row]:
    """Score each row with the adapter that is loaded, and answer those that are asked for.

    Args:
        loaded: The base with an arm's adapter.
        task: Computes the losses.
        run: Says whether all rows are answered.
        held: The rows.
        is_shown: Whether the first one is answered for the report.

    Returns:
        One row per held-out row, in order.
    """
    each = score_each(loaded, held.examples, task, batch_size=run.evaluate.batch_size)
    rows: list[Row] = [
        {key: value for key, value in asdict(score).items() if value is not None} for score in each
    ]
    for row, group in zip(rows, held.groups, strict=False):  # none, or one for each row
        row["group"] = group
    if not task.is_asked:
        return rows  # neither labels nor texts nor pairs are answered
    limit = run.compare.max_new_tokens
    shown = range(len(rows)) if limit else range(int(is_shown))
    asked = [question_of(held.talks[i]) for i in shown]
    limit = limit or run.report.max_new_tokens
    said = answers(loaded, [talk for talk, _ in asked], max_new_tokens=limit)
    for i, one in zip(shown, said, strict=True):
        rows[i]["answer"], rows[i]["ended"] = one.text, one.ended
    if run.compare.max_new_tokens:
        for row, quality in zip(rows, judge(said, [ref for _, ref in asked]), strict=True):
            row.update(asdict(quality))
    return rows


def samples(
    held: Mapping[str, HeldOut], scores: Scores, run: RunConfig, task: Task
) -> list[dict[str, Any]]:
    """Some held-out questions, and how the first seed's arms answer them."""
    found: list[dict[str, Any]] = []
    for client in list(held)[: run.report.samples if task.is_asked else 0]:
        talk, reference = question_of(held[client].talks[0])
        said = {
            arm: rows[client][0]
            for arm, by_seed in scores.items()
            if client in (rows := next(iter(by_seed.values()))) and "answer" in rows[client][0]
        }
        about = {"client": client, "question": talk[-1]["content"], "reference": reference}
        answers_by_arm = {arm: row["answer"].strip() for arm, row in said.items()}
        cut = [arm for arm, row in said.items() if not row.get("ended", True)]
        found.append({**about, "answers": answers_by_arm, "cut": cut})
    return found
