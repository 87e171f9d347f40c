"""A finished run, or a comparison, as one HTML page that stands alone: no script, no request.

Gathers the numbers; charts.py draws, verdicts.py words, and templates/report.html lays out.
Everything that is data (names, questions, answers, recipe) is escaped by the template.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from silotune import charts
from silotune.card import python_use
from silotune.charts import Interval, Split
from silotune.comparison import AGAINST, against_table, cost_table
from silotune.config import RunConfig, to_toml
from silotune.promise import privacy_lines
from silotune.report import (
    budget_lines,
    budget_warnings,
    cost_lines,
    is_scored,
    label_table,
    loss_table,
    prediction_notes,
    prediction_table,
    unit_of,
    worse_off,
)
from silotune.store import Row, held_out_losses
from silotune.verdicts import (
    comparison_verdict,
    gain,
    interval,
    num_clients,
    run_verdict,
    signed,
    worse_off_warnings,
)

Samples = Sequence[Mapping[str, Any]]
"""client, question, reference, and answers by name ("base", "federated", ...)."""
MEAN = "mean over clients"
SIGNS = {"gained": "▲", "lost": "▼", "no clear difference": "≈", "too few rows": "?"}
"""A verdict is told by its sign and its word, not by its colour alone."""


class Drawing(NamedTuple):
    """A chart, and what is said beside it."""

    title: str
    svg: str
    note: str = ""


class ScoreRow(NamedTuple):
    """One arm's line in a comparison's table, in words."""

    arm: str
    score: str
    difference: str
    verdict: str


def run_page(
    run: RunConfig,
    summary: Mapping[str, Any],
    rows: Sequence[Row],
    provenance: Mapping[str, Any],
    *,
    split: Split,
    samples: Samples,
) -> str:
    """The page of one run.

    Args:
        run: The resolved recipe.
        summary: summary.json, as from `report.summarise`.
        rows: metrics.jsonl.
        provenance: provenance.json.
        split: Rows, lengths and labels of each client; may be empty or lack clients.
        samples: Answers side by side; may be empty.

    Returns:
        HTML.
    """
    header, *table = loss_table(summary)  # with hyphens: it is for terminals too
    lost = worse_off(summary)
    warnings = [f"Not better than the base for: {', '.join(lost)}."] if lost else []
    warnings += budget_warnings(summary)
    return render(
        "report.html",
        kind="run",
        title=f"{provenance['base']['name']}, fine-tuned by {num_clients(summary['clients'])}",
        subtitle=f"{summary['rounds']} rounds of {summary['algorithm']}, result after round "
        f"{summary['result_round']}",
        verdict=[run_verdict(summary)],
        warnings=warnings,
        notes=[*([run.report.note] if run.report.note else []), *budget_lines(summary)],
        loss_header=header,
        loss_rows=[(name, *(_typeset(cell) for cell in cells)) for name, *cells in table],
        lost=lost,
        scored=is_scored(summary),
        unit=unit_of(summary),
        label_table=label_table(summary),
        loss_charts=_drawn(_loss_charts(rows, unit_of(summary))),
        cost_lines=cost_lines(summary),
        prediction_table=[
            (name, *map(_typeset, cells)) for name, *cells in prediction_table(summary)
        ],
        prediction_notes=prediction_notes(summary),
        privacy_lines=privacy_lines(summary["privacy"]) if "privacy" in summary else [],
        cost_charts=_drawn(
            _cost_charts(rows, summary["rounds"], charts.biggest(summary["clients"]))
        ),
        use=_use(run, provenance),
        **_shared(run, provenance, split, samples),
        adapter_sha256=summary["adapter_sha256"],
    )


def comparison_page(
    comparison: Mapping[str, Any],
    *,
    run: RunConfig,
    provenance: Mapping[str, Any],
    split: Split,
    samples: Samples,
) -> str:
    """The page of a comparison: every arm against training alone.

    Args:
        comparison: seeds, base_name, result, metrics, arms, clients, overall, worse_off
            and notes.
        run: The recipe of the result.
        provenance: As in a run.
        split: As in a run.
        samples: As in a run.

    Returns:
        HTML.
    """
    result, seeds = comparison["result"], comparison["seeds"]
    # first, and not to be replaced by a client of that name
    groups = {MEAN: {}, **comparison["clients"]} | {MEAN: comparison["overall"]}
    return render(
        "report.html",
        kind="comparison",
        title=f"Was it worth joining? {comparison['base_name']}, "
        f"{num_clients(comparison['clients'])}",
        subtitle=f"{'up to ' if run.budget.bytes or run.budget.hours else ''}{run.rounds} rounds, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} "
        f"{', '.join(map(str, seeds))}",
        verdict=comparison_verdict(comparison),
        against_title=AGAINST,
        against=[
            (metric["label"], table[0], [[n, *map(_typeset, cells)] for n, *cells in table[1:]])
            for key, metric in comparison["metrics"].items()
            if (table := against_table(comparison, key))
        ],
        client_verdicts=[
            (name, [gain(c, key, comparison) for key in comparison["metrics"]])
            for name, c in comparison["clients"].items()
        ],
        warnings=worse_off_warnings(comparison),
        notes=comparison["notes"],
        result=result,
        metrics=[
            {
                "label": _capital(metric["label"]),
                "unit": metric["unit"],
                "better": _better(metric),
                "groups": [
                    (name, _score_rows(group, key, metric, comparison["arms"]))
                    for name, group in groups.items()
                ],
                "charts": _drawn(_score_charts(groups, key, metric, comparison)),
            }
            for key, metric in comparison["metrics"].items()
        ],
        signs=SIGNS,
        cost_table=[
            [name, *(cell.replace(",", " ") for cell in cells)]
            for name, *cells in cost_table(comparison)
        ],
        **_shared(run, provenance, split, samples),
        adapter_sha256=None,
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _better(metric: Mapping[str, Any]) -> str:
    return "lower is better" if metric["lower_is_better"] else "higher is better"


# --- charts -----------------------------------------------------------------------------------


def _loss_charts(rows: Sequence[Row], unit: str) -> list[Drawing]:
    held_out = _by_client(rows, "evaluate", "loss")
    training = _by_client(rows, "train", "train_loss")
    overall = {r: loss for r, loss in held_out_losses(rows).items() if math.isfinite(loss)}
    return [
        Drawing("Held-out loss", charts.held_out_loss(held_out, overall, unit)),
        Drawing("Training loss", charts.training_loss(training, unit)),
    ]


def _cost_charts(rows: Sequence[Row], rounds: int, shown: Sequence[str]) -> list[Drawing]:
    down: dict[int, float] = {}
    up: dict[int, float] = {}
    for row in rows:
        # the adapter after round r travels in round r + 1; the last one is scored by itself
        at = min(row["round"] + (row["event"] == "evaluate"), rounds)
        down[at] = down.get(at, 0) + row.get("bytes_down", 0)
        up[at] = up.get(at, 0) + row.get("bytes_up", 0)
    training, whole = (
        _by_client(rows, "train", "seconds_training"),
        _by_client(rows, "train", "seconds"),
    )
    inside = {name: sum(training[name].values()) for name in shown if name in training}
    other = {name: max(0.0, sum(whole.get(name, {}).values()) - s) for name, s in inside.items()}
    note = "The last adapter's way to the clients for scoring counts in the last round."
    return [
        Drawing("Traffic per round", charts.bytes_per_round(down, up), note),
        Drawing("Time per client", charts.seconds_per_client(inside, other)),
    ]


def _split_charts(split: Split) -> list[Drawing]:
    shown = {name: split[name] for name in charts.biggest(split)}
    some = len(shown) < len(split)
    note = f"The {len(shown)} clients with the most rows, of {len(split)}. " if some else ""
    box = "Box: the middle half, with the median; whiskers: 5 % and 95 % of the rows."
    return [
        Drawing("Rows", charts.rows_per_client(shown), note),
        Drawing("Labels", charts.labels_per_client(shown), note),
        Drawing("Lengths", charts.tokens_per_client(shown), note + box),
    ]


def _score_charts(
    groups: Mapping[str, Any], key: str, metric: Mapping[str, Any], comparison: Mapping[str, Any]
) -> list[Drawing]:
    clients = comparison["clients"]
    names = [MEAN, *charts.biggest(clients, charts.MAX_GROUPS)]
    some = len(names) <= len(clients)
    note = f"The {len(names) - 1} clients with the most rows, of {len(clients)}. " if some else ""
    arms = list(comparison["arms"])
    lone = {arm for arm in arms if arm.startswith("only ")}
    if len(arms) > charts.MAX_LINES:  # one more for every client: too many to tell apart
        shown = [arm for arm in arms if arm not in lone]
        note += "Adapters of single clients are in the table only. "
    else:
        shown = arms
    # the base is far from all others, which would squeeze their differences into one point
    apart = [arm for arm in arms if arm != "base" and arm not in lone]
    scores = {name: _finite(groups[name]["scores"].get(key, {}), shown) for name in names}
    gaps = {name: _finite(groups[name]["differences"].get(key, {}), apart) for name in names}
    label, unit, title = metric["label"], metric["unit"], _capital(metric["label"])
    return [
        Drawing(
            f"{title}: every arm",
            charts.scores(scores, arms, metric=label, x_label=f"{label} ({unit})"),
            f"{note}Dot: mean; line: 95\u00a0% interval; {_better(metric)}.",
        ),
        Drawing(
            f"{title}: difference to training alone",
            charts.differences(gaps, arms, metric=label, x_label=f"arm minus local ({unit})"),
            f"{note}Left of zero is {'better' if metric['lower_is_better'] else 'worse'}.",
        ),
    ]


def _by_client(rows: Sequence[Row], event: str, key: str) -> dict[str, dict[int, float]]:
    """A number of every client's rows by round, without those that are no number."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["event"] == event and math.isfinite(row.get(key, math.nan)):
            found.setdefault(row["client"], {})[row["round"]] = row[key]
    return dict(sorted(found.items()))


