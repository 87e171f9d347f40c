"""Cards and pages of a private run hold no number about rows that has no noise."""

import copy

import pytest

from silotune.federation.privacy_guarantee import promise_of
from silotune.recipes.parse import parse
from silotune.results.card import model_card
from silotune.results.export_card import export_card
from silotune.results.page import run_page
from tests.unit.results.page_values import provenance, rows_of, samples_of, split_of, summary_of

NAMES = ("north", "south", "west")
PRIVATE = {
    "client": {"unit": "client", "noise_multiplier": 2.0, "delta": 1e-3},
    "record": {"unit": "record", "noise_multiplier": 2.0, "delta": 1e-3},
}
CURVE = {"base": {"accuracy": 0.4, "macro_f1": 0.3, "mcc": 0.1}}
CURVE["federated"] = CURVE["base"]


def run_of(unit):
    table = {"rounds": 3, "data": {"path": "medquad_mini"}, "algorithm": {"weights": "uniform"}}
    return parse(table | ({"privacy": PRIVATE[unit]} if unit else {}))


def told(run):
    promise = promise_of(run, dict.fromkeys(NAMES, 40))
    own = {"epsilon": promise["epsilon"], "num_released": 3}
    clients = {} if run.privacy.unit == "client" else {"clients": dict.fromkeys(NAMES, own)}
    return {"promise": promise, **own, "epsilon_replace": 2.0, "not_protected": [], **clients}


def results_of(unit, *, factor=1.0, label="yes", answer="An answer."):
    """A run's results; all that its rows decide is multiplied, or another word."""
    summary, rows = copy.deepcopy(summary_of(NAMES)), rows_of(NAMES)
    for losses in (*summary["clients"].values(), summary["overall"]):
        losses.update({key: factor * losses[key] for key in ("base_loss", "federated_loss")})
    for key in ("tokens_trained", "seconds_training", "peak_memory_bytes"):
        summary[key] = int(factor * summary[key])
    scores = {a: {k: factor * v for k, v in own.items()} for a, own in CURVE.items()}
    summary["scores"] = {"clients": dict.fromkeys(NAMES, scores), "overall": scores}
    pair = {"predicted": 100, "actual": int(100 * factor), "difference": factor}
    summary["predicted"] = {"bytes": None, "memory": pair, "seconds": pair, "notes": []}
    rows = [
        {
            **row,
            "delta_norm": factor,
            "penalty": factor,
            **{
                key: factor * row[key]
                for key in ("loss", "train_loss", "num_tokens", "seconds_training", "seconds")
                if key in row
            },
        }
        for row in rows
    ]
    split = split_of(NAMES)
    for own in split.values():
        own["tokens"] = {key: factor * value for key, value in own["tokens"].items()}
        own["labels"] = {label: int(3 * factor)}
    samples = [{**own, "answers": {"federated": answer}} for own in samples_of(NAMES)]
    if unit:
        summary["privacy"] = told(run_of(unit))
    return summary, rows, split, samples


def texts(unit, **changes):
    run = run_of(unit)
    summary, rows, split, samples = results_of(unit, **changes)
    export = {"kind": "peft", "gguf_type": "f16", "moved": None}
    return {
        "card": model_card(run, summary, rows, provenance(), split=split),
        "page": run_page(run, summary, rows, provenance(), split=split, samples=samples),
        "export's card": export_card(run, summary, provenance(), **export),
    }


OTHER = {"factor": 1.7, "label": "no", "answer": "Another answer."}


@pytest.mark.parametrize("unit", PRIVATE)
def test_whatever_the_numbers_without_noise_are_what_is_published_is_the_same(unit):
    one, other = texts(unit), texts(unit, **OTHER)
    for name, text in one.items():
        assert text == other[name], name
        assert "DP per" in text
    for name in ("card", "page"):
        assert "Held-out losses have no noise, so they are not shown here." in one[name]


def test_without_privacy_these_numbers_are_shown():
    """Otherwise the test above could not fail."""
    one, other = texts(None), texts(None, **OTHER)
    assert all(text != other[name] for name, text in one.items())
