"""A run as Markdown: the numbers of its page, without rows and answers.

A card is meant to be published with an adapter, so it contains nothing that a client wrote.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from silotune.core.safe_text import markdown, plain
from silotune.core.wording import counted
from silotune.federation.metrics import Row
from silotune.federation.privacy_statement import privacy_lines
from silotune.models.adapters import PROMPT_KINDS
from silotune.recipes.schema import RunConfig
from silotune.results.published import published
from silotune.results.summary import (
    budget_lines,
    budget_warnings,
    cost_lines,
    is_scored,
    label_table,
    loss_table,
    prediction_notes,
    prediction_table,
    round_table,
    split_table,
    unit_of,
    worse_off,
)
from silotune.results.verdicts import run_verdict


def model_card(
    run: RunConfig,
    summary: Mapping[str, Any],
    rows: Sequence[Row],
    provenance: Mapping[str, Any],
    *,
    split: Mapping[str, Any],
) -> str:
    """README.md of a run folder: what was trained, on which rows, and with what result.

    Args:
        run: The resolved recipe.
        summary: summary.json.
        rows: metrics.jsonl.
        provenance: provenance.json.
        split: What each client holds; may be empty.
    """
    summary, rows, split, _ = published(summary, rows, split)
    lines = "\n".join(
        [
            *_heading(run, summary, provenance["base"]),
            *_results(summary),
            *_label_scores(summary),
            *_warnings(summary),
            "",
            "## Rounds",
            "",
            *markdown_table(round_table(rows)),
            "",
            *(["## Clients", "", *markdown_table(split_table(split)), ""] if split else []),
            "## Cost",
            "",
            *(f"- {line}" for line in [*budget_lines(summary), *cost_lines(summary)]),
            "",
            *_predicted(summary),
            *_privacy(summary),
            *_use(run, provenance["run"]),
            *_provenance(run, summary, provenance),
            "",
        ]
    )
    return plain(lines)


def _heading(run: RunConfig, summary: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Metadata for the hub, the title, how the model was trained, and the verdict."""
    return [
        "---",
        f"library_name: {'transformers' if run.adapter.kind == 'full' else 'peft'}",
        f"base_model: {base['name']}",
        "tags: [federated-learning, silotune]",
        "---",
        "",
        f"# {base['name']}, fine-tuned by {counted(len(summary['clients']), 'client')}",
        "",
        f"{base['description']}. {counted(summary['rounds'], 'round')} of {summary['algorithm']}; "
        f"{what_is_trained(run)}. The clients' rows were never pooled. Clients sent float32 "
        f"changes of the trained tensors, without secure aggregation{_noise(run)}.",
        "",
        run_verdict(summary),
        "",
        *([run.report.note, ""] if run.report.note else []),
    ]


def _results(summary: Mapping[str, Any]) -> list[str]:
    """The table of clients, and what its last line means."""
    table = markdown_table(loss_table(summary))
    if not is_scored(summary):
        return ["## Rows", "", *table]
    unit, overall = unit_of(summary), summary["overall"]["federated_loss"]
    perplexity = ""
    if overall is not None and not label_table(summary):
        perplexity = f", perplexity {math.exp(min(overall, 700.0)):.1f}"
    return [
        f"## Held-out loss ({unit}, lower is better)",
        "",
        *table,
        "",
        "Each client is scored on its own held-out rows; the last line is weighted by "
        f"{unit.rsplit(' ', 1)[1]}s{perplexity}.",
    ]


def _label_scores(summary: Mapping[str, Any]) -> list[str]:
    labels = label_table(summary)
    return ["", "## Held-out labels", "", *markdown_table(labels)] if labels else []


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    lost, lines = worse_off(summary), list[str]()
    if lost:
        lines += ["", f"**Not better than the base for: {markdown(', '.join(lost))}.**"]
    for text in budget_warnings(summary):
        lines += ["", f"**{text}**"]
    return lines


def _noise(run: RunConfig) -> str:
    """How the changes were protected, and what follows."""
    if run.privacy.is_at_client:
        return ", each with noise added by its client (see Privacy)"
    none = run.privacy.unit == "none"
    noise = (
        "without differential privacy" if none else "with noise only on their mean (see Privacy)"
    )
    return f" and {noise}, so whoever runs the server could learn about the rows from them"


def _privacy(summary: Mapping[str, Any]) -> list[str]:
    if (found := summary.get("privacy")) is None:
        return []
    return ["## Privacy", "", *(f"- {markdown(line)}" for line in privacy_lines(found)), ""]


def _predicted(summary: Mapping[str, Any]) -> list[str]:
    """Predicted and actual cost, with an empty line at the end; nothing if unknown."""
    if not (table := prediction_table(summary)):
        return []
    return [*markdown_table(table), "", *(f"- {note}" for note in prediction_notes(summary)), ""]


def _use(run: RunConfig, path: str) -> list[str]:
    ask = f'silotune ask {path} "your question"'
    return ["## Use", "", "```", ask, "```", "", *python_use(run), ""]


def _provenance(
    run: RunConfig, summary: Mapping[str, Any], provenance: Mapping[str, Any]
) -> list[str]:
    base = provenance["base"]
    return [
        "## Provenance",
        "",
        f"- data: {provenance['data']['path']}"
        # someone who knows all other rows could use the hash to test guesses for one row
        + ("" if "privacy" in summary else f", sha256 of all rows {provenance['data']['sha256']}"),
        f"- base: {base['name']}, sha256 {base['sha256']}",
        f"- adapter: sha256 {summary['adapter_sha256']}, after round {summary['result_round']}",
        f"- seed {run.seed}; recipe in `recipe.toml`, versions in `provenance.json`, every round "
        "and client in `metrics.jsonl`"
        + (" (not for publication)" if "privacy" in summary else ""),
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A header and rows as lines of Markdown."""
    header, *body = [[markdown(cell) for cell in row] for row in rows]
    return [_md(header), _md(["---"] * len(header)), *map(_md, body)]


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def what_is_trained(run: RunConfig) -> str:
    """The adapter in words."""
    a = run.adapter
    if a.kind == "full":
        return "all weights were trained"
    if a.kind in PROMPT_KINDS:
        return f"{a.kind} tuning with {a.virtual_tokens} trained vectors in front of the text"
    where = ", ".join(a.targets) if a.targets else "the default modules of the model family"
    if a.kind != "lora":
        return f"{a.peft.get('peft_type', 'IA3')} on {where}"
    name = ("DoRA" if a.dora else "LoRA") + (", rank-stabilised," if a.rslora else "")
    return f"{name} of rank {a.rank} (alpha {a.alpha:g}) on {where}"


def python_use(run: RunConfig) -> list[str]:
    """How to load the adapter, as lines of Markdown."""
    kind, more = "AutoModelForCausalLM", ""
    if run.task == "classify":
        kind = "AutoModelForSequenceClassification"
        more = f", num_labels={len(run.data.labels or ())}"
    if run.adapter.kind == "full":
        return [f"`adapter/` is a model folder for `{kind}.from_pretrained`."]
    return [
        "`adapter/` is a PEFT folder:",
        "",
        "```python",
        "from peft import PeftModel",
        "from silotune import base_folder",
        f"from transformers import {kind}",
        "",
        f'base = {kind}.from_pretrained(base_folder("{run.model.name}"){more})',
        'model = PeftModel.from_pretrained(base, "adapter")',
        "```",
    ]