def _finite(given: Mapping[str, Interval], arms: Iterable[str]) -> dict[str, Interval]:
    """What can be drawn of some arms."""
    numbers = {
        arm: {k: v for k, v in given[arm].items() if v is not None and math.isfinite(v)}
        for arm in arms
        if given.get(arm)
    }
    return {arm: found for arm, found in numbers.items() if "mean" in found}


def _drawn(drawings: Iterable[Drawing]) -> list[Drawing]:
    return [drawing for drawing in drawings if drawing.svg]


# --- tables and words -------------------------------------------------------------------------


def _score_rows(
    group: Mapping[str, Any], key: str, metric: Mapping[str, Any], arms: Iterable[str]
) -> list[ScoreRow]:
    scores, gaps = group["scores"].get(key, {}), group["differences"].get(key, {})
    verdicts, plain = group["verdicts"].get(key, {}), f".{metric['digits']}f"
    return [
        ScoreRow(
            arm,
            interval(scores.get(arm), plain),
            interval(gaps.get(arm), signed(metric)),
            verdicts.get(arm, ""),
        )
        for arm in arms
    ]


def _shared(
    run: RunConfig, provenance: Mapping[str, Any], split: Split, samples: Samples
) -> dict[str, Any]:
    """What both pages end with."""
    return {
        "samples": samples,
        "split": split,
        "split_charts": _drawn(_split_charts(split)),
        "recipe": to_toml(run),
        "seed": run.seed,
        "provenance": provenance,
        "rows_sha256": rows_sha256(run, provenance),
    }


def rows_sha256(run: RunConfig, provenance: Mapping[str, Any]) -> str | None:
    """The hash of all rows; None under [privacy]: who knows all but one could try that one out."""
    return provenance["data"]["sha256"] if run.privacy.unit == "none" else None


def _use(run: RunConfig, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The lines of the model card, as words and code."""
    words, _, code = "\n".join(python_use(run)).partition("```python")
    return {
        "ask": f'silotune ask {provenance["run"]} "your question"',
        "words": words.replace("`", "").strip(),
        "python": code.strip().removesuffix("```").strip(),
    }


def _typeset(cell: str) -> str:
    return "–" if cell == "-" else cell.replace("-", "−")


def render(template: str, **page: Any) -> str:
    """Fill one of the package's templates; all that is data is escaped."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.PackageLoader("silotune"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return env.get_template(template).render(page)
