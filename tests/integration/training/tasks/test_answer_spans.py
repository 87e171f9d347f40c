"""Where answers are in the text of a template, over many families of templates."""

import importlib.util
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.core.errors import DataError, SilotuneError
from silotune.data.chat_templates import TEMPLATES, render, set_template
from silotune.data.conversations import conversation
from silotune.data.placed_conversation import PlacedConversation
from silotune.data.template_traits import traits_of
from silotune.training.tasks.answer_spans import encode_rows, full_text, trained_spans
from silotune.training.tasks.instruct import prepare
from silotune.training.tasks.template_warnings import template_warnings
from tests.chat_templates import FAMILIES, family_tokenizer, tokenizer_for
from tests.conftest import CHATML, build_tokenizer

DOCS = Path(__file__).parents[4] / "docs" / "models.md"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {
    "id": "abc123456",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Röm"}},
}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "abc123456", "content": '{"t": 4}'}
THOUGHT = "<think>\nA thought.\n</think>\n\n"
ROWS = {
    "one answer": [user("Why?"), assistant("So.")],
    "several": [user("Why?"), assistant("So."), user("And?"), assistant("No.")],
    "system": [system("Be brief."), user("Why?"), assistant("So.")],
    "tool": [user("Why?"), CALLED, RESULT, assistant("So.")],
    "reasoning": [user("Why?"), assistant(THOUGHT + "So.")],
    "assistant first": [assistant("Hello!"), user("Why?"), assistant("So.")],
    "question last": [user("Why?"), assistant("So."), user("And?")],
}


def offered(messages):
    return {"tools": TOOLS} if CALLED in messages else {}


def outcome(name: str, messages) -> str:
    """What happens to a row of a file with a family's template."""
    tokenizer = family_tokenizer(name)
    try:
        set_template(tokenizer, date="2026-01-31")
        row = conversation({"messages": messages, **offered(messages)}, where="rows.jsonl:1")
        (example,) = prepare([row], tokenizer, 512).examples
    except SilotuneError:
        return "refused"
    learned = tokenizer.decode(example.ids[example.trained])
    assert not any(m["content"] in learned for m in messages if m["role"] != "assistant")
    if warned := template_warnings(tokenizer, [row]):
        return "moved" if "in front of the first question" in warned[0] else "warned"
    for message in messages:
        if message["role"] == "assistant":
            assert all(
                word in learned for word in ("get_weather", "Röm") if "tool_calls" in message
            )
            assert message["content"].split("</think>")[-1].strip() in learned
    return "works"


def table() -> list[str]:
    """The lines of the table in docs/models.md."""
    lines = [f"| template of | an answer ends with | date | {' | '.join(ROWS)} |"]
    lines.append("|---|---|---|" + "---|" * len(ROWS))
    for name in FAMILIES:
        traits = traits_of(family_tokenizer(name))
        end, date = str(traits.end).replace("|", "\\|"), "yes" if traits.writes_date else ""
        found = [outcome(name, row) for row in ROWS.values()]
        lines.append(f"| {name} | `{end}` | {date} | {' | '.join(found)} |")
    return lines


def test_the_table_of_templates_in_the_documents_is_what_happens():
    made, page = table(), DOCS.read_text("utf-8")
    assert "\n".join(made) in page, "put this into docs/models.md:\n" + "\n".join(made)


# --- TRL's masks as the oracle: its own copies of published templates, with generation marks

TRL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
EXACT = {
    "gemma": "<eos>",
    "gemma3": "<eos>",
    "phi3": "<|endoftext|>",
    "phi3_5": "<|endoftext|>",
    "llama3": "<|eot_id|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "glm4moe": "<|endoftext|>",
}
LINE_BREAK = {
    "lfm2": "<|im_end|>",
    "lfm2_v2": "<|im_end|>",
    "qwen2_5_vl": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
}
"""TRL also learns the line break behind the end token, which ends the answer."""


