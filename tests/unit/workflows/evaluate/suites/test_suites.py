"""Rows of benchmark suites become items: layouts on the hub and in files, and what can go wrong."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from silotune.core.errors import ConfigError, DataError
from silotune.workflows.evaluate.suites import SUITES
from silotune.workflows.evaluate.suites.base import Hub, Item, Layout, Suite, find_suite, load_items
from silotune.workflows.evaluate.suites.finance import fiqa_label
from silotune.workflows.evaluate.suites.mmlu import GROUPS
from tests.conftest import write_jsonl

DATA = Path(__file__).parents[6] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")

OPTIONS = {"A": "Aspirin", "B": "Ibuprofen", "C": "Codeine", "D": "Insulin"}
LOCAL = {"id": "q1", "question": "What lowers sugar?", "options": OPTIONS, "answer": "D"}
SECRET = "Ibuprofen"
"""A value of a row; no message may contain it."""


def read(name: str, row: dict) -> Item:
    return SUITES[name].read(row, "rows.jsonl:1")


def error_of(call, *args, kind=DataError):
    with pytest.raises(kind) as caught:
        call(*args)
    text = str(caught.value)
    assert SECRET not in text
    assert "\n  " in text, "the message does not say how to fix it"
    return text


# --- the hub's layouts ----------------------------------------------------------------------------


def test_medqa_on_the_hub_names_the_answer_by_its_text():
    options = [{"key": key, "value": text} for key, text in OPTIONS.items()]
    row = {"question": "Q?", "options": options, "answer": "Codeine", "answer_idx": "C"}
    item = read("medqa", row)
    assert (dict(item.options), item.gold) == (OPTIONS, "C")


@pytest.mark.parametrize(
    ("name", "columns", "cop", "gold"),
    [
        ("medmcqa", ("opa", "opb", "opc", "opd"), 0, "A"),
        ("medmcqa", ("opa", "opb", "opc", "opd"), 3, "D"),
        ("careqa", ("op1", "op2", "op3", "op4"), 1, "A"),
        ("careqa", ("op1", "op2", "op3", "op4"), 4, "D"),
    ],
)
def test_one_column_an_option_and_the_number_of_the_right_one(name, columns, cop, gold):
    row = {"question": "Q?", "cop": cop, **dict(zip(columns, OPTIONS.values(), strict=True))}
    item = read(name, row)
    assert (dict(item.options), item.gold) == (OPTIONS, gold)
    assert read(name, {**row, "cop": str(cop)}).gold == gold  # as a CSV file holds it


@pytest.mark.parametrize(
    "row",
    [
        {"QUESTION": "Is it?", "CONTEXTS": ["One.", "Two."], "final_decision": "maybe"},
        {"question": "Is it?", "contexts": ["One.", "Two."], "final_decision": "maybe"},
        {
            "question": "Is it?",
            "context": {"contexts": ["One.", "Two."]},
            "final_decision": "maybe",
        },
    ],
)
def test_pubmedqa_puts_the_abstract_before_the_question(row):
    item = read("pubmedqa", row)
    assert "One.\nTwo.\nIs it?\nThe answer is:\n" in item.leaderboard
    assert item.prompt.startswith("One.\nTwo.\n\nIs it?")
    assert (item.gold, list(item.options)) == ("maybe", ["yes", "no", "maybe"])


@pytest.mark.parametrize(
    "row",
    [
        {"input": "Q?", **OPTIONS, "target": "B", "subject": "sociology"},
        {"question": "Q?", "choices": [*OPTIONS.values()], "answer": 1, "subject": "sociology"},
        {"question": "Q?", "options": OPTIONS, "answer": "B", "subject": "sociology"},
    ],
)
def test_mmlu_reads_three_layouts_and_groups_by_subject(row):
    item = read("mmlu", row)
    assert (dict(item.options), item.gold, item.group) == (OPTIONS, "B", "social")
    del row["subject"]
    assert read("mmlu", row).group == ""


def test_mmlu_has_57_subjects_in_the_groups_of_the_leaderboard():
    sizes = {group: len(subjects) for group, subjects in GROUPS.items()}
    assert sizes == {"STEM": 19, "social": 12, "humanities": 13, "other": 13}
    assert len({subject for subjects in GROUPS.values() for subject in subjects}) == 57


@pytest.mark.parametrize(
    ("name", "row", "gold"),
    [
        ("fpb", {"sentence": "s", "label": 0}, "negative"),
        ("fpb", {"sentence": "s", "label": 1}, "neutral"),
        ("fpb", {"sentence": "s", "label": "2"}, "positive"),
        ("tfns", {"text": "s", "label": 0}, "negative"),
        ("tfns", {"text": "s", "label": 1}, "positive"),
        ("tfns", {"text": "s", "label": 2}, "neutral"),
        ("fiqa", {"sentence": "s", "sentiment_score": -0.1}, "neutral"),
        ("fiqa", {"sentence": "s", "sentiment_score": "0.1"}, "positive"),
    ],
)
def test_sentiment_labels(name, row, gold):
    assert read(name, row).gold == gold


def test_fiqa_scores_become_classes():
    scores = (-0.5, -0.11, -0.1, 0.0, 0.099, 0.1, 0.9)
    assert [fiqa_label(s)[:3] for s in scores] == ["neg", "neg", *["neu"] * 3, "pos", "pos"]


# --- from the hub, without a network --------------------------------------------------------------


def write_hub(folder: Path, num_rows: int) -> Path:
    """A folder with the layout of the hub's plain copy of a data set that a script builds."""
    rows = [{"text": f"tweet {n}", "label": n % 3} for n in range(num_rows)]
    place = folder / "hub" / "config" / "test"
    place.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / "0000.parquet")
    return folder / "hub"


