"""How a conversation becomes text: find a template, set it on a tokenizer, and render with it.

The same template is used for training, scoring and answers, and is saved with the adapter. All are
Jinja, and run in the sandbox in which transformers renders chat templates. A template is a program:
it may refuse a conversation, leave parts of it out, or read the clock. See `template_traits`.
"""

from collections.abc import Callable
from datetime import date as Date
from pathlib import Path
from typing import Any

from silotune.core.errors import ConfigError, ModelError
from silotune.core.safe_text import one_line
from silotune.core.wording import did_you_mean
from silotune.data.conversations import Conversation, Message
from silotune.data.template_limits import (
    TemplateLimitError,
    check_operations,
    render_within_limits,
)
from silotune.data.template_texts import END, PLAIN, TEMPLATES
from silotune.data.template_traits import (
    TemplateError,
    fold_system,
    give_traits,
    opened_thought,
    render_as_is,
    template_of,
    traits_of,
)

BEGIN = "{{ bos_token }}"
"""What stands in front of our own templates if a tokenizer begins every text with a token."""

PROBE: Conversation = (
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
)
REASONED: Conversation = (
    PROBE[0],
    {"role": "assistant", "content": "<think>\na thought\n</think>\n\nan answer"},
)


def resolve_template(given: str) -> str:
    """A recipe's data.template as a name or as Jinja text; a file is read here.

    Raises:
        ConfigError: No template or file has this name, the text is not Jinja, or it does not write
            the answer.
    """
    if given in TEMPLATES:
        return given
    text = given
    if "{" not in given:
        path = Path(given).expanduser()
        try:
            found = path.is_file()
        except OSError:  # the name is too long for a file
            found = False
        if not found:
            raise ConfigError(
                f"data.template = '{given}': no template has this name, and there is no such file."
                f"{did_you_mean(given, TEMPLATES)}\n"
                f"  Use one of {', '.join(TEMPLATES)}, or a file with a Jinja chat template."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"data.template = '{given}' cannot be read: {error}.\n  Use a text file in UTF-8."
            ) from error
    _check_text(text)
    return text


def _check_text(text: str) -> None:
    """Try a template without a tokenizer, so that no model is fetched just to find a typo."""
    from transformers.utils.chat_template_utils import render_jinja_template

    check_operations(text)
    # placeholders for what a tokenizer passes to its template
    special: Any = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}

    def rendered(messages: Conversation, *, ask: bool) -> str:
        (found,), _ = render_jinja_template(
            [list(messages)], chat_template=text, add_generation_prompt=ask, **special
        )
        return found

    try:
        _check_answer(
            lambda talk, ask: render_within_limits(lambda: rendered(talk, ask=ask), template=text)
        )
    except (TemplateLimitError, ConfigError):
        raise
    except Exception as error:  # a template is a program and can fail in any way
        raise ConfigError(
            f"data.template: not a Jinja chat template: {error}\n"
            "  It can use `messages`, `add_generation_prompt` and `eos_token`."
        ) from error


def _check_answer(render_: Callable[[Conversation, bool], str]) -> None:
    if not _answers_follow(render_):
        raise ConfigError(
            "data.template: in a rendered conversation, the answer does not follow the text that "
            "add_generation_prompt writes, so nothing would be learned.\n"
            "  Write message['content'] of the role assistant after the same text that "
            "add_generation_prompt writes.\n  A line break after }} is part of the text, one "
            "after -}} is not."
        )


def _answers_follow(render_: Callable[[Conversation, bool], str]) -> bool:
    """Whether the words of a prompt and of its answer are there, one behind the other.

    A template for reasoning may ask with an open <think>, which only reasoned answers have, or
    which it takes out of all answers.
    """

    def follows(talk: Conversation) -> bool:
        asked, full = render_(talk[:1], True).rstrip(" "), render_(talk, False)
        return full.startswith(asked) and PROBE[1]["content"] in full[len(asked) :]

    return follows(PROBE) or follows(REASONED) or bool(opened_thought(render_, PROBE[:1]))


