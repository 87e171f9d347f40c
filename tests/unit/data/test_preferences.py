"""A row becomes a prompt with two answers, whatever its layout; mistakes are named by place."""

import copy
import json
import pickle

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import DataError, EmptyRowError
from silotune.data.clients import load_client, load_clients
from silotune.data.duplicates import find_duplicates
from silotune.data.partition import PartitionConfig
from silotune.data.placed_conversation import place_of
from silotune.data.preferences import PROMPTS, is_pair, preference, whole
from silotune.data.reading import DataConfig, usual_columns
from tests.unit.data.row_files import SECRET, error_of, write

WHERE = "pairs.csv:7"
ROW = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def read(row, **settings):
    return preference(row, where=WHERE, **settings)


def refused(row, **settings):
    with pytest.raises(DataError) as caught:
        read(row, **settings)
    text = str(caught.value)
    assert text.startswith(f"{WHERE}: ")
    assert "\n  " in text, "the fix is missing"
    assert SECRET not in text
    return text


# --- layouts ---


PLAIN = {"prompt": [user("2 + 2?")], "chosen": [says("4")], "rejected": [says("5")]}
SAME = {
    "texts": ROW,
    "messages": {
        "prompt": [user("2 + 2?")],
        "chosen": [says("4")],
        "rejected": [says("5")],
    },
    "a text beside lists of answers": {**ROW, "chosen": [says("4")], "rejected": [says("5")]},
    "whole conversations": {
        "chosen": [user("2 + 2?"), says("4")],
        "rejected": [user("2 + 2?"), says("5")],
    },
    "whole conversations beside their prompt": {
        "prompt": "2 + 2?",
        "chosen": [user("2 + 2?"), says("4")],
        "rejected": [user("2 + 2?"), says("5")],
    },
    "JSON text, as in a CSV file": {
        "chosen": json.dumps([user("2 + 2?"), says("4")]),
        "rejected": json.dumps([user("2 + 2?"), says("5")]),
    },
    "ShareGPT's spelling": {
        "prompt": [{"from": "human", "value": "2 + 2?"}],
        "chosen": [{"from": "gpt", "value": "4"}],
        "rejected": [{"from": "gpt", "value": "5"}],
    },
    "texts with a common beginning": {"chosen": "2 + 2? 4", "rejected": "2 + 2? 5"},
    "transcripts": {
        "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5",
    },
}


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_every_layout_becomes_the_same_pair(row):
    assert read(row) == PLAIN
    assert read({**row, "score_chosen": 9.5, "score_rejected": None, "margin": 3}) == PLAIN


@pytest.mark.parametrize("name", PROMPTS)
def test_the_prompt_has_its_usual_names(name):
    row = {name: "2 + 2?", "chosen": "4", "rejected": "5"}
    assert read(row) == PLAIN
    assert usual_columns(["chosen", "note", "rejected", name]) == [name, "chosen", "rejected"]


def test_an_instruction_keeps_its_input():
    row = {"instruction": "Add.", "input": "2, 2", "chosen": "4", "rejected": "5"}
    assert read(row)["prompt"][0]["content"] == "Add.\n\n2, 2"


def test_answers_in_the_prompt_are_context():
    talk = [user("Hi"), says("Hello"), user("2 + 2?")]
    pair = read({"chosen": [*talk, says("4")], "rejected": [*talk, says("5")]})
    assert pair["prompt"] == [user("Hi"), {**says("Hello"), "train": False}, user("2 + 2?")]
    assert whole(pair, "rejected")[-1] == says("5")


def test_conversations_that_differ_early_are_split_at_an_answer():
    chosen = [user("Hi"), says("Hello"), user("Why?"), says("So")]
    rejected = [user("Hi"), says("Hello"), user("How?"), says("So")]
    pair = read({"chosen": chosen, "rejected": rejected})
    assert (pair["prompt"], pair["chosen"]) == ([user("Hi")], chosen[1:])


def test_an_answer_that_continues_the_other_is_not_empty():
    chosen = [user("Hi"), says("Hello"), user("Why?"), says("So")]
    pair = read({"chosen": chosen, "rejected": chosen[:2]})
    assert (pair["prompt"], pair["rejected"]) == ([user("Hi")], [says("Hello")])


def test_a_word_that_both_texts_begin_with_belongs_to_the_answers():
    pair = read({"chosen": "Why? Because.", "rejected": "Why? Beware."})
    assert pair["prompt"] == [user("Why?")]
    assert [pair[n][0]["content"] for n in ("chosen", "rejected")] == ["Because.", "Beware."]


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=3, max_size=3, unique=True))
def test_swapping_the_columns_swaps_the_answers(texts):
    asked, one, other = texts
    if one.strip() == other.strip():
        return
    try:
        pair = read({"prompt": asked, "chosen": one, "rejected": other})
    except DataError:  # half a character
        return
    swapped = read({"prompt": asked, "chosen": other, "rejected": one})
    assert swapped == {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}


def test_a_system_text_is_put_in_front_unless_there_is_one():
    assert read(ROW, system="Be brief.")["prompt"][0] == {"role": "system", "content": "Be brief."}
    own = {"prompt": [{"role": "system", "content": "Mine"}, user("2 + 2?")]}
    row = {**ROW, **own, "chosen": [says("4")], "rejected": [says("5")]}
    assert [t["content"] for t in read(row, system="Be brief.")["prompt"]] == ["Mine", "2 + 2?"]


def test_the_row_is_not_modified():
    row = copy.deepcopy(SAME["whole conversations"])
    read(row, system="Be brief.")
    assert row == SAME["whole conversations"]


# --- mistakes ---