def hub_suite(path: Path, held_out: float | None = None) -> Suite:
    def item(row, where):
        return Item(row["text"], row["extra"], {"0": "0"}, "0")

    hub = Hub(str(path), "config", "test", exported=True, columns={"extra": "added"})
    return Suite("tiny", "Tiny", (hub,), (Layout(("text",), item),), "choice", held_out)


def test_a_set_made_by_a_script_is_read_from_the_hubs_plain_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    items = load_items(hub_suite(write_hub(tmp_path, 8)))
    assert [item.id for item in items] == [f"tweet {n}" for n in range(8)]
    assert {item.prompt for item in items} == {"added"}


def test_the_held_out_quarter_is_that_of_train_test_split_with_seed_42(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    items = load_items(hub_suite(write_hub(tmp_path, 40), held_out=0.25))
    oracle = datasets.Dataset.from_list([{"text": f"tweet {n}"} for n in range(40)])
    oracle = oracle.train_test_split(test_size=0.25, seed=42)["test"]
    assert [item.id for item in items] == list(oracle["text"])
    assert len(items) == 10


def test_a_set_that_the_hub_does_not_have_is_an_error_that_names_the_suite_and_offers_a_file(
    tmp_path,
):
    text = error_of(load_items, hub_suite(tmp_path / "nothing"))
    assert "suite 'tiny'" in text
    assert "--data FILE" in text


# --- local files ----------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(
    ("name", "file", "golds"),
    [
        ("pubmedqa", "pubmedqa/train.jsonl", {"yes": 276, "no": 169, "maybe": 55}),
        ("medqa", "medqa/test_part.jsonl", 595),
        ("medmcqa", "medmcqa/dev_part.jsonl", 2092),
        ("mmlu", "mmlu_med/test_part.jsonl", 532),
        ("fpb", "fpb/train.jsonl", 3387),
        ("tfns", "tfns/train.jsonl", {"negative": 1442, "positive": 1923, "neutral": 6178}),
    ],
)
def test_real_files_are_read_whole(name, file, golds):
    items = load_items(SUITES[name], DATA / file)
    counts = Counter(item.gold for item in items)
    assert counts == golds if isinstance(golds, dict) else counts.total() == golds
    assert len({item.id for item in items}) == len(items)
    assert all(item.prompt and item.leaderboard for item in items)


