"""Results as numbers: what a table shows as text, unrounded."""

import math

from silotune.results.frames import client_numbers, frame, round_numbers
from silotune.results.run_tables import round_table
from silotune.results.summary import loss_table
from tests.unit.results.page_values import rows_of, summary_of

NAMES = ("north", "south")


def test_the_numbers_of_rounds_are_those_of_the_table():
    rows = rows_of(NAMES)
    numbers, (_, *table) = round_numbers(rows), round_table(rows)
    assert len(numbers) == len(table) > 2
    for row, line in zip(numbers, table, strict=True):
        assert line[0].partition(" ")[0] == str(row["round"])
        shown = [row["train_loss"], row["held_out_loss"]]
        assert list(line[1:3]) == ["-" if n is None else f"{n:.3f}" for n in shown]
    found = frame(numbers)
    assert list(found["round"]) == [row["round"] for row in numbers]
    assert found["held_out_loss"].dtype == float


def test_the_numbers_of_clients_are_those_of_the_table():
    summary = summary_of(NAMES)
    for row, line in zip(client_numbers(summary), loss_table(summary)[1:], strict=False):
        shown = [row["base_loss"], row["federated_loss"]]
        assert line[:3] == (row["client"], str(row["num_train"]), str(row["num_eval"]))
        assert list(line[3:5]) == [f"{n:.3f}" for n in shown]
        assert row["change"] == row["federated_loss"] - row["base_loss"]


def test_what_was_not_measured_is_nan_in_a_column_of_numbers():
    summary = summary_of(NAMES)
    summary["clients"]["south"]["federated_loss"] = None
    found = frame(client_numbers(summary))
    assert found["change"].dtype == float
    assert [math.isnan(value) for value in found["change"]] == [False, True]