def test_unpaired_feedback_is_recognised():
    text = refused({"prompt": "2 + 2?", "completion": SECRET, "label": True})
    assert "KTO" in text
    assert "two answers to the same prompt" in text


def test_a_missing_column_is_named_with_the_closest_one():
    text = refused({"prompt": SECRET, "chosen": "4", "reject": "5"})
    assert "no column 'rejected'" in text
    assert "Did you mean 'reject'?" in text


@pytest.mark.parametrize(
    ("change", "words"),
    {
        "no prompt": ({"prompt": None, "chosen": "4", "rejected": "5"}, "there is no prompt"),
        "no prompt for messages": (
            {"prompt": None, "chosen": [says("4")], "rejected": [says(SECRET)]},
            "there is no prompt",
        ),
        "the same": ({"chosen": f"{SECRET} ", "rejected": SECRET}, "are the same"),
        "two forms": ({"chosen": [says("4")]}, "column 'chosen' holds messages"),
        "nothing in common": (
            {"prompt": None, "chosen": [user("a"), says("4")], "rejected": [user("b"), says("5")]},
            "no question in common",
        ),
        "another prompt": (
            {"chosen": [user(SECRET), says("4")], "rejected": [user(SECRET), says("5")]},
            "do not begin with the text of column 'prompt'",
        ),
        "a prompt with its answer": (
            {
                "prompt": [user("a"), says("b")],
                "chosen": [says("4")],
                "rejected": [says("5")],
            },
            "the prompt ends with an answer",
        ),
        "a question behind the answer": (
            {"chosen": [says("4"), user("a")], "rejected": [says("5")]},
            "column 'chosen' does not end with an answer",
        ),
        "a list that is none": ({"chosen": [], "rejected": []}, "not a list of messages"),
        "no number": ({"chosen": {"a": 1}}, "column 'chosen' has the type dict"),
    }.values(),
)
def test_a_mistake_has_one_clear_error(change, words):
    assert words in refused({**ROW, **change})


@pytest.mark.parametrize("column", ["chosen", "rejected"])
@pytest.mark.parametrize("empty", [None, float("nan"), "", "  "])
def test_an_empty_answer_can_be_skipped(column, empty):
    with pytest.raises(EmptyRowError, match=f"column '{column}'"):
        read({**ROW, column: empty})


# --- files ---

PAIRS = [
    {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No.", "ward": "ab"[n % 2]}
    for n in range(12)
]


def test_a_csv_file_with_three_columns_is_read(tmp_path):
    path = tmp_path / "pairs.csv"
    pd.DataFrame(PAIRS)[["prompt", "chosen", "rejected"]].to_csv(path, index=False)
    own = load_client(DataConfig(path=str(path)), "north", seed=1, task="prefer")
    assert len(own.train) + len(own.evaluation) == 12
    assert all(is_pair(row) for row in own.every)
    assert place_of(own.train[0]).startswith(str(path))
    assert place_of(pickle.loads(pickle.dumps(own.train[0]))) == place_of(own.train[0])


def test_a_parquet_file_with_messages_is_read_like_text(tmp_path):
    rows = [
        {
            "chosen": [user(row["prompt"]), says(row["chosen"])],
            "rejected": [user(row["prompt"]), says(row["rejected"])],
            "score_chosen": 8.0,
        }
        for row in PAIRS
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "pairs.parquet")
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    found, plain = (
        load_client(DataConfig(path=str(p)), "north", seed=1, task="prefer")
        for p in (tmp_path / "pairs.parquet", path)
    )
    key = lambda row: row["prompt"][0]["content"]  # noqa: E731
    assert sorted(map(dict, found.every), key=key) == sorted(map(dict, plain.every), key=key)


def test_all_mistakes_of_a_file_are_listed_with_their_lines(tmp_path):
    rows = [*PAIRS, {**PAIRS[0], "chosen": SECRET, "rejected": SECRET}, {"prompt": "x"}]
    path = write(tmp_path / "pairs.jsonl", rows)
    text = error_of(lambda: load_client(DataConfig(path=str(path)), "n", seed=1, task="prefer"))
    assert "pairs.jsonl:13: chosen and rejected are the same" in text
    assert "pairs.jsonl:14" in text


def test_pairs_are_split_among_clients_and_compared(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [*PAIRS, *PAIRS[::2]])  # those of ward a
    partition = PartitionConfig(by="ward")
    cfg = DataConfig(path=str(path), label="ward")
    clients = load_clients(cfg, partition, seed=1, task="prefer")
    assert clients["a"].labels == ("a",) * len(clients["a"].train)
    found = find_duplicates(clients)
    assert (found["a"].num_repeated, found["b"].num_repeated) == (len(clients["a"].train) // 2, 0)


def test_the_same_question_with_the_opposite_preference_is_counted(tmp_path):
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"], "ward": "c"} for r in PAIRS]
    path = write(tmp_path / "pairs.jsonl", [*PAIRS, *swapped])
    clients = load_clients(
        DataConfig(path=str(path)), PartitionConfig(by="ward"), seed=1, task="prefer"
    )
    found = find_duplicates(clients)
    assert found["a"].num_other_answer > 0
    assert found["a"].num_elsewhere == 0


@pytest.mark.parametrize("by", ["length", "dirichlet", "iid", "cluster"])
def test_every_partition_can_split_pairs(tmp_path, by):
    path = write(tmp_path / "pairs.jsonl", [dict(r, n=str(n % 3)) for n, r in enumerate(PAIRS * 4)])
    more = {"label": "n", "alpha": 1.0} if by == "dirichlet" else {}
    partition = PartitionConfig.model_validate({"kind": by, "num_clients": 2, **more})
    clients = load_clients(DataConfig(path=str(path)), partition, seed=1, task="prefer")
    assert sum(len(c.every) for c in clients.values()) == 48
