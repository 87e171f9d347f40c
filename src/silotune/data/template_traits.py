"""What a chat template does beyond writing text: how a turn ends, system texts, the date.

Found by rendering conversations that are nobody's, never by reading Jinja. The traits are kept on
the tokenizer, because they must not change while it is used. This file knows a tokenizer and its
template; it does not know rows or recipes.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date as Date
from typing import Any

from silotune.core.errors import DataError, ModelError
from silotune.data.conversations import Conversation
from silotune.data.template_limits import TemplateLimitError, render_within_limits
from silotune.data.tool_turns import Tool

KEPT_AS = "silotune_traits"
"""The attribute of a tokenizer that holds its traits. It is not saved with the tokenizer."""

FIRST, SECOND = "the 1st question", "the 2nd question"
REPLY, LAST = "the 1st answer", "the 2nd answer"
SYSTEM = "a rule for all"
THINK = "<think>"
CALLED, RETURNED = "the_tool", "what it returned"
CALL = {"type": "function", "id": "123456789", "function": {"name": CALLED, "arguments": {"a": 1}}}
RESULT = {"role": "tool", "name": CALLED, "tool_call_id": "123456789", "content": RETURNED}


class TemplateError(DataError):
    """A chat template that refuses a conversation; the message holds no text of it."""


@dataclass(frozen=True)
class Traits:
    """What rendering a few conversations shows about a tokenizer's chat template."""

    template: str
    """The template that this is about."""
    eos: str
    """The tokenizer's end token at that time."""
    date: Date | None
    """The day that the template is told; None for the clock's."""
    writes_date: bool
    """Whether it asks for the date."""
    refuses_system: bool
    """Whether it raises on a system turn, but not without it."""
    behind_answer: str
    """What it writes between an answer and the next turn, up to the end of the answer's turn; ""
    if nothing there is a token of its own."""
    end: str | None
    """The token with which a model ends its answer: the first one behind the last answer, or else
    the mark of the next turn. None if there is none."""
    appended: str
    """What is appended to a conversation so that its last answer has its end: the mark of the next
    turn if the template writes no token behind the last answer, as GLM-4's; otherwise ""."""
    opens: str
    """What a prompt ends with although the template takes it out of answers, as in DeepSeek-R1:
    "<think>" and a line break; "" if nothing."""
    call_content: str | None
    """The content that a turn with nothing but calls of tools needs to be written as such."""
    call_appended: str
    """As `appended`, if the last answer is a call of a tool."""


def template_of(tokenizer: Any) -> str:
    """A tokenizer's chat template; of several with names, the default.

    Raises:
        ModelError: None of them is the default.
    """
    text = tokenizer.chat_template
    if isinstance(text, dict) and "default" not in text:
        raise ModelError(
            f"the model has chat templates with names ({', '.join(sorted(text)[:20])}), and none "
            "is the default.\n  Set data.template to one of silotune's templates, or to a file "
            "with the one you want."
        )
    return str(text["default"] if isinstance(text, dict) else text)


def give_traits(tokenizer: Any, date: Date | None) -> Traits:
    """Find a template's traits and keep them on the tokenizer."""
    traits = _find_traits(tokenizer, date)
    setattr(tokenizer, KEPT_AS, traits)
    return traits


def traits_of(tokenizer: Any) -> Traits:
    """A tokenizer's traits; found now if its template is another one than before."""
    known: Traits | None = getattr(tokenizer, KEPT_AS, None)
    if known is not None and known.template == template_of(tokenizer):
        return known
    return give_traits(tokenizer, None if known is None else known.date)


def _find_traits(tokenizer: Any, date: Date | None) -> Traits:
    tokens = _own_tokens(tokenizer)
    last, between = _tails(tokenizer)
    # from the end of an answer: both lists begin with what ends a turn, wherever the turn is
    ends, goes_on = _pieces(last, tokens), _pieces(between, tokens)
    shared = _shared(ends, goes_on)
    mark, appended = _first(ends, tokens), ""
    following = _directly(goes_on, tokens, tokenizer.bos_token)
    up_to = between[: between.index(following) + len(following)] if following else ""
    if mark is None and following and up_to.startswith(last):
        mark, appended = following, up_to[len(last) :]
    behind = up_to if _first(shared, tokens) is None else "".join(shared)
    plain = ({"role": "user", "content": FIRST},)
    content, after_call = _calls(tokenizer)
    call_mark = _directly(_pieces(after_call, tokens), tokens, tokenizer.bos_token)
    with_system = ({"role": "system", "content": SYSTEM}, *plain)
    reads = _renders(tokenizer, plain, Date(2001, 2, 3))
    return Traits(
        template=template_of(tokenizer),
        eos=tokenizer.eos_token,
        date=date,
        writes_date=reads != _renders(tokenizer, plain, Date(2010, 11, 12)),
        refuses_system=reads is not None and _renders(tokenizer, with_system) is None,
        behind_answer=behind,
        end=mark,
        appended=appended,
        opens=opened_thought(
            lambda talk, ask: render_as_is(tokenizer, talk, ask=ask, date=date), plain
        ),
        call_content=content,
        call_appended=(call_mark or appended) if appended else "",
    )


