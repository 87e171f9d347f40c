"""The summary of a run, as numbers and as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from silotune.core.wording import counted, human_bytes, human_seconds
from silotune.federation.conflict import conflict_of
from silotune.federation.metrics import (
    LABEL_SCORES,
    PAIR_SCORES,
    SERVER_TEST,
    Row,
    held_out_losses,
    overall_scores,
    own_metrics,
    part_of,
    server_set,
)
from silotune.recipes.schema import RunConfig

ARMS = ("base", "federated")
OF_TASK = {"classify": "row", "prefer": "pair"}
"""What a loss is a mean over, by task; with all others over tokens."""


def summarise(
    run: RunConfig,
    rows: Sequence[Row],
    clients: Mapping[str, Mapping[str, int]],
    *,
    result_round: int,
    measured: Mapping[str, Any],
    head_bytes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Build the contents of summary.json.

    Args:
        run: The resolved recipe.
        rows: metrics.jsonl.
        clients: num_train and num_eval of each client.
        result_round: The round after which the adapter became the result.
        measured: What only the process knows: seconds_total, base_model_loads, peak_memory_bytes,
            adapter_sha256, adapter.
        head_bytes: bytes_up and bytes_down of the classification head in one message.
    """
    sent = {
        key: [n for row in rows if (n := row.get(key, 0))] for key in ("bytes_up", "bytes_down")
    }
    found: dict[str, Any] = {}
    if run.task == "prefer":
        found["scores"] = _label_scores(rows, clients, result_round)
        if conflict := conflict_of(rows):
            found["conflict"] = conflict
    if run.task == "classify":
        found["labels"] = list(run.data.labels or ())
        found["scores"] = _label_scores(rows, clients, result_round)
        head = head_bytes or {}
        found |= {f"head_{key}": head.get(key, 0) * len(sizes) for key, sizes in sent.items()}
    return {
        "task": run.task,
        "algorithm": getattr(run.algorithm, "name", ""),
        "rounds": max((row["round"] for row in rows if row["event"] == "round"), default=0),
        "result_round": result_round,
        **({} if part_of(rows) == "held-out" else {"scored": part_of(rows)}),
        **_losses(rows, clients, result_round),
        **_server_scores(rows, result_round),
        **_own_metric(run, rows, clients, result_round),
        **{key: sum(sizes) for key, sizes in sent.items()},
        **_training(rows),
        **found,
        **_server_training(rows),
        **measured,
    }


def _losses(
    rows: Sequence[Row], clients: Mapping[str, Mapping[str, int]], result_round: int
) -> dict[str, Any]:
    """Held-out loss of base and result: for each client with its counts of rows, and overall."""
    losses = {
        (row["round"], row["client"]): row["loss"]
        for row in rows
        if row["event"] == "evaluate" and row["status"] == "ok"
    }
    overall = held_out_losses(rows)
    return {
        "clients": {
            name: {
                "base_loss": losses.get((0, name)),
                "federated_loss": losses.get((result_round, name)),
                **counts,
            }
            for name, counts in sorted(clients.items())
        },
        "overall": {
            "base_loss": overall.get(0),
            "federated_loss": overall.get(result_round),
        },
    }


def _server_scores(rows: Sequence[Row], result_round: int) -> dict[str, Any]:
    """The scores of base and result on the server's test set; empty if it has none."""
    own = {row["round"]: row for row in rows if row["event"] == SERVER_TEST}
    if not own:
        return {}
    told = ("event", "round", "status", "part")
    arms = dict(zip(ARMS, (own.get(0), own.get(result_round)), strict=True))
    return {
        "server_test": {
            "name": server_set(rows),
            **{
                arm: row and {key: value for key, value in row.items() if key not in told}
                for arm, row in arms.items()
            },
        }
    }


def loss_name(summary: Mapping[str, Any]) -> str:
    """What the clients' loss is called: after the rows that were scored."""
    return f"{summary.get('scored', 'held-out')} loss"


def server_lines(summary: Mapping[str, Any]) -> list[str]:
    """The scores on the server's test set in words; empty if there are none."""
    found = summary.get("server_test")
    if not found or not all((found[arm] or {}).get("num_examples") for arm in ARMS):
        return []
    base, result = (found[arm] for arm in ARMS)
    change = f"{result['loss'] - base['loss']:+.3f}"
    lines = [
        f"{found['name']} ({counted(result['num_examples'], 'row')}): loss {base['loss']:.3f} for "
        f"the base, {result['loss']:.3f} for the result ({change})"
    ]
    if "accuracy" in result:
        lines[0] += f", accuracy {base['accuracy']:.3f} and {result['accuracy']:.3f}"
    return lines


