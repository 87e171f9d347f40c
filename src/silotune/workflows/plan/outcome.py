"""Predict the cost of a run before its first round, and compare it with the actual cost.

Bytes are always predicted. Memory and seconds are predicted if `plan.measure` is set and the
clients train as the measured step did. This file says what cannot be compared and why. It corrects
nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from silotune.core.algorithm import Algorithm
from silotune.core.errors import ConfigError
from silotune.core.types import ServerState
from silotune.core.wording import counted
from silotune.federation.metrics import Row
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.federation.run_folder import RunFolder
from silotune.recipes.schema import RunConfig
from silotune.workflows.plan.measure import Measurement, is_at_hand, measure
from silotune.workflows.plan.times import Times, expected_times, rounds_within, too_short
from silotune.workflows.plan.traffic import expected_rounds

FILE = "plan.json"


def measure_first(run: RunConfig, folder: RunFolder, progress: Progress) -> Measurement | str:
    """Measure one step before this process loads the base, so that memory holds it only once.

    Returns:
        The measurement, or one line that says why there is none.
    """
    if not run.plan.measure:
        return "plan.measure is not set"
    if folder.read_json(FILE) is not None or folder.load_state() is not None:
        return "the run had already started"
    progress.doing(f"measuring one step of {run.model.name} in a separate process")
    if not is_at_hand(run):
        load_for(run)  # download it now, so that the measured step does not include it
    return measure(run)


def write_prediction(
    folder: RunFolder,
    run: RunConfig,
    state: ServerState,
    algorithm: Algorithm,
    *,
    num_clients: int,
    measured: Measurement | str,
) -> dict[str, Any]:
    """Write the expected cost of a run to plan.json, unless the file exists.

    Args:
        folder: The run's folder.
        run: Its recipe.
        state: What its first round starts from.
        algorithm: Knows the tensors that stay with the clients; see `keep_local`.
        num_clients: The number of clients.
        measured: From `measure_first`.

    Returns:
        The contents of plan.json: rounds, num_clients, bytes_down and bytes_up. If a step was
        measured, also peak_bytes, times and the measurement; otherwise why there is none.

    Raises:
        ConfigError: budget.bytes is too small for even one round, or budget.hours is, judging by
            the measured step.
    """
    if (known := folder.read_json(FILE)) is not None:
        return known
    costs = list(expected_rounds(run, state, algorithm, num_clients))
    found: dict[str, Any] = {
        "rounds": len(costs),
        "num_clients": num_clients,
        "bytes_down": sum(cost.bytes_down for cost in costs) + costs[-1].last_bytes,
        "bytes_up": sum(cost.bytes_up for cost in costs),
        "peak_bytes": None,
        "times": None,
    }
    if isinstance(measured, str):
        found["not_measured"] = measured
    else:
        times = expected_times(run, len(costs), costs[0].num_asked, measured)
        if run.runtime.name == "in-process":
            _check_hours(run, times, len(costs))
        found["peak_bytes"] = measured.peak_bytes
        found["times"] = {**asdict(times), "total": times.total}
        found["measured"] = asdict(measured)
    folder.write_json(FILE, found)
    return found


def _check_hours(run: RunConfig, times: Times, rounds: int) -> None:
    if rounds_within(run, times, rounds) == 0:
        raise ConfigError(
            f"{too_short(run, times)}.\n"
            "  Raise it, or do less in a round: fewer train.local_steps, a lower sampling.fraction "
            "or data.max_eval_rows."
        )


# --- predicted and actual -------------------------------------------------------------------------


def compare_with_prediction(
    run: RunConfig,
    planned: Mapping[str, Any],
    rows: Sequence[Row],
    *,
    peak_bytes: int,
    seconds: float,
) -> dict[str, Any]:
    """Compare predicted with actual cost, for summary.json.

    Args:
        run: The recipe.
        planned: plan.json.
        rows: metrics.jsonl, including the last scores.
        peak_bytes: Peak memory of the largest process that trained.
        seconds: Time until the last score, without the measured step.

    Returns:
        bytes, memory and seconds, each with predicted, actual and difference, which is a share of
        the predicted value; None if the two cannot be compared. And notes that say why they differ
        or cannot be compared.
    """
    sent = sum(row.get("bytes_down", 0) + row.get("bytes_up", 0) for row in rows)
    found: dict[str, Any] = {
        "bytes": _pair(planned["bytes_down"] + planned["bytes_up"], sent),
        "memory": None,
        "seconds": None,
    }
    notes = list(_why_other_bytes(planned, rows))
    if planned["times"] is None:
        if run.plan.measure:
            notes.append(f"memory and time were not predicted: {planned['not_measured']}")
        return {**found, "notes": notes}
    found["memory"] = _pair(planned["peak_bytes"], peak_bytes)
    if run.server.work != "none":
        notes.append("the predicted memory does not include the server's own training")
    if (why := _why_no_time(run)) is None:
        found["seconds"] = _pair(planned["times"]["total"], seconds)
    else:
        notes.append(f"time is not compared: {why}")
    return {**found, "notes": notes}


def _pair(predicted: float, actual: float) -> dict[str, float]:
    share = (actual - predicted) / predicted
    return {"predicted": predicted, "actual": actual, "difference": share}


def _why_no_time(run: RunConfig) -> str | None:
    usual = (run.runtime.name, run.runtime.together, run.runtime.client_processes)
    if usual != ("in-process", 1, 1):
        return "the prediction is for clients that train one after another in one process"
    if run.server.work != "none":
        return "the prediction does not include the server's own training"
    if run.evaluate.server_path is not None:
        return "the prediction does not include the server's own scores"
    return None


def _why_other_bytes(planned: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """What a prediction cannot know: an early end of the run, and clients that do not answer."""
    done = max((row["round"] for row in rows if row["event"] == "round"), default=0)
    if done < planned["rounds"]:
        rounds = counted(planned["rounds"], "round")
        yield f"the prediction is for {rounds}, and the run ended after {done}"
    own = [row for row in rows if "client" in row]
    failed = [row for row in own if row.get("status", "ok") not in ("ok", "did not move")]
    if failed:
        messages = counted(len(failed), "message")
        who = ", ".join(sorted({row["client"] for row in failed}))
        yield f"{messages} without a usable answer, so not counted as sent: {who}"
