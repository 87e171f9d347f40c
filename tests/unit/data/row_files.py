"""Rows in files of every kind, and the text of an error, for the tests of this folder."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from silotune.core.errors import DataError

SECRET = "hypertension"
"""A value of a row; no message may contain it."""


def make_rows(num_rows, source="north"):
    return [{"source": source, "question": f"q{n}?", "answer": f"a{n}."} for n in range(num_rows)]


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return path


def error_of(call, *args, kind=DataError, **settings):
    with pytest.raises(kind) as caught:
        call(*args, **settings)
    text = str(caught.value)
    assert SECRET not in text
    assert "\n  " in text, "the fix is missing"
    return text
