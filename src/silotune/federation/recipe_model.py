"""The model that a recipe asks for: the base with its first adapter and its chat template."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from silotune.data.chat_templates import (
    PROBE,
    TEMPLATES,
    begins_texts,
    render,
    resolve_template,
    set_template,
)
from silotune.data.client_rows import ClientRows
from silotune.data.preferences import talks_of
from silotune.data.reading import TaskRow
from silotune.data.row_draws import evenly
from silotune.data.template_traits import traits_of
from silotune.federation.progress import Progress
from silotune.models.heads import check_length
from silotune.models.loading import LoadedModel, load_model
from silotune.models.vocabulary import check_vocabulary
from silotune.recipes.preferences import ASKED
from silotune.recipes.schema import RunConfig
from silotune.training.generate import teach_end
from silotune.training.tasks.instruct import check_packing
from silotune.training.tasks.template_warnings import control_warnings, template_warnings

LOOKED_AT = 2_000
"""Rows that a run renders before its first round, to warn of what the chat template does to them: a
second or two, however many rows there are."""


def load_for(run: RunConfig, progress: Progress | None = None) -> LoadedModel:
    """Load a recipe's base with its first adapter, and set the chat template.

    From here on this process computes with the recipe's number of threads: sums of floats depend on
    it, and whoever loads a model for a recipe wants that recipe's numbers.
    """
    torch.set_num_threads(run.runtime.threads)
    loaded = load_model(
        run.model,
        run.adapter,
        seed=run.seed,
        device=run.runtime.device,
        labels=run.data.labels or () if run.task == "classify" else (),
    )
    if progress is not None:
        for note in loaded.notes:
            progress.note(f"warning: {note}")
    if run.task == "classify":
        check_length(loaded.model, run.train.max_length)
        return loaded
    if run.train.packing:
        check_packing(loaded, run.train.max_length)
    has_none = give_template(loaded.tokenizer, run)
    if has_none and run.task in ASKED and progress is not None:
        progress.note(f"{run.model.name} has no chat template: the plain one is used")
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    check_vocabulary(loaded.tokenizer, rows, f"model.name = '{run.model.name}'")
    if run.task in ASKED:
        teach_end(loaded)
    return loaded


def give_template(tokenizer: Any, run: RunConfig) -> bool:
    """Set a recipe's template on its tokenizer; see `set_template`."""
    template = resolve_template(run.data.template)
    has_end = "no-end-token" not in run.train.compat
    return set_template(tokenizer, template, end_token=has_end, date=run.data.date)


def warn_of_template(
    tokenizer: Any,
    run: RunConfig,
    clients: Mapping[str, ClientRows],
    server: Sequence[TaskRow] = (),
    *,
    at_most: int | None = None,
) -> Iterator[str]:
    """What a recipe's chat template does that may be surprising, in general and to these rows.

    Args:
        tokenizer: With the recipe's template, see `give_template`.
        run: The recipe.
        clients: The rows of all clients, as far as this machine reads them. Under [privacy], those
            of real clients are not looked at.
        server: The server's own rows.
        at_most: Look at this many rows, evenly spaced, and say so if there are more.
    """
    if run.task == "classify":
        return
    rows = [talk for own in clients.values() for row in own.every for talk in talks_of(row)]
    if run.runtime.name == "flower" and run.privacy.unit != "none":
        rows = []
    rows += [talk for row in server for talk in talks_of(row)]
    looked_at = evenly(rows, at_most)
    if len(looked_at) < len(rows):
        yield (
            f"what the model reads of the rows was looked at in {len(looked_at)} of {len(rows)}; "
            "`silotune data` looks at all of them"
        )
    if run.task == "text":
        yield from control_warnings(tokenizer, looked_at)
        return
    traits = traits_of(tokenizer)
    if traits.end is None and "no-end-token" not in run.train.compat:
        yield (
            "the chat template writes no token behind an answer, so the model does not learn to "
            "stop: answers go on up to their maximum length; use a data.template that writes "
            "eos_token there"
        )
    if traits.writes_date:
        day = "today's" if run.data.date is None else f"{run.data.date} (data.date)"
        yield f"the chat template writes a date, in this run {day}"
    own = run.data.template not in TEMPLATES and begins_texts(tokenizer)
    if own and not render(tokenizer, PROBE, ask=False).startswith(tokenizer.bos_token):
        yield (
            "the tokenizer begins every text with its bos token, and data.template does not write "
            "it; begin the template with {{ bos_token }}"
        )
    yield from template_warnings(tokenizer, looked_at)


def local_tensors(run: RunConfig, loaded: LoadedModel) -> frozenset[str]:
    """The tensors that the recipe keeps at each client, whatever the algorithm."""
    return loaded.head if run.adapter.head == "local" else frozenset()
