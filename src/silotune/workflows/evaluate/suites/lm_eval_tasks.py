"""Tasks of EleutherAI's lm-evaluation-harness, on a model that is loaded here. Needs lm-eval.

Everything about a task (rows, prompts, metrics) is the harness's own; this file only hands the
model over. Code of data sets or models is never run.
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
        loaded: The model as it stands.
        tasks: Names of tasks, groups or tags of the harness, at least one.
        limit: Rows of each task; None: all.
        batch_size: Rows in one forward pass.
        chat: Whether prompts go through the model's chat template. Off, as published scores mostly
            are.
        system: A system text for them; needs `chat`.
        include_path: A folder with more tasks in the harness's YAML.

    Returns:
        `results` (task -> metric -> value), `versions`, `n-shot` and `n-samples` of each task, and
        `lm_eval`, the harness's version. Plain data.

    Raises:
        ConfigError: lm-eval is not installed, or a task is not known.
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
        ConfigError: lm-eval is not installed, or a task is not known.
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
            f"  `lm-eval ls tasks` lists the {len(manager.all_tasks)} that it has."
        )


def _lm_eval() -> tuple[Any, Any, Any, str]:
    """Its evaluator, its task manager, its model class and its version."""
    try:
        from importlib.metadata import version

        from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "the tasks of lm-eval need lm-eval, which is not installed.\n  pip install lm-eval"
        ) from None
    return evaluator, TaskManager, HFLM, version("lm-eval")
