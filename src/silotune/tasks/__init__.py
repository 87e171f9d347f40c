"""What can be learned, by the name that a recipe uses."""

from silotune.tasks.base import Task
from silotune.tasks.instruct import INSTRUCT

TASKS: dict[str, Task] = {"instruct": INSTRUCT}
