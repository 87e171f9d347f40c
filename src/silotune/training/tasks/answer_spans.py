"""Where the answers of a conversation are in its text, and the tokens of the text.

A span runs from the first character that a model has to write to the end of its turn. Where a
template writes an answer that is not the last in another way (without its reasoning, with another
end token), the answer is learned as it stands there.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from silotune.core.errors import DataError
from silotune.data.chat_templates import render
from silotune.data.conversations import Conversation, Message
from silotune.data.template_traits import THINK, TemplateError, traits_of
from silotune.training.tasks.tool_checks import check_tools

Span = tuple[int, int]
"""First character, and the one behind the last."""
Spans = tuple[str, list[Span]]
"""A text, and which parts of it are learned, in order."""

STAND_INS = ("x0x", "y1y", "z2z")
"""Answers that are rendered in an answer's place; one of them shares no end with it."""


def is_learned(message: Message) -> bool:
    """Whether a turn is an answer to learn: an assistant's, unless its row says it is context."""
    return message["role"] == "assistant" and message.get("train", True) is not False


def full_text(tokenizer: Any, messages: Conversation) -> str:
    """The text of a conversation in training: as rendered, with an end behind its last answer."""
    if not is_learned(messages[-1]):
        return render(tokenizer, messages, ask=False)
    return _reasoned(tokenizer, messages) + _appended(tokenizer, messages[-1])


def _reasoned(tokenizer: Any, messages: Conversation) -> str:
    """The text of a conversation; its last answer has its reasoning if the model is asked for it.

    DeepSeek-R1's template asks with an open <think>, and takes the reasoning out of every answer.
    The text of training is then the prompt and what the model is expected to write.
    """
    opens, answer = traits_of(tokenizer).opens, messages[-1]
    if not opens or "tool_calls" in answer or "</think>" not in answer["content"]:
        return render(tokenizer, messages, ask=False)
    asked = render(tokenizer, messages[:-1], ask=True)
    plain = render(tokenizer, (*messages[:-1], {**answer, "content": STAND_INS[0]}), ask=False)
    begin, _, end = plain.rpartition(STAND_INS[0])
    if begin + opens != asked:
        return render(tokenizer, messages, ask=False)
    return asked + answer["content"].lstrip().removeprefix(THINK).lstrip() + end


def _appended(tokenizer: Any, answer: Message) -> str:
    """The mark of the next turn that ends an answer, if the template writes none behind it."""
    traits = traits_of(tokenizer)
    return traits.call_appended if "tool_calls" in answer else traits.appended


def trained_spans(tokenizer: Any, messages: Conversation) -> Spans:
    """The text of a conversation and the character spans that are learned.

    Raises:
        DataError: The template refuses the conversation, or does not write an answer as one piece,
            so no span can be placed; or it leaves out tools, calls or results.
    """
    text = full_text(tokenizer, messages)
    check_tools(tokenizer, messages)
    learned = [i for i, message in enumerate(messages) if is_learned(message)]
    return text, [_span(tokenizer, messages, i, text) for i in learned]


def _span(tokenizer: Any, messages: Conversation, i: int, text: str) -> Span:
    """The place of answer `i` in the text of the whole conversation."""
    is_last = i == len(messages) - 1
    asked = _asked(tokenizer, messages[:i])
    turn = text if is_last else render(tokenizer, messages[: i + 1], ask=False)
    follows = asked is not None and text.startswith(asked)
    if is_last and asked is not None and not follows:
        raise DataError(
            "the model is asked with text that its chat template does not write in front of this "
            "answer, for example an open <think> in front of one without reasoning.\n"
            "  Put the reasoning into every answer (<think>...</think> and the answer), or set "
            "another data.template, for example plain."
        )
    more = _appended(tokenizer, messages[i])
    if asked is not None and follows and text.startswith(turn):
        return len(asked), _end_of(tokenizer, turn, len(asked), text, more)
    start, stop = _written(tokenizer, messages, i, text)
    if asked is not None and follows:
        start = len(asked)
    if text.startswith(turn):
        return start, _end_of(tokenizer, turn, start, text, more)
    behind = traits_of(tokenizer).behind_answer
    if not text.startswith(behind, stop):
        return start, stop + (len(more) if text.startswith(more, stop) else 0)
    return start, _end_of(tokenizer, text[: stop + len(behind)], stop, text, more)


