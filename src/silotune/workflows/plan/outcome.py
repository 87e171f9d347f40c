"""What a run is expected to cost, written down before its first round, beside what it did cost.

Bytes always; memory and seconds where `plan.measure` is set and the clients train as the measured
step did. This file says what does not compare, and why; it corrects nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from silotune.core.algorithm import Algorithm
from silotune.core.atomic_files import write_json
from silotune.core.errors import ConfigError
from silotune.core.types import ServerState
from silotune.federation.metrics import Row
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.federation.run_folder import RunFolder
from silotune.recipes.schema import RunConfig
from silotune.workflows.plan.measure import Measurement, is_at_hand, measure
from silotune.workflows.plan.plan import (
    Times,
    expected_rounds,
    expected_times,
    rounds_within,
    too_short,
)

FILE = "plan.json"


def measure_first(run: RunConfig, folder: RunFolder, progress: Progress) -> Measurement | str:
    """Take the measured step, before the base is loaded here: memory need not hold it twice.

    Returns:
        What was found, or in one line why there is nothing.
    """
    if not run.plan.measure:
        return "plan.measure is not set"
    if folder.read_json(FILE) is not None or folder.load_state() is not None:
        return "the run had begun before"
    progress.note(f"measuring one step of {run.model.name} in a process of its own")
    if not is_at_hand(run):
        load_for(run)  # fetched now, so that no seconds of that are the step's
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
    """What the run is expected to cost, as plan.json; what is there already stays.

    Args:
        folder: The run's.
        run: Its recipe.
        state: What its first round starts from.
        algorithm: With the tensors that stay at the clients.
        num_clients: How many there are.
        measured: As from `measure_first`.

    Returns:
        The contents of plan.json: rounds, num_clients, bytes_down, bytes_up, and where a step was
        measured peak_bytes, times and the measurement, else why not.

    Raises:
        ConfigError: Not even one round fits below budget.bytes or, by the measured step, below
            budget.hours.
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
    write_json(folder.path / FILE, found)
    return found


def _check_hours(run: RunConfig, times: Times, rounds: int) -> None:
    if rounds_within(run, times, rounds) == 0:
        raise ConfigError(
            f"{too_short(run, times)}.\n"
            "  Raise it, or do less in a round: fewer train.local_steps, a lower sampling.fraction "
            "or data.max_eval_rows."
        )


# --- beside what it did cost ----------------------------------------------------------------------


def compare_with_prediction(
    run: RunConfig,
    planned: Mapping[str, Any],
    rows: Sequence[Row],
    *,
    peak_bytes: int,
    seconds: float,
) -> dict[str, Any]:
    """Predicted against actual, for summary.json.

    Args:
        run: The recipe.
        planned: plan.json.
        rows: metrics.jsonl, the last scores included.
        peak_bytes: Of the largest process that trained.
        seconds: Until the last score, without the measured step.

    Returns:
        bytes, memory and seconds, each as (predicted, actual, difference), the difference as a
        share of what was predicted; None where the two do not compare. And notes: why not, or why
        they differ.
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
        notes.append("the server's own training is not in the predicted memory")
    if (why := _why_no_time(run)) is None:
        found["seconds"] = _pair(planned["times"]["total"], seconds)
    else:
        notes.append(f"predicted time is left out: {why}")
    return {**found, "notes": notes}


def _pair(predicted: float, actual: float) -> dict[str, float]:
    share = (actual - predicted) / predicted
    return {"predicted": predicted, "actual": actual, "difference": share}


def _why_no_time(run: RunConfig) -> str | None:
    if run.runtime.name != "in-process":
        return "it is for clients one after the other in one process"
    if run.server.work != "none":
        return "the server's own training is not in it"
    return None


def _why_other_bytes(planned: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """What a prediction does not know: rounds that a clock ends, and answers that do not come."""
    done = max((row["round"] for row in rows if row["event"] == "round"), default=0)
    if done < planned["rounds"]:
        yield f"predicted for {planned['rounds']} rounds, and the run ended after {done}"
    failed = [row for row in rows if row.get("status", "ok") not in ("ok", "did not move")]
    if failed:
        noun = "message" if len(failed) == 1 else "messages"
        who = ", ".join(sorted({row["client"] for row in failed}))
        yield f"{len(failed)} {noun} without a usable answer, so not counted as sent: {who}"
