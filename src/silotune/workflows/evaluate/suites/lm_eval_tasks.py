"""Tasks of EleutherAI's lm-evaluation-harness, on a model that is already loaded. Needs lm-eval.

The harness defines everything about a task: rows, prompts, metrics. This file only passes it the
model. Code from data sets or models is never run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from silotune.core.errors import ConfigError
from silotune.core.wording import did_you_mean
from silotune.models.loading import LoadedModel


def run_lm_eval(
    loaded: LoadedModel,
    tasks: Sequence[str],
    limit: int | None = None,
    *,
    batch_size: int = 8,
    chat: bool = False,
    system: str | None = None,
    include_path: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate with the harness. It sets the global seeds of Python, NumPy and torch.

    Args:
        loaded: The model in its current state.
        tasks: Names of tasks, groups or tags of the harness, at least one.
        limit: Maximum number of rows of each task; None: all.
        batch_size: Rows in one forward pass.
        chat: Whether prompts go through the model's chat template. Off by default, as in most
            published scores.
        system: A system message; needs `chat`.
        include_path: A folder with more tasks in the harness's YAML.

    Returns:
        `results` (task -> metric -> value), `versions`, `n-shot` and `n-samples` of each task, and
        `lm_eval`, the harness's version. Plain data.

    Raises:
        ConfigError: lm-eval is not installed, or a task is unknown.
    """
    evaluator, manager_class, model_class, version = _lm_eval()
    manager = manager_class(include_path=None if include_path is None else str(include_path))
    _check_names(tasks, manager)
    lm = model_class(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=batch_size,
        trust_remote_code=False,
    )
    found = evaluator.simple_evaluate(
        model=lm,
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        log_samples=False,
        confirm_run_unsafe_code=False,
        apply_chat_template=chat,
        system_instruction=system if chat else None,
    )
    kept = {key: found[key] for key in ("results", "versions", "n-shot", "n-samples")}
    return {**kept, "lm_eval": version}


def check_lm_eval(tasks: Sequence[str], include_path: str | Path | None = None) -> None:
    """Refuse tasks that cannot be asked, before a model is loaded.

    Raises:
        ConfigError: lm-eval is not installed, or a task is unknown.
    """
    _, manager_class, _, _ = _lm_eval()
    _check_names(
        tasks, manager_class(include_path=None if include_path is None else str(include_path))
    )


def _check_names(tasks: Sequence[str], manager: Any) -> None:
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if not tasks or unknown:
        near = "".join(f"\n  '{name}':{did_you_mean(name, manager.all_tasks)}" for name in unknown)
        raise ConfigError(
            f"lm-eval has no such task: {', '.join(unknown) or 'none was named'}.{near}\n"
            f"  Choose one of its {len(manager.all_tasks)} tasks; `lm-eval ls tasks` lists them."
        )


def _lm_eval() -> tuple[Any, Any, Any, str]:
    """The evaluator, task manager and model class of lm-eval, and its version."""
    try:
        from importlib.metadata import version

        from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "tasks of lm-eval need lm-eval, which is not installed.\n"
            "  Install it: pip install lm-eval"
        ) from None
    return evaluator, TaskManager, HFLM, version("lm-eval")
