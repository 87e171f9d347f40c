"""MultiPL-E: HumanEval in other languages, here JavaScript and C++.

Cassano et al. 2022, "MultiPL-E: A Scalable and Extensible Approach to Benchmarking Neural Code
Generation". arXiv:2208.08227

Prompts, stop tokens and tests are those of the data set's rows; the prompt loses the whitespace at
its ends, as in bigcode-evaluation-harness (tasks `multiple-js` and `multiple-cpp`), which
FlowerTune's leaderboard uses. C++ is compiled as there, with g++ -std=c++17, but statically: see
other_languages.py.
"""

from silotune.core.errors import DataError
from silotune.data.files import PlacedRow
from silotune.workflows.evaluate.suites.base import Hub
from silotune.workflows.evaluate.suites.cells import text_of, texts_of
from silotune.workflows.evaluate.suites.code import CodeSuite, Problem
from silotune.workflows.evaluate.suites.sandbox import Language

COLUMNS = ("name", "language", "prompt", "tests", "stop_tokens")
REVISION = "8a4cb75204eb3d5855a81778db6b95bfc80c9136"
"""The version of the data set that the harness reads."""


def _suite(language: Language, title: str) -> CodeSuite:
    def read(row: PlacedRow) -> Problem:
        given, where = row.columns, row.where
        if text_of(given, "language", where) != language:
            raise DataError(
                f"{where}: column 'language' is not '{language}'.\n"
                f"  Give suite 'multiple-{language}' the file of its own language."
            )
        return Problem(
            task_id=text_of(given, "name", where),
            prompt=text_of(given, "prompt", where).strip(),
            after="\n" + text_of(given, "tests", where) + "\n",
            stops=(*texts_of(given, "stop_tokens", where), "<file_sep>"),
        )

    return CodeSuite(
        name=f"multiple-{language}",
        title=f"MultiPL-E: HumanEval in {title}",
        hub=Hub("nuprl/MultiPL-E", f"humaneval-{language}", "test", revision=REVISION),
        layouts=(COLUMNS,),
        read=read,
        language=language,
    )


MULTIPLE_JS = _suite("js", "JavaScript")
MULTIPLE_CPP = _suite("cpp", "C++")
