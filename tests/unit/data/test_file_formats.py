"""Formats that people have: compressed, JSON in its many layouts, sparse rows."""

import gzip
import json

import pytest

from silotune.data.file_formats import MOST_TIMES, ending_of, stem_of
from silotune.data.files import read_rows
from tests.unit.data.row_files import SECRET, error_of, make_rows, write

ROWS = make_rows(3)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", "\n" + LINES + "\n\n"),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.jsonl", json.dumps(ROWS, indent=2)),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.json", json.dumps({"version": "1", "info": {"by": "x"}, "rows": ROWS}, indent=1)),
        (
            "a.tsv",
            "source\tquestion\tanswer\n" + "".join("\t".join(r.values()) + "\n" for r in ROWS),
        ),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_every_layout_gives_the_same_rows(tmp_path, name, text, compressed):
    path = tmp_path / (name + ".gz" * compressed)
    path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    assert read_rows(path) == ROWS


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [{"role": "user", "content": SECRET}]},
        {"conversations": [{"from": "human", "value": SECRET}]},
        {"question": {"0": SECRET}, "answer": {"0": "b"}},
        {"question": [SECRET], "answer": ["b"]},
        {"train": [{"question": SECRET}], "test": [{"question": SECRET}]},
        {"data": []},
        SECRET,
        3,
    ],
)
def test_an_object_that_holds_no_single_list_of_rows_is_an_error(tmp_path, value):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value))
    assert "the file does not contain a list of objects." in error_of(read_rows, path)


def test_lines_of_lists_are_no_list_of_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('["a"]\n["b"]\n')
    assert f"{path}:1: expected an object, but the type is list." in error_of(read_rows, path)


def test_every_bad_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": "a"}}\n{{"x": {SECRET}\n[1]\n{{"question": "b"}}\n"{SECRET}"\n')
    heads = error_of(read_rows, path).splitlines()[:3]
    assert [head.split(": ")[0] for head in heads] == [f"{path}:{n}" for n in (2, 3, 5)]


def test_a_missing_key_is_an_empty_cell(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "c"}\n{"answer": "d"}\n')
    assert read_rows(path)[1:] == [
        {"question": "c", "answer": None},
        {"question": None, "answer": "d"},
    ]


def test_a_file_that_expands_without_bound_is_refused_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("silotune.data.file_formats.ALWAYS", 2**20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 2**22))
    text = error_of(read_rows, path)
    assert f"over {MOST_TIMES} times its size" in text
    assert "decompress it" in text


@pytest.mark.parametrize("damage", ["cut", "no gzip", "changed"])
def test_a_damaged_compressed_file_is_an_error(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(LINES.encode())
    path.write_bytes(
        {"cut": whole[:-9], "no gzip": b"plain", "changed": whole[:30] + b"xx" + whole[32:]}[damage]
    )
    assert "not a complete gzip file" in error_of(read_rows, path)


def test_a_compressed_file_under_a_plain_name_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(LINES.encode()))
    assert f"Rename it to {path.name}.gz." in error_of(read_rows, path)


@pytest.mark.parametrize("name", ["a.gz", "a.tar.gz", "a.parquet.gz", "a.csv.gz.gz", "a.csv.zip"])
def test_other_compressed_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"x"))
    assert "cannot be read." in error_of(read_rows, tmp_path / name)


def test_a_sheet_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    assert "In Excel or LibreOffice, save the sheet as CSV in UTF-8." in error_of(
        read_rows, tmp_path / "a.xlsx"
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("question,answer\na,grün\n".encode("cp1252"), ":2: the text is not UTF-8."),
        ("question,answer\na,grün\n".encode("utf-16"), ":1: the text is UTF-16, not UTF-8."),
    ],
)
def test_another_encoding_is_named_with_its_line_and_the_way_out(tmp_path, data, said):
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    text = error_of(read_rows, path)
    assert text.startswith(f"{path}{said}")
    assert '"CSV UTF-8"' in text


def test_endings_and_stems(tmp_path):
    assert (ending_of(tmp_path / "a.b.CSV.GZ"), stem_of(tmp_path / "a.b.CSV.GZ")) == (
        ".csv.gz",
        "a.b",
    )
    rows = write(tmp_path / "a.jsonl", ROWS)
    assert (ending_of(rows), stem_of(rows)) == (".jsonl", "a")
