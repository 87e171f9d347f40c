"""The card of an export: what it is, how to load it, where it comes from.

The card is meant to be published. It contains counts, hashes and model names, but nothing that a
client wrote, no client's name and no path on this machine.
"""

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any, Literal

from silotune.core.wording import counted
from silotune.federation.privacy_statement import privacy_lines
from silotune.models.base import folder_of_base
from silotune.models.base_files import public_name
from silotune.models.gguf_write import GgufType
from silotune.models.sources import SOURCES
from silotune.recipes.schema import RunConfig
from silotune.results.card import how_hidden, is_on_hub, python_use, revision_in, what_is_trained
from silotune.results.published import published
from silotune.results.summary import loss_name, server_lines, unit_of

ExportKind = Literal["peft", "merged", "gguf"]
BASE = "base"
"""The folder of the base inside an export that has it."""


def export_card(
    run: RunConfig,
    summary: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    kind: ExportKind,
    gguf_type: GgufType,
    moved: float | None,
    client: str | None = None,
    with_base: bool = False,
) -> str:
    """README.md of an export: what it is, how to load it, where it comes from.

    Args:
        run: The resolved recipe.
        summary: summary.json.
        provenance: provenance.json.
        kind: What was exported.
        gguf_type: How a GGUF file stores matrices.
        moved: How far merging moved a logit, as a share of the largest; None without a merge.
        client: The client whose own adapter this is; its name is not in the card.
        with_base: Whether the base is in the folder `BASE` of the export.
    """
    rounding = rounding_note(provenance["dtype"], kind, gguf_type, is_merged=moved is not None)
    notes = [*_notes(run, provenance, moved, kind), *([rounding] if rounding else [])]
    summary = published(summary).summary
    return "\n".join(
        [
            *_heading(run, summary, provenance, kind),
            *(OF_A_CLIENT if client is not None else _results(summary)),
            *(line for note in notes for line in (note, "")),
            "## Use",
            "",
            *_use(run, revision_in(provenance), kind, gguf_type, with_base=with_base),
            "",
            "## Provenance",
            "",
            *_provenance(run, summary, provenance),
            "",
        ]
    )


OF_A_CLIENT = [
    "**This is not the result of the federation, but what one client has made of it**: after steps "
    "on its own rows, or with a head of its own, which never left the client. No privacy guarantee "
    "covers it: do not publish it. The SHA-256 below is that of the federation's result.",
    "",
]


def _heading(
    run: RunConfig, summary: Mapping[str, Any], provenance: Mapping[str, Any], kind: ExportKind
) -> list[str]:
    """Metadata for the hub, the title, and how the model was trained."""
    library = {"peft": "peft", "merged": "transformers", "gguf": "gguf"}[kind]
    licence, name = licence_of(run), public_name(run.model.name)
    described = provenance["base"]["description"] if run.model.name in SOURCES else name
    private = "privacy" in summary
    return [
        "---",
        f"library_name: {library}",
        *([f"base_model: {name}"] if is_on_hub(run) else []),
        *([f"license: {licence.lower()}"] if licence else []),
        "tags: [federated-learning, silotune]",
        "---",
        "",
        f"# {name}, fine-tuned by {counted(len(summary['clients']), 'client')}",
        "",
        f"{described}. {counted(summary['rounds'], 'round')} of {summary['algorithm']}; "
        f"{what_is_trained(run)}. The clients' rows were never pooled. Clients sent float32 "
        f"changes of the trained tensors, {how_hidden(run)} and "
        + ("with differential privacy:" if private else "without differential privacy."),
        "",
        *([f"- {line}" for line in privacy_lines(summary["privacy"])] if private else []),
        *([""] if private else []),
    ]


def _results(summary: Mapping[str, Any]) -> list[str]:
    """The clients' loss and the server's, if they are known and may be shown."""
    own = [f"{line[:1].upper()}{line[1:]}." for line in server_lines(summary)]
    before, after = (summary["overall"][f"{arm}_loss"] for arm in ("base", "federated"))
    if None in (before, after):
        return [*own, *([""] if own else [])]
    scored = f"{before:.4f} before, {after:.4f} after"
    name = loss_name(summary).capitalize()
    return [f"{name} across all clients: {scored}, in {unit_of(summary)}.", *own, ""]


