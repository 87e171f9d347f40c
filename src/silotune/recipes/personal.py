"""What a recipe keeps at its clients: tensors that they train and never send."""

from silotune.recipes.algorithm import chosen_algorithm
from silotune.recipes.schema import RunConfig


def kept_by(run: RunConfig) -> str:
    """The key that keeps tensors at the clients, with its value; empty if none does.

    What a function of one's own keeps is not known before it is built.
    """
    if run.adapter.head == "local":
        return "adapter.head = 'local'"
    if run.algorithm.facts.keeps:
        return f"algorithm.name = '{chosen_algorithm(run.algorithm)}'"
    return ""


def what_is_kept(run: RunConfig) -> str:
    """What it is, in words: for example "factor B and head"."""
    parts = [f"factor {run.algorithm.facts.keeps}"] if run.algorithm.facts.keeps else []
    return " and ".join([*parts, *(["head"] if run.adapter.head == "local" else [])])
