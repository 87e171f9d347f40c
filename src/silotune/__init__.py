"""silotune: fine-tune one language model across many data holders whose rows never leave them.

>>> import silotune
>>> len(silotune.shipped_recipes()), "hospitals" in silotune.shipped_recipes()
(11, True)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from silotune.arms import Comparison, compare
    from silotune.auditing import audit
    from silotune.checking import check
    from silotune.config import RunConfig
    from silotune.errors import SilotuneError
    from silotune.finished import Run
    from silotune.launch import base_folder, pretrain_teacher, run
    from silotune.planning import Plan, plan
    from silotune.previewing import preview
    from silotune.progress import PlainProgress, Progress
    from silotune.recipe_parse import load_recipe, shipped_recipes
    from silotune.sweeping import Sweep, sweep

# Resolved when first used: importing silotune costs no torch.
_HOMES = {
    "Comparison": "silotune.arms",
    "PlainProgress": "silotune.progress",
    "Plan": "silotune.planning",
    "Progress": "silotune.progress",
    "Run": "silotune.finished",
    "RunConfig": "silotune.config",
    "SilotuneError": "silotune.errors",
    "Sweep": "silotune.sweeping",
    "audit": "silotune.auditing",
    "base_folder": "silotune.launch",
    "check": "silotune.checking",
    "compare": "silotune.arms",
    "load_recipe": "silotune.recipe_parse",
    "plan": "silotune.planning",
    "pretrain_teacher": "silotune.launch",
    "preview": "silotune.previewing",
    "run": "silotune.launch",
    "shipped_recipes": "silotune.recipe_parse",
    "sweep": "silotune.sweeping",
}

__all__ = [
    "Comparison",
    "PlainProgress",
    "Plan",
    "Progress",
    "Run",
    "RunConfig",
    "SilotuneError",
    "Sweep",
    "audit",
    "base_folder",
    "check",
    "compare",
    "load_recipe",
    "plan",
    "pretrain_teacher",
    "preview",
    "run",
    "shipped_recipes",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'silotune' has no attribute '{name}'")