def _provenance(
    run: RunConfig, summary: Mapping[str, Any], provenance: Mapping[str, Any]
) -> list[str]:
    base, clients = provenance["base"], list(summary["clients"].values())
    train = [client["num_train"] for client in clients]
    return [
        f"- clients: {len(clients)}; rows: {sum(train)} for training ({min(train)} to "
        f"{max(train)} per client), {sum(client['num_eval'] for client in clients)} "
        + ("for validation" if summary.get("scored") == "validation" else "held out")
        # someone who knows all other rows could use the hash to test guesses for one row
        + ("" if "privacy" in summary else f", sha256 of all {provenance['data']['sha256']}"),
        f"- rounds: {summary['rounds']} of {summary['algorithm']}; this is the result after round "
        f"{summary['result_round']}",
        f"- base: {public_name(run.model.name)}, sha256 {base['sha256']}"
        + (f", revision {revision}" if (revision := revision_in(provenance)) else "")
        + f"; licence {licence_of(run) or 'unknown: see its own card'}",
        f"- {'weights' if run.adapter.kind == 'full' else 'adapter'}: sha256 "
        f"{summary['adapter_sha256']}",
        f"- trained with silotune {provenance['versions']['silotune']}, exported with "
        f"{importlib.metadata.version('silotune')}; seed {run.seed}",
    ]


def licence_of(run: RunConfig) -> str | None:
    """The base's licence, as stated by its source or its own card."""
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
    """How the adapter was merged, and how the exported base differs from that of training."""
    notes: list[str] = []
    dtype, quantised = provenance["dtype"], run.model.quantization
    if moved is not None:
        rounded = "" if kind == "gguf" or dtype == "float32" else f", then rounded once to {dtype}"
        notes.append(
            f"The adapter was merged into the base ({dtype}) in float32{rounded}. Before rounding, "
            f"this changed the logits of a probe by at most {moved:.0e} of the largest logit."
        )
    if quantised != "none":
        here = "" if moved is None else "; this export uses the unquantised base"
        notes.append(
            f"**Training used the base in {quantised}{here}.** On another base, the scores are not "
            "those of the run."
        )
    return notes


def rounding_note(
    dtype: str, kind: ExportKind, gguf_type: GgufType, *, is_merged: bool
) -> str | None:
    """What rounding may change in the answers of an export; None if nothing is rounded.

    Args:
        dtype: The base's dtype in training, by name.
        kind: What was exported.
        gguf_type: How a GGUF file stores matrices.
        is_merged: Whether an adapter was merged into the base.
    """
    stored = {"merged": dtype if is_merged else "float32", "gguf": gguf_type}.get(kind, "float32")
    if stored in ("float32", "f32"):
        return None
    return (
        f"Weights with the adapter merged in are stored as {stored}. This rounding is not in "
        "`silotune ask`: an answer may differ from its where two tokens are almost equally likely. "
        + (
            "Nothing is rounded with --as peft."
            if kind == "merged"
            else "Nothing is rounded with --type f32 or --as peft."
        )
    )


def _auto_peft(run: RunConfig, *, with_base: bool) -> list[str]:
    """How `AutoPeftModel` loads an adapter, as lines of Markdown; it looks for the base itself."""
    if run.task == "classify" or run.adapter.kind == "full":
        return []  # it builds a head of another size
    call = 'AutoPeftModelForCausalLM.from_pretrained(".")'
    name = public_name(run.model.name)
    if with_base:
        return ["", f"`{call}`, in this folder, does the same."]
    if run.model.name not in SOURCES:
        where = "" if is_on_hub(run) else ", in this folder,"
        return ["", f"`{call}`{where} does the same."]
    find = f"import silotune; print(silotune.base_folder('{name}'))"
    return [
        "",
        f"The base `{name}` is not on the hub. For `{call}`, put it beside this adapter first "
        "(`silotune export RUN --with-base` writes a copy of it):",
        "",
        "```sh",
        f'ln -s "$(python -c "{find}")" {name}',
        "```",
    ]


def _use(
    run: RunConfig,
    revision: str | None,
    kind: ExportKind,
    gguf_type: GgufType,
    *,
    with_base: bool,
) -> list[str]:
    if kind == "peft":
        base = f"./{BASE}" if with_base else None
        use = python_use(run, revision, folder=".", base=base)
        return [*use, *_auto_peft(run, with_base=with_base)]
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
    """The name of the file in a GGUF export."""
    return f"model-{kind}.gguf"
