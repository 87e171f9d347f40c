"""A finished run as one self-contained HTML page: no script, no request.

This file gathers the numbers. charts.py draws them, verdicts.py puts them into words, and
html/report.html arranges them. The template escapes all data: names, questions, answers, recipe.
"""

import datetime
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from silotune.core.safe_text import plain
from silotune.core.wording import counted
from silotune.federation.metrics import Row, held_out_losses, server_losses, server_set
from silotune.federation.privacy_statement import privacy_lines
from silotune.models.base_files import public_name
from silotune.models.sources import SOURCES
from silotune.recipes.parse import to_toml
from silotune.recipes.schema import RunConfig
from silotune.results import charts
from silotune.results.budget_texts import budget_lines, budget_warnings
from silotune.results.card import python_use, revision_in, without_folders
from silotune.results.charts import Interval, Split
from silotune.results.conflict import conflict_lines
from silotune.results.published import published
from silotune.results.run_tables import prediction_notes, prediction_table
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

Samples = Sequence[Mapping[str, Any]]
"""client, question, reference, and answers by name ("base", "federated", ...)."""
_PATH = re.compile(r'"[/~][^"\n]*/([^"/\n]+)/?"')
"""In a recipe: a text that is a path from this machine's root or from a home folder."""


class Drawing(NamedTuple):
    """A chart with its caption."""

    title: str
    svg: str
    note: str = ""


def run_page(
    run: RunConfig,
    summary: Mapping[str, Any],
    rows: Sequence[Row],
    provenance: Mapping[str, Any],
    *,
    split: Split,
    samples: Samples,
) -> str:
    """Build the page of one run.

    Args:
        run: The resolved recipe.
        summary: summary.json, from `summary.summarise`.
        rows: metrics.jsonl.
        provenance: provenance.json.
        split: Rows, lengths and labels of each client; may be empty or lack clients.
        samples: Questions with their answers; may be empty.

    Returns:
        HTML.
    """
    summary, rows, split, samples = published(summary, rows, split, samples)
    header, *table = loss_table(summary)  # with hyphens, because terminals show it too
    lost = worse_off(summary)
    warnings = [f"Not better than the base for: {', '.join(lost)}."] if lost else []
    warnings += [*conflict_lines(summary), *budget_warnings(summary)]
    return render(
        "report.html",
        kind="run",
        numbers=["metrics.jsonl", "summary.json"],
        title=f"{public_name(run.model.name)}, fine-tuned by "
        f"{counted(len(summary['clients']), 'client')}",
        subtitle=f"{counted(summary['rounds'], 'round')} of {summary['algorithm']}, result after "
        f"round {summary['result_round']}",
        verdict=[run_verdict(summary)],
        warnings=warnings,
        notes=[
            *notes_of(run),
            *extension_lines(summary),
            *unused_rows(run, summary, split),
            *budget_lines(summary),
        ],
        loss_name=loss_name(summary),
        part=summary.get("scored", "held-out"),
        server_lines=[f"{capitalised(line)}." for line in server_lines(summary)],
        loss_header=header,
        loss_rows=[(name, *(typeset(cell) for cell in cells)) for name, *cells in table],
        lost=lost,
        scored=is_scored(summary),
        unit=unit_of(summary),
        label_table=label_table(summary),
        scored_what="pairs" if run.task == "prefer" else "labels",
        own_table=[(name, *map(typeset, cells)) for name, *cells in own_table(summary)],
        loss_charts=drawn(_loss_charts(rows, unit_of(summary), loss_name(summary))),
        cost_lines=[*cost_lines(summary), *own_lines(summary)],
        prediction_table=[
            (name, *map(typeset, cells)) for name, *cells in prediction_table(summary)
        ],
        prediction_notes=prediction_notes(summary),
        privacy_lines=privacy_lines(summary["privacy"]) if "privacy" in summary else [],
        cost_charts=drawn(
            _cost_charts(rows, summary["rounds"], charts.biggest(summary["clients"]))
        ),
        use=_use(run, provenance),
        **shared_parts(run, provenance, split, samples),
        adapter_sha256=summary["adapter_sha256"],
    )


def capitalised(text: str) -> str:
    """The text with its first letter capitalized."""
    return text[:1].upper() + text[1:]


def better(metric: Mapping[str, Any]) -> str:
    """Which way a metric improves, in words."""
    return "lower is better" if metric["lower_is_better"] else "higher is better"


# --- charts -----------------------------------------------------------------------------------


def _loss_charts(rows: Sequence[Row], unit: str, name: str) -> list[Drawing]:
    held_out = _by_client(rows, "evaluate", "loss")
    training = _by_client(rows, "train", "train_loss")
    overall = {r: loss for r, loss in held_out_losses(rows).items() if math.isfinite(loss)}
    return [
        Drawing(capitalised(name), charts.held_out_loss(held_out, overall, unit, name)),
        Drawing("Training loss", charts.training_loss(training, unit)),
        _server_chart(rows, unit),
    ]


