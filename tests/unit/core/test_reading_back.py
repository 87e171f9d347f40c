"""Damaged text files: one kind of error, with the file, the reason and the fix."""

import pytest

from silotune.core.errors import ConfigError, RunFolderError
from silotune.core.reading_back import (
    parse_json,
    parse_toml,
    read_json,
    read_object,
    read_rows,
    read_text,
    read_toml,
)

DAMAGED = {
    "not UTF-8": (b"\xff\xfe{", "it is not UTF-8 text"),
    "truncated": (b'{"a": [1, 2', "Expecting"),
    "empty": (b"", "Expecting value"),
    "a number of 4400 digits": (b'{"a": ' + b"9" * 4400 + b"}", "out of range"),
    "2000 lists deep": (b"[" * 2000 + b"]" * 2000, "nested too deeply"),
    "101 lists deep": (b"[" * 101 + b"]" * 101, "nested too deeply"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_json_file_is_one_error_with_its_name_and_the_fix(tmp_path, how):
    content, why = DAMAGED[how]
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(RunFolderError) as caught:
        read_json(path, fix="Do this.")
    first, fix = str(caught.value).split("\n")
    assert first.startswith(f"{path} cannot be read: ")
    assert why in first
    assert fix == "  Do this."


def test_a_folder_in_the_place_of_a_file_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(RunFolderError, match="x cannot be read: Is a directory"):
        read_text(tmp_path / "x", fix="Do this.")
    with pytest.raises(ConfigError, match="y cannot be read: No such file"):
        read_toml(tmp_path / "y", fix="Do this.", error=ConfigError)


@pytest.mark.parametrize("text", ["[1]", "1", '"a"', "null"])
def test_a_record_that_is_no_object_is_an_error(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(RunFolderError, match="not a JSON object"):
        read_object(tmp_path / "x", fix="Do this.")


def test_a_damaged_line_is_named_by_its_number(tmp_path):
    (tmp_path / "x").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(RunFolderError, match="line 2"):
        read_rows(tmp_path / "x", fix="Do this.")


@pytest.mark.parametrize(
    "text", ["x = " + "[" * 2000 + "]" * 2000, ".".join("a" * 500) + " = 1", "x = " + "9" * 4400]
)
def test_toml_that_python_cannot_hold_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"too deeply|out of range"):
        parse_toml(text)


def test_what_is_allowed_is_read_as_before():
    assert parse_json('{"a": [1, {"b": NaN}]}')["a"][0] == 1
    assert parse_json("[" * 99 + "]" * 99)
    assert parse_toml("a.b.c = [1, 2]") == {"a": {"b": {"c": [1, 2]}}}
