"""What the reference of a preference says about rows: computed once, and kept with the tokens.

The reference is what a run started from: the base with its adapter off, or the first adapter where
the recipe names one (adapter.start). It does not train, so one forward pass without a gradient is
enough for a whole run, and no second model is in memory. An algorithm that moves the base does so
beside the adapter, which is off here: the reference stays where it was.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from silotune.models.loading import LoadedModel, as_started
from silotune.training.scoring import by_length
from silotune.training.tasks.base import Example, Task


def with_references(
    examples: Sequence[Example], task: Task, loaded: LoadedModel, *, batch_size: int
) -> tuple[Example, ...]:
    """The same examples, with what the reference says about each.

    Args:
        examples: Of any task; only pairs need a reference.
        task: Says what a reference is.
        loaded: In any state of training; left as it was.
        batch_size: Rows in one forward pass. With that of a later score, the margins of the
            reference itself are exactly 0.
    """
    if task.reference is None:
        return tuple(examples)
    found: dict[int, Example] = {}
    was_training = loaded.model.training
    loaded.model.eval()
    with as_started(loaded), torch.inference_mode():
        for group in by_length(examples, batch_size):
            batch = task.collate([examples[i] for i in group])
            for i, logps in zip(group, task.reference(loaded, batch).cpu(), strict=True):
                # a clone is an ordinary tensor, which a training step may use
                found[i] = replace(examples[i], reference=logps.clone())
    loaded.model.train(was_training)
    return tuple(found[i] for i in range(len(examples)))
