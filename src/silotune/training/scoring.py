"""How well a model predicts held-out rows: sums, and the metrics computed from them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field

from silotune.core.own_code import PYTHON_NAME
from silotune.core.stats import label_scores
from silotune.core.types import Config, Score
from silotune.models.loading import LoadedModel
from silotune.training.tasks.base import Batch, Example, Loss, PairScores, Task, each_nll


class EvaluateConfig(Config):
    """Scoring on held-out rows."""

    every: int = Field(default=1, ge=0)
    """Rounds between scores of the adapter; the base and the final adapter are scored too. 0 turns
    scoring off."""
    server_path: str | None = Field(default=None, min_length=1)
    """A file or folder of rows at the server, with the same columns as the clients': the server's
    test set, never trained on. Scored at the server in the rounds that `every` selects, or in every
    round if `every` is 0. A comparison ignores it."""
    choose_by: Literal["clients", "server"] = "clients"
    """Whose scores choose the best round and the end of a run (checkpoint.keep, stop.patience).
    server: those of server_path, whose rows are then no test."""
    metric: str | None = Field(default=None, pattern=f"^{PYTHON_NAME}$")
    """A metric of your own on the rows that are scored: python:<module>:<function>, see
    docs/how-to/add-a-metric-or-a-loss.md. It is reported, and chooses nothing. A real client
    accepts it only if its own limits.functions names it."""
    batch_size: int = Field(default=8, ge=1)
    """Rows in one forward pass; it changes the score only by rounding."""

    def due(self, num_rounds: int, last: int) -> bool:
        """Whether the adapter after round `num_rounds` of `last` is scored."""
        return self.every > 0 and (num_rounds % self.every == 0 or num_rounds == last)


def build_eval_batches(examples: Sequence[Example], task: Task, batch_size: int) -> list[Batch]:
    """All examples in batches of similar length, in an order that depends on nothing else."""
    return [task.collate([examples[i] for i in group]) for group in by_length(examples, batch_size)]


def by_length(
    examples: Sequence[Example], batch_size: int, *, cost: int | None = None
) -> list[list[int]]:
    """The places of all examples, in the batches of similar length that take the least time.

    Args:
        examples: Rows, in any order.
        batch_size: Most rows of a batch.
        cost: What starting a forward pass costs, in tokens; by default `cost_of_batch`. At 0, only
            rows of equal length share a batch; the larger it is, the fuller batches are.
    """
    cost = cost_of_batch() if cost is None else cost
    order = sorted(range(len(examples)), key=lambda i: (examples[i].num_positions, i))
    lengths = [examples[i].num_positions for i in order]
    # the first n rows take best[n] at least, with a last batch that begins at row begin[n]
    best, begin = [0], [0]
    for n, longest in enumerate(lengths, start=1):
        starts = range(max(0, n - batch_size), n)
        least = min((best[at] + cost + (n - at) * longest, at) for at in starts)
        best.append(least[0])
        begin.append(least[1])
    groups: list[list[int]] = []
    n = len(order)
    while n:
        groups.append(order[begin[n] : n])
        n = begin[n]
    return groups[::-1]


def cost_of_batch() -> int:
    """What starting a forward pass costs here, in tokens: little where tokens are slow.

    An estimate: a pass of a small model starts some hundred operations, in the time of a few tens
    of its tokens on a processor, and of thousands on an accelerator.
    """
    return 4096 if torch.cuda.is_available() or torch.backends.mps.is_available() else 32


def evaluate(
    loaded: LoadedModel,
    batches: Iterable[Batch],
    task: Task,
    *,
    client: str,
    num_examples: int,
    tell: Callable[[int], None] | None = None,
    metric: "Metric | None" = None,
) -> Score:
    """Score the model. Dropout is off, and nothing is changed.

    Args:
        loaded: The model.
        batches: Held-out rows.
        task: Computes the loss.
        client: Whose rows they are.
        num_examples: How many they are.
        tell: Told the number of batches so far, after every batch.
        metric: Makes one more number of the scored rows.

    Returns:
        Sums over the batches' targets: losses of several clients add up exactly.
    """
    loss_sum, num_tokens, num_correct = 0.0, 0, 0
    pairs: list[PairScores] = []
    counts = torch.zeros(len(task.labels), 3, dtype=torch.int64)
    rows: list[RowScore] = []
    loaded.model.eval()
    with torch.inference_mode():
        for number, batch in enumerate(batches, start=1):
            out = task.loss(loaded, batch)
            loss_sum += float(out.loss_sum)
            num_tokens += batch.num_terms
            if out.pairs is not None:
                pairs.append(out.pairs)
                num_correct += int((out.pairs.gaps > 0).sum())
            else:
                num_correct += int((out.logits.argmax(-1).cpu() == batch.targets).sum())
            if task.labels:
                given, true = out.logits.argmax(-1).cpu(), batch.targets
                parts = (true[given == true], given, true)
                counts += torch.stack([torch.bincount(p, minlength=len(counts)) for p in parts], 1)
            if metric is not None:
                rows += _row_scores(out, batch, task)
            if tell is not None:
                tell(number)
    found = tuple((right, given, true) for right, given, true in counts.tolist())
    own = None if metric is None else metric(rows)
    score = Score(
        client, loss_sum, num_tokens, num_correct, num_examples, label_counts=found, metric=own
    )
    if not pairs:
        return score
    margins = torch.cat([one.margins.double().cpu() for one in pairs])
    return replace(score, margin_sum=float(margins.sum()), num_preferred=int((margins > 0).sum()))


@dataclass(frozen=True)
class RowScore:
    """How well a model predicts one row."""

    loss_sum: float
    """Negative log-likelihood in nats over the row's targets."""
    num_tokens: int
    """Number of targets; a pair is one."""
    given: int = -1
    """classify: index of the class that the row was given."""
    true: int = -1
    """classify: index of its true class."""
    margin: float | None = None
    """prefer: the reward margin of the pair."""
    preferred: int | None = None
    """prefer: 1 if that margin is above 0, else 0."""
    likelier: int | None = None
    """prefer: 1 if the chosen answer is likelier than the rejected one, else 0."""


