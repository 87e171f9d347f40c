"""Membership inference: whether a finished run's losses reveal which rows it was trained on.

A row's score is its loss under the untrained base minus its loss under the result, per target: rows
that are easy for any model reveal nothing. Yeom et al. 2018, "Privacy Risk in Machine Learning",
arXiv:1709.01604, with the base's loss as calibration (Watson et al. 2022, arXiv:2111.08440). No
coin decided which rows were trained on and which held out, so this does not bound epsilon.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from silotune.core.errors import ConfigError
from silotune.data.client_rows import ClientRows
from silotune.data.reading import TaskRow
from silotune.federation.metrics import Row
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.federation.run_folder import RunFolder
from silotune.models.loading import LoadedModel, untrained
from silotune.recipes.personal import kept_by, what_is_kept
from silotune.recipes.schema import RunConfig
from silotune.results.run import Run
from silotune.training.known_tokens import prepare_rows
from silotune.training.loop import num_rows, stream
from silotune.training.scoring import score_each
from silotune.training.tasks import build_task
from silotune.workflows.audit.bounds import auc, true_positive_rate
from silotune.workflows.check import check
from silotune.workflows.provenance import check_same_rows

RATES = (0.01, 0.1)
"""False positive rates."""


def losses(loaded: LoadedModel, rows: Sequence[TaskRow], run: RunConfig) -> list[float]:
    """Mean loss of each row's targets, in nats, without rows that have no target in the limit."""
    task = build_task(run.task, run.data.labels, run.prefer)
    examples = prepare_rows(rows, task, loaded, run.train.max_length).examples
    each = score_each(loaded, examples, task, batch_size=run.evaluate.batch_size)
    return [score.loss_sum / score.num_tokens for score in each]


def drawn_rows(run: RunConfig, metrics: Sequence[Row], client: str, num_examples: int) -> list[int]:
    """Which train rows a client has trained on: the beginning of its stream.

    A few short rounds do not reach the end of a client's rows, and a row that no step has met is
    not a member. If rows are drawn in secret, as for privacy of single rows, all may be members.
    """
    trained = [r for r in metrics if r["event"] == "train" and "num_tokens" in r]
    rounds = sum(row["client"] == client for row in trained)
    if "same-samples" in run.train.compat:
        rounds = min(rounds, 1)
    taken = rounds * num_rows(run.train, num_examples)
    if taken >= num_examples or run.privacy.unit == "record":
        return list(range(num_examples))
    return sorted(itertools.islice(stream(num_examples, run.seed, client), taken))


def infer_membership(run: Run, progress: Progress) -> dict[str, Any]:
    """Attack a finished run with its own rows: trained rows against held-out rows.

    Returns:
        For each of the clients, and overall: num_members, num_not_met (train rows that no step has
        met, which are left out), num_held_out, auc, and tpr by false positive rate. An interval is
        mean, low and high. A rate is None if too few rows are held out for it.

    Raises:
        ConfigError: The rows, or the heads that the clients score with, are not on this machine.
        RunFolderError: The run is not finished, or its rows have changed.
        ModelError: The base has changed.
    """
    config, rows = _rows_of(run)
    progress.note(f"loading {config.model.name}")
    with untrained(base := load_for(config)):
        before = _all_losses(base, rows, config)
    del base  # two models at once may not fit
    after = _all_losses(run.load(), rows, config)
    metrics, clients = run.metrics, dict[str, Any]()
    pooled: tuple[list[float], list[float]] = ([], [])
    num_not_met = 0
    for name in rows:
        (train, held), (train_now, held_now) = before[name], after[name]
        met = drawn_rows(config, metrics, name, len(train))
        members = [train[n] - train_now[n] for n in met]
        others = [b - a for b, a in zip(held, held_now, strict=True)]
        clients[name] = _told(members, others, len(train) - len(met))
        pooled[0].extend(members)
        pooled[1].extend(others)
        num_not_met += len(train) - len(met)
    return {"clients": clients, "overall": _told(*pooled, num_not_met)}


def _rows_of(run: Run) -> tuple[RunConfig, Mapping[str, ClientRows]]:
    _ = run.summary  # raises if the run is not finished
    config = run.config
    if config.runtime.name != "in-process":
        raise ConfigError(
            f"{run.path} ran with runtime.name = '{config.runtime.name}', and only in-process runs "
            "can be audited, because their rows are on this machine.\n  Run the recipe in process."
        )
    if kept := kept_by(config):
        key = kept.partition(" ")[0]
        raise ConfigError(
            f"{run.path}: with {kept}, every client scores with its own {what_is_kept(config)}, "
            f"which is not part of the result.\n  Audit a run with another {key}."
        )
    checked = check(config)
    check_same_rows(RunFolder.open(run.path), checked)
    return config, checked.rows


def _all_losses(
    loaded: LoadedModel, rows: Mapping[str, ClientRows], run: RunConfig
) -> dict[str, tuple[list[float], list[float]]]:
    """The losses of every client's train rows and held-out rows."""
    return {
        name: (losses(loaded, own.train, run), losses(loaded, own.evaluation, run))
        for name, own in rows.items()
    }


def _told(members: Sequence[float], others: Sequence[float], num_not_met: int) -> dict[str, Any]:
    counts = {
        "num_members": len(members),
        "num_not_met": num_not_met,
        "num_held_out": len(others),
    }
    if not members or not others:
        return {**counts, "auc": None, "tpr": {f"{rate:g}": None for rate in RATES}}
    rates = {
        f"{rate:g}": true_positive_rate(members, others, false_positive_rate=rate) for rate in RATES
    }
    return {
        **counts,
        "auc": asdict(auc(members, others)),
        "tpr": {rate: found and asdict(found) for rate, found in rates.items()},
    }


def membership_table(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: one line per client, and one for all together."""
    titles = (f"TPR at {r:.0%} FPR" for r in RATES)
    lines: list[tuple[str, ...]] = [("client", "members", "held out", "AUC", *titles)]
    for name, own in (*found["clients"].items(), ("all together", found["overall"])):
        rates = [
            _shown(own["tpr"][f"{r:g}"], f"too few held-out rows (needs {round(1 / r)})")
            for r in RATES
        ]
        counts = (str(own["num_members"]), str(own["num_held_out"]))
        lines.append((name, *counts, _shown(own["auc"], "no members"), *rates))
    return lines


def _shown(interval: Mapping[str, float] | None, absent: str) -> str:
    if interval is None:
        return absent
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
