"""silotune: fine-tune one language model across many data holders whose rows never leave them.

>>> import silotune
>>> len(silotune.shipped_recipes()), "hospitals" in silotune.shipped_recipes()
(12, True)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from silotune.core.errors import SilotuneError
    from silotune.federation.progress import Progress
    from silotune.federation.progress_lines import PlainProgress
    from silotune.recipes.parse import load_recipe
    from silotune.recipes.schema import RunConfig
    from silotune.recipes.shipped import shipped_recipes
    from silotune.results.listing import runs
    from silotune.results.run import Run
    from silotune.workflows.audit.audit import audit
    from silotune.workflows.check import check
    from silotune.workflows.compare.compare import Comparison, compare
    from silotune.workflows.contribution.contribution import Contribution, contribution
    from silotune.workflows.evaluate.evaluate import Evaluation, Questions, evaluate
    from silotune.workflows.new_recipe import NewRecipe, new
    from silotune.workflows.plan.plan import Plan, plan
    from silotune.workflows.pretrain_teacher import pretrain_teacher
    from silotune.workflows.preview import preview
    from silotune.workflows.run import base_folder, run
    from silotune.workflows.sweep.sweep import Sweep, sweep

# Resolved when first used: importing silotune costs no torch.
_HOMES = {
    "Comparison": "silotune.workflows.compare.compare",
    "Contribution": "silotune.workflows.contribution.contribution",
    "Evaluation": "silotune.workflows.evaluate.evaluate",
    "NewRecipe": "silotune.workflows.new_recipe",
    "PlainProgress": "silotune.federation.progress_lines",
    "Plan": "silotune.workflows.plan.plan",
    "Progress": "silotune.federation.progress",
    "Questions": "silotune.workflows.evaluate.evaluate",
    "Run": "silotune.results.run",
    "RunConfig": "silotune.recipes.schema",
    "SilotuneError": "silotune.core.errors",
    "Sweep": "silotune.workflows.sweep.sweep",
    "audit": "silotune.workflows.audit.audit",
    "base_folder": "silotune.workflows.run",
    "check": "silotune.workflows.check",
    "compare": "silotune.workflows.compare.compare",
    "contribution": "silotune.workflows.contribution.contribution",
    "evaluate": "silotune.workflows.evaluate.evaluate",
    "load_recipe": "silotune.recipes.parse",
    "new": "silotune.workflows.new_recipe",
    "plan": "silotune.workflows.plan.plan",
    "pretrain_teacher": "silotune.workflows.pretrain_teacher",
    "preview": "silotune.workflows.preview",
    "run": "silotune.workflows.run",
    "runs": "silotune.results.listing",
    "shipped_recipes": "silotune.recipes.shipped",
    "sweep": "silotune.workflows.sweep.sweep",
}

__all__ = [
    "Comparison",
    "Contribution",
    "Evaluation",
    "NewRecipe",
    "PlainProgress",
    "Plan",
    "Progress",
    "Questions",
    "Run",
    "RunConfig",
    "SilotuneError",
    "Sweep",
    "audit",
    "base_folder",
    "check",
    "compare",
    "contribution",
    "evaluate",
    "load_recipe",
    "new",
    "plan",
    "pretrain_teacher",
    "preview",
    "run",
    "runs",
    "shipped_recipes",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'silotune' has no attribute '{name}'")
