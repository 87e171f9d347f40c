"""Chat templates of known model families, and tokenizers that have their control tokens.

Written for these tests from what the families' templates are known to do: which marks they write,
what they refuse, what they leave out. None is a copy of a published file.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.conftest import CHATML

ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, user first') }}{% endif %}"
)
TURNS = "{% for m in messages %}"
DONE = "{% endfor %}"
ASK = "{% if add_generation_prompt %}"
FI = "{% endif %}"

LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set rule = messages[0].content %}"
    "{% set talk = messages[1:] %}{% else %}{% set talk = messages %}{% endif %}"
    "{% for m in talk %}" + ALTERNATE + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and rule %}{{ '<<SYS>>\n' + rule + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    + FI
    + DONE
)
LLAMA_3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_LLAMA_TOOLS = (
    "{% if tools %}{{ 'Answer with a function call.\n\n' }}{% for t in tools %}"
    "{{ t | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}"
)
_LLAMA_TURNS = (
    "{% for m in talk %}{% if m.role == 'tool' or m.role == 'ipython' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' }}"
    "{% elif 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one tool call at a time') }}{% endif %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ (m.tool_calls[0].function.arguments | tojson) + '}<|eot_id|>' }}{% else %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_32 = (
    "{% if not day is defined %}{% if strftime_now is defined %}"
    "{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = '26 Jul 2024' %}{% endif %}"
    "{% endif %}{% if messages[0].role == 'system' %}{% set rule = messages[0].content | trim %}"
    "{% set talk = messages[1:] %}{% else %}{% set rule = '' %}{% set talk = messages %}{% endif %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + day + '\n\n' }}"
    + _LLAMA_TOOLS
    + "{{ rule + '<|eot_id|>' }}"
    + _LLAMA_TURNS
)
LLAMA_31 = LLAMA_32.replace("strftime_now is defined", "false")
MISTRAL = (
    "{{ bos_token }}" + TURNS + ALTERNATE + "{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}" + FI + DONE
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system role here') }}{% endif %}" + TURNS + ALTERNATE + "{{ "
    "'<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim"
    " + '<end_of_turn>\n' }}" + DONE + ASK + "{{ '<start_of_turn>model\n' }}" + FI
)
GEMMA_3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rule = messages[0].content + '\n\n'"
    " %}{% set talk = messages[1:] %}{% else %}{% set rule = '' %}{% set talk = messages %}"
    "{% endif %}{% for m in talk %}" + ALTERNATE + "{{ '<start_of_turn>' + ('model' if m.role == "
    "'assistant' else m.role) + '\n' + (rule if loop.first else '') + m.content | trim + "
    "'<end_of_turn>\n' }}" + DONE + ASK + "{{ '<start_of_turn>model\n' }}" + FI
)
PHI_3 = (
    TURNS
    + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    + DONE
    + ASK
    + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
    + FI
)
PHI_4 = (
    TURNS
    + "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
    + DONE
    + ASK
    + "{{ '<|im_start|>assistant<|im_sep|>' }}"
    + FI
)
_QWEN_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ '<tools>' }}{% for t in tools %}"
    "{{ '\n' + (t | tojson) }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}{% endif %}"
)
_QWEN_CALLS = (
    "{% for c in m.tool_calls %}{{ '\n' if m.content or not loop.first else '' }}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ (c.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}"
)
_QWEN_RESULT = (
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
)
QWEN_25 = (
    _QWEN_TOOLS + "{% if not tools and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nA default text.<|im_end|>\n' }}{% endif %}"
    + TURNS
    + "{% if m.role == 'system' and tools %}{% elif m.role == 'tool' %}"
    + _QWEN_RESULT
    + "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    + _QWEN_CALLS
    + "{{ '<|im_end|>\n' }}{% endif %}"
    + DONE
    + ASK
    + "{{ '<|im_start|>assistant\n' }}"
    + FI
)
QWEN_3 = (
    _QWEN_TOOLS
    + "{% set at = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set at.last = loop.index0 %}{% endif %}{% endfor %}" + TURNS + "{% if m.role == 'assistant'"
    " %}{% set why = '' %}{% set said = m.content %}{% if '</think>' in said %}"
    "{% set why = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > at.last and (loop.last or why) %}"
    "{{ '<think>\n' + why + '\n</think>\n\n' }}{% endif %}{{ said }}"
    + _QWEN_CALLS
    + "{{ '<|im_end|>\n' }}{% elif m.role == 'system' and tools %}{% elif m.role == 'tool' %}"
    + _QWEN_RESULT
    + "{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    + DONE
    + ASK
    + "{{ '<|im_start|>assistant\n' }}"
    + FI
)
QWEN_35 = QWEN_3.replace(
    ASK + "{{ '<|im_start|>assistant\n' }}", ASK + "{{ '<|im_start|>assistant\n<think>\n' }}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% endfor %}" + TURNS + "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + "
    "'<｜end▁of▁sentence｜>' }}{% endif %}" + DONE + ASK + "{{ '<｜Assistant｜>' }}" + FI
)
R1_THINKS = R1.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\n' }}")
GLM_4 = (
    "{{ '[gMASK]<sop>' }}"
    + TURNS
    + "{{ '<|' + m.role + '|>\n' + m.content }}"
    + DONE
    + ASK
    + "{{ '<|assistant|>\n' }}"
    + FI
)
COMMAND_R = (
    "{{ bos_token }}" + TURNS + "{{ '<|START_OF_TURN_TOKEN|>' + {'system': '<|SYSTEM_TOKEN|>',"
    " 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] }}"
    "{% if m.role == 'assistant' %}{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|END_OF_TURN_TOKEN|>' }}"
    + DONE
    + ASK
    + "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
    + FI
)
GPT_OSS = (
    "{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{% if tools %}{{ '<|start|>developer<|message|>namespace functions {' }}{% for t in tools %}"
    "{{ '\ntype ' + t.function.name + ' = (_: any) => any;' }}{% endfor %}{{ '\n}<|end|>' }}"
    "{% endif %}{% set at = namespace(name='') %}" + TURNS + "{% if m.tool_calls %}"
    "{% set at.name = m.tool_calls[0].function.name %}"
    "{{ '<|start|>assistant to=functions.' + at.name + '<|channel|>commentary json<|message|>' }}"
    "{{ (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}{% elif m.role == 'tool' %}"
    "{% if not at.name %}{{ raise_exception('a tool message without a call') }}{% endif %}"
    "{{ '<|start|>functions.' + at.name + ' to=assistant<|channel|>commentary<|message|>' }}"
    "{{ (m.content | tojson) + '<|end|>' }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content"
    " + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}{% else %}"
    "{{ '<|start|>' + ('developer' if m.role == 'system' else m.role) + '<|message|>' + m.content +"
    " '<|end|>' }}{% endif %}" + DONE + ASK + "{{ '<|start|>assistant' }}" + FI
)
SMOLLM_3 = (
    "{% if messages[0].role == 'system' %}{% set rule = messages[0].content %}"
    "{% set talk = messages[1:] %}{% else %}{% set rule = 'Answer well.' %}"
    "{% set talk = messages %}{% endif %}{{ '<|im_start|>system\nToday Date: ' + "
    "strftime_now('%d %B %Y') + '\n' + rule + '<|im_end|>\n' }}"
    + CHATML.replace("in messages", "in talk")
)
GRANITE_3 = (
    "{% if messages[0].role != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>Today is ' + "
    "strftime_now('%B %d, %Y') + '.<|end_of_text|>\n' }}{% endif %}" + TURNS + "{{ "
    "'<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
    + DONE
    + ASK
    + "{{ '<|start_of_role|>assistant<|end_of_role|>' }}"
    + FI
)


@dataclass(frozen=True)
class Family:
    """A template, and the two tokens that its tokenizer names."""

    template: str
    eos: str
    bos: str | None = None


FAMILIES = {
    "Llama 2": Family(LLAMA_2, "</s>", "<s>"),
    "Llama 3": Family(LLAMA_3, "<|eot_id|>", "<|begin_of_text|>"),
    "Llama 3.1": Family(LLAMA_31, "<|eot_id|>", "<|begin_of_text|>"),
    "Llama 3.2, 3.3": Family(LLAMA_32, "<|eot_id|>", "<|begin_of_text|>"),
    "Mistral 7B": Family(MISTRAL, "</s>", "<s>"),
    "Gemma, Gemma 2": Family(GEMMA, "<eos>", "<bos>"),
    "Gemma 3": Family(GEMMA_3, "<eos>", "<bos>"),
    "Phi-3, Phi-3.5": Family(PHI_3, "<|endoftext|>"),
    "Phi-4": Family(PHI_4, "<|im_end|>"),
    "Qwen2.5": Family(QWEN_25, "<|im_end|>"),
    "Qwen3": Family(QWEN_3, "<|im_end|>"),
    "Qwen3.5, 3.6, thinking": Family(QWEN_35, "<|im_end|>"),
    "DeepSeek-R1 distilled, first form": Family(R1, "<｜end▁of▁sentence｜>", "<s>"),
    "DeepSeek-R1 distilled, opens `<think>`": Family(R1_THINKS, "<｜end▁of▁sentence｜>", "<s>"),
    "GLM-4": Family(GLM_4, "<|endoftext|>"),
    "Command-R7B": Family(COMMAND_R, "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>"),
    "gpt-oss": Family(GPT_OSS, "<|return|>"),
    "SmolLM2": Family(CHATML, "<|im_end|>"),
    "SmolLM3": Family(SMOLLM_3, "<|im_end|>"),
    "Granite 3": Family(GRANITE_3, "<|end_of_text|>"),
    "a base model with ChatML": Family(CHATML, "<|endoftext|>"),
}

_MARK = re.compile(
    r"<\|[\w ]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|<end_of_utterance>|<turn\|>|<\|turn>"
    r"|\[gMASK\]|<sop>"
)


@cache
def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer_for(
    template: str | None, eos: str, bos: str | None = None, *, begins: bool = False, merges=()
) -> Any:
    """Bytes as tokens, the template's marks as special tokens, and `merges` of byte tokens.

    With `begins`, the tokenizer puts `bos` in front of every text.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    roles = {"<|user|>", "<|assistant|>", "<|system|>"}
    marks = sorted({*_MARK.findall(template or ""), *roles, eos, *([bos] if bos else [])})
    vocab = [*marks, *_alphabet(), *(a + b for a, b in merges)]
    inner = Tokenizer(BPE(vocab={word: n for n, word in enumerate(vocab)}, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(marks)
    if begins:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab.index(bos))]
        )
    more = {"bos_token": bos} if bos else {}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, pad_token=eos, **more)
    made.chat_template = template
    return made


def family_tokenizer(name: str) -> Any:
    """The tokenizer of a family in `FAMILIES`."""
    own = FAMILIES[name]
    return tokenizer_for(own.template, own.eos, own.bos)
