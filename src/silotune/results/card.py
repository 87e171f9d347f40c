"""A run as Markdown: the numbers of its page, without rows and answers.

A card is meant to be published with an adapter, so it contains nothing that a client wrote.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silotune.core.safe_text import markdown, plain
from silotune.core.wording import counted
from silotune.federation.metrics import Row
from silotune.federation.privacy_statement import privacy_lines
from silotune.models.adapters import PROMPT_KINDS
from silotune.models.base_files import public_name, public_reference
from silotune.models.loading import LABELS
from silotune.models.sources import SOURCES
from silotune.recipes.schema import RunConfig
from silotune.results.budget_texts import budget_lines, budget_warnings
from silotune.results.conflict import conflict_lines
from silotune.results.published import published
from silotune.results.run_tables import prediction_notes, prediction_table, round_table, split_table
from silotune.results.summary import (
    cost_lines,
    extension_lines,
    is_scored,
    label_table,
    loss_name,
    loss_table,
    notes_of,
    own_lines,
    own_table,
    server_lines,
    unit_of,
    unused_rows,
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
            *_heading(run, summary),
            *_results(summary),
            *_label_scores(summary),
            *(
                line
                for said in server_lines(summary)
                for line in ("", f"{said[:1].upper()}{said[1:]}.")
            ),
            *_own_steps(summary),
            *_warnings(summary),
            "",
            "## Rounds",
            "",
            *markdown_table(round_table(rows)),
            "",
            *(["## Clients", "", *markdown_table(split_table(split)), ""] if split else []),
            *(part for text in unused_rows(run, summary, split) for part in (markdown(text), "")),
            "## Cost",
            "",
            *(f"- {line}" for line in [*budget_lines(summary), *cost_lines(summary)]),
            *(f"- {markdown(line)}" for line in own_lines(summary)),
            "",
            *_predicted(summary),
            *_privacy(summary),
            *_use(run, provenance),
            *_provenance(run, summary, provenance),
            "",
        ]
    )
    return plain(lines)


def _heading(run: RunConfig, summary: Mapping[str, Any]) -> list[str]:
    """Metadata for the hub, the title, how the model was trained, and the verdict."""
    name = public_name(run.model.name)
    described = SOURCES[name].what if name in SOURCES else name
    return [
        "---",
        f"library_name: {'transformers' if run.adapter.kind == 'full' else 'peft'}",
        *([f"base_model: {name}"] if is_on_hub(run) else []),
        "tags: [federated-learning, silotune]",
        "---",
        "",
        f"# {name}, fine-tuned by {counted(len(summary['clients']), 'client')}",
        "",
        f"{described}. {counted(summary['rounds'], 'round')} of {summary['algorithm']}; "
        f"{what_is_trained(run)}. The clients' rows were never pooled. Clients sent float32 "
        f"changes of the trained tensors, {how_hidden(run)}{_noise(run)}.",
        "",
        run_verdict(summary),
        "",
        *(line for note in [*notes_of(run), *extension_lines(summary)] for line in (note, "")),
    ]


def _own_steps(summary: Mapping[str, Any]) -> list[str]:
    """The scores of clients that have gone on by themselves."""
    if not (table := own_table(summary)):
        return []
    title = f"## After each client's own steps ({unit_of(summary)}, lower is better)"
    return ["", title, "", *markdown_table(table)]


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
        f"## {loss_name(summary).capitalize()} ({unit}, lower is better)",
        "",
        *table,
        "",
        f"Each client is scored on its own {summary.get('scored', 'held-out')} rows; the last line "
        f"is weighted by {unit.rsplit(' ', 1)[1]}s{perplexity}.",
    ]


def _label_scores(summary: Mapping[str, Any]) -> list[str]:
    labels = label_table(summary)
    what = "pairs" if summary.get("task") == "prefer" else "labels"
    title = f"## {str(summary.get('scored', 'held-out')).capitalize()} {what}"
    return ["", title, "", *markdown_table(labels)] if labels else []


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    lost, lines = worse_off(summary), list[str]()
    if lost:
        lines += ["", f"**Not better than the base for: {markdown(', '.join(lost))}.**"]
    for text in (*conflict_lines(summary), *budget_warnings(summary)):
        lines += ["", f"**{text}**"]
    return lines


def how_hidden(run: RunConfig) -> str:
    """Whether single changes could be read by whoever ran the server."""
    return {
        "none": "without secure aggregation",
        "masks": "under masks that cancel in their sum",
        "ckks": "encrypted under a key that all clients share",
    }[run.secure_sum.kind]


def _noise(run: RunConfig) -> str:
    """How the changes were protected, and what follows."""
    if run.privacy.is_at_client:
        return ", each with noise added by its client (see Privacy)"
    none = run.privacy.unit == "none"
    noise = (
        "without differential privacy" if none else "with noise only on their mean (see Privacy)"
    )
    seen = "their sum" if run.secure_sum.is_on else "them"
    return f" and {noise}, so whoever runs the server could learn about the rows from {seen}"


def _privacy(summary: Mapping[str, Any]) -> list[str]:
    if (found := summary.get("privacy")) is None:
        return []
    return ["## Privacy", "", *(f"- {markdown(line)}" for line in privacy_lines(found)), ""]


def _predicted(summary: Mapping[str, Any]) -> list[str]:
    """Predicted and actual cost, with an empty line at the end; nothing if unknown."""
    if not (table := prediction_table(summary)):
        return []
    return [*markdown_table(table), "", *(f"- {note}" for note in prediction_notes(summary)), ""]


def _use(run: RunConfig, provenance: Mapping[str, Any]) -> list[str]:
    ask = f'silotune ask {without_folders(provenance["run"])} "your question"'
    if run.algorithm.facts.keeps:  # the adapter alone answers like the base
        return ["## Use", "", "```", f"{ask} --client NAME", "```", ""]
    code = python_use(run, revision_in(provenance), folder="adapter")
    return ["## Use", "", "```", ask, "```", "", *code, ""]


def _provenance(
    run: RunConfig, summary: Mapping[str, Any], provenance: Mapping[str, Any]
) -> list[str]:
    base = provenance["base"]
    return [
        "## Provenance",
        "",
        f"- data: {without_folders(provenance['data']['path'])}"
        # someone who knows all other rows could use the hash to test guesses for one row
        + ("" if "privacy" in summary else f", sha256 of all rows {provenance['data']['sha256']}"),
        f"- base: {public_name(run.model.name)}, sha256 {base['sha256']}"
        + (f", revision {revision}" if (revision := revision_in(provenance)) else ""),
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


def is_on_hub(run: RunConfig) -> bool:
    """Whether the base has a name that everyone can load it by."""
    return run.model.name not in SOURCES and public_name(run.model.name) == run.model.name


def revision_in(provenance: Mapping[str, Any]) -> str | None:
    """The commit of the base, or what the recipe says; None for a base that is not on the hub."""
    base = provenance["base"]
    return base.get("commit") or base.get("revision")  # earlier runs did not record the commit


def without_folders(path: str) -> str:
    """A path for others: one that begins at this machine's root or home loses its folders."""
    at = Path(path)
    return at.name if at.is_absolute() or path.startswith("~") or ".." in at.parts else path


