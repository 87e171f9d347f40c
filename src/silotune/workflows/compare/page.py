"""A comparison as one HTML page."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from silotune.core.wording import counted
from silotune.recipes.schema import RunConfig
from silotune.results import charts
from silotune.results.charts import Split
from silotune.results.page import (
    Drawing,
    Samples,
    better,
    capitalised,
    drawn,
    only_finite,
    render,
    shared_parts,
    typeset,
)
from silotune.results.verdicts import gain, interval, signed
from silotune.workflows.compare.best import choice_tables, difference_of
from silotune.workflows.compare.statistics import AGAINST, against_table, cost_table, tuned_to
from silotune.workflows.compare.verdicts import (
    best_verdict,
    comparison_verdict,
    tuning_line,
    worse_off_warnings,
)

MEAN = "mean over clients"

SIGNS = {
    "gained": "▲",
    "lost": "▼",
    "no clear difference": "≈",
    "too few rows": "?",
    "one seed: no verdict": "?",
    "two seeds: no verdict": "?",
}
"""A verdict has a sign and a word, so that it does not depend on colour alone."""


class ScoreRow(NamedTuple):
    """One arm's line in the table of a comparison, as text."""

    arm: str
    score: str
    difference: str
    verdict: str


def comparison_page(
    comparison: Mapping[str, Any],
    *,
    run: RunConfig,
    provenance: Mapping[str, Any],
    split: Split,
    samples: Samples,
) -> str:
    """Build the page of a comparison: every arm compared with training alone.

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
    return render(
        "report.html",
        kind="comparison",
        numbers=["comparison.json"],
        title=f"Was it worth joining? {comparison['base_name']}, "
        f"{counted(len(comparison['clients']), 'client')}",
        subtitle=_subtitle(run, comparison["seeds"]),
        verdict=[*comparison_verdict(comparison), *best_verdict(comparison)],
        against_title=AGAINST,
        against=_against(comparison),
        choices=_choices(comparison),
        difference=difference_of(comparison),
        client_verdicts=[
            (
                name,
                [gain(c, key, comparison) for key in comparison["metrics"]],
                tuned_to(comparison, name),
            )
            for name, c in comparison["clients"].items()
        ],
        warnings=worse_off_warnings(comparison),
        notes=comparison["notes"],
        result=comparison["result"],
        metrics=_metrics(comparison),
        signs=SIGNS,
        tuned=tuning_line(comparison),
        cost_table=[
            [name, *(cell.replace(",", " ") for cell in cells)]
            for name, *cells in cost_table(comparison)
        ],
        **shared_parts(run, provenance, split, samples),
        adapter_sha256=None,
    )


def _subtitle(run: RunConfig, seeds: Sequence[int]) -> str:
    up_to = "up to " if run.budget.bytes or run.budget.hours else ""
    word = "seed" if len(seeds) == 1 else "seeds"
    return f"{up_to}{counted(run.rounds, 'round')}, {word} {', '.join(map(str, seeds))}"


def _against(comparison: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """For every metric with other federated arms: its name, the table's header, and its rows."""
    return [
        (metric["label"], table[0], [[n, *map(typeset, cells)] for n, *cells in table[1:]])
        for key, metric in comparison["metrics"].items()
        if (table := against_table(comparison, key))
    ]


def _choices(
    comparison: Mapping[str, Any],
) -> list[tuple[str, str, Sequence[str], list[list[str]]]]:
    """The metric, the title, the header and the rows of the tables about what clients take."""
    return [
        (metric["label"], title, header, [[n, *map(_in_table, cells)] for n, *cells in rows])
        for key, metric in comparison["metrics"].items()
        for title, (header, *rows) in choice_tables(comparison, key)
    ]


def _in_table(cell: str) -> str:
    """A number with a real minus sign; a verdict with its sign."""
    return f"{SIGNS[cell]} {cell}" if cell in SIGNS else typeset(cell)


def _metrics(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every metric: its names, the scores of every arm by client, and its charts."""
    # the mean comes first, and a client with the same name must not replace it
    groups = {MEAN: {}, **comparison["clients"]} | {MEAN: comparison["overall"]}
    return [
        {
            "label": capitalised(metric["label"]),
            "unit": metric["unit"],
            "better": better(metric),
            "groups": [
                (name, _score_rows(group, key, metric, comparison["arms"]))
                for name, group in groups.items()
            ],
            "charts": drawn(_score_charts(groups, key, metric, comparison)),
        }
        for key, metric in comparison["metrics"].items()
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
    if len(arms) > charts.MAX_LINES:  # one arm per client would be too many to distinguish
        shown = [arm for arm in arms if arm not in lone]
        note += "Adapters of single clients are shown only in the table. "
    else:
        shown = arms
    # the base is far from all others: drawing it would squeeze their differences into one point
    near = [arm for arm in arms if arm != "base" and arm not in lone]
    scores = {name: only_finite(groups[name]["scores"].get(key, {}), shown) for name in names}
    gaps = {name: only_finite(groups[name]["differences"].get(key, {}), near) for name in names}
    tuned = tuning_line(comparison)
    label, unit, title = metric["label"], metric["unit"], capitalised(metric["label"])
    return [
        Drawing(
            f"{title}: every arm",
            charts.scores(scores, arms, metric=label, x_label=f"{label} ({unit})"),
            f"{note}Dot: mean; line: 95\u00a0% interval; {better(metric)}. {tuned}",
        ),
        Drawing(
            f"{title}: difference from training alone",
            charts.differences(gaps, arms, metric=label, x_label=f"arm minus local ({unit})"),
            f"{note}Left of zero is {'better' if metric['lower_is_better'] else 'worse'}. {tuned}",
        ),
    ]


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