Metric = Callable[[Sequence[RowScore]], float]
"""Scored rows of one client -> a number."""


def _row_scores(out: Loss, batch: Batch, task: Task) -> list[RowScore]:
    """The score of each row of a batch, in the batch's order."""
    if out.pairs is not None:
        each = (out.pairs.losses.double(), out.pairs.margins.double(), out.pairs.gaps)
        return [
            RowScore(loss, 1, margin=margin, preferred=int(margin > 0), likelier=int(gap > 0))
            for loss, margin, gap in zip(*(values.tolist() for values in each), strict=True)
        ]
    num_rows, length = batch.ids.shape
    targets = batch.targets.to(out.logits.device)
    nll = each_nll(out.logits, targets)
    row = batch.positions // length
    sums = torch.zeros(num_rows, dtype=torch.float64)
    sums.index_add_(0, row, nll.double().cpu())
    counts = torch.bincount(row, minlength=num_rows)
    return [
        RowScore(total, count, *_classes(out, batch, n) if task.labels else ())
        for n, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True))
    ]


def _classes(out: Loss, batch: Batch, row: int) -> tuple[int, int]:
    """The class that a row was given, and its true one."""
    return int(out.logits[row].argmax()), int(batch.targets[row])


def score_each(
    loaded: LoadedModel, examples: Sequence[Example], task: Task, *, batch_size: int
) -> list[RowScore]:
    """Score every example separately, for comparisons row by row.

    Returns:
        One score per example, in order. Up to rounding, they add up to those of `evaluate`.
    """
    found: dict[int, RowScore] = {}
    loaded.model.eval()
    with torch.inference_mode():
        for group in by_length(examples, batch_size):
            batch = task.collate([examples[i] for i in group])
            scored = _row_scores(task.loss(loaded, batch), batch, task)
            found |= dict(zip(group, scored, strict=True))
    return [found[i] for i in range(len(examples))]


def metrics(scores: Iterable[Score]) -> dict[str, Any]:
    """Loss in nats, and how often the most likely prediction was right, over all targets.

    For tokens: perplexity and token_accuracy. With a metric of one's own, `metric`: its mean over
    clients, weighted by rows. For labels: accuracy, macro_f1 and mcc, and the
    counts that they are computed from. For pairs: win_rate, the share whose chosen answer is the
    likelier one; reward_margin; and preference_accuracy, the share whose reward margin is above 0,
    which the reference itself does not have. Clients have different numbers of targets; a mean of
    their means would give a small client as much weight as a large one.
    """
    all_scores = list(scores)
    num_tokens = sum(s.num_tokens for s in all_scores)
    loss = sum(s.loss_sum for s in all_scores) / num_tokens
    found: dict[str, Any] = {
        "loss": loss,
        "num_tokens": num_tokens,
        "num_examples": sum(s.num_examples for s in all_scores),
    }
    if None not in (own := [s.metric for s in all_scores]):
        rows = found["num_examples"]
        pairs = zip(all_scores, own, strict=True)
        found["metric"] = sum(s.num_examples * (value or 0.0) for s, value in pairs) / rows
    if all_scores[0].label_counts:
        counts = add_label_counts(s.label_counts for s in all_scores)
        return {**found, **label_scores(counts), "label_counts": counts}
    margins = [s.margin_sum for s in all_scores if s.margin_sum is not None]
    if margins:
        preferred = sum(s.num_preferred or 0 for s in all_scores)
        found["win_rate"] = sum(s.num_correct for s in all_scores) / num_tokens
        found["reward_margin"] = sum(margins) / num_tokens
        accuracy = {"preference_accuracy": preferred / num_tokens}
        return {**found, **(accuracy if any(margins) else {})}
    return {
        **found,
        "perplexity": math.exp(min(loss, 700.0)),  # above that a float overflows
        "token_accuracy": sum(s.num_correct for s in all_scores) / num_tokens,
    }


def add_label_counts(counts: Iterable[Sequence[Sequence[int]]]) -> list[list[int]]:
    """The label counts of several clients, added up."""
    return [[sum(cell) for cell in zip(*label, strict=True)] for label in zip(*counts, strict=True)]