def test_a_row_without_an_id_is_named_by_its_location(tmp_path):
    rows = [{k: v for k, v in LOCAL.items() if k != "id"}] * 2
    items = load_items(SUITES["medqa"], write_jsonl(tmp_path / "q.jsonl", rows))
    assert [item.id for item in items] == ["q.jsonl:1", "q.jsonl:2"]


def test_an_empty_option_of_a_parquet_file_is_left_out():
    assert dict(read("medqa", {**LOCAL, "options": {**OPTIONS, "E": None}}).options) == OPTIONS


# --- mistakes -------------------------------------------------------------------------------------


def test_a_missing_column_is_named_with_the_nearest_and_all_that_are_there(tmp_path):
    row = {"questions": "Q?", "options": OPTIONS, "answer": "B"}
    path = write_jsonl(tmp_path / "mine.jsonl", [row])
    text = error_of(load_items, SUITES["medqa"], path)
    assert text.startswith(f"{path}:1: suite 'medqa' needs column 'question', which is missing.")
    assert "Did you mean 'questions'?" in text
    assert "The columns are 'questions', 'options', 'answer'." in text


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("medqa", {"answer": "F"}, "column 'answer' is none of the options A, B, C, D"),
        ("medqa", {"answer": "Ibuprofen"}, "column 'answer' is none of the options"),
        ("medqa", {"question": "  "}, "column 'question' is empty"),
        ("medqa", {"question": None}, "column 'question' is empty"),
        ("medqa", {"question": "half \ud800"}, "half a character"),
        ("medqa", {"options": "A: Aspirin"}, "column 'options' is of type str"),
        ("medqa", {"options": {"A": "Aspirin"}}, "two to five texts"),
        ("medqa", {"options": {**OPTIONS, "X": "x"}}, "Use the letters A, B, C, D, E"),
        ("mmlu", {"subject": "socialogy"}, "Did you mean 'sociology'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_place_and_column(name, changed, says):
    text = error_of(read, name, {**LOCAL, **changed})
    assert text.startswith("rows.jsonl:1: ")
    assert says in text


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("fpb", {"sentence": "s", "label": 3}, "none of 0 (negative), 1 (neutral), 2 (positive)"),
        ("fpb", {"sentence": "s", "label": "good"}, "column 'label' is not a number"),
        ("fpb", {"sentence": "s", "label": 0.5}, "column 'label' is none of"),
        (
            "careqa",
            {"question": "q", **{f"op{n}": "x" for n in (1, 2, 3, 4)}, "cop": 0},
            "none of 1",
        ),
        ("pubmedqa", {"question": "q", "contexts": "c", "final_decision": "yes"}, "list of texts"),
        (
            "pubmedqa",
            {"question": "q", "contexts": ["c"], "final_decision": "Yes"},
            "yes, no, maybe",
        ),
        ("mmlu", {"question": "q", "choices": ["a"], "answer": 0}, "two to five texts"),
    ],
)
def test_a_label_that_is_none_of_the_suites_is_an_error(name, row, says):
    assert says in error_of(read, name, row)


def test_an_unknown_suite_offers_the_nearest_and_lists_all():
    text = error_of(find_suite, "medq", SUITES, kind=ConfigError)
    assert "'medq' is not a benchmark suite. Did you mean 'medqa'?" in text
    assert all(name in text for name in SUITES)
    assert find_suite("fpb", SUITES) is SUITES["fpb"]


def test_a_missing_file_is_an_error(tmp_path):
    assert "there is no such file" in error_of(load_items, SUITES["fpb"], tmp_path / "no.jsonl")


def test_items_are_plain_enough_for_json():
    assert json.dumps(dict(read("medqa", LOCAL).options))
