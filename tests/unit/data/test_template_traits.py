"""What rendering shows about a template: the end of a turn, the date, system texts, bos."""

from datetime import date

import pytest

from silotune.core.errors import ConfigError, ModelError
from silotune.data.chat_templates import TEMPLATES, TemplateError, render, set_template
from silotune.data.template_traits import fold_system, give_traits, render_as_is, traits_of
from silotune.federation.recipe_model import warn_of_template
from silotune.recipes.parse import parse
from silotune.training.tasks.instruct import prepare
from silotune.workflows.check import on_a_day
from tests.chat_templates import FAMILIES, family_tokenizer, tokenizer_for
from tests.conftest import CHATML, build_tokenizer

OWN = sorted(name for name, text in TEMPLATES.items() if text is not None)
ROW = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."})
TWICE = (*ROW, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."})


# --- the end of a turn


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_an_end_and_it_stands_behind_the_answer(name):
    tokenizer = family_tokenizer(name)
    traits = traits_of(tokenizer)
    text = render(tokenizer, ROW, ask=False) + traits.appended
    behind = text[text.index("So.") + len("So.") :]
    assert traits.end is not None
    assert behind.lstrip().startswith(traits.end)
    assert len(tokenizer(traits.end, add_special_tokens=False)["input_ids"]) == 1


def test_the_mark_of_the_next_turn_is_the_end_only_where_nothing_else_is():
    assert traits_of(family_tokenizer("GLM-4")).appended == "<|user|>"
    others = [name for name in FAMILIES if name != "GLM-4"]
    assert [traits_of(family_tokenizer(name)).appended for name in others] == [""] * len(others)


def test_words_and_the_token_that_begins_a_text_are_no_end():
    words = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    again = "{% for m in messages %}{{ bos_token + m.role + ': ' + m.content }}{% endfor %}"
    for template in (words, again):
        assert traits_of(tokenizer_for(template, "</s>", "<s>")).end is None


RECIPE = {"rounds": 1, "data": {"path": "rows.jsonl"}}


def test_a_template_without_end_is_told_once_and_not_where_a_recipe_asks_for_that():
    tokenizer = tokenizer_for(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "</s>",
    )
    set_template(tokenizer)
    (text,) = warn_of_template(tokenizer, parse(RECIPE), {})
    assert "does not learn to stop" in text
    bare = tokenizer_for(None, "</s>")
    set_template(bare, "alpaca", end_token=False)
    data = {"path": "rows.jsonl", "template": "alpaca"}
    endless = parse({**RECIPE, "data": data, "train": {"compat": ["no-end-token"]}})
    assert list(warn_of_template(bare, endless, {})) == []


# --- bos


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("end_token", [True, False])
def test_our_own_templates_begin_with_bos_once_where_the_tokenizer_does(name, end_token):
    """Bug: they wrote none, and ids are made without special tokens, so a base never saw it."""
    tokenizer = tokenizer_for(None, "</s>", "<s>", begins=True)
    for _ in range(2):  # setting it again adds nothing
        set_template(tokenizer, name, end_token=end_token)
    (example,) = prepare([TWICE], tokenizer, 2048).examples
    asked = tokenizer(render(tokenizer, ROW[:1], ask=True), add_special_tokens=False)["input_ids"]
    for ids in (example.ids.tolist(), asked):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    assert not example.trained[0]


@pytest.mark.parametrize("name", OWN)
def test_a_tokenizer_that_begins_texts_without_bos_gets_none(name):
    tokenizer = tokenizer_for(None, "</s>", "<s>")
    set_template(tokenizer, name)
    assert tokenizer.chat_template == TEMPLATES[name]


@pytest.mark.parametrize(("begin", "told"), [("", True), ("{{ bos_token }}", False)])
def test_a_template_of_a_file_that_forgets_bos_is_told(begin, told):
    tokenizer = tokenizer_for(None, "<|im_end|>", "<s>", begins=True)
    template = begin + CHATML
    set_template(tokenizer, template)
    run = parse({**RECIPE, "data": {"path": "rows.jsonl", "template": template}})
    assert any("bos_token" in text for text in warn_of_template(tokenizer, run, {})) == told


# --- the date


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Llama 3.2, 3.3", "Today Date: 03 Feb 2001"),
        ("SmolLM3", "Today Date: 03 February 2001"),
        ("Granite 3", "Today is February 03, 2001."),
        ("gpt-oss", "Current date: 2001-02-03"),
    ],
)
def test_a_template_writes_the_day_it_is_told(name, written):
    tokenizer = family_tokenizer(name)
    set_template(tokenizer, date="2001-02-03")
    for messages, ask in ((ROW, False), (ROW[:1], True)):
        assert written in render(tokenizer, messages, ask=ask)
    run = parse({**RECIPE, "data": {"path": "rows.jsonl", "date": "2001-02-03"}})
    (text,) = warn_of_template(tokenizer, run, {})
    assert "2001-02-03 (data.date)" in text


