"""One row of a preference data set becomes a prompt and two answers, of which one is preferred.

Reads the layouts of public sets: a prompt beside two answers, or two whole conversations with a
common beginning, as text or as lists of messages. Columns with scores are ignored. Does not know
files, clients or tokens. Error messages name the place and the column, never a value.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from silotune.core.errors import DataError, EmptyRowError
from silotune.core.wording import did_you_mean
from silotune.data.cells import is_blank, text_of
from silotune.data.conversations import Conversation, list_columns, user_turn, with_system
from silotune.data.messages import Message, turn, turns
from silotune.data.tool_turns import tools_of

Preference = dict[str, list[Message]]
"""{"prompt": turns, "chosen": turns, "rejected": turns}. The prompt ends with a turn that is asked;
each of the others begins and ends with an assistant turn. Assistant turns of the prompt are not
learned."""

PROMPTS = ("prompt", "question", "instruction")
"""Names of the column with the prompt in public data sets, in the order in which they are tried."""
ANSWERS = ("chosen", "rejected")

SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")
"""Begins a turn in the transcripts of Bai et al. 2022 (arXiv:2204.05862), the HH-RLHF data."""
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class PlacedPreference(dict[str, list[Message]]):
    """A `Preference` that knows where it was read, for errors after reading."""

    where: str = ""

    @classmethod
    def of(cls, pair: Preference, where: str) -> "PlacedPreference":
        """The same turns, with their place."""
        made = cls(pair)
        made.where = where
        return made


def preference(row: Mapping[str, Any], *, where: str, system: str | None = None) -> Preference:
    """Turn one row into a prompt with a preferred and a rejected answer.

    Args:
        row: Column names and values: `chosen` and `rejected`, and a `prompt` unless both are whole
            conversations. All other columns, such as scores, are ignored.
        where: Place of the row for messages, for example "pairs.csv:7".
        system: Text of a system turn for a prompt that has none.

    Raises:
        DataError: A column is missing or cannot be used, both answers are the same, or the row is
            an answer with a label of its own.

    Example:
        >>> row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "score_chosen": 9.0}
        >>> preference(row, where="pairs.csv:2")["rejected"]
        [{'role': 'assistant', 'content': '5'}]
    """
    _check_columns(row, where)
    asked = next((name for name in PROMPTS if not is_blank(row.get(name))), None)
    listed = [_is_list(row[name]) for name in ANSWERS]
    if any(listed) and not all(listed):
        names = ANSWERS if listed[0] else ANSWERS[::-1]
        raise DataError(
            f"{where}: column '{names[0]}' holds messages, but column '{names[1]}' holds text.\n"
            "  Write both in the same form."
        )
    if all(listed):
        found = _of_messages(row, asked, where)
    elif asked is not None:
        found = _of_texts(row, asked, where)
    else:
        found = _of_whole_texts(row, where)
    _check_pair(found, where)
    prompt = _as_context(found["prompt"])
    if tools := tools_of(row.get("tools"), where=where):
        prompt = [{**prompt[0], "tools": tools}, *prompt[1:]]
    return {**found, "prompt": with_system(prompt, system)}


def whole(pair: Mapping[str, Sequence[Message]], which: str) -> Conversation:
    """The prompt with one of its answers, "chosen" or "rejected", as a conversation."""
    return (*pair["prompt"], *pair[which])


def talks_of(row: Any) -> list[Conversation]:
    """A converted row as the conversations that a model reads: two of a pair, else the row."""
    return [whole(row, which) for which in ANSWERS] if is_pair(row) else [row]


def is_pair(row: object) -> bool:
    """Whether a converted row is a `Preference`."""
    return isinstance(row, dict) and "rejected" in row


# --- columns


def _check_columns(row: Mapping[str, Any], where: str) -> None:
    missing = [name for name in ANSWERS if name not in row]
    if not missing:
        return
    if len(missing) == 2 and {"completion", "label"} <= row.keys():
        raise DataError(
            f"{where}: the row is one answer with a label (unpaired feedback, as for KTO), which "
            'task = "prefer" cannot learn: DPO needs two answers to the same prompt.\n'
            "  Put a good and a bad answer to a prompt into one row, as chosen and rejected."
        )
    hints = "".join(did_you_mean(name, row) for name in missing)
    raise DataError(
        f"{where}: there is no column '{missing[0]}'.{hints}\n"
        "  A preference has a prompt (or question, or instruction), chosen and rejected; or chosen "
        f"and\n  rejected alone, as two whole conversations. The columns are {list_columns(row)}."
    )


def is_unpaired(row: Mapping[str, Any]) -> bool:
    """Whether a row is one answer with a label that says whether it is good, as for KTO."""
    has_answer = {"completion", "label"} <= row.keys()
    return has_answer and str(row["label"]).strip().lower() in ("true", "false")


def is_bad_answer(row: Mapping[str, Any]) -> bool:
    """Whether a row is unpaired, and its label says that the answer is a bad one."""
    return is_unpaired(row) and str(row["label"]).strip().lower() == "false"


def _is_list(value: object) -> bool:
    """Whether a cell is a list of messages, or one as JSON text."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return isinstance(value, list)
    try:
        return isinstance(json.loads(value), list)
    except (ValueError, RecursionError):
        return False


