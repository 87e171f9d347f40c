"""MBPP: write a small Python program from one sentence and one test; all tests decide.

Austin et al. 2021, "Program Synthesis with Large Language Models". arXiv:2108.07732

The prompt is the zero-shot form of bigcode-evaluation-harness (task `mbpp`, which follows InCoder,
Fried et al. 2022, arXiv:2204.05999), because FlowerTune's leaderboard uses it: a docstring with the
task and its first test. The paper itself shows three solved problems first, so its numbers are not
comparable. Tasks 11 to 510 are the test, as published; others of the same file are for training and
prompting. Differs from the harness: `test_setup_code` and `test_imports` run before the tests. The
challenge tests are not run, as there.
"""

from silotune.core.errors import DataError
from silotune.data.conversations import Row
from silotune.data.files import PlacedRow
from silotune.workflows.evaluate.suites.base import Hub
from silotune.workflows.evaluate.suites.cells import number_of, text_of, texts_of
from silotune.workflows.evaluate.suites.code import CodeSuite, Problem

COLUMNS = ("task_id", "text", "code", "test_list")
SANITIZED = ("task_id", "prompt", "code", "test_list")
"""The hand-verified part, which calls the task `prompt`."""
TEST = range(11, 511)
STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
"""The harness's list."""


def _read(row: PlacedRow) -> Problem | None:
    given, where = row.columns, row.where
    number = number_of(given, "task_id", where)
    if number not in TEST:
        return None
    task = text_of(given, "text" if "text" in given else "prompt", where)
    tests = texts_of(given, "test_list", where)
    if not tests:
        raise DataError(f"{where}: column 'test_list' is empty.\n  Fill it, or remove the row.")
    return Problem(
        task_id=f"MBPP/{int(number)}",
        prompt=f'"""\n{task}\n{tests[0]}\n"""\n',
        after="\n" + "\n".join([*_before_the_tests(given, where), *tests]) + "\n",
        stops=STOPS,
        solution=text_of(given, "code", where),
    )


def _before_the_tests(row: Row, where: str) -> list[str]:
    setup = row.get("test_setup_code")
    imports = texts_of(row, "test_imports", where) if row.get("test_imports") else []
    return [*imports, *([str(setup)] if setup else [])]


MBPP = CodeSuite(
    name="mbpp",
    title="MBPP: small Python programs, run against their tests",
    hub=Hub("google-research-datasets/mbpp", None, "test"),
    layouts=(COLUMNS, SANITIZED),
    read=_read,
)