def _asked(tokenizer: Any, before: Conversation) -> str | None:
    """The prompt of an answer; None if the template cannot ask for it, as without a question."""
    try:
        return render(tokenizer, before, ask=True) if before else None
    except TemplateError:
        return None


def _end_of(tokenizer: Any, turn: str, start: int, text: str, more: str) -> int:
    """Where a turn's learned part ends: behind its end token, or where the turn does.

    `more` is the mark of the next turn, if that is what ends this one.
    """
    traits = traits_of(tokenizer)
    found = turn.rfind(traits.eos, start)
    if found >= 0:
        return found + len(traits.eos)
    return len(turn) + (len(more) if text.startswith(more, len(turn)) else 0)


def _written(tokenizer: Any, messages: Conversation, i: int, text: str) -> Span:
    """Where the template writes answer `i`: what changes if the answer does.

    Raises:
        DataError: Not in one piece, or not at all.
    """
    for other in STAND_INS:
        plain = {k: v for k, v in messages[i].items() if k != "tool_calls"}
        talk = (*messages[:i], {**plain, "content": other}, *messages[i + 1 :])
        changed = full_text(tokenizer, talk)
        start = _common(text, changed)
        tail = _common(text[:start:-1], changed[:start:-1])
        stop = len(text) - tail
        if changed == text[:start] + other + text[stop:] and start < stop:
            return len(text[:start].rstrip(" ")), stop
    raise DataError(
        "the chat template changes earlier turns when later ones follow, or leaves them out, so "
        "the loss mask cannot be placed.\n  Use rows with one assistant turn, at the end."
    )


def _common(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared in C, characters are not
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# --- tokens


def encode_rows(tokenizer: Any, rows: Sequence[Spans]) -> list[tuple[list[int], list[int]]]:
    """The token ids of every text, and the character at which each token starts.

    A text is tokenised in one piece. Where that would join the end of a prompt with the beginning
    of its answer, the answer is tokenised separately: a prompt has the same ids in training as when
    the model is asked.
    """
    whole = _encode(tokenizer, [text for text, _ in rows])
    starts = [(n, start) for n, (_, spans) in enumerate(rows) for start, _ in spans]
    asked = _encode(tokenizer, [rows[n][0][:start] for n, start in starts])
    cuts: dict[int, list[int]] = {}
    for (n, start), (ids, _) in zip(starts, asked, strict=True):
        if whole[n][0][: len(ids)] != ids:
            cuts.setdefault(n, []).append(start)
    for n, places in cuts.items():
        whole[n] = _encode_cut(tokenizer, rows[n][0], places)
    return whole


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return [(ids, [start for start, _ in offsets]) for ids, offsets in pairs]


def _encode_cut(tokenizer: Any, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Ids and starts of a text whose parts between `cuts` share no token."""
    ids: list[int] = []
    starts: list[int] = []
    for begin, end in pairwise((0, *cuts, len(text))):
        found, places = _encode_part(tokenizer, text[begin:end], is_first=begin == 0)
        ids += found
        starts += [begin + place for place in places]
    return ids, starts


def _encode_part(tokenizer: Any, text: str, *, is_first: bool) -> tuple[list[int], list[int]]:
    """The tokens of a text in the middle of another one.

    Some tokenizers put a space in front of every text. There, the part is tokenised behind a sign
    that stays a token of its own.
    """
    (alone,) = _encode(tokenizer, [text])
    x, behind = _encode(tokenizer, ["x", "\nx"])
    if is_first or x[0][-1] == behind[0][-1]:
        return alone
    for sign in "\nx.(":
        ((ids, starts),) = _encode(tokenizer, [sign + text])
        if 1 in starts:
            at = starts.index(1)
            return ids[at:], [start - 1 for start in starts[at:]]
    return alone
