"""Medical suites: PubMedQA, MedQA, MedMCQA and CareQA.

Each reads the layout of its data set on the hub, and a plain layout for local files: a question,
its options by letter and the letter of the right one.

Jin et al. 2019, "PubMedQA", arXiv:1909.06146; Jin et al. 2020, "What Disease does this Patient
Have?", arXiv:2009.13081; Pal et al. 2022, "MedMCQA", arXiv:2203.14371; Arias-Duart et al. 2025,
"Automatic Evaluation of Healthcare LLMs Beyond Question-Answering", arXiv:2502.06666 (CareQA).
"""

from collections.abc import Callable, Mapping

from silotune.core.errors import DataError
from silotune.data.conversations import Row, is_missing
from silotune.workflows.evaluate.suites.base import LETTERS, Hub, Item, Layout, Suite
from silotune.workflows.evaluate.suites.cells import check_gold, id_of, pick, text_of
from silotune.workflows.evaluate.suites.leaderboard import choice_body, medical_prompt

YES_NO_MAYBE = {"yes": "yes", "no": "no", "maybe": "maybe"}

Read = Callable[[Row, str], Item]


def choice_prompt(question: str, options: Mapping[str, str]) -> str:
    """A multiple-choice question for a chat."""
    lines = "\n".join(f"{label}. {text}" for label, text in options.items())
    return f"{question}\n\n{lines}\n\nAnswer with the letter of the right option, nothing else."


def choice_item(
    suite: str, row: Row, where: str, *, options: Mapping[str, str], gold: str, group: str = ""
) -> Item:
    """A multiple-choice item from a row with a `question`."""
    question = text_of(row, "question", where).strip()
    return Item(
        id=id_of(row, where),
        prompt=choice_prompt(question, options),
        options=options,
        gold=gold,
        leaderboard=medical_prompt(suite, choice_body(question, options)),
        group=group,
    )


def options_of(row: Row, where: str) -> dict[str, str]:
    """The column `options`: letter -> text, or a list of {"key": letter, "value": text}."""
    held = row["options"]
    if isinstance(held, list) and all(isinstance(one, Mapping) for one in held):
        held = {one.get("key"): one.get("value") for one in held}
    if not isinstance(held, Mapping):
        raise DataError(
            f"{where}: column 'options' is of type {type(held).__name__}.\n"
            '  Write {"A": "...", "B": "..."} in a .jsonl, .json or .parquet file.'
        )
    # in a parquet file, the letters that a row lacks have empty values
    options = {str(label): str(text) for label, text in held.items() if not is_missing(text)}
    wrong = not set(options) <= set(LETTERS) or any(not text.strip() for text in options.values())
    if wrong or len(options) < 2:
        raise DataError(
            f"{where}: column 'options' does not hold two to five texts by letter.\n"
            f"  Use the letters {', '.join(LETTERS)}; fix the row, or remove it."
        )
    return dict(sorted(options.items()))


def plain_layout(suite: str) -> Layout:
    """Question, options and the letter of the right one."""

    def read(row: Row, where: str) -> Item:
        options = options_of(row, where)
        gold = check_gold(text_of(row, "answer", where), options, "answer", where)
        return choice_item(suite, row, where, options=options, gold=gold)

    return Layout(("question", "options", "answer"), read)


def columns_layout(suite: str, columns: tuple[str, ...], *, first: int) -> Layout:
    """One column per option, and the number of the right one in `cop`, counted from `first`."""

    def read(row: Row, where: str) -> Item:
        options = dict(zip(LETTERS, (text_of(row, c, where) for c in columns), strict=False))
        numbers = {first + i: label for i, label in enumerate(options)}
        gold = pick(numbers, row, "cop", where)
        return choice_item(suite, row, where, options=options, gold=gold)

    return Layout(("question", *columns, "cop"), read)


def _read_medqa(row: Row, where: str) -> Item:
    """The gold letter belongs to the option with the answer's text."""
    options = options_of(row, where)
    answer = text_of(row, "answer", where)
    gold = next((label for label, text in options.items() if text == answer), "")
    check_gold(gold, options, "answer", where)
    return choice_item("medqa", row, where, options=options, gold=gold)


def _pubmedqa_layout(question: str, contexts: str) -> Layout:
    def read(row: Row, where: str) -> Item:
        asked = text_of(row, question, where).strip()
        abstract = "\n".join(_passages(row, contexts, where))
        gold = text_of(row, "final_decision", where)
        return Item(
            id=id_of(row, where),
            prompt=f"{abstract}\n\n{asked}\n\nAnswer with yes, no or maybe, nothing else.",
            options=YES_NO_MAYBE,
            gold=check_gold(gold, YES_NO_MAYBE, "final_decision", where),
            leaderboard=medical_prompt("pubmedqa", f"{abstract}\n{asked}"),
        )

    return Layout((question, contexts, "final_decision"), read)


def _passages(row: Row, column: str, where: str) -> list[str]:
    held = row[column]
    if isinstance(held, Mapping):  # qiaojin/PubMedQA
        held = held.get("contexts")
    if not isinstance(held, list) or not all(isinstance(one, str) for one in held) or not held:
        raise DataError(
            f"{where}: column '{column}' is not a list of texts.\n"
            "  Write the abstract's sections as a list, or remove the row."
        )
    return held


PUBMEDQA = Suite(
    name="pubmedqa",
    title="PubMedQA: questions on abstracts, yes, no or maybe",
    hub=(Hub("bigbio/pubmed_qa", "pubmed_qa_labeled_fold0_source", "test", exported=True),),
    layouts=(
        _pubmedqa_layout("QUESTION", "CONTEXTS"),
        _pubmedqa_layout("question", "contexts"),
        _pubmedqa_layout("question", "context"),
    ),
    kind="boolean",
)

MEDQA = Suite(
    name="medqa",
    title="MedQA: licensing exam of US physicians, four options",
    hub=(Hub("bigbio/med_qa", "med_qa_en_4options_source", "test", exported=True),),
    layouts=(
        Layout(("question", "options", "answer", "answer_idx"), _read_medqa),
        plain_layout("medqa"),
    ),
    kind="choice",
)

MEDMCQA = Suite(
    name="medmcqa",
    title="MedMCQA: entrance exams of Indian medical schools, four options",
    hub=(Hub("medmcqa", None, "validation"),),
    layouts=(
        columns_layout("medmcqa", ("opa", "opb", "opc", "opd"), first=0),
        plain_layout("medmcqa"),
    ),
    kind="choice",
)

CAREQA = Suite(
    name="careqa",
    title="CareQA: Spanish specialist exams in English, four options",
    hub=(Hub("HPAI-BSC/CareQA", "CareQA_en", "test"),),
    layouts=(
        columns_layout("careqa", ("op1", "op2", "op3", "op4"), first=1),
        plain_layout("careqa"),
    ),
    kind="choice",
)