def test_the_day_changes_nothing_else_than_the_date():
    inside = (
        "\n{%- macro day() %}[{{ strftime_now('%d %b, %-d') }}]{% endmacro %}\n"
        "{% if strftime_now is defined %}{{ day() }}{% endif %}"
    )
    tokenizer = build_tokenizer(inside + CHATML)
    today = date.today()
    assert render_as_is(tokenizer, ROW, ask=False, date=today) == render(tokenizer, ROW, ask=False)
    plain = build_tokenizer("\n" + CHATML)
    assert not traits_of(plain).writes_date
    told = render_as_is(plain, ROW, ask=False, date=date(2001, 2, 3))
    assert told == render(plain, ROW, ask=False)


def test_a_recipe_gets_one_day_and_keeps_it():
    run = parse(RECIPE)
    dated = on_a_day(run)
    assert dated.data.date == date.today().isoformat()
    assert on_a_day(dated) == dated
    labelled = parse({**RECIPE, "task": "classify"})
    assert on_a_day(labelled) == labelled


def test_a_day_that_is_none_is_a_mistake_in_the_recipe():
    for wrong in ("2026-02-30", "tomorrow", "20260131"):
        with pytest.raises(ConfigError, match="date is no day"):
            parse({**RECIPE, "data": {"path": "rows.jsonl", "date": wrong}})


def test_a_template_that_is_exchanged_keeps_the_day():
    tokenizer = family_tokenizer("SmolLM3")
    give_traits(tokenizer, date(2001, 2, 3))
    tokenizer.chat_template = FAMILIES["Granite 3"].template
    assert "February 03, 2001" in render(tokenizer, ROW, ask=False)


# --- system turns


def test_system_texts_are_put_in_front_of_the_next_question_in_order():
    rules = [{"role": "system", "content": text} for text in ("One.", " ", "Two.")]
    talk = (*rules, *ROW, rules[0], *ROW)
    folded = fold_system(talk)
    assert [m["content"] for m in folded] == ["One.\n\nTwo.\n\nWhy?", "So.", "One.\n\nWhy?", "So."]
    assert talk[3]["content"] == "Why?", "the rows themselves are untouched"
    assert fold_system(tuple(rules)) == tuple(rules)
    assert fold_system(ROW) == ROW


# --- templates that cannot be used

BROKEN = {
    "broken Jinja": ("{% for m in messages %}{{ m.content }", "own chat template cannot be used"),
    "names without a default": (
        {"rag": CHATML, "tool_use": CHATML},
        r"names \(rag, tool_use\), and none is the default",
    ),
    "an unknown function": ("{{ load_the_data(messages) }}", "own chat template cannot be used"),
    "another mark in front of answers": (
        CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>bot\n{% endif %}"),
        "data.template = 'auto': in the model's own chat template",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_models_own_template_that_cannot_be_used_is_one_clear_error(kind):
    template, said = BROKEN[kind]
    with pytest.raises((ModelError, ConfigError), match=said) as error:
        set_template(_with(template))
    assert "data.template" in str(error.value)


def _with(template):
    tokenizer = build_tokenizer(None)
    tokenizer.chat_template = template
    return tokenizer


def test_of_named_templates_the_default_is_used():
    tokenizer = _with({"default": CHATML, "rag": "{{ nothing }}"})
    assert not set_template(tokenizer)
    assert render(tokenizer, ROW, ask=False) == render(build_tokenizer(), ROW, ask=False)


def test_a_refusal_is_an_error_of_the_data():
    tokenizer = family_tokenizer("Mistral 7B")
    with pytest.raises(TemplateError, match="roles must alternate, user first"):
        render(tokenizer, (*ROW[:1], *ROW), ask=False)
