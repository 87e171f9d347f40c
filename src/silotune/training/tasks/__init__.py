"""The tasks that can be learned, by the name that a recipe uses."""

from collections.abc import Callable, Sequence

from silotune.training.tasks.base import Task
from silotune.training.tasks.classify import classify
from silotune.training.tasks.instruct import INSTRUCT
from silotune.training.tasks.text import TEXT

TASKS: dict[str, Callable[[Sequence[str]], Task]] = {
    "instruct": lambda labels: INSTRUCT,
    "classify": classify,
    "text": lambda labels: TEXT,
}
"""Each is built from the recipe's labels, which only classification uses."""


def build_task(name: str, labels: Sequence[str] | None = None) -> Task:
    """The task of a recipe: its `task` and `data.labels`."""
    return TASKS[name](labels or ())