def python_use(
    run: RunConfig, revision: str | None, *, folder: str, base: str | None = None
) -> list[str]:
    """How to load the adapter, as lines of Markdown that end with code.

    Args:
        run: The resolved recipe.
        revision: Of a base on the hub; see `revision_in`.
        folder: Where the adapter is, seen from the card.
        base: Where a copy of the base is, seen from the card, if there is one.
    """
    place = "This" if folder == "." else f"`{folder}/`"
    head = "SequenceClassification" if run.task == "classify" else "CausalLM"
    if run.adapter.kind == "full":
        return [f"{place} is a model folder for `AutoModelFor{head}.from_pretrained`."]
    name = base or public_reference(run.model.name)
    found, more = json.dumps(name, ensure_ascii=False), list[str]()
    words = f"{place} is a PEFT folder:"
    is_source = base is None and run.model.name in SOURCES
    if base is not None:
        words = f"{place} is a PEFT folder with a copy of its base in `{base}`:"
    elif is_source:
        found = f"base_folder({found})"
    elif is_on_hub(run):
        more = [f'revision="{revision}"'] if revision else []
    else:
        words = (
            f"{place} is a PEFT folder. Its base is not on the hub: put the folder that has the "
            f"sha256 under Provenance (of config.json and *.safetensors), or a link to it, at "
            f"`{name}`."
        )
    if run.task == "classify":
        more += ["id2label=dict(enumerate(labels))"]
        more += ["label2id={name: n for n, name in enumerate(labels)}"]
        more += ["ignore_mismatched_sizes=True"]  # the adapter brings its own head
    call = f"AutoModelFor{head}.from_pretrained("
    return [
        words,
        "",
        "```python",
        *(["import json", "from pathlib import Path", ""] if run.task == "classify" else []),
        "from peft import PeftModel",
        *(["from silotune import base_folder"] if is_source else []),
        f"from transformers import AutoModelFor{head}, AutoTokenizer",
        "",
        *_labels_line(run, folder),
        *(
            [f"base = {call}", f"    {found},", *(f"    {option}," for option in more), ")"]
            if len(more) > 1
            else [f"base = {call}{', '.join([found, *more])})"]
        ),
        f'model = PeftModel.from_pretrained(base, "{folder}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
        "```",
    ]


def _labels_line(run: RunConfig, folder: str) -> list[str]:
    if run.task != "classify":
        return []
    file = f"{folder}/{LABELS}".removeprefix("./")
    return [
        f'labels = json.loads(Path("{file}").read_text("utf-8"))  # in the order of the classes'
    ]
