"""Read the answer from a generated text: the strict parser for honest scoring.

Only these count as an answer:

- a label at the start, alone or followed by punctuation: "B", "(B)", "B.", "**B**", "B) Aspirin",
  "yes, because ...";
- the same after a lead-in: "Answer: B", "The correct answer is (B)", "The sentiment is positive.";
- the full text of exactly one option, with or without a lead-in or its own label: "Aspirin",
  "The answer is Aspirin.", "B Aspirin".

Not an answer: "A patient should ..." (an article), "No evidence was found" (a sentence), "A or B",
"A, B", "yes/no", "(A) and (B)" (more than one), "A. ... so the answer is B" (a contradiction), or a
label somewhere in a text. Lower-case letters count only if nothing follows them ("b.").
"""

import re
from collections.abc import Mapping

_LEAD = re.compile(
    r"(?:the |my )?(?:(?:final|correct|best|right) )*"
    r"(?:answer|option|choice|sentiment|decision)\s*(?:is\b\s*:?|:)\s*",
    re.IGNORECASE,
)
_OPEN = r"[\s(\[{\"'*_`]*"
_CLOSE = r"(?=\s*(?:$|\n)|[)\]}.,:;!?\"'*_`])"  # what may follow a label


def parse_answer(output: str, options: Mapping[str, str]) -> str | None:
    """The label that an output names, or None if it names none or more than one.

    Args:
        output: The generated text.
        options: Label -> text. Labels are letters, or words that are their own texts.

    Example:
        >>> options = {"A": "Aspirin", "B": "Ibuprofen"}
        >>> [parse_answer(text, options) for text in ("(B)", "aspirin.", "A patient", "A, B")]
        ['B', 'A', None, None]
    """
    said = _LEAD.sub("", output.strip(), count=1) if _LEAD.match(output.strip()) else output.strip()
    full = _full_text(said, options)
    if full is not None:
        return full
    found = _label(said, options)
    if found is None:
        return None
    label, rest = found
    second = _label(re.sub(r"^[\W_]*(?:and\b|or\b)?", "", rest), options)
    later = {name for text in _after_leads(rest) if (name := _named(text, options))}
    if (second is not None and second[0] != label) or later - {label}:
        return None
    return label


def _label(text: str, options: Mapping[str, str]) -> tuple[str, str] | None:
    """The label that the text starts with, and what follows it."""
    for label in options:
        is_word = len(label) > 1
        flags = re.IGNORECASE if is_word else 0
        if match := re.match(_OPEN + re.escape(label) + _CLOSE, text, flags):
            return label, text[match.end() :]
        if not is_word and re.fullmatch(_OPEN + label.lower() + r"[\W_]*", text):
            return label, ""
    return None


def _full_text(text: str, options: Mapping[str, str]) -> str | None:
    """The only option that has this text, with or without its own label before it."""
    said = _folded(text)
    meant = [
        label
        for label, option in options.items()
        if said and said in (_folded(option), _folded(f"{label} {option}"))
    ]
    return meant[0] if len(meant) == 1 else None


def _after_leads(text: str) -> list[str]:
    return [text[match.end() :] for match in _LEAD.finditer(text)]


def _named(text: str, options: Mapping[str, str]) -> str | None:
    found = _label(text, options)
    return found[0] if found else None


def _folded(text: str) -> str:
    """Normalize a text: case, repeated blanks and punctuation at the ends do not matter."""
    return " ".join(text.casefold().split()).strip(" .,:;!?\"'*_`()[]")