@pytest.mark.parametrize("name", [*EXACT, *LINE_BREAK])
@pytest.mark.parametrize("kind", ["one answer", "several", "question last"])
def test_the_learned_text_is_that_of_trl(name, kind):
    eos = {**EXACT, **LINE_BREAK}[name]
    ours, theirs = (
        tokenizer_for((TRL / f"{name}{end}.jinja").read_text("utf-8"), eos, "<s>")
        for end in ("", "_training")
    )
    set_template(ours)
    (example,) = prepare([tuple(ROWS[kind])], ours, 2048).examples
    own = theirs.apply_chat_template(
        ROWS[kind], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = zip(own["input_ids"], own["assistant_masks"], strict=True)
    expected = theirs.decode([token for token, mark in marked if mark])
    if name in LINE_BREAK:
        expected = expected.replace("<|im_end|>\n", "<|im_end|>")
    assert ours.decode(example.ids[example.trained]) == expected


TOOL_TEMPLATES = {
    "gemma4": "<turn|>",
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "lfm2_v2": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
}
ALSO_IN_TRL = {"gptoss": "<|start|>assistant", "deepseek_r1_distill": "<｜Assistant｜><think>\n"}
"""What TRL learns of a prompt."""


def learned_by_trl(name, eos, messages, tools=None):
    """What TRL learns of a conversation, without what docs/models.md names as different."""
    theirs = tokenizer_for((TRL / f"{name}_training.jinja").read_text("utf-8"), eos, "<s>")
    own = theirs.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = zip(own["input_ids"], own["assistant_masks"], strict=True)
    text = theirs.decode([token for token, mark in marked if mark])
    text = text.replace(ALSO_IN_TRL.get(name, "<no mark>"), "").replace(f"{eos}\n", eos)
    if name == "qwen2_5":
        text = "".join(part.removeprefix("\n") + eos for part in text.split(eos)[:-1])
    return text


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
@pytest.mark.parametrize("messages", [ROWS["tool"], ROWS["tool"][:2]], ids=["answered", "called"])
def test_tools_are_written_as_transformers_does_and_calls_are_learned_as_trl_does(name, messages):
    eos = TOOL_TEMPLATES[name]
    tokenizer = tokenizer_for((TRL / f"{name}.jinja").read_text("utf-8"), eos, "<s>")
    set_template(tokenizer, date="2024-07-26")
    row = conversation({"messages": messages, "tools": TOOLS}, where="rows.jsonl:1")
    (example,) = prepare([row], tokenizer, 4096).examples
    text, learned = (tokenizer.decode(ids) for ids in (example.ids, example.ids[example.trained]))
    if name not in ("gptoss", "llama3_2"):  # they write the day
        whole = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
        assert text == whole + ("" if name != "glm4moe" else text[len(whole) :])
    assert "Röm" in learned
    assert '"t"' not in learned
    rewrites = name.startswith("qwen3") and name != "qwen3_instruct_2507"
    if (TRL / f"{name}_training.jinja").exists() and not rewrites:
        assert learned.replace(f"{eos}\n", eos) == learned_by_trl(name, eos, messages, TOOLS)
    assert template_warnings(tokenizer, [row]) == []


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen2_5", "gptoss"])
@pytest.mark.parametrize("kind", ["one answer", "reasoning"])
def test_what_trl_learns_beyond_an_answer_is_what_the_documents_say(name, kind):
    if (name, kind) == ("deepseek_r1_distill", "one answer"):
        return  # a model that is asked to think has nothing to learn from it
    eos = {"deepseek_r1_distill": "<｜end▁of▁sentence｜>", "gptoss": "<|return|>"}
    eos = eos.get(name, "<|im_end|>")
    tokenizer = tokenizer_for((TRL / f"{name}.jinja").read_text("utf-8"), eos, "<s>")
    set_template(tokenizer)
    (example,) = prepare([tuple(ROWS[kind])], tokenizer, 2048).examples
    learned = tokenizer.decode(example.ids[example.trained])
    assert learned == learned_by_trl(name, eos, ROWS[kind])


@pytest.mark.parametrize("name", ["SmolLM2", "Gemma 3", "Phi-4", "GLM-4", "Llama 3"])
@pytest.mark.parametrize("messages", [ROWS["tool"], ROWS["tool"][:2]], ids=["answered", "called"])
def test_a_template_that_leaves_out_tools_is_refused_with_the_rows_place(name, messages):
    tokenizer = family_tokenizer(name)
    set_template(tokenizer)
    row = conversation({"messages": messages, "tools": TOOLS}, where="rows.jsonl:7")
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: the chat template") as error:
        prepare([PlacedConversation(row, "rows.jsonl:7")], tokenizer, 512)
    assert "weather" not in str(error.value)


def test_tools_that_only_calls_name_are_missed():
    """A template may write calls and pass over what was offered."""
    both = "{{ m['content'] }}{{ m['tool_calls'] }}"
    tokenizer = build_tokenizer(CHATML.replace("{{ m['content'] }}", both))
    set_template(tokenizer)
    row = conversation({"messages": ROWS["tool"]}, where="rows.jsonl:1")
    (example,) = prepare([row], tokenizer, 512).examples
    assert "get_weather" in tokenizer.decode(example.ids[example.trained])
    row = conversation({"messages": ROWS["tool"], "tools": TOOLS}, where="rows.jsonl:1")
    with pytest.raises(DataError, match="does not write the tools that a row offers, so"):
        prepare([row], tokenizer, 512)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_6", "gptoss"])
def test_real_templates_that_rewrite_earlier_answers_have_all_answers_learned(name):
    eos = "<|return|>" if name == "gptoss" else "<|im_end|>"
    tokenizer = tokenizer_for((TRL / f"{name}.jinja").read_text("utf-8"), eos, "<s>")
    set_template(tokenizer)
    (example,) = prepare([tuple(ROWS["several"])], tokenizer, 2048).examples
    learned = tokenizer.decode(example.ids[example.trained])
    first, last = learned.split("So.")
    assert learned.count("So.") == learned.count("No.") == 1
    assert last.startswith("<|end|>" if name == "gptoss" else "<|im_end|>")
    assert learned.endswith(f"No.{eos}")
    assert "Why?" not in learned
    assert "And?" not in learned
    assert "user" not in first


# --- ends


def test_where_the_next_turn_ends_an_answer_its_mark_is_learned_as_the_end():
    """Bug: GLM-4's answers had no end, and nothing said so."""
    tokenizer = family_tokenizer("GLM-4")
    set_template(tokenizer)
    for row, learned in (("one answer", "So.<|user|>"), ("several", "So.<|user|>No.<|user|>")):
        (example,) = prepare([tuple(ROWS[row])], tokenizer, 512).examples
        assert tokenizer.decode(example.ids[example.trained]) == learned


def test_an_end_that_is_not_the_tokenizers_is_learned():
    tokenizer = family_tokenizer("a base model with ChatML")
    set_template(tokenizer)
    (example,) = prepare([tuple(ROWS["several"])], tokenizer, 512).examples
    assert tokenizer.decode(example.ids[example.trained]) == "So.<|im_end|>\nNo.<|im_end|>\n"


# --- what is not learned


def test_an_answer_that_its_row_calls_context_is_read_and_not_learned():
    tokenizer = build_tokenizer()
    row = (user("Why?"), assistant("So.", train=False), user("And?"), assistant("No.", train=True))
    (example,) = prepare([row], tokenizer, 512).examples
    assert tokenizer.decode(example.ids[example.trained]) == "No.<|im_end|>"
    assert "So." in tokenizer.decode(example.ids)
    nothing = prepare([(user("Why?"), assistant("So.", train=False))], tokenizer, 512)
    assert (len(nothing.examples), nothing.num_dropped) == (0, 1)


@pytest.mark.parametrize("name", ["GLM-4", "Phi-3, Phi-3.5", "Qwen3"])
def test_context_stays_context_in_templates_that_write_answers_in_two_ways(name):
    tokenizer = family_tokenizer(name)
    set_template(tokenizer)
    row = (user("Why?"), assistant("So."), user("And?"), assistant("No.", train=False))
    (example,) = prepare([row], tokenizer, 512).examples
    learned = tokenizer.decode(example.ids[example.trained])
    assert "So." in learned
    assert "No." not in learned


# --- the ids of a prompt

lines = st.text(alphabet="ab\n .", min_size=1, max_size=8).filter(str.strip)
JOINED = [("Ċ", "Ċ"), ("Ċ", "a"), ("Ċ", "."), ("Ġ", "a"), (":", "."), ("ĊĊ", "a")]
OWN = sorted(name for name, text in TEMPLATES.items() if text is not None)


@pytest.mark.parametrize("template", [*OWN, "auto"])
@given(answers=st.lists(lines, min_size=1, max_size=3))
@settings(max_examples=15)
def test_every_prompt_has_the_ids_of_asking_whatever_the_answer_begins_with(template, answers):
    tokenizer = tokenizer_for(CHATML, "<|im_end|>", merges=JOINED)
    set_template(tokenizer, template)
    row = tuple(turn for text in answers for turn in (user("Why?"), assistant(text)))
    spans = trained_spans(tokenizer, row)
    ((ids, starts),) = encode_rows(tokenizer, [spans])
    text, places = spans
    for n, (start, _) in enumerate(places):
        asked = render(tokenizer, row[: 2 * n + 1], ask=True)
        alone = tokenizer(asked, add_special_tokens=False)["input_ids"]
        assert text[:start] == asked
        assert start in starts
        if n == 0:
            assert ids[: len(alone)] == alone
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_that_puts_a_space_in_front_of_texts_puts_none_in_front_of_an_answer():
    from tests.unit.data.test_chat_templates import joining_tokenizer

    tokenizer = joining_tokenizer("characters")
    ids = tokenizer.get_vocab()
    prompt = "### Assistant:\nb"
    ((found, starts),) = encode_rows(tokenizer, [(prompt, [(len(prompt) - 1, len(prompt))])])
    assert found[-1] == ids["b"]
    assert starts[-1] == len(prompt) - 1


# --- rows that a template refuses


def test_every_refused_row_is_counted_and_the_first_is_named_without_its_words():
    tokenizer = family_tokenizer("Gemma, Gemma 2")
    set_template(tokenizer)
    bad = [user("SECRET"), user("SECRET"), assistant("SECRET")]
    rows = [PlacedConversation(bad, f"rows.jsonl:{n}") for n in (4, 7)]
    with pytest.raises(DataError, match=r"^rows\.jsonl:4: .*must alternate.*1 more row") as error:
        prepare([tuple(ROWS["one answer"]), *rows], tokenizer, 512)
    assert "SECRET" not in str(error.value)


def test_words_of_a_row_that_a_template_puts_into_its_error_are_not_shown():
    curious = "{% for m in messages %}{{ raise_exception('no ' + m.content) }}{% endfor %}"
    tokenizer = build_tokenizer(curious)
    with pytest.raises(DataError, match="refuses this conversation") as error:
        prepare([(user("SECRET"), assistant("SECRET"))], tokenizer, 512)
    assert "SECRET" not in str(error.value)


def test_an_answer_without_the_reasoning_that_the_prompt_opens_is_refused_as_the_templates_doing():
    asks = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = build_tokenizer(asks)
    set_template(tokenizer)
    good = (user("Why?"), assistant(THOUGHT + "So."))
    (example,) = prepare([good], tokenizer, 512).examples
    learned = tokenizer.decode(example.ids[example.trained])
    assert learned == "A thought.\n</think>\n\nSo.<|im_end|>"
    with pytest.raises(DataError, match=r"row 2: .*<think>"):
        prepare([good, tuple(ROWS["one answer"])], tokenizer, 512)


def test_reasoning_is_trained_behind_the_think_mark_that_a_prompt_opens():
    """Bug: DeepSeek-R1's own template, which takes reasoning out of answers, fitted no row."""
    tokenizer = family_tokenizer("DeepSeek-R1 distilled, opens `<think>`")
    set_template(tokenizer)
    talk = [user("Why?"), assistant(THOUGHT.replace("A", "Another") + "So."), user("And?")]
    spaced = [*talk, assistant("\n<think>A thought.\n</think>\n\nNo.")]
    (example,) = prepare([tuple(spaced)], tokenizer, 512).examples
    text = tokenizer.decode(example.ids)
    assert text.startswith(render(tokenizer, tuple(talk), ask=True))
    learned = tokenizer.decode(example.ids[example.trained])
    mark = "<｜end▁of▁sentence｜>"
    assert learned == f"\n\nSo.{mark}A thought.\n</think>\n\nNo.{mark}"
    assert text.endswith(f"<｜Assistant｜><think>\nA thought.\n</think>\n\nNo.{mark}")
    (warned,) = template_warnings(tokenizer, [tuple(spaced)])
    assert "reasoning in the answers of 1 row" in warned
    plain = PlacedConversation(ROWS["one answer"], "rows.jsonl:3")
    with pytest.raises(DataError, match=r"(?s)rows\.jsonl:3: .*<think>.*Put the reasoning into"):
        prepare([plain], tokenizer, 512)


def test_a_place_survives_a_trip_to_another_process_and_changes_no_comparison():
    row = PlacedConversation(ROWS["one answer"], "rows.jsonl:3")
    again = pickle.loads(pickle.dumps(row))  # of our own class, as Ray does it
    assert again == row == tuple(ROWS["one answer"])
    assert again.where == "rows.jsonl:3"


# --- what a template leaves out

WARNINGS = {
    "reasoning": ("DeepSeek-R1 distilled, first form", ROWS["reasoning"], "reasoning in the answ"),
    "earlier reasoning": (
        "Qwen3",
        [user("Why?"), assistant(THOUGHT + "So."), user("And?"), assistant("No.")],
        "reasoning in the answers of 1 row",
    ),
    "a moved system text": ("Gemma, Gemma 2", ROWS["system"], "in front of the first question"),
    "control tokens in a question": (
        "SmolLM2",
        [user("What is <|im_end|>?"), assistant("So.")],
        r"1 row contains control tokens.*'<\|im_end\|>'",
    ),
    "control tokens in an answer": (
        "Llama 2",
        [user("Why?"), assistant("It ends with </s> here.")],
        "control tokens",
    ),
}


@pytest.mark.parametrize("kind", WARNINGS)
def test_what_a_template_does_to_a_row_is_told(kind):
    name, row, said = WARNINGS[kind]
    tokenizer = family_tokenizer(name)
    set_template(tokenizer)
    (text,) = template_warnings(tokenizer, [tuple(row), tuple(ROWS["one answer"])])
    assert re.search(said, text)


@pytest.mark.parametrize("template", ["vicuna", "alpaca", "flowertune"])
def test_a_system_turn_that_is_not_first_is_missed_in_our_own_templates(template):
    """Bug: these templates pass over it, and nothing said so."""
    tokenizer = build_tokenizer()
    set_template(tokenizer, template)
    row = (user("Why?"), assistant("So."), system("Be brief."), user("And?"), assistant("No."))
    (text,) = template_warnings(tokenizer, [row])
    assert "system text of 1 row" in text


@pytest.mark.parametrize("template", OWN)
def test_rows_of_which_all_is_written_are_not_warned_of(template):
    tokenizer = build_tokenizer()
    set_template(tokenizer, template)
    rows = [tuple(ROWS[kind]) for kind in ("one answer", "several", "reasoning")]
    parts = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    rows.append(conversation(parts, where="rows.jsonl:1", system="Be brief."))
    assert template_warnings(tokenizer, rows) == []


def test_a_moved_system_text_reaches_asking_and_training_alike():
    tokenizer = family_tokenizer("Gemma, Gemma 2")
    set_template(tokenizer)
    row = tuple(ROWS["system"])
    asked = render(tokenizer, row[:-1], ask=True)
    assert (
        asked == "<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert full_text(tokenizer, row).startswith(asked)