def _server_chart(rows: Sequence[Row], unit: str) -> Drawing:
    losses, name = server_losses(rows), server_set(rows)
    drawing = charts.held_out_loss({name: losses}, {}, unit, "loss") if losses else ""
    return Drawing(f"Loss on the {name}", drawing)


def _cost_charts(rows: Sequence[Row], rounds: int, shown: Sequence[str]) -> list[Drawing]:
    down: dict[int, float] = {}
    up: dict[int, float] = {}
    for row in rows:
        # the adapter after round r is sent in round r + 1; the last one is sent only for scoring
        at = min(row["round"] + (row["event"] == "evaluate"), rounds)
        down[at] = down.get(at, 0) + row.get("bytes_down", 0)
        up[at] = up.get(at, 0) + row.get("bytes_up", 0)
    training, total = (
        _by_client(rows, "train", "seconds_training"),
        _by_client(rows, "train", "seconds"),
    )
    inside = {name: sum(training[name].values()) for name in shown if name in training}
    other = {name: max(0.0, sum(total.get(name, {}).values()) - s) for name, s in inside.items()}
    note = "Sending the last adapter to the clients for scoring counts in the last round."
    return [
        Drawing("Traffic per round", charts.bytes_per_round(down, up), note),
        Drawing("Time per client", charts.seconds_per_client(inside, other)),
    ]


def _split_charts(split: Split) -> list[Drawing]:
    shown = {name: split[name] for name in charts.biggest(split)}
    some = len(shown) < len(split)
    note = f"The {len(shown)} clients with the most rows, of {len(split)}. " if some else ""
    box = "Box: the middle 50 % of rows, with the median; whiskers: 5 % and 95 %."
    return [
        Drawing("Rows", charts.rows_per_client(shown), note),
        Drawing("Labels", charts.labels_per_client(shown), note),
        Drawing("Lengths", charts.tokens_per_client(shown), note + box),
    ]


def _by_client(rows: Sequence[Row], event: str, key: str) -> dict[str, dict[int, float]]:
    """One number from every client's rows, by client and round; missing and NaN are left out."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["event"] == event and math.isfinite(row.get(key, math.nan)):
            found.setdefault(row["client"], {})[row["round"]] = row[key]
    return dict(sorted(found.items()))


def only_finite(given: Mapping[str, Interval], arms: Iterable[str]) -> dict[str, Interval]:
    """The numbers of these arms that can be drawn."""
    numbers = {
        arm: {k: v for k, v in given[arm].items() if v is not None and math.isfinite(v)}
        for arm in arms
        if given.get(arm)
    }
    return {arm: found for arm, found in numbers.items() if "mean" in found}


def drawn(drawings: Iterable[Drawing]) -> list[Drawing]:
    """The drawings that are not empty."""
    return [drawing for drawing in drawings if drawing.svg]


# --- tables and words -------------------------------------------------------------------------


def shared_parts(
    run: RunConfig, provenance: Mapping[str, Any], split: Split, samples: Samples
) -> dict[str, Any]:
    """The parts at the end of both pages."""
    return {
        "samples": samples,
        "split": split,
        "has_validation": any(own.get("num_validation") for own in split.values()),
        "split_charts": drawn(_split_charts(split)),
        "recipe": _PATH.sub(r'"\1"', to_toml(run)),
        "seed": run.seed,
        "made": _made(provenance),
        "provenance": _for_others(run, provenance),
        "rows_sha256": rows_sha256(run, provenance),
    }


def _made(provenance: Mapping[str, Any]) -> str:
    """From which recipe, and when; empty if that is unknown."""
    name, day = provenance.get("recipe"), provenance.get("date")
    if not name or not day:
        return ""
    date = datetime.date.fromisoformat(day)
    return f"Recipe {name}, {date.day} {date:%B %Y}."


def _for_others(run: RunConfig, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """provenance.json without the folders of this machine."""
    base, data = provenance["base"], provenance["data"]
    if run.model.name not in SOURCES:
        base = {**base, "description": public_name(run.model.name)}
    return {
        **provenance,
        "run": without_folders(provenance["run"]),
        "base": {**base, "revision": revision_in(provenance)},
        "data": {**data, "path": without_folders(data["path"])},
    }


def rows_sha256(run: RunConfig, provenance: Mapping[str, Any]) -> str | None:
    """The hash of all rows; None under [privacy], where it would let others test guesses."""
    return provenance["data"]["sha256"] if run.privacy.unit == "none" else None


def _use(run: RunConfig, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The usage lines of the model card, as words and code."""
    words, _, code = "\n".join(
        python_use(run, revision_in(provenance), folder="adapter")
    ).partition("```python")
    return {
        "ask": f'silotune ask {without_folders(provenance["run"])} "your question"',
        "words": words.replace("`", "").strip(),
        "python": code.strip().removesuffix("```").strip(),
    }


def typeset(cell: str) -> str:
    """A table cell with a real minus sign, and a dash for no value."""
    return "–" if cell == "-" else cell.replace("-", "−")


def render(template: str, **page: Any) -> str:
    """Fill one of the package's templates; all data is escaped, and reorders no text."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.PackageLoader("silotune.results", "html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return plain(env.get_template(template).render(page))
