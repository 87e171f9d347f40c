"""What the columns of a file may be: question and answer, a text and its label, the client.

Guesses from names and values, for `silotune new`: the same file gives the same guesses, and each
comes with its reason. This file does not know files, recipes or tokens, and no value of a row
appears in a reason.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from silotune.core.errors import DataError
from silotune.core.safe_text import one_line
from silotune.data.conversations import TEXT, is_missing, list_columns

WORDS = {
    "question": "question frage demande prompt input instruction anfrage anliegen query pregunta "
    "domanda problem request eingabe beschwerde",
    "answer": "answer antwort reponse response output completion reply losung solution respuesta "
    "risposta ausgabe empfehlung",
    "client": "client hospital hopital spital krankenhaus klinik clinic clinique institut site "
    "standort source quelle filiale branch department abteilung centre center zentrum praxis bank "
    "agence agency agentur region organisation organization mandant school schule ecole shop",
    "label": "label class klasse classe kategorie category categorie sentiment stimmung bewertung "
    "rating dringlichkeit urgence urgency prioritat priority priorite thema topic etikett",
}
"""What columns are called, in English, German, French and a few others, without accents."""
MOST_GROUPS = 50
"""More different values than this name neither clients nor labels."""
LONGEST_NAME = 40
"""Mean length above which values are texts and no names, in characters."""


@dataclass(frozen=True)
class Column:
    """One column of a file in numbers."""

    name: str
    num_rows: int
    num_filled: int
    num_distinct: int
    mean_length: float
    """Of the filled cells, in characters."""
    share_of_phrases: float
    """Share of the filled cells that consist of several words."""
    are_strings: bool
    """Whether all filled cells are strings that are not numbers."""
    are_single: bool
    """Whether no cell is a list or an object."""

    def is_called(self, kind: str) -> bool:
        """Whether the name contains one of the usual words for a kind of column."""
        folded = unicodedata.normalize("NFKD", self.name.casefold())
        plain = "".join(c for c in folded if not unicodedata.combining(c))
        return any(word in plain for word in WORDS[kind].split())

    @property
    def is_group(self) -> bool:
        """Whether few short values repeat in all rows, as names of clients or labels do."""
        few = 2 <= self.num_distinct <= min(MOST_GROUPS, self.num_rows // 2)
        is_named = self.is_called("client") or self.is_called("label")
        if not few or self.num_filled < self.num_rows or self.mean_length > LONGEST_NAME:
            return False
        return self.are_single and (self.are_strings or is_named)

    @property
    def is_text(self) -> bool:
        """Whether most rows have a phrase of their own."""
        is_filled = self.are_strings and 2 * self.num_filled >= self.num_rows
        is_named = self.is_called("question") or self.is_called("answer")
        return is_filled and (is_named or (not self.is_group and self.share_of_phrases >= 0.5))


@dataclass(frozen=True)
class Guess:
    """What a recipe would say about the columns."""

    task: str
    """instruct, classify or text."""
    keys: Mapping[str, str]
    """Keys of [data] that name columns: prompt and completion, or text and label; none if the
    columns have the usual names."""
    reasons: Mapping[str, str]
    """Why, by key; the key `by` is about the client."""
    client: str | None
    """The column that names the clients, if one seems to."""


def describe_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Every column of the rows, in the order in which they appear."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [_column(name, [row.get(name) for row in rows]) for name in names]


def guess_unknown(columns: Sequence[Column]) -> Guess:
    """Guess what columns with unusual names are.

    Raises:
        DataError: There are too few columns, or no two of them look like a question and an answer,
            or like a text and its label.
    """
    if len(columns) < 2 and not all(c.is_text for c in columns):
        raise DataError(
            f"there is only one column ({list_columns(c.name for c in columns)}), but a row needs "
            "a question and an answer, or a text and a label, or a whole text.\n"
            "  Add a column, or save the file with its columns separated by commas."
        )
    texts = [c for c in columns if c.is_text and _fits_placeholder(c.name)]
    groups = [c for c in columns if c.is_group and c not in texts]
    if len(texts) >= 2:
        return _question_and_answer(texts, groups)
    labels = _first_called("label", groups)
    if len(texts) == 1 and labels:
        return _text_and_label(texts[0], labels[0], groups)
    # other words beside the text may be its question: only their owner knows
    if len(texts) == 1 and not any(c.are_strings for c in columns if c not in [*texts, *groups]):
        return _text_alone(texts[0], groups)
    raise DataError(
        "no two columns look like a question and an answer, or like a text and a label; the "
        f"columns are {list_columns(c.name for c in columns)}.\n"
        "  Name the columns 'question' and 'answer' (or 'text' and 'label'), or write the recipe "
        "yourself: docs/data.md."
    )


def guess_client(columns: Sequence[Column], used: Sequence[str]) -> tuple[str | None, str]:
    """The column that seems to name the clients, and why."""
    groups = [c for c in columns if c.is_group and c.name not in used]
    ordered = _first_called("client", groups)
    if not ordered:
        return None, "no column has few different values that could name the clients"
    best = ordered[0]
    others = f"; others could be {list_columns(c.name for c in ordered[1:])}" * (len(ordered) > 1)
    called = "its name, and " if best.is_called("client") else ""
    return best.name, one_line(
        f"{called}{best.num_distinct} values in {best.num_rows} rows{others}"
    )


def _question_and_answer(texts: Sequence[Column], groups: Sequence[Column]) -> Guess:
    """By their names, or else the two longest in their order: the answer follows the question."""
    asked = [c for c in texts if c.is_called("question") and not c.is_called("answer")]
    answered = [c for c in texts if c.is_called("answer") and not c.is_called("question")]
    if len(asked) == 1 and len(answered) == 1:
        first, second, why = asked[0], answered[0], "by its name"
    else:
        longest = sorted(texts, key=lambda c: -c.mean_length)[:2]
        first, second = (c for c in texts if c in longest)
        if answered == [first] or asked == [second]:
            first, second = second, first
        why = f"one of the {'two texts' if len(texts) == 2 else 'two longest texts'}"
    client, reason = guess_client(groups, [first.name, second.name])
    size = "{:.0f} characters on average"
    return Guess(
        "instruct",
        {"prompt": f"{{{first.name}}}", "completion": f"{{{second.name}}}"},
        {
            "prompt": f"the question, {why}; {size.format(first.mean_length)}",
            "completion": f"the answer, {why}; {size.format(second.mean_length)}",
            "by": reason,
        },
        client,
    )


def _text_and_label(text: Column, label: Column, groups: Sequence[Column]) -> Guess:
    client, reason = guess_client(groups, [text.name, label.name])
    return Guess(
        "classify",
        {"text": text.name, "label": label.name},
        {
            "text": f"the only text; {text.mean_length:.0f} characters on average",
            "label": f"{label.num_distinct} values in {label.num_rows} rows",
            "by": reason,
        },
        client,
    )


def _text_alone(text: Column, groups: Sequence[Column]) -> Guess:
    client, reason = guess_client(groups, [text.name])
    return Guess(
        "text",
        {} if text.name == TEXT else {"text": text.name},
        {"text": f"the only text; {text.mean_length:.0f} characters on average", "by": reason},
        client,
    )


def _first_called(kind: str, groups: Sequence[Column]) -> list[Column]:
    """Columns that may be of a kind: those called so first, then those not called otherwise."""
    other = {"client": "label", "label": "client"}[kind]
    named = [c for c in groups if c.is_called(kind)]
    return named + [c for c in groups if c not in named and not c.is_called(other)]


def _fits_placeholder(name: str) -> bool:
    return bool(name.strip()) and not re.search(r"[.\[\]{}!:]", name)


def _column(name: str, cells: Sequence[Any]) -> Column:
    filled = [c for c in cells if not is_missing(c) and str(c).strip()]
    texts = [str(c).strip() for c in filled]
    return Column(
        name=name,
        num_rows=len(cells),
        num_filled=len(filled),
        num_distinct=len(Counter(texts)),
        mean_length=sum(map(len, texts)) / len(texts) if texts else 0.0,
        share_of_phrases=sum(" " in t for t in texts) / len(texts) if texts else 0.0,
        are_strings=all(isinstance(c, str) for c in filled) and not all(map(_is_number, texts)),
        are_single=all(isinstance(c, str | int | float | bool) for c in filled),
    )


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.,:/ -]*\d[\d.,:/ -]*%?", text) is not None
