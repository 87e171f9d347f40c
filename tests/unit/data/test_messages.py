"""Chat rows in the spellings that people have; what cannot be learned is refused, never dropped."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import DataError, EmptyRowError
from silotune.data.clients import ClientRows, fingerprint
from silotune.data.conversations import conversation
from silotune.data.duplicates import find_duplicates
from silotune.data.files import read_rows
from silotune.data.placed_rows import PlacedRow
from silotune.data.row_draws import row_digests
from tests.unit.data.row_files import SECRET

WHERE = "data.jsonl:7"
USER = {"role": "user", "content": "a"}
WANTED = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def read(row, **settings):
    return conversation(row, where=WHERE, **settings)


def answer(**more):
    return {"role": "assistant", "content": "b", **more}


def error_of(*messages, kind=DataError):
    with pytest.raises(DataError) as caught:
        read({"messages": [*messages]})
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.startswith(WHERE)
    assert "\n  " in text, "the fix is missing"
    assert SECRET not in text
    return text


SPELLINGS = {
    "ShareGPT": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    "capitals": [{"role": "User", "content": "a"}, {"role": "Assistant", "content": "b"}],
    "Gemini's role": [USER, {"role": "model", "content": "b"}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
    ],
    "parts of one text": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
        answer(),
    ],
    "as a table fills it": [
        {"role": None, "content": None, "from": "human", "value": "a", "weight": None},
        {"role": None, "content": None, "from": "gpt", "value": "b", "weight": 1.0},
    ],
    "no calls": [USER, answer(tool_calls=[], function_call=None, name="x")],
    "weight 1": [{**USER, "weight": 0}, answer(weight=1, train=True)],
}


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("as_text", [False, True])
def test_every_spelling_gives_the_same_turns(column, how, as_text):
    value = SPELLINGS[how]
    assert read({column: json.dumps(value) if as_text else value}) == WANTED


def test_a_developer_turn_is_a_system_turn():
    row = {"messages": [{"role": "developer", "content": "s"}, *WANTED]}
    assert read(row, system="other")[0] == {"role": "system", "content": "s"}


def test_a_table_of_share_gpt_reads_like_its_lines(tmp_path):
    rows = [{"conversations": SPELLINGS["ShareGPT"]}, {"conversations": SPELLINGS["ShareGPT"][:2]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [read(row) for row in read_rows(tmp_path / "a.parquet")] == [WANTED, WANTED]


def test_conversations_do_not_replace_a_format_that_was_read_before():
    row = {"conversations": SPELLINGS["ShareGPT"], "question": "q", "answer": "r"}
    assert read(row)[0]["content"] == "q"


def test_the_first_format_that_a_row_fills_is_its_own():
    row = {"messages": None, "instruction": "", "output": "x", "question": "a", "answer": "b"}
    assert read(row) == WANTED


# --- weights ---


@pytest.mark.parametrize(
    "said", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": False}]
)
def test_an_answer_of_weight_zero_is_context(said):
    found = read({"messages": [USER, answer(**said), USER, answer()]})
    assert [turn.get("train", True) for turn in found] == [True, False, True, True]
    assert found[1]["train"] is False
    assert read({"messages": list(found)}) == found, "what was converted once stays context"


@pytest.mark.parametrize("value", [0.5, 2, -1, "0", [], {}])
def test_a_weight_between_is_refused(value):
    assert "message 2 has a 'weight' that is neither 0 nor 1." in error_of(
        USER, answer(weight=value)
    )


def test_a_row_in_which_nothing_is_learned_is_refused():
    assert "no assistant turn of column 'messages' is learned" in error_of(USER, answer(weight=0))


def test_rows_that_differ_by_a_weight_are_different_rows():
    rows = [{"messages": [USER, answer(weight=w), USER, answer()]} for w in (0, 1)]
    assert len(set(row_digests([PlacedRow("x", row) for row in rows]))) == 2
    zero, one = (read(row) for row in rows)
    clients = [ClientRows("a", (row,), (one,)) for row in (zero, one)]
    assert fingerprint({"a": clients[0]}) != fingerprint({"a": clients[1]})
    assert find_duplicates({"a": clients[0]})["a"].num_leaked == 0
    assert find_duplicates({"a": clients[1]})["a"].num_leaked == 1


# --- what cannot be learned ---


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": SECRET},
        {"from": "function_call", "value": SECRET},
        {"from": "observation", "value": SECRET},
        answer(tool_calls=[{"function": {"name": SECRET}}]),
        {"role": "assistant", "content": None, "tool_calls": [{}]},
        {"role": "assistant", "function_call": {"name": SECRET}},
    ],
)
def test_tool_turns_are_refused_with_the_way_out(message):
    text = error_of(USER, message, answer())
    assert "message 2 calls a tool or holds what it returned" in text
    assert "write the call as text" in text


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": SECRET}}, SECRET, None, {"text": SECRET}]
)
def test_a_part_that_is_not_text_is_refused(part):
    assert "message 1 has a part that is not text." in error_of(
        {"role": "user", "content": [{"type": "text", "text": "a"}, part]}, answer()
    )


def test_parts_without_a_letter_are_an_empty_message():
    error_of({"role": "user", "content": []}, answer(), kind=EmptyRowError)
    error_of({"role": "user", "content": [{"type": "text", "text": None}]}, kind=EmptyRowError)


@pytest.mark.parametrize("value", [None, "", " ", float("nan")])
def test_missing_messages_are_a_row_that_lacks_a_text(value):
    with pytest.raises(EmptyRowError, match="column 'conversations' is missing"):
        read({"conversations": value})


@pytest.mark.parametrize("text", ["[{'role': 'user'}]", "{}", "3", "[" * 100_000, SECRET])
def test_a_cell_that_is_no_json_list_says_how_to_write_one(text):
    with pytest.raises(DataError, match=r"(?s)'messages' is not a list of messages.*json\.dumps"):
        read({"messages": text})


def test_rows_of_text_alone_are_refused_with_the_way_out():
    with pytest.raises(DataError) as caught:
        read({"text": SECRET})
    assert 'data.completion = "{text}"' in str(caught.value)
    assert SECRET not in str(caught.value)
    found = read({"text": "b"}, prompt="Write a note.", completion="{text}")
    assert [turn["content"] for turn in found] == ["Write a note.", "b"]


def test_of_two_bad_cells_the_one_that_skipping_does_not_fix_is_said():
    with pytest.raises(DataError, match="column 'answer' has the type list"):
        read({"question": "", "answer": [SECRET]})


KEYS = ["role", "from", "content", "value", "weight", "tool_calls", "type", "text"]
TEXTS = st.sampled_from(["user", "human", "assistant", "system", "tool", "text", "a", "", "\ud800"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=12,
)


@given(VALUES, st.sampled_from(["messages", "conversations", "prompt", "text"]))
def test_any_value_is_turns_or_one_clear_error(value, column):
    said, found = "", ()
    try:
        found = read({column: value, "completion": "b"})
    except DataError as error:
        said = str(error)
    if said:
        assert said.startswith(WHERE)
        assert "\n  " in said
    else:
        assert all(set(turn) <= {"role", "content", "train"} for turn in found)
        assert any(turn["role"] == "assistant" and turn.get("train", True) for turn in found)
