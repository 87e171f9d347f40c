"""Our own chat templates, as Jinja texts, by the names that `data.template` uses.

None of them writes the token that begins a text: `set_template` puts it in front for a tokenizer
that has one.
"""

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
