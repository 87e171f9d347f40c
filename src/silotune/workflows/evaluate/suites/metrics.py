"""Classification metrics for outputs that may not be an answer."""

from collections.abc import Sequence
from typing import Any

UNPARSABLE = "(unparsable)"
"""The class of outputs that are not an answer. It can be predicted, but is never gold."""


def classification(
    golds: Sequence[str], predictions: Sequence[str | None], labels: Sequence[str]
) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation.

    Outputs that are not an answer form an extra class, with these effects:

    - accuracy: they count as wrong;
    - macro F1 (the mean over `labels`, without the extra class): they lower the recall of the gold
      class, but no precision. A label that is neither gold nor predicted counts as 0;
    - Matthews correlation: an additional predicted class that is never gold. It lowers the
      correlation, usually less than a wrong label that other items have. If golds and predictions
      together have only one label, the correlation is undefined and 0 is returned.

    Args:
        golds: The right label of each item; at least one item.
        predictions: The predicted label, or None.
        labels: All labels of the suite.

    Example:
        >>> found = classification(["yes", "no"], ["yes", None], ["yes", "no"])
        >>> {name: round(value, 2) for name, value in found.items()}
        {'accuracy': 0.5, 'macro_f1': 0.5, 'mcc': 0.5}
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    given = [UNPARSABLE if label is None else label for label in predictions]
    none: Any = 0  # the type stubs allow only the string "warn"
    f1 = f1_score(golds, given, labels=list(labels), average="macro", zero_division=none)
    defined = len({*golds, *given}) > 1
    return {
        "accuracy": float(accuracy_score(golds, given)),
        "macro_f1": float(f1),
        "mcc": float(matthews_corrcoef(golds, given)) if defined else 0.0,
    }
