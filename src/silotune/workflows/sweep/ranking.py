"""The results of a sweep, ranked and in words. Numbers in, numbers and tables out."""

from collections.abc import Mapping, Sequence
from typing import Any

from silotune.core.wording import counted, human_bytes, human_seconds
from silotune.results.summary import loss_name, unit_of

Result = Mapping[str, Any]
"""sweep.json."""


def ranked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parts of sweep.json that follow from its runs.

    Args:
        rows: One per run: number, path, keys, failed; and unless it failed, task, base_loss, loss,
            scores, num_scored, bytes, seconds.

    Returns:
        runs, lowest loss first and failed ones last; keys, all that any run changes; unit and name
        of the losses; notes.
    """
    done = [row for row in rows if row["failed"] is None]
    keys = dict.fromkeys(key for row in rows for key in row["keys"])
    order = sorted(rows, key=lambda row: (row["failed"] is not None, row.get("loss") or 0.0))
    return {
        "runs": list(order),
        "keys": list(keys),
        "unit": unit_of(done[0]) if done else "",
        "loss_name": loss_name(done[0]) if done else "held-out loss",
        "notes": _notes(done, num_failed=len(rows) - len(done)),
    }


def _notes(done: Sequence[Mapping[str, Any]], *, num_failed: int) -> list[str]:
    notes: list[str] = []
    if num_failed:
        notes.append(f"{counted(num_failed, 'run')} failed; --resume tries again")
    if len({(row["task"], row["num_scored"]) for row in done}) > 1:
        notes.append(
            "the runs were scored on different rows or tokens (rows, tokenizer, template or "
            "train.max_length differ), so their losses are not comparable"
        )
    if any(row.get("epsilon") is not None for row in done):
        notes.append(
            "each private run has spent its own epsilon, and none of them covers choosing among "
            "the runs by their losses"
        )
    if len(done) > 1:
        notes.append(
            f"the best of {len(done)} runs looks better than it is, because the same rows chose "
            "it: confirm it with another seed or, better, on other rows"
        )
    return notes


def name_of(result: Result) -> str:
    """What the losses are called; sweeps of earlier versions do not say."""
    return result.get("loss_name", "held-out loss")


def sweep_table(result: Result) -> list[tuple[str, ...]]:
    """Header and rows: one line per run, best first."""
    labels = any(own.get("scores") for own in result["runs"])
    more = ("accuracy", "macro F1") if labels else ()
    keys: list[str] = result["keys"]
    lines = [("run", *keys, "base", name_of(result), *more, "sent", "time")]
    for own in result["runs"]:
        head = (f"{own['number']:03d}", *(shown(own["keys"].get(key, "")) for key in keys))
        if own["failed"] is not None:
            lines.append((*head, "-", "failed", *("-" for _ in more), "-", "-"))
            continue
        scores = own["scores"] or {}
        losses = (f"{own['base_loss']:.3f}", f"{own['loss']:.3f}")
        found = (f"{scores[key]:.3f}" for key in ("accuracy", "macro_f1")) if labels else ()
        cost = (human_bytes(own["bytes"]), human_seconds(own["seconds"]))
        lines.append((*head, *losses, *found, *cost))
    return lines


def shown(text: str) -> str:
    """A value, shortened for a table.

    >>> shown("0.00031622776601683794"), shown("bfloat16")
    ('0.0003162', 'bfloat16')
    """
    try:
        return f"{float(text):.4g}" if len(text) > 8 else text
    except ValueError:
        return text


def title_of(run: Mapping[str, Any]) -> str:
    """A run's keys on one line, without their sections."""
    parts = (f"{key.rpartition('.')[2]}={shown(text)}" for key, text in run["keys"].items())
    return " ".join(parts)


def verdict(result: Result) -> str:
    """One sentence: which run was best, and how far the others reach."""
    done = [own for own in result["runs"] if own["failed"] is None]
    if not done:
        return "No run has finished."
    best, worst = done[0], done[-1]
    keys = " ".join(f"{key}={text}" for key, text in best["keys"].items())
    sentence = f"Lowest {name_of(result)}: {best['loss']:.3f} {result['unit']} with {keys}"
    if len(done) == 1:
        return f"{sentence}."
    if len(done) == 2:
        return f"{sentence}; the other run ended at {worst['loss']:.3f}."
    return f"{sentence}; the other {len(done) - 1} runs ended at up to {worst['loss']:.3f}."