def _training(rows: Sequence[Row]) -> dict[str, Any]:
    """What training took at the clients."""
    own = [row for row in rows if row["event"] == "train" and "num_steps" in row]

    def total(key: str) -> float | None:
        """None if a client did not report it, as real clients under [privacy]."""
        return sum(row[key] for row in own) if all(key in row for row in own) else None

    tokens = total("num_tokens")
    return {
        "tokens_trained": None if tokens is None else int(tokens),
        "seconds_training": total("seconds_training"),
    }


def _server_training(rows: Sequence[Row]) -> dict[str, Any]:
    """What training took at the server; empty if it did not train."""
    at_server = [row for row in rows if row["event"] == "server"]
    if not at_server:
        return {}
    return {
        "seconds_server": sum(row["seconds"] for row in at_server),
        "tokens_server": sum(int(row["num_tokens"]) for row in at_server),
    }


def _own_metric(
    run: RunConfig, rows: Sequence[Row], clients: Mapping[str, Any], result_round: int
) -> dict[str, Any]:
    """evaluate.metric of base and result, by client and as a mean over their rows."""
    if run.evaluate.metric is None:
        return {}

    def arms(own: Sequence[Row]) -> dict[str, float | None]:
        by_round = own_metrics(own)
        return {"base": by_round.get(0), "federated": by_round.get(result_round)}

    each = {n: arms([row for row in rows if row.get("client") == n]) for n in sorted(clients)}
    return {"metric": {"name": run.evaluate.metric, "clients": each, "overall": arms(rows)}}


def _label_scores(
    rows: Sequence[Row], clients: Mapping[str, Any], result_round: int
) -> dict[str, Any]:
    """The scores beside the loss (see `overall_scores`) of base and result, by client and overall.

    The overall scores are over all rows together. They are not means over the clients.
    """

    def scores(own: Sequence[Row]) -> dict[str, Any]:
        by_round = overall_scores(own)
        return {"base": by_round.get(0), "federated": by_round.get(result_round)}

    by_client = {
        name: scores([row for row in rows if row.get("client") == name]) for name in sorted(clients)
    }
    return {"clients": by_client, "overall": scores(rows)}


def notes_of(run: RunConfig) -> list[str]:
    """What has to stand beside a run's scores."""
    notes = [run.report.note] if run.report.note else []
    if run.data.validation_fraction > 0:
        notes.append(
            "The held-out rows were not looked at, because the recipe has validation rows "
            "(data.validation_fraction): silotune evaluate scores them."
        )
    if run.evaluate.choose_by == "server":
        notes.append(
            "The server's validation set chose the round (evaluate.choose_by), so its loss looks "
            "better than it is."
        )
    if kept := run.algorithm.facts.keeps:
        notes.append(
            f"Every client keeps a factor {kept} of its own, with which it was scored: without "
            "one, the adapter in this folder answers like the base. `--client NAME` loads it."
        )
    return notes


def extension_lines(summary: Mapping[str, Any]) -> list[str]:
    """That a run was told to go on, once for each time; empty if it ran as it was planned."""
    return [
        f"Extended from {one['before']['rounds']} to {one['after']['rounds']} rounds on "
        f"{one['date']}, after round {one['after_round']}"
        + (
            f"; train.schedule was {one['before'][key]} and is {one['after'][key]} since then."
            if (key := "train.schedule") in one["after"]
            else "."
        )
        for one in summary.get("extended", ())
    ]