def opened_thought(render_: Callable[[Conversation, bool], str], asked: Conversation) -> str:
    """The open <think> with which a prompt ends, if the template writes answers without it.

    Args:
        render_: (turns, whether it ends where the assistant begins to speak) -> text.
        asked: A question.
    """

    def text(talk: Conversation, *, ask: bool) -> str:
        try:
            return render_(talk, ask)
        except TemplateError:
            return ""

    prompt = text(asked, ask=True)
    head, mark, blank = prompt.rpartition(THINK)
    if not mark or blank.strip():
        return ""
    thought = f"{THINK}\na thought\n</think>\n\n{REPLY}"
    for answer in (REPLY, thought):
        whole = text((*asked, {"role": "assistant", "content": answer}), ask=False)
        if not whole.startswith(head) or not whole[len(head) :].lstrip().startswith(REPLY):
            return ""
    return mark + blank


def _calls(tokenizer: Any) -> tuple[str | None, str]:
    """The content that a turn with only a call needs, and what stands between call and result."""
    for content in ("", None):
        call = {"role": "assistant", "content": content, "tool_calls": [CALL]}
        talk: list[Any] = [{"role": "user", "content": FIRST}, call]
        alone = _renders(tokenizer, tuple(talk)) or ""
        if CALLED in alone:
            whole = _renders(tokenizer, (*talk, RESULT)) or ""
            behind = whole[len(alone) :] if whole.startswith(alone) else ""
            return content, behind.partition(RETURNED)[0]
    return "", ""


def _tails(tokenizer: Any) -> tuple[str, str]:
    """What stands behind the last answer, and between an answer and the next question."""
    talk = (
        {"role": "user", "content": FIRST},
        {"role": "assistant", "content": REPLY},
        {"role": "user", "content": SECOND},
        {"role": "assistant", "content": LAST},
    )
    one, two = _renders(tokenizer, talk[:2]) or "", _renders(tokenizer, talk) or ""
    last = one.rpartition(REPLY)[2] if REPLY in one else ""
    between = two.partition(REPLY)[2] if REPLY in two else ""
    return last, between.partition(SECOND)[0] if SECOND in between else ""


def _renders(tokenizer: Any, talk: Conversation, date: Date | None = None) -> str | None:
    try:
        return render_as_is(tokenizer, talk, ask=False, date=date)
    except TemplateError:
        return None


def _own_tokens(tokenizer: Any) -> frozenset[str]:
    """Texts that are always one token, whatever stands around them."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    return frozenset(t for t in (*added, *tokenizer.all_special_tokens) if t.strip())


def _pieces(text: str, tokens: frozenset[str]) -> list[str]:
    """A text cut at those of its parts that are tokens of their own; no piece is empty."""
    there = sorted((t for t in tokens if t in text), key=len, reverse=True)
    if not there:
        return [text] if text else []
    return [p for p in re.split(f"({'|'.join(map(re.escape, there))})", text) if p]


def _shared(one: list[str], other: list[str]) -> list[str]:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other)) if same is None else same]


def _first(pieces: list[str], tokens: frozenset[str]) -> str | None:
    return next((piece for piece in pieces if piece in tokens), None)


def _directly(pieces: list[str], tokens: frozenset[str], bos: str | None) -> str | None:
    """The token that follows at once; one that begins a text ends no answer."""
    first = next((piece for piece in pieces if piece.strip()), None)
    return first if first in tokens and first != bos else None


# --- rendering


def fold_system(messages: Conversation) -> Conversation:
    """Put system texts in front of the next question, for templates that take none."""
    folded: list[Any] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting += [message["content"]] if message["content"].strip() else []
        elif message["role"] == "user" and waiting:
            folded.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            folded.append(message)
    if waiting:  # no question follows: the template decides
        return messages
    return tuple(folded)


def render_as_is(
    tokenizer: Any,
    messages: Conversation,
    *,
    ask: bool,
    date: Date | None = None,
    tools: Sequence[Tool] = (),
) -> str:
    """The text that a tokenizer's template makes of a conversation, unchanged.

    Args:
        tokenizer: With a chat template.
        messages: At least one turn.
        ask: Whether the text ends where the assistant begins to speak.
        date: The day that the template is told; None for the clock's.
        tools: The tools that the template is told.

    Raises:
        TemplateError: The template refuses it, or is no Jinja.
        TemplateLimitError: It does not end, or writes too much.
    """
    text = template_of(tokenizer)
    more: dict[str, Any] = {"tools": list(tools)} if tools else {}
    if date is not None and "strftime_now" in text:
        more["chat_template"] = _ON_A_DAY + text
        more["parts_of_day"] = {part: date.strftime(part) for part in _DIRECTIVE.findall(text)}
    return _apply(tokenizer, messages, ask=ask, **more)


_DIRECTIVE = re.compile(r"%[-#_^]?[A-Za-z]")
_ON_A_DAY = (
    "{% macro strftime_now(format) %}{% set at = namespace(text=format) %}"
    "{% for part in parts_of_day %}{% set at.text = at.text.replace(part, parts_of_day[part]) %}"
    "{% endfor %}{{ at.text }}{% endmacro %}{{ '' }}"
)
"""Put in front of a template: replaces transformers' clock. Functions cannot be passed in. The
empty text keeps a line break with which a template begins."""


def _apply(tokenizer: Any, messages: Conversation, *, ask: bool, **more: Any) -> str:
    try:
        return render_within_limits(
            lambda: tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=ask, **more
            ),
            template=more.get("chat_template") or template_of(tokenizer),
        )
    except TemplateLimitError:
        raise
    except Exception as error:  # a template is a program and can fail in any way
        # its own words are shown; anything else could hold words of a row
        said = str(error).strip()
        why = said if said and said in template_of(tokenizer) else f"({type(error).__name__})"
        raise TemplateError(
            f"the chat template refuses this conversation: {why}\n"
            "  Bring its turns into the order that the template asks for (most often user and "
            "assistant in turn, the user first), or set another data.template, for example plain."
        ) from error
