"""How a conversation becomes text: the templates by name, and how to set one on a tokenizer.

The same template is used for training, scoring and answers, and is saved with the adapter. All are
Jinja, and run in the sandbox in which transformers renders chat templates.
"""

from pathlib import Path
from typing import Any

from silotune.core.errors import ConfigError, ModelError
from silotune.core.wording import did_you_mean
from silotune.data.conversations import Conversation
from silotune.data.template_limits import (
    TemplateLimitError,
    check_operations,
    render_within_limits,
)

END = "{{ eos_token }}"
"""What the templates in this file write after each answer."""

PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}" + END + "{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""For base models, whose tokenizers have no chat template."""

THREE_BLOCK = (
    "{% for message in messages %}"
    "{{ {'system': '### Instruction:', 'user': '### Input:', 'assistant': '### Response:'}"
    "[message['role']] + '\\n' + message['content'].strip() }}"
    "{% if message['role'] == 'assistant' %}" + END + "{% endif %}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
"""Instruction (the system text), input (the question) and response, separated by blank lines."""

_SYSTEM = (
    "{% set first = messages[0] if messages else {} %}"
    "{% set system = first['content'] if first['role'] == 'system' else '' %}"
)
_PREAMBLE = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."

ALPACA = (
    _SYSTEM + "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% set extra = message['input'] or '' %}"
    "{{ (system or '" + _PREAMBLE + "' + (', paired with an input that provides further context. '"
    " if extra else '. ') + '" + _REQUEST + "') + '\\n\\n' }}"
    "{{ '### Instruction:\\n' + (message['instruction'] or message['content']) + '\\n\\n' }}"
    "{% if extra %}{{ '### Input:\\n' + extra + '\\n\\n' }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' + message['content'] }}" + END + "{{ '\\n\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
"""Alpaca's wording (Taori et al. 2023), with the answer on a separate line as in alpaca-lora. A
system text replaces the preamble."""

VICUNA = (
    "{% if messages and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}{{ 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '' if loop.index0 and "
    "messages[loop.index0 - 1]['role'] == 'assistant' else ' ' }}"
    "{{ 'USER: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' + message['content'] }}"
    + END
    + "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
"""The same as FastChat's vicuna_v1.1."""

FLOWERTUNE = (
    _SYSTEM + "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ (system or '" + _PREAMBLE + ". " + _REQUEST + "')"
    " + '\\n### Instruction:\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response: ' + message['content'] }}"
    + END
    + "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response: ' }}{% endif %}"
)
"""FlowerTune's text: Alpaca's wording without blank lines, the answer on the same line as its
header."""

TEMPLATES: dict[str, str | None] = {
    "auto": None,
    "plain": PLAIN,
    "three-block": THREE_BLOCK,
    "alpaca": ALPACA,
    "vicuna": VICUNA,
    "flowertune": FLOWERTUNE,
}
"""By the name that data.template uses. auto is the model's own, or plain if it has none."""

PROBE: Conversation = (
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
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
        asked = render_within_limits(lambda: rendered(PROBE[:1], ask=True))
        full = render_within_limits(lambda: rendered(PROBE, ask=False))
    except TemplateLimitError:
        raise
    except Exception as error:  # a template is a program and can fail in any way
        raise ConfigError(
            f"data.template: not a Jinja chat template: {error}\n"
            "  It can use `messages`, `add_generation_prompt` and `eos_token`."
        ) from error
    _check_answer(asked, full)


def _check_answer(asked: str, full: str) -> None:
    asked = asked.rstrip(" ")  # as in `render`
    if not full.startswith(asked) or PROBE[1]["content"] not in full[len(asked) :]:
        raise ConfigError(
            "data.template: in a rendered conversation, the answer does not follow the text that "
            "add_generation_prompt writes, so nothing would be learned.\n"
            "  Write message['content'] of the role assistant after the same text that "
            "add_generation_prompt writes.\n  A line break after }} is part of the text, one "
            "after -}} is not."
        )


def set_template(tokenizer: Any, template: str = "auto", *, end_token: bool = True) -> bool:
    """Set a recipe's template on a tokenizer; "auto" sets the plain one if it has none.

    Args:
        tokenizer: Changed in place.
        template: A name, or Jinja text.
        end_token: False removes the end token from a template in this file: some published systems
            trained without it, so their models never learn to stop.

    Returns:
        Whether the plain template was set because the tokenizer has none.

    Raises:
        ModelError: The tokenizer has no end token.
        ConfigError: The model's own template does not write the answer.
    """
    if tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has no end token, so the model could never learn to stop.\n"
            "  Use a model whose tokenizer defines eos_token."
        )
    text = TEMPLATES.get(template, template)
    if not end_token and TEMPLATES.get(template) is None:
        raise ConfigError(
            "train.compat = 'no-end-token' removes the end token from silotune's own templates, "
            "but data.template is not one of them.\n  Use one of silotune's templates."
        )
    has_none = text is None and not tokenizer.chat_template
    if has_none:
        text = PLAIN
    if text is None:
        check_operations(str(tokenizer.chat_template))
        _check_answer(render(tokenizer, PROBE[:1], ask=True), render(tokenizer, PROBE, ask=False))
    else:
        tokenizer.chat_template = text if end_token else text.replace(END, "")
    return has_none


def render(tokenizer: Any, messages: Conversation, *, ask: bool) -> str:
    """The text of a conversation; with `ask` it ends where the assistant begins to speak.

    It ends before the space that some templates write in front of the answer: most tokenizers join
    the space to the answer's first word, so the model must generate it as it did in training.
    """
    text = render_within_limits(
        lambda: tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask
        )
    )
    return text.rstrip(" ") if ask else text