def unused_rows(
    run: RunConfig, summary: Mapping[str, Any], split: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Why the clients hold more rows than the results count; empty if they do not.

    Args:
        run: The resolved recipe.
        summary: summary.json, which counts the rows that were used.
        split: Rows, lengths and labels of each client; may be empty.
    """
    parts = ("num_train",) if run.data.validation_fraction > 0 else ("num_train", "num_eval")
    lost = {
        name: sum(split[name][part] - used[part] for part in parts)
        for name, used in summary["clients"].items()
        if name in split
    }
    lost = {name: count for name, count in lost.items() if count > 0}
    if not lost:
        return []
    who = ", ".join(f"{name} ({count})" for name, count in lost.items())
    return [
        f"{counted(sum(lost.values()), 'row')} cannot be used within train.max_length = "
        f"{run.train.max_length}, so the results count fewer rows than the clients hold: {who}."
    ]


def unit_of(summary: Mapping[str, Any]) -> str:
    """The unit of a loss: what it is averaged over."""
    return f"nats per {OF_TASK.get(str(summary.get('task')), 'token')}"


def label_table(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: the scores of labels or of pairs, base and federated; else empty."""
    if "scores" not in summary:
        return []
    names = PAIR_SCORES if summary.get("task") == "prefer" else LABEL_SCORES
    header = ["client", *(f"{name}: {arm}" for name in names.values() for arm in ARMS)]
    lines = [tuple(header)]
    scores = summary["scores"]
    for client, own in [*scores["clients"].items(), ("all", scores["overall"])]:
        cells = (
            "-" if own[arm] is None or key not in own[arm] else f"{own[arm][key]:.3f}"
            for key in names
            for arm in ARMS
        )
        lines.append((client, *cells))
    return lines


def worse_off(summary: Mapping[str, Any]) -> list[str]:
    """Clients whose held-out loss is not lower than the base's."""
    return [
        name
        for name, c in summary["clients"].items()
        if None not in (c["base_loss"], c["federated_loss"])
        and not c["federated_loss"] < c["base_loss"]
    ]


def is_scored(summary: Mapping[str, Any]) -> bool:
    """Whether any client's held-out loss is known, for the base or the result."""
    arms = (c[f"{arm}_loss"] for c in summary["clients"].values() for arm in ARMS)
    return any(loss is not None for loss in arms)


def loss_table(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: client, rows, loss of base and federated adapter, difference.

    If no loss is known, only the numbers of rows are shown.
    """
    part = f"{summary.get('scored', 'held-out')} rows"
    lines = [("client", "train rows", part, "base", "federated", "change")]
    for name, c in summary["clients"].items():
        lines.append((name, str(c["num_train"]), str(c["num_eval"]), *_three(c)))
    rows = [summary["clients"][name] for name in summary["clients"]]
    totals = (str(sum(c["num_train"] for c in rows)), str(sum(c["num_eval"] for c in rows)))
    table: list[tuple[str, ...]] = [*lines, ("all", *totals, *_three(summary["overall"]))]
    return table if is_scored(summary) else [line[:3] for line in table]


def _three(c: Mapping[str, Any]) -> tuple[str, str, str]:
    before, after = c["base_loss"], c["federated_loss"]
    if before is None or after is None:
        return ("-", "-", "-")
    return (f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")


def own_table(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: each client's scores with the result, and after its own steps from there.

    Empty if clients took none, or none of them was scored.
    """
    clients = summary.get("finish", {})
    arms = list(dict.fromkeys(arm for c in clients.values() for arm in c.get("scores", {})))
    if not arms:
        return []
    shares = ("share",) if "interpolated" in arms else ()
    lines: list[tuple[str, ...]] = [("client", *arms, *shares, "change")]
    for name, own in clients.items():
        if not (scores := own.get("scores")):
            lines.append((name, *("-" for _ in arms), *("-" for _ in shares), "-"))
            continue
        change = f"{scores[arms[-1]]['loss'] - scores['federated']['loss']:+.3f}"
        share = (f"{own['share']:g}",) if shares else ()
        lines.append((name, *(_loss_and_accuracy(scores[arm]) for arm in arms), *share, change))
    return lines


def _loss_and_accuracy(scores: Mapping[str, Any]) -> str:
    accuracy = f" ({scores['accuracy']:.1%})" if "accuracy" in scores else ""
    return f"{scores['loss']:.3f}{accuracy}"


def own_lines(summary: Mapping[str, Any]) -> list[str]:
    """What the steps after the last round have cost, and who could not take them, in words."""
    if not (clients := summary.get("finish")):
        return []
    done = {name: own for name, own in clients.items() if "failed" not in own}
    lines = [
        f"{name} keeps the result as it is: {own['failed']}"
        for name, own in clients.items()
        if "failed" in own
    ]
    if done:
        tokens = sum(own["num_tokens"] for own in done.values())
        seconds = sum(own["seconds"] for own in done.values())
        most = max(own["num_steps"] for own in done.values())
        lines.insert(
            0,
            f"{counted(most, 'step')} of its own for each client, which never left it: {tokens} "
            f"tokens in {human_seconds(seconds)}, in addition to the above",
        )
    return lines


def cost_lines(summary: Mapping[str, Any]) -> list[str]:
    """Bytes and seconds in words."""
    at_server = summary.get("seconds_server", 0.0)
    training = summary["seconds_training"]
    other = summary["seconds_total"] - (training or 0.0) - at_server
    server = f"{human_seconds(at_server)} on the server's rows, " if at_server else ""
    down, up = (
        human_bytes(summary[key])
        + (f" (head {human_bytes(summary[f'head_{key}'])})" if summary.get(f"head_{key}") else "")
        for key in ("bytes_down", "bytes_up")
    )
    tokens, peak = summary["tokens_trained"], summary["peak_memory_bytes"]
    return [
        f"sent to clients {down}, sent by clients {up}",
        f"{server}{human_seconds(other)} in everything"
        if training is None
        else f"{human_seconds(training)} in training, {server}"
        f"{human_seconds(other)} in everything else",
        ("" if tokens is None else f"{tokens} tokens trained, ")
        + f"base loaded {counted(summary['base_model_loads'], 'time')}"
        + ("" if peak is None else f", peak memory {human_bytes(peak)}"),
    ]
