"""Count the answers to a suite's items: shares and intervals. This file does not know models."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from silotune.core.stats import Interval, wilson
from silotune.workflows.evaluate.suites.base import Item, Kind
from silotune.workflows.evaluate.suites.metrics import classification

Way = Literal["likelihood", "generation", "leaderboard"]


@dataclass(frozen=True)
class Answered:
    """An item and the model's answer to it."""

    item: Item
    predicted: str | None
    """A label; None if the output is not an answer."""
    output: str | None = None
    """The generated text, verbatim."""
    scores: Mapping[str, float] | None = None
    """Label -> log-probability in nats, if options were scored."""

    @property
    def correct(self) -> bool:
        """Whether it is the gold label."""
        return self.predicted == self.item.gold


@dataclass(frozen=True)
class Share:
    """How many items out of how many were right."""

    num_items: int
    num_correct: int
    accuracy: Interval


@dataclass(frozen=True)
class Result:
    """One suite, answered in one way. correct + wrong + unparsable = items."""

    suite: str
    way: Way
    num_items: int
    num_correct: int
    num_wrong: int
    """Recognized answers that are not right."""
    num_unparsable: int
    """Outputs that are not an answer."""
    accuracy: Interval
    """Correct out of all items."""
    unparsable: Interval
    """Unparsable out of all items."""
    wrong: Interval
    """Wrong out of all items."""
    accuracy_parsable: float | None
    """Correct out of the recognized answers; None if there are none."""
    chance: float
    """Accuracy of guessing: the mean of 1 / options."""
    majority: float
    """Accuracy of always naming the most common gold label."""
    per_class: Mapping[str, Share]
    """Gold label -> share right (the class's recall)."""
    per_group: Mapping[str, Share]
    """Group -> share right; empty if the suite has no groups."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """Accuracy, macro F1 and Matthews correlation; only for boolean and sentiment suites."""
    rows: Sequence[Mapping[str, Any]] = ()
    """Every item with its output or its scores, for a JSONL file."""

    def summary(self) -> dict[str, Any]:
        """Everything except the rows, as plain data for JSON."""
        held = asdict(self)
        del held["rows"]
        return held


def summarise(suite: str, kind: Kind, way: Way, answered: Sequence[Answered]) -> Result:
    """Count a suite's answers.

    Args:
        suite: Its name.
        kind: What its labels are.
        way: How the answers were obtained.
        answered: At least one.
    """
    num, correct = len(answered), sum(one.correct for one in answered)
    unparsable = sum(one.predicted is None for one in answered)
    wrong = num - correct - unparsable
    golds = Counter(one.item.gold for one in answered)
    return Result(
        suite=suite,
        way=way,
        num_items=num,
        num_correct=correct,
        num_wrong=wrong,
        num_unparsable=unparsable,
        accuracy=wilson(correct, num),
        unparsable=wilson(unparsable, num),
        wrong=wilson(wrong, num),
        accuracy_parsable=correct / (num - unparsable) if num > unparsable else None,
        chance=sum(1 / len(one.item.options) for one in answered) / num,
        majority=max(golds.values()) / num,
        per_class={
            gold: _share(one for one in answered if one.item.gold == gold) for gold in sorted(golds)
        },
        per_group=_groups(answered),
        metrics={} if kind == "choice" else _metrics(answered),
        rows=[_row(suite, way, one) for one in answered],
    )


def _share(some: Any) -> Share:
    right = [one.correct for one in some]
    return Share(len(right), sum(right), wilson(sum(right), len(right)))


def _groups(answered: Sequence[Answered]) -> dict[str, Share]:
    names = dict.fromkeys(one.item.group for one in answered if one.item.group)
    return {name: _share(one for one in answered if one.item.group == name) for name in names}


def _metrics(answered: Sequence[Answered]) -> dict[str, float]:
    labels = list(dict.fromkeys(label for one in answered for label in one.item.options))
    golds = [one.item.gold for one in answered]
    return classification(golds, [one.predicted for one in answered], labels)


def _row(suite: str, way: Way, one: Answered) -> dict[str, Any]:
    row: dict[str, Any] = {"suite": suite, "way": way, "id": one.item.id, "gold": one.item.gold}
    row |= {"predicted": one.predicted, "correct": one.correct}
    if one.item.group:
        row["group"] = one.item.group
    if one.output is not None:
        row["output"] = one.output
    if one.scores is not None:
        row["scores"] = dict(one.scores)
    return row
