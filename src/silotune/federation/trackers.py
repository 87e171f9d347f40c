"""Log rounds as curves to an experiment tracker, through its own library. Off by default.

TensorBoard, Weights & Biases, MLflow and trackio have different names and calls; accelerate, which
PEFT needs anyway, supports them all. Only the numbers of metrics.jsonl are logged, never rows.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silotune.core.errors import ConfigError
from silotune.federation.metrics import (
    Row,
    held_out_losses,
    part_of,
    server_losses,
    server_set,
    train_loss,
    trained,
)
from silotune.federation.progress import Progress


def check_tracker(name: str) -> None:
    """Refuse a tracker whose library is missing.

    Raises:
        ConfigError: The library is missing; the message has the command that installs it.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"report.tracker = '{name}' needs a library that is not installed.\n"
            f"  pip install {name}, or set report.tracker = 'none'."
        )


class Tracker(Progress):
    """Logs the numbers of every round."""

    def __init__(self, name: str, *, folder: Path, settings: Mapping[str, Any]) -> None:
        """Start a run in the tracker.

        Args:
            name: The name of the tracker.
            folder: The run folder; its name becomes the name of the run.
            settings: The recipe, flattened.
        """
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # without it, accelerate's trackers fail when they write to their own log
        options: dict[str, Any] = {
            "tensorboard": {"run_name": "tracker", "logging_dir": str(folder)},
            "wandb": {"run_name": "silotune", "name": folder.name, "dir": str(folder)},
            "mlflow": {"experiment_name": "silotune", "run_name": folder.name},
            "trackio": {"run_name": "silotune", "name": folder.name},
        }
        self._tracker = LOGGER_TYPE_TO_CLASS[name](**options[name])
        self._tracker.start()
        plain = (str, int, float, bool)
        self._tracker.store_init_configuration(
            {k: v if isinstance(v, plain) else str(v) for k, v in settings.items()}
        )

    def end_round(self, round_: int, rows: Sequence[Row]) -> None:
        """Log the numbers of the round's rows."""
        self._tracker.log(_trained(rows), step=round_)
        self.log_scores(rows)

    def log_scores(self, rows: Sequence[Row]) -> None:
        """Log held-out or validation losses under the round that produced the scored adapter."""
        scored = [row for row in rows if row["event"] == "evaluate" and row["status"] == "ok"]
        for round_, loss in held_out_losses(scored).items():
            own = {row["client"]: row["loss"] for row in scored if row["round"] == round_}
            name = f"{part_of(scored).replace('-', '_')}_loss"
            values = {f"{name}/{client}": value for client, value in own.items()}
            self._tracker.log({**values, f"{name}/all": loss}, step=round_)
        for round_, loss in server_losses(rows).items():
            self._tracker.log({f"loss/{server_set(rows)}": loss}, step=round_)

    def end(self) -> None:
        """End the tracker's run."""
        self._tracker.finish()


def _trained(rows: Sequence[Row]) -> dict[str, float]:
    values = {f"train_loss/{row['client']}": row["train_loss"] for row in trained(rows)}
    if values:
        values["train_loss/all"] = train_loss(rows)
    for key in ("bytes_up", "bytes_down"):
        values[key] = float(sum(row.get(key, 0) for row in rows))
    values["seconds"] = sum(row["seconds"] for row in rows if row["event"] == "round")
    return values