def set_template(
    tokenizer: Any, template: str = "auto", *, end_token: bool = True, date: str | None = None
) -> bool:
    """Set a recipe's template on a tokenizer; "auto" sets the plain one if it has none.

    Args:
        tokenizer: Changed in place.
        template: A name, or Jinja text.
        end_token: False removes the end token from one of our own templates: some published systems
            trained without it, so their models never learn to stop.
        date: The day (YYYY-MM-DD) for templates that write one; the clock's if None.

    Returns:
        Whether the plain template was set because the tokenizer has none.

    Raises:
        ModelError: The tokenizer has no end token, or its own template cannot be used.
        ConfigError: The template does not write the answer.
    """
    if tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has no end token, so the model could never learn to stop.\n"
            "  Use a model whose tokenizer defines eos_token."
        )
    text = TEMPLATES.get(template, template)
    is_own = TEMPLATES.get(template) is not None
    if not end_token and not is_own:
        raise ConfigError(
            "train.compat = 'no-end-token' removes the end token from silotune's own templates, "
            "but data.template is not one of them.\n  Use one of silotune's templates."
        )
    has_none = text is None and not tokenizer.chat_template
    if has_none:
        text, is_own = PLAIN, True
    if text is not None:
        text = text if end_token else text.replace(END, "")
        tokenizer.chat_template = (BEGIN if is_own and begins_texts(tokenizer) else "") + text
    day = None if date is None else Date.fromisoformat(date)
    if text is None:
        _check_models_own(tokenizer)
    give_traits(tokenizer, day)
    return has_none


def begins_texts(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its bos token in front of every text, as Llama's and Gemma's do."""
    return tokenizer.bos_token_id is not None and (
        tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    )


def _check_models_own(tokenizer: Any) -> None:
    """Try the template that came with a model, on conversations that are nobody's."""
    use = "  Set data.template to one of silotune's templates, or to a file with your own."
    try:
        check_operations(template_of(tokenizer))
        _answers = _answers_follow(lambda talk, ask: render_as_is(tokenizer, talk, ask=ask))
    except TemplateError as error:
        why = one_line(str(error.__cause__ or error))
        raise ModelError(f"the model's own chat template cannot be used: {why}\n{use}") from error
    if not _answers:
        raise ConfigError(
            "data.template = 'auto': in the model's own chat template, the answer does not follow "
            "the text that add_generation_prompt writes, so a model that is asked would begin "
            f"elsewhere than it has learned to.\n{use}"
        )


def render(tokenizer: Any, messages: Conversation, *, ask: bool) -> str:
    """The text of a conversation; with `ask` it ends where the assistant begins to speak.

    It ends before the space that some templates write in front of the answer: most tokenizers join
    the space to the answer's first word, so the model must generate it as it did in training.

    If the template takes no system text, as Gemma's, the text is put in front of the first
    question.

    Raises:
        TemplateError: The template refuses this conversation.
        TemplateLimitError: It does not end, or writes too much.
    """
    traits = traits_of(tokenizer)
    tools = messages[0].get("tools", ()) if messages else ()
    if traits.refuses_system:
        messages = fold_system(messages)
    messages = tuple(_as_given(turn, traits.call_content) for turn in messages)
    if ask and not messages:  # the assistant speaks first, and no template is asked for that
        first = ({"role": "assistant", "content": PROBE[1]["content"]},)
        text = render_as_is(tokenizer, first, ask=False, date=traits.date)
        return text.partition(PROBE[1]["content"])[0].rstrip(" ")
    text = render_as_is(tokenizer, messages, ask=ask, date=traits.date, tools=tools)
    return text.rstrip(" ") if ask else text


def _as_given(turn: Message, call_content: str | None) -> Message:
    """A turn as a template is given it; the tools of a row are given beside its turns."""
    given = {key: value for key, value in turn.items() if key != "tools"}
    if "tool_calls" in turn and not turn["content"].strip():
        given["content"] = call_content
    return given
