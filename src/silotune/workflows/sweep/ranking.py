"""The results of a sweep, ranked and in words. Numbers in, numbers and tables out."""

from collections.abc import Mapping, Sequence
from typing import Any

from silotune.core.stats import mean_interval
from silotune.core.wording import counted, human_bytes, human_seconds
from silotune.results.summary import loss_name, unit_of

Result = Mapping[str, Any]
"""sweep.json."""
SEED = "seed"
"""The key whose values are repetitions of one setting, not settings to choose from."""


def ranked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parts of sweep.json that follow from its runs.

    Args:
        rows: One per run: number, path, keys, failed; and unless it failed, task, base_loss, loss,
            scores, num_scored, bytes, seconds.

    Returns:
        runs, those of the best setting first, then by loss, and failed ones last; settings, lowest
        mean loss first; keys, all that any run changes; unit and name of the losses; notes.
    """
    done = [row for row in rows if row["failed"] is None]
    keys = dict.fromkeys(key for row in rows for key in row["keys"])
    settings = settings_of(rows)
    rank = {number: i for i, own in enumerate(settings) for number in own["runs"]}
    order = sorted(
        rows,
        key=lambda r: (r["failed"] is not None, rank.get(r["number"], 0), r.get("loss") or 0.0),
    )
    return {
        "runs": list(order),
        "settings": settings,
        "keys": list(keys),
        "unit": unit_of(done[0]) if done else "",
        "loss_name": loss_name(done[0]) if done else "held-out loss",
        "notes": _notes(done, settings, num_failed=len(rows) - len(done)),
    }


def settings_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The runs with the same keys apart from the seed, together; lowest mean loss first.

    Args:
        rows: As for `ranked`. Failed runs are left out.

    Returns:
        For each setting: keys without the seed, runs (their numbers), base_loss, loss (both means
        over the runs), low and high (a 95 % t interval over the runs, None for a single one).
    """
    groups: dict[tuple[tuple[str, str], ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["failed"] is None:
            keys = tuple((key, text) for key, text in row["keys"].items() if key != SEED)
            groups.setdefault(keys, []).append(row)
    found: list[dict[str, Any]] = []
    for keys, own in groups.items():
        mean, low, high = mean_interval([row["loss"] or 0.0 for row in own])
        base = mean_interval([row["base_loss"] or 0.0 for row in own])[0]
        numbers = [row["number"] for row in own]
        found.append(
            {"keys": dict(keys), "runs": numbers, "base_loss": base, "loss": mean}
            | {"low": low, "high": high}
        )
    return sorted(found, key=lambda own: own["loss"])


def has_seeds(result: Result) -> bool:
    """Whether some setting was trained with several seeds, so that means are ranked."""
    return any(len(own["runs"]) > 1 for own in settings_of(result["runs"]))


def _notes(
    done: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]], *, num_failed: int
) -> list[str]:
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
    if len(settings) < len(done):
        notes.append(
            "runs that differ only in their seed are put together: the interval is a 95 % t "
            "interval of their mean, for these held-out rows"
        )
        if len({len(own["runs"]) for own in settings}) > 1:
            notes.append("some settings have fewer seeds than others")
        if len(settings) > 1:
            notes.append(
                f"the best of {len(settings)} settings looks better than it is, because the same "
                "rows chose it: confirm it on other rows"
            )
    elif len(done) > 1:
        notes.append(
            f"the best of {len(done)} runs looks better than it is, because the same rows chose "
            "it: confirm it with another seed or, better, on other rows"
        )
    return notes


def name_of(result: Result) -> str:
    """What the losses are called; sweeps of earlier versions do not say."""
    return result.get("loss_name", "held-out loss")


def sweep_table(result: Result) -> list[tuple[str, ...]]:
    """Header and rows: one line per setting if there are several seeds, otherwise per run."""
    return _setting_table(result) if has_seeds(result) else run_table(result)


def _setting_table(result: Result) -> list[tuple[str, ...]]:
    runs = {own["number"]: own for own in result["runs"]}
    keys = [key for key in result["keys"] if key != SEED]
    header = ("setting", *keys, "seeds", "base", name_of(result), "95 % interval", "time")
    lines: list[tuple[str, ...]] = [header]
    for rank, own in enumerate(settings_of(result["runs"]), start=1):
        interval = "-" if own["low"] is None else f"{own['low']:.3f} to {own['high']:.3f}"
        seconds = sum(runs[number]["seconds"] for number in own["runs"])
        lines.append(
            (
                str(rank),
                *(shown(own["keys"].get(key, "")) for key in keys),
                str(len(own["runs"])),
                f"{own['base_loss']:.3f}",
                f"{own['loss']:.3f}",
                interval,
                human_seconds(seconds),
            )
        )
    failed = len(runs) - sum(len(own["runs"]) for own in settings_of(result["runs"]))
    if failed:
        lines.append((f"{failed} failed", *("-" for _ in header[1:])))
    return lines


def run_table(result: Result) -> list[tuple[str, ...]]:
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
    if has_seeds(result):
        return _verdict_of_settings(result)
    best, worst = done[0], done[-1]
    keys = " ".join(f"{key}={text}" for key, text in best["keys"].items())
    sentence = f"Lowest {name_of(result)}: {best['loss']:.3f} {result['unit']} with {keys}"
    if len(done) == 1:
        return f"{sentence}."
    if len(done) == 2:
        return f"{sentence}; the other run ended at {worst['loss']:.3f}."
    return f"{sentence}; the other {len(done) - 1} runs ended at up to {worst['loss']:.3f}."


def _verdict_of_settings(result: Result) -> str:
    best, *others = settings_of(result["runs"])
    keys = " ".join(f"{key}={text}" for key, text in best["keys"].items()) or "the recipe's keys"
    seeds = counted(len(best["runs"]), "seed")
    interval = (
        "" if best["low"] is None else f", 95 % interval {best['low']:.3f} to {best['high']:.3f}"
    )
    sentence = (
        f"Lowest mean held-out loss: {best['loss']:.3f} {result['unit']} ({seeds}{interval}) with "
        f"{keys}"
    )
    if not others:
        return f"{sentence}."
    if len(others) == 1:
        return f"{sentence}; the other setting ended at {others[0]['loss']:.3f}."
    return f"{sentence}; the other {len(others)} settings ended at up to {others[-1]['loss']:.3f}."
