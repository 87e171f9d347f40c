import pytest

from silotune.core.errors import DataError, HubUnreachable
from silotune.data.files import EXAMPLES, locate, read_hub, read_place, read_rows
from tests.unit.data.row_files import SECRET, error_of, make_rows, write


def find(path):
    """The train and the held-out part, as data.path is read when it is not on the hub."""
    place = locate(str(path))
    assert place is not None
    return read_place(place)


def places(path):
    return [row.where for row in find(path)[0].rows]


# --- reading a file ---


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".CSV"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, ending):
    rows = [*make_rows(3), {"source": "süd", "question": "a,\n\u2028b", "answer": 'c "d"'}]
    assert read_rows(write(tmp_path / f"data{ending}", rows)) == rows


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"question": "a", "answer": "b"}\n\n{"question": "c", "answer": ""}\n\n')
    assert places(path) == [f"{path}:2", f"{path}:4"]


def test_a_csv_row_is_named_by_its_first_line(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('question,answer\n"a\nb",c\n\nd,\n')
    assert places(path) == [f"{path}:2", f"{path}:5"]


def test_the_cells_that_a_short_csv_row_lacks_are_empty(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("question,answer\na\n")
    assert read_rows(path) == [{"question": "a", "answer": ""}]


def test_a_missing_file_offers_the_nearest(tmp_path):
    write(tmp_path / "data.csv", make_rows(2))
    text = error_of(read_rows, tmp_path / "date.csv")
    assert text.startswith(f"{tmp_path / 'date.csv'}: there is no such file or folder.")
    assert "Did you mean 'data.csv'?" in text


def test_a_missing_folder_is_named(tmp_path):
    text = error_of(find, tmp_path / "nowhere" / "data.csv")
    assert f"no such file or folder, and no folder '{tmp_path / 'nowhere'}'." in text


def test_an_unknown_ending_lists_the_known_ones(tmp_path):
    path = tmp_path / "data.xlsx"
    path.write_bytes(b"x")
    text = error_of(find, path)
    assert "files ending in '.xlsx' cannot be read." in text
    assert "Save it as one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet." in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.jsonl", ""),
        ("data.json", ""),
        ("data.json", "[]"),
        ("data.csv", ""),
        ("data.csv", "question,answer\n"),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert error_of(find, tmp_path / name) == (
        f"{tmp_path / name}: the file has no rows.\n  Add rows, or remove the file."
    )


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_invalid_json_is_named_by_its_line(tmp_path, name):
    path = tmp_path / name
    path.write_text(f'{{"question": "a"}}\n{{"answer": {SECRET}}}\n')
    assert f"{path}:2: not valid JSON at character " in error_of(find, path)


def test_nesting_without_end_is_an_error_with_a_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n' + "[" * 200_000 + "\n")
    assert f"{path}:2: " in error_of(find, path)


@pytest.mark.parametrize("item", [f'"{SECRET}"', "[]", "3", "null"])
def test_a_line_that_is_no_object_is_named(tmp_path, item):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"question": "a", "answer": "b"}}\n{item}\n')
    assert f"{path}:2: expected an object, but the type is " in error_of(find, path)


def test_a_json_file_must_hold_a_list_of_objects(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(f'{{"question": "{SECRET}"}}')
    assert "the file does not contain a list of objects." in error_of(find, path)
    path.write_text(f'[{{"question": "a"}}, "{SECRET}"]')
    assert f"{path}, row 2: expected an object, but the type is str." in error_of(find, path)


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv"])
def test_a_text_that_is_not_utf8_is_named_by_its_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"question,answer\n" + f"{SECRET},gr\u00fc\u00df".encode("latin-1"))
    assert f"{path}:2: the text is not UTF-8." in error_of(find, path)


