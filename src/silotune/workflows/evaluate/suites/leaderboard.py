"""The FlowerTune leaderboard's protocols: prompts, generation and parsing, only for comparison.

Medical and MMLU: the score measures how well a model follows the format as much as what it knows.
Unrecognized outputs count as wrong, so scores below chance are common. Finance: unrecognized
outputs count as neutral, the most common class of one of its data sets. For an honest score, see
`scoring.py`.

Sources for the protocol: our study of the reference systems, and 595 + 2,092 published model
outputs whose published scores the tests reproduce. The wording of the instructions is ours, because
we may not copy the published sentences; the argument `instruction` below replaces it. The model
answers as it is loaded; the published protocol loads the base in 4-bit.
"""

import re
from collections.abc import Mapping, Sequence

from silotune.models.loading import LoadedModel
from silotune.training.generate import complete, encode
from silotune.workflows.evaluate.suites.base import LETTERS, Item, Kind
from silotune.workflows.evaluate.suites.results import Answered

INSTRUCTIONS: dict[str, str] = {
    "pubmedqa": "Here is the abstract of a medical study, and a question about it. "
    "Reply with yes, no, or maybe.",
    "medqa": "Here is a question from an exam for physicians. "
    "Reply with the letter of the right option, from A to E.",
    "medmcqa": "Here is a question from an entrance exam for medical schools. "
    "Reply with the letter of the right option, from A to D.",
    "careqa": "Here is a question from an exam for health professionals. "
    "Reply with the letter of the right option, from A to D.",
    "mmlu": "Here is a multiple-choice question. "
    "Reply with the letter of the right option, from A to D.",
    "finance": "Here is a piece of financial news. "
    "Name its sentiment as one of {negative/neutral/positive}.",
}
"""Suite (finance: all three) -> the sentence that its prompts start with."""

ANSWER_MARK = "Answer: "
FINANCE_LENGTH = 512  # tokens of prompt and answer together
PARSED = {*LETTERS.lower(), "yes", "no"}


# --- prompts --------------------------------------------------------------------------------------


def choice_body(question: str, options: Mapping[str, str]) -> str:
    """Question and options; a question without "?" or "." at its end gets a question mark."""
    mark = "" if question.endswith(("?", ".")) else "?"
    lines = "\n".join(f"{label}. {text}" for label, text in options.items())
    return f"Question: {question}{mark}\n\nOptions:\n{lines}"


def medical_prompt(suite: str, body: str) -> str:
    """The full prompt of the medical suites and MMLU. The markers are literal text."""
    asked = f"{INSTRUCTIONS[suite]}\n{body}\nThe answer is:\n"
    return f"<|im_start|>question\n{asked}<|im_end|>\n<|im_start|>answer\n"


def finance_prompt(text: str) -> str:
    """The full prompt of the finance suites, including the blank at the end."""
    return f"Instruction: {INSTRUCTIONS['finance']}\nInput: {text}\n{ANSWER_MARK}"


# --- parsing --------------------------------------------------------------------------------------


def parse_medical(output: str, kind: Kind) -> str:
    """How an output is read: "a" to "e", "yes" or "no"; otherwise the raw output.

    The output is lowercased. If a line starts with "##", only the rest of that line counts. All
    characters except letters and digits become blanks. Then a boolean suite reads the entire text,
    where yesyes, nono, yesno and noyes count as their first word. A choice suite reads the first
    character: "An" and "Answer" are A, "The" is nothing.
    """
    text = output.lower()
    if "\n##" in text:
        text = text.split("\n##")[1].split("\n")[0]
    # the ends are stripped: "(b)" counts as b. No published output shows whether this is right.
    text = " ".join(re.sub(r"[^a-z0-9]", " ", text).split())
    text = re.sub(r"\b(yes|no)(?:yes|no)\b", r"\1", text) if kind == "boolean" else text[:1]
    return text if text in PARSED else output


