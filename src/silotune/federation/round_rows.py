"""What is recorded about a round: rows of metrics.jsonl."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from silotune.core.types import Failure, Score
from silotune.federation.metrics import Row
from silotune.federation.spool import Spool
from silotune.training.scoring import metrics


def round_rows(
    round_: int,
    cohort: Sequence[str],
    spool: Spool,
    failures: Sequence[Failure],
    scores: Sequence[Score | Failure],
    about: Mapping[str, Any],
    seconds: float,
    *,
    part: str = "held-out",
) -> list[Row]:
    """One row per client asked, one per score of the received adapter, and one for the round.

    `about` is what was measured about the round's aggregation; `part` is as in `score_rows`.
    """
    rows: list[Row] = []
    received: list[Score | Failure] = list(scores)
    for update in spool.reports():
        rows.append(
            {
                "event": "train",
                "round": round_,
                "client": update.client,
                "status": "did not move" if update.metrics.get("delta_norm") == 0 else "ok",
                "num_examples": update.num_examples,
                "bytes_down": update.bytes_down,
                "bytes_up": update.bytes_up,
                **update.metrics,
                **update.settings,
            }
        )
        if update.score is not None:
            received.append(update.score)
    for f in failures:
        row = {"event": "train", "round": round_, "client": f.client, "status": f.code}
        rows.append({**row, "place": f.place})
    rows += score_rows(round_ - 1, received, part=part)
    whole: Row = {"event": "round", "round": round_, "num_asked": len(cohort), "seconds": seconds}
    rows.append({**whole, **about})
    return rows


def score_rows(
    num_rounds: int, scores: Iterable[Score | Failure], *, part: str = "held-out"
) -> list[Row]:
    """Rows of scores, in client-name order.

    Args:
        num_rounds: How many rounds the scored adapter has behind it.
        scores: One per client.
        part: Which rows were scored, see `DataConfig.scored_part`. Held-out ones have no mark.
    """
    mark = {} if part == "held-out" else {"part": part}
    rows: list[Row] = []
    for score in sorted(scores, key=lambda s: s.client):
        row: Row = {"event": "evaluate", "round": num_rounds, "client": score.client}
        if isinstance(score, Failure):
            rows.append({**row, "status": score.code, "place": score.place})
        else:
            found = {"status": "ok", **mark, **metrics([score])}
            rows.append({**row, **found, "bytes_down": score.size_bytes})
    return rows
