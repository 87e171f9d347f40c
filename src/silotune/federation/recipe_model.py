"""The model that a recipe asks for: the base with its first adapter and its chat template."""

from typing import Any

import torch

from silotune.data.chat_templates import resolve_template, set_template
from silotune.federation.progress import Progress
from silotune.models.heads import check_length
from silotune.models.loading import LoadedModel, load_model
from silotune.models.vocabulary import check_vocabulary
from silotune.recipes.schema import RunConfig
from silotune.training.tasks.instruct import check_packing


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
    if give_template(loaded.tokenizer, run) and progress is not None:
        progress.note(f"{run.model.name} has no chat template: the plain one is used")
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    check_vocabulary(loaded.tokenizer, rows, f"model.name = '{run.model.name}'")
    return loaded


def give_template(tokenizer: Any, run: RunConfig) -> bool:
    """Set a recipe's template on its tokenizer; see `set_template`."""
    template = resolve_template(run.data.template)
    return set_template(tokenizer, template, end_token="no-end-token" not in run.train.compat)


def local_tensors(run: RunConfig, loaded: LoadedModel) -> frozenset[str]:
    """The tensors that the recipe keeps at each client, whatever the algorithm."""
    return loaded.head if run.adapter.head == "local" else frozenset()
