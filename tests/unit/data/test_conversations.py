import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import ConfigError, DataError
from silotune.core.wording import did_you_mean
from silotune.data.cells import FIX_EMPTY
from silotune.data.conversations import conversation, list_columns, parse_template

WHERE = "data.csv:7"
SECRET = "hypertension"


def turns(row, **settings):
    return [(m["role"], m["content"]) for m in conversation(row, where=WHERE, **settings)]


def error_of(row, **settings):
    with pytest.raises(DataError) as caught:
        conversation(row, where=WHERE, **settings)
    text = str(caught.value)
    assert text.startswith(WHERE)
    assert "\n  " in text, "the fix is missing"
    assert SECRET not in text
    return text


# --- formats ---


def test_question_and_answer_become_two_turns():
    row = {"question": "What is flu?", "answer": "An infection."}
    assert turns(row) == [("user", "What is flu?"), ("assistant", "An infection.")]


def test_instruction_and_output_become_two_turns():
    assert turns({"instruction": "a", "output": "b"}) == [("user", "a"), ("assistant", "b")]


def test_input_is_put_below_the_instruction_and_never_dropped():
    row = {"instruction": "Summarise.", "input": "A text.", "output": "b"}
    assert turns(row)[0] == ("user", "Summarise.\n\nA text.")


@pytest.mark.parametrize("extra", ["", "  ", None, float("nan")])
def test_an_empty_input_adds_nothing(extra):
    row = {"instruction": "Summarise.", "input": extra, "output": "b"}
    assert turns(row)[0] == ("user", "Summarise.")


def test_prompt_and_completion_may_be_texts():
    assert turns({"prompt": "a", "completion": "b"}) == [("user", "a"), ("assistant", "b")]


def test_prompt_and_completion_may_be_lists_of_messages():
    row = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    assert turns(row) == [("system", "s"), ("user", "a"), ("assistant", "b")]


def test_messages_keep_their_order_and_lose_extra_keys():
    row = {
        "messages": [
            {"role": "user", "content": "a", "name": "x"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ]
    }
    assert turns(row) == [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def test_the_first_format_that_fits_wins():
    row = {"question": "a", "answer": "b", "instruction": "c", "output": "d"}
    assert turns(row) == [("user", "c"), ("assistant", "d")]


def test_extra_columns_are_ignored():
    assert turns({"question": "a", "answer": "b", "source": None, "id": 3}) == [
        ("user", "a"),
        ("assistant", "b"),
    ]


def test_numbers_become_texts():
    assert turns({"question": 3, "answer": 2.5}) == [("user", "3"), ("assistant", "2.5")]


def test_texts_are_kept_to_the_last_space():
    assert turns({"question": " a\n", "answer": "b "}) == [("user", " a\n"), ("assistant", "b ")]


def test_the_row_is_not_changed():
    row = {"messages": [{"role": "assistant", "content": "b"}]}
    conversation(row, where=WHERE, system="s")[1]["content"] = "changed"
    assert row == {"messages": [{"role": "assistant", "content": "b"}]}


# --- own columns and the system text ---


def test_templates_are_filled_from_columns():
    row = {"title": "T", "body": "B", "reply": "R"}
    got = turns(row, prompt="{title}\n{body}", completion="Reply: {reply}")
    assert got == [("user", "T\nB"), ("assistant", "Reply: R")]


def test_templates_win_over_a_known_format():
    row = {"question": "a", "answer": "b", "long": "c"}
    assert turns(row, prompt="{question}", completion="{long}")[1] == ("assistant", "c")


def test_doubled_braces_are_braces_of_the_text():
    assert turns({"a": "x"}, prompt='{{"a": {a}}}', completion="{a}")[0] == ("user", '{"a": x}')


def test_braces_inside_a_value_are_left_alone():
    assert turns({"a": "{b}", "b": "x"}, prompt="{a}", completion="{b}")[0] == ("user", "{b}")


def test_column_names_may_hold_spaces():
    assert turns({"my text": "x"}, prompt="{my text}", completion="{my text}")[0] == ("user", "x")


def test_one_of_several_holes_may_be_empty():
    assert turns({"a": "", "b": "x"}, prompt="{a}{b}", completion="{b}")[0] == ("user", "x")


def test_a_system_text_is_put_in_front():
    got = turns({"question": "a", "answer": "b"}, system="Be {brief}.")
    assert got[0] == ("system", "Be {brief}.")


def test_a_conversation_with_its_own_system_turn_keeps_it():
    row = {"messages": [{"role": "system", "content": ""}, {"role": "assistant", "content": "b"}]}
    assert turns(row, system="Be brief.") == [("system", ""), ("assistant", "b")]


def test_parse_template_gives_literals_and_columns():
    assert parse_template("Q: {q} {{x}}\n{a}.") == [
        ("Q: ", "q"),
        (" {", None),
        ("x}", None),
        ("\n", "a"),
        (".", None),
    ]


@pytest.mark.parametrize("bad", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{}", "{ }"])
def test_a_hole_that_is_more_than_a_column_name_is_refused(bad):
    with pytest.raises(
        ValueError, match=r"placeholder that is not a plain column name; write \{column\}"
    ):
        parse_template(bad)


@pytest.mark.parametrize("bad", ["{", "}", "{a", "a}"])
def test_a_single_brace_is_refused(bad):
    with pytest.raises(ValueError, match=r"has a single brace; write \{\{ or \}\}"):
        parse_template(bad)


@given(st.text())
def test_any_text_with_doubled_braces_is_itself(text):
    doubled = text.replace("{", "{{").replace("}", "}}")
    assert "".join(literal for literal, _ in parse_template(doubled)) == text


# --- errors ---


def test_a_row_in_no_known_format_lists_columns_formats_and_the_fix():
    text = error_of({"title": SECRET, "body": SECRET})
    assert text == (
        "data.csv:7: no known format fits the columns 'title', 'body'.\n"
        "  Accepted: messages; prompt and completion; instruction, input (optional) and output; "
        "question and answer; conversations.\n"
        '  For other columns set data.prompt = "{a column}" and data.completion = "{a column}".'
    )


def test_a_missing_header_line_does_not_spill_a_text_into_the_message():
    text = error_of({f"{SECRET} is a long text that once was the first row": "x"})
    assert "(a name of 55 characters)" in text


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"question": SECRET, "answer": " "}, "answer"),
        ({"question": "", "answer": SECRET}, "question"),
        ({"instruction": SECRET, "output": ""}, "output"),
        ({"prompt": SECRET, "completion": ""}, "completion"),
    ],
)
def test_an_empty_text_names_its_column(row, column):
    assert error_of(row) == (f"data.csv:7: column '{column}' is empty.\n{FIX_EMPTY}")


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_missing_text_names_its_column(value):
    assert "column 'answer' is missing." in error_of({"question": SECRET, "answer": value})
    assert "column 'prompt' is missing." in error_of({"prompt": value, "completion": SECRET})


