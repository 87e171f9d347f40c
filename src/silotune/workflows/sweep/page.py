"""A sweep as one self-contained HTML page: a table of all runs, and a loss curve for each."""

from collections.abc import Mapping
from typing import Any

from silotune.core.wording import counted
from silotune.models.base_files import public_name
from silotune.recipes.schema import RunConfig
from silotune.results import charts
from silotune.results.page import Drawing, render, shared_parts
from silotune.workflows.sweep.ranking import (
    has_seeds,
    name_of,
    run_table,
    sweep_table,
    title_of,
    verdict,
)


def sweep_page(
    result: Mapping[str, Any],
    curves: Mapping[int, Mapping[int, float]],
    run: RunConfig,
    provenance: Mapping[str, Any],
) -> str:
    """Build the page of a sweep.

    Args:
        result: sweep.json.
        curves: Run number -> round -> held-out loss.
        run: The recipe that the runs vary.
        provenance: The provenance of the best run.

    Returns:
        HTML.
    """
    done = [own for own in result["runs"] if own["failed"] is None]
    lines = {f"{own['number']:03d} {title_of(own)}": curves[own["number"]] for own in done}
    names, size, name = list(lines), charts.MAX_LINES, name_of(result)
    parts = [
        {name: lines[name] for name in names[at : at + size]} for at in range(0, len(names), size)
    ]
    drawings = [
        Drawing(
            _title(name, i * size, len(part), len(names)),
            charts.loss_by_run(part, result["unit"], name),
        )
        for i, part in enumerate(parts)
    ]
    header, *rows = sweep_table(result)
    return render(
        "sweep.html",
        kind="sweep",
        warnings=[],
        adapter_sha256=None,
        title=f"{counted(len(result['runs']), 'run')} of {public_name(run.model.name)}",
        subtitle=f"varied: {', '.join(result['keys'])}",
        verdict=[verdict(result)],
        notes=[*([result["note"]] if result["note"] else []), *result["notes"]],
        loss_name=name,
        header=header,
        rows=rows,
        every_run=run_table(result) if has_seeds(result) else [],
        drawings=[drawing for drawing in drawings if drawing.svg],
        failures=[own for own in result["runs"] if own["failed"] is not None],
        best=" ".join(f"{key}={text}" for key, text in done[0]["keys"].items()) if done else "",
        **shared_parts(run, provenance, {}, []),
    )


def _title(name: str, first: int, count: int, total: int) -> str:
    if total == count:
        return f"{name.capitalize()} of every run"
    return f"{name.capitalize()}, runs ranked {first + 1} to {first + count} of {total}"
