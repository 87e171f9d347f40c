"""The tasks that can be learned, by the name that a recipe uses."""

from collections.abc import Callable, Sequence

from silotune.training.tasks.base import Task
from silotune.training.tasks.classify import classify
from silotune.training.tasks.instruct import INSTRUCT
from silotune.training.tasks.prefer import PreferConfig, prefer
from silotune.training.tasks.text import TEXT

TASKS: dict[str, Callable[[Sequence[str], PreferConfig], Task]] = {
    "instruct": lambda labels, cfg: INSTRUCT,
    "classify": lambda labels, cfg: classify(labels),
    "text": lambda labels, cfg: TEXT,
    "prefer": lambda labels, cfg: prefer(cfg),
}
"""Each is built from the recipe's labels, which only classification uses, and its [prefer]."""


def build_task(
    name: str, labels: Sequence[str] | None = None, cfg: PreferConfig | None = None
) -> Task:
    """The task of a recipe: its `task`, `data.labels` and `prefer`."""
    return TASKS[name](labels or (), cfg or PreferConfig())