@pytest.mark.parametrize(
    ("value", "kind"), [(True, "bool"), ([SECRET], "list"), ({"a": SECRET}, "dict")]
)
def test_what_is_no_text_is_named_by_its_type(value, kind):
    text = error_of({"question": "a", "answer": value})
    assert f"column 'answer' has the type {kind}, but must be text." in text


def test_half_a_character_is_refused_before_a_tokenizer_sees_it():
    assert "column 'answer' contains half a character" in error_of(
        {"question": "a", "answer": SECRET + "\ud800"}
    )


@pytest.mark.parametrize("value", [SECRET, [], 3, {"role": "user"}])
def test_messages_that_are_no_list_are_refused(value):
    assert "column 'messages' is not a list of messages" in error_of({"messages": value})


@pytest.mark.parametrize("item", [SECRET, {"role": "user"}, {"content": SECRET}, None])
def test_a_message_without_role_and_content_is_counted(item):
    row = {"messages": [{"role": "user", "content": "a"}, item]}
    text = error_of(row)
    assert "column 'messages', message 2 is not an object with role and content." in text


def test_an_unknown_role_is_refused_with_the_known_ones():
    text = error_of({"messages": [{"role": SECRET, "content": "a"}]})
    assert "message 1 has an unknown role.\n  Use one of: system, user, assistant, tool." in text


def test_messages_without_an_answer_are_refused():
    text = error_of({"messages": [{"role": "user", "content": SECRET}]})
    assert "column 'messages' has no assistant turn, so there is nothing to learn." in text


def test_a_completion_without_an_answer_is_refused():
    row = {
        "prompt": [{"role": "assistant", "content": "a"}],
        "completion": [{"role": "user", "content": SECRET}],
    }
    assert "column 'completion' has no assistant turn" in error_of(row)


def test_an_empty_answer_among_messages_is_named():
    text = error_of({"messages": [{"role": "assistant", "content": ""}]})
    assert "column 'messages', message 1 is empty." in text


def test_a_hole_for_a_missing_column_offers_the_nearest():
    text = error_of({"Title": SECRET, "body": SECRET}, prompt="{titel}", completion="{body}")
    assert text == (
        "data.csv:7: data.prompt uses column 'titel', which does not exist. "
        "Did you mean 'Title'?\n  The columns are 'Title', 'body'."
    )


def test_a_fixed_text_does_not_hide_an_empty_answer():
    text = error_of({"a": SECRET, "b": " "}, prompt="{a}", completion="Answer: {b}")
    assert "data.completion is empty in this row (from 'b')." in text


def test_a_missing_value_in_a_hole_is_named():
    text = error_of({"a": SECRET, "b": None}, prompt="{a}{b}", completion="{a}")
    assert "column 'b' is missing." in text


@pytest.mark.parametrize("settings", [{"prompt": "{a}"}, {"completion": "{a}"}])
def test_half_a_pair_of_templates_is_refused(settings):
    with pytest.raises(ConfigError, match="belong together, but one of them is missing"):
        conversation({"a": "x"}, where=WHERE, **settings)


def test_nothing_is_offered_when_no_name_is_near():
    assert did_you_mean("title", ["zzz"]) == ""
    assert did_you_mean("SOURCE", ["source", "id"]) == " Did you mean 'source'?"


def test_a_long_list_of_columns_is_cut():
    assert list_columns([str(n) for n in range(23)]).endswith("'19' and 3 more")
    assert list_columns([]) == "none"
