"""The scores of an evaluation as tables: by client, by label, and by suite. It computes nothing."""

from collections.abc import Mapping
from typing import Any

from silotune.core.stats import Interval
from silotune.workflows.evaluate.evaluate import HELD_OUT, LM_EVAL


def label_table(scores: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: one line per client and model, over the run's own held-out rows."""
    lines: list[tuple[str, ...]] = [
        ("client", "model", "rows", "loss", "accuracy", "macro F1", "Matthews")
    ]
    clients = list(next(iter(scores["models"].values()))[HELD_OUT]["clients"])
    for client in (*clients, None):
        for model, found in scores["models"].items():
            held = found[HELD_OUT]
            own = held["overall"] if client is None else held["clients"][client]
            cells = (f"{own['loss']:.3f}", _percent(own["accuracy"]))
            rest = (f"{own[key]:.3f}" for key in ("macro_f1", "mcc"))
            lines.append((client or "all", model, str(own["num_items"]), *cells, *rest))
    return lines


def pair_table(scores: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: one line per client and model, over the run's own held-out pairs."""
    lines: list[tuple[str, ...]] = [
        ("client", "model", "pairs", "loss", "win rate", "preference accuracy", "reward margin")
    ]
    clients = list(next(iter(scores["models"].values()))[HELD_OUT]["clients"])
    for client in (*clients, None):
        for model, found in scores["models"].items():
            held = found[HELD_OUT]
            own = held["overall"] if client is None else held["clients"][client]
            shares = (
                _percent(own[key]) if key in own else "-"
                for key in ("win_rate", "preference_accuracy")
            )
            loss, margin = (
                f"{own[key]:.3f}" if key in own else "-" for key in ("loss", "reward_margin")
            )
            lines.append((client or "all", model, str(own["num_items"]), loss, *shares, margin))
    return lines


def quality_table(scores: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: one line per client and model, over the run's own held-out questions."""
    keys = {"loss": 3, "rouge1": 3, "rouge2": 3, "rougeL": 3, "exact": 3, "length": 1, "ended": 2}
    names = ("loss", "ROUGE-1", "ROUGE-2", "ROUGE-L", "exact", "tokens", "ended")
    first = next(iter(scores["models"].values()))[HELD_OUT]
    clients, known = first["clients"], first["mean over clients"]
    what = "questions" if "exact" in known else "rows"
    shown = [name for name, key in zip(names, keys, strict=True) if key in known]
    lines: list[tuple[str, ...]] = [("client", "model", what, *shown)]
    for client in (*clients, "mean over clients"):
        for model, found in scores["models"].items():
            held = found[HELD_OUT]
            own = held["clients"].get(client, held["mean over clients"])
            count = str(own.get("num_items", ""))
            cells = (f"{own[key]:.{digits}f}" for key, digits in keys.items() if key in known)
            lines.append((client, model, count, *cells))
    return lines


def suite_table(scores: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: one line per suite, way of answering and model."""
    header = ("suite", "answered by", "model", "questions", "right", "wrong", "no answer", "guess")
    lines: list[tuple[str, ...]] = []
    for model, found in scores["models"].items():
        for suite, ways in found.items():
            if suite == HELD_OUT or suite.startswith(LM_EVAL):
                continue
            for way, own in ways.items():
                lines.append((suite, way, model, str(own["num_items"]), *_shares(way, own)))
    return [header, *sorted(lines)]


def _shares(way: str, own: Mapping[str, Any]) -> tuple[str, ...]:
    if way == "pass@1":
        none = own["num_timeouts"] / own["num_items"]
        wrong = own["num_failed"] / own["num_items"]
        return _percent(own["pass_at_1"]), f"{wrong:.1%}", f"{none:.1%}", "-"
    shares = (_percent(own[key]) for key in ("accuracy", "wrong", "unparsable"))
    return (*shares, f"{own['chance']:.1%}")


def _percent(interval: Mapping[str, float]) -> str:
    found = Interval(**interval)
    return f"{found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"


def lm_eval_lines(scores: Mapping[str, Any]) -> list[str]:
    """One line per metric of lm-eval's tasks."""
    return [
        f"{suite}, {model}: {task} {metric} {value:.4f}"
        for model, found in scores["models"].items()
        for suite, own in found.items()
        if suite.startswith(LM_EVAL)
        for task, metrics in own["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    ]