def _prompt(row: Mapping[str, Any], column: str, where: str) -> list[Message]:
    value = row[column]
    if _is_list(value):
        return turns(value, where=where, column=column, needs_answer=False)
    text = text_of(value, where=where, what=f"column '{column}'")
    extra = row.get("input") if column == "instruction" else None
    return [turn("user", text) if extra is None else user_turn(text, extra, where)]


# --- layouts


def _of_texts(row: Mapping[str, Any], asked: str, where: str) -> Preference:
    """A prompt beside two answers that are texts."""
    answers = _both(row, where)
    each = {name: [turn("assistant", text)] for name, text in answers.items()}
    return {"prompt": _prompt(row, asked, where), **each}


def _of_messages(row: Mapping[str, Any], asked: str | None, where: str) -> Preference:
    """Two lists of messages, with the prompt in both of them or beside them."""
    chosen, rejected = (
        turns(row[name], where=where, column=name, needs_answer=True) for name in ANSWERS
    )
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        if asked is None:
            raise DataError(
                f"{where}: chosen and rejected are answers, and there is no prompt.\n"
                "  Add a column 'prompt', or let both lists begin with the question."
            )
        return {"prompt": _prompt(row, asked, where), "chosen": chosen, "rejected": rejected}
    found = _split(chosen, rejected, where)
    if asked is not None:
        _check_prompt(_prompt(row, asked, where), found["prompt"], asked, where)
    return found


def _split(chosen: list[Message], rejected: list[Message], where: str) -> Preference:
    """Two whole conversations as their common beginning and what follows it in each."""
    most = min(len(chosen), len(rejected))
    n = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    # what follows has to begin with an answer, and neither may be empty
    while n and not (n < most and chosen[n]["role"] == rejected[n]["role"] == "assistant"):
        n -= 1
    if not n:
        raise DataError(
            f"{where}: chosen and rejected have no question in common at their beginning.\n"
            "  Both must be answers to the same prompt: give it in a column 'prompt', or at the "
            "beginning\n  of both conversations."
        )
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def _of_whole_texts(row: Mapping[str, Any], where: str) -> Preference:
    """Two texts with a common beginning: transcripts, or any texts."""
    chosen, rejected = _both(row, where).values()
    spoken = [_transcript(text) for text in (chosen, rejected)]
    if spoken[0] and spoken[1]:
        return _split(spoken[0], spoken[1], where)
    most = min(len(chosen), len(rejected))
    n = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    # a word that both answers begin with, in part or whole, belongs to the answers
    prompt = chosen[: max(chosen.rfind(sign, 0, n) for sign in " \n\t") + 1]
    if not prompt.strip():
        raise DataError(
            f"{where}: there is no prompt, and chosen and rejected have no beginning in common.\n"
            "  Add a column 'prompt' (or question, or instruction) with what both answer."
        )
    texts = {"chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
    for name, text in texts.items():
        text_of(text, where=where, what=f"column '{name}', behind the common beginning,")
    return {
        "prompt": [turn("user", prompt.strip())],
        **{name: [turn("assistant", text)] for name, text in texts.items()},
    }


def _transcript(text: str) -> list[Message] | None:
    """The turns of a transcript with the speakers Human and Assistant; None for another text."""
    marks = list(SPEAKER.finditer(text))
    if not marks or text[: marks[0].start()].strip() or marks[0][1] != "Human":
        return None
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    spoken = [
        turn(SPEAKERS[mark[1]], text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]
    return spoken if all(one["content"] for one in spoken) else None


def _both(row: Mapping[str, Any], where: str) -> dict[str, str]:
    """Both texts. What cannot be fixed by skipping empty rows is said first."""
    found: dict[str, str] = {}
    empty: EmptyRowError | None = None
    for name in ANSWERS:
        try:
            found[name] = text_of(row[name], where=where, what=f"column '{name}'")
        except EmptyRowError as error:
            empty = empty or error
    if empty is not None:
        raise empty
    return found


# --- checks


def _check_prompt(
    given: Sequence[Message], common: Sequence[Message], column: str, where: str
) -> None:
    """Refuse a prompt that the two conversations do not contain: one of them would be wrong."""
    texts = {one["content"].strip() for one in common}
    if any(one["content"].strip() not in texts for one in given):
        raise DataError(
            f"{where}: chosen and rejected are whole conversations, and do not begin with the text "
            f"of column '{column}'.\n  Remove that column, or correct the row."
        )


def _check_pair(pair: Preference, where: str) -> None:
    if pair["prompt"][-1]["role"] == "assistant":
        raise DataError(
            f"{where}: the prompt ends with an answer.\n"
            "  End it with the question that chosen and rejected answer."
        )
    for name in ANSWERS:
        if pair[name][-1]["role"] != "assistant":
            raise DataError(
                f"{where}: column '{name}' does not end with an answer of the assistant.\n"
                "  Remove the turns behind the last answer, or the row."
            )
    if _said(pair["chosen"]) == _said(pair["rejected"]):
        raise EmptyRowError(
            f"{where}: chosen and rejected are the same, so there is nothing to prefer.\n"
            "  Correct it, remove the row, or skip all such rows: data.skip_empty = true."
        )


def _said(answer: Sequence[Message]) -> list[tuple[object, ...]]:
    return [(one["role"], one["content"].strip(), str(one.get("tool_calls"))) for one in answer]


def _as_context(prompt: Sequence[Message]) -> list[Message]:
    """The prompt's turns; its answers are read and not learned."""
    return [{**one, "train": False} if one["role"] == "assistant" else one for one in prompt]
