"""The held-out pairs of a run that learned preferences: which answer a model finds likelier."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from silotune.core.stats import wilson
from silotune.data.preferences import Preference
from silotune.federation.metrics import Row
from silotune.models.loading import LoadedModel
from silotune.recipes.schema import RunConfig
from silotune.training.known_tokens import prepare_rows
from silotune.training.scoring import score_each
from silotune.training.tasks import build_task


def score_pairs(
    loaded: LoadedModel, config: RunConfig, pairs: Mapping[str, Sequence[Preference]]
) -> tuple[list[Row], dict[str, Any]]:
    """Score every pair with the model as it is.

    Args:
        loaded: The base or the result, activated.
        config: The run's recipe.
        pairs: The held-out pairs of each client.

    Returns:
        One row per pair with its prompt, loss, reward margin and whether the chosen answer is the
        likelier one; and the scores of each client and of all pairs together.
    """
    task, size = build_task(config.task, cfg=config.prefer), config.evaluate.batch_size
    kept: list[Row] = []
    for client, own in sorted(pairs.items()):
        limit = config.train.max_length
        prepared = prepare_rows(own, task, loaded, limit, batch_size=size)
        each = score_each(loaded, prepared.examples, task, batch_size=size)
        for row, one in zip(prepared.rows, each, strict=True):
            about = {"client": client, "prompt": own[row]["prompt"][-1]["content"]}
            found = {"loss": one.loss_sum, "reward_margin": one.margin, "likelier": one.likelier}
            kept.append({**about, **found})
    scores = {client: _scores([row for row in kept if row["client"] == client]) for client in pairs}
    return kept, {"clients": scores, "overall": _scores(kept)}


def _scores(rows: Sequence[Row]) -> dict[str, Any]:
    if not rows:
        return {"num_items": 0}
    count = len(rows)
    margins = [row["reward_margin"] for row in rows]
    found = {
        "num_items": count,
        "loss": sum(row["loss"] for row in rows) / count,
        "reward_margin": sum(margins) / count,
        "win_rate": asdict(wilson(sum(row["likelier"] for row in rows), count)),
    }
    if any(margins):  # the reference itself prefers nothing
        accuracy = wilson(sum(margin > 0 for margin in margins), count)
        found["preference_accuracy"] = asdict(accuracy)
    return found
