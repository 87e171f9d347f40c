"""A client's rows, tokenized: what is used of them, and what is left out. They never leave it."""

import sys
import traceback
from collections.abc import Sequence

from silotune.core.errors import DataError
from silotune.core.wording import counted
from silotune.data.client_rows import ClientRows
from silotune.data.reading import TaskRow
from silotune.data.template_limits import TemplateLimitError
from silotune.federation.client_data import ClientData, ScoredTokens, TrainTokens, Worker
from silotune.training.known_tokens import prepare_rows
from silotune.training.scoring import build_eval_batches
from silotune.training.tasks.base import Example, Prepared


def prepare_client(rows: ClientRows, worker: Worker) -> ClientData:
    """A client's rows, whose parts are tokenized when they are first needed.

    Tokenizing raises DataError if no row of the part has an answer within `train.max_length`
    tokens, and the worker may say so.
    """

    def train() -> TrainTokens:
        own = _prepare_part(rows.name, "train", rows.train, worker)
        unused = rows.num_unused + own.num_dropped if worker.counts_all else 0
        return TrainTokens(own.examples, own.num_cut, own.num_dropped, unused)

    def scored() -> ScoredTokens:
        own = _prepare_part(rows.name, "held-out", rows.scored, worker)
        unused = rows.num_unused_eval + own.num_dropped if worker.counts_all else 0
        batches = build_eval_batches(own.examples, worker.task, worker.run.evaluate.batch_size)
        return ScoredTokens(tuple(batches), len(own.examples), own.num_cut, own.num_dropped, unused)

    num_unused = (rows.num_unused, rows.num_unused_eval) if worker.counts_all else (0, 0)
    given = len(rows.train) + num_unused[0], len(rows.scored) + num_unused[1]
    return ClientData(rows.name, train, scored, num_given=given)


def _prepare_part(name: str, part: str, rows: Sequence[TaskRow], worker: Worker) -> Prepared:
    prepared = _prepare(rows, worker)
    if not prepared.examples and not worker.quiet:
        raise DataError(
            f"client '{name}': no {part} row has an answer within {worker.run.train.max_length} "
            "tokens.\n  Raise train.max_length or shorten the prompts."
        )
    return prepared


def _prepare(rows: Sequence[TaskRow], worker: Worker) -> Prepared:
    """Tokenize rows. To a quiet worker, a row for which this fails is one that is left out."""
    limit, size = worker.run.train.max_length, worker.run.evaluate.batch_size
    try:
        return prepare_rows(rows, worker.task, worker.loaded, limit, batch_size=size)
    except TemplateLimitError:
        raise  # row by row it would take as many times as long
    except Exception:  # a template is a program and can fail in any way
        if not worker.quiet:
            raise
    examples: list[Example] = []
    num_cut, error = 0, None
    for row in rows:
        try:
            one = prepare_rows([row], worker.task, worker.loaded, limit, batch_size=size)
        except TemplateLimitError:
            raise
        except Exception as problem:
            error = problem
            continue
        examples += one.examples
        num_cut += one.num_cut
    if error is not None:  # the log stays on this side
        traceback.print_exception(error, file=sys.stderr)
    return Prepared(tuple(examples), num_cut, num_dropped=len(rows) - len(examples))


def cut_note(client: str, *, num_cut: int, num_dropped: int) -> str | None:
    """What happened to rows longer than `train.max_length`; None if there are none."""
    if not num_cut:
        return None
    lost = f", {num_dropped} of them left out because none of the answer remains"
    cut = counted(num_cut, "row")
    return f"{client}: {cut} truncated to train.max_length{lost if num_dropped else ''}"
