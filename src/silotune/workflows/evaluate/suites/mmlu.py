"""MMLU: 57 subjects in four groups, four options.

Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding". arXiv:2009.03300. The
groups are those of the leaderboard, which counts anatomy as STEM: 19 + 12 + 13 subjects, and 13
others that it leaves out.
"""

from silotune.core.errors import DataError
from silotune.core.wording import did_you_mean
from silotune.data.conversations import Row, is_missing
from silotune.workflows.evaluate.suites.base import LETTERS, Hub, Item, Layout, Suite
from silotune.workflows.evaluate.suites.cells import check_gold, pick, text_of
from silotune.workflows.evaluate.suites.medical import choice_item, options_of

GROUPS: dict[str, tuple[str, ...]] = {
    "STEM": (
        *("abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry"),
        *("college_computer_science", "college_mathematics", "college_physics"),
        *("computer_security", "conceptual_physics", "electrical_engineering"),
        *("elementary_mathematics", "high_school_biology", "high_school_chemistry"),
        *("high_school_computer_science", "high_school_mathematics", "high_school_physics"),
        *("high_school_statistics", "machine_learning"),
    ),
    "social": (
        *("econometrics", "high_school_geography", "high_school_government_and_politics"),
        *("high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology"),
        *("human_sexuality", "professional_psychology", "public_relations", "security_studies"),
        *("sociology", "us_foreign_policy"),
    ),
    "humanities": (
        *("formal_logic", "high_school_european_history", "high_school_us_history"),
        *("high_school_world_history", "international_law", "jurisprudence", "logical_fallacies"),
        *("moral_disputes", "moral_scenarios", "philosophy", "prehistory", "professional_law"),
        *("world_religions",),
    ),
    "other": (
        *("business_ethics", "clinical_knowledge", "college_medicine", "global_facts"),
        *("human_aging", "management", "marketing", "medical_genetics", "miscellaneous"),
        *("nutrition", "professional_accounting", "professional_medicine", "virology"),
    ),
}
"""Group -> its subjects."""

GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects}

LEADERBOARD_GROUPS = ("STEM", "social", "humanities")
"""The groups whose mean is the leaderboard's score; `other` is not among them."""


def _group(row: Row, where: str) -> str:
    """The group of the row's subject; empty if the row has no subject."""
    subject = row.get("subject")
    if is_missing(subject):
        return ""
    if subject not in GROUP_OF:
        raise DataError(
            f"{where}: column 'subject' is not one of MMLU's 57 subjects."
            f"{did_you_mean(str(subject), GROUP_OF)}\n"
            "  Write it like 'college_biology', or remove the column."
        )
    return GROUP_OF[subject]


def _read_hub(row: Row, where: str) -> Item:
    options = {letter: text_of(row, letter, where) for letter in LETTERS[:4]}
    gold = check_gold(text_of(row, "target", where), options, "target", where)
    asked = {"question": text_of(row, "input", where), "id": row.get("id")}
    return choice_item("mmlu", asked, where, options=options, gold=gold, group=_group(row, where))


def _read_choices(row: Row, where: str) -> Item:
    """The authors' layout (cais/mmlu): a list of choices and the number of the right one."""
    held = row["choices"]
    if not isinstance(held, list) or not 2 <= len(held) <= len(LETTERS):
        raise DataError(
            f"{where}: column 'choices' is not a list of two to five texts.\n"
            "  Fix the row, or remove it."
        )
    options = dict(zip(LETTERS, map(str, held), strict=False))
    gold = pick(dict(enumerate(options)), row, "answer", where)
    return choice_item("mmlu", row, where, options=options, gold=gold, group=_group(row, where))


def _read_plain(row: Row, where: str) -> Item:
    options = options_of(row, where)
    gold = check_gold(text_of(row, "answer", where), options, "answer", where)
    return choice_item("mmlu", row, where, options=options, gold=gold, group=_group(row, where))


def _hubs() -> tuple[Hub, ...]:
    # in this data set, only the name of the config states the subject
    return tuple(
        Hub("lukaemon/mmlu", subject, "test", exported=True, columns={"subject": subject})
        for subject in sorted(GROUP_OF)
    )


MMLU = Suite(
    name="mmlu",
    title="MMLU: 57 school, college and professional subjects, four options",
    hub=_hubs(),
    layouts=(
        Layout(("input", *LETTERS[:4], "target"), _read_hub),
        Layout(("question", "choices", "answer"), _read_choices),
        Layout(("question", "options", "answer"), _read_plain),
    ),
    kind="choice",
)
