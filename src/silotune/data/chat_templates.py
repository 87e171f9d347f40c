"""How a conversation becomes text: the templates by name, and how a tokenizer is given one.

One template serves training, scoring and answers, and is saved with the adapter. All are Jinja, run
in the sandbox that transformers puts around chat templates.
"""

from pathlib import Path
from typing import Any

from silotune.core.errors import ConfigError, ModelError
from silotune.core.wording import did_you_mean
from silotune.data.conversations import Conversation

END = "{{ eos_token }}"
"""What an own template of this file writes behind each answer."""

PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}" + END + "{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""For base models, whose tokenizers bring no chat template."""

THREE_BLOCK = (
    "{% for message in messages %}"
    "{{ {'system': '### Instruction:', 'user': '### Input:', 'assistant': '### Response:'}"
    "[message['role']] + '\\n' + message['content'].strip() }}"
    "{% if message['role'] == 'assistant' %}" + END + "{% endif %}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
"""Instruction (the system text), input (the question) and response, a blank line between them."""

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
"""Alpaca's words (Taori et al. 2023), with the answer on a line of its own as alpaca-lora has it; a
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
"""As FastChat's vicuna_v1.1."""

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
"""FlowerTune's strings: Alpaca's words without its blank lines, the answer on the header's line."""

TEMPLATES: dict[str, str | None] = {
    "auto": None,
    "plain": PLAIN,
    "three-block": THREE_BLOCK,
    "alpaca": ALPACA,
    "vicuna": VICUNA,
    "flowertune": FLOWERTUNE,
}
"""By the name that data.template uses; auto is the model's own, or plain where it has none."""

PROBE: Conversation = (
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
)


def resolve_template(given: str) -> str:
    """A recipe's data.template as a name or as Jinja text; a file is read.

    Raises:
        ConfigError: There is neither such a name nor such a file, the text is no Jinja, or it does
            not write the answer.
    """
    if given in TEMPLATES:
        return given
    text = given
    if "{" not in given:
        path = Path(given).expanduser()
        try:
            found = path.is_file()
        except OSError:  # a name that is too long for one
            found = False
        if not found:
            raise ConfigError(
                f"data.template = '{given}': no template of this name, and no such file."
                f"{did_you_mean(given, TEMPLATES)}\n"
                f"  There are: {', '.join(TEMPLATES)}. Or give a file with a Jinja chat template."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"data.template = '{given}' cannot be read: {error}.\n  Give a text file in UTF-8."
            ) from error
    _check_text(text)
    return text


def _check_text(text: str) -> None:
    """Try a template without a tokenizer: no model has to be fetched for a slip in it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # stand-ins for what a tokenizer gives its template
    special: Any = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    try:
        (asked,), _ = render_jinja_template(
            [list(PROBE[:1])], chat_template=text, add_generation_prompt=True, **special
        )
        (whole,), _ = render_jinja_template(
            [list(PROBE)], chat_template=text, add_generation_prompt=False, **special
        )
    except Exception as error:  # a template is a program, and may fail as one
        raise ConfigError(
            f"data.template: not a Jinja chat template: {error}\n"
            "  It is given `messages`, `add_generation_prompt` and `eos_token`."
        ) from error
    _check_answer(asked, whole)


def _check_answer(asked: str, whole: str) -> None:
    asked = asked.rstrip(" ")
    if not whole.startswith(asked) or PROBE[1]["content"] not in whole[len(asked) :]:
        raise ConfigError(
            "data.template: the text of a conversation does not hold the answer behind what stands "
            "there with add_generation_prompt, so nothing would be learned.\n"
            "  Write message['content'] of the role assistant behind the same words that "
            "add_generation_prompt writes;\n  a line break behind }} belongs to the text, one "
            "behind -}} does not."
        )


def set_template(tokenizer: Any, template: str = "auto", *, end_token: bool = True) -> bool:
    """Give a tokenizer the template of a recipe; with "auto" the plain one if it has none.

    Args:
        tokenizer: Changed in place.
        template: A name, or Jinja text.
        end_token: False takes the end token out of a template of this file: published systems
            trained without, and their models never learn to stop.

    Returns:
        Whether the plain one had to stand in.

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
            "train.compat = 'no-end-token' takes the end token out of silotune's own templates, "
            "and data.template is another here.\n  Use one of them."
        )
    lacking = text is None and not tokenizer.chat_template
    if lacking:
        text = PLAIN
    if text is None:
        _check_answer(render(tokenizer, PROBE[:1], ask=True), render(tokenizer, PROBE, ask=False))
    else:
        tokenizer.chat_template = text if end_token else text.replace(END, "")
    return lacking


def render(tokenizer: Any, messages: Conversation, *, ask: bool) -> str:
    """The text of a conversation; with `ask` it ends where the assistant begins to speak.

    That is before the blank that some templates write in front of the answer: most tokenizers join
    it to the answer's first word, and a model that is asked has to begin as it has learned to.
    """
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    assert isinstance(text, str)
    return text.rstrip(" ") if ask else text
