"""What a run says at its end: the summary as numbers, as a table, and as a model card."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from silotune.config import RunConfig
from silotune.progress import human_bytes, human_seconds
from silotune.store import Row, held_out_losses


def summarise(
    run: RunConfig,
    rows: Sequence[Row],
    clients: Mapping[str, Mapping[str, int]],
    *,
    result_round: int,
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """The contents of summary.json.

    Args:
        run: The resolved recipe.
        rows: metrics.jsonl.
        clients: num_train and num_eval of each client.
        result_round: Rounds behind the adapter that became the result.
        measured: What only the process knows: seconds_total, base_model_loads, peak_memory_bytes,
            adapter_sha256, adapter.
    """
    losses = {
        (row["round"], row["client"]): row["loss"]
        for row in rows
        if row["event"] == "evaluate" and row["status"] == "ok"
    }
    overall = held_out_losses(rows)
    trained = [row for row in rows if row["event"] == "train" and "num_tokens" in row]
    return {
        "algorithm": getattr(run.algorithm, "name", ""),
        "rounds": run.rounds,
        "result_round": result_round,
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
        "bytes_up": sum(row.get("bytes_up", 0) for row in rows),
        "bytes_down": sum(row.get("bytes_down", 0) for row in rows),
        "tokens_trained": sum(int(row["num_tokens"]) for row in trained),
        "seconds_training": sum(row["seconds_training"] for row in trained),
        **measured,
    }


def cut_note(client: str, *, num_cut: int, num_dropped: int) -> str | None:
    """What became of rows that are longer than `train.max_length`; None where none is."""
    if not num_cut:
        return None
    lost = f", {num_dropped} of them with the whole answer: these are left out"
    return (
        f"{client}: {num_cut} rows are longer than train.max_length and lose their end"
        f"{lost if num_dropped else ''}"
    )


def worse_off(summary: Mapping[str, Any]) -> list[str]:
    """Clients whose held-out loss is not lower than the base's."""
    return [
        name
        for name, c in summary["clients"].items()
        if None not in (c["base_loss"], c["federated_loss"])
        and not c["federated_loss"] < c["base_loss"]
    ]


def loss_table(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: client, rows, held-out loss of base and federated adapter, difference."""
    lines = [("client", "train rows", "held-out rows", "base", "federated", "change")]
    for name, c in summary["clients"].items():
        lines.append((name, str(c["num_train"]), str(c["num_eval"]), *_three(c)))
    rows = [summary["clients"][name] for name in summary["clients"]]
    totals = (str(sum(c["num_train"] for c in rows)), str(sum(c["num_eval"] for c in rows)))
    return [*lines, ("all", *totals, *_three(summary["overall"]))]


def _three(c: Mapping[str, Any]) -> tuple[str, str, str]:
    before, after = c["base_loss"], c["federated_loss"]
    if before is None or after is None:
        return ("-", "-", "-")
    return (f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")


def cost_lines(summary: Mapping[str, Any]) -> list[str]:
    """Bytes and seconds in words."""
    other = summary["seconds_total"] - summary["seconds_training"]
    return [
        f"sent to clients {human_bytes(summary['bytes_down'])}, "
        f"sent by clients {human_bytes(summary['bytes_up'])}",
        f"{human_seconds(summary['seconds_training'])} in training, "
        f"{human_seconds(other)} in everything else",
        f"{summary['tokens_trained']} tokens trained, base loaded "
        f"{summary['base_model_loads']} time(s), "
        f"peak memory {human_bytes(summary['peak_memory_bytes'])}",
    ]


def model_card(run: RunConfig, summary: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """README.md of a run folder: what was trained, on whose rows, with which result."""
    header, *body = loss_table(summary)
    table = [_md(header), _md(["---"] * len(header)), *map(_md, body)]
    base = provenance["base"]
    lost = worse_off(summary)
    overall = summary["overall"]["federated_loss"]
    lines = [
        "---",
        "library_name: peft" if run.adapter.kind == "lora" else "library_name: transformers",
        f"base_model: {base['name']}",
        "tags: [federated-learning, silotune]",
        "---",
        "",
        f"# {base['name']}, fine-tuned by {len(summary['clients'])} clients",
        "",
        f"{base['description']}. {run.rounds} rounds of {summary['algorithm']}; "
        f"{_what_is_trained(run)}. The clients' rows were never pooled; what travelled were "
        "float32 changes of the trained tensors, without secure aggregation and without "
        "differential privacy, so whoever runs the server could learn about the rows from them.",
        "",
        "## Held-out loss (nats per token, lower is better)",
        "",
        *table,
        "",
        (
            "Each client's own held-out rows; the last line is weighted by tokens"
            + (f", perplexity {math.exp(overall):.1f}." if overall is not None else ".")
        ),
    ]
    if lost:
        lines += ["", f"**Not better than the base for: {', '.join(lost)}.**"]
    lines += [
        "",
        "## Cost",
        "",
        *(f"- {line}" for line in cost_lines(summary)),
        "",
        "## Use",
        "",
        "```",
        f'silotune ask {provenance["run"]} "your question"',
        "```",
        "",
        *_python_use(run),
        "",
        "## Provenance",
        "",
        f"- data: {provenance['data']['path']}, sha256 of all rows {provenance['data']['sha256']}",
        f"- base: {base['name']}, sha256 {base['sha256']}",
        f"- adapter: sha256 {summary['adapter_sha256']}, after round {summary['result_round']}",
        f"- seed {run.seed}; recipe in `recipe.toml`, versions in `provenance.json`, every round "
        "and client in `metrics.jsonl`",
    ]
    return "\n".join(lines) + "\n"


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _what_is_trained(run: RunConfig) -> str:
    a = run.adapter
    if a.kind == "full":
        return "all weights were trained"
    where = ", ".join(a.targets) if a.targets else "the default modules of the model family"
    return f"LoRA of rank {a.rank} (alpha {a.alpha:g}) on {where}"


def _python_use(run: RunConfig) -> list[str]:
    if run.adapter.kind == "full":
        return ["`adapter/` is a model folder for `AutoModelForCausalLM.from_pretrained`."]
    return [
        "`adapter/` is a PEFT folder:",
        "",
        "```python",
        "from peft import PeftModel",
        "from silotune import base_folder",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained(base_folder("{run.model.name}"))',
        'model = PeftModel.from_pretrained(base, "adapter")',
        "```",
    ]
