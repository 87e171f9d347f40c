"""The card of an export: what it is, how it is loaded, where it comes from.

It is made to be published: it holds counts, hashes and names of models, nothing that a client wrote
or is called, and no path of this machine.
"""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from silotune.federation.privacy_statement import privacy_lines
from silotune.models.gguf_write import GgufType
from silotune.models.loading import folder_of_base
from silotune.models.sources import SOURCES, is_hub_id
from silotune.recipes.schema import RunConfig
from silotune.results.card import python_use, what_is_trained
from silotune.results.summary import unit_of

ExportKind = Literal["peft", "merged", "gguf"]


def export_card(
    run: RunConfig,
    summary: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    kind: ExportKind,
    gguf_type: GgufType,
    moved: float | None,
) -> str:
    """README.md of an export: what it is, how it is loaded, where it comes from.

    Args:
        run: The resolved recipe.
        summary: summary.json.
        provenance: provenance.json.
        kind: What was exported.
        gguf_type: How a GGUF file stores matrices.
        moved: How far merging moved a logit, as a share of the largest; None without a merge.
    """
    base, clients = provenance["base"], list(summary["clients"].values())
    library = {"peft": "peft", "merged": "transformers", "gguf": "gguf"}[kind]
    licence, name = licence_of(run), base_name(run)
    train = [client["num_train"] for client in clients]
    before, after = (summary["overall"][f"{arm}_loss"] for arm in ("base", "federated"))
    # a private run's losses have no noise: what leaves this machine does not tell them
    secret = None in (before, after) or "privacy" in summary
    scored = "" if secret else f"{before:.4f} before, {after:.4f} after, "
    described = base["description"] if run.model.name in SOURCES else name
    private = (
        [f"- {line}" for line in privacy_lines(summary["privacy"])] + [""]
        if "privacy" in summary
        else []
    )
    lines = [
        "---",
        f"library_name: {library}",
        *([f"base_model: {name}"] if is_hub_id(run.model.name) else []),
        *([f"license: {licence.lower()}"] if licence else []),
        "tags: [federated-learning, silotune]",
        "---",
        "",
        f"# {name}, fine-tuned by {len(clients)} clients",
        "",
        f"{described}. Rounds of {summary['algorithm']}: {summary['rounds']}; "
        f"{what_is_trained(run)}. The clients' rows were never pooled; what travelled were "
        "float32 changes of the trained tensors, without secure aggregation and "
        + ("with differential privacy:" if private else "without differential privacy."),
        "",
        *private,
        *([f"Held-out loss of all clients: {scored}in {unit_of(summary)}.", ""] if scored else []),
        *(line for note in _notes(run, provenance, moved, kind) for line in (note, "")),
        "## Use",
        "",
        *_use(run, kind, gguf_type),
        "",
        "## Provenance",
        "",
        f"- clients: {len(clients)}; rows: {sum(train)} to train on (a client has {min(train)} to "
        f"{max(train)}), {sum(client['num_eval'] for client in clients)} held out"
        # whoever knows all rows but one could try that one out
        + ("" if private else f", sha256 of all {provenance['data']['sha256']}"),
        f"- rounds: {summary['rounds']} of {summary['algorithm']}; this is the result after round "
        f"{summary['result_round']}",
        f"- base: {name}, sha256 {base['sha256']}"
        + (f", revision {base['revision']}" if base["revision"] else "")
        + f"; licence {licence or 'not known here: see its own card'}",
        f"- {'weights' if run.adapter.kind == 'full' else 'adapter'}: sha256 "
        f"{summary['adapter_sha256']}",
        f"- trained with silotune {provenance['versions']['silotune']}, exported with "
        f"{importlib.metadata.version('silotune')}; seed {run.seed}",
    ]
    return "\n".join(lines) + "\n"


def base_name(run: RunConfig) -> str:
    """The base's name for others: of a folder on this machine only the last part."""
    name = run.model.name
    return name if name in SOURCES or is_hub_id(name) else Path(name).expanduser().resolve().name


def licence_of(run: RunConfig) -> str | None:
    """The base's licence as its source or its own card states it."""
    if run.model.name in SOURCES:
        return SOURCES[run.model.name].licence
    card = folder_of_base(run.model) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    found = re.search(r"^license:\s*['\"]?([\w.+-]+)", front[1] if front else "", re.MULTILINE)
    return found[1] if found else None


def _notes(
    run: RunConfig, provenance: Mapping[str, Any], moved: float | None, kind: ExportKind
) -> list[str]:
    """What became of the adapter, and what training saw instead."""
    notes: list[str] = []
    dtype, quantised = provenance["dtype"], run.model.quantization
    if moved is not None:
        rounded = "" if kind == "gguf" or dtype == "float32" else f", then rounded to {dtype} once"
        notes.append(
            f"The adapter was merged into the base ({dtype}) in float32{rounded}. Before any "
            f"rounding this moved the logits of a probe by {moved:.0e} of the largest at most."
        )
    if quantised != "none":
        here = "" if moved is None else ", and this is the base that is not quantised"
        notes.append(
            f"**Training saw the base in {quantised}{here}.** On another base its scores are not "
            "those of the run."
        )
    return notes


def _use(run: RunConfig, kind: ExportKind, gguf_type: GgufType) -> list[str]:
    if kind == "peft":  # the run's card speaks of its own folder, and of the base's place
        text = "\n".join(python_use(run)).replace(f'"{run.model.name}"', f'"{base_name(run)}"')
        return text.replace('"adapter"', '"."').replace("`adapter/`", "This").splitlines()
    if kind == "gguf":
        name = gguf_name(gguf_type)
        return [
            "```sh",
            f"llama-cli -m {name}",
            "```",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained(".", gguf_file="{name}")',
            "```",
        ]
    head = "SequenceClassification" if run.task == "classify" else "CausalLM"
    return [
        "```python",
        f"from transformers import AutoModelFor{head}, AutoTokenizer",
        "",
        f'model = AutoModelFor{head}.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
    ]


def gguf_name(kind: GgufType) -> str:
    """The file in a GGUF export."""
    return f"model-{kind}.gguf"
