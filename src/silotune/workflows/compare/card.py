"""A comparison as a Markdown card."""

from collections.abc import Mapping
from typing import Any

from silotune.core.safe_text import markdown, plain
from silotune.core.wording import counted
from silotune.recipes.schema import RunConfig
from silotune.results.card import markdown_table
from silotune.workflows.compare.best import choice_tables, difference_of
from silotune.workflows.compare.statistics import (
    AGAINST,
    against_table,
    cost_table,
    difference_table,
    score_table,
)
from silotune.workflows.compare.verdicts import (
    best_verdict,
    comparison_verdict,
    tuning_line,
    worse_off_warnings,
)


def comparison_card(comparison: Mapping[str, Any], run: RunConfig) -> str:
    """README.md of a comparison: the report's numbers as Markdown, without rows or answers."""
    up_to = "Up to " if run.budget.bytes or run.budget.hours else ""
    said = [
        *comparison_verdict(comparison),
        *best_verdict(comparison),
        *worse_off_warnings(comparison),
        *comparison["notes"],
    ]
    clients = counted(len(comparison["clients"]), "client")
    lines = [
        f"# Was it worth joining? {comparison['base_name']}, {clients}",
        "",
        *(f"- {markdown(line)}" for line in said),
        "",
        f"Seeds: {', '.join(map(str, comparison['seeds']))}. "
        f"{up_to}{counted(run.rounds, 'round')}. All arms are "
        f"scored on the same held-out rows of each client; a difference is "
        f"{difference_of(comparison)}, with its 95 % interval.",
    ]
    for key, metric in comparison["metrics"].items():
        better = "lower" if metric["lower_is_better"] else "higher"
        lines += ["", f"## {metric['label']} ({metric['unit']}, {better} is better)", ""]
        lines += [markdown(tuning_line(comparison)), ""]
        lines += [*markdown_table(score_table(comparison, key)), ""]
        lines += markdown_table(difference_table(comparison, key))
        if against := against_table(comparison, key):
            lines += ["", f"{AGAINST}:", "", *markdown_table(against)]
        for title, table in choice_tables(comparison, key):
            lines += ["", f"{title}:", "", *markdown_table(table)]
    lines += ["", "## Cost of all seeds", "", *markdown_table(cost_table(comparison))]
    return plain("\n".join(lines) + "\n")
