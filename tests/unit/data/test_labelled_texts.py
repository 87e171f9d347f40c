"""A row becomes a labelled text; what is wrong is named by place and column, never by its text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.core.errors import DataError
from silotune.data.cells import FIX_EMPTY
from silotune.data.clients import fingerprint, load_client, load_clients
from silotune.data.labelled_texts import FORMATS, labelled_text, sorted_labels
from silotune.data.partition import PartitionConfig
from silotune.data.reading import DataConfig
from tests.unit.data.row_files import SECRET, write
from tests.unit.data.row_files import error_of as error_of_call

WHERE = "data.csv:7"


def read(row, **settings):
    return labelled_text(row, where=WHERE, **settings)


def error_of(row, **settings):
    with pytest.raises(DataError) as caught:
        read(row, **settings)
    text = str(caught.value)
    assert text.startswith(f"{WHERE}: ")
    assert "\n  " in text, "the fix is missing"
    assert SECRET not in text
    return text


def rows_of(*labels):
    return [{"label": label} for label in labels]


# --- columns ---


@pytest.mark.parametrize("names", FORMATS, ids="+".join)
def test_every_known_pair_of_columns_becomes_one_shape(names):
    row = {name: f"the {name}" for name in names}
    parts = dict(zip(("text", "text_pair"), row.values(), strict=False))
    assert read({**row, "label": 1}) == {**parts, "label": "1"}


@pytest.mark.parametrize("names", [names for names in FORMATS if len(names) == 2], ids="+".join)
@pytest.mark.parametrize("single", ["text", "sentence"])
def test_the_longest_format_wins_and_no_second_text_is_dropped(names, single):
    row = {single: "alone", "label": 0} | {name: name for name in names}
    assert read(row) == {"text": names[0], "text_pair": names[1], "label": "0"}


def test_the_first_of_equally_long_formats_wins_whatever_the_order_of_the_columns():
    row = {"hypothesis": "d", "premise": "c", "sentence2": "b", "sentence1": "a", "label": 0}
    assert (
        read(row)
        == read(dict(reversed(row.items())))
        == {
            "text": "a",
            "text_pair": "b",
            "label": "0",
        }
    )


def test_named_columns_win_over_a_known_format():
    row = {"text": "a", "text_pair": "b", "title": "c", "body": "d", "label": 0, "kind": "x"}
    assert read(row, text="title", label="kind") == {"text": "c", "label": "x"}
    assert read(row, text="body", text_pair="title") == {
        "text": "d",
        "text_pair": "c",
        "label": "0",
    }


def test_texts_are_kept_to_the_last_space_and_other_columns_are_ignored():
    assert read({"text": " a\n", "label": 0, "id": None}) == {"text": " a\n", "label": "0"}


def test_the_row_is_not_changed():
    row = {"text": "a", "label": 1.0}
    read(row)
    assert row == {"text": "a", "label": 1.0}


# --- labels ---


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, "0"),
        (12, "12"),
        ("spam", "spam"),
        (" spam\n", "spam"),
        ("1", "1"),
        (1.0, "1"),  # pandas makes a column of integers with a gap one of floats
        (-0.0, "0"),
        (-2, "-2"),
        (True, "True"),
    ],
)
def test_a_label_is_read_as_text(value, label):
    assert read({"text": "a", "label": value}) == {"text": "a", "label": label}


@given(st.integers(0, 2**53))
def test_a_whole_number_is_one_label_however_it_is_written(number):
    kinds = (number, float(number), str(number), f" {number} ")
    assert {read({"text": "a", "label": value})["label"] for value in kinds} == {str(number)}


def test_the_known_labels_are_accepted_by_number_and_by_name():
    assert read({"text": "a", "label": 1}, labels=("0", "1"))["label"] == "1"
    assert read({"text": "a", "label": "spam"}, labels=("ham", "spam"))["label"] == "spam"


def test_minus_one_is_a_label_where_the_recipe_says_so():
    assert read({"text": "a", "label": -1}, labels=("-1", "1"))["label"] == "-1"


def test_numbers_are_sorted_by_size_and_anything_else_by_name():
    assert sorted_labels(rows_of("10", "9", "-2", "9")) == ("-2", "9", "10")
    assert sorted_labels(rows_of("10", "9", "b", "a")) == ("10", "9", "a", "b")


@given(st.lists(st.sampled_from(["0", "1", "2", "10", "-1", "spam", "ham"]), min_size=1))
def test_the_order_of_rows_does_not_decide_on_the_order_of_labels(labels):
    found = sorted_labels(rows_of(*labels))
    assert found == sorted_labels(rows_of(*reversed(labels)))
    assert sorted(found) == sorted(set(labels))


def test_labels_of_one_size_have_one_order_in_every_process():
    # a set of texts is walked in another order in every process, and a stable sort keeps that one
    found = sorted_labels(rows_of(*(f"{zero}{n}" for n in range(30) for zero in ("", "0"))))
    padded_first = {found.index(f"0{n}") < found.index(str(n)) for n in range(30)}
    assert len(padded_first) == 1


# --- errors ---


def test_a_row_in_no_known_format_lists_columns_formats_and_the_fix():
    assert error_of({"title": SECRET, "label": 0}) == (
        "data.csv:7: no known format fits the columns 'title', 'label'.\n"
        "  Accepted, in addition to a label: text; sentence; text and text_pair; sentence1 and "
        "sentence2; premise and hypothesis; question1 and question2; question and sentence.\n"
        '  For other columns set data.text = "a column", and for pairs also data.text_pair.'
    )


def test_a_missing_header_line_does_not_spill_a_text_into_the_message():
    text = error_of({f"{SECRET} is a long text that once was the first row": "x"})
    assert "(a name of 55 characters)" in text


@pytest.mark.parametrize(
    ("settings", "setting"),
    [({"text": "titel"}, "text"), ({"text": "Title", "text_pair": "titel"}, "text_pair")],
)
def test_a_named_column_that_is_not_there_offers_the_nearest(settings, setting):
    assert error_of({"Title": SECRET, "label": 0}, **settings) == (
        f"data.csv:7: data.{setting} = 'titel': there is no such column. "
        "Did you mean 'Title'?\n  The columns are 'Title', 'label'."
    )


@pytest.mark.parametrize("value", ["", " \n", None, float("nan")])
@pytest.mark.parametrize("column", ["premise", "hypothesis"])
def test_an_empty_text_names_its_column(column, value):
    row = {"premise": SECRET, "hypothesis": SECRET, "label": 0, column: value}
    assert error_of(row) == (f"data.csv:7: column '{column}' is empty.\n{FIX_EMPTY}")


@pytest.mark.parametrize("value", [3, [SECRET], {"a": SECRET}, True])
def test_what_is_no_text_names_its_column(value):
    text = error_of({"text": value, "label": 0})
    fix = "  Put the text there, or remove the row."
    assert text == f"data.csv:7: column 'text' does not hold text.\n{fix}"


def test_half_a_character_is_refused_before_a_tokenizer_sees_it():
    # JSON lets a lone surrogate through, tokenizers do not; rows of conversations refuse it too
    assert "column 'text'" in error_of({"text": SECRET + "\ud800", "label": 0})


@pytest.mark.parametrize(
    "value", [None, "", " ", float("nan"), float("inf"), 2.5, [SECRET], {"a": SECRET}]
)
def test_what_is_no_label_names_its_column_and_the_fix(value):
    first, fix = error_of({"text": SECRET, "kind": value}, label="kind").split("\n")
    assert "the label column 'kind'" in first
    assert fix == (
        "  Every row needs one label, which is text or a whole number. Set data.label to the "
        "column that holds it, or remove the row."
    )


def test_a_label_column_that_is_there_is_not_offered_in_its_own_place():
    # "the label column 'label' has no value. Did you mean 'label'?" helps nobody
    assert "Did you mean" not in error_of({"text": SECRET, "label": None})


def test_a_label_column_that_is_not_there_offers_the_nearest():
    first = error_of({"text": SECRET, "Label": 0}).split("\n")[0]
    assert first == "data.csv:7: the label column 'label' does not exist. Did you mean 'Label'?"


def test_an_unknown_label_is_named_with_the_known_ones():
    assert error_of({"text": SECRET, "kind": "sapm"}, label="kind", labels=("ham", "spam")) == (
        "data.csv:7: column 'kind' has the unknown label 'sapm'.\n"
        "  data.labels contains 'ham', 'spam'. Add the label there, or remove the row."
    )


def test_a_text_column_taken_for_the_labels_does_not_spill_a_text_into_the_message():
    # as with column names: what is longer than 40 characters is a text, and only its length is told
    row = {"text": f"{SECRET} was found in a patient of this clinic last winter", "label": 0}
    error_of(row, label="text", text="text", labels=("0", "1"))


def test_a_long_list_of_known_labels_is_cut():
    text = error_of({"text": SECRET, "label": "x"}, labels=[f"n{i}" for i in range(300)])
    assert "'n19'" in text
    assert "'n20'" not in text


@pytest.mark.parametrize("value", [-1, -1.0, "-1", " -1 "])
@pytest.mark.parametrize("labels", [None, ("0", "1")])
def test_rows_whose_labels_are_kept_back_point_to_another_split(value, labels):
    text = error_of({"text": SECRET, "label": value}, labels=labels)
    assert "'-1'" in text
    assert "marks rows without a public label" in text
    assert "another split" in text


# --- from files to clients ---

SPAM = [
    {"site": site, "text": f"{site} text {n}", "label": n % 3 % 2}
    for site in ("north", "south")
    for n in range(6)
]
BY_SITE = PartitionConfig(by="site")


def load(path, partition=BY_SITE, *, seed=17, **settings):
    cfg = DataConfig(path=str(path), **settings)
    return load_clients(cfg, partition, seed=seed, task="classify")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_files_of_every_kind_give_the_same_rows(tmp_path, ending):
    found = load(write(tmp_path / f"a.{ending}", SPAM))
    assert fingerprint(found) == fingerprint(load(write(tmp_path / "plain.jsonl", SPAM)))
    assert all(type(row["label"]) is str for row in found["north"].train)


@pytest.mark.parametrize("settings", [{}, {"max_rows": 3}, {"labels": ("1", "0")}])
def test_a_client_knows_the_label_of_each_of_its_train_rows(tmp_path, settings):
    path = write(tmp_path / "a.jsonl", SPAM)
    truth = {row["text"]: str(row["label"]) for row in SPAM}
    clients = load(path, **settings)
    for client in clients.values():
        assert client.labels == tuple(row["label"] for row in client.train)
        assert client.labels == tuple(truth[row["text"]] for row in client.train)
        assert len(client.labels) == settings.get("max_rows", 5)


def test_a_real_client_gets_the_labels_and_the_split_of_its_simulation(tmp_path):
    both = load(write(tmp_path / "both.jsonl", SPAM))
    alone = DataConfig(path=str(write(tmp_path / "alone.jsonl", SPAM[6:])))
    assert load_client(alone, "south", seed=17, task="classify") == both["south"]


def test_bad_rows_are_reported_together_and_the_fix_once(tmp_path):
    bad = [{"site": "north", "text": SECRET, "label": "x"}] * 22
    path = write(tmp_path / "a.jsonl", SPAM[:2] + bad)
    assert error_of_call(load, path, labels=("0", "1")).split("\n") == [
        *(f"{path}:{n}: column 'label' has the unknown label 'x'." for n in range(3, 23)),
        "and 2 more rows",
        "  data.labels contains '0', '1'. Add the label there, or remove the row.",
    ]


def test_a_label_that_only_a_held_out_row_has_is_checked_too(tmp_path):
    train = write(tmp_path / "a.jsonl", SPAM)
    held = write(tmp_path / "b.jsonl", [{**row, "label": 5} for row in SPAM])
    text = error_of_call(load, train, eval_path=str(held), labels=("0", "1"))
    assert f"{held}:1: column 'label' has the unknown label '5'." in text


def test_a_single_text_among_pairs_is_named(tmp_path):
    # the tokenizer gets texts and second texts as two lists, and these must be of one length
    rows = [{**row, "text_pair": "and this"} for row in SPAM]
    del rows[7]["text_pair"]
    path = write(tmp_path / "a.jsonl", rows)
    assert f"{path}:8" in error_of_call(load, path)


def test_the_fingerprint_sees_labels(tmp_path):
    other = [*SPAM[:-1], {**SPAM[-1], "label": 1 - SPAM[-1]["label"]}]
    one, two = (load(write(tmp_path / f"{i}.jsonl", rows)) for i, rows in enumerate((SPAM, other)))
    assert fingerprint(one) != fingerprint(two)


# --- config ---


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"text_pair": "b"}, "text_pair goes with text; set both"),
        ({"labels": ("a", "b", "a")}, "labels contains a label twice"),
        ({"labels": ("a",)}, "at least 2 items"),
        ({"labels": (0, 1)}, "valid string"),
        ({"text": ""}, "at least 1 character"),
    ],
)
def test_contradictions_are_refused(settings, text):
    with pytest.raises(ValidationError, match=text):
        DataConfig(**{"path": "a", **settings})


def test_a_resolved_config_can_be_read_again():
    cfg = DataConfig(path="a", labels=("no", "yes"), text="t", text_pair="u", label="k")
    assert DataConfig(**json.loads(cfg.model_dump_json())) == cfg