def test_a_csv_row_with_too_many_cells_is_named(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(f"question,answer\na,b\n{SECRET},b,c\n")
    assert f"{path}:3: the row has 3 cells, the header has 2." in error_of(find, path)


@pytest.mark.parametrize("rest", [f'"{SECRET}', f'"{SECRET}" x,b'])
def test_a_damaged_csv_is_named_by_its_line(tmp_path, rest):
    path = tmp_path / "data.csv"
    path.write_text(f"question,answer\na,b\n{rest}\nc,d\n")
    assert f"{path}:3: not valid CSV" in error_of(find, path)


def test_two_csv_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("question,answer,answer\na,b,c\n")
    assert f"{path}:1: column names occur more than once: 'answer'." in error_of(find, path)


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_bytes(f"PAR1{SECRET}".encode())
    assert f"{path}: not a readable parquet file" in error_of(find, path)
    whole = write(path, make_rows(100)).read_bytes()
    path.write_bytes(whole[:4] + b"x" * 40 + whole[44:])
    assert f"{path}: not a readable parquet file" in error_of(find, path)


def test_a_parquet_row_is_named_by_its_number(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": None}]
    path = write(tmp_path / "key=value" / "data.parquet", rows)
    assert read_rows(path) == rows, "folders named key=value must not become columns"
    assert places(path) == [f"{path}, row 1", f"{path}, row 2"]


# --- finding what a path means ---


def test_every_example_carries_its_attribution():
    for folder in EXAMPLES.values():
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "licenses/by/4.0" in text
        assert "cite" in text


def test_a_misspelt_example_is_refused_without_asking_the_hub():
    text = error_of(find, "medquad-mini")
    assert "Did you mean 'medquad_mini'?" in text
    assert "Named examples: medquad_mini, medquad_pairs." in text


@pytest.mark.parametrize("path", ["./x", "~/x-not-here", "/x/y", "a/b/c", "x.csv"])
def test_what_looks_like_a_file_is_not_sought_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no such file or folder" in error_of(find, path)


def test_an_unreachable_hub_is_an_error_that_says_what_was_tried(monkeypatch, tmp_path):
    def stand_in(*args, **settings):
        raise ConnectionError(SECRET)

    monkeypatch.setattr("datasets.load_dataset", stand_in)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_folder").mkdir()
    assert locate("my_foldr") is None
    text = error_of(read_hub, "my_foldr", name=None, split="train", revision=None)
    assert text.startswith(
        "'my_foldr' is neither a named example nor a local file or folder, and its split "
        "'train' could not be read from the hub (ConnectionError). Did you mean 'my_folder'?"
    )


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        (ConnectionError(SECRET), HubUnreachable),
        (FileNotFoundError(SECRET), HubUnreachable),  # offline, it is not in the cache either
        (ValueError("Unknown split"), DataError),  # the data set is in the cache: a mistake
    ],
)
def test_only_rows_that_cannot_be_had_are_unreachable(monkeypatch, trouble, expected):
    def stand_in(*args, **settings):
        raise trouble

    monkeypatch.setattr("datasets.load_dataset", stand_in)
    monkeypatch.setattr("silotune.data.files.why_offline", lambda: "no answer\x1b[2J")
    with pytest.raises(DataError) as found:
        read_hub("org/rows", name=None, split="tset", revision=None)
    assert type(found.value) is expected
    assert SECRET not in str(found.value)
    assert "\x1b" not in str(found.value)


def test_a_client_in_an_unknown_kind_of_file_is_not_lost(tmp_path):
    write(tmp_path / "north.csv", make_rows(5))
    (tmp_path / "south.xlsx").write_bytes(b"x")
    text = error_of(find, tmp_path)
    assert "south.xlsx: files ending in '.xlsx' cannot be read." in text
    assert "or move it out of the folder." in text


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "north").mkdir()
    text = error_of(find, tmp_path)
    assert "no data file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet)." in text
    assert "Its subfolders are not searched: 'north'." in text


def test_a_hub_row_is_named_by_its_split_and_number(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: make_rows(2))
    rows = read_hub("org/name", name=None, split="test", revision=None)
    assert [row.where for row in rows] == ["org/name, test, row 1", "org/name, test, row 2"]


def test_an_empty_split_of_the_hub_is_named(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [])
    text = error_of(read_hub, "org/name", name=None, split="test", revision=None)
    assert "org/name: the split 'test' has no rows." in text


def test_a_folder_with_train_and_eval_has_two_parts(tmp_path):
    write(tmp_path / "train.csv", make_rows(4))
    write(tmp_path / "eval.jsonl", make_rows(2))
    train, held = find(tmp_path)
    assert held is not None
    assert (len(train.rows), len(held.rows), train.files, held.files) == (4, 2, {}, {})


def test_a_folder_of_files_says_which_rows_are_whose(tmp_path):
    write(tmp_path / "south.csv", make_rows(1))
    write(tmp_path / "north.json", make_rows(2))
    train, held = find(tmp_path)
    assert held is None
    assert train.files == {"north": [0, 1], "south": [2]}