def is_correct_medical(output: str, gold: str) -> bool:
    """Whether an output counts as right. "maybe" must match the output exactly."""
    parsed = parse_medical(output, "boolean" if gold in ("yes", "no", "maybe") else "choice")
    return parsed == (gold.lower() if parsed in PARSED else gold)


def parse_finance(text: str) -> str:
    """The sentiment that is read from a text: the prompt and the output together.

    Everything after the first "Answer: " counts, even if the news itself contains it. In a text
    without it, everything counts; the protocol does not define this case.
    """
    _, mark, after = text.partition(ANSWER_MARK)
    said = (after if mark else text).lower()
    return next((label for label in ("positive", "negative") if label in said), "neutral")


# --- generation -----------------------------------------------------------------------------------


def run_medical(
    loaded: LoadedModel,
    items: Sequence[Item],
    *,
    suite: str,
    batch_size: int = 16,
    instruction: str | None = None,
) -> list[Answered]:
    """Answer with the medical and MMLU protocol.

    The score depends on `batch_size`: an answer may have as many tokens as the first gold answer of
    its batch. In PubMedQA, a "maybe" of several tokens therefore gives its entire batch more room.
    The leaderboard uses 16.

    Args:
        loaded: The model in its current state.
        items: Items of one suite, with `leaderboard` prompts, in the suite's order.
        suite: Its name.
        batch_size: Items that share a maximum answer length.
        instruction: Replaces the suite's sentence in INSTRUCTIONS.
    """
    answered: list[Answered] = []
    for at in range(0, len(items), batch_size):
        batch = items[at : at + batch_size]
        # Golds without special tokens: a letter is one token, as in the published outputs.
        room = len(encode(loaded, [batch[0].gold])[0])
        # Prompts with them: the markers are literal text, so only this can add a begin token. If
        # the tokenizer knows the markers, they become its special tokens.
        prompts = encode(loaded, _worded(batch, INSTRUCTIONS[suite], instruction), special=True)
        # one prompt at a time, like the protocol: not even padding can change a token
        outputs = complete(loaded, prompts, max_new_tokens=max(room, 1), batch_size=1)
        answered += [
            _medical(item, output.text) for item, output in zip(batch, outputs, strict=True)
        ]
    return answered


def _medical(item: Item, output: str) -> Answered:
    right = is_correct_medical(output, item.gold)
    kind: Kind = "boolean" if item.gold in ("yes", "no", "maybe") else "choice"
    by_folded = {label.lower(): label for label in item.options}
    parsed = parse_medical(output, kind)
    label = item.gold if right else by_folded.get(parsed if parsed in PARSED else "")
    return Answered(item, label, output=output)


def run_finance(
    loaded: LoadedModel,
    items: Sequence[Item],
    *,
    batch_size: int = 32,
    instruction: str | None = None,
) -> list[Answered]:
    """Answer with the finance protocol: 512 tokens in total, for the longest prompt of the batch.

    The score depends on `batch_size`, because a longer neighbour leaves less room. The leaderboard
    uses 32. Padding is on the left; the protocol leaves the side to the tokenizer. A prompt that
    fills all 512 tokens is not truncated and gets one token for its answer.
    """
    answered: list[Answered] = []
    for at in range(0, len(items), batch_size):
        batch = items[at : at + batch_size]
        texts = _worded(batch, INSTRUCTIONS["finance"], instruction)
        prompts = encode(loaded, texts, special=True)
        room = max(FINANCE_LENGTH - max(map(len, prompts)), 1)
        outputs = complete(loaded, prompts, max_new_tokens=room, batch_size=len(batch))
        answered += [
            Answered(item, parse_finance(text + output.text), output=output.text)
            for item, text, output in zip(batch, texts, outputs, strict=True)
        ]
    return answered


def _worded(items: Sequence[Item], own: str, given: str | None) -> list[str]:
    return [item.leaderboard.replace(own, given or own, 1) for item in items]
