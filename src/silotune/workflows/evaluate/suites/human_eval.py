"""HumanEval: write the body of a function; it is right if it passes the problem's own tests.

Chen et al. 2021, "Evaluating Large Language Models Trained on Code". arXiv:2107.03374
"""

from silotune.core.errors import DataError
from silotune.data.files import PlacedRow
from silotune.workflows.evaluate.suites.base import Hub
from silotune.workflows.evaluate.suites.cells import text_of
from silotune.workflows.evaluate.suites.code import CodeSuite, Problem

COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""The paper's list. The text after one of these is no longer the function."""


def _read(row: PlacedRow) -> Problem:
    given = {column: text_of(row.columns, column, row.where) for column in COLUMNS}
    function = given["entry_point"]
    if not function.isidentifier():
        raise DataError(
            f"{row.where}: column 'entry_point' is not the name of a function.\n"
            "  Fix it, or remove the row."
        )
    return Problem(
        task_id=given["task_id"],
        prompt=given["prompt"],
        after=f"\n\n{given['test']}\n\ncheck({function})\n",
        stops=STOPS,
        solution=given["canonical_solution"],
    )


HUMAN_EVAL = CodeSuite(
    name="human_eval",
    title="HumanEval: Python functions, run against their tests",
    hub=Hub("openai/openai_humaneval", None, "test"),
    layouts=(COLUMNS,),
    read=_read,
)
