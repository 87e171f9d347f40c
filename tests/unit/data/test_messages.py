"""Chat rows in the spellings that people have; what cannot be learned is refused, never dropped."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import DataError, EmptyRowError
from silotune.data.client_rows import ClientRows
from silotune.data.clients import fingerprint
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


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS = {
    "as templates want it": answer(content="", tool_calls=[CALL]),
    "without content": {"role": "assistant", "tool_calls": [CALL]},
    "arguments as text": answer(
        content=None, tool_calls=[{**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}]
    ),
    "a table's nulls": answer(
        content=None,
        tool_calls=[{**CALL, "function": {"name": "f", "arguments": {"x": 1, "y": None}}}],
    ),
    "OpenAI's first form": answer(content=None, function_call={"name": "f", "arguments": {"x": 1}}),
    "ShareGPT": {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
}


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("role", ["tool", "function", "observation"])
def test_every_spelling_of_a_call_and_its_result_gives_the_same_turns(how, role):
    tool = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    talk = [USER, CALLS[how], {"role": role, "content": "4", "name": "f"}, answer()]
    for tools in ([tool], [{"type": "function", "function": tool}], json.dumps([tool])):
        found = read({"messages": talk, "tools": tools}, system="s")
        assert found[0] == {
            "role": "system",
            "content": "s",
            "tools": [{"type": "function", "function": tool}],
        }
        assert found[1:] == (
            USER,
            answer(content="", tool_calls=[CALL]),
            {"role": "tool", "content": "4", "name": "f"},
            answer(),
        )
        assert read({"messages": list(found)}) == found, "what was converted once stays"


@pytest.mark.parametrize(
    "message",
    [
        {"from": "function_call", "value": SECRET},
        answer(tool_calls=[{"function": {"name": SECRET, "arguments": SECRET}}]),
        answer(tool_calls=[{"function": {"name": SECRET, "arguments": [SECRET]}}]),
        {"role": "assistant", "content": None, "tool_calls": [{}]},
        {"role": "assistant", "function_call": {"arguments": {"x": SECRET}}},
        answer(tool_calls=SECRET),
    ],
)
def test_a_call_that_cannot_be_written_is_refused(message):
    assert "message 2 has a tool call without a name, or" in error_of(USER, message, answer())


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_content_is_refused_and_not_dropped(key):
    assert f"has its reasoning under '{key}'" in error_of(USER, answer(**{key: SECRET}))
    assert read({"messages": [USER, answer(**{key: None}), {**USER, key: "x"}]})[:2] == WANTED


def test_a_call_of_the_user_is_refused():
    assert "is not the assistant's" in error_of({**USER, "tool_calls": [CALL]}, answer())


@pytest.mark.parametrize("tools", [SECRET, {"name": "f"}, [{}], [SECRET], [{"function": 3}], 4])
def test_tools_that_cannot_be_read_are_refused(tools):
    with pytest.raises(
        DataError, match="column 'tools' is not a list of tools with names"
    ) as error:
        read({"messages": [USER, answer()], "tools": tools})
    assert SECRET not in str(error.value)


def test_rows_that_differ_by_a_call_or_a_tool_are_different_rows():
    def row(x, tools=()):
        call = {**CALL, "function": {"name": "f", "arguments": {"x": x}}}
        return read({"messages": [USER, answer(content="", tool_calls=[call])], "tools": tools})

    rows = (row(1), row(2), row(1, [{"name": "f"}]))
    found = find_duplicates({"a": ClientRows("a", rows, (row(3), row(1)))})["a"]
    assert (found.num_repeated, found.num_leaked, found.num_other_answer) == (0, 1, 2)


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


def test_rows_of_text_alone_are_refused_with_two_ways_out():
    with pytest.raises(DataError) as caught:
        read({"text": SECRET})
    assert 'data.completion = "{text}"' in " ".join(str(caught.value).split())
    assert 'task = "text"' in str(caught.value)
    assert SECRET not in str(caught.value)
    found = read({"text": "b"}, prompt="Write a note.", completion="{text}")
    assert [turn["content"] for turn in found] == ["Write a note.", "b"]


def test_of_two_bad_cells_the_one_that_skipping_does_not_fix_is_said():
    with pytest.raises(DataError, match="column 'answer' has the type list"):
        read({"question": "", "answer": [SECRET]})


KEYS = [
    "role",
    "from",
    "content",
    "value",
    "weight",
    "tool_calls",
    "function",
    "name",
    "type",
    "text",
]

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
