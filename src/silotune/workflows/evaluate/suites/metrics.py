"""Classification metrics, where an answer may also be none."""

from collections.abc import Sequence
from typing import Any

UNPARSABLE = "(unparsable)"
"""The class of outputs that are no answer. It is predicted, and never gold."""


def classification(
    golds: Sequence[str], predictions: Sequence[str | None], labels: Sequence[str]
) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation.

    Outputs that are no answer are a class of their own. What that does:

    - accuracy: they count as wrong;
    - macro F1 (the mean over `labels`, without that class): they lower the recall of the gold
      class and the precision of none. A label that is neither gold nor predicted counts 0;
    - Matthews correlation: one more predicted class, which no gold has. It lowers the correlation,
      as a rule less so than a wrong label that other items bear. Where golds and predictions
      together have one label only it is not defined, and 0 is given.

    Args:
        golds: The right label of each item; at least one item.
        predictions: The label given, or None.
        labels: All labels of the suite.

    Example:
        >>> found = classification(["yes", "no"], ["yes", None], ["yes", "no"])
        >>> {name: round(value, 2) for name, value in found.items()}
        {'accuracy': 0.5, 'macro_f1': 0.5, 'mcc': 0.5}
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    given = [UNPARSABLE if label is None else label for label in predictions]
    none: Any = 0  # the type stubs know only the text "warn"
    f1 = f1_score(golds, given, labels=list(labels), average="macro", zero_division=none)
    defined = len({*golds, *given}) > 1
    return {
        "accuracy": float(accuracy_score(golds, given)),
        "macro_f1": float(f1),
        "mcc": float(matthews_corrcoef(golds, given)) if defined else 0.0,
    }
